"""Gradients, checked against something that is not autograd: finite differences, coefficients by hand, sums over all replies."""
import math
from contextlib import contextmanager
from dataclasses import replace
from itertools import product

import pytest
import torch

from rlworkbench.core.step import Step, take
from rlworkbench.policies.table import TablePolicy, expected_reward
from rlworkbench.recipes.slots import Group, clipped, kl_estimate, kl_penalty, none, spread, token_sum, total
from rlworkbench.rollouts.parts import task_score
from rlworkbench.rollouts.sampler import describe
from rlworkbench.rollouts.sampling import Sampling, read_logits, shape_logits, token_stats
from rlworkbench.rollouts.scorer import score
from rlworkbench.tasks.bandit import Bandit, bandit
from rlworkbench.training.loss import losses, prepare
from rlworkbench.training.supply import rescore
from rlworkbench.training.trainer import Trainer
from tests.conftest import PLAIN, RECIPES, SPELL, VARIANTS, collected, ending, on_table

BY_NAME = {r.name: on_table(r) for r in (*RECIPES, *VARIANTS)}
FAMILY = ("reinforce", "rloo", "reinforce_pp", "grpo", "dr_grpo", "dapo", "gspo", "cispo", "entropy20")
every_recipe = pytest.mark.parametrize("recipe", BY_NAME.values(), ids=BY_NAME)
family = pytest.mark.parametrize("recipe", [BY_NAME[n] for n in FAMILY if n in BY_NAME] + VARIANTS[:1], ids=lambda r: r.name)


def leaf(x):
    return x.detach().clone().requires_grad_()


def off_policy(recipe, drift=.4, seed=0):
    "The trainer, and a minibatch scored by a table that has moved on since it sampled: ratios on both sides of every clip."
    trainer, batch = collected(recipe, seed=seed)
    with torch.no_grad():
        trainer.policy.table += drift * torch.randn(trainer.policy.table.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        recipe.forward(trainer.policy, batch)
    prepare(recipe, batch)
    return trainer, batch


def whole_loss(recipe, batch, **columns):
    "The loss of a minibatch with some columns replaced."
    return sum(losses(recipe, replace(take(batch, torch.arange(len(batch))), **columns)).values())


class Constants:
    "What `detach` returned, recorded once; from then on each call returns its recorded value, wherever the inputs have moved to."
    def __init__(self):
        self.values, self.recorded = [], False

    @contextmanager
    def __call__(self):
        plain, calls = torch.Tensor.detach, iter(self.values)

        def record(x):
            self.values.append(plain(x).clone())
            return plain(x)
        torch.Tensor.detach = (lambda x: next(calls)) if self.recorded else record
        try:
            yield
        finally:
            torch.Tensor.detach, self.recorded = plain, True


def frozen(loss):
    "A function whose stop-gradients are constants: what autograd claims to differentiate, as a finite difference can see it."
    constants = Constants()

    def function(*inputs):
        with constants():
            return loss(*inputs)
    return function


# --- every recipe in the registry ---
@every_recipe
def test_loss_gradient_is_the_finite_difference(recipe):
    recipe = recipe.but(extra=tuple(t for t in recipe.extra if "demos" not in getattr(t.tokens, "needs", ())))   # what is imitated has log-probs of its own
    _, batch = off_policy(recipe)
    logp, entropy = leaf(batch.logp), leaf(batch.entropy)
    assert batch.length.unique().numel() > 2 and (batch.advantage != 0).any()

    def loss(logp, entropy):
        return whole_loss(recipe, batch, logp=logp, entropy=entropy)
    real = torch.autograd.grad(loss(logp, entropy), [logp, entropy], allow_unused=True, materialize_grads=True)
    check = frozen(lambda l, e: loss(l, e) + 0 * e.sum())
    check(logp, entropy)
    held = torch.autograd.grad(check(logp, entropy), [logp, entropy])
    for a, b in zip(real, held):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-15)
    assert torch.autograd.gradcheck(check, (logp, entropy), eps=1e-6, atol=1e-8, rtol=1e-5)
    assert (real[0][batch.mask == 0] == 0).all()
    assert ((real[0] != 0) & (batch.mask > 0)).sum() > 3


@every_recipe
def test_gradient_of_the_weights_is_the_finite_difference(recipe):
    trainer, batch = off_policy(recipe)
    policy, table = trainer.policy, leaf(trainer.policy.table)

    def loss(table):
        part = take(batch, torch.arange(len(batch)))
        policy.table = table
        recipe.forward(policy, part)
        return sum(losses(recipe, part).values())
    check = frozen(loss)
    assert check(table).requires_grad
    assert torch.autograd.gradcheck(check, (table,), eps=1e-6, atol=1e-8, rtol=1e-5)


# --- the family, by hand ---
@family
def test_on_policy_each_token_is_pushed_by_its_advantage(recipe):
    """Where old and new policy are one, ratio and clip have no say: -coefficient · weight · advantage, for every member of the family."""
    recipe = recipe.but(penalty=none)
    _, batch = off_policy(recipe, drift=0.)
    logp = leaf(batch.logp)
    gradient, = torch.autograd.grad(losses(recipe, replace(batch, logp=logp))["policy"], logp)
    by_hand = -(batch.coef * batch.weight * spread(batch.advantage, batch) * batch.mask)
    assert by_hand.abs().sum() > .05
    assert torch.allclose(gradient, by_hand, rtol=1e-10, atol=1e-14)


def tokens(batch):
    "Row, place, advantage, ratio and the reply's own ratio (geometric mean) of each token that counts, as plain numbers."
    for i, n in enumerate(batch.length.tolist()):
        log_ratio = [float(batch.logp[i, t] - batch.old[i, t]) for t in range(n)]
        for t in range(n):
            A = batch.advantage[i] if batch.advantage.dim() == 1 else batch.advantage[i, t]
            yield i, t, float(A), math.exp(log_ratio[t]), math.exp(sum(log_ratio) / n)


def gate(A, r, low, high):
    "1 where PPO's pessimistic clip lets the gradient through."
    return 0. if (A > 0 and r > 1 + high) or (A < 0 and r < 1 - low) else 1.


SLOPE = {   # of a token's surrogate, by its log-prob
    "reinforce": lambda A, r, s: -A,
    "rloo": lambda A, r, s: -A,
    "reinforce_pp": lambda A, r, s: -A * r * gate(A, r, .2, .2),
    "plain": lambda A, r, s: -A * r * gate(A, r, .2, .2),
    "grpo": lambda A, r, s: -A * r * gate(A, r, .2, .2),
    "dr_grpo": lambda A, r, s: -A * r * gate(A, r, .2, .2),
    "dapo": lambda A, r, s: -A * r * gate(A, r, .2, .28),
    "entropy20": lambda A, r, s: -A * r * gate(A, r, .2, .28),
    "gspo": lambda A, r, s: -A * s * gate(A, s, 3e-4, 4e-4),
    "cispo": lambda A, r, s: -A * min(r, 5.),
}


@pytest.mark.parametrize("name", [n for n in SLOPE if n in BY_NAME])
def test_off_policy_slopes_by_hand(name):
    recipe = BY_NAME[name].but(penalty=none)
    _, batch = off_policy(recipe, drift=3.)
    logp = leaf(batch.logp)
    gradient, = torch.autograd.grad(losses(recipe, replace(batch, logp=logp))["policy"], logp)
    gates = set()
    for i, t, A, r, s in tokens(batch):
        slope = SLOPE[name](A, r, s)
        gates.add((A > 0, slope == 0, r > 5))
        assert math.isclose(float(gradient[i, t]), slope * float(batch.coef[i, t] * batch.weight[i, t]), rel_tol=1e-9, abs_tol=1e-14), (i, t)
    assert {g[2] for g in gates} == {True, False}
    assert name in ("reinforce", "rloo", "cispo") or {g[:2] for g in gates} == set(product((True, False), repeat=2))


def in_group(batch, i):
    "The rewards of the group that reply i belongs to, its own left out."
    return [float(r) for j, r in enumerate(batch.reward) if batch.group[j] == batch.group[i] and j != i]


def zscore(batch, i):
    R, others = float(batch.reward[i]), in_group(batch, i)
    mean = (R + sum(others)) / (len(others) + 1)
    variance = sum((r - mean) ** 2 for r in (R, *others)) / len(others)
    return (R - mean) / (variance ** .5 + 1e-4)


ADVANTAGE = {
    "reinforce": lambda b, i: float(b.reward[i]),
    "rloo": lambda b, i: float(b.reward[i]) - sum(in_group(b, i)) / len(in_group(b, i)),
    "dr_grpo": lambda b, i: float(b.reward[i]) - (float(b.reward[i]) + sum(in_group(b, i))) / (len(in_group(b, i)) + 1),
    **dict.fromkeys(("plain", "grpo", "dapo", "gspo", "cispo", "entropy20"), zscore),
}
COEFFICIENT = {
    **dict.fromkeys(("plain", "grpo", "gspo"), lambda b, i: 1 / len(b) / float(b.mask[i].sum())),
    **dict.fromkeys(("reinforce_pp", "dapo", "cispo", "entropy20"), lambda b, i: 1 / float(b.mask.sum())),
    **dict.fromkeys(("reinforce", "rloo"), lambda b, i: 1 / len(b)),
    "dr_grpo": lambda b, i: 1 / len(b) / SPELL.length,
}


@pytest.mark.parametrize("name", [n for n in ADVANTAGE if n in BY_NAME])
def test_advantages_by_hand(name):
    _, batch = off_policy(BY_NAME[name])
    assert batch.reward.unique().numel() > 1
    for i in range(len(batch)):
        assert math.isclose(float(batch.advantage[i]), ADVANTAGE[name](batch, i), rel_tol=1e-9, abs_tol=1e-12)


@pytest.mark.parametrize("name", [n for n in COEFFICIENT if n in BY_NAME])
def test_coefficients_by_hand(name):
    _, batch = off_policy(BY_NAME[name])
    for i, n in enumerate(batch.length.tolist()):
        for t in range(batch.mask.shape[1]):
            assert math.isclose(float(batch.coef[i, t]), COEFFICIENT[name](batch, i) * (t < n), rel_tol=1e-12)


def test_returns_of_reinforce_pp_by_hand():
    """Outcome at the last token, the divergence paid at each, summed from the end, whitened over all tokens."""
    recipe = BY_NAME["reinforce_pp"]
    _, batch = off_policy(recipe)
    returns = {}
    for i, n in enumerate(batch.length.tolist()):
        for t in range(n):
            paid = sum(.01 * float(batch.old[i, k] - batch.ref[i, k]) for k in range(t, n))
            returns[i, t] = float(batch.correct[i]) - paid
    mean = sum(returns.values()) / len(returns)
    std = (sum((r - mean) ** 2 for r in returns.values()) / (len(returns) - 1) + 1e-8) ** .5
    assert (batch.old - batch.ref).abs().max() > .1
    for (i, t), r in returns.items():
        assert math.isclose(float(batch.advantage[i, t]), (r - mean) / std, rel_tol=1e-9, abs_tol=1e-12)
    assert (batch.advantage[batch.mask == 0] == 0).all()


def test_weights_of_entropy20_by_hand():
    """The fifth of all tokens with the highest entropy, padding not counted."""
    _, batch = off_policy(BY_NAME["entropy20"])
    entropies = sorted((float(batch.entropy[i, t]), i, t) for i, t, *_ in tokens(batch))
    cut = len(entropies) - round(.2 * len(entropies))
    least = min(e for e, i, t in entropies if batch.weight[i, t] == 1)
    assert all(batch.weight[i, t] == 0 for e, i, t in entropies if e < least)
    assert least in (entropies[cut - 1][0], entropies[cut][0], entropies[cut + 1][0])
    assert (batch.weight[batch.mask == 0] == 0).all()


@pytest.mark.parametrize("name", [n for n in ("dapo", "entropy20") if n in BY_NAME])
def test_dapo_keeps_mixed_groups_and_counts_length(name):
    _, batch = off_policy(BY_NAME[name])
    for g in batch.group.unique():
        assert 0 < batch.correct[batch.group == g].sum() < 8
    T = SPELL.length
    for i, n in enumerate(batch.length.tolist()):
        assert math.isclose(float(batch.reward[i] - batch.correct[i]), min(0., (.8 * T - n) / (.2 * T)), abs_tol=1e-12)
    assert (batch.length == T).any() and (batch.length < .8 * T).any()


# --- sums over all replies ---
def every_reply(policy, task=bandit, tuples=1) -> tuple:
    "All groups of `tuples` replies to all problems as one Step, and the probability of each row's group (as a coefficient of its tokens)."
    words, P = task.replies(), task.prompts
    groups = torch.tensor(list(product(range(len(words)), repeat=tuples)))                      # (R,tuples)
    ids = torch.tensor(words)[groups].flatten(0, 1).repeat(P, 1)
    problem = torch.arange(P).repeat_interleave(len(groups))
    step = Step(items=[task.items()[p] for p in problem], ids=ids, mask=torch.ones(ids.shape, dtype=torch.float64), law=Sampling(max_tokens=task.length),
                group=torch.arange(len(problem)).repeat_interleave(tuples), size=(len(problem), tuples), task=task, phase="every reply")
    step.prompts = policy.encode(step.items)
    describe(policy, step)
    rescore(policy, step, frozenset())
    step.rewards = task_score(step)
    step.reward = total(step)
    logp = step.old.sum(1).reshape(-1, tuples).sum(1)
    coefficient = (logp.exp() / P / tuples).repeat_interleave(tuples)[:, None] * step.mask
    assert torch.isclose(coefficient[:, 0].sum(), torch.ones((), dtype=torch.float64))
    return step, coefficient


def expected_gradient(recipe, policy, task=bandit, tuples=1, reference=None):
    "The gradient a recipe takes on average: each group of replies, weighted by the probability that it is sampled."
    step, coefficient = every_reply(policy, task, tuples)
    if reference is not None:
        rescore(policy, step, {"ref"}, reference)
    recipe = recipe.but(normalise=lambda s: coefficient)
    step.advantage = recipe.advantage(step)
    recipe.forward(policy, step)
    prepare(recipe, step)
    return torch.autograd.grad(losses(recipe, step)["policy"], policy.table)[0]


def random_table(task=bandit, seed=0):
    return TablePolicy(torch.randn(task.prompts, task.length, task.letters, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))


def true_gradient(policy, task=bandit):
    return torch.autograd.grad(expected_reward(policy, task), policy.table)[0]


raw = PLAIN.but(name="raw", advantage=lambda s: s.reward)


@pytest.mark.parametrize("recipe", [raw] + [BY_NAME[n] for n in ("reinforce",) if n in BY_NAME], ids=lambda r: r.name)
def test_reinforce_is_exact_on_average(recipe):
    policy = random_table()
    exact = true_gradient(policy)
    assert exact.abs().max() > .01
    assert (expected_gradient(recipe.but(penalty=none), policy) + exact).abs().max() < 1e-10


def centred(step):
    return step.reward - torch.stack([step.reward[step.group == g].mean() for g in step.group.unique()])[step.group]


def zscore_factor(p, G):
    "How long GRPO's average gradient is, for a problem solved with probability p: E[A | right] - E[A | wrong], the others being binomial."
    def advantage(reward, k):
        variance = (k * (1 - k / G) ** 2 + (G - k) * (k / G) ** 2) / (G - 1)
        return (reward - k / G) / (variance ** .5 + 1e-4)
    return sum(math.comb(G - 1, k) * p ** k * (1 - p) ** (G - 1 - k) * (advantage(1, k + 1) - advantage(0, k)) for k in range(G))


@pytest.mark.parametrize("G,letters", [(2, 3), (4, 2)])
def test_group_baselines_on_average(G, letters):
    """Over all groups of G replies: leave-one-out is exact, the group's own mean is short by (G-1)/G, z-scores weigh each problem by its difficulty."""
    task = Bandit("groups", prompts=2, length=2, letters=letters, near=2)
    policy = TablePolicy(random_table(task).table.detach() * torch.tensor([.3, 3.])[:, None, None])   # so that one problem is easier
    exact = true_gradient(policy, task)
    words = torch.tensor([[(p + t) % letters for t in range(2)] for p in range(2)])
    solved = [float(policy.table[p].detach().softmax(-1)[torch.arange(2), words[p]].prod()) for p in range(2)]
    zscore = torch.tensor([zscore_factor(p, G) for p in solved], dtype=torch.float64)[:, None, None]
    assert G == 2 or (zscore[0] / zscore[1] - 1).abs() > .01
    for name, factor in (("rloo", 1.), ("dr_grpo", (G - 1) / G), ("centred", (G - 1) / G), ("grpo", zscore), ("plain", zscore)):
        recipe = PLAIN.but(advantage=centred) if name == "centred" else BY_NAME.get(name)
        if recipe is not None:
            found = expected_gradient(recipe.but(penalty=none), policy, task, G)
            assert (found + factor * exact).abs().max() < 1e-10, name


@pytest.mark.parametrize("name", ["raw", *(n for n in ("reinforce", "rloo") if n in BY_NAME)])
def test_trainer_takes_the_true_gradient_on_average(name):
    """The trainer's own gradients over 300 rollouts: along the true gradient and along fixed random directions, within 3 standard errors."""
    recipe = {"raw": raw, **BY_NAME}[name].but(rollout=Group(Sampling(max_tokens=bandit.length)), penalty=none, normalise=token_sum)
    policy = random_table()
    exact = true_gradient(policy).flatten()
    trainer = Trainer(policy, bandit, recipe, prompts=3, group=8, lr=0., seed=1, clip=math.inf, health=False, watchers=[])
    taken = torch.stack([-trainer.step().grads["all"]["table"].flatten() for _ in range(300)])
    noise = torch.randn(8, len(exact), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    directions = torch.cat([exact[None], noise])
    directions = directions / directions.norm(dim=1, keepdim=True)
    found, error = (taken @ directions.T).mean(0), (taken @ directions.T).std(0) / len(taken) ** .5
    assert ((found - directions @ exact).abs() < 3 * error).all()
    assert 3 * error[0] < .35 * exact.norm()                         # narrow enough to tell a wrong factor


@pytest.mark.parametrize("clip", [math.inf, .01])
def test_the_update_goes_down_the_gradient(clip):
    """Plain descent by hand; beyond the limit the gradient keeps its direction and loses its length, while the Step still shows it unclipped.
    And what was better than its group is likelier now."""
    policy = ending()
    trainer = Trainer(policy, SPELL, PLAIN, prompts=3, group=16, lr=.5, clip=clip)
    trainer.optimizer = torch.optim.SGD(policy.parameters().values(), lr=.5)
    before = policy.table.detach().clone()
    step = trainer.step()
    gradient = step.grads["all"]["table"]
    assert step.metrics["grad_norm"] == pytest.approx(float(gradient.norm())) and gradient.norm() > .02
    assert torch.allclose(policy.table.detach(), before - .5 * gradient * min(1., clip / float(gradient.norm())), rtol=1e-4, atol=1e-8)
    gain = (score(policy, step, step.law)["logp"] - step.old).sum(1).detach()
    assert (gain * step.advantage).sum() > 0


@family
def test_each_recipe_learns_the_bandit(recipe):
    policy = TablePolicy(torch.zeros(3, 3, 4, dtype=torch.float64))
    recipe = recipe.but(rollout=Group(Sampling(max_tokens=bandit.length)))
    Trainer(policy, bandit, recipe, prompts=3, group=16, lr=.1, health=False).fit(12)
    assert expected_reward(policy).item() > .4                      # it was 10/64


# --- divergences and entropy ---
@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_divergence_estimates(kind):
    """Over all replies: k1 and k3 are unbiased as values; as losses k1 does nothing, k2 goes down KL(new‖ref), k3 down KL(ref‖new)."""
    policy, reference = random_table(), random_table(seed=1)
    p, q = policy.table.log_softmax(-1), reference.table.detach().log_softmax(-1)
    forward, backward = (p.exp() * (p - q)).sum() / bandit.prompts, (q.exp() * (q - p)).sum() / bandit.prompts
    step, coefficient = every_reply(policy)
    rescore(policy, step, {"ref"}, reference)
    value = (coefficient * kl_estimate(step.old, step.ref, kind)).sum()
    assert kind == "k2" or torch.isclose(value, forward.detach(), rtol=1e-10)
    recipe = PLAIN.but(advantage=lambda s: torch.zeros_like(s.reward), penalty=kl_penalty(.5, kind))
    found = expected_gradient(recipe, policy, reference=reference)
    expected = {"k1": 0 * policy.table, "k2": torch.autograd.grad(forward, policy.table, retain_graph=True)[0],
                "k3": torch.autograd.grad(backward, policy.table)[0]}[kind]
    assert kind == "k1" or expected.abs().max() > .01
    assert (found - .5 * expected).abs().max() < 1e-10


@pytest.mark.parametrize("banned", [(), (1, 4)])
@pytest.mark.parametrize("temperature", [.5, 1., 2.])
def test_log_prob_and_entropy_gradients(banned, temperature):
    """Finite differences, and the closed form dH/da = -p (log p + H) / temperature."""
    torch.manual_seed(0)
    logits, ids = torch.randn(4, 6, dtype=torch.float64, requires_grad=True), torch.tensor([0, 2, 3, 5])
    assert torch.autograd.gradcheck(lambda a: read_logits(shape_logits(a, temperature, banned), ids)[:2], (logits,))
    allowed = [v for v in range(6) if v not in banned]
    p = (logits.detach()[:, allowed] / temperature).softmax(-1)
    H = -(p * p.log()).sum(-1, keepdim=True)
    entropy = read_logits(shape_logits(logits, temperature, banned), ids)[1]
    by_hand = torch.zeros(4, 6, dtype=torch.float64)
    by_hand[:, allowed] = -p * (p.log() + H) / temperature
    assert torch.allclose(entropy.detach(), H[:, 0])
    assert torch.allclose(torch.autograd.grad(entropy.sum(), logits)[0], by_hand, atol=1e-12)


def test_collision_probability_is_only_read():
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    collision = read_logits(logits, torch.tensor([0, 1, 2]))[2]
    assert not collision.requires_grad
    assert torch.allclose(collision, (logits.softmax(-1) ** 2).sum(-1))


@pytest.mark.parametrize("tile", [None, 2])
def test_gradients_reach_the_head_through_tiles(tile):
    torch.manual_seed(0)
    hidden, weight = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((5, 3), (3, 6)))
    heat = torch.rand(5, 1, dtype=torch.float64) + .5

    def both(hidden, weight):
        return token_stats(lambda h: h @ weight, hidden, torch.tensor([0, 1, 2, 3, 5]), heat, (4,), tile=tile)[:2]
    assert torch.autograd.gradcheck(both, (hidden, weight))


# --- clipping ---
@pytest.mark.parametrize("low,high", [(.2, None), (.2, .28), (.1, .4)])
def test_pessimistic_clip_is_the_smaller_objective(low, high):
    ratio = torch.linspace(.3, 1.8, 151, dtype=torch.float64)
    lo, hi = clipped(low, high).region()
    assert (lo, hi) == (1 - low, 1 + (low if high is None else high))
    for A in (2., -.7):
        loss = clipped(low, high)(Step(advantage=torch.full((151,), A, dtype=torch.float64), ratio=ratio[:, None]))[:, 0]
        objective = [min(A * r, A * min(max(r, lo), hi)) for r in ratio.tolist()]
        assert torch.allclose(-loss, torch.tensor(objective, dtype=torch.float64))


def test_score_is_the_log_prob_of_the_table():
    policy = ending()
    _, batch = collected(PLAIN, policy)
    with torch.no_grad():
        logp = score(policy, batch, batch.law)["logp"]
    problem = torch.tensor([int(batch.items[g].prompt) for g in batch.group])
    table = policy.table.detach().log_softmax(-1)
    for i, n in enumerate(batch.length.tolist()):
        for t in range(SPELL.length):
            expected = float(table[problem[i], t, batch.ids[i, t]]) if t < n else 0.
            assert math.isclose(float(logp[i, t]), expected, abs_tol=1e-12)
