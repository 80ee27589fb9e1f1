"""The real language model, where it has been built (`rlworkbench build smollm2`)."""
import os
import time

import pytest
import torch

from rlworkbench.core.registry import tasks
from rlworkbench.policies.lora import add_lora
from rlworkbench.policies.micro import built_folder
from rlworkbench.recipes.grpo import grpo
from rlworkbench.recipes.slots import Group
from rlworkbench.rollouts.sampling import Sampling
from rlworkbench.training.choices import load_policy
from rlworkbench.training.trainer import Trainer

TASK = "reasoning-gym:chain_sum,min_terms=2,max_terms=3,min_digits=1,max_digits=1,extract=last-number,max_tokens=12"


@pytest.fixture(scope="module")
def smollm2():
    if not (built_folder("smollm2") / "making.json").is_file():
        assert not os.environ.get("RLWB_REQUIRE_SMOLLM2"), "smollm2 was to be built"
        pytest.skip("smollm2 is not built: rlworkbench build smollm2")
    start = time.process_time()
    policy = load_policy("smollm2")
    policy.seconds = time.process_time() - start
    return policy


def test_it_is_the_model_that_it_says(smollm2):
    assert sum(p.numel() for p in smollm2.weights().values()) == 134_515_008 and smollm2.vocabulary == 49_152
    read = smollm2.text(smollm2.encode(tasks.get(TASK).items("test")[:1]).ids[0].tolist())
    assert read.endswith("<|im_start|>assistant\n") and "<|im_start|>user\nState the final answer" in read
    assert smollm2.seconds < 10


def test_a_step_with_adapters_moves_them_and_nothing_else(smollm2):
    add_lora(smollm2, 4)
    frozen = {n: p.clone() for n, p in smollm2.weights().items() if "layers.29" in n and not p.requires_grad}
    recipe = grpo.but(rollout=Group(Sampling(max_tokens=12)), advantage=lambda step: torch.linspace(-1, 1, len(step)))
    step = Trainer(smollm2, tasks.get(TASK), recipe, prompts=2, group=4, lr=1e-3).step()
    assert torch.isfinite(step.logp).all() and (step.ratio - 1).abs().max() < 1e-4 and step.metrics["grad_norm"] > 0
    assert all(p.equal(smollm2.weights()[n]) for n, p in frozen.items())
    assert all(p.abs().sum() > 0 for n, p in smollm2.parameters().items() if "lora_B" in n)
