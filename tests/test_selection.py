"""Selection: what is refused, what is kept, what a run does with it; the command line."""
import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from rlworkbench.claims import reproduce
from rlworkbench.cli.main import app, sentence
from rlworkbench.core.config import Config
from rlworkbench.core.item import Item
from rlworkbench.core.registry import claims, selectors
from rlworkbench.policies.tiny import load_tiny, random_tiny
from rlworkbench.selection.chosen import Chosen
from rlworkbench.selection.mixtures import missing_skills
from rlworkbench.selection.orders import cycle
from rlworkbench.selection.selection import Selection, open_selection, random
from rlworkbench.selection.synthesis import new_problems
from rlworkbench.tasks.bandit import bandit
from rlworkbench.tasks.digits import digits_count, digits_sum, sources, text_sum
from rlworkbench.tasks.skills import skills, skills_max
from rlworkbench.training.choices import new_trainer
from rlworkbench.training.job import fork_run, resume, train
from rlworkbench.training.run import Run

NAMES = sorted(n for n in selectors.all() if not n.endswith(":"))
SMALL = Config(recipe="sft", task="digits-sum", steps=4, prompts=4, group=2, evaluate=0, checkpoint=2, budget=.5, select="random,pool=16")
timeless = lambda run: run.metrics.drop(columns=[c for c in run.metrics if c.startswith(("time/", "cpu/"))])


def cli(*words) -> tuple:
    "Exit code and what is said."
    done = CliRunner().invoke(app, list(map(str, words)))
    return (2, sentence(done.exception)) if isinstance(done.exception, ValueError) else (done.exit_code, done.output)


@pytest.fixture(scope="module")
def tiny():
    return load_tiny()


def fits(name: str) -> tuple:
    "A pool and a query that a selector can be asked about, and the judge of the pool."
    if "pictures" in selectors.get(name).needs or name in ("rif", "neuraladder"):
        return digits_count.items()[:20], digits_count.items("validation")[:3], digits_count
    return skills.items()[:20], skills_max.items("validation")[:3], skills


@pytest.mark.parametrize("name", NAMES)
def test_every_selector_selects(name, tiny, request):
    """No more problems than its budget, each once unless the order comes back to it; with a score for all that it looked at, the same again with the same seed, and the policy untouched."""
    if name == "minilm":
        request.getfixturevalue("minilm_built")
    pool, query, task = fits(name)
    selector = selectors.get(name)
    selector = selector.but(tag="max") if "tag" in selector.settings() else selector
    before = {n: w.clone() for n, w in tiny.weights().items()}
    ask = lambda: selector(tiny, pool, query=query, budget=.5, rng=3, task=task)
    state, found = torch.get_rng_state(), ask()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(w, before[n]) for n, w in tiny.weights().items())
    assert found == ask()
    if "new" in found.about:
        assert found.index == tuple(range(20, 30)) and not set(found.ids) & {i.id for i in pool}
    else:
        assert all(0 <= k < len(pool) for k in found.index) and found.ids == tuple(pool[k].id for k in found.index)
    assert len(found.score) == len(pool)
    taken = set(found.index)
    assert taken == set(range(20)) if name == "all" else 0 < len(taken) <= 10
    again = {"cyclical": sum(round(10 * share) for share in cycle(3.0)) - len(taken), "dmt": found.about.get("replayed")}
    assert found.about["taken"] == len(taken) == len(found) - again.get(name, 0)
    assert found.about["selector"] == name and found.about["duplicates"] == 0
    json.dumps(found.told(), allow_nan=False)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("budget", [0, -.1, 1.01, float("nan")])
def test_a_budget_out_of_range_is_refused(name, budget, tiny):
    pool, query, task = fits(name)
    with pytest.raises(ValueError, match="budget must be above 0 and at most 1"):
        selectors.get(name)(tiny, pool, query=query, budget=budget, task=task)


WHOLE, FRACTION = ("abc", "2.5", "none", "true"), ("x", "true", "none", "nan", "inf")
WRONG = {   # option: values of another kind, values that make no sense; both as they are written on a command line
    "duplicates": ((), ("merge", "5", "none")), "pool": (("x", "2.5", "true"), ("0", "-3")), "batch": (WHOLE, ("0", "-3")),
    "way": ((), ("away", "0")), "text": ((), ("some", "1")), "tokens": (("5", "maybe"), ()), "anywhere": (("5", "none"), ()),
    "samples": (WHOLE, ("0", "-1", "1001")), "hard": (FRACTION, ("-.1", "1.1")), "examples": (WHOLE, ("0", "1001")), "each": (WHOLE, ("0", "1001")),
    "k": (FRACTION, ("-.1", "1.1")), "reverse": (("maybe", "1"), ()), "blocked": (("7", "x"), ()), "tag": ((), ()), "direct": ((), ()),
    "epochs": (FRACTION, ("0", "1e7")), "start": (FRACTION, ("0", "1")), "end": (FRACTION, ("0", "1.5", ".1")), "alpha": (FRACTION, ("0", "1")),
    "least": (WHOLE, ("-1", "9")), "most": (("x", "2.5", "true"), ("-1", "0")), "by": ((), ("uto", "3")), "rank": (WHOLE, ("0", "257")), "dims": (WHOLE, ("0", "65537")),
    "share": (FRACTION, ("-1", "1.1")), "passes": (WHOLE, ("0",)), "lr": (FRACTION, ("0", "-1", "2"))}
KINDS = {int: "a whole number", float: "a finite number", bool: "true or false"}
OPTIONS = [(n, o) for n in NAMES for o in selectors.get(n).settings()]


@pytest.mark.parametrize("name,option", OPTIONS)
def test_every_option_of_every_selector_is_checked(name, option, monkeypatch):
    """Another kind, or a value out of range: one sentence with option, value and what is allowed, before a policy is loaded."""
    monkeypatch.setattr("rlworkbench.training.choices.load_policy", lambda *a: pytest.fail("a policy was loaded"))
    known, (kinds, ranges) = selectors.get(name).known()[option], WRONG[option]
    for value in (*kinds, *ranges):
        code, said = cli("train", "--recipe", "sft", "--evaluate", 0, "--steps", 1, "--select", f"{name},{option}={value}", "--budget", ".5", "--query", "digits-max")
        assert code == 2 and option in said and "\n" not in said.strip() and len(said) < 150, said
        assert any(f"{name}: {o} must be " in said for o in (option, {"end": "start", "most": "least"}.get(option)))
        if value in kinds:
            assert f"{name}: {option} must be {KINDS[known.annotation]}" in said and f", got {'None' if value == 'none' else ''}" in said
    with pytest.raises(ValueError, match=f"{name}: {option} must be "):
        selectors.get(name).but(**{option: ["a list"]})


def test_only_what_has_no_range_is_without_limits():
    """A number of any selector says where it ends; words are either a few or free."""
    for name, option in OPTIONS:
        selector = selectors.get(name)
        assert selector.known()[option].annotation in (int, float, bool, str)
        assert option in ("duplicates", "pool", "tag", "direct") or selector.known()[option].annotation is bool or option in selector.limits, (name, option)
        assert set(selector.limits) <= set(selector.settings())


@pytest.mark.parametrize("name", NAMES)
def test_the_ends_of_a_range_are_allowed(name):
    """What the sentence says is allowed can be said."""
    for option, limit in selectors.get(name).limits.items():
        ends = limit if isinstance(limit, tuple) else [float(x) if selectors.get(name).known()[option].annotation is float else int(x)
                                                       for x, mark in zip(limit[1:-1].split(", "), (limit[0], limit[-1])) if mark in "[]" and x not in ("inf", "0")]
        for value in ends:
            more = {"start": {"end": 1.0}, "end": {"start": .25}, "least": {"samples": 8}}.get(option, {})
            assert selectors.get(name).but(**{option: value}, **more).settings()[option] == value


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_pool_is_refused(name, tiny):
    with pytest.raises(ValueError, match=f"{name}: the pool is empty"):
        selectors.get(name)(tiny, [], query=fits(name)[1], budget=.5, task=digits_sum)


@pytest.mark.parametrize("name,query,says", [
    ("less", None, "name a task whose validation problems"), ("rds", [], "name a task whose validation problems"),
    ("less", "pictures", "the query has problems with pictures, and the pool has only text alone"),
    ("rds", "bare", "reads demonstrations, but item bare"), ("vig", None, "none of the 6 problems of the pool has one")])
def test_what_a_selector_cannot_use_is_said(name, query, says, tiny):
    given = {"pictures": digits_sum.items()[:2], "bare": [Item("bare", "?")]}[query] if isinstance(query, str) else query
    with pytest.raises(ValueError, match=says):
        selectors.get(name)(tiny, text_sum.items()[:6], query=given, budget=.5)


def test_duplicates_are_counted_by_what_they_are():
    """Another name is the same problem; another picture is another problem."""
    a = digits_sum.items()[0]
    other = replace(a, id="other", images=(Image.new("RGB", a.images[0].size),))
    pool = [a, replace(a, id="again"), other, replace(a, id="third")]
    found = {d: random.but(duplicates=d)(None, pool, budget=1.) for d in ("keep", "drop")}
    assert [(len(f), f.about["duplicates"]) for f in found.values()] == [(4, 2), (2, 2)]
    assert set(found["drop"].ids) == {a.id, "other"}


def test_only_chosen_problems_are_trained_on(tmp_path):
    trainer = new_trainer(replace(SMALL, prompts=8))
    names = {i.id for k in range(3) for i in trainer.step().items}
    assert names == set(trainer.task.selection.ids) and len(names) == 8


def test_killed_resumed_forked(tmp_path):
    """A run that selects is taken up to the same bits, from its own file: nothing is selected again."""
    def stop(run, step):
        if step.clock[0] == 2:
            raise KeyboardInterrupt
    config = replace(SMALL, task="skills", select="rds,pool=16", query="skills-max")
    whole = train(config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "killed", stop)
    killed = resume(tmp_path / "killed")
    assert timeless(whole).equals(timeless(killed))
    forked = fork_run(tmp_path / "whole", 2, tmp_path / "forked")
    assert timeless(whole).equals(timeless(forked))
    assert (tmp_path / "forked" / "selection.json").read_bytes() == (tmp_path / "whole" / "selection.json").read_bytes()
    told = open_selection(tmp_path / "killed")
    first = replace(told, index=told.index[:1] * len(told), ids=told.ids[:1] * len(told))
    first.save(tmp_path / "killed" / "selection.json")
    again = resume(tmp_path / "killed", steps=5)
    assert {i.id for i in new_trainer(config, kept=first.told()).pool[:]} == {told.ids[0]}
    assert len(again.metrics) == 5


def test_a_file_that_changed_is_not_gone_on_with(tmp_path):
    train(SMALL, tmp_path / "one")
    kept = tmp_path / "kept.json"
    open_selection(tmp_path / "one").save(kept)
    train(replace(SMALL, select=str(kept), budget=None), tmp_path / "two")
    replace(open_selection(kept), ordered=True).save(kept)
    with pytest.raises(ValueError, match="the select of .* has changed since it began"):
        resume(tmp_path / "two", steps=6)


def test_an_ordered_selection_is_walked_in_order():
    pool = digits_sum.items()
    told = Selection((7, 3, 5, 3), ordered=True, ids=tuple(pool[k].id for k in (7, 3, 5, 3)))
    trainer = new_trainer(replace(SMALL, prompts=2), kept=told.told())
    assert [i.id for _ in range(3) for i in trainer.step().items] == [pool[k].id for k in (7, 3, 5, 3, 7, 3)]


def test_tokens_that_are_not_marked_have_no_gradient():
    """The same marks on all tokens give the same loss; none marked on one reply gives that of the others."""
    pool = digits_sum.items()
    def loss(*marks):
        told = Selection((0, 1), token_mask=tuple(marks) or None, ids=(pool[0].id, pool[1].id), ordered=True)
        return new_trainer(replace(SMALL, prompts=2), kept=told.told()).step().metrics["loss"]
    a, b = (len(random_tiny().tokens(i.demo)) for i in pool[:2])
    assert loss("1" * a, "1" * b) == pytest.approx(loss(), abs=1e-6)
    alone = Selection((0,), ids=(pool[0].id,), ordered=True)
    assert loss("1" * a, "0" * b) == pytest.approx(new_trainer(replace(SMALL, prompts=1), kept=alone.told()).step().metrics["loss"], abs=1e-5)
    with pytest.raises(ValueError, match="it was made with another policy"):
        loss("1" * (a + 1), "1" * b)


def test_a_chosen_task_is_its_task_in_all_else():
    found = random(None, bandit.items(), budget=.5)
    task = Chosen(bandit, found)
    assert (task.name, task.max_tokens, task.splits, task.digest) == (bandit.name, bandit.max_tokens, bandit.splits, bandit.digest)
    assert task.items("test") == bandit.items("test")
    assert not hasattr(task, "steps")


@pytest.mark.parametrize("words,says", [
    (("--select", "random"), "random needs a budget"),
    (("--select", "random", "--budget", "0"), "budget must be above 0 and at most 1"),
    (("--budget", ".5"), "budget is for a selection"),
    (("--select", "rendom", "--budget", ".5"), "did you mean random"),
    (("--select", "less,bye=uot", "--budget", ".5", "--query", "digits-max"), "unknown option of less 'bye'; did you mean by?"),
    (("--select", "less,pool=20", "--budget", ".5"), "less: selects for a purpose"),
    (("--select", "less,pool=20", "--budget", ".5", "--query", "digits-mux"), "did you mean digits-max"),
    (("--select", "rds,pool=20", "--budget", ".5", "--query", "text-sum"), "the query has problems with text alone, and the pool has only pictures"),
    (("--select", "vig,pool=20,way=away", "--budget", ".5"), "vig: way must be none, blank, blur or other, got 'away'"),
    (("--select", "random", "--budget", "1.5"), "budget must be above 0 and at most 1"),
    (("--select", "random", "--budget", "nan"), "budget must be a finite number, got nan"),
    (("--select", "random,pool=0", "--budget", ".5"), "pool must be a whole number, 1 or more, got 0"),
    (("--select", "random,duplicates=merge", "--budget", ".5"), "duplicates must be keep or drop, got 'merge'"),
    (("--task", "jsonl:empty.jsonl", "--select", "random", "--budget", ".5"), "empty.jsonl has no rows"),
    (("--task", "text-sum", "--select", "vig", "--budget", ".5"), "vig: reads replies with and without their picture, but none of the 4000 problems"),
    (("--task", "skills", "--select", "less,pool=20", "--budget", ".5", "--query", "digits-sum"), "less: the query has problems with pictures, and the pool has only text alone"),
    (("--task", "bandit", "--select", "stat-syn", "--budget", ".5", "--query", "bandit"), "'bandit' has no generator that could write new problems"),
    (("--task", "skills", "--select", "stat-syn,pool=20,each=0", "--budget", ".5", "--query", "skills"), "each must be a whole number in [1, 1000], got 0"),
    (("--select", "nothing.json"), "there is no selection nothing.json"),
    (("--select", "folder"), "folder holds no selection.json: a run has one if it was trained with --select"),
    (("--select", "torn.json"), "torn.json is not JSON"),
    (("--select", "kept.json", "--task", "digits-max"), "the selection was made from another pool"),
    (("--select", "kept.json", "--budget", ".5"), "a selection that was made before is used as it is"),
    (("--select", "kept.json", "--query", "digits-max"), "a selection that was made before is used as it is")])
def test_mistakes_on_the_command_line(words, says, tmp_path, monkeypatch):
    """One sentence, and the folder stays as it was."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "torn.json").write_text('{"index": [1')
    random(None, digits_sum.items()[:4], budget=.5).save("kept.json")
    before = {f: f.read_bytes() if f.is_file() else None for f in tmp_path.rglob("*")}
    code, said = cli("train", "--recipe", "sft", "--evaluate", 0, "--steps", 1, *words)
    assert code == 2 and says in said and "\n" not in said.strip()
    assert before == {f: f.read_bytes() if f.is_file() else None for f in tmp_path.rglob("*")}


def test_duplicates_on_the_command_line(tmp_path, monkeypatch):
    """Kept and counted, or dropped and counted."""
    monkeypatch.chdir(tmp_path)
    rows = [{"split": "train", "prompt": f"What is {k % 4}+1?", "answer": str(k % 4 + 1), "demo": f"<answer>{k % 4 + 1}</answer>"} for k in range(12)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    for policy, taken in (("keep", "all took 12 of 12 problems"), ("drop", "all took 4 of 4 problems")):
        code, said = cli("train", "--recipe", "sft", "--task", "jsonl:own.jsonl", "--evaluate", 0, "--steps", 1, "--prompts", 2, "--select", f"all,duplicates={policy}", "--out", policy)
        assert code == 0 and taken in said and "duplicates 8" in said


def test_marked_tokens_are_for_methods_that_read_demonstrations(tmp_path):
    code, said = cli("train", "--recipe", "grpo", "--evaluate", 0, "--steps", 1, "--out", tmp_path / "run", "--select", "vig-tokens,pool=8", "--budget", .5)
    assert code == 2 and "which 'grpo' does not read; vig chooses whole problems" in said


def test_from_the_command_line(tmp_path):
    """Train on a selection, look at it, train on its file."""
    words = ("train", "--recipe", "sft", "--task", "digits-count", "--evaluate", 0, "--steps", 2, "--prompts", 4)
    code, said = cli(*words, "--select", "vig,pool=12", "--budget", .5, "--out", tmp_path / "a")
    assert code == 0 and "vig took 6 of 12 problems; budget 0.5, duplicates 0" in said and "'" not in said
    code, said = cli("selection", tmp_path / "a", "--svg", tmp_path / "a.svg", "--json")
    told = json.loads(said.splitlines()[-1])
    assert code == 0 and told["taken"] == 6 and [e["what"] for e in told["examples"]] == ["taken"] * 3 + ["taken last"] * 3 + ["left"] * 3
    kept = open_selection(tmp_path / "a")
    assert [e["score"] for e in told["examples"][:6]] == sorted((kept.score[k] for k in kept.index), reverse=True)
    assert (tmp_path / "a.svg").read_text().startswith("<svg")
    for k, kept in enumerate(("a", "a/selection.json")):
        code, said = cli(*words, "--select", tmp_path / kept, "--out", tmp_path / f"b{k}")
        assert code == 0 and open_selection(tmp_path / f"b{k}").index == open_selection(tmp_path / "a").index
    code, said = cli("list", "selectors", "--json")
    assert code == 0 and set(NAMES) <= set(json.loads(said.splitlines()[-1]))


def test_new_problems_from_the_command_line(tmp_path):
    """Written for what is missing, looked at, trained on again from the file; killed and taken up to the same bits."""
    def stop(run, step):
        if step.clock[0] == 2:
            raise KeyboardInterrupt
    words = ("train", "--recipe", "sft", "--task", "skills", "--evaluate", 0, "--steps", 3, "--prompts", 4, "--seed", 1)
    code, said = cli(*words, "--select", "stat-syn,pool=20,samples=2", "--query", "skills", "--budget", .5, "--out", tmp_path / "a")
    assert code == 0 and "stat-syn took 10 new problems beside 20" in said
    code, said = cli("selection", tmp_path / "a", "--svg", tmp_path / "a.svg")
    assert code == 0 and said.count("new          ") == 3 and (tmp_path / "a.svg").read_text().startswith("<svg")
    code, said = cli(*words, "--select", tmp_path / "a", "--out", tmp_path / "b")
    assert code == 0 and open_selection(tmp_path / "b").ids == open_selection(tmp_path / "a").ids
    config = replace(Run(tmp_path / "b").config, steps=4, checkpoint=1)
    whole = train(config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "killed", stop)
    assert timeless(whole).equals(timeless(resume(tmp_path / "killed")))


def test_new_problems_use_sources_of_the_training_split_alone():
    new = new_problems(digits_sum, digits_sum.items()[:9], Counter({"sum": 1}), 30, torch.Generator().manual_seed(0))
    own = set(sources("train"))
    assert all(set(i.meta["sources"]) <= own for i in new)
    assert len({i.id for i in new}) == 30 and not {i.id for i in new} & {i.id for i in digits_sum.items()}


def test_what_is_missing_is_what_fails():
    """Skills of questions that attempts hardly ever solve, each as often as it was asked."""
    class Sums:
        max_tokens = 3
        def score(self, item, text):
            return {"correct": float("sum" not in item.tags)}
    asked = skills.items("validation")[:25]
    assert missing_skills(load_tiny(), Sums(), asked, 2, .25, torch.Generator().manual_seed(0)) == Counter({"sum": sum("sum" in i.tags for i in asked)})


def test_a_profile_decides_what_is_written():
    """In proportion, whatever the pool holds; another profile, other problems."""
    pool = [i for i in skills.items()[:200] if i.tags != ("max",)] + [i for i in skills.items()[:60] if i.tags == ("max",)][:1]
    for profile in ({"max": 3, "read": 1}, {"max": 1, "read": 3}):
        new = new_problems(skills, pool, Counter(profile), 80, torch.Generator().manual_seed(0))
        assert Counter(i.tags[0] for i in new) == {s: 20 * n for s, n in profile.items()}
    with pytest.raises(ValueError, match="has no more new problems of the missing skills max: 0 of 5 could be written"):
        new_problems(replace(digits_sum, kind="sum"), [replace(digits_sum.items()[0], tags=("max",))], Counter({"max": 1}), 5, torch.Generator())


def test_marks_anywhere_are_as_many():
    """The control of a claim about tokens: the same problems, as many tokens of each, elsewhere."""
    pool = digits_count.items()[:12]
    aimed, lost = (selectors.get("vig-tokens").but(anywhere=a)(load_tiny(), pool, budget=.5) for a in (False, True))
    assert aimed.index == lost.index and aimed.token_mask != lost.token_mask
    assert [sorted(m) for m in aimed.token_mask] == [sorted(m) for m in lost.token_mask]


def test_the_code_that_selects_belongs_to_a_claim_that_selects(monkeypatch):
    """A job of an arm without a selection is not made again when a selector changes, and committed results are found as they are."""
    chosen, plain = claims.get("visual_gain").arms["vig"], claims.get("unit_sequential")
    asked = []
    monkeypatch.setattr(reproduce, "code_digest", lambda wings=reproduce.WINGS: asked.append(wings) or "0")
    reproduce.job_digest(claims.get("visual_gain"), chosen, 2, "0")
    assert asked == [("selection",)]
    asked.clear()
    reproduce.job_digest(plain, next(iter(plain.arms.values())), 2, "0")
    assert ("selection",) not in asked
    for name in ("visual_gain", "targeted_loss", "targeted_metric", "visual_tokens"):
        assert reproduce.known_result(name)["claim"] == name
