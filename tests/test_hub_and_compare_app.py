"""The first page, the comparison and the stepper inside of the studio, as a real browser sees them: what is on screen, where links lead, light and dark, nothing from elsewhere."""
import re

import pytest

from rlworkbench.claims.index import committed
from rlworkbench.core.registry import claims
from rlworkbench.serving.places import shipped
from rlworkbench.training.run import Run
from tests.studio import server as server

pytestmark = pytest.mark.browser


@pytest.fixture
def seen(window, server):
    "A function: a page of the studio in a context of its own."
    def look(path: str, **how):
        page = window(server.url, **how)
        page.goto(server.url + path)
        return page
    return look


def lightness(page, of: str) -> tuple:
    "How light the ink and the paper of an element are, 0 to 255."
    def one(what):
        found = page.evaluate(f"""() => {{let e = document.querySelector({of!r}), c;
            do {{c = getComputedStyle(e).{what}; e = e.parentElement}} while (e && {str(what == 'backgroundColor').lower()} && /, 0\\)/.test(c)); return c}}""")
        return sum(map(float, re.findall(r"[\d.]+", found)[:3])) / 3
    return one("color"), one("backgroundColor")


def test_the_first_page_shows_the_recorded_run_the_other_runs_and_where_to_go(seen, server):
    from playwright.sync_api import expect
    page, run = seen("/"), Run.open(shipped())
    expect(page.locator("#hub h1")).to_have_text("The recorded run", timeout=20_000)
    after = run.read("result.json")["after"]
    expect(page.locator("#hub")).to_contain_text(f"{after['greedy']:.2f} [{after['greedy_low']:.2f}, {after['greedy_high']:.2f}] after, {after['n']} problems")
    assert page.locator("#hub .rlw-problem img").count() == run.config.prompts and page.locator("#hub figure svg").count() == 3
    tokens = run.tokens(3)
    group = tokens[tokens["group"] == tokens.groupby("group")["reward"].std().idxmax()]
    first = page.locator("#hub .rlw-first [data-token]").all_inner_texts() or page.locator("#hub .rlw-first .rlw-strip span[title]").all_inner_texts()
    said = {"".join(r["piece"]) for _, r in group.groupby("reply")}
    assert "".join(t.strip("∅") for t in first).replace("\n", "")[:12] in {s[:12] for s in said}
    rows = page.locator("#hub table.rlw-table tr")
    assert {n for n in server.places.names()} <= {r.split("\t")[0].strip() for r in rows.all_inner_texts()}
    assert rows.filter(has_text="second").locator(".rlw-state").first.inner_text() == "✓ done"

    rows.filter(has_text="second").locator("a").first.click()               # another run, by its link
    expect(page.locator("#hub h1")).to_have_text("second", timeout=20_000)
    assert page.url.endswith("/?run=second")
    page.locator("a.rlw-card", has_text="Training stepper").click()          # and on to a page, with the run
    expect(page.locator("#note")).to_contain_text("2 problems × 4 replies a step", timeout=20_000)
    page.wait_for_url("**run=second&step=1&phase**")
    page.locator(".rlw-bar a", has_text="Trace inspector").click()
    expect(page.locator("#says")).to_contain_text("second, step 1", timeout=20_000)
    expect(page.locator("#map [data-token]").first).to_be_visible(timeout=20_000)


def test_a_wrong_link_is_a_sentence_and_the_recorded_run_stays(seen):
    from playwright.sync_api import expect
    page = seen("/?run=../../etc")
    expect(page.locator("#hub [role=alert]")).to_contain_text("is not the name of a run", timeout=20_000)
    expect(page.locator("#hub h1")).to_have_text("The recorded run")


def test_two_runs_are_chosen_and_laid_over_each_other(seen, server):
    from playwright.sync_api import expect
    page = seen("/compare?runs=bandit/0;bandit/1;bandit/2&column=entropy")
    shown = page.locator("#compared")
    expect(shown).to_contain_text("bandit/0, bandit/1, bandit/2", timeout=20_000)
    assert shown.locator("svg path, svg polygon").count() >= 2 and shown.locator("svg polyline, svg path").count() >= 1
    expect(shown).to_contain_text("band: 95 % interval of the mean")
    band = shown.locator("svg [fill-opacity], svg [opacity], svg .band").count()
    assert band >= 1, "three seeds have no band"
    expect(shown).to_contain_text("There is one arm only")

    page.get_by_label("runs", exact=True).click()                            # a second arm, from the menu
    assert {"recorded", "second", "bandit/rloo"} <= {o.strip(" ✓\n") for o in page.get_by_role("option").all_inner_texts()}
    page.get_by_role("option", name="bandit/rloo").click()
    page.keyboard.press("Escape")
    table = shown.locator("h2:has-text('Slots that differ') + .rlw-scroll table")
    expect(table).to_contain_text("group_zscore", timeout=20_000)
    rows = [r.split("\t") for r in table.locator("tr").all_inner_texts()]
    assert rows[0][1:] == ["grpo", "rloo"] and "advantage" in [r[0] for r in rows] and all(r[1] != r[2] for r in rows[1:])
    numbers = [r.split("\t") for r in shown.locator("h2:has-text('In numbers') + .rlw-scroll tr").all_inner_texts()]
    assert re.fullmatch(r"[\d.]+ \[[\d.]+, [\d.]+\]", numbers[1][3].strip()) and "[" not in numbers[2][3]     # three seeds have an interval, one has none
    page.wait_for_url(re.compile("runs=bandit.*rloo.*column=entropy"))
    link = page.url
    page.goto(link)                                                          # the link brings all of it back
    expect(page.locator("#compared")).to_contain_text("group_zscore", timeout=20_000)
    assert "overlay" in page.locator("#compared .rlw-overlay").get_attribute("class")


def test_the_recorded_run_is_what_a_comparison_begins_with(seen):
    from playwright.sync_api import expect
    page = seen("/compare")
    expect(page.locator("#compared")).to_contain_text("recorded", timeout=20_000)
    assert page.locator("#compared svg").count() >= 1 and "second" in page.locator("#compared").inner_text()


def test_claims_stand_there_with_their_verdicts_and_papers_with_their_links(seen):
    from playwright.sync_api import expect
    page = seen("/compare")
    expect(page.locator("#compared svg").first).to_be_visible(timeout=20_000)
    page.get_by_role("tab", name="Claims").click()
    panel = page.get_by_role("tabpanel").filter(has_text="rlworkbench reproduce")
    expect(panel).to_be_visible(timeout=30_000)
    said = dict(h.split(" ", 1) for h in panel.locator("article h2").all_inner_texts())
    assert said == {name: (committed(name) or {"verdict": "not run"})["verdict"] for name in claims.all()}
    told = [c for name in claims.all() for kind in ("comparisons", "controls") for c in (committed(name) or {}).get(kind, ())]
    assert panel.locator("article svg").count() == len(told) > 20 and "not supported at this scale" in said.values() and "supported" in said.values()
    page.get_by_role("tab", name="Papers").click()
    papers = page.get_by_role("tabpanel").filter(has_text="GRPO").last
    expect(papers.locator("a[href*='arxiv.org/abs/2402.03300']").first).to_be_visible(timeout=20_000)
    assert papers.locator("a[href*='arxiv.org']").count() > 20


@pytest.mark.parametrize("path, of", [("/", "#hub h1"), ("/compare?runs=recorded;second", "#compared h2")])
def test_dark_is_dark_light_is_light_and_a_phone_can_read_it(seen, path, of):
    for scheme in ("light", "dark"):
        page = seen(path, color_scheme=scheme)
        page.locator(of).first.wait_for(timeout=20_000)
        ink, paper = lightness(page, of)
        assert (ink < 90 and paper > 200) if scheme == "light" else (ink > 180 and paper < 60)
    page = seen(path, viewport={"width": 390, "height": 800})
    page.locator(of).first.wait_for(timeout=20_000)
    assert page.evaluate("document.documentElement.scrollWidth") <= 400


def test_the_stepper_inside_the_studio(seen):
    from playwright.sync_api import expect
    page = seen("/stepper?run=recorded&step=4&group=2")
    at, now = lambda name: page.locator(f"#{name}"), page.locator(".rlw-phases .now")
    page.wait_for_url("**step=4&phase=update&group=2**")
    expect(at("note")).to_contain_text("Recorded run: grpo on digits-sum", timeout=30_000)
    page.locator("h1").click()
    page.keyboard.press("ArrowRight")
    page.wait_for_url("**step=5**")
    at("board").locator("[data-token='3']").first.click()
    expect(at("card")).to_contain_text("token 4 of")
    page.wait_for_url("**token=3**")
    page.reload()
    expect(at("card")).to_contain_text("token 4 of", timeout=30_000)

    page.get_by_role("button", name="Settings of the trainer").click()
    for label, value in (("task", "bandit"), ("policy", "table")):
        box = page.get_by_label(label, exact=True)
        box.click()
        box.fill(value)
        page.get_by_role("option", name=value, exact=True).click()
    page.get_by_label("learning rate").fill("0.1")
    at("start").click()
    expect(at("note")).to_contain_text("before its first step", timeout=20_000)
    page.locator("h1").click()
    for phase in ("sample", "rescore", "reward", "shape", "keep", "advantage", "forward", "loss", "gradient", "update"):
        page.keyboard.press(" ")
        expect(now).to_have_text(phase, timeout=20_000)
    at("step-live").click()
    expect(at("note")).to_contain_text("after step 2", timeout=20_000)
    at("back").click()
    expect(at("note")).to_contain_text("Back at step 1", timeout=20_000)
    page.get_by_role("button", name="What would another recipe").click()
    box = at("names").locator("input")
    box.click()
    box.fill("rloo")
    page.get_by_role("option", name="rloo", exact=True).click()
    at("step-live").click()
    expect(at("note")).to_contain_text("after step 2", timeout=20_000)
    at("ask").click()
    expect(at("answer")).to_contain_text("Slots that differ", timeout=20_000)
    at("reset").click()
    expect(at("note")).to_contain_text("before its first step", timeout=20_000)
    at("close").click()
    expect(at("note")).to_contain_text("Recorded run", timeout=20_000)
    page.locator(".rlw-bar a", has_text="Compare").click()
    expect(page.locator("#compared svg").first).to_be_visible(timeout=20_000)
