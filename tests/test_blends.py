"""Imitation mixed with exploration, rewards of several parts, thoughts that help to predict, traces that are thinned: what their notebooks show, asked again quickly."""
from dataclasses import replace

import pytest
import torch

from rlworkbench.core.registry import recipes
from rlworkbench.core.step import Step
from rlworkbench.policies.table import uniform
from rlworkbench.recipes.amft import amft, learned_share, towards
from rlworkbench.recipes.beside import shown_mean
from rlworkbench.recipes.dualformer import dualformer, retold, thinner
from rlworkbench.recipes.grpo_ats import by_segment, grpo_ats, thyme_parts
from rlworkbench.recipes.guided import TEACHER, guided
from rlworkbench.recipes.lav_cot import aspects, counted, edits
from rlworkbench.recipes.prefix_rft import GIVEN, by_prefix, clipped_if_own, hybrids, prefix_rft
from rlworkbench.recipes.rlp import gain, rlp, thoughts
from rlworkbench.recipes.slots import Group
from rlworkbench.recipes.thinktuning import soft_teacher, thinktuning
from rlworkbench.recipes.vision_r1 import criteria, marks, refined
from rlworkbench.rollouts.sampling import Sampling
from rlworkbench.tasks.bandit import bandit
from rlworkbench.tasks.boxes import frames, matched, read_boxes
from rlworkbench.tasks.digits import digits_sum
from rlworkbench.tasks.verbose import thought
from rlworkbench.training.run import Config
from rlworkbench.training.trainer import Trainer
from tests.conftest import SPELL, ending, interrupted, on_table

THREE = Group(Sampling(max_tokens=bandit.length))
ZERO = torch.zeros(8, dtype=torch.long)


def drawn(rollout, group=4, clock=(0, 1), policy=None, task=bandit) -> Step:
    "The replies of a rollout to all problems of a bandit."
    step = Step(items=task.items(), size=(len(task.items()), group), clock=clock, task=task, generator=torch.Generator().manual_seed(0))
    rollout(policy or uniform(task), step)
    return step


# --- Prefix-RFT ---
@pytest.mark.parametrize("tries", [1, 3])
@pytest.mark.parametrize("at", [0, 5, 10])
def test_the_last_replies_of_a_group_begin_as_the_demonstration_does(tries, at):
    step = drawn(hybrids(Sampling(max_tokens=6), tries=tries), clock=(at, 10), task=SPELL)
    n = (step.origin == GIVEN).sum(1).reshape(3, 4)
    assert (n[:, :4 - tries] == 0).all() and (n[:, 4 - tries:] > 0).all() and (n[:, 4 - tries:] == n[:, -1:]).all()
    for row, k in zip(step.ids.tolist(), n.flatten().tolist()):
        assert k < 6
    if at == 0:
        assert (n[:, -1] == 5).all()


def a_group(hybrids=1):
    step = Step(group=ZERO, mask=torch.ones(8, 6), reward=torch.tensor([1., 0, 0, 1, 0, 0, 0, 1]), entropy=torch.arange(48.).reshape(8, 6), origin=torch.zeros(8, 6, dtype=torch.long))
    step.origin[8 - hybrids:, :5] = GIVEN
    return step


def test_a_prefix_is_worth_what_its_hybrid_earns_beyond_the_policys_own():
    A = by_prefix(.8)(a_group())
    assert A[7].tolist() == pytest.approx([0, 0, 0, 0, 5 / 7, 1.])            # the least surprising four are left alone; a lone continuation has A = R
    A = by_prefix(0.)(a_group(2))
    assert A[6:, 0].tolist() == pytest.approx([-1 / 6, 1 / 3]) and A[6:, 5].tolist() == pytest.approx([-.7071, .7071], abs=1e-3)


def test_given_tokens_are_not_clipped_and_blame_is_bounded():
    step = Step(ratio=torch.tensor([[5., 5.]] * 2), advantage=torch.tensor([1., -1.]), mask=torch.ones(2, 2), origin=torch.tensor([[0, GIVEN]] * 2))
    assert clipped_if_own(.2)(step).flatten().tolist() == pytest.approx([-1.2, -5., 3., 5.])


def test_without_hybrids_it_is_grpo():
    plain = Trainer(ending(), SPELL, on_table(prefix_rft, rollout=replace(THREE, sampling=Sampling(max_tokens=6))), prompts=3, group=8)
    other = Trainer(ending(), SPELL, on_table(prefix_rft.but(advantage=recipes.get("grpo").advantage, surrogate=recipes.get("grpo").surrogate), rollout=replace(THREE, sampling=Sampling(max_tokens=6))), prompts=3, group=8)
    for t in (plain, other):
        t.step()
    assert torch.allclose(plain.policy.table, other.policy.table, atol=1e-12)


# --- AMFT ---
def test_the_share_goes_where_validation_points():
    sft, rl = {"w": torch.tensor([0., 2.])}, {"w": torch.tensor([1., 0.])}
    assert towards({"w": torch.tensor([-1., 2.])}, sft, rl) == pytest.approx(1.) and towards({"w": torch.tensor([1., -2.])}, sft, rl) == pytest.approx(-1.)
    assert towards({"w": torch.zeros(2)}, sft, rl) == 0


def test_demonstrations_are_averaged_over_their_tokens():
    demos = Step(group=torch.arange(2), mask=torch.tensor([[1., 1, 1], [1, 0, 0]]))
    assert shown_mean(Step(demos=demos)).sum() == pytest.approx(1.)


def test_a_share_survives_an_interruption(tmp_path):
    config = Config(recipe="amft", task="bandit", policy="table", steps=6, prompts=3, group=4, lr=.1, evaluate=0, checkpoint=2)
    rows = interrupted(config, tmp_path)
    assert len(rows[0]) == 6 and rows[0] == rows[1] and rows[0][0]["amft/mu"] != .5


def test_all_imitation_and_none():
    found = {}
    for mu in (0., 1.):
        trainer = Trainer(ending(), SPELL, on_table(amft, gradient=learned_share(mu=mu, eta=0., eta_h=0., low=0., high=1.)), prompts=3, group=8)
        step = next(s for s in trainer.phases() if s.phase == "gradient")
        g, name = trainer.policy.table.grad, "policy" if mu == 0 else "sft"
        found[mu] = torch.cosine_similarity(g.flatten(), step.grads[name]["table"].flatten(), 0)
    assert min(found.values()) > 1 - 1e-9


# --- Vision-R1 ---
def test_the_published_example_of_marks():
    assert marks([.92, .6, .3], 4, 0) == pytest.approx((.5, 1.6 / 3)) and marks([.92, .6, .3], 4, 1) == pytest.approx((0., 1 / 3))
    assert refined(.5, .5, .75) == .5 and refined(.75, .5, .75) == 1 and refined(.75, .5, .75, True) == .75


def test_the_bar_is_raised_half_way():
    item = frames.items()[0]
    near = "aacehehh"                     # the first box one column of four short
    parts = [criteria()(Step(items=[item], group=ZERO[:1], text=[near], mask=torch.ones(1, 1), task=frames, clock=(at, 10))) for at in (4, 5)]
    assert [float(p["precision"]) for p in parts] == [1., .875] and parts[0]["format"] == 1
    assert matched([(0, 0, 1, 1)], []) == [] and read_boxes("x") is None


# --- GRPO-ATS ---
def test_temperatures_by_segment():
    law = by_segment(Sampling(.9, 20), ("think",), .4).sampling
    assert law.segments == (("think", .4),) and law.score_temperature == .9 and law.temperature == .9
    assert replace(by_segment(), sampling=Sampling(1., 5)).sampling.segments == (("answer", 1e-4),)
    assert grpo_ats.rollout.sampling.score_temperature == 1.


def test_consistency_is_paid_for_right_answers_only():
    item = digits_sum.items("test")[0]
    step = Step(items=[item], group=ZERO[:2], text=[digits_sum.gold(item), digits_sum.wrong(item)], mask=torch.ones(2, 1), task=digits_sum)
    assert {k: v.tolist() for k, v in thyme_parts(step).items()} == {"consistency": [.5, 0.], "format": [.5, .5]}


# --- LaV-CoT ---
def test_aspects_by_hand():
    assert [counted(n, 3) for n in (3, 2, 7)] == pytest.approx([1, 2 / 3, -1 / 3]) and counted(7, 3, 0.) == 0
    assert [edits(*pair) for pair in (("kitten", "sitting"), ("", "ab"), ("20", "20"), ("20", "30"))] == [3, 2, 0, 1]
    one = aspects().one(bandit, bandit.items()[0], "abd")
    assert one == pytest.approx({"format": 0, "count": 1, "language": 1, "answer": 2 / 3})


# --- RLP ---
def test_the_gain_is_what_the_thought_adds():
    step = Step(mask=torch.ones(2, 1), target_logp=torch.tensor([-1., -3.]), target_base=torch.tensor([-2., -2.]))
    assert gain(step)["gain"].tolist() == [1., -1.]


def test_only_the_thought_is_learned_from():
    """The thought ends with the letter 'b'; the text keeps the whole reply."""
    step = drawn(thoughts(Sampling(max_tokens=6), until="b"), 8, policy=ending(), task=SPELL)
    for text, n, row in zip(step.text, step.length.tolist(), step.ids.tolist()):
        assert n == (text.index("b") + 1 if "b" in text else n) and all(t == -1 for t in row[n:])
    assert (step.mask.sum(1) == step.length).all() and (step.old[step.mask == 0] == 0).all()
    trainer = Trainer(ending(), SPELL, on_table(rlp), prompts=3, group=8)
    assert trainer.step().metrics["rewards/gain/mean"] != 0


# --- ThinkTuning ---
def test_the_teacher_writes_on_to_attempts_that_ended():
    step = drawn(guided(Sampling(max_tokens=6)), 8, clock=(0, 9), policy=ending(), task=SPELL)
    alone = drawn(Group(Sampling(max_tokens=6)), 8, policy=ending(), task=SPELL)
    ended_alone, touched = (x.nonzero()[:, 0].tolist() for x in (~alone.truncated, (step.origin == TEACHER).any(1)))
    assert touched and step.old is None
    for i in touched:
        assert step.text[i].endswith(step.items[step.group[i]].answer.removesuffix("d")) and i in ended_alone   # "d" ends a reply
    assert (drawn(guided(Sampling(max_tokens=6)), 8, clock=(3, 9), policy=ending(), task=SPELL).origin == 0).all()


@pytest.mark.parametrize("A,p,weight", [(4., .001, .5), (4., .1, .990099), (-1., .001, 4 / 3), (0., .3, 1.), (-1., .01, 1.025641)])
def test_weights_of_the_teachers_tokens(A, p, weight):
    assert float(soft_teacher().weight(torch.tensor(p, dtype=torch.float64), torch.tensor(A, dtype=torch.float64))) == pytest.approx(weight, abs=1e-6)


def test_after_the_teacher_has_left_it_is_grpo():
    steps = {}
    for name, recipe in (("guided", thinktuning.but(rollout=guided(until=0.))), ("grpo", recipes.get("grpo"))):
        trainer = Trainer(ending(), SPELL, on_table(recipe), prompts=3, group=8)
        trainer.step()
        steps[name] = trainer.policy.table.detach()
    assert torch.allclose(steps["guided"], steps["grpo"], atol=1e-12)


# --- Dualformer ---
def test_a_chain_is_thinned_level_by_level():
    told = thought("7+8=5;<check>7+8=15;15+6=21", 21)
    every = lambda n: [True] * n
    assert [thinner(told, k, every) for k in range(5)] == [told, thought("7+8=15;15+6=21", 21), thought("15;21", 21), thought("15;21", 21), "<answer>21</answer>"]
    assert thinner(told, 3, lambda n: [k == 0 for k in range(n)]) == thought("15", 21)


def test_what_is_told_is_drawn_anew_in_each_step_and_again_in_the_same():
    step = Step(items=[replace(bandit.items()[0], demo=thought("1+2=3", 3))] * 40, generator=torch.Generator().manual_seed(0))
    other = replace(step, generator=torch.Generator().manual_seed(1))
    assert retold()(step) == retold()(step) != retold()(other) and len({*retold()(step)}) > 2
    assert dualformer.told == retold()
