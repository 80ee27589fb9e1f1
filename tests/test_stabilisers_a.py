"""JustRL, STAPO, Clip-Cov, KL-Cov where their thresholds bite: what the paper's numbers never reach on a table of four letters."""
import math
from dataclasses import replace

import pytest
import torch

from rlworkbench.core.registry import recipes
from rlworkbench.core.step import Step, take
from rlworkbench.recipes.clip_cov import clip_cov, clip_covariance, covariance
from rlworkbench.recipes.justrl import justrl
from rlworkbench.recipes.kl_cov import kl_cov, kl_covariance
from rlworkbench.recipes.stapo import kept_mean, least, silence, stapo
from rlworkbench.training.loss import losses, prepare
from rlworkbench.training.trainer import Trainer
from rlworkbench.training.trial import trial, trial_batch
from tests.conftest import LAW, SPELL, ending, on_table

BITING = [on_table(r) for r in (
    *(stapo.but(name=f"stapo-{over}-{by}", weight=silence(.4, .75, over, by)) for over, by in (("rare", "both"), ("all", "both"), ("rare", "probability"),
                                                                                              ("rare", "entropy"), ("rare", "random"))),
    clip_cov.but(weight=clip_covariance(.2, .05)),
    kl_cov.but(penalty=kl_covariance(.2)))]
biting = pytest.mark.parametrize("recipe", BITING, ids=lambda r: r.name)


def trained(recipe, micro=None, n=2, seed=3):
    "A table after some steps of plain descent, two minibatches and two passes each, and what was silenced on the way."
    policy = ending()
    trainer = Trainer(policy, SPELL, recipe.but(batches=2, epochs=2), prompts=3, group=8, lr=1., micro=micro, clip=math.inf, seed=seed)
    trainer.optimizer = torch.optim.SGD(policy.parameters().values(), lr=1.)
    steps = [trainer.step() for _ in range(n)]
    return policy.table.detach(), [((s.weight == 0) & (s.mask > 0)) | (s.penalty > 0) for s in steps]


@biting
@pytest.mark.parametrize("micro", [1, 2, 5])
def test_micro_batches_change_nothing_where_thresholds_bite(recipe, micro):
    whole, touched = trained(recipe)
    assert touched[0].any() and all(t.sum() < t.numel() / 2 for t in touched)
    parts, same = trained(recipe, micro)
    assert (whole - parts).abs().max() < 1e-12
    assert all(torch.equal(a, b) for a, b in zip(touched, same))


@biting
def test_the_order_of_rows_changes_nothing_where_thresholds_bite(recipe):
    batch = trial_batch()
    batch.reward, order = batch.correct, torch.randperm(12, generator=torch.Generator().manual_seed(1))
    batch.advantage = recipe.advantage(batch)
    found = []
    for part in (take(batch, torch.arange(12)), take(batch, order)):
        logp = part.logp.detach().clone().requires_grad_()
        part.logp = logp
        prepare(recipe, part)
        found.append((part.weight, torch.autograd.grad(losses(recipe, part)["policy"], logp)[0]))
    (weight, gradient), (turned, other) = found
    assert torch.equal(weight[order], turned) and torch.allclose(gradient[order], other, atol=1e-12)


@biting
def test_what_lies_behind_the_end_of_a_reply_changes_nothing(recipe):
    clean, junk = trial_batch(), trial_batch()
    for name in ("entropy", "old", "logp"):
        value = getattr(junk, name).detach()
        setattr(junk, name, torch.where(junk.mask > 0, value, -40. * torch.ones_like(value)).requires_grad_(name == "logp"))
    (loss, gradient), (other, same) = trial(recipe, clean), trial(recipe, junk)
    assert torch.allclose(loss, other, atol=1e-12) and torch.allclose(gradient, same, atol=1e-12)


@pytest.mark.parametrize("recipe", [r for r in BITING if "random" in r.name or r.name == "clip_cov"], ids=lambda r: r.name)
def test_lots_are_the_seeds_and_nobody_elses(recipe):
    torch.manual_seed(0)
    table, first = trained(recipe)
    torch.manual_seed(1)
    again, same = trained(recipe)
    _, other = trained(recipe, seed=4)
    assert torch.equal(table, again) and all(torch.equal(a, b) for a, b in zip(first, same))
    assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(first, other))


def test_looking_at_the_lots_does_not_use_them_up():
    step, key = trial_batch(), torch.zeros(12, 6)
    state = step.generator.get_state()
    first = least(step, key, step.mask > 0, 5)
    assert torch.equal(first, least(step, key, step.mask > 0, 5)) and torch.equal(state, step.generator.get_state())
    later = [least(replace(step, **now), key, step.mask > 0, 5) for now in ({"epoch": 1}, {"batch": 1})]
    assert not any(torch.equal(first, x) for x in later)
    assert all(x.sum() == 5 and (x <= (step.mask > 0)).all() for x in (first, *later))


def test_lots_are_fair():
    """Each of eight tokens is drawn equally often over many steps."""
    count = torch.zeros(2, 4)
    for k in range(2000):
        step = Step(group=torch.tensor([0, 0]), generator=torch.Generator().manual_seed(k))
        count += least(step, torch.zeros(2, 4), torch.ones(2, 4, dtype=torch.bool), 2)
    assert (count - 500).abs().max() < 4 * (2000 * .25 * .75) ** .5


@pytest.mark.parametrize("tau,quantile,over", [(.4, .75, "rare"), (.4, .8, "all"), (.6, .3, "rare")])
def test_controls_silence_as_many_tokens_of_rewarded_replies(tau, quantile, over):
    step = trial_batch()
    trial(stapo, step)
    silent = {by: (silence(tau, quantile, over, by)(step) == 0) & (step.mask > 0) for by in ("both", "probability", "entropy", "random")}
    assert len({int(s.sum()) for s in silent.values()}) == 1 and silent["both"].any()
    rewarded = (step.advantage[:, None] > 0) & (step.mask > 0)
    for by, column in (("probability", step.logp), ("entropy", step.entropy)):
        assert (silent[by] <= rewarded).all()
        assert column[silent[by]].max() < column[rewarded & ~silent[by]].min()
    assert (silent["random"] <= rewarded).all()
    assert not torch.equal(silent["random"], silent["both"])


@pytest.mark.parametrize("over,quantile", [("rare", .75), ("all", .8)])
def test_silenced_tokens_by_hand(over, quantile):
    step = trial_batch()
    trial(stapo.but(weight=silence(.4, quantile, over)), step)
    there = [(i, t) for i, n in enumerate(step.length.tolist()) for t in range(n)]
    rare = [p for p in there if step.advantage[p[0]] > 0 and math.exp(float(step.logp[p].detach())) < .4]
    H = sorted(float(step.entropy[p]) for p in (rare if over == "rare" else there))
    place = quantile * (len(H) - 1)
    tau = H[int(place)] + place % 1 * (H[int(place) + 1] - H[int(place)])
    silent = {p for p in rare if float(step.entropy[p]) < tau}
    assert silent and silent == {p for p in there if step.weight[p] == 0}
    for p in there:
        assert math.isclose(float(step.coef[p]), 1 / (len(there) - len(silent)), rel_tol=1e-12)


@pytest.mark.parametrize("spec", [silence(.4), silence(.4, by="random"), clip_covariance(.1, .05)], ids=repr)
def test_a_part_of_a_minibatch_reads_the_whole(spec):
    step = trial_batch()
    trial(justrl, step)
    found = spec(step)
    for rows in torch.arange(12).split(5):
        part = take(step, rows)
        part.whole = step
        assert torch.equal(spec(part), found[rows])
    assert (found < step.mask).any()


def test_a_distance_that_is_rounding_does_not_pull():
    step = trial_batch(noise=0)
    step.logp = (step.old + 1e-7 * torch.sin(1e6 * step.old)).requires_grad_()
    held, free = (trial(kl_cov.but(penalty=p), step)[1] for p in (kl_covariance(.3), justrl.penalty))
    assert torch.equal(held, free) and (trial(kl_cov.but(penalty=kl_covariance(.3, 1., 0.)), step)[1] - free).abs().max() > .01


def test_nothing_is_silenced_where_nothing_is_praised():
    step = trial_batch()
    step.correct = step.correct * 0
    step.rewards = {"correct": step.correct}
    trial(stapo.but(weight=silence(.9)), step)
    assert torch.equal(step.weight, step.mask)


def test_advantages_by_token_are_read_by_token():
    step = trial_batch()
    trial(stapo, step)
    by_token = step.advantage[:, None].expand_as(step.mask).clone()
    spec = silence(.4)
    assert torch.equal(spec(replace(step, advantage=by_token)), spec(step))
    by_token[:, 2:] = -1
    assert (spec(replace(step, advantage=by_token))[:, 2:] == step.mask[:, 2:]).all()
    assert torch.allclose(covariance(replace(step, advantage=step.advantage[:, None].expand_as(step.mask))), covariance(step))


def test_everything_silenced_gives_a_finite_loss():
    step = trial_batch()
    loss, gradient = trial(stapo.but(weight=lambda s: 0 * s.mask), step)
    assert loss == 0 and (gradient == 0).all() and torch.isfinite(kept_mean(step)).all()


def test_a_covariance_by_hand():
    step = trial_batch()
    trial(clip_cov, step)
    there = [(i, t) for i, n in enumerate(step.length.tolist()) for t in range(n)]
    logp, A = [float(step.logp[p].detach()) for p in there], [float(step.advantage[i]) for i, _ in there]
    mean = sum(logp) / len(logp), sum(A) / len(A)
    for p, x, a in zip(there, logp, A):
        assert math.isclose(float(covariance(step)[p]), (x - mean[0]) * (a - mean[1]), rel_tol=1e-9, abs_tol=1e-12)
    assert (covariance(step)[step.mask == 0] == 0).all()


@pytest.mark.parametrize("low,high", [(.02, .2), (.1, 5.)])
def test_what_sits_out_lies_in_the_band(low, high):
    step = trial_batch()
    trial(clip_cov, step)
    cov, out = covariance(step), (clip_covariance(1., low, high)(step) == 0) & (step.mask > 0)
    assert out.any() and torch.equal(out, (cov > low) & (cov < high) & (step.mask > 0))


def test_the_leash_holds_the_highest_covariances_only():
    step = trial_batch()
    trial(kl_cov.but(penalty=kl_covariance(.1)), step)
    held = kl_covariance(.1)(step) > 0
    assert held.sum() == int(.1 * step.mask.sum())
    assert covariance(step)[held].min() > covariance(step)[~held & (step.mask > 0)].max()
    assert (kl_covariance(1.)(step) > 0).sum() == (covariance(step) > 0).sum()


@pytest.mark.parametrize("epochs", [1, 3])
def test_dead_groups_are_not_pulled_about(epochs):
    policy = ending()
    dead = replace(SPELL, name="dead", near=0)                       # every reply is right
    trainer = Trainer(policy, dead, on_table(kl_cov.but(penalty=kl_covariance(.5))).but(epochs=epochs), prompts=3, group=4, lr=.1)
    step = trainer.step()
    assert step.correct.all() and torch.equal(policy.table.detach(), ending().table.detach())


def test_the_leash_slows_the_policy_down():
    """Where everybody may be held, the sum of distances from the sampling policy after some passes is smaller."""
    moved = {}
    for beta in (0., 1.):
        recipe = on_table(kl_cov.but(penalty=kl_covariance(.5, beta))).but(epochs=6)
        step = Trainer(ending(), SPELL, recipe, prompts=3, group=8, lr=.05).step()
        moved[beta] = float(((step.logp - step.old).abs() * step.mask).sum())
    assert 0 < moved[1.] < .9 * moved[0.]


def test_what_the_recipes_are_made_of():
    """The numbers of the papers, as `show` prints them."""
    assert repr(stapo.weight) == "silence(0.002, 0.75, 'rare', 'both')"
    assert repr(clip_cov.weight) == "clip_covariance(0.0002, 1.0, 5.0)" and repr(kl_cov.penalty) == "kl_covariance(0.0002, 1.0, 1e-05)"
    assert repr(justrl.surrogate) == repr(stapo.surrogate) == "clipped(0.2, 0.28)" and clip_cov.surrogate.region() == (0, 2)
    assert kl_cov.batches == 2 and LAW.max_tokens == SPELL.length
    assert {"justrl", "stapo", "stapo_probability", "stapo_entropy", "stapo_random", "clip_cov", "kl_cov"} <= set(recipes.all())
