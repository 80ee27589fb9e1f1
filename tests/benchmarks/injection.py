"""What bending the gradients costs: a step of DRIFT against the same step of imitation."""
import statistics
import time

from rlworkbench.core.registry import recipes, tasks
from rlworkbench.training.beds import base_policy
from rlworkbench.training.trainer import Trainer

def injection(repeats=9, prompts=16) -> dict:
    "CPU seconds of a step of imitation (ours) and of DRIFT, its direction loaded and its step followed; on tiny-reader, in turn."
    base_policy("tiny-reasoner")
    make = lambda lesson: Trainer(base_policy("tiny-reader"), tasks.get("digits-chains"), recipes.get(lesson), prompts=prompts, lr=1e-5, steps=100, watchers=())
    trainers, times = {name: make(name) for name in ("sft", "drift")}, {"sft": [], "drift": []}
    for t in trainers.values():
        t.step()
    for k in range(repeats):
        for name in ("sft", "drift") if k % 2 == 0 else ("drift", "sft"):
            start = time.process_time()
            trainers[name].step()
            times[name].append(time.process_time() - start)
    ratios = sorted(b / a for a, b in zip(times["sft"], times["drift"]))
    return {"sft": statistics.median(times["sft"]), "drift": statistics.median(times["drift"]), "ratio": statistics.median(ratios), "ratio_min": ratios[0], "ratio_max": ratios[-1], "repeats": repeats}
