"""The training stepper: what it shows is what the steps hold, a trainer goes forth and back, two visitors never meet, and a real browser goes through it all."""
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import pytest

from rlworkbench.serving.board import COLUMNS, board
from rlworkbench.serving.card import card
from rlworkbench.serving.deeds import arrived, asked, attempted, long_run, watched
from rlworkbench.serving.frame import served
from rlworkbench.serving.live import Live
from rlworkbench.serving.places import Places
from rlworkbench.serving.recorded import Recorded
from rlworkbench.serving.sessions import Sessions
from rlworkbench.serving.stepping import LIVE, Desk, Spot, moved, shown
from rlworkbench.training.run import Config
from tests.studio import models_in, some_runs

BANDIT = Config(task="bandit", policy="table", steps=50, prompts=3, group=6, lr=.1, evaluate=0)


def told(text: str) -> float:
    return float(text.replace("−", "-").replace("+", "").replace(",", "").split(" ")[0])


def on_tokens(page: str) -> list:
    "(strip, token, value) of each token that says a value."
    return [(int(a), int(b), told(v)) for a, b, v in re.findall(r'data-strip="(\d+)" data-token="(\d+)" title="[^"]*?#\d+\n([^"\n]+)', page)]


@dataclass(frozen=True)
class Alone:
    "The page by itself, on a folder of runs."
    url: str
    runs: Path
    places: Places


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    from rlworkbench.apps.stepper import build
    runs = tmp_path_factory.mktemp("studio") / "runs"
    some_runs(runs)
    places = Places(runs)
    demo = build(places)
    yield Alone(served(demo, wait=False), runs, places)
    demo.close(verbose=False)


@pytest.fixture
def desk(server):
    return Desk(server.places, Sessions(2))


@pytest.fixture(scope="module")
def recorded(server):
    return Recorded(server.places.open("recorded"), "recorded")


@pytest.mark.parametrize("name", [n for n in COLUMNS if n != "change"])
def test_a_board_of_the_recorded_run_says_the_numbers_of_its_file(recorded, name):
    for number in recorded.numbers()[:3]:
        table = recorded.reading(number)
        group = table.loc[table["push"].abs().idxmax(), "group"]
        part = table[table["group"] == group]
        found = on_tokens(board(table, recorded, "update", group, name))
        assert len(found) == len(part)
        wanted = {(r, p): v for r, p, v in zip(part["reply"], part["position"], COLUMNS[name].of(table)[part.index])}
        for reply, token, value in found:
            assert value == pytest.approx(wanted[reply, token], rel=1e-3, abs=1e-6)


def test_columns_mean_what_their_names_say(recorded):
    table, raw = recorded.reading(1), recorded.run.tokens(1)
    assert COLUMNS["advantage"].of(table).tolist() == (raw["advantage"] * raw["weight"]).tolist()
    assert COLUMNS["surprise"].of(table).tolist() == (-raw["logp"]).tolist()
    assert table["share"].sum() == pytest.approx(1) and (table.loc[raw["advantage"] == 0, "share"] == 0).all()
    assert table["times"].abs().tolist() == pytest.approx((table["share"] * len(table)).tolist()) and table["times"].abs().mean() == pytest.approx(1)
    assert set(COLUMNS["share"].of(table)[raw["advantage"] < 0].le(0)) == {True}


def test_what_tokens_add_to_the_loss_is_the_loss():
    live = Live(replace(BANDIT, recipe="dapo"))
    list(live.run(3))
    for number in live.numbers():
        assert live.reading(number)["loss"].sum() == pytest.approx(live.row(number)["loss"], rel=1e-5, abs=1e-7)


def test_the_range_of_a_colour_is_the_same_in_each_step(recorded):
    ends = {tuple(re.findall(r'<span>([−+.\d]+) <span class="rlw-key', board(recorded.reading(n), recorded, "update", column="entropy"))) for n in recorded.numbers()}
    assert len(ends) == 1


def test_a_card_says_the_numbers_of_its_token(recorded):
    table = recorded.reading(2)
    row = table.loc[table["share"].idxmax()]
    page = card(table, recorded.recipe, int(row["reply"]), int(row["position"]))
    found = dict(re.findall(r"<tr><th>([^<]+)</th><td>([^<]+)</td>", page))
    for words, name in (("log-prob when drawn", "old"), ("ratio", "ratio"), ("entropy", "entropy"), ("advantage", "advantage"), ("coefficient", "coef"), ("push", "push")):
        assert told(found[words]) == pytest.approx(row[name], rel=1e-3)
    assert f"token {int(row['position']) + 1} of" in page and "(R_i - mean_g R)" in page


def test_phases_of_a_recorded_step_show_no_more_than_was_known(desk):
    spot = Spot("recorded", 1, "sample", column="entropy")
    for phase, new in (("sample", "old"), ("reward", "correct"), ("shape", "reward"), ("advantage", "advantage"), ("forward", "ratio"), ("loss", "share")):
        while spot.phase != phase:
            earlier = desk.source("recorded", None).reading(1, spot.phase)
            assert new not in earlier
            spot = moved(spot, desk.source("recorded", None), phases=1)
        assert new in desk.source("recorded", None).reading(1, phase)
        seen = shown(desk, spot, None)
        assert ("rlw-adv" in seen.board) == (phase in ("advantage", "forward", "loss")) and ('class="verdict"' in seen.board) == (phase != "sample")


@pytest.mark.parametrize("recipe", ["grpo", "dapo", "stapo", "kl_cov", "reinforce_pp", "sft"])
def test_back_and_forth_gives_the_same_numbers(recipe):
    config = replace(BANDIT, recipe=recipe) if recipe != "sft" else Config(recipe="sft", task="text-sum", policy="small-llama", prompts=2, group=1, evaluate=0)
    live = Live(config)
    list(live.run(4))
    if not live.done:
        pytest.fail(live.says)
    wanted = {n: live.reading(n) for n in live.numbers()}
    list(live.go(1))
    assert live.done == 1 and live.numbers() == [1]
    for _ in range(2):
        live.next()
    live.back()
    assert live.done == 1 and live.going is None
    list(live.run(3))
    for n in wanted:
        pd.testing.assert_frame_equal(wanted[n], live.reading(n))


def test_a_fork_leaves_the_past_and_changes_the_future():
    live, other = Live(BANDIT), Live(BANDIT)
    list(live.run(3)), list(other.run(5))
    live.fork("reinforce")
    list(live.run(2))
    for n in (1, 2, 3):
        pd.testing.assert_frame_equal(live.reading(n), other.reading(n))
    assert live.reading(4)["old"].tolist() == other.reading(4)["old"].tolist()             # drawn by the same weights
    assert live.reading(4)["advantage"].tolist() != other.reading(4)["advantage"].tolist()
    with pytest.raises(ValueError, match="began at step 3"):
        list(live.go(2))
    with pytest.raises(ValueError, match="nothing to go back to"):
        list(live.go(3)), live.back()


def test_asking_others_moves_nothing():
    live, straight = Live(BANDIT), Live(BANDIT)
    while live.next() != "advantage":
        pass
    live.whatif("dapo", "rloo")
    while live.done < 1:
        live.next()
    live.whatif("dapo")
    list(live.run(1)), list(straight.run(2))
    pd.testing.assert_frame_equal(live.reading(2), straight.reading(2))


def test_visitors_never_meet(desk):
    mine, yours = desk.begin("me", BANDIT), desk.begin("you", replace(BANDIT, seed=1))
    list(mine.run(2))
    assert (desk.live("me"), desk.live("you")) == (mine, yours) and yours.done == 0 and shown(desk, Spot(LIVE), "you", follow=True).steps == ()
    other = attempted(desk, Spot("recorded", 1), "third", lambda: desk.begin("third", BANDIT))
    assert "2 of 2 live trainers are in use" in other.note and other.spot.run == "recorded" and other.board
    desk.trainers.close("you")
    assert attempted(desk, Spot("recorded", 1), "third", lambda: desk.begin("third", BANDIT)).live
    assert "no live trainer" in shown(desk, Spot(LIVE), "you").note


@pytest.mark.parametrize("bad, says", [({"recipe": "route_diversity"}, "needs a task with a method route"), ({"policy": "nobody"}, "nobody"), ({"group": 1}, "group must be 2 or more"),
                                       ({"prompts": 200, "group": 60}, "takes up to 256"), ({"policy": "/etc"}, "/etc"), ({"task": "jsonl:/etc/passwd"}, "jsonl")])
def test_what_cannot_be_trained_is_a_sentence(desk, bad, says):
    from rlworkbench.tasks.bandit import Bandit
    missing = Bandit.__dict__.get("route")
    if missing and "recipe" in bad:
        del Bandit.route        # other tests lend the bandit one
    try:
        there = attempted(desk, Spot("recorded", 2), "me", lambda: desk.begin("me", Config(**({"task": "bandit", "policy": "table", "evaluate": 0} | bad))))
    finally:
        if missing:
            Bandit.route = missing
    assert "rlw-error" in there.note and says in there.note and there.spot.step == 2 and "data-token" in there.board
    assert len(desk.trainers) == 0


def test_a_policy_that_does_not_fit_the_task_is_a_sentence(desk):
    desk.begin("me", Config(task="digits-sum", policy="table", prompts=2, group=2, evaluate=0))
    there = attempted(desk, Spot(LIVE), "me", lambda: desk.live("me").next())
    assert "Step 1 can&#x27;t be made" in there.note and "Nothing has been made yet" in there.board


def test_bad_states_are_sentences(desk, server):
    assert "no live trainer" in shown(desk, Spot(LIVE), "me").note
    for run in ("../recorded", "/etc", "%2e%2e/x", "nothing", ""):
        seen = arrived(desk, {"run": run}, "me")
        assert seen.board and ("rlw-error" in seen.note) == bool(run) and seen.spot.run == "recorded"
    assert "no recipe has anything to say" in asked(desk, Spot(LIVE, 1), "me", ["dapo"]) or "no live trainer" in asked(desk, Spot(LIVE, 1), "me", ["dapo"])
    assert "no step 99" in asked(desk, Spot("recorded", 99), "me", ["dapo"]) or "no recorded step 99" in asked(desk, Spot("recorded", 99), "me", ["dapo"])
    damaged = server.runs / "damaged"
    (damaged / "steps").mkdir(parents=True, exist_ok=True)
    (damaged / "config.json").write_text((server.runs / "second" / "config.json").read_text())
    assert "no step yet" in shown(desk, Spot("damaged"), "me").board
    (damaged / "steps" / "000001.parquet").write_bytes(b"PAR1 nothing")
    assert "can&#x27;t be read as parquet" in shown(desk, Spot("damaged"), "me").note
    (damaged / "config.json").write_text("{")
    assert "is not a config" in shown(desk, Spot("damaged"), "me").note


def test_watching_is_bounded_and_pausing_ends_it(desk):
    desk.begin("me", BANDIT)
    start, seen = time.monotonic(), 0
    for s in watched(desk, Spot(LIVE), "me", lambda live: live.run(30)):
        seen += 1
        if seen == 3:
            desk.live("me").pause()
    assert seen <= 10 * (time.monotonic() - start) + 2
    assert "Paused" in s.note and 0 < desk.live("me").done < 30


def test_scrubbing_recorded_data_is_quick(desk):
    "Steps, groups and columns that were not looked at before, by the time that this thread worked: other processes do not count."
    shown(desk, Spot("recorded", 1), None)                  # the page has been opened
    source, columns, taken = desk.source("recorded", None), [*COLUMNS], {}
    for n in range(2, 11):
        assert n not in source.read and not any(k[0] == n for k in source.tables), "it was kept from before"
        for what, spot in (("step", Spot("recorded", n, "update", n % 8, column="share")), ("column", Spot("recorded", n, "update", n % 8, column=columns[n % len(columns)])),
                           ("group", Spot("recorded", n, "update", (n + 1) % 8, column="share")), ("phase", Spot("recorded", n, "reward", n % 8, column="share"))):
            start = time.thread_time()
            seen = shown(desk, spot, None)
            taken[what, n] = time.thread_time() - start
            assert seen.spot.step == n and "data-token" in seen.board
    assert max(taken.values()) < .2, taken


def test_every_endpoint_has_a_name_and_holds_no_model(server):
    from rlworkbench.apps.stepper import build
    demo = build(server.places)
    assert models_in(demo) == []
    names = [f.api_name for f in demo.fns.values() if f.fn is not None]
    assert all(names) and len(set(names)) == len(names) and {"stepper_arrive", "scrub", "stepper_token", "next_phase", "reset", "run_steps", "whatif", "long_begin"} <= {*names}
    assert {f.concurrency_id for f in demo.fns.values() if f.api_name in ("begin", "next_phase", "next_step", "run_steps", "back", "go", "fork", "reset", "whatif")} == {"train"}


def test_two_clients_stream_pause_and_do_not_meet(server):
    from gradio_client import Client
    clients = [Client(server.url, verbose=False) for _ in range(2)]
    for seed, client in enumerate(clients):
        client.predict("grpo", "bandit", "table", seed, .1, 3, 6, None, None, api_name="/begin")
    running = clients[0].submit(50, api_name="/run_steps")
    while len(running.outputs()) < 2:
        time.sleep(.05)
    clients[0].predict(api_name="/pause")
    first = " ".join(map(str, running.result(timeout=30)))
    assert "Paused" in first
    second = " ".join(map(str, clients[1].predict(api_name="/next_phase")))
    assert "seed 1" in second and "in step 1, after sample" in second
    job = clients[0].submit(50, api_name="/run_steps")
    while not job.outputs():
        time.sleep(.05)
    job.cancel()
    assert "seed 0" in " ".join(map(str, clients[0].predict(api_name="/next_phase")))
    for client in clients:
        client.predict(api_name="/close")


def choose(page, box, value: str):
    "Take a line of a menu; a key pressed before the menu has narrowed would leave the old one."
    box.click()
    box.fill(value)
    page.get_by_role("option", name=value, exact=True).click()


@pytest.mark.browser
def test_in_a_browser(window, server):
    from playwright.sync_api import expect
    page = window(server.url)
    at = lambda name: page.locator(f"#{name}")
    now = page.locator(".rlw-phases .now")

    page.goto(f"{server.url}/")                                     # a recorded run is there
    expect(at("board").locator("[data-token]").first).to_be_visible(timeout=30_000)
    expect(at("note")).to_contain_text("Recorded run: grpo on digits-sum")
    page.wait_for_url("**run=recorded&step=10**")
    page.locator("h1").click()
    page.keyboard.press("ArrowLeft")                                       # scrub with the keys
    page.wait_for_url("**step=9**")
    page.keyboard.press(" ")                                               # the phase after the last one of step 9
    expect(now).to_have_text("sample")
    page.wait_for_url("**step=10&phase=sample**")
    at("board").locator("[data-pick='3']").click()
    page.wait_for_url("**group=3**")
    token = at("board").locator("[data-token='4']").nth(2)
    token.click()                                                          # a card with the number that the token says
    expect(at("card")).to_contain_text("token 5 of")
    strip = int(token.get_attribute("data-strip"))
    table = Recorded(server.places.open("recorded")).reading(10)
    row = table[(table["reply"] == strip) & (table["position"] == 4)].iloc[0]
    drawn = at("card").locator("tr", has_text="log-prob when drawn").locator("td").first
    assert told(drawn.inner_text()) == pytest.approx(row["old"], rel=1e-3)
    page.keyboard.press("ArrowRight")
    expect(at("card")).to_contain_text("token 6 of")
    page.wait_for_url("**token=5**")
    link = page.url
    page.reload()                                                          # the same view after a refresh
    expect(at("card")).to_contain_text("token 6 of", timeout=30_000)
    expect(now).to_have_text("sample")
    page.wait_for_timeout(300)
    assert page.url == link

    page.get_by_role("button", name="Settings of the trainer").click()     # a live trainer, phase by phase
    for label, value in (("task", "bandit"), ("policy", "table")):
        choose(page, page.get_by_label(label, exact=True), value)
    page.get_by_label("learning rate").fill("0.1")
    at("start").click()
    expect(at("note")).to_contain_text("before its first step")
    page.locator("h1").click()
    for phase in ("sample", "rescore", "reward", "shape", "keep", "advantage", "forward", "loss", "gradient", "update"):
        page.keyboard.press(" ")
        expect(now).to_have_text(phase)
    expect(at("note")).to_contain_text("after step 1")
    at("step-live").click()
    expect(at("note")).to_contain_text("after step 2")
    kept = at("card").inner_text()
    at("back").click()
    expect(at("note")).to_contain_text("Back at step 1: a kept state.")
    at("step-live").click()
    expect(at("note")).to_contain_text("after step 2")
    assert at("card").inner_text() == kept
    choose(page, at("other").locator("input"), "dapo")
    at("fork").click()
    expect(at("note")).to_contain_text("grpo until there, dapo from here")
    at("step-live").click()
    expect(at("note")).to_contain_text("after step 3")
    page.get_by_role("button", name="What would another recipe").click()   # what if
    choose(page, at("names").locator("input"), "rloo")
    at("ask").click()
    expect(at("answer")).to_contain_text("dapo (this one)", timeout=20_000)
    expect(at("answer")).to_contain_text("Slots that differ")

    page.get_by_role("button", name="A long run").click()                  # a long run, left, found again, stopped
    at("name").locator("input,textarea").fill("from-the-page")
    page.get_by_label("steps", exact=True).last.fill("3000")
    at("launch").click()
    expect(at("state")).to_contain_text("is running", timeout=40_000)
    page.wait_for_url("**run=from-the-page**")
    page.reload()
    expect(at("state")).to_contain_text("is running", timeout=30_000)
    viewer = window(server.url)
    viewer.goto(page.url)
    expect(viewer.locator("#state")).to_contain_text("is running", timeout=30_000)
    at("halt").click()
    expect(at("state")).to_contain_text("has stopped", timeout=40_000)
    expect(viewer.locator("#state")).to_contain_text("has stopped", timeout=20_000)
    assert not long_run(server.places, "from-the-page")[1]

    dark = window(server.url, color_scheme="dark", viewport={"width": 390, "height": 800})
    dark.goto(f"{server.url}/?run=recorded&step=2")                 # dark, on a telephone
    expect(dark.locator("#board [data-token]").first).to_be_visible(timeout=30_000)
    paper, ink = (dark.evaluate(f"getComputedStyle(document.querySelector('#board .rlw-board')).{what}") for what in ("color", "backgroundColor"))
    assert dark.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 28)" and paper == "rgb(228, 232, 237)"
    assert dark.evaluate("document.documentElement.scrollWidth") <= 390
