"""What the pages of the studio promise: a reset is a fresh start, a replay is told before it is made, two replies from anywhere share an axis, a link restores what is open, one colour means one thing."""
import gc
import html
import re
import statistics
import threading
import weakref
from dataclasses import replace

import pandas as pd
import pytest
import torch
from gradio_client import Client

from rlworkbench.core.formats import write_traces
from rlworkbench.serving import stepping
from rlworkbench.serving.board import COLUMNS as OF_A_STEP
from rlworkbench.serving.board import board
from rlworkbench.serving.deeds import asking, watched
from rlworkbench.serving.frame import bar, served, stylesheet, theme
from rlworkbench.serving.inspection import Inspection, asked, looked
from rlworkbench.serving.keys import STYLE
from rlworkbench.serving.live import Live
from rlworkbench.serving.moves import changed, handed_in
from rlworkbench.serving.pairs import beside, laid_beside, neighbours, second, second_of
from rlworkbench.serving.panels import COLUMNS, page_css, reply_html
from rlworkbench.serving.recorded import Recorded
from rlworkbench.serving.sessions import Sessions
from rlworkbench.serving.stepping import LIVE, Desk, Spot
from rlworkbench.serving.view import View, plain_view, view_of
from rlworkbench.training.run import Config
from tests.studio import server as server

BANDIT = Config(task="bandit", policy="table", steps=50, prompts=3, group=6, lr=.1, evaluate=0)
DIAL = ("grpo", "bandit", "table", 3, .1, 3, 6, None, None)


@pytest.fixture(scope="module")
def desk(server):
    return Inspection(server.places)


@pytest.fixture(scope="module")
def client(server):
    return Client(server.url, verbose=False)


def words(answer) -> str:
    return " ".join(map(str, answer if isinstance(answer, (list, tuple)) else [answer]))


# ---- reset

@pytest.mark.parametrize("recipe", ["grpo", "dapo", "kl_cov", "reinforce_pp"])
def test_after_a_reset_a_trainer_is_a_fresh_one_to_the_last_bit(recipe):
    config = replace(BANDIT, recipe=recipe, epochs=2)
    live, fresh = Live(config), Live(config)
    list(live.run(3)), live.fork("rloo"), list(live.run(2))
    for _ in range(4):
        live.next()
    said = live.reset()
    assert "before its first step" in said and "5 steps" in said and "the fork to rloo after step 3" in said
    assert (live.done, live.going, live.numbers(), live.rows(), live.kept(), live.config.recipe) == (0, None, [], [], [], recipe)
    list(live.run(4)), list(fresh.run(4))
    for n in fresh.numbers():
        pd.testing.assert_frame_equal(live.reading(n), fresh.reading(n))
    assert torch.equal(live.trainer.policy.table, fresh.trainer.policy.table)
    list(live.go(1))
    assert live.done == 1, "the steps before the fork that was given up can be gone back to"


def test_a_reset_that_fails_changes_nothing(monkeypatch):
    live = Live(BANDIT)
    list(live.run(2))
    before = live.reading(2)
    monkeypatch.setattr("rlworkbench.serving.live.new_trainer", lambda *a: (_ for _ in ()).throw(ValueError("gone")))
    with pytest.raises(ValueError, match="gone"):
        live.reset()
    assert live.done == 2 and live.reading(2) is before


# ---- what is made again is told first

def test_a_replay_is_told_before_anything_is_made():
    live = Live(BANDIT)
    list(live.run(6))
    weights = live.trainer.policy.table.detach().clone()
    going = live.go(2)
    assert next(going) == "Replaying 2 steps, 1 to 2 …" and live.doing and live.done == 6 and torch.equal(weights, live.trainer.policy.table)
    said = [*going]
    assert any(s.startswith("Replaying step 2, 1 of 2 steps made") for s in said) and said[-1] == "Back at step 2: replayed 2 steps from the state kept after step 0." and not live.doing
    list(live.run(3))
    assert next(live.go(4)) == "Going back to step 4: its state was kept."
    assert next(live.go(8)) == "Making 3 steps, 6 to 8 …"
    assert live.done == 5 and not live.doing, "a visitor who leaves after the first words leaves the trainer where it was"


def test_back_beyond_what_was_kept_says_so_too():
    live = Live(BANDIT)
    list(live.run(7))
    first = [next(live.retreat()) for _ in range(1)] + [[*live.retreat()][0] for _ in range(4)]
    assert [s.split()[0] for s in first] == ["Going"] * 4 + ["Replaying"] and live.done == 3


def test_the_page_shows_the_words_first(server):
    desk = Desk(server.places, Sessions(2))
    desk.begin("me", BANDIT)
    list(desk.live("me").run(6))
    going = watched(desk, Spot(LIVE), "me", lambda live: live.go(1), pause=99)
    first = next(going)
    assert "Replaying 1 step, 1 to 1" in first.note and "after step 6" in first.note
    assert "Back at step 1: replayed 1 step" in [*going][-1].note
    told = asking(desk, Spot("bandit/0", 6), "me", ["rloo"])
    assert "Replaying" in next(told) and "rlw-rivals" in next(told)


def test_reset_and_replay_over_the_wire(client):
    client.predict(*DIAL, api_name="/begin")
    assert "after step 6" in words(client.predict(6, api_name="/run_steps"))
    job = client.submit(2, api_name="/go")
    assert "Back at step 2: replayed 2 steps" in words(job.result(timeout=60))
    assert "Replaying 2 steps, 1 to 2" in words(job.outputs()[0]) and "after step 6" in words(job.outputs()[0])
    assert "Given up: 2 steps" in words(client.predict(api_name="/reset")) and "before its first step" in words(client.predict(api_name="/reset"))
    client.predict(api_name="/close")


# ---- a second reply from anywhere

def test_a_reply_beside_one_of_another_run_step_and_file(desk, tmp_path):
    one = View(run="recorded", reply=9)
    far = one.but(run2="second", step2=2, reply2=5)
    number, other = second(desk, far)
    page = beside(desk, far)
    assert number == 5 and other.place == "second, step 2, reply 5" and f"other: {other.place}" in page and "different problems" in page
    assert beside(desk, one.but(run2="recorded", reply2=9)).count("24 of 24 tokens stand in both") == (len(desk.exhibit(one).trace) == 24)
    same = one.but(run2="recorded", step2=1)
    assert second(desk, same)[0] in range(8, 16) and "different problems" not in beside(desk, same), "where none is named, one to the same problem"
    write_traces([desk.exhibit(one.but(reply=r)).trace for r in (20, 9)], tmp_path / "two.jsonl")
    kept = handed_in(desk, tmp_path / "two.jsonl").trace
    assert second(desk, one.but(trace2=kept))[0] == 1 and second(desk, one.but(trace2=kept, reply2=0))[1].trace.ids == desk.exhibit(one.but(reply=20)).trace.ids


def test_each_row_of_the_axis_holds_the_numbers_of_its_reply(desk):
    view = View(run="recorded", reply=9, run2="second", step2=1, reply2=0, column="surprise")
    page, rows = beside(desk, view), {}
    for piece, place, value in re.findall(r"<title>(.*?)  #(\d+)\n?(.*?)</title>", page, re.S):     # of each place first the row of the one, then that of the other
        rows.setdefault(int(place), []).append((piece, value))
    assert [*rows] == [*range(len(rows))] and {len(v) for v in rows.values()} == {2}
    for k, trace in enumerate((desk.exhibit(view).trace, second(desk, view)[1].trace)):
        there = [row[k] for row in rows.values() if row[k][1]]
        assert [html.unescape(p) for p, _ in there] == [repr(p) for p in trace.pieces]
        assert [float(v.split()[0].replace("−", "-")) for _, v in there] == pytest.approx([-v for v in trace.columns["logp"]], rel=1e-3, abs=1e-6)
    shared = sum(bool(a[1] and b[1]) for a, b in rows.values())
    assert f"{shared} of {len(rows)} tokens stand in both" in page


@pytest.mark.parametrize("away", [{"run2": "../x"}, {"run2": "nothing"}, {"trace2": "gone"}, {"run2": "second", "step2": 99}, {"run2": "second", "reply2": 99}, {"run2": "<script>"}])
def test_a_second_reply_that_is_not_there_is_a_sentence(desk, away):
    view = View(run="recorded").but(**away)
    page = laid_beside(desk, view)
    assert "rlw-note" in page and "<script" not in page and second_of(desk, view).replies in ((), second_of(desk, view.but(reply2=-1)).replies)


def test_the_second_reply_is_part_of_the_address_and_one_choice_replaces_the_other(desk):
    view = changed(changed(changed(View(run="recorded", reply=3), "run2", "second"), "step2", 2), "reply2", 1)
    assert view_of(dict(p.split("=") for p in view.query.split("&"))) == view == view_of(plain_view(view))
    assert (changed(view, "against", "tiny").run2, changed(view, "trace2", "k").run2, changed(view, "run2", "bandit/0").step2, changed(view, "step2", 1).reply2) == ("", "", -1, -1)
    assert changed(view, "reply", 4).run2 == "second" and changed(view, "run", "bandit/0").run2 == "second"
    assert ("policy second@000002", "second@000002") in neighbours(desk, View(run="recorded")), "checkpoints of other runs can be asked about this reply"
    assert "log-prob than tiny" in beside(desk, View(run="recorded", against="second@000002"))


def test_the_menus_over_the_wire(client):
    client.predict(api_name="/inspector_arrive")
    assert "second" in words(client.predict("another run", api_name="/beside_where"))
    assert "other: second, step 1, reply" in words(client.predict("second", api_name="/beside_run2"))
    assert "other: second, step 2, reply" in words(client.predict(2, api_name="/beside_step2"))
    found = words(client.predict(3, api_name="/beside_reply2"))
    assert "other: second, step 2, reply 3" in found and "reply2=3" in found


# ---- names of endpoints

def test_no_two_pages_share_the_name_of_an_endpoint(server):
    names = [f.api_name for f in server.demo.fns.values() if f.api_name and f.api_visibility != "private"]
    assert [n for n in names if re.search(r"_\d+$", n)] == [], "gradio numbers those that collide"
    assert {"stepper_arrive", "stepper_token", "inspector_arrive", "inspector_token"} <= {*names}


def test_a_program_chooses_a_token(server, client):
    client.predict(api_name="/stepper_arrive")
    client.predict(4, api_name="/scrub")
    client.predict(2, api_name="/pick")
    table = Recorded(server.places.open("recorded")).reading(4)
    row = table[table["group"] == 2].iloc[5]
    found = words(client.predict(int(row["reply"]), int(row["position"]), api_name="/stepper_token"))
    assert f"token {row['position'] + 1} of" in found and f"step=4&phase=update&group=2&reply={row['reply']}&token={row['position']}" in found
    client.predict(api_name="/inspector_arrive")
    client.predict(6, api_name="/reply")
    assert "token 5 of" in words(client.predict(0, 4, api_name="/inspector_token")) and "token=4" in words(client.predict(0, 4, api_name="/inspector_token"))
    assert "patch=14" in words(client.predict(14, api_name="/patch"))


# ---- one colour, one meaning

def test_the_sign_of_a_number_has_its_colours_to_itself():
    pages = stylesheet().partition("/* lab */")[0] + STYLE + page_css()
    used = [(s.strip(), body) for s, body in re.findall(r"([^{}]+)\{([^{}]*var\(--rlw-(?:positive|negative)\)[^{}]*)\}", pages)]
    assert used and {s for s, _ in used} <= {".rlw-positive,.rlw-negative", ".rlw-negative", ".rlw-ways .positive", ".rlw-ways .negative"}, used
    painted = [k for k, v in vars(theme()).items() if isinstance(v, str) and re.search("--rlw-(positive|negative|run-|amount)", v)]
    assert painted == [] and theme().button_primary_background_fill == "var(--rlw-accent)" == theme().slider_color_dark
    hosts = re.search(r"([^{}]*)\{--rlw-accent:var\(--rlw-ink\)\}", stylesheet())[1]
    assert ":root" in hosts and ".dark" in hosts, "in the dark the page's own colour is that of the dark ink"


def shades(page: str, strip: int) -> list:
    "(classes, how much of the colour) of the tokens of a strip."
    found = re.findall(r'<span class="([^"]*)"( style="[^"]*")? role="option"[^>]*data-strip="(\d+)"', page)
    return [(a, b) for a, b, s in found if int(s) == strip]


@pytest.mark.parametrize("name", [n for n in OF_A_STEP if n != "change"])
def test_a_token_looks_the_same_on_both_pages(server, desk, name):
    source, drawn = Recorded(server.places.open("recorded")), 0
    for step in (1, 6):
        table = source.reading(step)
        group = int(table.loc[OF_A_STEP[name].of(table).abs().idxmax(), "group"])
        page = board(table, source, "update", group, name)
        for reply in sorted(set(table.loc[table["group"] == group, "reply"])):
            trace = desk.exhibit(View(run="recorded", step=step, reply=reply)).trace
            here, there = shades(page, reply), shades(reply_html(trace, name), 0)
            assert here == there and len(here) == len(trace)
            drawn += sum("--a" in s for _, s in here)
    assert drawn and (COLUMNS[name].limit, COLUMNS[name].kind, COLUMNS[name].label) == (OF_A_STEP[name].limit, OF_A_STEP[name].kind, OF_A_STEP[name].label)


def test_each_column_with_numbers_has_a_fixed_scale_and_the_others_say_so(desk):
    assert {n for n, c in COLUMNS.items() if c.limit is None} == {"segment"}
    trace = desk.exhibit(View(run="recorded", reply=1)).trace
    low, high = (reply_html(replace(trace, columns=trace.columns | {"entropy": [v] * len(trace), "mine": [v] * len(trace)}), "entropy") for v in (.3, .6))
    legend = re.compile(r'<div class="rlw-head">.*?</div>', re.S)
    assert legend.search(low)[0] == legend.search(high)[0] and shades(low, 0) != shades(high, 0)
    assert "mine, on a scale of its own" in reply_html(replace(trace, columns={"mine": [2.0] * len(trace)}), "mine")


# ---- what visitors hold

def test_a_page_that_goes_while_its_trainer_is_made_leaves_none(server, monkeypatch):
    desk, begun, gone, made, said = Desk(server.places, Sessions(2)), threading.Event(), threading.Event(), [], []
    class Slow(Live):
        def __init__(self, config):
            super().__init__(config)
            made.append(weakref.ref(self))
            begun.set()
            assert gone.wait(20)
    def visit():
        try:
            desk.begin("me", BANDIT)
        except ValueError as e:
            said.append(str(e))
    for again in (False, True):       # the first trainer of a page, and one in place of another
        if again:
            desk.begin("me", BANDIT)
        monkeypatch.setattr(stepping, "Live", Slow)
        thread = threading.Thread(target=visit)
        thread.start()
        assert begun.wait(20)
        desk.leave("me")
        gone.set()
        thread.join(20)
        gc.collect()
        assert len(desk.trainers) == 0 and [ref() for ref in made] == [None] * len(made) and "the page went" in said[-1]
        begun.clear(), gone.clear()
        monkeypatch.undo()
    assert len(made) == 2 and desk.begin("me", BANDIT) is desk.live("me"), "the page may come back"


# ---- go on with, pages alone

def test_what_a_branch_goes_on_with_is_the_best_that_was_not_written(desk):
    seen = set()
    for reply in range(10):
        view = View(run="recorded", reply=reply)
        _, _, _, trace, reading, _ = looked(desk, view)
        odd = [i for i, top in enumerate(reading.top) if top[0][0] != trace.ids[i]][:1] or [0]
        for at in odd:
            a = asked(desk, view.but(token=at))
            best = next(i for i, _, _ in reading.top[at] if i != trace.ids[at])
            assert a.instead == str(best) and a.instead in [v for _, v in a.choices]
            assert ["◂ written" in label for label, v in a.choices] == [v == str(trace.ids[at]) for _, v in a.choices]
            seen.add(reading.top[at][0][0] == trace.ids[at])
    assert seen == {True, False}, "both where the written token was the likeliest and where it was not"


@pytest.mark.parametrize("name, arrive", [("stepper", "/stepper_arrive"), ("inspector", "/inspector_arrive"), ("compare", "/compare_start")])
def test_a_page_alone_links_to_no_page_that_is_not_there(server, name, arrive):
    import importlib
    demo = importlib.import_module(f"rlworkbench.apps.{name}").build(server.places, alone=True)
    try:
        page = words(Client(served(demo, wait=False), verbose=False).predict(api_name=arrive)) + str(demo.get_config_file())
        assert "alone; " in page and 'href="/' not in page and "href=/" not in page
    finally:
        demo.close(verbose=False)
    assert bar(name).count('href="/') > 3 and "alone" not in bar(name)


# ---- a real browser

@pytest.fixture
def page(window, server):
    return window(server.url)


@pytest.mark.browser
def test_a_link_restores_what_is_open(page, server):
    from playwright.sync_api import expect
    page.goto(f"{server.url}/inspector?run=recorded&step=2&reply=3&run2=second&step2=2&reply2=1&open=beside,lenses,nonsense")
    expect(page.locator("#both")).to_contain_text("other: second, step 2, reply 1", timeout=20_000)
    expect(page.locator("#depths")).to_contain_text("What each depth would say", timeout=20_000)
    assert page.locator("#make").is_hidden()
    page.locator("#lenses .label-wrap").click()
    page.locator("#export .label-wrap").click()
    page.wait_for_url("**&open=beside,export")
    link = page.url
    page.reload()
    expect(page.locator("#make")).to_be_visible(timeout=20_000)
    expect(page.locator("#both")).to_contain_text("other: second, step 2, reply 1", timeout=20_000)
    page.wait_for_timeout(300)
    assert page.url == link

    page.goto(f"{server.url}/stepper?run=recorded&step=4&open=whatif")
    expect(page.locator("#names")).to_contain_text("dapo", timeout=20_000)       # open, and filled for this run
    page.wait_for_url("**&open=whatif")
    page.locator("#step-after").click()
    page.wait_for_url("**step=5**open=whatif")

    page.goto(f"{server.url}/compare?runs=bandit%2F0&column=entropy&open=papers")
    expect(page.get_by_role("tab", name="Papers")).to_have_attribute("aria-selected", "true", timeout=20_000)
    expect(page.locator("a[href*='arxiv.org']").first).to_be_visible(timeout=20_000)
    page.get_by_role("tab", name="Claims").click()
    page.wait_for_url("**/compare?runs=bandit%2F0&column=entropy&open=claims")
    page.get_by_role("tab", name="Runs").click()
    page.wait_for_url("**/compare?runs=bandit%2F0&column=entropy")


@pytest.mark.browser
def test_reset_and_replay_on_the_page(page, server):
    from playwright.sync_api import expect
    page.goto(f"{server.url}/stepper?run=recorded&open=settings")
    expect(page.locator("#board [data-token]").first).to_be_visible(timeout=20_000)
    for label, value in (("task", "bandit"), ("policy", "table")):
        page.get_by_label(label, exact=True).click()
        page.get_by_label(label, exact=True).fill(value)
        page.get_by_role("option", name=value, exact=True).click()
    page.locator("#start").click()
    expect(page.locator("#note")).to_contain_text("before its first step", timeout=20_000)
    page.locator("#run-steps").click()
    expect(page.locator("#note")).to_contain_text("after step 5", timeout=20_000)
    page.evaluate("""() => { window.said = []; new MutationObserver(() => window.said.push(document.querySelector('#note').innerText))
                     .observe(document.querySelector('#note'), {childList: true, subtree: true, characterData: true}) }""")
    page.locator("#target input").fill("1")
    page.locator("#go").click()
    expect(page.locator("#note")).to_contain_text("Back at step 1: replayed 1 step", timeout=20_000)
    said = page.evaluate("window.said")
    first = next(k for k, s in enumerate(said) if "Replaying 1 step, 1 to 1" in s)
    assert "after step 5" in said[first] and not any("Back at" in s for s in said[:first + 1])
    page.locator("#reset").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#note")).to_contain_text("Reset: the trainer stands before its first step", timeout=20_000)
    page.keyboard.press("Enter")                       # the button keeps the focus; pressed again it gives up nothing more
    page.locator("h1").click()
    page.keyboard.press(" ")
    expect(page.locator(".rlw-phases .now")).to_have_text("sample", timeout=20_000)
    page.get_by_role("button", name="close trainer").click()
    expect(page.locator("#note")).to_contain_text("Recorded run", timeout=20_000)


TIMED = """([where, before]) => { const box = document.querySelector(where), t = window.timed = {};
const seen = () => { if (t.end === undefined && box.innerHTML !== before) { t.end = 0; requestAnimationFrame(() => requestAnimationFrame(() => { t.end = performance.now(); })); } };
new MutationObserver(seen).observe(box, {childList: true, subtree: true, characterData: true});
for (const what of ['keydown', 'pointerdown']) document.addEventListener(what, () => { t.start ??= performance.now(); }, {capture: true, once: true}); }"""


def milliseconds(page, where: str, act) -> float:
    "From the key or the button pressed until the answer is painted."
    page.evaluate(TIMED, [where, page.inner_html(where)])
    act()
    page.wait_for_function("window.timed.end > 0", timeout=10_000)
    taken = page.evaluate("window.timed.end - window.timed.start")
    page.wait_for_timeout(150)
    return taken


@pytest.mark.browser
def test_scrub_and_click_answer_within_a_fifth_of_a_second(page, server):
    page.goto(f"{server.url}/stepper?run=recorded&step=1")
    page.locator("#board [data-token]").first.wait_for(timeout=20_000)
    page.wait_for_url("**step=1&**")
    page.locator("h1").first.click()
    scrub = [milliseconds(page, "#board", lambda: page.keyboard.press("ArrowRight")) for _ in range(9)]
    click = [milliseconds(page, "#card", lambda k=k: page.locator("#board .rlw-step-reply").nth(k).locator("[data-token]").nth(3 + k % 2).click()) for k in range(7)]
    page.goto(f"{server.url}/inspector?run=recorded&reply=3")
    page.locator("#map [data-token]").first.wait_for(timeout=20_000)
    page.wait_for_timeout(500)
    token = [milliseconds(page, "#card", lambda k=k: page.locator("#reply [data-strip='0']").nth(1 + 2 * k).click()) for k in range(7)]
    found = {"scrub": scrub, "click": click, "token": token}
    assert all(statistics.median(v) < 200 for v in found.values()), found


@pytest.mark.browser
def test_the_swatches_of_a_legend_stand_in_one_line(page, server):
    page.goto(f"{server.url}/inspector?run=recorded&reply=3")
    page.locator("#reply .rlw-key").first.wait_for(timeout=20_000)
    assert page.evaluate("document.querySelector('#reply .rlw-head > span').getBoundingClientRect().height") < 24
