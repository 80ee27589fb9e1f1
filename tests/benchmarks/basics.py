"""What the parts cost: rollouts, scoring, the head, health, recording, what-if, pictures, start-up, and where imitation ends."""
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from rlworkbench.core.files import write_json_lines
from rlworkbench.core.registry import probes
from rlworkbench.core.step import Step
from rlworkbench.policies.tiny import random_tiny
from rlworkbench.recipes.grpo import grpo
from rlworkbench.recipes.sft import sft
from rlworkbench.recipes.slots import Group
from rlworkbench.rollouts.sampler import sample
from rlworkbench.rollouts.sampling import Sampling
from rlworkbench.rollouts.scorer import score
from rlworkbench.serving.report import write_report
from rlworkbench.tasks.digits import digits_sum
from rlworkbench.training.choices import load_policy
from rlworkbench.training.evaluate import evaluate
from rlworkbench.training.job import recorded, train
from rlworkbench.training.run import Config, Run
from rlworkbench.training.trainer import Trainer
from rlworkbench.training.whatif import WhatIf  # noqa: F401, gives Trainer its whatif
from tests.benchmarks.measure import in_turn, interval

def rollouts(image=48, prompts=24, group=8, tokens=28) -> dict:
    "Our sampler against the model's own `generate`: the same tokens (greedy, no end token), the same process."
    policy = random_tiny(image=image)
    items = [replace(i, images=tuple(p.resize((image, image)) for p in i.images)) for i in digits_sum.items()[:prompts]]
    rows = torch.arange(prompts).repeat_interleave(group)
    law = Sampling(0.0, tokens, banned=(policy.eos,))
    encoded = policy.encode(items)

    def ours():
        step = Step(items=items, group=rows, prompts=encoded)
        sample(policy, step, law)
        return step.ids

    ids = torch.stack(encoded.ids)[rows]
    pixels = torch.cat([e["pixel_values"] for e in encoded.extra])[rows]

    def theirs():
        out = policy.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, max_new_tokens=tokens, do_sample=False,
                                    suppress_tokens=[*policy.banned, policy.eos], pad_token_id=policy.pad)
        return out[:, ids.shape[1]:]
    same = float((ours() == theirs()).float().mean())
    return in_turn(ours, theirs) | {"same_tokens": same, "image_tokens": (image // 8) ** 2}


def scoring(image=48, words=82, prompts=8, group=8, tokens=32) -> dict:
    "Forward and backward over replies: the prompt run once per problem against once per reply."
    policy = random_tiny(image=image)
    items = [replace(i, prompt="What is the sum?" + "+" * words) for i in digits_sum.items()[:prompts]]
    rows = torch.arange(prompts).repeat_interleave(group)
    encoded = policy.encode(items)
    step = Step(items=items, group=rows, prompts=encoded, ids=torch.randint(10, 80, (prompts * group, tokens)), mask=torch.ones(prompts * group, tokens),
                law=Sampling())

    def run(share):
        policy.model.zero_grad()
        score(policy, step, step.law, share)["logp"].mean().backward()
        return torch.cat([p.grad.flatten() for p in policy.parameters().values() if p.grad is not None])
    shared, apart = run(True), run(False)
    error = float((shared - apart).norm() / apart.norm())
    return in_turn(lambda: run(True), lambda: run(False)) | {"gradient_error": error, "prompt_tokens": len(encoded.ids[0])}


HEAD = """
import sys, time, torch
peak = lambda: int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024   # getrusage would count what the parent had at the fork
torch.set_num_threads(1)
torch.manual_seed(0)
head = torch.nn.Linear(128, 49152, bias=False)
hidden, ids = torch.randn(2048, 128, requires_grad=True), torch.randint(0, 49152, (2048,))
def ours():
    from rlworkbench.rollouts.sampling import token_stats
    return token_stats(head, hidden, ids, vocabulary=49152)[:2]
def trl():
    from trl.kernels import ChunkedLogProbFunction
    return ChunkedLogProbFunction.apply(hidden, head.weight, None, ids, 1.0, 32768, None, 1.0, ("entropy",))[:2]
def plain():
    logp = head(hidden).log_softmax(-1)
    return logp.gather(-1, ids[:, None])[:, 0], -(logp.exp() * logp).sum(-1).detach()
way, spent = globals()[sys.argv[1]], []
for _ in range(3):
    hidden.grad = head.weight.grad = None
    start = time.process_time()
    logp, entropy = way()
    logp.sum().backward()
    spent.append(time.process_time() - start)
print(min(spent), peak(), float(logp.sum()), float(entropy.sum()), float(hidden.grad.norm()), float(head.weight.grad.norm()))
"""
HEAD_IDLE = HEAD.split("def ours")[0] + "print(peak())"


def head(repeats=3) -> dict:
    "Log-prob and entropy of 2,048 tokens of 49,152, forward and backward: ours, TRL's chunks, a plain log-softmax. Each in a process of its own, in turn; best of three within it."
    def ask(code, way):
        done = subprocess.run([sys.executable, "-c", code, way], capture_output=True, text=True, check=True)
        return [float(x) for x in done.stdout.split()]
    idle = ask("import trl.kernels, rlworkbench.rollouts.sampling\n" + HEAD_IDLE, "idle")[0]
    ways = ("ours", "trl", "plain")
    told = {way: [] for way in ways}
    for k in range(repeats):
        for way in ways if k % 2 == 0 else ways[::-1]:
            told[way].append(ask("import trl.kernels\n" + HEAD, way))
    middle = {way: [statistics.median(column) for column in zip(*rows)] for way, rows in told.items()}
    off = max(abs(a / b - 1) for way in ("trl", "plain") for a, b in zip(middle["ours"][2:], middle[way][2:]))
    each = {way: sorted(b[0] / a[0] for a, b in zip(told["ours"], told[way])) for way in ways}
    low, high = interval(each["trl"])
    return {"ratio_low": low, "ratio_high": high, "cpu_seconds": {w: m[0] for w, m in middle.items()}, "megabytes": {w: m[1] - idle for w, m in middle.items()}, "apart": off,
            "ratio_trl": middle["trl"][0] / middle["ours"][0], "ratio_plain": middle["plain"][0] / middle["ours"][0],
            "memory_share_of_trl": (middle["ours"][1] - idle) / (middle["trl"][1] - idle), "repeats": repeats}


def health() -> dict:
    "A training step with its health columns and without; the weights afterwards."
    def trainer(on):
        recipe = grpo.but(rollout=Group(Sampling(max_tokens=34)))
        return Trainer(load_policy("tiny"), digits_sum, recipe, 24, 8, health=on, watchers=None if on else ())
    on, off = trainer(True), trainer(False)
    found = in_turn(off.step, on.step)
    same = all(torch.equal(a, b) for a, b in zip(on.policy.weights().values(), off.policy.weights().values()))
    return found | {"identical_weights": same}


def recording() -> dict:
    "Ten training steps, their log, tables, pictures and a checkpoint written as by default, against ten that leave nothing."
    config, number = Config(evaluate=0), iter(range(10**6))

    def ten(run=None):
        trainer = Trainer(load_policy("tiny"), digits_sum, grpo.but(rollout=Group(Sampling(max_tokens=34))), 24, 8)
        for _ in range(10):
            step = trainer.step()
            if run is not None:
                run.log(step)
                if recorded(config, trainer.done):
                    run.record(trainer.policy, step, sorted(set(step.group.tolist()))[:6])
        if run is not None:
            run.save(trainer)
    with TemporaryDirectory() as tmp:
        return in_turn(ten, lambda: ten(Run.create(Path(tmp) / str(next(number)), config)), repeats=3)


def folders() -> dict:
    "Megabytes of a run of 100 steps; seconds to open one of 1,000 (its log repeated, its tables kept), and to write its report."
    def timed(code):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=tmp)
        return time.perf_counter() - start
    with TemporaryDirectory() as tmp:
        run = train(Config(steps=100, evaluate=0, threads="1"), Path(tmp) / "run")
        size = sum(f.stat().st_size for f in run.folder.rglob("*")) / 1e6
        rows = run.rows()
        write_json_lines(run.folder / "metrics.jsonl", [r | {"step": 100 * k + r["step"]} for k in range(10) for r in rows])
        for k in range(10, 100):
            shutil.copy(run.folder / "steps/000010.parquet", run.folder / f"steps/{k * 10 + 10:06d}.parquet")
        start = time.perf_counter()
        again = Run.open(run.folder)
        opened = (len(again.metrics), len(again.steps()), len(again.tokens(again.steps()[-1])))
        open_seconds = time.perf_counter() - start
        start = time.perf_counter()
        write_report(again, Path(tmp) / "report.html")
        return {"megabytes_100_steps": size, "open_seconds": open_seconds, "opened": opened, "report_seconds": time.perf_counter() - start,
                "report_megabytes": (Path(tmp) / "report.html").stat().st_size / 1e6,
                "report_command_seconds": timed("from rlworkbench.cli.main import main; import sys; sys.argv = ['x', 'report', 'run']; main()")}


def whatif() -> dict:
    "Five recipes compared on the replies of one step, as a multiple of that step; with a trial of each update, and with the replies drawn first."
    recipe = grpo.but(rollout=Group(Sampling(max_tokens=34)))
    trainer = Trainer(load_policy("tiny"), digits_sum, recipe, 24, 8)
    trainer.step()
    others = ("dr_grpo", "dapo", "gspo", "entropy20")
    phases = trainer.phases()
    held = next(s for s in phases if s.phase == "advantage")
    ways = {"held": {"step": held}, "held, with trials": {"step": held, "trial": True}, "drawn first": {}, "drawn first, with trials": {"trial": True}}
    twin = Trainer(load_policy("tiny"), digits_sum, recipe, 24, 8)
    return {name: in_turn(twin.step, lambda: trainer.whatif(*others, **how), 3)["ratio"] for name, how in ways.items()}


def pictures() -> dict:
    "CPU seconds until each probe's picture of a recorded step of 512 replies; those of a policy load it, too."
    with TemporaryDirectory() as tmp:
        run = train(Config(steps=1, prompts=64, group=8, evaluate=0, record="full", watch="looking,geometry"), f"{tmp}/run", before=False)
        spent, refused = {}, {}
        for name, probe in probes.all().items():
            start = time.process_time()
            try:
                probe(run)._repr_html_()
            except ValueError as e:
                refused[name] = str(e).replace(tmp, "")
                continue
            spent[name] = round(time.process_time() - start, 3)
    return {"seconds": spent, "slowest": max(spent.values()), "within_a_second": sum(s <= 1 for s in spent.values()), "of": len(spent), "refused": refused}


def startup() -> dict:
    "Wall seconds of `import rlworkbench` and of `rlworkbench --help`, medians of five processes."
    def wall(command):
        out = []
        for _ in range(5):
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            out.append(time.perf_counter() - start)
        return statistics.median(out)
    return {"import": wall([sys.executable, "-c", "import rlworkbench"]), "help": wall([Path(sys.executable).parent / "rlworkbench", "--help"]),
            "python": wall([sys.executable, "-c", "pass"])}


def plateau(seconds=45.0, n=400, k=8) -> dict:
    "What continued imitation does to the shipped policy: so much CPU time at three learning rates, on validation problems."
    def looked_at(policy):
        found = evaluate(policy, digits_sum, n, digits_sum.max_tokens, k, split="validation")
        return {"greedy": found.greedy, "sampled": found.sampled, "n": n, "k": k}
    out = {"shipped": looked_at(load_policy("tiny"))}
    for lr in (3e-5, 1e-4, 3e-4):
        trainer = Trainer(load_policy("tiny"), digits_sum, sft, 64, lr=lr, watchers=())
        start = time.process_time()
        while time.process_time() - start < seconds:
            trainer.step()
        out[f"lr {lr:g}, {trainer.done} steps"] = looked_at(trainer.policy)
    return out
