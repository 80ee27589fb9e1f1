"""What if: exact, and nothing moves."""
import json
import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from rlworkbench.cli.ask import app
from rlworkbench.core.step import Step
from rlworkbench.policies.table import TablePolicy, uniform
from rlworkbench.policies.tiny import load_tiny
from rlworkbench.recipes.dapo import dapo
from rlworkbench.recipes.grpo import grpo
from rlworkbench.recipes.recipe import Recipe, Term
from rlworkbench.recipes.sft import sft
from rlworkbench.recipes.slots import Group, Spec, clipped, kl_penalty, per_sequence, score_replies, slot, token_mean
from rlworkbench.rollouts.sampling import Sampling
from rlworkbench.rollouts.scorer import score
from rlworkbench.tasks.bandit import bandit
from rlworkbench.tasks.digits import digits_sum
from rlworkbench.training import job
from rlworkbench.training.checkpoint import state_of
from rlworkbench.training.run import Config
from rlworkbench.training.trainer import Trainer
from rlworkbench.training.whatif import WhatIf  # noqa: F401, gives Trainer its whatif

LAW = Group(Sampling(max_tokens=3))


def trainer(recipe=grpo, policy=None, steps=0, **more):
    found = Trainer(policy or uniform(), bandit, recipe.but(rollout=LAW), **(dict(prompts=3, group=6, lr=.1) | more))
    found.fit(steps)
    return found


def tiny(recipe=grpo, **more):
    torch.set_num_threads(1)
    return Trainer(load_tiny(), digits_sum, recipe.but(rollout=Group(Sampling(max_tokens=34))), **(dict(prompts=3, group=4) | more))


def everything(t: Trainer) -> dict:
    "Every tensor and number that a step depends on, and what else could be touched."
    skeleton, tensors = state_of(t)
    hooks = [len(m._forward_hooks) + len(m._backward_hooks) + len(m._forward_pre_hooks) for m in t.policy.model.modules()] if hasattr(t.policy, "model") else []
    mode = [m.training for m in t.policy.model.modules()] if hasattr(t.policy, "model") else []
    p = t.policy.parameters()
    return {"skeleton": json.dumps(skeleton), "tensors": {k: v.clone() for k, v in tensors.items()}, "where": {n: w.data_ptr() for n, w in p.items()},
            "version": {n: w._version for n, w in p.items()}, "grad": {n: None if w.grad is None else w.grad.clone() for n, w in p.items()},
            "asks": {n: w.requires_grad for n, w in t.policy.weights().items()}, "hooks": hooks, "mode": mode, "past": len(t.past), "watchers": [id(w) for w in t.watchers],
            "recipe": t.recipe, "lr": [g["lr"] for g in t.optimizer.param_groups], "torch": torch.get_rng_state(), "numpy": str(np.random.get_state()), "python": random.getstate()}


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a) if isinstance(a, dict) else a == b


@slot("noise from every generator there is", needs={"ref"})
def noisy(step):
    torch.rand(3), np.random.rand(3), random.random()
    return step.mask * torch.rand(step.mask.shape, generator=step.generator, dtype=step.mask.dtype)


@slot("1 + how often it was asked")
@dataclass(frozen=True, repr=False)
class counting(Spec):
    def init(self):
        return {"n": torch.zeros(())}

    def __call__(self, step):
        return step.mask * (1 + step.memory["counting"]["n"].to(step.mask.dtype))

    def after(self, step, grads=None):
        return {"n": step.memory["counting"]["n"] + 1}


@pytest.mark.parametrize("phase", ["advantage", "forward", "loss", "gradient", "update"])
@pytest.mark.parametrize("make", [trainer, tiny])
def test_nothing_moves_and_the_run_goes_on_the_same(make, phase):
    """Held at any phase, with a trial, slots that draw from every generator and one that remembers: the run comes to the same bits as one that was never asked."""
    def run(ask):
        t = make(grpo.but(weight=counting()), keep=1)
        t.step()
        for step in t.phases():
            if ask and step.phase == phase:
                before, generator = everything(t), step.generator.get_state()
                columns = {n: getattr(step, n).clone() for n in ("advantage", "mask", "old", "entropy", "ids")}
                t.whatif("dapo", grpo.but(name="noisy", weight=noisy, penalty=kl_penalty(.1)), step=step, trial=True)
                assert same(before, everything(t)) and torch.equal(generator, step.generator.get_state())
                assert all(torch.equal(columns[n], getattr(step, n)) for n in columns)
        if ask:
            before = everything(t)
            t.whatif("dr_grpo", trial=True)
            assert same(before, everything(t))
        t.step()
        return everything(t)
    asked, never = run(True), run(False)
    assert all(same(asked[k], never[k]) for k in ("tensors", "skeleton", "grad", "torch"))


@pytest.mark.parametrize("recipe", [grpo, grpo.but(weight=counting(), penalty=kl_penalty(.1)), dapo.but(keep=grpo.keep), grpo.but(forward=lambda policy, step: score_replies(policy, step))],
                         ids=["grpo", "memory and reference", "dapo", "own forward"])
@pytest.mark.parametrize("micro", [None, 5])
def test_asked_about_itself_it_is_the_step(recipe, micro):
    t = trainer(recipe, steps=2, micro=micro, clip=.1)
    compare = t.whatif(trial=True)
    found, before = compare.readings[recipe.name], t.policy.table.detach().clone()
    for step in t.phases():
        if step.phase == "gradient":
            assert torch.allclose(compare.gradients[recipe.name]["table"], step.grads["all"]["table"], atol=1e-12)
    for column in ("weight", "coef", "ratio", "advantage", "surrogate", "penalty"):
        assert torch.allclose(getattr(found.batch, column), getattr(step, column), atol=1e-12), column
    assert sum(found.terms.values()) == pytest.approx(step.metrics["loss"], abs=1e-12)
    assert torch.allclose(compare.moves[recipe.name]["table"], t.policy.table.detach() - before, atol=1e-12)
    assert torch.allclose(compare.true[recipe.name], score(t.policy, step, step.law)["logp"] - compare.step.logp, atol=1e-9)


def test_asked_about_itself_on_a_model():
    t = tiny()
    t.step()
    compare = t.whatif("dapo", trial=True)
    for step in t.phases():
        if step.phase == "gradient":
            real = step.grads["all"]
            ours = compare.gradients["grpo"]
            assert sum((ours[n] - real[n]).square().sum() for n in real).sqrt() < 1e-5 * sum(g.square().sum() for g in real.values()).sqrt() + 1e-9
            assert max(float((ours[n] - real[n]).abs().max()) for n in real) < 1e-6
    assert torch.allclose(compare.readings["grpo"].batch.coef, step.coef, atol=1e-6)
    with torch.no_grad():
        after = score(t.policy, step, step.law)["logp"]
    assert float((compare.true["grpo"] - (after - compare.step.logp)).abs().max()) < 2e-2 * float(compare.true["grpo"].abs().max())   # Adam divides by small moments
    first, true = compare.first_order["grpo"], compare.true["grpo"]
    assert float((first - true).norm() / true.norm()) < .3


def test_first_order_is_the_limit_of_the_trial():
    errors = []
    for lr in (.1, .01, .001):
        t = trainer(policy=TablePolicy(torch.randn(3, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))), lr=lr)
        compare = t.whatif("dr_grpo", trial=True)
        errors.append(max(float((compare.first_order[n] - compare.true[n]).norm() / compare.true[n].norm()) for n in compare.readings))
    assert errors[0] > 8 * errors[1] > 60 * errors[2] > 0


def test_by_hand_on_the_table():
    """Two prompts, one place, plain descent: gradient, cosine, first order and shares by hand."""
    t = trainer(policy=uniform(), prompts=2, group=2, clip=1e9)
    t.optimizer = torch.optim.SGD(t.policy.parameters().values(), lr=.1)
    step = next(s for s in t.phases() if s.phase == "advantage")
    step.ids, step.group = torch.tensor([[0, 1, 2], [3, 1, 2], [0, 0, 0], [1, 1, 1]]), torch.tensor([0, 0, 1, 1])
    step.advantage, step.old = torch.tensor([1., -1., 0., 0.], dtype=torch.float64), torch.full((4, 3), -np.log(4.))
    only_first = slot("t=1")(lambda s: s.mask * (torch.arange(3) == 0))
    compare = t.whatif(grpo.but(name="first", weight=only_first), step=step, trial=True)
    prompt, other = torch.cat(step.prompts.ids).tolist()
    g = torch.zeros(3, 3, 4, dtype=torch.float64)
    g[prompt, 0, 0], g[prompt, 0, 3] = -1 / 12, 1 / 12          # c·A = ±1/12; the other places cancel, the other prompt has no advantage
    assert torch.allclose(compare.gradients["grpo"]["table"], g, atol=1e-12) and torch.allclose(compare.gradients["first"]["table"], g, atol=1e-12)
    assert compare.cosines.loc["grpo", "first"] == pytest.approx(1)
    move = .1 / 12                                               # logp_0 = a_0 - log Σ exp a: its slope along the move is ±move, and 0 where nothing moves
    assert torch.allclose(compare.first_order["grpo"][:2, 0], torch.tensor([move, -move], dtype=torch.float64), atol=1e-8)
    assert float(compare.first_order["grpo"][2:].abs().max()) < 1e-12
    assert torch.allclose(compare.readings["grpo"].share[:2], torch.tensor([[1.] * 3, [-1.] * 3], dtype=torch.float64) / 6)
    table = compare.differs("first")
    assert set(zip(table.reply, table.position)) == {(i, k) for i in (0, 1) for k in (1, 2)} and set(table.by) == {"weight"} and set(table.how) == {"silenced"}


def test_which_slot():
    """A bonus that the first recipe's shape does not read, and a shape that reads a bonus that the first does not have: neither alone, both together."""
    def bonus(step):
        return {"bonus": 2. * (torch.arange(len(step)) == 0).to(step.mask.dtype)}

    def correct_only(step):
        return step.rewards["correct"]

    def with_bonus(step):
        return step.rewards["correct"] + step.rewards.get("bonus", 0)
    t = trainer(grpo.but(shape=correct_only))
    compare = t.whatif(grpo.but(name="b", rewards=(*grpo.rewards, bonus), shape=with_bonus), grpo.but(name="sum", shape=correct_only, normalise=token_mean, surrogate=clipped(.1)),
                       grpo.but(name="minus", shape=correct_only, advantage=lambda s: -s.advantage if s.advantage is not None else -grpo.advantage(s)), effects=False)
    first_group = compare.step.group[0]
    table = compare.differs("b")
    assert set(table.by) == {"together"} and {int(compare.step.group[i]) for i in table.reply} == {int(first_group)}
    assert len(compare.differs("sum")) == 0                       # equal lengths, ratios of 1: other slots, the same pushes
    minus = compare.differs("minus")
    assert set(minus.by) == {"advantage"} and set(minus.how) == {"turned round"}
    assert compare.cosines.loc["grpo", "minus"] == pytest.approx(-1)


def test_clipping_is_told_apart_where_the_policy_has_moved():
    t = trainer(grpo.but(epochs=3), lr=.3)
    for step in t.phases():
        if (step.phase, step.epoch) == ("update", 1):
            break
    compare = t.whatif(grpo.but(name="loose", surrogate=clipped(10.)), step=step, effects=False)
    table = compare.differs("loose")
    clipped_ones = {(i, k) for i, k in (compare.readings["grpo"].batch.clipped != 0).nonzero().tolist()}
    assert set(zip(table.reply, table.position)) == clipped_ones and len(clipped_ones) and set(table.by) == {"surrogate"} and set(table.how) == {"awakened"}
    assert "pass 2, after 1 of its minibatches" in compare.at and "not the one that drew" in compare.notes[-1]


def test_cosines():
    names = ("dr_grpo", "rloo", "reinforce", "gspo")
    c = trainer(steps=3).whatif(*names, effects=False).cosines
    assert np.array_equal(c.values, c.values.T) and np.array_equal(np.diag(c.values), np.ones(5)) and c.abs().max().max() <= 1 + 1e-12
    nothing = trainer().whatif(grpo.but(name="mute", weight=lambda s: 0 * s.mask))
    assert nothing.cosines.loc["mute"].isna().all() and nothing.recipes.gradient["mute"] == 0
    assert nothing.moves["mute"]["table"].abs().max() == 0 and nothing.first_order["mute"].abs().max() == 0


def test_terms_of_their_own_and_gradients_apart():
    """An extra term through the shared pass equals the same through a graph of its own, and slots that see terms apart get them apart."""
    seen = []

    def halves(grads, step):
        seen.append(sorted(grads))
        return {n: grads["policy"][n] + .5 * grads["entropy"][n] for n in grads["policy"]}
    halves.apart = True
    extra = (Term("entropy", lambda s: -s.entropy, token_mean, .1),)
    two = grpo.but(name="two", extra=extra, gradient=halves)
    compare = trainer(steps=4).whatif(two, two.but(name="own", forward=lambda policy, step: score_replies(policy, step)), effects=False)
    assert seen == [["entropy", "policy"]] * 2
    assert torch.allclose(compare.gradients["two"]["table"], compare.gradients["own"]["table"], atol=1e-12)
    assert not torch.allclose(compare.gradients["two"]["table"], compare.gradients["grpo"]["table"], atol=1e-6)


def test_before_a_step_that_is_over():
    t, other = trainer(keep=1, steps=2), trainer(steps=2)
    want = other.whatif("dr_grpo")
    compare = t.whatif("dr_grpo", step=t.step())
    assert compare.at == "step 3, before its update" == want.at
    for name in want.readings:
        assert torch.equal(compare.gradients[name]["table"], want.gradients[name]["table"]) and torch.equal(compare.moves[name]["table"], want.moves[name]["table"])


def test_json_is_exact_and_html_is_safe():
    compare = tiny().whatif("dr_grpo", "dapo", trial=True)
    data = json.loads(compare.to_json())
    for name, columns in data["recipe_tokens"].items():
        table = compare.tokens[compare.tokens.recipe == name]
        for column in ("push", "share", "first_order", "true"):
            assert np.array_equal(np.array(columns[column], dtype=np.float32), table[column].to_numpy(), equal_nan=True), (name, column)
    assert data["cosines"]["dapo"]["grpo"] == compare.cosines.loc["dapo", "grpo"]
    compare.pieces[compare.most_different(1)[0]][0] = "<script>alert(1)</script>"
    compare.__dict__.pop("by_reply", None)
    assert "<script" not in compare.html() and "&lt;script" in compare.html()


def test_refusals():
    t = trainer()
    with pytest.raises(ValueError, match="did you mean grpo"):
        t.whatif("grop")
    with pytest.raises(ValueError, match="'sft' is not a recipe"):
        t.whatif("sft")
    with pytest.raises(ValueError, match="a lesson; whatif compares recipes"):
        Trainer(uniform(), bandit, sft, prompts=3).whatif("grpo")
    with pytest.raises(ValueError, match="slot rollout is lambda|slot rollout is <lambda>"):
        t.whatif(grpo.but(name="odd", rollout=lambda policy, step: None))
    with pytest.raises(ValueError, match="slot weight = .* needs 'teacher'"):
        t.whatif(grpo.but(name="taught", weight=slot("", needs={"teacher"})(lambda s: s.mask)))
    t.reference, t.done = None, 3
    with pytest.raises(ValueError, match="slot penalty = kl_penalty.* needs 'ref', and this trainer has kept no"):
        t.whatif(grpo.but(name="far", penalty=kl_penalty(.1)))
    with pytest.raises(ValueError, match="item .* has no demonstration"):
        nodemo = trainer()
        step = next(s for s in nodemo.phases() if s.phase == "advantage")
        step.items = [type(i)(i.id, i.prompt, answer=i.answer) for i in step.items]
        nodemo.whatif(grpo.but(name="shown", weight=slot("", needs={"demos"})(lambda s: s.mask)), step=step)
    with pytest.raises(ValueError, match="recipe 'nan': the slot weight = <lambda> returned what is not finite, nan at reply 0, token 0"):
        t.whatif(grpo.but(name="nan", weight=lambda s: s.mask * float("nan")))
    with pytest.raises(ValueError, match="the gradient is not finite"):      # a corner: the value is 0, its slope is none
        t.whatif(grpo.but(name="corner", penalty=lambda s: (s.logp - s.logp.detach()).abs().sqrt()))
    with pytest.raises(ValueError, match="held after nothing"):
        t.whatif(step=Step(task=bandit, law=LAW.sampling))


def test_more_problems_than_there_are_minibatches_is_no_matter():
    """A recipe of several minibatches is compared on the whole batch, and says so."""
    compare = trainer().whatif(Recipe("many", rollout=LAW, batches=9, epochs=4, normalise=per_sequence))
    assert torch.equal(compare.gradients["many"]["table"], compare.gradients["grpo"]["table"])
    assert "ignored: many: batches = 9, epochs = 4" in compare.notes[1]


# --- the command ---
@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whatif") / "run"
    config = Config(recipe="grpo", task="bandit", policy="table", steps=4, prompts=3, group=6, lr=.1, evaluate=0, checkpoint=2, record="full")
    return job.train(config, folder)


def test_diff_replays_the_recorded_step(run, tmp_path):
    files = {f: f.read_bytes() for f in run.folder.rglob("*") if f.is_file()}
    out = CliRunner().invoke(app, ["diff", str(run.folder), "--step", "3", "--recipes", "grpo,dapo,dr_grpo", "--trial", "--json", "--html", str(tmp_path / "p.html")], catch_exceptions=False)
    assert out.exit_code == 0
    data = json.loads(out.output.strip().splitlines()[-1])
    assert list(data["recipes"]) == ["grpo", "dapo", "dr_grpo"] and (tmp_path / "p.html").read_text().startswith("<!doctype html>")
    recorded = run.tokens(3)
    assert recorded.piece.tolist() == data["tokens"]["piece"]
    assert np.allclose(recorded.coef * recorded.weight * recorded.advantage * recorded.ratio, data["recipe_tokens"]["grpo"]["push"])
    assert data["recipes"]["grpo"]["gradient"] == pytest.approx(run.rows()[2]["grad_norm"])
    assert {f: f.read_bytes() for f in run.folder.rglob("*") if f.is_file()} == files


@pytest.mark.parametrize("arguments, says", [(["--step", "9", "--recipes", "dapo"], "has 4 steps; --step must be 1 to 4, got 9"), (["--step", "2", "--recipes", "sft"], "'sft' is not a recipe"),
                                             (["--step", "2", "--recipes", "grop"], "did you mean grpo"), (["--step", "2", "--recipes", "dapo", "--html", "/nowhere/p.html"], "there is no folder")])
def test_diff_refuses_in_a_sentence(run, arguments, says):
    out = CliRunner().invoke(app, ["diff", str(run.folder), *arguments])
    assert isinstance(out.exception, ValueError) and says in str(out.exception)
