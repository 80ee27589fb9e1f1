"""Orders that look at the policy first: whose they are, and what becomes of them when a run is interrupted. And routes that a task does not have."""
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlworkbench.core.step import Step
from rlworkbench.policies.table import TablePolicy
from rlworkbench.recipes import rif as rif_module
from rlworkbench.recipes.observe_r1 import neuraladder, observe_r1, shortest_right
from rlworkbench.recipes.rif import rif
from rlworkbench.recipes.route_diversity import distances, route_diversity
from rlworkbench.recipes.slots import Group
from rlworkbench.rollouts.attempts import ladder
from rlworkbench.rollouts.sampling import Sampling
from rlworkbench.tasks.bandit import Bandit, bandit
from rlworkbench.training.run import Config
from rlworkbench.training.trainer import Trainer
from tests.conftest import interrupted, on_table

LAW = Group(Sampling(max_tokens=bandit.length))
prepared = pytest.mark.parametrize("recipe", [observe_r1, rif], ids=lambda r: r.name)
quick = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def fond_of(first: int) -> TablePolicy:
    "A table that nearly always solves one problem, sometimes the next, never the third."
    table = torch.zeros(3, 3, 4, dtype=torch.float64)
    for p, item in enumerate(bandit.items()):
        for t, letter in enumerate(item.answer):
            table[p, t, "abcd".index(letter)] = (9., 1., -9.)[(p - first) % 3]
    return TablePolicy(table)


def problems(trainer, n=3) -> list:
    "Which problems the next steps are about."
    return [[i.prompt for i in trainer.step().items] for _ in range(n)]


def trainer_of(recipe, first, **kw):
    return Trainer(fond_of(first), bandit, recipe.but(rollout=LAW), prompts=1, group=4, lr=1e-3, **kw)


@prepared
def test_two_trainers_of_one_recipe_keep_their_own_order(recipe):
    """Made one after the other, run in turn: each sees the problems it would see alone."""
    alone = [problems(trainer_of(recipe, first)) for first in (0, 1)]
    assert alone[0] != alone[1]
    both = [trainer_of(recipe, first) for first in (0, 1)]
    turns = [[problems(t, 1)[0] for t in both] for _ in range(3)]
    assert [list(x) for x in zip(*turns)] == alone


def test_the_ladder_begins_with_what_this_policy_can_do():
    strict = observe_r1.but(order=neuraladder(kernel=(1.,)))
    for first in range(3):
        assert problems(trainer_of(strict, first)) == [[str((first + k) % 3)] for k in range(3)]


def test_the_filter_leaves_out_what_is_never_solved():
    for first in range(3):
        seen = {p for step in problems(trainer_of(rif, first), 6) for p in step}
        assert seen == {str(first), str((first + 1) % 3)}


@pytest.mark.parametrize("least,most,kept", [(1, 8, [11, 12, 13]), (2, 8, [12, 13]), (1, 7, [11, 12]), (0, 0, [10])])
def test_the_filter_keeps_what_is_solved_as_often_as_it_says(least, most, kept, monkeypatch):
    monkeypatch.setattr(rif_module, "some_problems", lambda task, n, stream: ([10, 11, 12, 13], ["a", "b", "c", "d"]))
    monkeypatch.setattr(rif_module, "attempts", lambda *what: (torch.tensor([0, 1, 4, 8]), None))
    assert rif_module.solvable(least=least, most=most).prepare(None, bandit, None)["order"].tolist() == kept


def test_the_bonus_is_for_the_shortest_right_reply_if_it_is_long():
    step = Step(group=torch.tensor([0, 0, 0, 1, 1, 2]), correct=torch.tensor([1., 1, 0, 1, 0, 0]), length=torch.tensor([6, 4, 2, 3, 9, 9]))
    step.rewards = {"correct": step.correct}
    assert (shortest_right(.5, beyond=3)(step) - step.correct).tolist() == [0, .5, 0, 0, 0, 0]


@prepared
def test_going_back_keeps_the_order(recipe):
    trainer = trainer_of(recipe, 0, keep=4)
    seen = problems(trainer)
    trainer.back(2)
    assert problems(trainer, 2) == seen[1:]


@prepared
def test_killed_and_resumed_is_the_same_run(recipe, tmp_path):
    config = Config(recipe=recipe.name, task="bandit", policy="table", steps=6, prompts=2, group=4, lr=.1, evaluate=0, checkpoint=2)
    rows = interrupted(config, tmp_path)
    assert len(rows[0]) == 6 and rows[0] == rows[1]


@quick
@given(st.lists(st.tuples(st.integers(0, 8), st.floats(1, 50)), max_size=30), st.integers(0, 99))
def test_each_problem_stands_on_the_ladder_once(found, seed):
    level, tokens = [n for n, _ in found], [t for _, t in found]
    order = ladder(level, tokens, stream=torch.Generator().manual_seed(seed))
    assert sorted(order) == list(range(len(found)))
    for n in set(level):
        own = [tokens[i] for i in order if level[i] == n]
        assert own == sorted(own)                                     # within a level, from short to long


@quick
@given(st.lists(st.one_of(st.none(), st.lists(st.integers(0, 5), min_size=1, max_size=4, unique=True).map(tuple)), max_size=8), st.floats(0, 1))
def test_distances_are_bounded_and_do_not_mind_order(ways, unique):
    found = distances(ways, unique)
    assert all(0 <= d <= 1 + 1e-12 for d in found)
    assert all(d == 0 for w, d in zip(ways, found) if w is None)
    assert distances(ways[::-1], unique)[::-1] == pytest.approx(found)


def test_a_task_without_routes_is_told_so():
    class Silent(Bandit):
        route = None
    trainer = Trainer(fond_of(0), Silent("silent"), on_table(route_diversity), prompts=3, group=4)
    with pytest.raises(ValueError, match="'silent' does not say which route a reply takes"):
        trainer.step()


def test_diversity_is_paid_to_right_replies_only():
    """Over steps of a run: what is paid beyond the verdict is λ times the distance, and nothing where the verdict is 0."""
    recipe = route_diversity.but(rollout=LAW)
    trainer = Trainer(fond_of(0), bandit, recipe, prompts=3, group=8, lr=.05, steps=10)
    seen = set()
    for _ in range(3):
        step = trainer.step()
        paid = step.reward - step.rewards["correct"]
        expected = recipe.shape.factor(replace(step)) * step.rewards["diversity"] * step.rewards["correct"]
        assert torch.allclose(paid, expected, atol=1e-12)
        seen |= {(bool(c), d > 0) for c, d in zip(step.correct.tolist(), step.rewards["diversity"].tolist())}
    assert {(True, True), (False, True)} <= seen
