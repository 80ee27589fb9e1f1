"""APO of View-R1 and Trust-GRPO, where a lesson would be tedious: random groups, both precisions, refusals at the command line."""
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlworkbench.cli.main import main
from rlworkbench.core.step import Step, take
from rlworkbench.recipes.apo_viewr1 import dads, difficulty, stcr
from rlworkbench.recipes.trust_grpo import trust, trust_grpo_code, trusted
from rlworkbench.rollouts.sampling import Sampling
from rlworkbench.training.trainer import Trainer
from tests.conftest import SPELL, ending, on_table

GROUPS = st.lists(st.lists(st.tuples(st.booleans(), st.integers(1, 64), st.floats(0, 1)), min_size=2, max_size=6), min_size=1, max_size=4)


def scattered(groups, dtype=torch.float64, seed=0) -> Step:
    "Groups of (right, length, grade) as a Step whose rows are in random order."
    rows = [(g, *reply) for g, group in enumerate(groups) for reply in group]
    rows = [rows[i] for i in torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
    group, right, length, grade = zip(*rows)
    step = Step(group=torch.tensor(group), correct=torch.tensor(right, dtype=dtype), length=torch.tensor(length), mask=torch.ones(len(rows), 1, dtype=dtype),
                law=Sampling(max_tokens=64), advantage=torch.ones(len(rows), dtype=dtype))
    step.rewards = {"correct": step.correct, "thinking": torch.tensor(grade, dtype=dtype)}
    return step


def mates(step, i):
    return [j for j in range(len(step)) if step.group[j] == step.group[i]]


@settings(max_examples=60, deadline=None)
@given(GROUPS)
def test_difficulty_of_a_piece_is_that_of_the_whole(groups):
    step = scattered(groups)
    expected = [1 - sum(float(step.correct[j]) for j in mates(step, i)) / len(mates(step, i)) for i in range(len(step))]
    assert difficulty(step).tolist() == pytest.approx(expected)
    for i in range(len(step)):
        piece = take(step, torch.tensor([i]))
        piece.whole = step
        assert difficulty(piece).tolist() == pytest.approx(expected[i:i + 1])


@settings(max_examples=60, deadline=None)
@given(GROUPS)
def test_stcr_touches_only_wrong_replies_longer_than_the_right_ones(groups):
    step = scattered(groups)
    factor = stcr().factor(step)
    for i in range(len(step)):
        right = [int(step.length[j]) for j in mates(step, i) if step.correct[j]]
        over = bool(right) and not step.correct[i] and int(step.length[i]) > sum(right) / len(right) + 1e-9
        assert (factor[i] > 1 + 1e-12) == over and factor[i] < 1.0402


@pytest.mark.parametrize("excess", [1, 10, 63])
def test_stcr_in_float32(excess):
    """1.00001 is not a float32; a power of it would be wrong in the digits that matter."""
    narrow, wide = (stcr(1.00001, None).factor(scattered([[(True, 1, 0.), (False, 1 + excess, 0.)]], dtype)).max().double() for dtype in (torch.float32, torch.float64))
    assert abs(float(narrow - wide)) < 1.2e-7
    assert float(wide) == pytest.approx(2 - 1.00001 ** -excess, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(GROUPS)
def test_the_leash_is_looser_on_harder_problems(groups):
    step = scattered(groups)
    d, w = difficulty(step), dads().leash(step)[:, 0]
    inside = (d > 0) & (d < 1)
    assert (w[~inside] == 1).all() and (w[inside] < 1).all() and (w > 0).all()
    order = d[inside].argsort()
    assert (w[inside][order].diff() <= 1e-12).all()
    step.advantage = -step.advantage
    assert (dads().leash(step) == 1).all()


@settings(max_examples=60, deadline=None)
@given(GROUPS)
def test_trust_by_hand(groups):
    step = scattered(groups)
    grade, outcome = step.rewards["thinking"], step.correct
    found = trust(grade, outcome, step.group)
    for i in range(len(step)):
        halves = [[float(grade[j]) for j in mates(step, i) if step.correct[j] == side] for side in (1, 0)]
        gap = min(0., sum(halves[0]) / len(halves[0]) - sum(halves[1]) / len(halves[1])) if all(halves) else 0.
        assert float(found[i].log()) == pytest.approx(gap, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(GROUPS)
def test_the_gate_leaves_nothing_to_distrust_where_outcomes_are_binary(groups):
    step = scattered(groups)
    outcome, grade = trust_grpo_code.shape.graded(step)
    assert (trust(grade, outcome, step.group) == 1).all()
    assert (grade[step.correct == 0] == 0).all()
    free, gated = trusted(gate=None).graded(step)[1], trusted(gate=(0., -1., 2.)).graded(step)[1]
    assert torch.equal(free, gated)


def test_grades_fade_by_the_clock_of_the_run():
    seen = []
    trainer = Trainer(ending(), SPELL, on_table(trust_grpo_code).but(shape=trusted(threshold=0)), prompts=3, group=4, steps=5,
                      watchers=[lambda s: seen.append((s.reward - s.correct, s.rewards["thinking"])) if s.phase == "shape" else None])
    trainer.fit(5)
    for k, (extra, grade) in enumerate(seen):
        assert grade.max() > 0
        assert torch.allclose(extra, .3 * torch.tensor(-k / 5).double().exp() * grade, atol=1e-6)


def test_a_task_without_steps_is_refused_in_one_sentence(tmp_path, monkeypatch, capsys):
    command = ["rlworkbench", "train", "--recipe", "trust_grpo", "--task", "bandit", "--policy", "table", "--steps", "1", "--prompts", "2", "--group", "2",
               "--max-tokens", "3", "--evaluate", "0", "--out", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "needs a task with a method steps(item, text), which 'bandit' does not have" in " ".join(said.split())
    assert "Traceback" not in said
