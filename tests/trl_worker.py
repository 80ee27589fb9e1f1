"""What several processes are asked: two updates inside TRL's trainer, a run gone on with, a mistake, a run in which one of them dies. Started by tests/test_engine_trl_processes.py."""
import os
import shutil
import sys
from pathlib import Path

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
import torch
from safetensors.torch import save_file
from transformers import TrainerCallback

from rlworkbench.core.config import Config
from rlworkbench.core.registry import tasks
from rlworkbench.engines import job
from rlworkbench.recipes.dapo import mixed_groups
from rlworkbench.recipes.entropy20 import top_entropy
from rlworkbench.recipes.grpo import grpo
from rlworkbench.recipes.slots import kl_penalty, token_mean
from rlworkbench.rollouts.parts import from_function
from rlworkbench.training.choices import load_policy
from tests import trl_side

SMALL, T = "small-llava", 6


def odd(item, text):
    return float(len(text) % 2)


RECIPE = grpo.but(name="all_at_once", rewards=(from_function(odd, "correct"),), keep=mixed_groups(0), weight=top_entropy(.3), penalty=kl_penalty(.1), normalise=token_mean,
                  epochs=2)          # every slot that looks at the whole minibatch


class Keep(TrainerCallback):
    def __init__(self, policy, into):
        self.policy, self.into = policy, into

    def on_pre_optimizer_step(self, args, state, control, **_):
        self.into |= {f"{state.global_step}/{n}": p.grad.clone() for n, p in self.policy.parameters().items() if p.grad is not None}


def dictated(step) -> list:
    "Replies of different lengths, the first tokens of what was drawn; those to the first problem are all the same, so that it is dropped."
    rows = [row[:2 + k % (T - 1)] for k, row in enumerate(step.ids.tolist())]
    return rows[:1] * trl_side.G + rows[trl_side.G:]


def run(out, processes=1):
    "Two updates from one dictated rollout; gradients, advantages, weights and losses into `out`."
    task, policy, found = tasks.get("digits-sum"), trl_side.unbanned(SMALL), {}
    step = trl_side.rollout(load_policy(SMALL), task, grpo)
    trainer = trl_side.build(Path(out).parent, policy, task, RECIPE, per_device_train_batch_size=trl_side.P * trl_side.G // 2 // processes, optim="sgd", learning_rate=.01)
    replies = dictated(step)
    first = trainer.accelerator.process_index * len(replies) // processes
    trainer._generate_single_turn = lambda *a, **k: (replies[first:first + len(replies) // processes], None)
    trainer.add_callback(Keep(policy, found))
    trainer.train()
    assert trainer.accelerator.num_processes == processes
    if trainer.accelerator.is_main_process:
        found |= {"advantage": trainer.now.advantage, "coef": trainer.kept.coef, "weight": trainer.kept.weight, "loss": torch.tensor([r["loss"] for r in trainer.state.log_history[:2]]),
                  "logged": torch.tensor(list(trainer._logs["advantages"])), "old": trainer.now.old, "kept": torch.tensor(len(trainer.kept))}
        save_file({k: v.contiguous() for k, v in found.items()}, out)


def command(*words):
    "A command of the workbench, in all processes; what it exits with."
    from rlworkbench.cli.main import main
    sys.argv = ["rlworkbench", *map(str, words)]
    try:
        main()
    except SystemExit as e:
        return e.code


def train(out, *more):
    "A small run on TRL."
    return command("train", "--engine", "trl", "--policy", SMALL, "--max-tokens", T, "--evaluate", 0, "--threads", 1, "--out", out, *more)


def gone_on(home):
    "Four steps; and the same folder as it was after two, gone on with."
    whole = Config(policy=SMALL, max_tokens=T, prompts=2, group=4, steps=4, lr=.01, evaluate=0, checkpoint=2, keep=0, threads="1", reward=f"{home / 'dies.py'}:fine")
    if job.train(whole, home / "whole"):
        shutil.copytree(home / "whole", home / "again")
        for late in ("trl/checkpoint-4", "checkpoints/000004"):
            shutil.rmtree(home / "again" / late)
    job.processes().wait_for_everyone()
    job.resume(home / "again")


if __name__ == "__main__":
    torch.set_num_threads(1)
    home = Path(sys.argv[1])
    run(home / "two", 2)
    gone_on(home)
    assert train(home / "wrong", "--prompts", 3, "--group", 3) == 2
    sys.exit(train(home / "run", "--prompts", 2, "--group", 4, "--steps", 5, "--reward", f"{home / 'dies.py'}:reward"))
