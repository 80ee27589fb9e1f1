"""Nine families, small and random, the whole way: problems with no, one and two pictures, rollouts, scoring, one update, saved, loaded by plain transformers."""
import ast
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from rlworkbench.core.item import Item
from rlworkbench.core.step import Step
from rlworkbench.policies.families import FAMILIES, family, llava_processor, template
from rlworkbench.policies.hugging import HuggingPolicy
from rlworkbench.policies.loading import load_hugging
from rlworkbench.policies.quirks import disagreement
from rlworkbench.recipes.grpo import grpo
from rlworkbench.recipes.slots import Group
from rlworkbench.rollouts.parts import coin
from rlworkbench.rollouts.sampler import sample
from rlworkbench.rollouts.sampling import Sampling
from rlworkbench.rollouts.scorer import score
from rlworkbench.tasks.task import Task
from rlworkbench.training.trainer import Trainer

ROOT = Path(__file__).parents[1]
LAW = Sampling(max_tokens=12)
SEEING = [name for name, kind in FAMILIES.items() if kind.picture]
READING = [name for name in FAMILIES if name not in SEEING]
seeing = pytest.mark.parametrize("name", SEEING)
every = pytest.mark.parametrize("name", FAMILIES)


def noise(seed, size=(48, 48)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8))


ITEMS = [Item("none", "What is 7+5?"), Item("one", "What is the sum of the digits?", images=(noise(0),)),
         Item("two", "Which is largest?", images=(noise(1), noise(2, (48, 32)))), Item("short", "yes?")]


class Lottery(Task):
    "Problems of every kind; what a reply is worth is a matter of chance."
    name, max_tokens = "lottery", 8

    def __init__(self, some):
        self.some = some

    def items(self, split="train"):
        return self.some

    def score(self, item, text):
        return {"correct": float(len(text) % 2)}


@pytest.fixture(scope="session")
def policies():
    "Each family once; the last norm made larger, so that replies differ in probability."
    made = {}
    for name in FAMILIES:
        made[name] = family(name)
        with torch.no_grad():
            made[name].tower.norm.weight.mul_(3).add_(2)
    return made


def readable(policy):
    return ITEMS if policy.sees else [i for i in ITEMS if not i.images]


def drawn(policy, some=None, each=2, law=LAW):
    "Replies to every kind of problem, in one batch."
    some = some or readable(policy)
    step = Step(items=some, group=torch.arange(len(some)).repeat_interleave(each), prompts=policy.encode(some), law=law,
                generator=torch.Generator().manual_seed(0))
    sample(policy, step, law)
    return step


def logps(policy, step, **kw):
    with torch.no_grad():
        return score(policy, step, step.law, **kw)["logp"]


def gradient(policy, step, **kw):
    out = score(policy, step, step.law, **kw)
    grads = torch.autograd.grad((out["logp"] + .1 * out["entropy"]).sum(), list(policy.parameters().values()), allow_unused=True, materialize_grads=True)
    return torch.cat([g.flatten() for g in grads])


def apart(a, b):
    return float((a - b).norm() / b.norm())


# --- encoding ---
def test_the_table_covers_what_the_brief_of_a_family_needs():
    for name, kind in FAMILIES.items():
        assert hasattr(transformers, kind.model)
        assert bool(kind.processor) == (name in SEEING)
    with pytest.raises(ValueError, match="no family 'gpt'"):
        family("gpt")


@every
def test_the_same_seed_gives_the_same_weights(name):
    one, two, other = (list(family(name, seed).weights().values()) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one, two))
    assert any(not torch.equal(a, b) for a, b in zip(one, other))


@seeing
def test_placeholders_are_as_many_as_features(policies, name):
    policy = policies[name]
    prompts = policy.encode(ITEMS)
    token = policy.model.config.image_token_id
    wrote = [int((i == token).sum()) for i in prompts.ids]
    inputs = [policy.model_inputs(prompts.take([k]))[0] for k in range(len(ITEMS))]
    assert wrote == [policy.features(i) for i in inputs]
    assert wrote[0] == wrote[3] == 0 < wrote[1] < wrote[2]
    assert policy.features(policy.model_inputs(prompts)[0]) == sum(wrote)      # padded together, too


@seeing
def test_processor_and_model_that_disagree_are_told_both_numbers(policies, name):
    """A picture without some of its placeholders, and one with too many."""
    policy = policies[name]
    token = policy.model.config.image_token_id
    for change in (-1, 1):
        prompts = policy.encode(ITEMS[1:2])
        at = int((prompts.ids[0] == token).nonzero()[0])
        wrote = int((prompts.ids[0] == token).sum())
        keep = torch.tensor([i for i in range(len(prompts.ids[0])) for _ in range(1 if i != at else 1 + change)])
        length = len(prompts.ids[0])
        prompts.ids[0] = prompts.ids[0][keep]
        prompts.extra[0] = {k: v[:, keep] if v.shape == (1, length) else v for k, v in prompts.extra[0].items()}
        if "mm_token_type_ids" in prompts.extra[0]:         # positions in three dimensions are computed before the model counts
            prompts.extra[0].pop("mm_token_type_ids")
        with pytest.raises(ValueError, match=f"{wrote + change} image placeholders where the model makes {wrote} features") as told:
            policy.prefill(prompts)
        assert "\n" not in str(told.value)


def test_the_processor_of_another_model(policies):
    """LLaVA's processor, told that patches are half as large as the model's."""
    policy = policies["llava"]
    wrong = llava_processor(policy.tokenizer)
    wrong.patch_size, wrong.chat_template = 4, policy.processor.chat_template
    with pytest.raises(ValueError, match="36 image placeholders where the model makes 9 features"):
        drawn(HuggingPolicy(policy.model, wrong, "mixed"), ITEMS[1:2])


@pytest.mark.parametrize("name", READING)
def test_text_only_families_refuse_pictures(policies, name):
    with pytest.raises(ValueError, match=f"small-{name} reads text only, but the item has 1 picture"):
        policies[name].encode(ITEMS[:2])


def test_without_a_chat_template():
    policy = family("llama")
    policy.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template; put one"):
        HuggingPolicy(policy.model, policy.tokenizer, "bare")


# --- sampling and scoring ---
@every
def test_sampled_and_scored_alike(policies, name):
    """On-policy the ratio is 1, in one ragged batch with no, one and two pictures."""
    policy = policies[name]
    step = drawn(policy, each=3)
    assert torch.equal(step.ids, drawn(policy, each=3).ids)                     # seeded
    assert len({len(p) for p in step.prompts.ids}) == len(step.prompts)
    assert (step.old[step.mask > 0] < -.1).any()
    assert float((logps(policy, step) - step.old).exp().sub(1).abs().max()) < 1e-5


@seeing
def test_placeholders_are_never_sampled(policies, name):
    policy = policies[name]
    token = policy.model.config.image_token_id
    assert token in policy.banned
    plain, love = policy.logits, torch.zeros(policy.vocabulary)
    love[list(policy.banned)] = 50.
    try:
        policy.logits = lambda hidden: plain(hidden) + love
        ids = drawn(policy, ITEMS[:2], each=4).ids
    finally:
        del policy.logits
    assert not torch.isin(ids, torch.tensor(policy.banned)).any()


@every
def test_sharing_the_prompt_changes_nothing(policies, name):
    policy = policies[name]
    assert policy.apart == ""
    step = drawn(policy)
    assert float((logps(policy, step) - logps(policy, step, share=False)).abs().max()) < 1e-5
    shared, single = gradient(policy, step), gradient(policy, step, share=False)
    assert float(single.norm()) > 1e-3
    assert apart(shared, single) < 1e-5


@seeing
@pytest.mark.parametrize("image", ["none", "blank", "blur", "other"])
def test_without_its_picture_a_policy_says_other_things(policies, name, image):
    policy = policies[name]
    step = drawn(policy)
    own = logps(policy, step)
    step.prompts = policy.encode(ITEMS, image)
    moved = (logps(policy, step) - own).abs().amax(1)
    with_picture = torch.tensor([bool(ITEMS[g].images) for g in step.group])
    assert moved[with_picture].min() > 1e-3
    assert moved[~with_picture].max() < 1e-5


@seeing
def test_the_order_of_two_pictures_matters(policies, name):
    policy = policies[name]
    step = drawn(policy, ITEMS[2:3])
    own = logps(policy, step)
    step.prompts = policy.encode([replace(ITEMS[2], images=ITEMS[2].images[::-1])])
    assert (logps(policy, step) - own).abs().max() > 1e-4


@every
def test_padding_and_order_change_nothing(policies, name):
    """Alone, in company of a much longer problem, and with the problems the other way round."""
    policy = policies[name]
    step = drawn(policy)
    together = logps(policy, step)
    for k in range(len(step.items)):
        rows = step.group == k
        one = Step(items=[step.items[k]], group=torch.zeros(int(rows.sum()), dtype=torch.long), prompts=policy.encode([step.items[k]]), ids=step.ids[rows],
                   mask=step.mask[rows], law=LAW)
        assert (logps(policy, one) - together[rows]).abs().max() < 1e-5
    longer = [*step.items, Item("long", "Which is larger? " * 9)]
    step.prompts = policy.encode(longer)
    assert (logps(policy, step) - together).abs().max() < 1e-5
    turned = replace(step, items=step.items[::-1], prompts=policy.encode(step.items[::-1]), group=len(step.items) - 1 - step.group)
    assert (logps(policy, turned) - together).abs().max() < 1e-5


@every
def test_the_workbench_says_what_the_model_says(policies, name):
    found = disagreement(policies[name], readable(policies[name]))
    assert set(found) == {"own forward", "prompt run once", "alone"}
    assert max(found.values()) < 1e-5


@every
def test_greedy_is_what_generate_gives(policies, name):
    """Decoding in a ragged batch with a shared cache, against the model's own loop on one problem at a time."""
    policy = policies[name]
    step = drawn(policy, each=1, law=Sampling(temperature=0, max_tokens=10))
    for row, (prompt, extra) in enumerate(zip(step.prompts.ids, step.prompts.extra)):
        theirs = policy.model.generate(input_ids=prompt[None], attention_mask=torch.ones_like(prompt)[None], **extra, max_new_tokens=10, do_sample=False,
                                       pad_token_id=policy.pad, eos_token_id=policy.eos, suppress_tokens=list(policy.banned) or None)[0, len(prompt):]
        n = int(step.length[row])
        assert step.ids[row, :n].tolist() == theirs[:n].tolist()
        assert len(theirs) == n


def test_a_window_shorter_than_the_prompt_matters(policies):
    """Gemma's sliding window and its attention both ways among a picture's tokens are really at work in these tests."""
    policy = policies["gemma3"]
    assert policy.config.sliding_window < min(len(p) for p in policy.encode(ITEMS[:3]).ids)
    step = drawn(policy, ITEMS[1:2])
    own = logps(policy, step)
    kinds = step.prompts.extra[0].pop("token_type_ids")
    assert (logps(policy, step) - own).abs().max() > 1e-4       # causal only
    step.prompts.extra[0]["token_type_ids"] = kinds
    wide = family("gemma3")
    wide.model.load_state_dict(policy.model.state_dict())
    wide.config.sliding_window = 400
    for layer in wide.tower.layers:
        if layer.self_attn.sliding_window:
            layer.self_attn.sliding_window = 400
    assert (logps(wide, step) - own).abs().max() > 1e-4


def test_features_at_several_layers_matter(policies):
    """Qwen3-VL without its deep features says other things: the prompt's cache carries them."""
    policy = policies["qwen3-vl"]
    step = drawn(policy, ITEMS[1:2])
    own = logps(policy, step)
    tower = policy.tower
    tower._deepstack_process = lambda hidden, where, features: hidden
    try:
        assert (logps(policy, step) - own).abs().max() > 1e-4
    finally:
        del tower._deepstack_process


def test_a_reply_ends_where_the_template_ends_it(policies):
    policy = policies["gemma3"]
    assert policy.piece(policy.eos) == "<end_of_turn>" != policy.tokenizer.eos_token
    assert policy.tokens("7")[-1] == policy.eos
    assert policies["qwen"].eos == policies["qwen"].tokenizer.eos_token_id


# --- learning, saving ---
@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "name -> the weights before, the policy after one step of GRPO, and where it was saved; each family once."
    done = {}

    def get(name):
        if name not in done:
            policy = family(name)
            before = {n: p.detach().clone() for n, p in policy.weights().items()}
            recipe = grpo.but(rollout=Group(Sampling(max_tokens=8)), rewards=(coin,))
            row, = Trainer(policy, Lottery(readable(policy)), recipe, prompts=len(readable(policy)), group=4, lr=1e-3, seed=0).fit(1)
            folder = tmp_path_factory.mktemp(name) / "saved"
            policy.save(folder)
            done[name] = before, policy, folder, row
        return done[name]
    return get


@every
def test_one_step_moves_the_weights(trained, name):
    before, policy, _, row = trained(name)
    assert all(math.isfinite(v) for k, v in row.items() if isinstance(v, float) and k.startswith(("loss", "grad", "entropy")))
    moved = {n for n, p in policy.weights().items() if not torch.equal(p, before[n])}
    assert all(torch.isfinite(p).all() for p in policy.weights().values())
    assert any(n.endswith("q_proj.weight") for n in moved)
    seen = {n for n in moved if any(part in n for part in ("vision", "visual", "projector", "connector"))}
    assert bool(seen) == (name in SEEING)


@every
def test_saved_and_loaded_by_plain_transformers(trained, name):
    """With nothing of this package: the same weights, and the same logits for what the processor gave."""
    _, policy, folder, _ = trained(name)
    auto = AutoModelForImageTextToText if name in SEEING else AutoModelForCausalLM
    plain = auto.from_pretrained(folder, use_safetensors=True).eval()
    assert type(plain) is type(policy.model)
    assert list(folder.glob("*.safetensors")) and not list(folder.glob("*.bin")) and not list(folder.glob("*.pt"))
    ours, theirs = policy.model.state_dict(), plain.state_dict()
    assert set(ours) == set(theirs) and all(torch.equal(ours[n], theirs[n]) for n in ours)
    prompts = policy.encode(readable(policy))
    with torch.no_grad():
        for prompt, extra in zip(prompts.ids, prompts.extra):
            a, b = (m(input_ids=prompt[None], **extra).logits for m in (policy.model, plain))
            assert torch.equal(a, b)


@every
def test_saved_and_loaded_by_the_workbench(trained, name):
    _, policy, folder, _ = trained(name)
    again = load_hugging(folder)
    assert (again.eos, again.banned, again.pad) == (policy.eos, policy.banned, policy.pad)
    some = readable(policy)
    for a, b in zip(policy.encode(some).ids, again.encode(some).ids):
        assert torch.equal(a, b)
    step = drawn(policy)
    own = logps(policy, step)
    step.prompts = again.encode(some)
    assert torch.equal(logps(again, step), own)


@pytest.mark.parametrize("name", ["llama", "smolvlm"])
def test_pickled_weights_are_refused(trained, name, tmp_path):
    _, policy, folder, _ = trained(name)
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save(policy.model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot load a policy from"):
        load_hugging(tmp_path)


def test_a_processor_keeps_what_it_was_told(trained):
    """How many tokens a picture is would otherwise be the class's default, which is another model's."""
    for name, key in (("smolvlm", "image_seq_len"), ("internvl", "image_seq_length")):
        _, policy, folder, _ = trained(name)
        assert getattr(load_hugging(folder).processor, key) == getattr(policy.processor, key) in (4, 9)
        told = json.loads((folder / "processor_config.json").read_text())
        assert told[key] == getattr(policy.processor, key)


# --- bfloat16, checkpointing, devices ---
@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen3-vl", "llama"])
def test_bfloat16_goes_the_whole_way(trained, name):
    """Half the bytes; log-probs are computed in float32 all the same."""
    policy = load_hugging(trained(name)[2], dtype="bfloat16")
    assert {p.dtype for p in policy.weights().values()} == {torch.bfloat16}
    step = drawn(policy)
    values = score(policy, step, LAW)
    assert all(values[c].dtype == torch.float32 and torch.isfinite(values[c]).all() for c in ("logp", "entropy"))
    assert step.old.dtype == torch.float32
    kept = values["logp"].detach()[step.mask > 0]
    assert (kept.bfloat16().float() != kept).float().mean() > .9        # not rounded to bfloat16 on the way
    assert float((values["logp"].detach() - step.old).abs().max()) < .1          # the model's own rounding is all that remains
    before = torch.cat([p.detach().flatten() for p in policy.weights().values()])
    row, = Trainer(policy, Lottery(readable(policy)), grpo.but(rollout=Group(Sampling(max_tokens=8)), rewards=(coin,)), prompts=2, group=4, lr=1e-3).fit(1)
    after = torch.cat([p.detach().flatten() for p in policy.weights().values()])
    assert torch.isfinite(after.float()).all() and not torch.equal(before, after)
    assert math.isfinite(row["entropy"])


@pytest.mark.parametrize("name", ["llava", "qwen", "idefics3", "gemma3", "qwen3"])
def test_checkpointing_gives_the_same_gradient(trained, name):
    folder = trained(name)[2]
    plain, again = load_hugging(folder), load_hugging(folder, checkpointing=True)
    assert plain.apart == "" and again.apart == "gradient checkpointing keeps no cache"
    step, other = drawn(plain), drawn(again)
    assert torch.equal(step.ids, other.ids)
    calls = []
    layer = again.tower.layers[0].mlp
    handle = layer.register_forward_pre_hook(lambda *_: calls.append(1))
    ours = gradient(again, other)
    handle.remove()
    assert len(calls) == 2                                              # once on the way, once on the way back
    assert apart(ours, gradient(plain, step)) < 1e-5
    assert not any(m.training for m in again.model.modules())
    again.model.activation_checkpointing_disable()
    assert again.apart == ""


@pytest.mark.parametrize("path", ["policies/hugging", "policies/cache", "policies/table", "rollouts/sampler", "rollouts/sampling", "rollouts/scorer", "rollouts/parts"])
def test_new_tensors_say_where_they_lie(path):
    """A tensor made without a device lies on the CPU, wherever the model is."""
    makers = {"ones", "zeros", "full", "empty", "arange", "tensor", "rand", "randn", "randint", "linspace", "eye"}
    silent = []
    for node in ast.walk(ast.parse((ROOT / f"rlworkbench/{path}.py").read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and getattr(node.func.value, "id", "") == "torch" and node.func.attr in makers:
            if not any(k.arg == "device" for k in node.keywords):
                silent.append(ast.unparse(node))
    allowed = {"policies/table": {"torch.tensor([int(i.prompt)])", "torch.zeros(task.prompts, task.length, task.letters, dtype=dtype)",
                                  "torch.tensor(task.replies())", "torch.arange(task.length)"}}
    assert [s for s in silent if s not in allowed.get(path, ()) and not s.startswith("torch.tensor([[task.score")] == []


def test_templates_have_both_forms():
    """A message may be a string, or pictures and text."""
    policy = family("qwen3")
    chat = [{"role": "user", "content": "7"}]
    assert policy.tokenizer.apply_chat_template(chat, tokenize=False) == "7"
    assert "<image>" in template("<image>")
