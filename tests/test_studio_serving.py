"""What the studio stands on: confined places, hostile text, damaged runs, sessions, worker processes, uploads. No browser, no gradio."""
import gc
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from html import escape
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch

from rlworkbench.serving.compare import compared
from rlworkbench.serving.hub import hub, row, runs_table
from rlworkbench.serving.live import Live
from rlworkbench.serving.places import RECORDED, Places, shipped
from rlworkbench.serving.sessions import Sessions
from rlworkbench.serving.workers import desk, start, status, stop, wait, working
from rlworkbench.training.choices import new_trainer
from rlworkbench.training.job import resume, train
from rlworkbench.training.run import Config, Run

TABLE = dict(task="bandit", policy="table", prompts=3, group=4, lr=.1, evaluate=0, threads="1")
HOSTILE = ["<script>alert(1)", "\u202egnp.exe", "👩‍👩‍👧 مرحبا", "a&b\"'><img src=x onerror=alert(1)>", "%2e%2e"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A run to copy from."
    return train(Config(steps=2, record="full", **TABLE), tmp_path_factory.mktemp("made") / "run").folder


@pytest.fixture
def places(made, tmp_path):
    "A runs folder with one run, `a`, and a run outside of it."
    shutil.copytree(made, tmp_path / "runs" / "a")
    shutil.copytree(made, tmp_path / "outside")
    return Places(tmp_path / "runs")


# places

@pytest.mark.parametrize("name", ["..", "../outside", "a/../../outside", "a/..", ".", "./", "%2e%2e/outside", "%252e%252e/outside", "..%2foutside", "a\0", "a%00", "..\\outside",
                                  "a\n", "~", "/etc", "//etc/passwd", "C:\\", "x" * 10_000, "", "None", "a/steps", "a/config.json", "\u202ea"])
def test_a_name_that_leads_elsewhere_is_refused(places, name, tmp_path):
    with pytest.raises(ValueError) as e:
        places.open(name)
    assert "\n" not in str(e.value) and len(str(e.value)) < 300 and str(tmp_path) not in str(e.value)
    assert "a" in places.names() and places.open("a").folder == tmp_path / "runs" / "a"


def test_an_absolute_path_is_refused(places, tmp_path):
    for path in (tmp_path / "outside", tmp_path / "runs" / "a"):
        with pytest.raises(ValueError, match="is not the name of a run"):
            places.open(str(path))


def test_links_that_lead_out_are_refused(places, tmp_path):
    runs = places.runs
    (runs / "link").symlink_to(tmp_path / "outside")
    (runs / "deep").symlink_to(tmp_path)
    (runs / "inside").symlink_to(runs / "a")
    for name in ("link", "deep/outside"):
        with pytest.raises(ValueError, match="outside the runs folder"):
            places.open(name)
    assert places.open("inside").config.task == "bandit" and not {"link", "deep/outside"} & set(places.names())
    secret = tmp_path / "secret.json"
    secret.write_text('{"before": null, "after": {}}')
    for part in ("result.json", "steps/000009.parquet", "images/x-0.png", "metrics.jsonl"):
        copy = runs / part.replace("/", "-")
        shutil.copytree(runs / "a", copy)
        (copy / part).unlink(missing_ok=True)
        (copy / part).symlink_to(secret)
        with pytest.raises(ValueError, match="holds a link to a place outside"):
            places.open(copy.name)
    shutil.copytree(runs / "a", runs / "steps-out")
    shutil.rmtree(runs / "steps-out" / "steps")
    (runs / "steps-out" / "steps").symlink_to(tmp_path / "outside" / "steps")
    with pytest.raises(ValueError, match="holds a link"):
        places.open("steps-out")


def test_a_runs_folder_that_is_a_link_is_followed(places, tmp_path):
    (tmp_path / "other").symlink_to(places.runs)
    assert Places(tmp_path / "other").open("a").config.task == "bandit"


def test_the_run_named_at_the_start_may_lie_anywhere(places, tmp_path):
    named = Places(places.runs, also=tmp_path / "outside")
    assert named.default() == "outside" and named.open("outside").rows() and named.names()[:2] == ["outside", RECORDED]


# hostile text

def with_replies(folder: Path, texts: list):
    "The recorded steps say these texts, a token each."
    for file in (folder / "steps").glob("*.parquet"):
        table = pd.read_parquet(file)
        table["piece"] = [texts[i % len(texts)] for i in range(len(table))]
        table["item"] = "<script>item</script>"
        table.to_parquet(file)


@pytest.mark.parametrize("name", HOSTILE[:3] + ["a&b'\"><img src=x onerror=alert(1)>"])
def test_nothing_that_somebody_wrote_is_markup(places, made, name):
    folder = places.runs / name
    if "/" in name:
        pytest.fail("a name with a slash is two folders")
    shutil.copytree(made, folder)
    with_replies(folder, HOSTILE)
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(data | {"recipe": "<script>recipe", "policy": "\u202e<b>policy"}))
    for html in (hub(places, name), runs_table(places), compared(places, [name, "a"])):
        assert "<script" not in html and "<img src=x" not in html and "<b>policy" not in html and "onerror=alert(1)>" not in html.replace("&gt;", "")
    if name.isprintable():
        assert "&lt;script&gt;" in hub(places, name)
    else:
        assert 'role="alert"' in hub(places, name)


def test_a_reply_of_ten_thousand_tokens(places, made):
    run = Run.open(places.runs / "a")
    one = run.tokens(1).iloc[:1]
    long = pd.concat([one] * 10_000, ignore_index=True).assign(position=range(10_000), piece="<b>😀")
    for step in (1, 2):
        long.to_parquet(run.folder / "steps" / f"{step:06d}.parquet")
    start = time.perf_counter()
    page = hub(places, "a")
    assert time.perf_counter() - start < 3 and len(page) < 600_000 and "of 10,000 tokens" in page and "<b>😀" not in page


# damaged runs

def broken(part: str, content: bytes):
    def do(folder):
        (folder / part).write_bytes(content)
    return do


def step_of(change):
    def do(folder):
        change(pd.read_parquet(folder / "steps" / "000002.parquet")).to_parquet(folder / "steps" / "000002.parquet")
    return do


DAMAGED = [   # what is done to a run, and what is then said of it, as a whole
    (broken("config.json", b"{"), "b/config.json is not a config: Expecting property name"), (broken("config.json", b"[]"), "b/config.json is not a config: it holds no object"),
    (broken("config.json", b'{"format": 99}'), "b/config.json has format 99"), (broken("config.json", b"\xff\xfe"), "b/config.json is not a config: 'utf-8' codec"),
    (broken("config.json", b'{"sead": 3}'), "b/config.json: unknown key 'sead'"), (broken("metrics.jsonl", b"{\n{}\n"), "b/metrics.jsonl, line 1: not JSON"),
    (broken("metrics.jsonl", b"{}\n"), "b/metrics.jsonl, line 1: is not the row of a step"), (broken("metrics.jsonl", b"\xff\n"), "b/metrics.jsonl is not UTF-8 (byte 1)"),
    (broken("result.json", b"{"), "b/result.json is not JSON"), (broken("result.json", b"[1]"), "b/result.json holds something else"),
    (broken("result.json", b'{"before": {}, "after": {}}'), "b/result.json has no accuracy before training"), (broken("stopped.json", b"3"), "b/stopped.json holds something else"),
    (lambda f: shutil.rmtree(f / "steps"), "b is not a run: it has no steps")]
IN_PART = [   # what is done to a run that opens nevertheless, its state, and what is said of the part; nothing: it is shown
    (broken("metrics.jsonl", b'{"step": 1}\n'), "running", ""), (broken("images/x-0.png", b"no"), "done", ""), (lambda f: (f / "metrics.jsonl").unlink(), "stopped", ""),
    (step_of(lambda t: t.iloc[:0]), "done", ""), (broken("steps/000002.parquet", b"PAR1 no"), "done", "b/steps/000002.parquet can't be read as parquet"),
    (step_of(lambda t: t[["step"]]), "done", "b/steps/000002.parquet is not a recorded step: it has no column 'item'")]


def others_as_they_are(places, page: str):
    "What a damaged run beside them changes nothing of."
    assert str(places.runs) not in page and "Traceback" not in page and "Runs</h2>" in page
    assert row(places, "a").state == "done" and row(places, RECORDED).state == "done"
    assert re.search(r"<bdi>a(, b)?</bdi>", compared(places, ["a", "b"]))


@pytest.mark.parametrize("what, says", DAMAGED, ids=[s[:40] for _, s in DAMAGED])
def test_a_damaged_run_is_shown_as_such(places, what, says):
    shutil.copytree(places.runs / "a", places.runs / "b")
    what(places.runs / "b")
    with pytest.raises(ValueError) as e:
        places.open("b")
    assert str(e.value).startswith(says) and "\n" not in str(e.value) and str(places.runs) not in str(e.value)
    page = hub(places, "b")
    assert f'role="alert">{escape(says)}' in page and "<h1>The recorded run</h1>" in page
    assert (row(places, "b").state, row(places, "b").says[:len(says)]) == ("damaged", says) and escape(says) in compared(places, ["a", "b"])
    others_as_they_are(places, page)


@pytest.mark.parametrize("what, state, says", IN_PART, ids=[f"{s} {k}" for k, (_, s, _) in enumerate(IN_PART)])
def test_a_run_that_is_damaged_in_part_is_shown_as_far_as_it_is_whole(places, what, state, says):
    shutil.copytree(places.runs / "a", places.runs / "b")
    what(places.runs / "b")
    assert places.open("b").config.task == "bandit" and row(places, "b").state == state
    page = hub(places, "b")
    assert ('role="alert"' in page) == bool(says) and escape(says) in page and f"<h1>{'The recorded run' if says else 'b'}</h1>" in page
    others_as_they_are(places, page)


def test_no_run_at_all(tmp_path, monkeypatch):
    assert "No run of your own yet" in hub(Places(tmp_path / "none"))
    monkeypatch.setattr("rlworkbench.serving.places.shipped", lambda: tmp_path / "nothing")
    page = hub(Places(tmp_path / "none"))
    assert 'role="alert"' in page and "rlworkbench train makes one" in page


def test_the_shipped_run_is_small_and_whole():
    size = sum(f.stat().st_size for f in shipped().rglob("*") if f.is_file())
    run = Run.open(shipped())
    assert size < 3e6 and run.steps() == list(range(1, 11)) and not run.checkpoints()
    assert {"ref", "kl", "ratio", "clipped", "advantage", "entropy"} <= set(run.tokens(10))
    assert all(len(list((run.folder / "images").glob(f"{i.replace('/', '-')}*"))) for i in set(run.tokens(5)["item"]))


# sessions

def test_two_visitors_have_two_trainers():
    sessions = Sessions(most=2, idle_seconds=60)
    make = lambda seed: lambda: new_trainer(Config(seed=seed, **TABLE))
    one, two = sessions.open("one", make(1)), sessions.open("two", make(2))
    one.step()
    assert sessions.get("two") is two and two.done == 0 and one.done == 1 and sessions.get("three") is None
    assert not torch.equal(one.policy.table, two.policy.table)
    with pytest.raises(ValueError, match="2 of 2 live trainers are in use"):
        sessions.open("three", make(3))
    sessions.close("one")
    assert sessions.open("three", make(3)).done == 0 and len(sessions) == 2


def resident() -> int:
    return psutil.Process().memory_info().rss


TINY = Config(prompts=1, group=2, max_tokens=6, evaluate=0, threads="1", lr=1e-4)


def visit(sessions: Sessions, key, config: Config) -> list:
    "A visitor who starts a trainer, makes a step and a phase, and goes; weak references to what was held."
    live = sessions.open(key, lambda: Live(config))
    list(live.run(1))
    live.next()
    assert (live.done, live.step.phase) == (1, "sample") and len(live.reading(1))
    held = [weakref.ref(x) for x in (live, live.trainer, live.trainer.policy, live.step, live.tables_of[1])]
    sessions.close(key)
    return held


def test_memory_is_flat_over_200_visitors():
    "Live trainers as the stepper holds them: of tiny, and very many of a table; each in the middle of a step when its page goes."
    sessions = Sessions(most=2, idle_seconds=60)
    gc.collect()
    gc.freeze()                                            # as the studio does: a collection looks at what is new only
    try:
        for config in (TINY, Config(**TABLE)):
            visit(sessions, "first", config)
        before = resident()
        gone = [ref for k in range(6) for ref in visit(sessions, k, TINY)]
        after = resident()
        gone += [ref for k in range(200) for ref in visit(sessions, k, Config(**TABLE))]
    finally:
        gc.unfreeze()
    assert len(sessions) == 0 and [ref for ref in gone if ref() is not None] == []
    assert after - before < 40e6 and resident() - after < 20e6       # a trainer of tiny that has made a step holds about 30 MB


def test_a_trainer_that_somebody_still_holds_is_seen_by_that_test():
    "What the test above looks for is there: a trainer that is closed over does not go."
    sessions, kept = Sessions(most=2, idle_seconds=60), []
    def make():
        kept.append(live := Live(Config(**TABLE)))
        return live
    sessions.open("a", make)
    ref = weakref.ref(kept[0].trainer.policy)
    sessions.close("a")
    assert ref() is not None
    kept.clear()
    gc.collect()
    assert ref() is None


# workers

def ask(folder, answer):
    answer.put(status(folder).state)


def test_a_run_in_a_process_of_its_own(tmp_path):
    "Seen by several, found again by its folder, stopped whole, gone on with; another one dies and says why."
    config = Config(steps=1_000_000, checkpoint=0, **TABLE)
    folder = start(config, tmp_path / "long")
    dying = start(Config(recipe="grpo", **TABLE | dict(group=1)), tmp_path / "dying")
    with pytest.raises(ValueError, match="long is being trained already"):
        start(config, folder)
    assert wait(folder, 90, lambda s: s.step > 2 or not s.alive).state == "running" and working(folder)
    answer = multiprocessing.get_context("fork").Queue()
    others = [multiprocessing.get_context("fork").Process(target=ask, args=(folder, answer)) for _ in range(3)]
    for other in others:
        other.start()
    assert [answer.get(timeout=20) for _ in others] == ["running"] * 3
    places = Places(tmp_path)
    assert row(places, "long").state == "running" and "▶ running" in runs_table(places)
    assert stop(folder).state in ("stopping", "stopped")
    seen = wait(folder, 60)
    assert seen.state == "stopped" and seen.step == len(Run.open(folder).rows()) == int(Run.open(folder).checkpoints()[-1].name)
    assert len(resume(folder, seen.step + 2).rows()) == seen.step + 2
    died = wait(dying, 90)
    assert died.state == "died" and "group" in died.says and len(died.says.splitlines()) <= 12


def test_a_process_that_was_killed_is_reported_with_its_last_lines(tmp_path):
    "The lock goes with the process, whatever ended it; what it said last is what is shown."
    folder = tmp_path / "killed"
    desk(folder).mkdir()
    (desk(folder) / "config.json").write_text("{}")
    (desk(folder) / "log.txt").write_text("".join(f"line {k} \x1b[31m<b>\n" for k in range(100)))
    with open(desk(folder) / "lock", "w") as lock:
        import fcntl
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"], pass_fds=(lock.fileno(),))
    assert status(folder).state == "starting"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert status(folder).state == "died" and status(folder).says.splitlines() == [f"line {k} <b>" for k in range(88, 100)]
    assert stop(folder).state == "died"
    with pytest.raises(ValueError, match="there is no run"):
        status(tmp_path / "none")
