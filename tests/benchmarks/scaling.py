"""How a training step grows: exponents of its CPU time and memory in replies, tokens, image tokens and vocabulary, and its share of the machine's measured GEMM peak.

Each size is a forked process of its own, with a random Llava of the shape of `tiny`, replies that can't end early, and one minibatch. An exponent is the slope of the logarithms, by least squares over four sizes.
"""
import math
import multiprocessing
import re
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlavaForConditionalGeneration

from rlworkbench.policies.hugging import HuggingPolicy
from rlworkbench.policies.tiny import tiny_config, tiny_processor
from rlworkbench.recipes.grpo import grpo
from rlworkbench.recipes.slots import Group
from rlworkbench.rollouts.sampling import Sampling
from rlworkbench.tasks.task import Task
from rlworkbench.training.trainer import Trainer
from tests.benchmarks.measure import peak
from tests.benchmarks.steps import pays, questions

USUAL = {"replies": 8, "tokens": 32, "image tokens": 36, "words": 96}      # G, T, I, V; four problems
AXES = {"replies": (4, 8, 16, 32), "tokens": (16, 32, 64, 128), "image tokens": (36, 64, 144, 256), "words": (1024, 4096, 16384, 49152)}
PROBLEMS, STEPS = 4, 3


class Same(Task):
    "The same problems in each step."
    def items(self, split="train"):
        from rlworkbench.core.item import Item
        return [Item(f"scaling/train/{k}", text, (picture,)) for k, (text, picture) in enumerate(questions(PROBLEMS, 12, self.side))]


def trainer_of(size: dict) -> Trainer:
    "A random policy and its trainer."
    torch.manual_seed(0)
    side, task = 8 * math.isqrt(size["image tokens"]), Same("same")
    object.__setattr__(task, "side", side)
    policy = HuggingPolicy(LlavaForConditionalGeneration(tiny_config(size["words"], side)), tiny_processor(side), "random")
    reward = lambda step: {"sevens": torch.tensor([pays(row[:n]) for row, n in zip(step.ids.tolist(), step.length.tolist())])}
    recipe = grpo.but(rewards=(reward,), rollout=Group(Sampling(max_tokens=size["tokens"], banned=(policy.eos, policy.pad))))
    return Trainer(policy, task, recipe, PROBLEMS, size["replies"], lr=1e-5, watchers=())


def resident() -> float:
    "Megabytes that this process holds; its peak begins anew from here."
    Path("/proc/self/clear_refs").write_text("5")
    return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def gemm(n=1024, repeats=6) -> float:
    "The most multiplications and additions of a square product, in 1e9 a CPU second."
    a, b, best = torch.randn(n, n), torch.randn(n, n), 0.0
    for _ in range(repeats):
        start = time.process_time()
        a @ b
        best = max(best, 2 * n**3 / (time.process_time() - start))
    return best / 1e9


def counted(trainer) -> dict:
    "Multiplications and additions of matrix products in a step, in 1e9: while replies are drawn, and from the first forward pass to the update."
    told = {}
    with FlopCounterMode(display=False) as counter:
        for step in trainer.phases():
            told[step.phase] = counter.get_total_flops() / 1e9
    return {"rollout": told["sample"], "update": told["update"] - told["advantage"]}


def one(size: dict, out):
    "One size, in a process of its own: CPU seconds of rollout, update and step, megabytes on top of the model, and the work that was done."
    torch.set_num_threads(1)
    trainer = trainer_of(size)
    before, spent = resident(), []
    for _ in range(STEPS):
        start = time.process_time()
        m = trainer.step().metrics
        spent.append((time.process_time() - start, m["cpu/sample"], sum(m[f"cpu/{p}"] for p in ("forward", "loss", "gradient", "update"))))
    grown = peak() - before
    step, rollout, update = (sorted(x)[(STEPS - 1) // 2] for x in zip(*spent[1:]))
    out.put({"seconds": step, "rollout": rollout, "update": update, "megabytes": grown, "work": counted(trainer), "gemm": gemm()})


def alone(size: dict) -> dict:
    "A forked process, waited for."
    context = multiprocessing.get_context("fork")
    out = context.SimpleQueue()
    process = context.Process(target=one, args=(size, out))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"the process for {size} ended with {process.exitcode}")
    return out.get()


def slope(xs, ys) -> float:
    "Of the logarithms, by least squares."
    xs, ys = [math.log(x) for x in xs], [math.log(y) for y in ys]
    mx, my = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - mx) * (y - my) for x, y in zip(xs, ys)) / sum((x - mx) ** 2 for x in xs)


def scaling() -> dict:
    "Per axis: sizes, CPU seconds, megabytes, exponents over all sizes and between the last two; shares of the GEMM peak."
    told = {axis: [alone(USUAL | {axis: x}) for x in xs] for axis, xs in AXES.items()}
    best = max(r["gemm"] for rows in told.values() for r in rows)
    out = {"gemm_peak_gflops": best, "usual": USUAL | {"problems": PROBLEMS}}
    for axis, rows in told.items():
        columns = {k: [r[k] for r in rows] for k in ("seconds", "rollout", "update", "megabytes")}
        out[axis] = {"sizes": AXES[axis], **columns, "exponents": {k: slope(AXES[axis], ys) for k, ys in columns.items()},
                     "last_exponents": {k: slope(AXES[axis][-2:], ys[-2:]) for k, ys in columns.items()},
                     "share_of_peak": {k: [r["work"][k] / r[k] / best for r in rows] for k in ("rollout", "update")}}
    return out
