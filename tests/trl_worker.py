"""One update inside TRL's trainer, in as many processes as there are; the first writes what reached the optimiser. Started by tests/test_engine_trl_processes.py."""
import os
import sys
from pathlib import Path

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
import torch
from safetensors.torch import save_file
from transformers import TrainerCallback

from rlworkbench.core.registry import tasks
from rlworkbench.recipes.dapo import mixed_groups
from rlworkbench.recipes.entropy20 import top_entropy
from rlworkbench.recipes.grpo import grpo
from rlworkbench.recipes.slots import kl_penalty, token_mean
from tests import trl_side

RECIPE = grpo.but(name="all_at_once", keep=mixed_groups(0), weight=top_entropy(.3), penalty=kl_penalty(.1), normalise=token_mean, epochs=2)   # every slot that looks at the whole minibatch


class Keep(TrainerCallback):
    def __init__(self, policy, into):
        self.policy, self.into = policy, into

    def on_pre_optimizer_step(self, args, state, control, **_):
        self.into |= {f"{state.global_step}/{n}": p.grad.clone() for n, p in self.policy.parameters().items() if p.grad is not None}


def run(out, processes=1):
    "Two updates from one dictated rollout; gradients, advantages, weights and losses into `out`."
    task, policy, found = tasks.get("digits-sum"), trl_side.unbanned("tiny"), {}
    step = trl_side.rollout(policy, task, grpo)
    trainer = trl_side.build(Path(out).parent, policy, task, RECIPE, per_device_train_batch_size=trl_side.P * trl_side.G // 2 // processes, optim="sgd", learning_rate=.01)
    replies = [row[:n] for row, n in zip(step.ids.tolist(), step.length.tolist())]
    first = trainer.accelerator.process_index * len(replies) // processes
    trainer._generate_single_turn = lambda *a, **k: (replies[first:first + len(replies) // processes], None)
    trainer.add_callback(Keep(policy, found))
    trainer.train()
    assert trainer.accelerator.num_processes == processes
    if trainer.accelerator.is_main_process:
        found |= {"advantage": trainer.now.advantage, "coef": trainer.kept.coef, "weight": trainer.kept.weight, "loss": torch.tensor([r["loss"] for r in trainer.state.log_history[:2]]),
                  "logged": torch.tensor(list(trainer._logs["advantages"])), "old": trainer.now.old, "kept": torch.tensor(len(trainer.kept))}
        save_file({k: v.contiguous() for k, v in found.items()}, out)


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(sys.argv[1], int(sys.argv[2]))
