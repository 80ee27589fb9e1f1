"""What binds a training step: where its CPU time goes, and two changes that were tried, one kept where it helps, one not."""
import cProfile
import multiprocessing
import pstats
import re

import torch
from torch.nn.functional import linear

from tests.benchmarks.measure import in_turn
from tests.benchmarks.steps import CASES, ours, picture_model, questions, text_model

PARTS = {     # of a built-in function's name: what it is counted as
    "way back": r"run_backward", "matrix products": r"_nn\.linear|torch\.addmm|matmul|einsum|conv2d", "attention": r"scaled_dot_product",
    "drawing": r"multinomial|exponential_|torch\.rand\b", "softmax and its like": r"softmax|'exp'|logsumexp|'log'", "other tensor operations": r"torch|TensorBase",
}
LAYOUTS = {"8 rows, 128 to 512": (8, 128, 512), "32 rows, 128 to 512": (32, 128, 512), "64 rows, 128 to 512": (64, 128, 512), "64 rows, 512 to 128": (64, 512, 128), "64 rows, 128 to 16,384": (64, 128, 16384)}
DRAWS = {"32 rows, 512 words": (32, 512), "64 rows, 96 words": (64, 96), "64 rows, 4,096 words": (64, 4096), "64 rows, 16,384 words": (64, 16384)}


def counted_as(name: str) -> str:
    "The part of a step that a function belongs to, by its name in a profile."
    return next((part for part, pattern in PARTS.items() if re.search(pattern, name)), "Python and the rest")


def shares(case: str, steps: int = 5) -> dict:
    "{part: its share of the CPU time of a step of ours}, as cProfile sees it: Python's part is made larger by being watched."
    torch.set_num_threads(1)
    problems, length, size, side = CASES[case]
    model, words = (picture_model if side else text_model)(size, side)
    step = ours(model, words, questions(problems, length, side))
    for _ in range(2):
        step()
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(steps):
        step()
    profile.disable()
    spent = {}
    for (file, _, name), (_, _, own, _, _) in pstats.Stats(profile).stats.items():
        part = counted_as(name) if file == "~" else "Python and the rest"
        spent[part] = spent.get(part, 0) + own
    return {part: spent.get(part, 0) / sum(spent.values()) for part in (*PARTS, "Python and the rest")} | {"seconds": sum(spent.values()) / steps}


def layout(rows: int, width: int, out: int) -> dict:
    "CPU time of products with weights laid out (in, out) over those as they are, (out, in)."
    x, weight = torch.randn(rows, width), torch.randn(out, width)
    turned, times = weight.T.contiguous(), max(3, 2**24 // (width * out))
    def as_it_is():
        for _ in range(times):
            linear(x, weight)
    def other_way():
        for _ in range(times):
            x @ turned
    return in_turn(as_it_is, other_way, 9)


def drawing(rows: int, words: int) -> dict:
    "CPU time of `torch.multinomial`, a random number for each entry, over one number for each row and a running sum."
    p, times = torch.softmax(torch.randn(rows, words), -1), max(3, 2**22 // (rows * words))
    def one_number():
        for _ in range(times):
            torch.searchsorted(p.cumsum(-1), torch.rand(rows, 1))
    def multinomial():
        for _ in range(times):
            torch.multinomial(p, 1)
    return in_turn(one_number, multinomial, 9)


def binds() -> dict:
    "Shares of a step in each case of the whole step; ratios of what was tried."
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        parts = {case: pool.apply(shares, (case,)) for case in CASES}
    return {"shares": parts, "weights laid out (in, out)": {k: layout(*v) for k, v in LAYOUTS.items()}, "a number for each row": {k: drawing(*v) for k, v in DRAWS.items()}}
