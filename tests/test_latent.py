"""Latent policies: where gradients go, three kinds of model, checkpoints, runs from the command line, bad input, probes."""
import json
import re
import shutil
import sys
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from rlworkbench.claims.amvl import LOW
from rlworkbench.cli.main import main
from rlworkbench.core.config import Config
from rlworkbench.core.registry import policies, probes, recipes, tasks
from rlworkbench.core.seeds import generator
from rlworkbench.core.step import Step
from rlworkbench.diagnostics import sections as report_sections
from rlworkbench.latent import film
from rlworkbench.latent.amvl import ABLATIONS, amvl, forward_kl, reverse_kl, variational, with_slots
from rlworkbench.latent.dlr import Filtered, Thoughts
from rlworkbench.latent.gaussian import drawn, kl, noise_of
from rlworkbench.latent.policy import LatentPolicy
from rlworkbench.latent.readings import leakage, sides, think
from rlworkbench.latent.saving import load_latent
from rlworkbench.latent.softcot import SoftPolicy, softcot, softly
from rlworkbench.policies.families import family
from rlworkbench.policies.micro import MICROS, random_micro
from rlworkbench.policies.tiny import load_tiny, random_tiny
from rlworkbench.recipes.recipe import Lesson, Recipe
from rlworkbench.recipes.slots import Group, Spec, kl_penalty, score_replies
from rlworkbench.rollouts.sampler import sample
from rlworkbench.rollouts.sampling import Sampling
from rlworkbench.rollouts.scorer import score
from rlworkbench.serving import report
from rlworkbench.tasks import photographs
from rlworkbench.tasks.silent import digits_sum_silent, verbose_sum_silent
from rlworkbench.tasks.task import validate
from rlworkbench.training.choices import load_policy, new_trainer
from rlworkbench.training.evaluate import answers, evaluate
from rlworkbench.training.job import resume, train
from rlworkbench.training.run import Run
from rlworkbench.training.supply import demonstrations
from rlworkbench.training.trainer import Trainer

BASES = {"micro": (lambda: random_micro(MICROS["micro-verbose"]), verbose_sum_silent), "tiny": (random_tiny, digits_sum_silent), "qwen": (lambda: family("qwen"), digits_sum_silent)}
every_base = pytest.mark.parametrize("base", BASES)
LATENT = [p for p in probes.all().values() if {"latent", "prior", "posterior"} <= set(p.needs)]
SILENT = Config(recipe="amvl", task="digits-sum-silent", policy="random-tiny", steps=4, prompts=4, lr=1e-3, evaluate=0, checkpoint=2, threads="1")


def stepped(lesson, policy, task, n=4, clock=(45, 100)):
    "A step of demonstrations behind the lesson's forward."
    step = demonstrations(policy, task.items()[:n])
    step.clock = clock
    lesson.forward(policy, step)
    return step


def forwarded(base, lesson=amvl, slots=3, width=5):
    make, task = BASES[base]
    policy = LatentPolicy(make(), slots, width)
    with torch.no_grad():
        policy.parts.posterior.weight.normal_(0, .1, generator=torch.Generator().manual_seed(1))
    return policy, stepped(with_slots(lesson, slots, width), policy, task)


def gradients(policy, loss) -> dict:
    named = policy.parameters()
    return {n: g for n, g in zip(named, torch.autograd.grad(loss, list(named.values()), allow_unused=True, retain_graph=True)) if g is not None and g.abs().sum() > 0}


# --- divergences and gradients

@pytest.mark.parametrize("seed", range(3))
def test_the_divergence_is_that_of_torch(seed):
    a, b = ([x.double() for x in torch.randn(2, 4, 3, 6, generator=torch.Generator().manual_seed(seed + 10 * k))] for k in range(2))
    normal = lambda law: torch.distributions.Normal(law[0], (law[1] / 2).exp())
    theirs = torch.distributions.kl_divergence(normal(a), normal(b)).sum(-1)
    assert torch.allclose(kl(tuple(a), tuple(b)), theirs, atol=1e-10)


@every_base
def test_where_a_gradient_may_not_go(base):
    policy, step = forwarded(base)
    found = {"ntp": gradients(policy, -(step.logp * step.mask).sum()), "forward": gradients(policy, forward_kl(step).sum()), "reverse": gradients(policy, reverse_kl(step).sum())}
    head = {side: {f"latent.{side}.weight", f"latent.{side}.bias"} for side in ("prior", "posterior")}
    assert not head["prior"] & {*found["ntp"]} and not head["posterior"] & {*found["forward"]} and not head["prior"] & {*found["reverse"]}
    assert head["posterior"] <= {*found["ntp"]} and head["prior"] <= {*found["forward"]} and head["posterior"] <= {*found["reverse"]}
    assert "latent.up.weight" in found["ntp"] and "latent.up.weight" not in {*found["forward"], *found["reverse"]}
    assert not [n for f in found.values() for n in f if "vision" in n or "visual" in n or "projector" in n]


@every_base
def test_gradients_agree_with_differences(base):
    policy, _ = forwarded(base)
    policy.model.double(), policy.parts.double(), policy.pictures.kept.clear()
    task, lesson = BASES[base][1], with_slots(amvl, 3, 5)

    def loss():
        step = stepped(lesson, policy, task)
        return -(step.logp * step.mask).sum() / step.mask.sum()
    weight = policy.parts.posterior.weight
    slope, = torch.autograd.grad(loss(), weight)
    at = np.unravel_index(int(slope.abs().argmax()), slope.shape)
    with torch.no_grad():
        values = []
        for eps in (1e-3, -2e-3):
            weight[at] += eps
            values.append(float(loss()))
    assert (values[0] - values[1]) / 2e-3 == pytest.approx(float(slope[at]), rel=2e-2)


def test_the_prior_is_blind_to_the_answer_and_the_posterior_is_not():
    policy, _ = forwarded("micro")
    items = verbose_sum_silent.items()[:3]
    one, two = (think(policy, [replace(i, demo=d) for i in items]) for d in ("<answer>12</answer>", "<answer>31</answer>"))
    assert torch.equal(one.prior[0], two.prior[0]) and (one.posterior[0] - two.posterior[0]).abs().amax((1, 2)).min() > 1e-4


@every_base
def test_batch_order_and_padding_change_no_number(base):
    policy, _ = forwarded(base)
    items = BASES[base][1].items()[:4]
    items = [replace(items[0], demo="<answer>1</answer>"), *items[1:]]
    together, turned = think(policy, items), think(policy, items[::-1])
    for name in ("prior", "posterior"):
        for a, b in zip(getattr(together, name), getattr(turned, name)):
            assert torch.allclose(a, b.flip(0), atol=2e-5)
    alone = think(policy, items[:1])
    assert torch.allclose(alone.posterior[0][0], together.posterior[0][0], atol=2e-5) and torch.allclose(alone.latent[0], together.latent[0], atol=2e-5)


@pytest.mark.parametrize("slots", [2, 4, 8, 16])
def test_any_number_of_slots(slots):
    trainer = Trainer(random_micro(MICROS["micro-verbose"]), verbose_sum_silent, with_slots(amvl, slots, 8), prompts=3, lr=1e-3, steps=2)
    step = trainer.step()
    assert step.latent.shape == (3, slots, 8) and step.prior[0].shape == step.posterior[1].shape == (3, slots, 8) and torch.isfinite(step.latent).all()


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_ablation_trains_what_it_says(name):
    trainer = Trainer(random_micro(MICROS["micro-verbose"]), verbose_sum_silent, ABLATIONS[name], prompts=4, lr=1e-3, steps=20)
    before = {n: w.detach().clone() for n, w in trainer.policy.weights().items()}
    rows = trainer.fit(10)
    moved = {n for n, w in trainer.policy.weights().items() if not torch.equal(w, before[n])}
    named = {t.name for t in ABLATIONS[name].terms}
    assert {k.partition("/")[2] for k in rows[-1] if k.startswith("loss/")} == named
    assert ("latent.prior.weight" in moved) == bool({"forward_kl", "elbo_kl"} & named)
    assert ("latent.up.weight" in moved) == ("next_token" in named)


# --- a policy like any other

@every_base
@pytest.mark.parametrize("heat", [0.0, 1.0])
def test_sampled_and_scored_under_one_law(base, heat):
    make, task = BASES[base]
    policy, items, law = LatentPolicy(make(), 3, 5, heat), task.items()[:3], Sampling(max_tokens=6)
    step = Step(items=items, group=torch.tensor([0, 0, 1, 2, 2]), prompts=policy.encode(items), generator=generator(0, "t"))
    sample(policy, step, law)
    with torch.no_grad():
        assert (score(policy, step, law)["logp"] - step.old).abs().max() < 2e-5


def test_grpo_trains_a_latent_policy():
    trainer = new_trainer(Config(recipe="grpo", task="digits-sum", policy="latent:random-tiny,slots=2,width=4,heat=1", prompts=2, group=4, lr=1e-3, evaluate=0, max_tokens=6))
    rows = trainer.fit(2)
    assert np.isfinite([r["loss"] for r in rows]).all()


def test_a_copy_is_independent():
    policy = LatentPolicy(random_tiny(), 2, 4)
    other, items = policy.copy(), digits_sum_silent.items()[:2]
    with torch.no_grad():
        before = other.prefill(other.encode(items)).hidden.clone()
        for w in policy.weights().values():
            w.mul_(1.5)
        assert torch.equal(other.prefill(other.encode(items)).hidden, before)
        assert not torch.allclose(policy.prefill(policy.encode(items)).hidden, before)


def test_pictures_are_looked_at_once_and_only_while_the_vision_part_rests():
    policy = LatentPolicy(random_tiny(), 2, 4)
    seen = []
    policy.body.vision_tower.register_forward_hook(lambda *a: seen.append(1))
    prompts = policy.encode(digits_sum_silent.items()[:4])
    for _ in range(3):
        policy.prefill(prompts)
    assert len(seen) == 1 and len(policy.pictures.kept) == 4
    learning = LatentPolicy(random_tiny(), 2, 4, vision=True)
    assert learning.pictures is None and any("vision" in n for n in learning.parameters())
    assert not any("vision" in n for n in policy.parameters())


# --- micro-batches change no number, and no two steps think alike

def trained_in_pieces(recipe, base, micro, task=verbose_sum_silent, steps=2, **more):
    "Metrics and weights after plain descent without clipping, since Adam and a clipped norm would hide a wrong factor."
    trainer = Trainer(base(), task, recipe, prompts=3, group=4, micro=micro, steps=steps, clip=float("inf"), watchers=(), **more)
    trainer.optimizer = torch.optim.SGD(trainer.policy.parameters().values(), lr=.05)
    trainer.lr = .05
    return trainer.fit(steps), {n: p.detach().clone() for n, p in trainer.policy.parameters().items()}


def warm(heat=1.0):
    policy = LatentPolicy(random_micro(MICROS["micro-verbose"]), 3, 5, heat)
    with torch.no_grad():
        policy.parts.up.weight.mul_(3)
    return policy


@dataclass(frozen=True, repr=False)
class by_last(Spec):
    "A keep that refuses some replies of each group, so that those that stay are no longer counted from 0."
    def __call__(self, step):
        return step.reply != 1


FIRST = Recipe("plain", rollout=Group(Sampling(max_tokens=5)), rewards=(lambda step: {"odd": step.length.float() + step.ids[:, 0] % 3},))


@pytest.mark.parametrize("micro", [1, 2, 3, 5, None])
@pytest.mark.parametrize("but", [{}, {"keep": by_last()}, {"batches": 3}, {"penalty": kl_penalty(.1)}], ids=["plain", "keep", "batches", "reference"])
def test_the_first_ratio_is_1_however_a_step_is_cut(micro, but):
    rows, _ = trained_in_pieces(FIRST.but(**but), warm, micro)
    assert [r["ratio/first"] for r in rows] == pytest.approx([1, 1], abs=1e-4)
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6)      # the reference thinks what the policy thought


@pytest.mark.parametrize("micro", [1, 5])
def test_pieces_change_no_weight_of_a_policy_with_thoughts_of_its_own(micro):
    (one, whole), (two, cut) = (trained_in_pieces(FIRST, warm, m) for m in (None, micro))
    assert [r["loss"] for r in one] == pytest.approx([r["loss"] for r in two], abs=1e-5)
    assert any((w - warm().parameters()[n]).abs().max() > 1e-4 for n, w in whole.items())
    assert all(torch.allclose(w, cut[n], atol=1e-5) for n, w in whole.items())


def test_every_step_draws_other_thoughts_and_every_reply_its_own():
    seen = []
    for clock in (0, 1):
        step = Step(items=verbose_sum_silent.items()[:2], size=(2, 3), clock=(clock, 9), seed=4, generator=generator(0, "t"))
        Group(Sampling(max_tokens=3))(policy := warm(), step)
        with torch.no_grad():
            seen.append(policy.within(step).select(policy.within(step).prefill(step.prompts), step.group).latent)
    assert len(torch.cat(seen).flatten(1).unique(dim=0)) == 12


def test_a_question_to_a_step_thinks_the_thoughts_that_wrote_its_replies():
    step = Step(items=verbose_sum_silent.items()[:2], size=(2, 3), clock=(3, 9), seed=4, generator=generator(0, "t"))
    Group(law := Sampling(max_tokens=4))(policy := warm(), step)
    with torch.no_grad():
        again, elsewhere = score(policy, step, law)["logp"], score(policy, replace(step, clock=(4, 9)), law)["logp"]
    assert torch.allclose(again, step.old, atol=2e-5) and (elsewhere - step.old).abs().max() > 1e-3


def test_a_thought_outside_of_a_step_does_not_depend_on_what_is_asked_beside_it():
    policy, items = warm(), verbose_sum_silent.items()[:3]
    with torch.no_grad():
        many = policy.select(policy.prefill(policy.encode(items)), torch.tensor([0, 1, 2, 1])).latent
        alone = policy.select(policy.prefill(policy.encode(items[1:2])), torch.tensor([0, 0])).latent
    assert torch.allclose(many[[1, 3]], alone, atol=1e-5) and not torch.allclose(alone[0], alone[1])


def test_sampled_answers_do_not_depend_on_the_batch_but_on_the_seed():
    items, law = verbose_sum_silent.items("test")[:6], Sampling(0.0, 6)
    said = lambda batch, seed: [t for s in answers(warm(4.0), items, law, 2, seed, batch) for t in s.text]
    assert said(6, 0) == said(2, 0) != said(6, 1)


def test_without_a_cache_thoughts_are_drawn_all_the_same():
    policy = warm(3.0)
    policy.model.gradient_checkpointing_enable()
    assert policy.apart
    step = Step(items=verbose_sum_silent.items()[:2], size=(2, 3), clock=(3, 9), generator=generator(0, "t"))
    Group(Sampling(max_tokens=4))(policy, step)
    with torch.no_grad():
        score_replies(policy, step)
        drew = policy.within(step).prefill(step.prompts.take(step.group)).latent
    assert (step.logp - step.old).abs().max() < 2e-5 and len(drew.flatten(1).unique(dim=0)) == 6


@pytest.mark.parametrize("micro", [1, 3, 5])
def test_pieces_change_no_number_of_dlr(micro):
    def base():
        policy = LatentPolicy(random_micro(MICROS["micro-verbose"]), 4, 16)
        with torch.no_grad():
            policy.parts.up.weight.mul_(10)
            policy.parts.prior.bias[16:].fill_(2.0)
        return policy
    odd = lambda step: {"correct": (step.ids[:, 0] % 2).float()}     # groups of right and wrong replies
    recipe = recipes.get("dlr").but(rollout=Thoughts(Sampling(max_tokens=4)), rewards=(odd,))
    (one, whole), (two, cut) = (trained_in_pieces(recipe, base, m) for m in (None, micro))
    assert one[0]["loss/contrast"] > 1e-3, "no group is mixed; this test would say nothing"
    for name in ("loss/policy", "loss/contrast", "loss/wide"):
        assert [r[name] for r in one] == pytest.approx([r[name] for r in two], abs=1e-5)
    assert all(torch.allclose(w, cut[n], atol=1e-5) for n, w in whole.items())
    assert [r["ratio/first"] for r in two] == pytest.approx([1, 1], abs=1e-5)


@pytest.mark.parametrize("micro", [1, 2])
def test_pieces_change_no_number_of_the_stray_control(micro):
    (one, whole), (two, cut) = (trained_in_pieces(LOW["stray"].but(terms=(*LOW["stray"].terms[:2], replace(LOW["stray"].terms[2], scale=.5))),
                                                  lambda: random_micro(MICROS["micro-verbose"]), m) for m in (None, micro))
    assert one[0]["loss/reverse_kl"] > 0 and [r["loss/reverse_kl"] for r in one] == pytest.approx([r["loss/reverse_kl"] for r in two], rel=1e-4)
    assert all(torch.allclose(w, cut[n], atol=1e-5) for n, w in whole.items())


# --- an assistant where thoughts are asked for

@pytest.mark.parametrize("recipe", ["amvl", "dlr"])
def test_a_policy_of_softcot_is_refused_in_one_sentence(recipe, tmp_path, monkeypatch, capsys):
    SoftPolicy(random_micro(MICROS["micro-verbose"]), 4).save(tmp_path / "soft")
    said = run(monkeypatch, capsys, "train", "--recipe", recipe, "--task", "verbose-sum-silent", "--policy", str(tmp_path / "soft"), "--steps", "1", "--out", str(tmp_path / "r"), code=2)
    assert "its thoughts have no spread and no posterior" in said and len(said.strip().splitlines()) == 1 and not (tmp_path / "r").exists()


def test_softcot_around_latents_is_refused_in_one_sentence(tmp_path, monkeypatch, capsys):
    said = run(monkeypatch, capsys, "train", "--recipe", "softcot", "--task", "digits-sum-silent", "--policy", "latent:random-tiny,slots=2,width=4", "--steps", "1", "--out", str(tmp_path / "r"), code=2)
    assert "has thoughts of its own" in said and len(said.strip().splitlines()) == 1


def test_an_assistant_of_another_width_thinks_for_a_model():
    base, small = random_micro(MICROS["micro-verbose"]), random_micro(replace(MICROS["micro-verbose"], width=40))
    policy = SoftPolicy(base, 3, assistant=small)
    assert policy.parts.project.weight.shape == (80, 40) and policy.width == 40
    rows = Trainer(policy, verbose_sum_silent, softcot.but(forward=softly(3)), prompts=4, lr=1e-2, steps=8).fit(8)
    assert rows[-1]["loss"] < rows[0]["loss"]
    with pytest.raises(ValueError, match="has no assistant"):
        softly(3)(base, demonstrations(base, verbose_sum_silent.items()[:1]))


@pytest.mark.parametrize("value", [True, 1.0, "3", None, 0])
def test_a_number_of_slots_that_is_none_is_one_sentence(value):
    with pytest.raises(ValueError, match="slots must be a whole number, 1 or more"):
        LatentPolicy(random_micro(MICROS["micro-verbose"]), value)
    with pytest.raises(ValueError, match="must be whole numbers, 1 or more"):
        SoftPolicy(random_micro(MICROS["micro-verbose"]), value)


# --- files

@every_base
def test_a_checkpoint_loads_again(base, tmp_path):
    policy, _ = forwarded(base)
    policy.save(tmp_path / "p")
    again = load_policy(str(tmp_path / "p"))
    assert {n: w.shape for n, w in again.weights().items()} == {n: w.shape for n, w in policy.weights().items()}
    assert all(torch.equal(w, again.weights()[n]) for n, w in policy.weights().items())
    assert not [f for f in (tmp_path / "p").iterdir() if f.suffix in (".bin", ".pt", ".pkl")]
    for asked in ({"slots": 4}, {"width": 6}):
        with pytest.raises(ValueError, match="can't be changed after training"):
            load_latent(tmp_path / "p", **asked)
    (tmp_path / "p" / "latent.safetensors").unlink()
    with pytest.raises(ValueError, match="is no checkpoint of a latent policy"):
        load_policy(str(tmp_path / "p"))


def test_a_run_is_resumed_to_the_bit_and_evaluated_with_its_prior(tmp_path):
    whole = train(SILENT, tmp_path / "whole")

    def stop(run, step):
        if step.clock[0] == 2:
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        train(SILENT, tmp_path / "short", stop)
    resumed = resume(tmp_path / "short")
    timeless = [c for c in whole.metrics if not c.startswith(("time/", "cpu/"))]
    one, two = (load_policy(str(r.folder)) for r in (whole, resumed))
    assert isinstance(one, LatentPolicy) and one.heat == 0
    assert all(torch.equal(w, two.weights()[n]) for n, w in one.weights().items())
    assert len(timeless) > 5 and whole.metrics[timeless].equals(resumed.metrics[timeless])
    found = evaluate(one, digits_sum_silent, 8, 8, k=2)
    assert found == evaluate(two, digits_sum_silent, 8, 8, k=2)


@pytest.mark.parametrize("policy,task", [("tiny", "digits-sum-silent"), ("micro-verbose", "verbose-sum-silent")])
def test_from_the_command_line(policy, task, tmp_path, monkeypatch, capsys):
    if policy.startswith("micro"):
        from rlworkbench.training.beds import base_policy
        base_policy(policy)
    said = run(monkeypatch, capsys, "train", "--recipe", "amvl", "--task", task, "--policy", policy, "--steps", "2", "--prompts", "3", "--evaluate", "4", "--threads", "1",
               "--out", str(tmp_path / "r"), "--json")
    assert json.loads(said.splitlines()[-1])["steps"] == 2
    assert {"loss/next_token", "loss/forward_kl", "loss/reverse_kl"} <= set(Run.open(tmp_path / "r").rows()[-1])
    said = run(monkeypatch, capsys, "eval", str(tmp_path / "r"), "--n", "4", "--k", "2", "--threads", "1", "--json")
    assert 0 <= json.loads(said.splitlines()[-1])["sampled"] <= 1


def run(monkeypatch, capsys, *arguments, code=0) -> str:
    monkeypatch.setattr(sys, "argv", ["rlworkbench", *arguments])
    try:
        main()
        found = 0
    except SystemExit as e:
        found = e.code or 0
    out = capsys.readouterr()
    assert found == code, out
    return out.out if code == 0 else out.err


def test_list_shows_the_methods_with_their_papers(monkeypatch, capsys):
    for name in ("amvl", "softcot", "softcot_pp", "dlr"):
        assert "arXiv" in recipes.get(name).paper
    said = run(monkeypatch, capsys, "list", "recipes")
    assert "amvl" in said and "2607.00461" in said


# --- bad input

@pytest.mark.parametrize("name,says", [
    ("latent:random-tiny,slots=0", "slots must be a whole number, 1 or more, got 0"), ("latent:random-tiny,slots=x", "slots must be a number, got 'x'"),
    ("latent:random-tiny,width=-1", "width must be a whole number"), ("latent:random-tiny,heat=-1", "heat must be between 0 and 10"),
    ("latent:random-tiny,source=posterior", "only the prior can be asked"), ("latent:table", "is no Hugging Face model"), ("latent:tinny", "did you mean tiny"),
    ("latent:random-tiny,slotz=3", "did you mean slots")])
def test_what_is_refused_by_name(name, says, monkeypatch, capsys, tmp_path):
    said = run(monkeypatch, capsys, "train", "--policy", name, "--recipe", "sft", "--steps", "1", "--out", str(tmp_path / "r"), code=2)
    assert says in said and "Traceback" not in said and len(said.strip().splitlines()) == 1


@pytest.mark.parametrize("value,says", [(float("nan"), "is nan"), (float("inf"), "is"), (3e8, "is 3e+08")])
def test_an_exploding_latent_names_slot_and_step(value, says):
    policy, _ = forwarded("micro")
    trainer = Trainer(policy, verbose_sum_silent, with_slots(amvl, 3, 5), prompts=2, lr=1e-3, steps=5)
    trainer.step()
    handle = policy.parts.posterior.register_forward_hook(lambda module, args, out: out.index_put((torch.tensor(1), torch.tensor(2), torch.tensor(0)), torch.tensor(value)))
    with pytest.raises(ValueError, match=r"step 2: latent slot 2 of item .* " + says.replace("+", r"\+")):
        trainer.step()
    handle.remove()


def test_latents_that_explode_are_one_sentence_on_the_command_line(tmp_path, monkeypatch, capsys):
    said = run(monkeypatch, capsys, "train", "--recipe", "amvl", "--task", "digits-sum-silent", "--policy", "random-tiny", "--steps", "6", "--prompts", "2", "--lr", "1e6", "--evaluate", "0", "--threads", "1",
               "--out", str(tmp_path / "r"), code=2)
    assert re.search(r"step \d+: latent slot \d of item digits-sum\S* is ", said) and "Traceback" not in said


def test_a_checkpoint_of_other_slots_is_one_sentence_on_the_command_line(tmp_path, monkeypatch, capsys):
    LatentPolicy(random_tiny(), 2, 16).save(tmp_path / "two")
    LatentPolicy(random_tiny(), 4, 8).save(tmp_path / "narrow")
    for name, says in (("two", "has slots 2, and the method asks for 4"), ("narrow", "has width 8, and the method asks for 16")):
        said = run(monkeypatch, capsys, "train", "--recipe", "amvl", "--task", "digits-sum-silent", "--policy", str(tmp_path / name), "--steps", "1", "--out", str(tmp_path / "r"), code=2)
        assert says in said and len(said.strip().splitlines()) == 1
    said = run(monkeypatch, capsys, "train", "--recipe", "sft", "--task", "digits-sum-silent", "--policy", f"latent:{tmp_path / 'two'},slots=4", "--steps", "1", "--out", str(tmp_path / "r"), code=2)
    assert "has slots 2, and 4 was asked for; they can't be changed after training" in said


def test_other_slots_than_the_policy_has_are_refused():
    with pytest.raises(ValueError, match="has slots 2, and the method asks for 4"):
        Trainer(LatentPolicy(random_tiny(), 2, 16), digits_sum_silent, amvl)
    with pytest.raises(ValueError, match="has no latents; LatentPolicy"):
        variational()(random_tiny(), demonstrations(random_tiny(), digits_sum_silent.items()[:1]))
    with pytest.raises(ValueError, match="is no Hugging Face model"):
        new_trainer(Config(recipe="amvl", task="bandit", policy="table", evaluate=0))


def test_a_posterior_without_an_answer_is_refused():
    policy, _ = forwarded("tiny")
    with pytest.raises(ValueError, match="only the prior can be asked"):
        policy.posterior(policy.asked(policy.encode(digits_sum_silent.items()[:1])))


def test_other_weights_in_a_run_are_refused(tmp_path):
    run = train(replace(SILENT, steps=2), tmp_path / "r")
    checkpoint = run.checkpoints()[-1]
    policy = LatentPolicy(random_tiny(), 5, 16)
    policy.save(tmp_path / "other")
    for name in ("latent.json", "latent.safetensors"):
        shutil.copy(tmp_path / "other" / name, checkpoint / name)
    config = json.loads((run.folder / "config.json").read_text())
    (run.folder / "config.json").write_text(json.dumps(config | {"steps": 4}))
    with pytest.raises(ValueError, match="slots 5"):
        resume(run.folder)


# --- probes

@pytest.fixture(scope="module")
def trained():
    trainer = new_trainer(replace(SILENT, steps=10, prompts=4))
    trainer.fit(3)
    return trainer


@pytest.mark.parametrize("probe", LATENT, ids=lambda p: p.name)
def test_a_probe_of_latents_finds_what_it_promised_and_changes_nothing(probe, trained):
    before = {n: w.detach().clone() for n, w in trained.policy.weights().items()}
    stream, grads = torch.get_rng_state(), [w.grad is None for w in trained.policy.weights().values()]
    found = probe((trained.policy, trained.policy.thoughts(trained.task, 40)))
    assert set(found.probe.columns) <= set(found.table.columns) and len(found.table)
    assert np.isfinite(found.table.select_dtypes("number").to_numpy(dtype=float)).all()
    assert len(found._repr_html_()) > 200
    assert all(torch.equal(w, before[n]) for n, w in trained.policy.weights().items()) and torch.equal(stream, torch.get_rng_state())
    assert grads == [w.grad is None for w in trained.policy.weights().values()]
    assert probe.doc.endswith("?") and probe.caption.endswith(".")


@pytest.mark.parametrize("probe", LATENT, ids=lambda p: p.name)
def test_a_probe_of_latents_refuses_what_has_none(probe):
    with pytest.raises(ValueError, match="no column 'latent'"):
        probe(new_trainer(Config(policy="random-tiny", prompts=2, group=2, max_tokens=4)))


def test_a_run_can_be_asked(tmp_path):
    run = train(replace(SILENT, steps=2), tmp_path / "r")
    assert probes.get("latent-divergence")(run).table["forward"].ge(0).all()


def test_a_run_with_adapters_keeps_its_latents(tmp_path):
    run = train(replace(SILENT, policy="tiny", task="digits-sum-silent", steps=1, prompts=2, evaluate=0, lora=4), tmp_path / "r")
    policy = load_policy(str(run.folder))
    assert isinstance(policy, LatentPolicy) and policy.adapter is not None


def test_a_leaking_posterior_is_found_and_a_trained_prior_closes_the_gap():
    "A posterior that is made to hold the answer leaks; the same without it does not."
    items, n = verbose_sum_silent.items("test")[:160], 160
    quiet = torch.randn(n, 2, 12, generator=torch.Generator().manual_seed(0))
    code = torch.nn.functional.one_hot(torch.tensor([int(i.answer) % 24 for i in items]), 24).float().view(n, 2, 12)
    step = Step(items=items, group=torch.arange(n), prior=(torch.zeros(n, 2, 12), torch.zeros(n, 2, 12)), latent=4 * code + quiet)
    accuracy, chance = leakage(step)
    assert accuracy > chance + .3
    step.latent = quiet
    assert leakage(step)[0] < chance + .1


def test_noise_is_of_the_problem_and_the_step():
    items = verbose_sum_silent.items()[:3]
    step = Step(items=items, group=torch.tensor([0, 0, 1, 2]), clock=(3, 9))
    noise = noise_of(step, (2, 3))
    assert not torch.equal(noise[0], noise[1]) and torch.equal(noise_of(replace(step, group=torch.tensor([2, 1])), (2, 3)), noise[[3, 2]])
    assert torch.equal(drawn((noise, noise), noise, 0), noise)


def test_both_sides_are_numbers():
    policy, _ = forwarded("tiny")
    found = sides(policy, digits_sum_silent, digits_sum_silent.items("test")[:20])
    assert np.isfinite(list(found.values())).all() and found["gap"] == pytest.approx(found["right/posterior"] - found["right/prior mean"])


def test_silent_tasks_hold_the_same_problems():
    for name in ("digits-sum", "verbose-sum"):
        loud, quiet = tasks.get(name).items("test")[5], tasks.get(f"silent:{name}").items("test")[5]
        assert (loud.prompt, loud.answer) == (quiet.prompt, quiet.answer) and quiet.demo == f"<answer>{quiet.answer}</answer>"


def test_registered():
    assert isinstance(recipes.get("amvl"), Lesson) and "latent:" in policies.all()
    assert CliRunner and load_tiny


# --- photographs: perception that is hard to put into words

KINDS = ("jigsaw", "correspondence", "brightness")


def forget():
    for kept in (photographs.photograph, photographs._items, photographs._digest):
        kept.cache_clear()


@pytest.fixture
def pretended(monkeypatch, tmp_path):
    "Pictures in the place of the photographs: coarse noise, each its own."
    for k, file in enumerate(photographs.FILES.values()):
        noise = np.random.default_rng(k).integers(0, 256, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((320, 240), Image.BICUBIC).save(tmp_path / file)
    monkeypatch.setattr(photographs, "file_of", lambda name: tmp_path / photographs.FILES[name])
    forget()
    yield tmp_path
    forget()


@pytest.mark.parametrize("kind", KINDS)
def test_questions_about_photographs_check_themselves(kind, pretended):
    task = photographs.Photographs(f"mine-{kind}", kind=kind)
    assert validate(task, limit=36) == []
    items = task.items("test")[:30]
    assert {i.meta["photograph"] for i in items} == {*photographs.SPLIT["test"]}
    assert {[*photographs.FILES][i.level] for i in items} == {*photographs.SPLIT["test"]}
    assert all(p.size == (48, 48) for i in items for p in i.images) and {len(i.images) for i in items} == {2 if kind == "correspondence" else 1}
    assert {i.answer for i in items} == {*items[0].meta["options"]} and len({i.prompt for i in items}) == 1
    before = [[p.tobytes() for p in i.images] for i in items]
    forget()
    assert [[p.tobytes() for p in i.images] for i in photographs.Photographs(f"mine-{kind}", kind=kind).items("test")[:30]] == before
    assert sum(a != b for a, b in zip(before, before[1:])) == 29


def test_the_right_piece_fits_the_seam_and_the_wrong_one_does_not(pretended):
    for item in photographs.Photographs("mine").items("test")[:40]:
        light = photographs.brightness(item.images[0])
        a, b = (photographs.seam(light[:32, :32], piece) for piece in (light[:16, 32:], light[32:, 32:]))
        assert ("A" if a < b else "B") == item.answer and min(a, b) < .5 * max(a, b)


@pytest.mark.parametrize("turn", [0.0, .3, -.4])
def test_a_view_shows_what_its_matrix_says(turn):
    ramp = np.tile(np.arange(200, dtype=np.uint8), (180, 1))
    for photo, axis in ((Image.fromarray(ramp), 0), (Image.fromarray(np.ascontiguousarray(ramp.T[:180])), 1)):
        view = photographs.somewhere(photo, 48, 1.3, np.random.default_rng(1), turn)
        seen = np.asarray(view.of(photo), dtype=float)
        for u in ((5, 9), (24, 24), (40, 11)):
            point = view.out(np.array(u) + .5)
            assert seen[u[1], u[0]] == pytest.approx(point[axis] - .5, abs=1.0) and view.back(point) == pytest.approx(np.array(u) + .5)


@pytest.mark.parametrize("change,says", [(lambda m: m.setattr(photographs, "find_spec", lambda name: None), "photographs need scikit-image: pip install 'rlworkbench[tasks]'"),
                                         (lambda m: m.setitem(photographs.FILES, "astronaut", "nobody.png"), "ships without nobody.png|photographs need scikit-image")])
def test_photographs_that_are_not_there_are_one_sentence(change, says, monkeypatch, capsys, tmp_path):
    change(monkeypatch)
    forget()
    with pytest.raises(ValueError, match=says.replace("[", r"\[").replace("]", r"\]")):
        tasks.get("photographs-jigsaw").items()[0]
    said = run(monkeypatch, capsys, "train", "--task", "photographs-jigsaw", "--policy", "random-tiny", "--recipe", "amvl", "--steps", "1", "--out", str(tmp_path / "r"), code=2)
    assert "scikit-image" in said and "Traceback" not in said
    forget()


@pytest.mark.parametrize("kind", KINDS)
def test_latents_train_on_photographs(kind, pretended):
    trainer = Trainer(random_tiny(), tasks.get(f"photographs-{kind}"), with_slots(amvl, 2, 4), prompts=4, lr=1e-3, steps=2)
    rows = trainer.fit(2)
    assert np.isfinite([r["loss"] for r in rows]).all()


# --- choosing thoughts before decoding, and watching them over training

def test_the_filter_decodes_what_it_likes():
    policy, items = LatentPolicy(random_tiny(), 4, 16), digits_sum_silent.items()[:3]
    state = Filtered().init()
    state = state | {"into": torch.zeros_like(state["into"]), "out": torch.ones_like(state["out"])}
    state["into"][64] = 1.0                      # it likes a large first number of the first slot, where that is above 0
    drawn = {}
    for share in (0.0, 1.0):
        step = Step(items=items, size=(3, 8), clock=(2, 9), group=torch.arange(3).repeat_interleave(8), prompts=policy.encode(items), memory={"Filtered": state})
        with torch.no_grad():
            z, law = Filtered(random=share, over=8).drawn(policy, step)
        assert z.shape == law[0].shape == (24, 4, 16) and len({tuple(r) for r in z.flatten(1).tolist()}) == 24
        drawn[share] = (z - law[0])[:, 0, 0]
    assert drawn[0.0].mean() > drawn[1.0].mean() + .2 and abs(drawn[1.0].mean()) < .25


@pytest.mark.parametrize("recipe", ["amvl", "dlr_filtered"])
def test_a_watched_run_is_resumed_with_its_memory_and_looks_as_it_would_unwatched(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(film.Clouds.__init__, "__defaults__", (2, 40, True))
    config = replace(SILENT, recipe=recipe, steps=6, prompts=2, group=4, watch="latents", keep=0)
    whole, plain = train(config, tmp_path / "whole"), train(replace(config, watch=None), tmp_path / "plain")
    mine = [*film.NAMES]
    assert whole.metrics[mine].notna().all(axis=1).tolist() == [True, False] * 3 and whole.metrics["latent/path"][0] == 0
    timeless = [c for c in whole.metrics if not c.startswith(("time/", "cpu/")) and c not in mine]
    assert len(timeless) > 5 and whole.metrics[timeless].equals(plain.metrics[timeless])

    def stop(run, step):
        if step.clock[0] == 4:
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "short", stop)
    resumed = resume(tmp_path / "short")
    assert whole.metrics[timeless + mine].equals(resumed.metrics[timeless + mine])


def test_the_report_has_one_figure_and_one_caption_for_each_question_about_latents(tmp_path, monkeypatch):
    heading = "Is its latent space stable?"
    run = train(replace(SILENT, steps=3, watch="latents"), tmp_path / "r")
    monkeypatch.setattr(report, "SECTIONS", {"While it learned": ()})
    monkeypatch.setattr(report, "INSIDE", {heading: ()})
    html = report.diagnosed(run, inside=True)
    names = ("latent-over-training", *report_sections.INSIDE[heading])
    assert {p.name for p in LATENT} | {"latent-over-training"} == {*names}
    pieces = {n: html.partition(f"<code class=soft>{n}</code></p>")[2].partition("<p><b>")[0].partition("<h2>")[0] for n in names}
    for name, piece in pieces.items():
        assert piece.count("<svg") == 1, name
        assert piece.count(html_of(probes.get(name).caption)) >= 1, name
        assert html_of(probes.get(name).doc[0].upper() + probes.get(name).doc[1:]) in html


def html_of(text: str) -> str:
    import html
    return html.escape(text)
