"""The beds: problems apart, teachers' mistakes at the stated rates, phenomena that follow their dials, policies that are built once."""
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from rlworkbench.core.item import Item
from rlworkbench.core.registry import policies, tasks
from rlworkbench.policies.loading import load_hugging
from rlworkbench.policies.micro import MICROS, load_built, random_micro
from rlworkbench.rollouts.sampling import Sampling
from rlworkbench.tasks.knights import PEOPLE, SAYS, kk, letters, solutions
from rlworkbench.tasks.routes import all_routes, distinct_routes, route, route_sum
from rlworkbench.tasks.synonyms import LETTERS, MARKS, canonical, harm, synonyms, zipf
from rlworkbench.tasks.task import validate
from rlworkbench.tasks.verbose import Bed, crosses, miscarried, thought, verbose_sum, verbose_sum_helpful
from rlworkbench.training.beds import MICROS as BUILT
from rlworkbench.training.beds import bed_statistics, build_micro, builders, make_micro, rare_tokens, surveys_file, within_groups
from rlworkbench.training.evaluate import answers

BEDS = {name: t for name, t in tasks.all().items() if isinstance(t, Bed)}
every_bed = pytest.mark.parametrize("task", BEDS.values(), ids=BEDS)
every_micro = pytest.mark.parametrize("variant", MICROS.values(), ids=MICROS)


def near(share, expected, n):
    "Within four standard errors of a proportion."
    return abs(share - expected) <= 4 * np.sqrt(expected * (1 - expected) / n)


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    "A policy after a few steps of imitation, written by the builder: (folder, card)."
    folder = tmp_path_factory.mktemp("data") / "micro-synonyms"
    return folder, build_micro("micro-synonyms", folder, steps=25)


@every_bed
def test_a_bed_keeps_the_contract(task):
    assert validate(task, limit=300) == []
    train, test = ({i.meta["sources"] for i in task.items(s)[:600]} for s in ("train", "test"))
    assert train and test and not train & test


@every_bed
def test_an_item_is_the_same_each_time(task):
    fresh = replace(task, doc="another object")
    assert [(i.prompt, i.demo, i.answer) for i in task.items()[:20]] == [(i.prompt, i.demo, i.answer) for i in fresh.items()[:20]]


@every_bed
def test_gold_chains_are_right_and_feedback_does_not_know_the_answer(task):
    for item in task.items("test")[:100]:
        assert all(right for _, right in task.steps(item, task.gold(item)))
        blind = replace(item, answer="")
        assert task.feedback(blind, task.gold(item)) is None
        assert task.feedback(blind, "<answer>1") is not None


@every_bed
def test_a_bed_without_problems_for_a_split_says_so(task):
    class Single(type(task)):
        def draw(self, rng):
            return problem
    problem = task.draw(np.random.default_rng(0))
    lonely = Single(**{f: getattr(task, f) for f in task.__dataclass_fields__})
    with pytest.raises(ValueError, match="belongs to the split"):
        [lonely.items(s)[0] for s in ("train", "validation", "test")]


# verbose sums

def carried(task, mode, n=4000):
    "Steps that cross a ten and lose their carry, and checks that come out wrong."
    rng, steps, checks = np.random.default_rng(0), [], []
    for _ in range(n):
        for segment in task.solve(task.draw(rng), mode, rng)[0].split(";"):
            a, b, c = map(int, re.split(r"[+=]", segment.removeprefix("<check>")))
            if segment.startswith("<check>"):
                checks.append(c == miscarried(a, b))
                assert c in (a + b, miscarried(a, b))
            elif crosses(a, b):
                steps.append(c == a + b - 10)
            else:
                assert c == a + b
    return steps, checks


@pytest.mark.parametrize("drop,check", [(.3, .5), (.8, .05), (0., 1.)])
def test_verbose_teachers_err_as_the_dials_say(drop, check):
    steps, checks = carried(replace(verbose_sum, drop=drop, check=check), "long")
    assert near(np.mean(steps), drop, len(steps)) and near(np.mean(checks), check, len(checks))


def test_verbose_modes_differ_in_checks():
    for mode, share in (("short", 0), ("auto", .5), ("long", .9)):
        rng = np.random.default_rng(1)
        chains = [verbose_sum.solve(verbose_sum.draw(rng), mode, rng)[0].split(";") for _ in range(3000)]
        told = sum(s.startswith("<check>") for c in chains for s in c) / sum(not s.startswith("<check>") for c in chains for s in c)
        assert abs(told - share) < .03
    mixed = replace(verbose_sum, name="mixed", mode="mixed")
    assert {i.tags[0] for i in mixed.items()[:50]} == {"short", "long", "auto"}
    assert all(i.prompt.startswith(f"<{i.tags[0]}>") for i in mixed.items()[:50])


@pytest.mark.parametrize("task,sign", [(verbose_sum, -1), (verbose_sum_helpful, 1)])
def test_the_slope_of_length_and_accuracy_follows_the_dial(task, sign):
    rng, rows = np.random.default_rng(0), []
    for g in range(150):
        numbers = task.draw(rng)
        for _ in range(40):
            chain, result = task.solve(numbers, "auto", rng)
            rows.append((len(chain.replace("<check>", "!")), result == sum(numbers), g))
    assert sign * within_groups(*zip(*rows)) > .004
    shuffled = rng.permutation([r[1] for r in rows])
    assert abs(within_groups([r[0] for r in rows], shuffled, [r[2] for r in rows])) < .002


# synonyms

@pytest.mark.parametrize("s", [1.2, 2.0])
def test_forms_follow_zipf(s):
    rng, task = np.random.default_rng(0), replace(synonyms, digits=s, signs=s)
    said = task.speak("7" * 20_000, rng)
    count = np.array([len(re.findall(f"7{m}(?![{LETTERS}])", said)) for m in MARKS])
    assert count.sum() == 20_000 and len(MARKS) == 77
    law = zipf(s, 77) * 20_000
    often = law > 20
    assert (np.abs(count - law)[often] < 5 * np.sqrt(law[often])).all()
    assert (count[:-1].cumsum() <= 20_000).all() and abs(np.polyfit(np.log(np.arange(1, 11)), np.log(count[:10]), 1)[0] + s) < .1


def test_harm_of_known_replies():
    item = Item("x", "?", meta={"numbers": (7, 5, 8)})

    def harmful(text):
        pieces = re.findall(rf"<[^>]*>|.[{LETTERS}]?", text)
        return [k for k, bad in enumerate(harm(item, pieces)) if bad]
    assert harmful("<think>7ω+k5=1b2;12z+8=20ω</think><answer>20q</answer>") == []
    assert harmful("<think>7+5=2b;2+8=10</think><answer>10</answer>") == [5]           # the dropped carry, and not the copy of it
    assert harmful("<think>7+5=12;12+8=20</think><answer>21</answer>") == [18]
    assert harmful("<think>9+5=14;14+8=22</think><answer>22</answer>") == [1]
    assert harmful("7+5") == [0, 1]


def test_verdict_does_not_depend_on_forms():
    rng = np.random.default_rng(0)
    for item in synonyms.items("test")[:100]:
        for reply, right in ((synonyms.gold(item), 1), (synonyms.wrong(item), 0)):
            spoken = synonyms.speak(reply, rng)
            assert canonical(spoken) == reply
            assert synonyms.score(item, spoken)["correct"] == right


# routes

def test_routes_of_known_replies():
    item = Item("x", "?", meta={"numbers": (7, 5, 3)})
    say = lambda *steps: thought(";".join(steps), 0)
    assert route(item, say("7+3=10", "10+5=15")) == route(item, say("3+7=99", "5+99=0")) == ((3, 7), (3, 5, 7))
    assert route(item, say("7+7=14", "14+5=19")) is None          # 7 is there once
    assert route(item, say("7+3=10")) is None                     # 5 is left over
    assert route(item, say("7+3=10", "10+5=15", "15+1=16")) is None
    assert distinct_routes(item, [say("7+3=10", "10+5=15"), say("7+5=2", "2+3=5"), say("5+7=12", "12+3=15"), "no chain"]) == 2
    assert [len(all_routes(range(1, n + 1))) for n in (2, 3, 4, 5)] == [1, 3, 18, 180]


def test_route_teachers_err_as_the_dials_say_and_take_many_routes():
    rng, lost, safe, ways, problem = np.random.default_rng(0), [], [], set(), (7, 5, 3, 9)   # no sum of some is another number
    for _ in range(3000):
        chain = route_sum.solve(problem, rng)[0]
        ways.add(route(Item("x", "?", meta={"numbers": problem}), thought(chain, 0)))
        for step in chain.split(";"):
            a, b, c = map(int, re.split(r"[+=]", step))
            if crosses(a, b):
                (safe if (a + b) % 10 == 0 else lost).append(c == a + b - 10)
    assert near(np.mean(lost), route_sum.drop, len(lost)) and not any(safe)
    assert ways == all_routes(problem)


# knights and knaves

def told(statement, speaker, truth):
    "A second solver, in other words: must this person say that?"
    verb, a, b = statement
    true = {"knight": truth[a], "knave": not truth[a], "like": truth[a] is truth[b], "unlike": truth[a] is not truth[b],
            "both": truth[a] + truth[b] == 2, "either": truth[a] + truth[b] > 0}[verb]
    return true if truth[speaker] else not true


def test_puzzles_have_one_solution():
    seen = set()
    for item in kk.items()[:400]:
        people = item.meta["statements"]
        seen |= {v for v, _, _ in people}
        every = [tuple(bool(n >> k & 1) for k in range(len(people))) for n in range(2 ** len(people))]
        fitting = [t for t in every if all(told(s, k, t) for k, s in enumerate(people))]
        assert [letters(t) for t in fitting] == [item.answer] == [letters(t) for t in solutions(people)]
        assert all(f"{PEOPLE[k]} says" in item.prompt for k in range(len(people)))
        assert sum(kk.score(item, thought("", letters(t)))["correct"] for t in every) == 1
    assert seen == set(SAYS)


@pytest.mark.parametrize("forget", [0., .4, 1.])
def test_knaves_statements_are_misread_as_often_as_the_dial_says(forget):
    rng, wrong = np.random.default_rng(0), {True: [], False: []}
    task = replace(kk, forget=forget, slip=0.)
    for item in kk.items()[:300]:
        people = item.meta["statements"]
        for truth in ((True,) * len(people), (False,) * len(people)):
            said, right = task.row(people, truth, rng), kk.row(people, truth)
            wrong[truth[0]].append(said.split(":")[1][0] != right.split(":")[1][0])
    assert not any(wrong[True])
    assert near(np.mean(wrong[False]), forget, len(wrong[False]))


# policies

@every_micro
def test_no_word_is_unknown(variant):
    policy = random_micro(variant)
    unknown = policy.tokenizer.unk_token_id
    assert 250_000 <= sum(p.numel() for p in policy.weights().values()) <= 700_000
    for split in ("train", "test"):
        for item in variant.task.items(split)[:150]:
            prompt = policy.encode([item]).ids[0].tolist()
            assert unknown not in prompt and policy.text(prompt) == f"<user>{item.prompt}<assistant>"
            for text in (item.demo, variant.task.gold(item)):
                ids = policy.tokens(text)
                assert unknown not in ids and policy.text(ids[:-1]) == text
                assert len(ids) <= variant.task.max_tokens


@every_micro
def test_a_policy_that_is_not_built_names_the_command(variant, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert variant.name in builders() and BUILT is MICROS
    with pytest.raises(ValueError, match=f"rlworkbench build {variant.name}$"):
        policies.get(variant.name).load()


def test_making_is_deterministic():
    one, two = (make_micro(MICROS["micro-kk"], steps=4) for _ in range(2))
    other = make_micro(MICROS["micro-kk"], steps=4, seed=1)
    same = [torch.equal(a, b) for a, b in zip(one.weights().values(), two.weights().values())]
    assert all(same) and not all(torch.equal(a, b) for a, b in zip(one.weights().values(), other.weights().values()))


def test_what_is_built_is_a_plain_folder(built):
    folder, card = built
    names = {f.name for f in folder.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "making.json"} <= names
    assert json.loads((folder / "making.json").read_text()) == card
    policy, items = load_built(MICROS["micro-synonyms"], folder), synonyms.items("test")[:4]
    again = load_hugging(str(folder))
    assert type(policy.model).__name__ == "Qwen3ForCausalLM"
    one, two = (p.prefill(p.encode(items)).hidden for p in (policy, again))
    assert torch.equal(one, two)
    assert policy.tokens(items[0].demo) == random_micro(MICROS["micro-synonyms"]).tokens(items[0].demo)


def test_a_bed_that_changed_is_noticed(built, monkeypatch):
    changed = replace(MICROS["micro-synonyms"], task=replace(synonyms, slip=.3))
    monkeypatch.setitem(MICROS, "micro-synonyms", changed)
    with pytest.raises(ValueError, match="rlworkbench build micro-synonyms --force"):
        load_built(MICROS["micro-synonyms"], built[0])


def test_rare_tokens_against_a_loop(built):
    policy, law = load_built(MICROS["micro-synonyms"], built[0]), Sampling(1.0, 40)
    step, = answers(policy, synonyms.items("test")[:6], law, 4)
    rare = harmless = tokens = 0
    for row in range(len(step)):
        ids = [i for i, m in zip(step.ids[row].tolist(), step.mask[row].tolist()) if m and i != policy.eos]
        bad = harm(step.items[step.group[row]], [policy.piece(i) for i in ids])
        for t, b in enumerate(bad):
            tokens += 1
            if step.old[row, t].exp() < .01:
                rare, harmless = rare + 1, harmless + (not b)
    share, fine = rare_tokens(policy, synonyms, step, .01)
    assert rare > 20 and share == pytest.approx(rare / tokens) and fine == pytest.approx(harmless / rare)


def test_statistics_of_a_perfect_writer():
    """A policy that only says gold replies: all right, no mixed group, nothing rare, one route."""
    variant, n = MICROS["micro-routes"], 5
    items = variant.task.items("validation")[:n]

    class Writer(type(random_micro(variant))):
        def logits(self, hidden):
            self.at += 1
            return torch.nn.functional.one_hot(self.script[:, self.at], self.vocabulary)[:len(hidden)] * 50.0
    policy = random_micro(variant)
    policy.__class__ = Writer
    replies = [policy.tokens(variant.task.gold(i)) for i in items for _ in range(3)]
    longest = max(map(len, replies)) + 1
    policy.script, policy.at = torch.tensor([r + [policy.eos] * (longest - len(r)) for r in replies]), -1
    found = bed_statistics(policy, variant.task, n, 3)
    assert (found["right"], found["mixed"], found["all wrong"], found["p < .01"], found["routes in a group"]) == (1, 0, 0, 0, 1)


def test_surveys_are_of_the_present_beds():
    kept = json.loads(surveys_file().read_text())
    assert {n: s["content"] for n, s in kept.items()} == {n: m.content() for n, m in MICROS.items()}
    for name, survey in kept.items():
        assert .3 <= survey["statistics"]["right"] <= .6, name
        assert survey["statistics"]["mixed"] > .5, name
        assert np.mean(survey["reward"][-5:]) > np.mean(survey["reward"][:5]), name
