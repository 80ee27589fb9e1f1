"""Selection: VIG in forward passes, LESS features against an epoch of training, and choosing from 10,000 x 512 features."""
import time

import numpy as np
import torch

from rlworkbench.core.seeds import generator
from rlworkbench.policies.tiny import load_tiny
from rlworkbench.recipes.sft import sft
from rlworkbench.selection.algorithms import ALGORITHMS, choose
from rlworkbench.selection.features import gradient_features
from rlworkbench.selection.gain import token_gains
from rlworkbench.tasks.digits import digits_count, digits_sum
from rlworkbench.training.supply import written
from rlworkbench.training.trainer import Trainer

def seconds(work) -> float:
    "CPU seconds."
    start = time.process_time()
    work()
    return time.process_time() - start


def positions(policy, work) -> int:
    "How many positions go through the first layer of the tower while something is done."
    seen = []
    hook = policy.tower.layers[0].register_forward_hook(lambda module, args, kwargs, out: seen.append(out if isinstance(out, torch.Tensor) else out[0]), with_kwargs=True)
    work()
    hook.remove()
    return sum(x.shape[:2].numel() for x in seen)


def passes(problems=96) -> float:
    "Positions that VIG needs, over those of one pass over each prompt with its demonstration."
    policy, items = load_tiny(), digits_sum.items()[:problems]

    def once():
        for at in range(0, problems, 32):
            step = written(policy, items[at:at + 32], [i.demo for i in items[at:at + 32]])
            with torch.no_grad():
                policy.whole(step.prompts, step.ids)
    return positions(policy, lambda: token_gains(policy, items)) / positions(policy, once)


def features_over_epoch(problems=480, repeats=3) -> float:
    "CPU seconds of LESS features over those of one epoch of plain training on the same pool; the median, measured in turn."
    items, policy = digits_count.items()[:problems], load_tiny()
    few = type("Pool", (), {"name": "pool", "items": lambda self, split="train": items, "outline": lambda self, split="train": []})()
    trainer, ratios = Trainer(load_tiny(), few, sft, prompts=24, health=False, watchers=()), []
    trainer.fit(2)
    for k in range(repeats):
        epoch = seconds(lambda: trainer.fit(problems // 24))
        ratios.append(seconds(lambda: gradient_features(policy, items, items[:32], generator(k, "benchmark"))) / epoch)
    return sorted(ratios)[repeats // 2]


def choosing(pool=10_000, dims=512, query=32, taken=500) -> dict:
    "CPU seconds of each algorithm."
    rng = np.random.default_rng(0)
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
    features = unit(rng.normal(size=(pool, dims)).astype(np.float32))
    asked = unit(features[:query] + .5 * unit(rng.normal(size=(query, dims)).astype(np.float32)))
    return {name: seconds(lambda: choose(name, asked @ features.T, features, taken)) for name in ALGORITHMS}


def selection() -> dict:
    "The three bars."
    return {"vig_passes": passes(), "less_over_epoch": features_over_epoch(), "choosing_seconds": choosing()}
