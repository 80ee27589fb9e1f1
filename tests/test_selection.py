"""Selection: what is refused, what is kept, what a run does with it; the command line."""
import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from rlworkbench.cli.main import app, sentence
from rlworkbench.core.config import Config
from rlworkbench.core.item import Item
from rlworkbench.core.registry import selectors
from rlworkbench.policies.tiny import load_tiny, random_tiny
from rlworkbench.selection.chosen import Chosen
from rlworkbench.selection.selection import Selection, open_selection, random
from rlworkbench.tasks.bandit import bandit
from rlworkbench.tasks.digits import digits_count, digits_sum, text_sum
from rlworkbench.tasks.skills import skills, skills_max
from rlworkbench.training.choices import new_trainer
from rlworkbench.training.job import fork_run, resume, train

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
    """Within its budget, with a score for all that it looked at, the same again with the same seed, and the policy untouched."""
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
    assert all(0 <= k < len(pool) for k in found.index) and found.ids == tuple(pool[k].id for k in found.index)
    assert len(found.score) == len(pool)
    if not found.ordered and name != "all":
        assert 0 < len(set(found.index)) == len(found) <= 10
    assert found.about["selector"] == name and found.about["duplicates"] == 0
    json.dumps(found.told(), allow_nan=False)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("budget", [0, -.1, 1.01, float("nan")])
def test_a_budget_out_of_range_is_refused(name, budget, tiny):
    pool, query, task = fits(name)
    with pytest.raises(ValueError, match="budget must be above 0 and at most 1"):
        selectors.get(name)(tiny, pool, query=query, budget=budget, task=task)


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
    (("--select", "vig,pool=20,way=away", "--budget", ".5"), "a picture is taken away by one of none, blank, blur, other, not by 'away'")])
def test_mistakes_on_the_command_line(words, says, tmp_path):
    code, said = cli("train", "--recipe", "sft", "--evaluate", 0, "--steps", 1, "--out", tmp_path / "run", *words)
    assert code == 2 and says in said
    assert not (tmp_path / "run").exists()


def test_marked_tokens_are_for_methods_that_read_demonstrations(tmp_path):
    code, said = cli("train", "--recipe", "grpo", "--evaluate", 0, "--steps", 1, "--out", tmp_path / "run", "--select", "vig-tokens,pool=8", "--budget", .5)
    assert code == 2 and "which 'grpo' does not read; vig chooses whole problems" in said


def test_from_the_command_line(tmp_path):
    """Train on a selection, look at it, train on its file."""
    words = ("train", "--recipe", "sft", "--task", "digits-count", "--evaluate", 0, "--steps", 2, "--prompts", 4)
    code, said = cli(*words, "--select", "vig,pool=12", "--budget", .5, "--out", tmp_path / "a")
    assert code == 0 and "6 problems selected" in said
    code, said = cli("selection", tmp_path / "a", "--svg", tmp_path / "a.svg", "--json")
    assert code == 0 and json.loads(said.splitlines()[-1])["taken"] == 6
    assert (tmp_path / "a.svg").read_text().startswith("<svg")
    for k, kept in enumerate(("a", "a/selection.json")):
        code, said = cli(*words, "--select", tmp_path / kept, "--out", tmp_path / f"b{k}")
        assert code == 0 and open_selection(tmp_path / f"b{k}").index == open_selection(tmp_path / "a").index
    code, said = cli("list", "selectors", "--json")
    assert code == 0 and set(NAMES) <= set(json.loads(said.splitlines()[-1]))
