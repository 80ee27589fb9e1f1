"""Latent policies: a training step against one of imitation on the same batch, and tokens decoded against written chains."""
import statistics
import time

import torch

from rlworkbench.core.config import Config
from rlworkbench.recipes.sft import sft
from rlworkbench.rollouts.sampling import Sampling
from rlworkbench.tasks.digits import digits_sum
from rlworkbench.tasks.silent import digits_sum_silent, verbose_sum_silent
from rlworkbench.tasks.verbose import verbose_sum
from rlworkbench.training.beds import base_policy
from rlworkbench.training.choices import load_policy, new_trainer
from rlworkbench.training.evaluate import answers, verdicts

BEDS = {"micro": ("micro-verbose", verbose_sum_silent, verbose_sum), "tiny": ("tiny", digits_sum_silent, digits_sum)}


def latent(prompts=16, repeats=7, updates=150, held=100) -> dict:
    "CPU seconds of an AMVL step over those of an SFT step of the same demonstrations; tokens and accuracy of answers with K latents and with chains."
    base_policy("micro-verbose")
    out = {}
    for name, (policy, task, chains) in BEDS.items():
        config = Config(recipe="amvl", task=task.name, policy=policy, prompts=prompts, steps=400, lr=3e-3 if name == "micro" else 3e-4, evaluate=0, threads="1")
        trainers = {"amvl": new_trainer(config), "sft": new_trainer(config, sft)}
        seconds = {k: [] for k in trainers}
        for k in range(2 + repeats):
            for method, trainer in trainers.items():
                start = time.process_time()
                trainer.step()
                seconds[method] += [time.process_time() - start] if k >= 2 else []
        out[f"{name}: step, amvl / sft"] = statistics.median(a / b for a, b in zip(seconds["amvl"], seconds["sft"]))
        trainers["amvl"].fit(updates if name == "micro" else 20)
        for way, (who, on) in {"latents": (trainers["amvl"].policy, task), "chains": (load_policy(policy), chains)}.items():
            steps = answers(who, on.items("test")[:held], Sampling(0.0, on.max_tokens))
            out[f"{name}: tokens, {way}"] = float(torch.cat([s.length for s in steps]).float().mean())
            out[f"{name}: right, {way}"] = float(torch.cat([verdicts(on, s) for s in steps]).mean())
        out[f"{name}: tokens, chains / latents"] = out[f"{name}: tokens, chains"] / out[f"{name}: tokens, latents"]
    return out
