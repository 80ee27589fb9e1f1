"""What must change no number: padding, company, order, micro-batches, sharing, tiles, looking on. And what must change one: taking the picture away."""
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from rlworkbench.core.registry import recipes
from rlworkbench.core.step import SEGMENTS, Step, take
from rlworkbench.policies.table import uniform
from rlworkbench.recipes.dr_grpo import constant_length
from rlworkbench.recipes.recipe import Lesson, Recipe, Term
from rlworkbench.recipes.slots import Group, as_is, kl_penalty, per_sequence, token_mean, token_sum
from rlworkbench.rollouts.parts import coin
from rlworkbench.rollouts.sampler import sample
from rlworkbench.rollouts.sampling import Sampling, draw, shape_logits, token_stats
from rlworkbench.rollouts.scorer import score
from rlworkbench.tasks.bandit import bandit
from rlworkbench.training.loss import losses, prepare
from rlworkbench.training.trainer import Trainer
from tests.conftest import LATENT, LAW, PLAIN, RECIPES, SPELL, VARIANTS, collected, ending, flat, fresh, on_table

ON_TABLE = [on_table(r) for r in (*RECIPES, *VARIANTS)]
LESSONS = [r for r in recipes.all().values() if isinstance(r, Lesson) and r.name not in LATENT and r.gradient is as_is]
every_recipe = pytest.mark.parametrize("recipe", ON_TABLE, ids=lambda r: r.name)
MODELS = ("random-tiny", "small-qwen")


def replies(policy, items, law=Sampling(max_tokens=10), each=2, seed=0) -> Step:
    "Sampled replies to some problems."
    step = Step(items=items, group=torch.arange(len(items)).repeat_interleave(each), prompts=policy.encode(items), law=law,
                generator=torch.Generator().manual_seed(seed))
    sample(policy, step, law)
    return step


def logps(policy, step, **kw):
    with torch.no_grad():
        return score(policy, step, step.law, **kw)["logp"]


def gradient(policy, loss):
    "The gradient of all weights as one row."
    grads = torch.autograd.grad(loss, list(policy.parameters().values()), allow_unused=True, materialize_grads=True)
    return torch.cat([g.flatten() for g in grads])


def same(a, b, eps):
    return float((a - b).norm() / b.norm()) < eps


# --- on-policy, the ratio is 1 ---
@pytest.mark.parametrize("temperature", [.5, 1., 2.])
@pytest.mark.parametrize("double", [False, True], ids=["float32", "float64"])
@pytest.mark.parametrize("name", MODELS)
def test_on_policy_ratio_is_one(name, double, temperature, digits):
    policy = fresh(name, double)
    step = replies(policy, digits, Sampling(temperature, max_tokens=12), each=3)
    assert step.old.dtype == (torch.float64 if double else torch.float32)
    assert (step.old[step.mask > 0] < -.01).any()
    error = (logps(policy, step) - step.old).exp().sub(1).abs().max()
    assert error < (1e-9 if double else 1e-5 * max(1, 1 / temperature))


@pytest.mark.parametrize("temperature", [.5, 1., 2.])
def test_on_policy_ratio_is_one_on_the_table(temperature):
    policy = ending()
    step = replies(policy, SPELL.items(), Sampling(temperature, max_tokens=6, banned=(1,)), each=20)
    assert (logps(policy, step) - step.old).exp().sub(1).abs().max() < 1e-9


@pytest.mark.parametrize("name", MODELS)
def test_on_policy_ratio_is_one_where_the_temperature_depends_on_the_segment(name, digits):
    """By a model that is fond of tags: segments opened and closed, replies that end inside one. Sampler and scorer must agree on every token."""
    policy = fresh(name)
    fond = torch.zeros(policy.vocabulary)
    fond[policy.tokens("<observe></observe><think></think>")] = 6.      # and of the end token
    plain, policy.logits = policy.logits, lambda hidden: plain(hidden) + fond
    law = Sampling(1., max_tokens=16, segments=(("think", .5), ("observe", 2.)))
    step = replies(policy, digits, law, each=12)
    assert {"other", "observe", "think"} <= {SEGMENTS[s] for s in step.segment[step.mask > 0].tolist()}
    error = (logps(policy, step) - step.old).exp().sub(1).abs() * step.mask
    wrong = [policy.piece(int(t)) for t in step.ids[error > 2e-5]]
    assert not wrong, f"scored at another temperature than sampled: {sorted(set(wrong))}"


@pytest.mark.parametrize("temperature", [.7, 1.])
def test_scored_probabilities_are_those_of_the_draws(temperature):
    """The law as a distribution: how often a token is drawn is what the scorer says of it."""
    logits = torch.tensor([[2., 1., 0., -1., .5]])
    law = Sampling(temperature, banned=(1,))
    shaped = shape_logits(logits, temperature, law.banned).repeat(20000, 1)
    share = torch.bincount(draw(shaped, law, torch.Generator().manual_seed(0)), minlength=5) / 20000
    allowed = torch.tensor([0, 2, 3, 4])
    expected = torch.zeros(5)
    expected[allowed] = (logits[0, allowed] / temperature).softmax(0)
    assert share[1] == 0
    assert (share - expected).abs().max() < 4 * .5 / 20000 ** .5
    assert torch.allclose(shaped[0].softmax(0), expected, atol=1e-6)


# --- padding and company ---
def test_company_changes_no_log_prob(model, digits):
    """Four problems of different length, with and without a picture: each alone and all together."""
    step = replies(model, digits)
    assert len({len(p) for p in step.prompts.ids}) > 1
    together = logps(model, step)
    for row in range(len(step)):
        one = take(step, torch.tensor([row]))
        assert (logps(model, one) - together[row]).abs().max() < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_company_changes_no_gradient(name, digits):
    policy = fresh(name, double=True)
    step = replies(policy, digits)
    together = gradient(policy, score(policy, step, step.law)["logp"].sum())
    alone = sum(gradient(policy, score(policy, take(step, torch.tensor([row])), step.law)["logp"].sum()) for row in range(len(step)))
    assert same(together, alone, 1e-6)


def test_padding_of_replies_changes_nothing(model, digits):
    """More columns, and anything at all in them."""
    step = replies(model, digits)
    step.ids[0, 4:], step.mask[0, 4:] = model.pad, 0                     # one reply that ends early
    before = logps(model, step)
    wide = replace(step, ids=torch.nn.functional.pad(step.ids, (0, 7), value=9), mask=torch.nn.functional.pad(step.mask, (0, 7)),
                   segment=torch.nn.functional.pad(step.segment, (0, 7)))
    wide.ids[0, 4:10] = 17
    after = logps(model, wide)
    assert (after[:, :10] - before).abs().max() < 1e-5
    assert (after[:, 10:] == 0).all() and (after[0, 4:] == 0).all()


def right_padded(policy, step):
    "Log-probs from the model's own forward, prompt and reply in one row, padded on the right, banned tokens struck out."
    out = []
    for row in range(len(step)):
        problem = int(step.group[row])
        prompt, extra = step.prompts.ids[problem], step.prompts.extra[problem]
        T, S = step.ids.shape[1], len(prompt)
        ids = torch.cat([prompt, step.ids[row], torch.full((5,), policy.pad)])[None]
        inputs = {k: torch.nn.functional.pad(v, (0, T + 5)) if v.shape[:2] == (1, S) else v for k, v in extra.items()}
        attention = torch.cat([torch.ones(S), step.mask[row].float(), torch.zeros(5)])[None].long()
        logits = policy.model(input_ids=ids, attention_mask=attention, **inputs).logits[0, S - 1:S - 1 + T]
        logits[:, list(policy.banned)] = -torch.inf
        out.append(logits.log_softmax(-1).gather(-1, step.ids[row][:, None])[:, 0].where(step.mask[row] > 0, 0.))
    return torch.stack(out)


def test_padding_side_changes_nothing(model, digits):
    """Against the model's own forward, which is padded on the right where the workbench pads on the left."""
    step = replies(model, digits)
    with torch.no_grad():
        theirs = right_padded(model, step)
    assert (logps(model, step) - theirs).abs().max() < 1e-5


# --- order ---
@pytest.mark.parametrize("name", ["table", *MODELS])
def test_batch_order_changes_nothing(name, request):
    policy = fresh(name, double=True)
    step = replies(policy, SPELL.items() if name == "table" else request.getfixturevalue("digits"))
    order = torch.randperm(len(step), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(logps(policy, take(step, order)), logps(policy, step)[order], atol=1e-6 if name != "table" else 1e-12)


@pytest.mark.parametrize("name", ["table", *MODELS])
def test_problem_order_changes_nothing(name, request):
    policy = fresh(name, double=True)
    step = replies(policy, SPELL.items() if name == "table" else request.getfixturevalue("digits"))
    order = torch.tensor([2, 0, 1] if name == "table" else [2, 0, 3, 1])
    items = [step.items[i] for i in order]
    turned = replace(step, items=items, prompts=policy.encode(items), group=torch.argsort(order)[step.group])
    assert [turned.items[g].id for g in turned.group] == [step.items[g].id for g in step.group]
    assert torch.allclose(logps(policy, turned), logps(policy, step), atol=1e-6 if name != "table" else 1e-12)


@every_recipe
def test_order_changes_no_gradient(recipe):
    """Rows shuffled, so that groups lie scattered: the same advantages, row by row, and the same gradient."""
    trainer, step = collected(recipe)
    order = torch.randperm(len(step), generator=torch.Generator().manual_seed(0))

    def run(batch):
        batch.advantage = recipe.advantage(batch)
        recipe.forward(trainer.policy, batch)
        batch.logp = batch.logp + .3 * batch.mask * torch.sin(7 * batch.old)   # as if the policy had moved since it sampled
        prepare(recipe, batch)
        return batch.advantage, gradient(trainer.policy, sum(losses(recipe, batch).values()))
    A, g = run(take(step, torch.arange(len(step))))
    B, h = run(take(step, order))
    assert torch.allclose(A[order], B, atol=1e-12)
    assert g.abs().max() > 1e-3
    assert torch.allclose(g, h, atol=1e-12)


# --- prefix sharing and tiles ---
@pytest.mark.parametrize("name", MODELS)
def test_sharing_the_prompt_changes_nothing(name, digits):
    policy = fresh(name, double=True)
    step = replies(policy, digits)
    both = [score(policy, step, step.law, share=share) for share in (True, False)]
    for column in ("logp", "entropy", "collision"):
        assert torch.allclose(both[0][column], both[1][column], atol=1e-6)
    shared, apart = (gradient(policy, (out["logp"] + .1 * out["entropy"]).sum()) for out in both)
    assert same(shared, apart, 1e-6)


@pytest.mark.parametrize("tile", [1, 3, 1000])
def test_tiles_change_nothing(model, digits, tile):
    step = replies(model, digits)
    plain, tiled = (score(model, step, step.law, tile=t) for t in (None, tile))
    for column in ("logp", "entropy", "collision"):
        assert torch.allclose(plain[column], tiled[column], atol=1e-6)
    assert same(gradient(model, tiled["logp"].sum()), gradient(model, plain["logp"].sum()), 1e-5)


@pytest.mark.parametrize("tile", [1, 4, 100])
def test_tiles_with_a_temperature_per_token(tile):
    torch.manual_seed(0)
    hidden, weight = torch.randn(9, 4, dtype=torch.float64), torch.randn(4, 7, dtype=torch.float64)
    heat, ids = torch.rand(9, 1, dtype=torch.float64) + .5, torch.arange(9) % 7
    plain, tiled = (token_stats(lambda h: h @ weight, hidden, ids, heat, (6,), tile=t) for t in (None, tile))
    for a, b in zip(plain, tiled):
        assert torch.allclose(a, b, atol=1e-12)
    by_hand = (hidden @ weight / heat)[:, :6].log_softmax(-1)
    assert torch.allclose(plain[0][ids < 6], by_hand.gather(1, ids.clamp(max=5)[:, None])[:, 0][ids < 6])


# --- micro-batches ---
def descend(policy, task, method, micro, n=2, **kw):
    """Some steps of plain descent, unclipped: Adam divides a gradient by its own size, clipping by its norm, and a wrong factor would not be seen."""
    trainer = Trainer(policy, task, method, prompts=3, lr=1., micro=micro, clip=math.inf, seed=3, **kw)
    trainer.optimizer = torch.optim.SGD(policy.parameters().values(), lr=1.)
    trainer.fit(n)
    return policy.table.detach()


@every_recipe
def test_micro_batches_change_no_weight_on_the_table(recipe):
    for but in ({}, {"epochs": 2, "batches": 2}):
        reference = descend(ending(), SPELL, recipe.but(**but), None, group=8)
        assert (reference - ending().table).abs().max() > 1e-3
        for micro in (1, 5):
            assert (descend(ending(), SPELL, recipe.but(**but), micro, group=8) - reference).abs().max() < 1e-12, (micro, but)


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda r: r.name)
def test_micro_batches_change_no_weight_of_a_lesson(lesson):
    reference = descend(uniform(), bandit, lesson, None)
    assert reference.abs().max() > .01
    assert (descend(uniform(), bandit, lesson, 1) - reference).abs().max() < 1e-12


@pytest.mark.parametrize("normalise", [per_sequence, token_mean, token_sum, constant_length], ids=lambda n: n.__name__)
def test_micro_batches_change_no_further_term(normalise):
    """A term of its own is normalised inside each micro-batch, by counts of the minibatch around it."""
    recipe = PLAIN.but(extra=(Term("square", lambda step: step.logp ** 2, normalise),))
    reference = descend(ending(), SPELL, recipe, None, group=8)
    for micro in (1, 5):
        assert (descend(ending(), SPELL, recipe, micro, group=8) - reference).abs().max() < 1e-12


def test_micro_batches_share_demonstrations():
    """Imitation beside exploration: a group cut by a micro-batch must not count its demonstration twice."""
    from tests.test_sketch import amft
    error = descend(uniform(), bandit, amft(), 1, n=1, group=4) - descend(uniform(), bandit, amft(), None, n=1, group=4)
    assert float(error.abs().max()) < 1e-12


MICRO = Recipe("micro", rollout=Group(Sampling(max_tokens=8)), rewards=(coin,), penalty=kl_penalty(.1))


def step_of_training(name, micro=None, seed=0, lr=3e-5, descent=False, **kw):
    "Two steps on pictures; the weights as one row."
    from rlworkbench.tasks.digits import digits_sum
    policy = fresh(name)
    trainer = Trainer(policy, digits_sum, MICRO, prompts=2, group=4, lr=lr, micro=micro, seed=seed, **kw)
    if descent:
        trainer.optimizer = torch.optim.SGD(policy.parameters().values(), lr=lr)
    trainer.fit(2)
    return flat(policy)


@pytest.mark.parametrize("name", MODELS)
def test_micro_batches_change_no_weight_of_a_model(name):
    """8 x 1 and 1 x 8, under Adam and by plain descent."""
    before = flat(fresh(name))
    for kw in ({}, {"lr": .1, "descent": True, "clip": math.inf}):
        one, eight = (step_of_training(name, micro, **kw) for micro in (None, 1))
        assert (one - before).abs().max() > 2e-5
        assert (one - eight).abs().max() < 1e-6


# --- looking on ---
class Curious:
    "A watcher that reads every column, draws from every global stream, and lets numbers grow stale."
    def __init__(self):
        self.seen = []

    def __call__(self, step):
        self.seen.append(step.phase)
        repr(step), len(step)
        for name in ("logp", "old", "advantage", "coef", "entropy"):
            value = getattr(step, name)
            if value is not None:
                value.sum().item(), value.clone().zero_()
        torch.rand(3), random.random(), np.random.rand()


def bits(recipe, seed=0, name="table", **kw):
    if name == "table":
        policy = ending()
        Trainer(policy, SPELL, recipe, prompts=3, group=4, lr=.05, seed=seed, **kw).fit(3)
        return policy.table.detach()
    return step_of_training(name, seed=seed, **kw)


@pytest.mark.parametrize("name", ["table", "small-qwen"])
def test_looking_on_changes_no_bit(name):
    recipe = PLAIN.but(penalty=kl_penalty(.1), epochs=2)
    plain, watcher = bits(recipe, name=name), Curious()
    assert torch.equal(plain, bits(recipe, name=name, health=False))
    assert torch.equal(plain, bits(recipe, name=name, watchers=[]))
    assert torch.equal(plain, bits(recipe, name=name, watchers=[watcher]))
    assert {"sample", "rescore", "reward", "shape", "keep", "advantage", "forward", "loss", "gradient", "update"} == set(watcher.seen)


@every_recipe
def test_health_columns_change_no_bit(recipe):
    assert torch.equal(bits(recipe), bits(recipe, health=False))


@pytest.mark.parametrize("name", ["table", *MODELS])
def test_same_seed_same_bits(name):
    """And the global streams have no say in it."""
    torch.manual_seed(0)
    first = bits(PLAIN, name=name)
    torch.manual_seed(99)
    assert torch.equal(first, bits(PLAIN, name=name))
    assert not torch.equal(first, bits(PLAIN, seed=1, name=name))


# --- pictures ---
@pytest.mark.parametrize("image", ["blank", "none", "other", "blur"])
def test_taking_the_picture_away_changes_log_probs(model, digits, image):
    step = replies(model, digits[:2])
    own = logps(model, step)
    step.prompts = model.encode(digits[:2], "own")
    assert torch.equal(logps(model, step), own)
    step.prompts = model.encode(digits[:2], image)
    change = (logps(model, step) - own).abs().amax(1)
    assert (change > 1e-3).all()


@pytest.mark.parametrize("image", ["blank", "none", "other", "blur"])
def test_problems_without_a_picture_do_not_notice(model, digits, image):
    """Taking pictures away gives none to those who had none, and all of them lose theirs, whoever stands beside them."""
    step = replies(model, digits)
    own = logps(model, step)
    step.prompts = model.encode(digits, image)
    change, text = (logps(model, step) - own).abs().amax(1), step.group >= 2
    assert change[text].max() < 1e-5
    assert change[~text].min() > 1e-3
    lengths = [len(p) for p in step.prompts.ids]
    assert image == "none" or lengths == [len(p) for p in model.encode(digits).ids]


def test_another_picture_needs_another_problem(model, digits):
    """With one problem there is no other picture: that is an error or another picture, never silently its own."""
    try:
        other = model.encode(digits[:1], "other")
    except ValueError:
        return
    step = replies(model, digits[:1])
    own = logps(model, step)
    step.prompts = other
    assert (logps(model, step) - own).abs().max() > 1e-3


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("temperature", [0, .5, 2.])
def test_image_placeholders_are_never_sampled(name, digits, temperature):
    """Even by a model that would like nothing better."""
    policy = fresh(name)
    placeholder = policy.model.config.image_token_id
    assert placeholder in policy.banned
    love = torch.zeros(policy.vocabulary)
    love[list(policy.banned)] = 50.
    plain, policy.logits = policy.logits, lambda hidden: plain(hidden) + love
    step = replies(policy, digits, Sampling(temperature, max_tokens=8), each=4)
    assert not torch.isin(step.ids, torch.tensor(policy.banned)).any()
    assert (step.old[step.mask > 0] > -30).all() and torch.isfinite(step.entropy).all()
    if temperature:
        assert (logps(policy, step) - step.old).abs().max() < 2e-5
        policy.banned = ()
        free = replies(policy, digits, Sampling(temperature, max_tokens=8), each=4)
        assert torch.isin(free.ids, torch.tensor(placeholder)).any()        # it would have


def test_banned_tokens_of_a_law(table):
    step = replies(table, SPELL.items(), replace(LAW, banned=(2,)), each=50)
    assert not (step.ids[step.mask > 0] == 2).any()
    assert {0, 1, 3} <= set(step.ids[step.mask > 0].tolist())
