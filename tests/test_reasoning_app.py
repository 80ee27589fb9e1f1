"""The page of strategies: recorded answers are those of the strategies, what is wrong is a sentence, endpoints of two visitors, and a real browser that chooses, asks and stops."""
import json
import re
import time
from dataclasses import asdict

import pytest
import torch
from typer.testing import CliRunner

from rlworkbench.cli.main import app
from rlworkbench.core.registry import strategies, tasks
from rlworkbench.core.trace import Trace
from rlworkbench.policies.tiny import load_tiny
from rlworkbench.reasoning.gradient import Head
from rlworkbench.reasoning.routing import Route
from rlworkbench.reasoning.vectors import Vector
from rlworkbench.serving import thinking
from rlworkbench.serving.answers import Answer, Asking, build_recorded_answers, read_asking, shipped_answers
from rlworkbench.serving.asking import model_of
from rlworkbench.serving.frame import served
from rlworkbench.serving.places import Places
from rlworkbench.serving.thinking import Thinking, live, think, untimed
from rlworkbench.serving.tries import MOST, card_html, screen

@pytest.fixture(scope="module")
def desk():
    return Thinking(Places("/nowhere"))


# ---- what is shipped

def test_recorded_answers_are_what_the_strategies_answer(desk):
    task = tasks.get("digits-sum")
    item = task.items("test")[Asking().problem]
    assert desk.recorded.item.images[0].tobytes() == item.images[0].tobytes() and desk.recorded.item.answer == item.answer
    for name, kept in desk.recorded.answers.items():
        now = strategies.get(name)(load_tiny(), [item], Asking().budget, task=task)[0]
        for a, b in zip((x for _, x in kept.trace.walk()), (x for _, x in now.walk()), strict=True):
            assert (a.ids, a.at, a.correct, a.answer, a.outcome) == (b.ids, b.at, b.correct, b.answer, b.outcome), name
        assert kept.trace.spent == now.spent <= Asking().budget and kept.seconds is None
    assert {strategies.get(n).oracle for n in Asking().names} == {True, False}


def test_the_shipped_file_is_small_and_holds_no_clock_and_no_path():
    files = [*shipped_answers().iterdir()]
    assert sum(f.stat().st_size for f in files) < 100_000
    assert not re.search("/home|/root|/tmp|seconds", "".join(f.read_text() for f in files))


def test_the_command_writes_the_same_file_twice(tmp_path):
    made = [build_recorded_answers(tmp_path / k, names=("cautious",), n=2, budgets=(34,)) and (tmp_path / k / "answers.json").read_bytes() for k in "ab"]
    assert made[0] == made[1] and list(json.loads(made[0])["answers"]) == ["cautious"]
    said = CliRunner().invoke(app, ["build", "recorded-answers", "--out", str(tmp_path / "a")])
    assert "already holds" in str(said.exception)
    said = CliRunner().invoke(app, ["build", "recorded-answers", "--steps", "3", "--out", str(tmp_path / "c")])
    assert "takes no --steps" in str(said.exception)


def test_a_damaged_example_is_told_and_the_page_lives(tmp_path):
    (tmp_path / "answers.json").write_text('{"item": 3}')
    view, wrong, question, _, cards, curve = screen(Thinking(Places("/nowhere"), tmp_path), Asking(strategies="greedy"))
    assert "rlworkbench build recorded-answers --force" in wrong and "<img" in question and "Not asked yet" in cards and curve == ""


# ---- what is shown

def test_tokens_on_a_card_are_those_that_were_paid(desk):
    for name, kept in desk.recorded.answers.items():
        page, t = card_html(name, Asking(), kept, gold="19"), kept.trace
        drawn = len(re.findall('<span class="rlw-t[ "]', page))
        assert drawn == len(t) + sum(len(b) for b in t.branches) and len(t.branches) <= MOST
        assert f"<b>{t.spent}</b> of 136" in page and ("✓ right" if t.correct else "✗ wrong") in page
        assert (">oracle<" in page) == strategies.get(name).oracle


def test_many_attempts_and_long_replies_are_drawn_in_bounded_room():
    hostile = "<script>document.title='broken'</script>"
    long = Trace("a", hostile, pieces=[hostile] * 5000, answer=hostile, branches=[Trace(f"b{k}", pieces=[hostile], at=5, why=f"{hostile}{k}") for k in range(300)])
    began = time.perf_counter()
    page = card_html("cautious", Asking(budget=1024), Answer(long, 1.0))
    assert time.perf_counter() - began < 2 and len(page) < 400_000
    assert "<script" not in page and page.count("<li") == MOST and "290 more are not drawn" in page and "5,300</b> of 1,024" in page


@pytest.mark.parametrize("query, says", [
    (dict(strategies="gredy"), "did you mean greedy"), (dict(task="jsonl:/etc/passwd"), "Unknown task"), (dict(task="digit-sum"), "did you mean digits-sum"),
    (dict(problem="99999"), "has no problem 99999"), (dict(budget="-1"), "0 to 1,024 tokens"), (dict(budget="999999"), "rlworkbench eval"), (dict(seed="-4"), "counted from 0"),
    (dict(strategies="greedy,sampling,cautious,revised,forced,nolan,brief,routed"), "brief, routed are left out")])
def test_a_wrong_link_is_one_sentence_and_something_is_shown(desk, query, says):
    view, wrong, *_, cards, _ = screen(desk, read_asking(query))
    assert says in wrong and wrong.count("rlw-error") == 1 and "<article" in cards and view.names


@pytest.mark.parametrize("view, why", [
    (Asking(budget=0, strategies="greedy"), "Refused: a budget of 0 tokens is below one token."),
    (Asking(budget=2, strategies="self-consistency"), "cut off by the budget"),
    (Asking(task="text-sum", problem=0, strategies="nolan"), "Refused: it looks with and without the picture, but the question has none."),
    (Asking(policy="small-llama", strategies="greedy"), "reads text only"),
    (Asking(policy="someone/else", strategies="greedy"), "There is no policy"), (Asking(policy="../x@1", strategies="greedy"), "is not the name of a run")])
def test_what_can_not_be_asked_is_a_stated_outcome(desk, view, why):
    wrong = [w for _, w, _ in live(desk, view)][-1]
    said = screen(desk, view, "", wrong)
    assert why in said[1] + said[4] and "Traceback" not in said[1] + said[4]


def test_recorded_is_at_once_and_asked_again_it_is_the_same(tmp_path):
    desk = Thinking(Places(tmp_path))
    began = time.perf_counter()
    screen(desk, Asking())
    assert time.perf_counter() - began < .5 and untimed(desk, Asking()) == Asking().names and [*live(desk, Asking())] == [("", "", None)]
    before = screen(desk, Asking())[4]
    shown = []
    for now, wrong, so_far in live(desk, Asking(), again=True):
        assert not wrong
        shown += [now] * (so_far is None)
    after = screen(desk, Asking())[4]
    assert shown == [*Asking().names, ""] and untimed(desk, Asking()) == []
    same = lambda page: re.sub('<dt>CPU</dt><dd>.*?</dd>| title="[^"]*"', "", page)
    assert same(before) == same(after) and "not recorded" not in after


def test_a_reply_is_seen_while_it_is_written(tmp_path):
    desk, view, spent = Thinking(Places(tmp_path)), Asking(problem=6, strategies="self-consistency", budget=1024), []
    for name, wrong, so_far in live(desk, view, every=.02):
        assert not wrong
        if so_far:
            page = screen(desk, view, name, "", so_far)[4]
            assert f"{so_far.spent:,} tokens so far" in page and "tokens paid" not in page
            spent.append(so_far.spent)
    assert len(spent) > 2 and spent == sorted(spent) and spent[0] < spent[-1] <= desk.answer(view, "self-consistency").trace.spent


def test_what_is_prepared_is_prepared_once_and_told_apart(tmp_path):
    model, view = model_of(Places(tmp_path), "tiny"), Asking(problem=1, seed=991)
    first, second = think(model, view, "cot-vector"), think(model, view.but(problem=2), "cot-vector")
    assert first.before > 5 * second.before and first.trace.outcome == second.trace.outcome == "ok"


@pytest.mark.parametrize("name", strategies.all())
def test_every_strategy_has_a_card(desk, name, monkeypatch):
    "What a strategy would measure first is handed to it, so that its card is all that is waited for."
    ready = {"vector": Vector(torch.zeros(4, 160), 0, "none"), "direction": Vector(torch.zeros(4, 160), 0, "none"), "head": Head(torch.zeros(160), 0.0, 0), "route": Route((0.0, 1.0), None, 1.0)}
    monkeypatch.setattr(thinking, "prepared", lambda s, *_: s.but(**{k: ready[k] for k, v in s.settings().items() if v is None and k in ready}))
    view = Asking(problem=4, seed=4242, budget=68)
    page = card_html(name, view, think(model_of(desk.places, "tiny"), view, name), gold="1")
    assert page.count("<article") == 1 and ("✓ right" in page or "✗ wrong" in page or (name == "nabla-reasoner" and "Refused" in page))


def test_every_endpoint_has_a_name_and_none_holds_a_model():
    from rlworkbench.apps.reasoning import build
    for event in build(Places("/nowhere")).fns.values():
        held = [c.cell_contents for c in getattr(event.fn, "__closure__", None) or ()]
        assert event.api_name and not any(isinstance(h, torch.nn.Module) for h in held), event.api_name
        assert ("asked" in event.api_name) == (event.concurrency_id == "model"), event.api_name


# ---- served

@pytest.fixture(scope="module")
def url(tmp_path_factory):
    from rlworkbench.apps.reasoning import build
    demo = build(Places(tmp_path_factory.mktemp("runs")))
    yield served(demo, wait=False)
    demo.close(verbose=False)


def test_endpoints_of_two_visitors(url):
    from gradio_client import Client
    one, two = (Client(url, verbose=False) for _ in range(2))
    for client, ways in ((one, ["greedy", "revised"]), (two, ["brief"])):
        client.predict(api_name="/reasoning")
        client.predict(7, api_name="/reasoning_problem")
        assert "Not asked yet" in str(client.predict(ways, api_name="/reasoning_strategies"))
    steps = [str(s) for s in one.submit(api_name="/reasoning_asked")]
    assert list(dict.fromkeys((s.count("Thinking …"), s.count("Its turn comes next")) for s in steps)) == [(1, 1), (1, 0), (0, 0)]
    assert steps[-1].count("tokens paid") == 2 and "brief" not in re.findall('data-way="(.*?)"', steps[-1])
    assert "Not asked yet" in str(two.predict(api_name="/reasoning_stop"))


@pytest.fixture
def page(window, url):
    return window(url)


def choose(page, *names):
    "Strategies in the menu, instead of those that are there."
    page.locator("#strategies .remove-all").click()
    for name in names:
        page.locator("#strategies input").fill(name)
        page.get_by_role("option", name=name, exact=True).click()
    page.keyboard.press("Escape")


@pytest.mark.browser
def test_recorded_then_two_strategies_asked_and_the_link_brings_them_back(page, url):
    from playwright.sync_api import expect
    page.goto(f"{url}/?__theme=dark")
    expect(page.locator("[data-way='self-consistency'] .rlw-votes tr")).to_have_count(2, timeout=15_000)
    assert page.evaluate("getComputedStyle(document.querySelector('.rlw-way')).backgroundColor") == "rgb(20, 23, 28)"
    expect(page.locator("[data-way='best-of-n-oracle'] header")).to_contain_text("oracle")
    expect(page.locator("#question img")).to_be_visible()
    expect(page.locator("#curve svg")).to_be_visible()

    expect(page.locator("#ask")).to_be_enabled(timeout=15_000)      # the address was read
    choose(page, "revised", "weighted-vote")
    expect(page.locator("#sides article")).to_have_count(2)
    page.locator("#problem input").fill("22")
    page.wait_for_function("location.search.includes('problem=22')", timeout=30_000)
    expect(page.locator("#sides .rlw-empty")).to_have_count(2)
    page.locator("#ask").click()
    for name in ("revised", "weighted-vote"):
        expect(page.locator(f"[data-way='{name}'] .rlw-result")).to_contain_text(re.compile("right|wrong"), timeout=60_000)
        expect(page.locator(f"[data-way='{name}'] .rlw-price")).to_contain_text(re.compile(r"\d+ of 136.*\d\.\d\d s", re.S))
        assert page.locator(f"[data-way='{name}'] .rlw-tries .rlw-t").count() > 5
    assert len({x.width for x in (type("B", (), b) for b in (page.locator(f"[data-way='{n}']").bounding_box() for n in ("revised", "weighted-vote")))}) == 1
    link, cards = page.url, page.locator("#sides .rlw-sides").inner_text()
    assert "strategies=revised%2Cweighted-vote" in link
    page.goto(link)
    expect(page.locator("[data-way='weighted-vote'] .rlw-result")).to_be_visible(timeout=20_000)
    assert page.locator("#sides .rlw-sides").inner_text() == cards and page.url == link
    page.goto(f"{url}/?strategies=nolan,gredy&task=text-sum&problem=0&budget=64")
    expect(page.locator("#says")).to_contain_text("did you mean greedy", timeout=15_000)
    expect(page.locator("[data-way='nolan']")).to_contain_text("but the question has none", timeout=60_000)
    expect(page.locator("#says")).to_contain_text("did you mean greedy")


@pytest.mark.browser
def test_stopped_between_two_strategies(page, url, monkeypatch):
    from playwright.sync_api import expect
    whole = thinking.think
    monkeypatch.setattr(thinking, "think", lambda *a: (time.sleep(2), whole(*a))[1])
    page.goto(f"{url}/")
    expect(page.locator("#ask")).to_be_enabled(timeout=15_000)
    choose(page, "forced", "restarted", "brief")
    page.locator("#seed input").fill("77")
    page.wait_for_function("location.search.includes('seed=77')")
    page.locator("#ask").click()
    expect(page.locator("[data-way='forced'] .rlw-result")).to_be_visible(timeout=30_000)
    page.locator("#stop").click()
    expect(page.locator("[data-way='brief']")).to_contain_text("Not asked yet", timeout=10_000)
    page.wait_for_timeout(3000)
    expect(page.locator("[data-way='brief']")).to_contain_text("Not asked yet")
    expect(page.locator("[data-way='forced'] .rlw-result")).to_be_visible()
    expect(page.locator("#ask")).to_be_enabled()


@pytest.mark.browser
def test_on_a_phone_cards_stand_below_each_other(page, url):
    page.set_viewport_size({"width": 390, "height": 800})
    page.goto(f"{url}/?__theme=dark")
    page.locator("#sides article").nth(3).wait_for(timeout=20_000)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    boxes = [page.locator("#sides article").nth(k).bounding_box() for k in range(4)]
    assert all(a["y"] + a["height"] <= b["y"] and a["x"] == b["x"] for a, b in zip(boxes, boxes[1:]))


def test_a_view_is_its_address():
    view = Asking("text-sum", 4, "greedy,nolan", 3, 64, "tiny", "segment")
    assert read_asking(asdict(view)) == view and read_asking(dict(p.split("=") for p in view.query.replace("%2C", ",").split("&"))) == view
