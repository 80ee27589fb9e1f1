"""The corners: dead groups, lone survivors, empty and cut-off replies, nothing left, rewards that are no numbers. And the reductions, at random."""
import math
from dataclasses import dataclass, fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlworkbench.core.item import Item
from rlworkbench.core.reductions import group_count, group_mean, group_std, masked_mean, masked_quantile, masked_sum
from rlworkbench.core.step import BY_ROW, Step, detached, join, put, take
from rlworkbench.recipes.recipe import Recipe, Term
from rlworkbench.recipes.sft import sft
from rlworkbench.recipes.slots import NEEDS, Group, group_zscore, per_sequence, score_replies, slot, token_mean, token_sum
from rlworkbench.rollouts.parts import from_function, task_score
from rlworkbench.rollouts.sampling import Sampling
from rlworkbench.rollouts.scorer import score
from rlworkbench.tasks.bandit import Bandit
from rlworkbench.tasks.task import Task
from rlworkbench.training.health import StopRun, mark_clipped, update_health
from rlworkbench.training.loss import minibatches
from rlworkbench.training.trainer import Trainer
from tests.conftest import LAW, PLAIN, RECIPES, SPELL, VARIANTS, Script, ending, on_table

def never(policy, step):
    "A rollout that must not be reached."
    raise AssertionError("sampled")


never.sampling = LAW
BY_NAME = {r.name: r for r in (*RECIPES, *VARIANTS)}
every_recipe = pytest.mark.parametrize("recipe", [on_table(r) for r in BY_NAME.values()], ids=BY_NAME)
compares = pytest.mark.parametrize("recipe", [on_table(r) for r in BY_NAME.values() if "group" in r.needs], ids=[n for n, r in BY_NAME.items() if "group" in r.needs])


@dataclass(frozen=True)
class First(Bandit):
    "A reply is right when it begins with an 'a'."
    def score(self, item, text):
        return {"correct": float(text.startswith("a"))}


FIRST = First("first", prompts=3, length=6, letters=4)


@dataclass(frozen=True)
class Lacking(Task):
    "Problems without demonstrations, of a task that knows no steps and no routes."
    def items(self, split="train"):
        return [Item(f"{self.name}/{split}/{k}", str(k), answer="abc") for k in range(3)]


def dictated(recipe, *replies, task=FIRST, **kw):
    "One step of a recipe on dictated replies: the step, the trainer, and how far the table moved."
    policy = ending()
    before = policy.table.detach().clone()
    rollout = Script(replace(recipe.rollout.sampling, max_tokens=kw.pop("max_tokens", FIRST.length)), tuple(replies))
    trainer = Trainer(policy, task, recipe.but(rollout=rollout), prompts=3, group=len(replies), lr=.1, **kw)
    step = trainer.step()
    assert torch.isfinite(policy.table).all()
    assert all(math.isfinite(v) for k, v in step.metrics.items() if isinstance(v, float)), step.metrics
    return step, trainer, float((policy.table.detach() - before).abs().max())


# --- dead groups ---
@every_recipe
@pytest.mark.parametrize("replies", [["abd", "aad", "acd", "ad"], ["bbd", "bad", "ccd", "cd"]], ids=["all-right", "all-wrong"])
def test_dead_groups(recipe, replies):
    step, _, moved = dictated(recipe, *replies)
    assert torch.cat([step.correct, step.dropped.correct]).unique().numel() == 1
    assert torch.isfinite(step.advantage).all()
    if "group" in recipe.needs and recipe.rewards == PLAIN.rewards and not {"ref", "demos"} & recipe.needs:
        assert (step.advantage == 0).all()
        assert moved == 0


@compares
def test_dead_groups_beside_a_living_one(recipe):
    """Only the living problem's row of the table moves."""
    @dataclass(frozen=True)
    class Mixed(First):
        def score(self, item, text):
            return {"correct": {"0": 1., "1": 0.}.get(item.prompt, super().score(item, text)["correct"])}
    if recipe.rewards != PLAIN.rewards or {"ref", "demos"} & recipe.needs:
        recipe = recipe.but(rewards=PLAIN.rewards, shape=PLAIN.shape, penalty=PLAIN.penalty, extra=())
    policy = ending()
    before = policy.table.detach().clone()
    rollout = Script(LAW, ("abd", "bad", "acd", "cd"))
    step = Trainer(policy, Mixed("mixed", prompts=3, length=6), recipe.but(rollout=rollout), prompts=3, group=4, lr=.1).step()
    moved = (policy.table.detach() - before).abs().amax((1, 2))
    assert moved[0] == moved[1] == 0 and moved[2] > .01
    assert step.metrics["groups/all_right"] == step.metrics["groups/all_wrong"] == pytest.approx(1 / 3)
    assert step.metrics["frac_reward_zero_std"] == pytest.approx(2 / 3)


# --- what keep leaves ---
@slot("the first reply of each group, all of the last")
def lonely(step):
    first = torch.tensor([bool((step.group[:i] != g).all()) for i, g in enumerate(step.group)])
    return first | (step.group == step.group.max())


@compares
def test_a_lone_survivor_has_no_advantage(recipe):
    step, _, moved = dictated(recipe.but(keep=lonely), "abd", "bad", "acd", "cd")
    lone = group_count(step.group, 3)[step.group] == 1
    assert lone.sum() == 2 and len(step) == 6
    assert (step.advantage[lone] == 0).all()
    assert (step.advantage[~lone] != 0).any() and moved > .01
    assert len(step.dropped) == 6


@every_recipe
def test_nothing_kept_teaches_nothing(recipe):
    """All replies refused, though their rewards differ: the weights stay where they are."""
    step, _, moved = dictated(recipe.but(keep=lambda s: torch.zeros(len(s), dtype=torch.bool)), "abd", "bad", "acd", "cd")
    assert moved == 0
    assert len(step.dropped) == 12 and step.metrics["sampling/kept"] == 0


@pytest.mark.parametrize("batches", [2, 3])
def test_fewer_groups_than_minibatches(batches):
    """Of three problems one is left: a minibatch without replies is no error and no update of its own."""
    step, _, moved = dictated(PLAIN.but(keep=lambda s: s.group == 1, batches=batches), "abd", "bad", "acd", "cd")
    one, _, as_one = dictated(PLAIN.but(keep=lambda s: s.group == 1), "abd", "bad", "acd", "cd")
    assert moved == as_one > .01
    assert step.metrics["ratio/max"] == one.metrics["ratio/max"]


@slot("problems with replies both right and wrong")
@dataclass(frozen=True)
class Alive:
    refill: int = 0

    def __call__(self, step):
        return group_std(step.reward, step.group) > 0


class FirstGroup:
    "Keeps one group of each round; one more round may be sampled."
    refill = 1

    def __call__(self, step):
        return step.group == 0


class Picky(First):
    "Only the problem called 2 has right replies."
    def score(self, item, text):
        return {"correct": float(item.prompt == "2" and text.startswith("a"))}


@pytest.mark.parametrize("refill,rounds,kept", [(0, 1, 1), (1, 2, 2), (2, 3, 3), (5, 3, 3)])
def test_refill_samples_until_enough_groups_are_left(refill, rounds, kept):
    """One problem in three says something: three rounds fill three groups, and no round is sampled that is not needed."""
    step, trainer, _ = dictated(PLAIN.but(keep=Alive(refill)), "abd", "bad", "acd", "cd", task=Picky("picky", prompts=3, length=6))
    assert step.metrics["sampling/rounds"] == rounds
    assert step.group.unique().numel() == kept and len(step) == 4 * kept == step.metrics["sampling/kept"]
    assert {step.items[g].prompt for g in step.group} == {"2"}
    assert len(step.dropped) == 8 * rounds and trainer.drawn == 3 * rounds
    assert (group_std(step.reward, step.group) > 0).all()
    assert step.advantage.shape == (4 * kept,)


def test_refill_keeps_no_more_groups_than_asked_for():
    """Two of three problems say something: the second round brings one group too many."""
    class Two(First):
        def score(self, item, text):
            return {"correct": float(item.prompt != "0" and text.startswith("a"))}
    step, _, _ = dictated(PLAIN.but(keep=Alive(3)), "abd", "bad", "acd", "cd", task=Two("two", prompts=3, length=6))
    assert step.group.unique().numel() == 3 and step.metrics["sampling/rounds"] == 2


def test_rounds_of_refill_are_different_draws():
    """The same problems again, other replies; and the next step's first round is new as well."""
    drawn = []
    same = PLAIN.but(order=lambda pool, s: [0, 1, 2], keep=FirstGroup())
    Trainer(ending(), SPELL, same, prompts=3, group=4, watchers=[lambda s: drawn.append(s.ids.tolist()) if s.phase == "sample" else None]).fit(2)
    assert len(drawn) == 4 and all(a != b for i, a in enumerate(drawn) for b in drawn[:i])


def test_joined_rounds_learn_like_one_batch():
    """Three groups gathered over three rounds give the gradient of the same three groups sampled at once."""
    task = Picky("picky", prompts=3, length=6)
    step, trainer, _ = dictated(PLAIN.but(keep=Alive(2)), "abd", "bad", "acd", "cd", task=task)
    gathered = trainer.policy.table.detach()
    once = PLAIN.but(order=lambda pool, s: [2, 2, 2])
    _, other, moved = dictated(once, "abd", "bad", "acd", "cd", task=task)
    assert moved > .01
    assert torch.allclose(gathered, other.policy.table.detach(), atol=1e-12)


def beside_demonstrations(policy, step):
    score_replies(policy, step)
    step.demos = replace(step.demos, logp=score(policy, step.demos, step.law)["logp"])


def imitate(step):
    return -step.demos.logp


imitate.needs = frozenset({"demos"})
IMITATING = PLAIN.but(forward=beside_demonstrations, extra=(Term("sft", imitate, lambda step: step.demos.mask / 9),))


def test_joined_rounds_imitate_like_one_batch():
    """The same with demonstrations of the same problems beside the replies."""
    task = Picky("picky", prompts=3, length=6)
    _, several, _ = dictated(IMITATING.but(keep=Alive(2)), "abd", "bad", "acd", "cd", task=task)
    step, once, moved = dictated(IMITATING.but(order=lambda pool, s: [2, 2, 2]), "abd", "bad", "acd", "cd", task=task)
    assert moved > .01 and float(step.terms["sft"]) > .1
    assert torch.allclose(several.policy.table.detach(), once.policy.table.detach(), atol=1e-12)


@pytest.mark.parametrize("micro", [None, 1, 5])
def test_a_refused_reply_does_not_take_the_demonstration_along(micro):
    """Whichever reply of a group is refused, its problem's demonstration is imitated once."""
    found = []
    for replies in (["cd", "abd", "bad", "acd"], ["abd", "bad", "acd", "cd"]):
        step, trainer, _ = dictated(IMITATING.but(keep=lambda s: s.ids[:, 0] != 2), *replies, micro=micro)
        assert len(step) == 9 and len(step.demos) == 3
        found.append((float(step.terms["sft"]), trainer.policy.table.detach()))
    assert found[0][0] == pytest.approx(found[1][0]) and found[0][0] > .1
    assert torch.allclose(found[0][1], found[1][1], atol=1e-12)


# --- short and cut-off replies ---
@every_recipe
def test_empty_replies(recipe):
    """The end token first: one token, no text, not cut off; beside it replies of other lengths."""
    step, _, moved = dictated(recipe, "d", "abd", "d", "acaaad", "ad", "baaaaa")
    empty = torch.tensor([t == "" for t in step.text])
    assert empty.sum() == 6 or recipe.keep is not PLAIN.keep
    assert (step.length[empty] == 1).all() and not step.truncated[empty].any()
    assert torch.equal(step.mask.sum(1).long(), step.length)
    assert torch.equal(step.truncated, torch.tensor([t == "baaaaa" for t in step.text]))
    assert (step.ids[step.mask == 0] == -1).all() and (step.old[step.mask == 0] == 0).all()
    assert moved > 0


@every_recipe
def test_every_reply_empty(recipe):
    step, _, _ = dictated(recipe, "d", "d", "d")
    assert step.ids.shape[1] == 1 and (step.length == 1).all()


@every_recipe
def test_replies_of_one_token(recipe):
    """T = 1, some of them cut off at once."""
    step, _, moved = dictated(recipe, "a", "b", "d", "c", max_tokens=1)
    assert step.ids.shape[1] == 1
    assert step.truncated.sum() == (step.ids != 3).sum() > 0
    assert torch.isfinite(step.advantage).all()


@every_recipe
def test_every_reply_cut_off(recipe):
    step, _, _ = dictated(recipe, "ab", "ba", "ca", "aa", max_tokens=2)
    assert step.truncated.all() and (step.mask == 1).all()


def test_what_follows_the_end_token_counts_for_nothing():
    """Two policies that differ only after the end token learn the same from the same replies."""
    found = []
    for rest in ("abc", "cca"):
        step, trainer, _ = dictated(PLAIN, "ad" + rest, "bd" + rest, "abd" + rest[:2], "cbd" + rest[:2])
        found.append((step.ids, trainer.policy.table.detach(), step.text))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert found[0][2][:4] == ["a", "b", "ab", "cb"]


# --- rewards that are no numbers ---
BAD = [float("nan"), float("inf"), -float("inf"), None, "many"]


@pytest.mark.parametrize("value", BAD, ids=str)
@pytest.mark.parametrize("where", ["task", "function"])
def test_a_reward_that_is_no_number_names_its_item(where, value):
    class Odd(First):
        def score(self, item, text):
            return {"correct": value if item.prompt == "1" else 0.}
    recipe = PLAIN if where == "task" else PLAIN.but(rewards=(from_function(lambda item, text: value if item.prompt == "1" else 0., "mine"),))
    with pytest.raises(ValueError, match=r"item first/train/1"):
        dictated(recipe, "ad", "bd", task=Odd("first", prompts=3, length=6) if where == "task" else FIRST)


@pytest.mark.parametrize("where", ["task", "function"])
def test_a_reward_that_raises_names_its_item(where):
    class Broken(First):
        def score(self, item, text):
            return {"correct": 1 / (item.prompt != "1")}

    def mine(item, text):
        return 1 / (item.prompt != "1")
    recipe = PLAIN if where == "task" else PLAIN.but(rewards=(from_function(mine),))
    with pytest.raises(ValueError, match=r"item first/train/1.*ZeroDivisionError"):
        dictated(recipe, "ad", "bd", task=Broken("first", prompts=3, length=6) if where == "task" else FIRST)


def test_a_part_that_returns_nan_names_its_item():
    """A part written as a tensor function has no excuse."""
    def part(step):
        return {"odd": torch.where(step.group == step.group[2], torch.nan, 0.).to(step.mask.dtype)}
    with pytest.raises(ValueError, match=r"odd.*item first/train"):
        dictated(PLAIN.but(rewards=(part,)), "ad", "bd")


def test_a_shape_that_gives_nan_stops_before_the_weights_move():
    policy = ending()
    recipe = PLAIN.but(rollout=Script(LAW, ("ad", "bd")), shape=lambda s: s.rewards["correct"] / 0.)
    before = policy.table.detach().clone()
    with pytest.raises(ValueError, match="finite|NaN|nan"):
        Trainer(policy, FIRST, recipe, prompts=3, group=2, lr=.1).step()
    assert torch.equal(policy.table, before)


# --- slots that return the wrong thing ---
@pytest.mark.parametrize("name", ["weight", "ratio", "surrogate", "penalty", "normalise"])
@pytest.mark.parametrize("shape", [(3,), (2, 6), (3, 5)], ids=str)
def test_a_slot_of_the_wrong_shape_is_named(name, shape):
    """Three replies of three tokens: a number per reply would fit a row of tokens just as well, and must not."""
    wrong = PLAIN.but(**{name: lambda s: torch.ones(shape, dtype=torch.float64)})
    policy = ending()
    rollout = Script(replace(LAW, max_tokens=3), ("abc", "bac", "abb"))
    with pytest.raises(ValueError, match=f"slot {name}"):
        Trainer(policy, FIRST, wrong.but(rollout=rollout), prompts=1, group=3).step()


def untouched(recipe, says, replies=("abc", "bac", "abb"), **kw):
    "One step of a recipe is refused in one sentence, and the table is as it was."
    policy = ending()
    before = policy.table.detach().clone()
    rollout = kw.pop("rollout", Script(replace(LAW, max_tokens=3), tuple(replies)))
    with pytest.raises(ValueError, match=says) as refused:
        Trainer(policy, FIRST, recipe.but(name="mine", rollout=rollout), prompts=1, group=3, lr=.1, **kw).step()
    assert str(refused.value).startswith("recipe 'mine'") and "\n" not in str(refused.value)
    assert torch.equal(policy.table, before)


def spoiled(name, how):
    "The slot as it was, its value spoiled."
    own = getattr(PLAIN, name)

    def slot(step):
        return how(own(step))
    return PLAIN.but(**{name: slot})


EVERY = ("shape", "advantage", "weight", "ratio", "surrogate", "penalty", "normalise")


@pytest.mark.parametrize("micro", [None, 2])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("name", EVERY)
def test_a_slot_that_returns_what_is_not_finite_is_named(name, value, micro):
    """At the last place of the last reply alone, which lies beyond its end: 0 times that would still be a gradient of nothing."""
    def one(x):
        return torch.where(torch.arange(x.numel()).reshape(x.shape) == x.numel() - 1, value, x)
    untouched(spoiled(name, one), f"the slot {name} = slot returned what is not finite, {value} at reply [0-2], token 2|{value} at reply 2$", ("abc", "bac", "ad"), micro=micro)


@pytest.mark.parametrize("name,dtype", [(n, torch.int64) for n in EVERY if n != "weight"] + [(n, torch.complex128) for n in EVERY] + [("keep", torch.float64)], ids=str)
def test_a_slot_of_the_wrong_kind_is_named(name, dtype):
    says = f"the slot {name} = slot returned {dtype}, expected {'true or false' if name == 'keep' else 'floating-point numbers'}"
    untouched(spoiled(name, lambda x: x.to(dtype)), says)


@pytest.mark.parametrize("name", [*EVERY, "keep"])
def test_a_slot_that_returns_no_tensor_is_named(name):
    untouched(spoiled(name, lambda x: None), f"the slot {name} = slot returned NoneType, expected a tensor")


@pytest.mark.parametrize("name,shape", [("keep", (3, 3)), ("keep", (1,)), ("shape", (2,)), ("shape", (3, 2)), ("advantage", (4,))], ids=str)
def test_a_number_per_reply_of_the_wrong_shape_is_named(name, shape):
    untouched(PLAIN.but(**{name: lambda s: torch.ones(shape, dtype=torch.bool if name == "keep" else torch.float64)}), rf"the slot {name} = <lambda> returned \(\d.*\), expected \(N,")


def test_truth_is_a_weight():
    policy, other = ending(), ending()
    for p, recipe in ((policy, spoiled("weight", lambda x: x > 0)), (other, PLAIN)):
        Trainer(p, FIRST, recipe, prompts=3, group=4, lr=.1).step()
    assert torch.equal(policy.table, other.table)


@pytest.mark.parametrize("micro", [None, 2])
@pytest.mark.parametrize("recipe,name", [(spoiled("surrogate", torch.detach), "surrogate"), (spoiled("ratio", torch.detach), "surrogate"),
                                         (PLAIN.but(penalty=lambda s: (s.logp.detach() - s.old) + .1), "penalty")], ids=["surrogate", "ratio", "penalty"])
def test_a_slot_that_cuts_the_graph_is_named(recipe, name, micro):
    untouched(recipe, f"the slot {name} = .* returned numbers without a gradient: something in it, or in the slot ratio, cuts the graph", micro=micro)


def test_zeros_need_no_gradient():
    """All replies wrong: the advantage is 0, so is the loss; nothing is cut, nothing moves."""
    step, _, moved = dictated(PLAIN.but(surrogate=lambda s: -s.advantage[:, None] * s.ratio.detach()), "bbd", "bad", "ccd", "cd")
    assert moved == 0 and (step.advantage == 0).all()


def term(tokens, normalise=token_mean, scale=1.0):
    return PLAIN.but(extra=(Term("more", tokens, normalise, scale),))


@pytest.mark.parametrize("recipe,says", [
    (term(lambda s: s.logp[:, :1]), r"the term more = <lambda> returned \(3, 1\), its normaliser token_mean \(3, 3\)"),
    (term(lambda s: s.ids), "the term more = <lambda> returned torch.int64"), (term(lambda s: 1.0), "the term more = <lambda> returned float"),
    (term(lambda s: s.logp * math.nan), "the term more = <lambda> is nan"), (term(lambda s: s.logp, scale=math.inf), "the term more = <lambda> is -?inf"),
    (term(lambda s: s.logp.detach()), "the term more = <lambda> returned numbers without a gradient"),
])
def test_a_term_that_goes_wrong_is_named(recipe, says):
    untouched(recipe, says)


def test_a_term_of_scale_0_may_be_anything_finite():
    """It is there for its gradient, or to be looked at."""
    step, _, _ = dictated(PLAIN.but(extra=(Term("seen", lambda s: s.logp.detach(), token_mean, 0.0),)), "abd", "bad")
    assert step.terms["seen"] == 0


@pytest.mark.parametrize("names", [("more", "more"), ("policy",)], ids=str)
def test_two_terms_of_one_name_are_refused_before_the_first_rollout(names):
    recipe = PLAIN.but(rollout=never, extra=tuple(Term(n, lambda s: s.logp) for n in names))
    with pytest.raises(ValueError, match=f"two terms of the loss are called '{names[0]}'"):
        Trainer(ending(), FIRST, recipe, prompts=3, group=4)


def test_two_parts_of_the_reward_of_one_name_are_refused():
    untouched(PLAIN.but(rewards=(task_score, from_function(lambda item, text: 1., "correct"))), "two parts of the reward are called 'correct'; the second is")


@pytest.mark.parametrize("picked", [[0, 99], [-1], [], [0.5], None, ["a"]], ids=str)
def test_an_order_that_names_no_problems_is_named(picked):
    untouched(PLAIN.but(order=lambda pool, step: picked), r"the slot order = <lambda> returned .*, expected numbers of problems, 0 to 2")


GRADIENTS = {
    "unknown": (lambda grads, step: {"tabel": grads["all"]["table"]}, "has no parameter 'tabel'"),
    "shape": (lambda grads, step: {"table": grads["all"]["table"][0]}, "expected"),
    "kind": (lambda grads, step: {"table": None}, "NoneType"),
    "none": (lambda grads, step: None, "NoneType"),
    "nan": (lambda grads, step: {"table": grads["all"]["table"] * math.nan}, "not finite"),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_a_gradient_slot_that_goes_wrong_is_named(name):
    slot, says = GRADIENTS[name]
    untouched(PLAIN.but(gradient=slot), f"the slot gradient = <lambda> returned .*{says}")


def forgetful(policy, step):
    score_replies(policy, step)
    step.logp = step.logp.detach()


def short(policy, step):
    score_replies(policy, step)
    step.logp = step.logp[:, :2]


@pytest.mark.parametrize("forward,says", [(lambda policy, step: None, "left logp empty"), (short, r"left logp of shape \(3, 2\), expected \(N,T\) = \(3, 3\)"),
                                          (forgetful, "left logp without a gradient")], ids=["nothing", "short", "cut"])
def test_a_forward_that_goes_wrong_is_named(forward, says):
    untouched(PLAIN.but(forward=forward), f"the slot forward = .* {says}")


@pytest.mark.parametrize("what", ["clipped(-.1)", "clipped(.2, -.1)", "clipped(math.nan)", "kl_penalty(-1.)", "kl_penalty(.1, 'k4')", "corrected_kl(-1.)", "outcome_minus_kl(-.1)",
                                  "whitened_returns(1.1)", "mixed_groups(-1)", "soft_overlong(0)", "soft_overlong(1.5)", "truncated_weight(-1.)", "top_entropy(0)", "top_entropy(1.2)",
                                  "silence(1.5)", "silence(.002, -.1)", "silence(by='luck')", "clip_covariance(2.)", "kl_covariance(-.1)", "kl_covariance(.1, -1.)", "dads(-1.)", "stcr(.9)",
                                  "trusted(-.1)", "trusted(threshold=2)", "trusted(horizon=0)", "shortest_right(beyond=-1)", "middling(0)", "neuraladder(samples=0)", "neuraladder(problems=0)",
                                  "solvable(samples=0)", "solvable(least=-1)", "route_distance(1.5)", "diverse_if_right(-1.)", "hybrids(high=0)", "hybrids(tries=0)", "by_prefix(1.5)",
                                  "clipped_if_own(dual=1)", "learned_share(mu=2)", "learned_share(eta=-1)", "criteria(switch=-1)", "by_segment(cold=-1)", "aspects(2)", "guided(first=0)", "soft_teacher(gamma=2)",
                                  "retold(drop=2)"])
def test_a_parameter_out_of_range_is_refused_where_it_is_written(what):
    import importlib
    import pkgutil

    import rlworkbench.recipes as package
    known = {"math": math}
    for module in pkgutil.iter_modules(package.__path__):
        known |= vars(importlib.import_module(f"rlworkbench.recipes.{module.name}"))
    with pytest.raises(ValueError, match=r"must lie in [\[(].*, got|kind must be|by both, probability") as refused:
        eval(what, known)
    assert "\n" not in str(refused.value)


def test_a_lesson_goes_through_its_phases_and_watchers_see_them():
    seen = []
    trainer = Trainer(ending(), SPELL, sft, prompts=3, watchers=[lambda step: seen.append((step.phase, len(step)))])
    assert [(s.phase, len(s)) for s in trainer.phases()] == seen == [(name, 3) for name in ("fetch", "forward", "loss", "gradient", "update")]


def test_a_watcher_may_stop_the_run_but_not_change_it():
    def impatient(step):
        if step.phase == "update" and step.clock[0] == 1:
            raise StopRun("enough")
    policy = ending()
    rows = Trainer(policy, SPELL, PLAIN, prompts=3, group=4, steps=9).fit(9, watchers=[impatient])
    assert len(rows) == 2 and rows[-1]["stopped"] == "enough"


def test_clipped_marks_are_where_the_gradient_stops():
    torch.manual_seed(0)
    step = Step(advantage=torch.randn(6, dtype=torch.float64), mask=(torch.rand(6, 5) < .8).double(), ratio=(.4 * torch.randn(6, 5, dtype=torch.float64)).exp())
    mark_clipped(step, (.8, 1.28))
    r = step.ratio.clone().requires_grad_()
    surrogate = PLAIN.but().surrogate.__class__(.2, .28)(replace(step, ratio=r))
    stopped = torch.autograd.grad(surrogate.sum(), r)[0] == 0
    assert torch.equal(step.clipped != 0, stopped & (step.mask > 0))
    assert set(step.clipped.unique().tolist()) == {-1, 0, 1}
    assert ((step.clipped > 0) <= (step.ratio > 1)).all()


def test_health_by_hand():
    """Two replies of three and one tokens; what lies in the padding is not looked at."""
    nan = float("nan")
    old = torch.tensor([[-1., -2., -1.5], [-.5, nan, nan]], dtype=torch.float64)
    logp = torch.tensor([[-.5, -2.5, -1.5], [-.2, nan, nan]], dtype=torch.float64)
    step = Step(mask=torch.tensor([[1., 1, 1], [1, 0, 0]], dtype=torch.float64), advantage=torch.tensor([1., -1.], dtype=torch.float64), old=old, logp=logp,
                ratio=(logp - old).exp(), ref=old - .25, weight=torch.tensor([[1., 0, 1], [1, 0, 0]], dtype=torch.float64))
    mark_clipped(step, (.8, 1.2))
    health, d = update_health(step), [.5, -.5, 0., .3]
    assert health["kl/old"] == pytest.approx(sum(math.exp(x) - 1 - x for x in d) / 4)
    assert health["ratio/max"] == pytest.approx(math.exp(.5))
    assert (health["clip_ratio/high_mean"], health["clip_ratio/low_mean"], health["weight/silenced"]) == (.25, 0., .25)
    for name, k in (("kl/k1", lambda x: x), ("kl/k2", lambda x: x * x / 2), ("kl/k3", lambda x: math.exp(-x) + x - 1), ("kl", lambda x: math.exp(-x) + x - 1)):
        assert health[name] == pytest.approx(sum(k(x + .25) for x in d) / 4), name


def test_reply_health_by_hand():
    step, _, _ = dictated(PLAIN, "abd", "bbbbbb", "d", "ad")
    m = step.metrics
    assert (m["reward"], m["correct"], m["rewards/correct/mean"]) == (.5, .5, .5)
    assert (m["completions/mean_length"], m["completions/max_length"], m["completions/clipped_ratio"]) == (3., 6., .25)
    assert (m["completions/mean_length_right"], m["completions/mean_length_wrong"]) == (2.5, 3.5)
    assert (m["groups/all_right"], m["groups/all_wrong"], m["frac_reward_zero_std"]) == (0., 0., 0.)
    count = float(step.mask.sum())
    assert m["entropy/sampled"] == pytest.approx(-float((step.old * step.mask).sum()) / count)
    table = ending().table.detach().log_softmax(-1)
    H = -(table.exp() * table).sum(-1)
    by_hand = [float(H[int(step.items[g].prompt), t]) for g, n in zip(step.group, step.length) for t in range(n)]
    assert m["entropy"] == pytest.approx(sum(by_hand) / count, rel=1e-5)


# --- reductions, at random ---
floats = st.floats(-100, 100)
sizes = st.tuples(st.integers(1, 5), st.integers(1, 6))


@st.composite
def masked(draw):
    "x (N,T) and a mask."
    N, T = draw(sizes)
    x = draw(st.lists(st.lists(floats, min_size=T, max_size=T), min_size=N, max_size=N))
    mask = draw(st.lists(st.lists(st.booleans(), min_size=T, max_size=T), min_size=N, max_size=N))
    return torch.tensor(x, dtype=torch.float64), torch.tensor(mask, dtype=torch.float64)


@st.composite
def grouped(draw):
    "Rewards (N,) and groups (N,), members scattered, perhaps groups of one and groups that are not there."
    group = draw(st.lists(st.integers(0, 4), min_size=1, max_size=12))
    x = draw(st.lists(floats, min_size=len(group), max_size=len(group)))
    return torch.tensor(x, dtype=torch.float64), torch.tensor(group)


quick = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@quick
@given(masked())
def test_masked_means_by_hand(case):
    x, mask = case
    rows = [[v for v, m in zip(r, k) if m] for r, k in zip(x.tolist(), mask.tolist())]
    everything = [v for r in rows for v in r]
    mean = lambda values: sum(values) / len(values) if values else 0.
    close = lambda a, b: torch.allclose(a, torch.tensor(b, dtype=torch.float64), atol=1e-9)
    assert close(masked_mean(x, mask, 1), [mean(r) for r in rows])
    assert close(masked_mean(x, mask), mean(everything))
    assert close(masked_sum(x, mask, 1), [sum(r) for r in rows]) and close(masked_sum(x, mask), sum(everything))
    if everything:
        assert min(everything) - 1e-9 <= float(masked_mean(x, mask)) <= max(everything) + 1e-9
        assert min(everything) <= float(masked_quantile(x, mask, .5)) + 1e-4
        assert float(masked_quantile(x, mask, 0.)) == pytest.approx(min(everything), abs=1e-4)
        assert float(masked_quantile(x, mask, 1.)) == pytest.approx(max(everything), abs=1e-4)
    else:
        assert masked_quantile(x, mask, .5) == 0


@quick
@given(masked(), st.sampled_from([float("nan"), float("inf"), -float("inf"), 1e30]))
def test_what_lies_under_a_zero_is_nobodys_business(case, junk):
    x, mask = case
    dirty = torch.where(mask.bool(), x, junk).requires_grad_()
    for dim in (None, 1):
        for reduce in (masked_mean, masked_sum):
            assert torch.equal(reduce(dirty, mask, dim), reduce(x, mask, dim))
            gradient, = torch.autograd.grad(reduce(dirty, mask, dim).sum(), dirty)
            assert torch.isfinite(gradient).all() and (gradient[mask == 0] == 0).all()
    assert torch.equal(masked_quantile(dirty.detach(), mask, .3), masked_quantile(x, mask, .3))


@quick
@given(grouped())
def test_group_statistics_by_hand(case):
    x, group = case
    members = {g: [v for v, h in zip(x.tolist(), group.tolist()) if h == g] for g in group.tolist()}
    mean = {g: sum(v) / len(v) for g, v in members.items()}
    square = {g: sum((y - mean[g]) ** 2 for y in v) for g, v in members.items()}
    std = {g: (square[g] / (len(v) - 1)) ** .5 if len(v) > 1 else 0. for g, v in members.items()}
    biased = {g: (square[g] / len(v)) ** .5 for g, v in members.items()}
    for found, expected in ((group_mean(x, group), mean), (group_std(x, group), std), (group_std(x, group, unbiased=False), biased)):
        assert torch.allclose(found, torch.tensor([expected[g] for g in group.tolist()], dtype=torch.float64), atol=1e-7)
    assert group_count(group, 5).tolist() == [len(members.get(g, ())) for g in range(5)]


@quick
@given(grouped(), st.randoms(use_true_random=False))
def test_group_statistics_do_not_mind_order_or_names(case, rng):
    x, group = case
    order = torch.tensor(rng.sample(range(len(x)), len(x)))
    names = torch.tensor(rng.sample(range(9), 5))
    for statistic in (group_mean, group_std, lambda x, g: group_zscore(Step(reward=x, group=g))):
        assert torch.allclose(statistic(x[order], group[order]), statistic(x, group)[order], atol=1e-7)
        assert torch.allclose(statistic(x, names[group]), statistic(x, group), atol=1e-7)


@quick
@given(grouped(), floats)
def test_groups_of_one_value(case, c):
    _, group = case
    x = torch.full((len(group),), c, dtype=torch.float64)
    assert torch.allclose(group_mean(x, group), x, rtol=1e-12)
    assert group_std(x, group).abs().max() < 1e-6
    assert group_zscore(Step(reward=torch.full_like(x, round(c)), group=group)).abs().max() == 0


@quick
@given(masked())
def test_coefficients_add_up(case):
    """Each reply with tokens counts 1/N, or each token the same; a reply without tokens counts nothing."""
    _, mask = case
    step = Step(mask=mask, group=torch.zeros(len(mask), dtype=torch.long))
    assert torch.allclose(per_sequence(step).sum(1), (mask.sum(1) > 0).double() / len(mask))
    assert torch.allclose(token_mean(step).sum(), (mask.sum() > 0).double())
    assert torch.allclose(token_mean(step), token_mean(step).max() * mask)
    assert torch.allclose(token_sum(step) * len(mask), mask)


# --- steps, at random ---
def a_step(P, G, T, seed) -> Step:
    g = torch.Generator().manual_seed(seed)
    N, new = P * G, lambda *s: torch.randn(*s, generator=g)
    return Step(items=[f"{seed}/{p}" for p in range(P)], group=torch.arange(P).repeat_interleave(G), ids=torch.randint(0, 9, (N, T), generator=g),
                mask=torch.ones(N, T), text=[f"{seed}:{i}" for i in range(N)], rewards={"a": new(N), "b": new(N)}, old=new(N, T), hidden=new(N, T, 2),
                length=torch.full((N,), T))


shape = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4))


@quick
@given(st.lists(shape, min_size=1, max_size=3))
def test_join_then_take_gives_each_round_back(shapes):
    rounds = [a_step(*s, seed=i) for i, s in enumerate(shapes)]
    whole, at = join(rounds), 0
    assert len(whole) == sum(map(len, rounds)) and whole.items == [i for r in rounds for i in r.items]
    for r in rounds:
        part, T = take(whole, torch.arange(at, at + len(r))), r.ids.shape[1]
        assert part.text == r.text and [part.items[g] for g in part.group] == [r.items[g] for g in r.group]
        for name in ("ids", "mask", "old", "hidden"):
            assert torch.equal(getattr(part, name)[:, :T], getattr(r, name))
        assert (part.mask[:, T:] == 0).all() and torch.equal(part.rewards["b"], r.rewards["b"]) and torch.equal(part.length, r.length)
        at += len(r)


def test_join_keeps_every_rounds_demonstrations():
    """A method that imitates as well, and samples more than once: each problem keeps its own demonstration."""
    rounds = [replace(a_step(2, 2, T, seed=T), demos=a_step(2, 1, T + 1, seed=10 + T)) for T in (2, 4)]
    whole = join(rounds)
    assert whole.demos.text == [t for r in rounds for t in r.demos.text]
    assert whole.demos.group.tolist() == [0, 1, 2, 3] and whole.demos.mask.sum(1).tolist() == [3, 3, 5, 5]
    assert take(whole, whole.group == 3).demos.text == rounds[1].demos.text[1:]


@quick
@given(shape, st.data())
def test_put_writes_where_take_read(size, data):
    step = a_step(*size, seed=0)
    rows = torch.tensor(data.draw(st.lists(st.integers(0, len(step) - 1), unique=True, min_size=1)))
    before, part = step.old.clone(), take(step, rows)
    assert torch.equal(part.old, before[rows]) and torch.equal(part.rewards["a"], step.rewards["a"][rows])
    part.old = (part.old * 2).requires_grad_()
    part.logp = part.old - 1
    assert torch.equal(step.old, before)                                # a part is a copy
    put(step, part, "old", "logp", "ref")
    others = torch.tensor([i for i in range(len(step)) if i not in rows.tolist()], dtype=torch.long)
    assert torch.equal(step.old[rows], before[rows] * 2) and torch.equal(step.old[others], before[others])
    assert (step.logp[others] == 0).all() and not step.logp.requires_grad and step.ref is None


@quick
@given(shape, st.integers(1, 3), st.integers(0, 99))
def test_minibatches_are_whole_groups_and_all_of_them(size, batches, seed):
    step = a_step(*size, seed=0)
    parts = list(minibatches(step, min(batches, size[0]), torch.Generator().manual_seed(seed)))
    assert sorted(torch.cat(parts).tolist()) == list(range(len(step)))
    groups = [set(step.group[p].tolist()) for p in parts]
    assert sum(map(len, groups)) == size[0] and all(groups)


def test_every_row_column_is_cut():
    """Each column of the Step that has rows, filled and taken: none is forgotten."""
    shapes = {f.name: f.metadata["shape"] for f in fields(Step)}
    filled = {"items": ["p", "q"]}
    for name in BY_ROW:
        tensor = torch.arange(12.).reshape(4, 3) if "T" in shapes[name] else torch.arange(4)
        filled[name] = {"x": tensor} if shapes[name].startswith("{") else (tensor, tensor) if shapes[name].startswith("2 x") else list("wxyz") if name == "text" else tensor
    filled["group"] = torch.tensor([0, 0, 1, 1])
    part = take(Step(**filled), torch.tensor([2, 0]))
    for name in BY_ROW:
        whole, cut = filled[name], getattr(part, name)
        if isinstance(whole, dict):
            whole, cut = whole["x"], cut["x"]
        if isinstance(whole, tuple):
            whole, cut = whole[1], cut[1]
        assert (cut == [whole[2], whole[0]]) if isinstance(whole, list) else torch.equal(cut, whole[[2, 0]]), name
    assert part.items == ["p", "q"] and {n for n, s in shapes.items() if s.startswith(("(N", "{(N", "2 x (N"))} == set(BY_ROW)


def test_detached_cuts_every_graph():
    x = torch.ones(2, 3, requires_grad=True)
    step = detached(Step(group=torch.tensor([0, 0]), logp=x * 2, rewards={"a": x.sum(1)}, prior=(x * 1, x * 2)))
    assert not any(t.requires_grad for t in (step.logp, step.rewards["a"], *step.prior))


@pytest.mark.parametrize("bad,says", [(dict(prompts=0), "1 or more"), (dict(group=0), "1 or more"), (dict(group=1), "group must be 2 or more"),
                                      (dict(steps=0), "steps must be 1 or more")])
def test_refused_before_the_first_rollout(bad, says):
    with pytest.raises(ValueError, match=says):
        Trainer(ending(), SPELL, PLAIN.but(rollout=never), **({"prompts": 3, "group": 4} | bad))


@pytest.mark.parametrize("law", [Sampling(0.), Sampling(top_p=.9), Sampling(top_k=3)], ids=["greedy", "top-p", "top-k"])
def test_a_law_without_a_gradient_is_refused(law):
    with pytest.raises(ValueError, match="for evaluation only"):
        Trainer(ending(), SPELL, Recipe("r", rollout=Group(law)), prompts=3, group=4)


@pytest.mark.parametrize("need", sorted(set(NEEDS) - {"group", "ref", "entropy", "hidden", "demos", "target", "ema", "validation"}))
@pytest.mark.parametrize("where", ["weight", "rewards", "order", "extra"])
def test_a_need_that_cannot_be_met_is_refused_before_the_first_rollout(need, where):
    @slot("", needs={need})
    def wants(step):
        raise AssertionError("evaluated")
    task = Lacking("lacking")
    recipe = PLAIN.but(name="mine", rollout=never, **{where: wants if where in ("weight", "order") else (wants,) if where == "rewards" else (Term("more", wants),)})
    with pytest.raises(ValueError, match=rf"recipe 'mine': the slot {where}.* needs .*{need}"):
        Trainer(ending(), task, recipe, prompts=3, group=4)


def test_demonstrations_that_are_missing_are_refused_before_the_first_rollout():
    @slot("", needs={"demos"})
    def shown(step):
        raise AssertionError("evaluated")
    with pytest.raises(ValueError, match="item lacking/train/0 has no demonstration; 'mine' learns from given replies"):
        Trainer(ending(), Lacking("lacking"), PLAIN.but(name="mine", rollout=never, weight=shown), prompts=3, group=4)


@pytest.mark.parametrize("seed", [-1, -10])
def test_a_negative_seed_is_refused(seed):
    with pytest.raises(ValueError, match=f"seed must be 0 or more, got {seed}"):
        Trainer(ending(), SPELL, PLAIN.but(rollout=never), prompts=3, group=4, seed=seed)
