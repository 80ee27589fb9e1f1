"""What took minutes and is kept beside the notebooks: `python -m tests.measured pipelines [NAME ...]`, `python -m tests.measured vision_r1`, `python -m tests.measured dualformer`, `python -m tests.measured dose`."""
import json
import sys
import time
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch

from rlworkbench.core.files import write_text
from rlworkbench.core.registry import tasks
from rlworkbench.core.seeds import generator
from rlworkbench.core.step import Step
from rlworkbench.recipes.dualformer import dualformer, retold
from rlworkbench.recipes.sft import sft
from rlworkbench.recipes.slots import Group
from rlworkbench.recipes.vision_r1 import criteria, vision_r1
from rlworkbench.rollouts.sampler import sample
from rlworkbench.rollouts.sampling import Sampling
from rlworkbench.serving.stages import stages_told
from rlworkbench.tasks.boxes import matched
from rlworkbench.tasks.scenes import iou
from rlworkbench.tasks.verbose import VerboseSum
from rlworkbench.training.beds import base_policy
from rlworkbench.training.choices import load_policy, new_trainer
from rlworkbench.training.evaluate import answers
from rlworkbench.training.pipeline import READY, read_pipeline
from rlworkbench.training.run import Run
from rlworkbench.training.stages import Training
from rlworkbench.training.trainer import Trainer
from tests.dose import dose

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "runs" / "measured"


def keep(file, found):
    "Write a result beside its notebook."
    file = ROOT / "nbs" / file
    file.parent.mkdir(exist_ok=True)
    write_text(file, json.dumps(found) + "\n")


def kept(file):
    return json.loads(file.read_text()) if (file := ROOT / "nbs" / file).is_file() else {}


def pipelines(*names):
    "Ready pipelines at their full length, with the battery before, between and after the stages."
    for name in names or READY:
        start, plan = time.process_time(), read_pipeline(name)
        single = {n: Training(replace(s.config, threads="1")) for n, s in plan.stages.items()}
        state = replace(plan, stages=single).run(RUNS / name)
        found = {"doc": state["doc"], "n": state["n"], "before": state["before"], "done": [{k: d[k] for k in ("name", "battery", "is")} for d in state["done"]],
                 "stages": stages_told(RUNS / name, state), "cpu_seconds": round(time.process_time() - start, 1)}
        keep("training/results/pipelines.json", kept("training/results/pipelines.json") | {name: found})
        print(name, found["cpu_seconds"], flush=True)


# --- Vision-R1 ---
def parts_of(policy, task, law, n=200) -> dict:
    "What one reply to each held-out problem earns by the rules of both stages, and how well the boxes lie; a true box without a partner has overlap 0."
    step, = answers(policy, task.items("test")[:n], law, 1, 0, batch=n)
    step.task, step.mask, out = task, torch.ones(n, 1), {}
    for stage, clock in (("first", (0, 2)), ("second", (1, 2))):
        step.clock = clock
        out |= {f"{part}, {stage} rules": float(v.mean()) for part, v in criteria()(step).items() if part != "format" or stage == "first"}
    both = [task.boxes(step.items[g], text) for g, text in zip(step.group.tolist(), step.text)]
    v = [x for told, true in both for x in ([iou(told[i], true[j]) for i, j in matched(told or [], true)] + [0.] * len(true))[:len(true)]]
    return out | {"IoU": sum(v) / len(v)} | {f"IoU ≥ {q}": sum(x >= q for x in v) / len(v) for q in (.5, .75, .9)} | {
        "as many boxes as there are": sum(len(told or []) == len(true) for told, true in both) / n}


def boxes():
    "Imitation, then Vision-R1 with the bar raised half-way, as the ready pipeline has them; and from the same policy with the bar where it was."
    start, task, place = time.process_time(), tasks.get("scenes-boxes-alone"), RUNS / "vision-r1"
    if not (place / "2-boxes" / "result.json").is_file():
        pipelines("vision-r1")
    run = Run.open(place / "2-boxes")
    recipe = vision_r1.but(rewards=(criteria(2.),), rollout=Group(Sampling(max_tokens=task.max_tokens)))
    never = new_trainer(replace(run.config, evaluate=0), recipe)
    rows = {"raised half-way": run.rows(), "never raised": never.fit(run.config.steps)}
    policies = {"after imitation": load_policy(str(place / "1-imitate")), "raised half-way": load_policy(str(place / "2-boxes")), "never raised": never.policy}
    columns = ("rewards/format/mean", "rewards/recall/mean", "rewards/precision/mean", "correct", "frac_reward_zero_std")
    found = {"config": {k: getattr(run.config, k) for k in ("task", "steps", "prompts", "group", "lr", "seed")}, "rows": {name: {k: [round(r[k], 4) for r in log] for k in columns} for name, log in rows.items()},
             "looks": {f"{name}, {how}": {k: round(v, 4) for k, v in parts_of(p, task, law).items()} for name, p in policies.items()
                       for how, law in (("greedy", Sampling(0., task.max_tokens)), ("sampled", Sampling(1., task.max_tokens)))}}
    some = task.items("test")[:6]
    found["shown"] = {name: [task.boxes(i, text)[0] for i, text in zip(some, answers(p, some, Sampling(0., task.max_tokens))[0].text)] for name, p in policies.items()}
    cost = {s: Run.open(place / s).read("cost.json")["cpu_seconds"] for s in ("1-imitate", "2-boxes")}
    keep("recipes/results/vision_r1.json", found | {"cpu_seconds": cost | {"never raised, and looks": round(time.process_time() - start, 1)}})


# --- Dualformer ---
MODES = {"fast": "<answer>", "slow": "<think>", "auto": ""}
faultless = VerboseSum("faultless", drop=0., check=0., mode="auto")


def asked(policy, n=48, each=16) -> dict:
    "Sampled replies to held-out problems in each mode: right, right at least once, tokens, whether there is a chain."
    items, out = faultless.items("test")[:n], {}
    for mode, begin in MODES.items():
        law = Sampling(max_tokens=faultless.max_tokens)
        step = Step(items=items, group=torch.arange(n).repeat_interleave(each), prompts=policy.encode(items), law=law, generator=generator(0, "evaluate", mode))
        sample(policy, step, law, torch.tensor([policy.tokens(begin)[:1]] * (n * each)) if begin else None)
        right = torch.tensor([faultless.score(items[g], t)["correct"] for g, t in zip(step.group.tolist(), step.text)]).reshape(n, each)
        out[mode] = {"right": float(right.mean()), f"one of {each} right": float(right.amax(1).mean()), "tokens": float(step.length.float().mean()),
                     "chain": sum("</think>" in t for t in step.text) / len(step.text)}
    return {m: {k: round(v, 4) for k, v in of.items()} for m, of in out.items()}


def modes(seeds=3, steps=200, prompts=24, lr=1e-3):
    "Whole chains, answers alone, and Dualformer, from one base policy; what is measured already stays."
    answers_alone = dualformer.but(told=retold((0, 0, 0, 0, 1)))
    arms = {"whole chains": (sft, steps), "answers alone": (answers_alone, steps), "Dualformer": (dualformer, steps), "answers alone, as many as Dualformer saw": (answers_alone, steps // 20)}
    found = kept("recipes/results/dualformer.json") or {"steps": steps, "prompts": prompts, "lr": lr, "rows": [], "cpu_seconds": 0.0}
    for seed, (name, (lesson, length)) in product(range(seeds), arms.items()):
        if any((r["seed"], r["arm"]) == (seed, name) for r in found["rows"]):
            continue
        start = time.process_time()
        trainer = Trainer(base_policy("micro-verbose"), faultless, lesson, prompts=prompts, lr=lr, steps=length, seed=seed, watchers=())
        trainer.fit(length)
        found["rows"].append({"seed": seed, "arm": name} | asked(trainer.policy))
        found["cpu_seconds"] = round(found["cpu_seconds"] + time.process_time() - start, 1)
        keep("recipes/results/dualformer.json", found)
        print(found["rows"][-1], found["cpu_seconds"], flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"pipelines": pipelines, "vision_r1": boxes, "dualformer": modes, "dose": dose}[sys.argv[1]](*sys.argv[2:])
