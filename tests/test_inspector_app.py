"""The trace inspector: its endpoints, and a real browser that draws, asks, clicks, branches, takes along and comes back by a link."""
import time
from pathlib import Path

import pytest

from rlworkbench.core.formats import write_traces
from rlworkbench.core.imports import open_traces
from rlworkbench.core.trace import Trace
from rlworkbench.serving.frame import served
from rlworkbench.serving.inspection import Inspection, asked, shown
from rlworkbench.serving.moves import files, handed_in
from rlworkbench.serving.pairs import beside
from rlworkbench.serving.places import Places
from rlworkbench.serving.view import View
from tests.studio import models_in
from tests.studio import server as server

NASTY = ["<script>document.title='broken'</script>", "<img src=x onerror=\"document.title='broken'\">", "{{value}}", "${document.title='broken'}", "\u202egnorts", "👩‍👩‍👧", "\0"]


@pytest.fixture
def desk(tmp_path):
    return Inspection(Places(tmp_path))


def nasty(n=10_000) -> Trace:
    return Trace(NASTY[0], NASTY[1], pieces=[NASTY[k % 7] for k in range(n)], columns={"entropy": [k % 5 / 5 for k in range(n)], NASTY[0]: [1.0] * n}, why=NASTY[1], meta={"x": NASTY[0]})


def test_a_long_and_hostile_trace_is_drawn_in_bounded_time_and_stays_text(desk, tmp_path):
    write_traces([nasty()], tmp_path / "n.jsonl")
    began = time.perf_counter()
    view = handed_in(desk, tmp_path / "n.jsonl").but(token=9_999)
    panels = shown(desk, view)
    assert time.perf_counter() - began < 5
    page = "".join([panels.says, panels.reply, panels.checks, panels.token])
    assert len(page) < 500_000 and "of 10,000 are drawn" in page and "word 10,000 of 10,000" in page
    assert not [bad for bad in ("<script", "<img", "\u202e", "\0") if bad in page]
    began = time.perf_counter()
    links = files(desk, view)
    assert time.perf_counter() - began < 10 and links.count("<a class") == 3 and "<script" not in links


@pytest.mark.parametrize("text, said", [("", "is empty"), ("{", "not JSON"), ("[1]", "looked for traces"), ('{"trace": 99, "id": "a"}', "upgrade it"), ("PAR1", "can't be read as parquet"), ("PAR1" + "x" * 40, "can't be read as parquet")])
def test_a_file_that_holds_no_traces_is_a_sentence_without_paths(desk, tmp_path, text, said):
    file = tmp_path / "mine.parquet"
    file.write_text(text)
    with pytest.raises(ValueError) as e:
        handed_in(desk, file)
    assert said in str(e.value) and str(tmp_path) not in str(e.value)


@pytest.mark.parametrize("run", ["..", "../recorded", "/etc", "%2e%2e/x", "recorded/../recorded", "x" * 999, "a\0"])
def test_a_run_elsewhere_is_refused(desk, run):
    assert "rlw-error" in shown(desk, View(run=run)).says and asked(desk, View(run=run)).wrong


def test_a_policy_by_another_name_is_not_loaded(desk):
    for key in ("/tmp/x", "someone/model", "../a@1", "recorded@000001"):
        wrong = asked(desk, View(run="recorded", policy=key)).wrong
        assert wrong and str(Path("/tmp")) not in wrong.replace(key, "")
        assert "rlw-note" in beside(desk, View(run="recorded", against=key))


def test_a_table_says_what_it_can_say(server):
    desk = Inspection(server.places)
    found = asked(desk, View(run="bandit/0"))
    assert found.top and "no Hugging Face model" in found.wrong and not found.map


def test_two_checkpoints_of_a_run(server):
    desk = Inspection(server.places)
    policies = shown(desk, View(run="second")).policies
    assert len(policies) >= 2 and policies[-1] == "tiny"
    assert "log-prob than" in beside(desk, View(run="second", policy=policies[0], against="tiny"))


def test_a_click_is_quick(desk):
    view = View(run="recorded", reply=2, token=3)
    shown(desk, view), asked(desk, view)
    slow = {}
    for method in ("input-x-gradient", "rollout"):
        began = time.perf_counter()
        assert asked(desk, view.but(token=5, method=method)).map
        slow[method] = time.perf_counter() - began
    began = time.perf_counter()
    shown(desk, view.but(token=6))
    assert time.perf_counter() - began < .2 and max(slow.values()) < 1, slow


def test_every_endpoint_has_a_name_and_none_holds_a_model():
    from rlworkbench.apps.inspector import build
    demo = build(Places("/nowhere"))
    assert models_in(demo) == []
    for event in demo.fns.values():
        assert event.api_name
        assert ("asked" in event.api_name) <= (event.concurrency_id == "model"), event.api_name


def test_endpoints_of_two_visitors(server):
    from gradio_client import Client
    from rlworkbench.apps.inspector import build
    alone = build(server.places)
    try:
        url = served(alone, wait=False)
        one, two = (Client(url, verbose=False) for _ in range(2))
        for client, reply in ((one, 1), (two, 3)):
            client.predict(api_name="/inspector_arrive")
            assert f"recorded, step 1, reply {reply}" in str(client.predict(reply, api_name="/reply"))
        assert "rlw-top" in str(one.predict(api_name="/reply_asked")) and str(one.predict(api_name="/files")).count("<a class") == 3
        for client, reply in ((one, 1), (two, 3)):
            assert f"reply={reply}" in str(client.predict("token", "rollout", api_name="/part"))
    finally:
        alone.close(verbose=False)


# ---- a real browser

@pytest.fixture
def page(window, server):
    return window(server.url)


def draw_one(page):
    "Seven, one and one: strokes on the canvas."
    box = page.locator("#canvas canvas").bounding_box()
    x, y = box["x"], box["y"]
    for points in ([(50, 25), (105, 25), (75, 115)], [(185, 22), (185, 115)], [(290, 22), (290, 115)]):
        page.mouse.move(x + points[0][0] * box["width"] / 400, y + points[0][1] * box["height"] / 140)
        page.mouse.down()
        for a, b in points[1:]:
            page.mouse.move(x + a * box["width"] / 400, y + b * box["height"] / 140, steps=8)
        page.mouse.up()


@pytest.mark.browser
def test_draw_ask_click_branch_take_along_and_come_back(page, server, tmp_path):
    from playwright.sync_api import expect
    page.goto(f"{server.url}/inspector?__theme=dark")
    expect(page.locator("#says")).to_contain_text("recorded, step 1", timeout=15_000)
    expect(page.locator("#map [data-token]").first).to_be_visible(timeout=15_000)
    assert page.evaluate("getComputedStyle(document.querySelector('#reply .rlw-strip')).backgroundColor") == "rgb(20, 23, 28)"

    page.get_by_label("a drawing").check()
    expect(page.locator("#canvas canvas")).to_be_visible()
    page.locator("#ask").click()
    expect(page.locator("#trouble")).to_contain_text("draw one to five digits")
    draw_one(page)
    expect(page.locator("#seen img")).to_be_visible()
    page.locator("#truth textarea, #truth input").first.fill("711")
    page.locator("#ask").click()
    expect(page.locator("#says")).to_contain_text("an answer of tiny", timeout=15_000)
    expect(page.locator("#checks")).to_contain_text("the answer is 9")

    page.locator("#reply [data-strip='0'][data-token='2']").click()
    expect(page.locator("#card")).to_contain_text("token 3 of")
    expect(page.locator("#why")).to_contain_text("by input-x-gradient", timeout=10_000)
    before = page.locator("#map img").get_attribute("src")
    page.locator("#reply [data-strip='0'][data-token='2']").press("ArrowRight")
    expect(page.locator("#card")).to_contain_text("token 4 of")
    expect(page.locator("#map img")).not_to_have_attribute("src", before, timeout=10_000)
    assert page.locator("#map [data-token]").count() == 36
    page.locator("#map [data-token='14']").click()
    page.wait_for_function("location.search.includes('patch=14')")

    page.locator("#branch").click()
    expect(page.locator("#reply")).to_contain_text("Branch 1 leaves at token 4", timeout=15_000)
    page.wait_for_function("location.search.includes('branches=3.')")
    page.get_by_text("Take it along").click()
    page.locator("#make").click()
    link = page.locator("#files a[download$='.adp.json']")
    expect(link).to_be_visible(timeout=15_000)
    read = {}
    for ending, links in ((".adp.json", "[download$='.adp.json']"), (".json", "[download$='.json']:not([download$='.adp.json'])")):
        with page.expect_download() as got:
            page.locator(f"#files a{links}").click()
        got.value.save_as(tmp_path / f"x{ending}")
        read[ending], = open_traces(tmp_path / f"x{ending}")
    assert len({tuple(t.ids) for t in read.values()}) == 1 and read[".json"].images[0].size == (48, 48)

    asked_of, reply = page.url, page.locator("#reply .rlw-text").all_inner_texts()
    page.goto(asked_of)
    expect(page.locator("#reply")).to_contain_text("Branch 1 leaves at token 4", timeout=15_000)
    assert page.locator("#reply .rlw-text").all_inner_texts() == reply and page.url == asked_of


@pytest.mark.browser
def test_a_hostile_file_stays_text_and_a_broken_one_is_told(page, server, tmp_path):
    from playwright.sync_api import expect
    write_traces([nasty(600)], tmp_path / "n.jsonl")
    (tmp_path / "b.jsonl").write_text("{")
    page.goto(f"{server.url}/inspector")
    expect(page.locator("#map [data-token]").first).to_be_visible(timeout=20_000)
    page.get_by_label("a file").check()
    page.locator("#file input[type=file]").set_input_files(tmp_path / "b.jsonl")
    expect(page.locator("#file-says")).to_contain_text("not JSON", timeout=15_000)
    page.goto(f"{server.url}/inspector")
    expect(page.locator("#map [data-token]").first).to_be_visible(timeout=20_000)
    page.get_by_label("a file").check()
    page.locator("#file input[type=file]").set_input_files(tmp_path / "n.jsonl")
    expect(page.locator("#says")).to_contain_text("600 words", timeout=15_000)
    expect(page.locator("#reply")).to_contain_text("{{value}}")
    expect(page.locator("#reply")).to_contain_text("${document.title='broken'}")
    expect(page.locator("#wrong")).to_contain_text("no policy here can read it back", timeout=15_000)
    assert page.title() != "broken" and page.locator("#reply img, #reply script").count() == 0


@pytest.mark.browser
def test_on_a_phone_nothing_is_wider_than_the_page(page, server):
    page.set_viewport_size({"width": 390, "height": 800})
    page.goto(f"{server.url}/inspector?run=recorded&step=2&reply=4&token=5")
    page.locator("#map [data-token]").first.wait_for(timeout=20_000)
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    assert "token 6 of" in page.locator("#card").inner_text() and "step 2, reply 4" in page.locator("#says").inner_text()
