"""A run mirrored into Trackio: names, traces, a resumed run, a server that the environment names, and a machine without Trackio."""
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from rlworkbench.cli.main import main
from rlworkbench.core.config import Config
from rlworkbench.training.job import train
from rlworkbench.training.run import Run

READ = """
import json
from trackio.sqlite_storage import SQLiteStorage as S
runs = [r["name"] for r in S.get_run_records("rlworkbench")]
print(json.dumps({n: {"rows": S.get_logs("rlworkbench", n), "traces": S.get_traces("rlworkbench", n, limit=500)} for n in runs}, default=str))
"""


def command(folder, *arguments, **environment):
    "A process of its own, for Trackio reads where its data lie as it is imported."
    clean = {k: v for k, v in os.environ.items() if not k.startswith("TRACKIO")} | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=folder, env=clean)


def cli(folder, *arguments, **environment):
    return command(folder, "-c", f"import sys; sys.argv = {['rlworkbench', *arguments]!r}; from rlworkbench.cli.main import main; main()", **environment)


@pytest.fixture(scope="module")
def mirrored(tmp_path_factory):
    "Three steps from the command line while the environment names a server, two more by resume; the folder and what Trackio then holds."
    folder = tmp_path_factory.mktemp("tracked")
    (folder / "settings.ini").write_text("[workbench]\nruns_path = runs\n")
    began = cli(folder, "train", "--task", "bandit", "--policy", "table", "--prompts", "3", "--group", "4", "--lr", ".1", "--evaluate", "0", "--steps", "3", "--record", "full", "--out", "runs/one",
                "--watch", "trackio", "--json", TRACKIO_SERVER_URL="http://127.0.0.1:9/?write_token=x")
    went_on = cli(folder, "resume", "runs/one", "--steps", "5", "--json")
    told = command(folder, "-c", READ, TRACKIO_DIR=str(folder / "runs" / "trackio"))
    return folder, began, went_on, json.loads(told.stdout.splitlines()[-1])


def test_each_step_is_there_once(mirrored):
    folder, began, went_on, told = mirrored
    assert (began.returncode, went_on.returncode) == (0, 0), began.stderr + went_on.stderr
    assert list(told) == ["one"] and [r["step"] for r in told["one"]["rows"]] == [1, 2, 3, 4, 5]


def test_numbers_are_those_of_the_log_under_the_names_of_trl(mirrored):
    folder, _, _, told = mirrored
    for line, row in zip((folder / "runs/one/metrics.jsonl").read_text().splitlines(), told["one"]["rows"]):
        mine = {k: v for k, v in json.loads(line).items() if isinstance(v, (int, float)) and k != "step"}
        assert {k: row[f"train/{k}"] for k in mine} == mine and row["train/global_step"] == row["step"]


def test_each_recorded_reply_is_a_trace(mirrored):
    folder, _, _, told = mirrored
    run, traces = Run.open(folder / "runs" / "one"), told["one"]["traces"]
    assert len(traces) == 5 * 12
    mine = {(k, r): "".join(t["piece"]) for k in run.steps() for r, t in run.tokens(k).groupby("reply")}
    assert {(t["metadata"]["step"], t["metadata"]["reply"]): t["messages"][1]["content"] for t in traces} == mine


def test_nothing_but_the_answer_is_printed(mirrored):
    assert all(len(done.stdout.splitlines()) == 1 and json.loads(done.stdout)["run"] == "runs/one" for done in mirrored[1:3])


def test_without_the_package_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "trackio", None)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "data"))
    monkeypatch.setattr(sys, "argv", ["rlworkbench", "train", "--task", "bandit", "--policy", "table", "--evaluate", "0", "--watch", "trackio", "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2 and capsys.readouterr().err.strip() == "rlworkbench: the watcher trackio needs the package of that name: pip install 'rlworkbench[track]'"
    assert not list(Path(tmp_path).iterdir())


class Follower:
    "Notes what it is told."
    def __init__(self):
        self.said = []

    def __call__(self, step):
        self.said.append(step.phase) if step.phase == "update" else None

    def opened(self, run):
        self.said.append(("opened", len(run.rows())))

    def logged(self, step):
        self.said.append(("logged", step.clock[0] + 1))

    def closed(self):
        self.said.append("closed")


def test_who_follows_a_run_is_told_after_the_log_and_always_of_the_end(tmp_path):
    from rlworkbench.training.choices import new_trainer
    config = Config(task="bandit", policy="table", prompts=3, group=4, evaluate=0, steps=4, threads="1")
    for name, watch in (("whole", None), ("cut", lambda run, step: 1 / (step.clock[0] != 1))):
        trainer, follower = new_trainer(config), Follower()
        trainer.watchers.append(follower)
        try:
            train(config, tmp_path / name, watch, trainer=trainer)
        except ZeroDivisionError:
            pass
        steps = 4 if name == "whole" else 2
        assert follower.said == [("opened", 0), *(x for k in range(steps) for x in ("update", ("logged", k + 1))), "closed"]


def test_it_changes_no_number(mirrored, tmp_path):
    timeless = lambda rows: [{k: v for k, v in r.items() if not k.startswith(("time/", "cpu/"))} for r in rows]
    rows = [json.loads(line) for line in (mirrored[0] / "runs/one/metrics.jsonl").read_text().splitlines()]
    config = replace(Run.open(mirrored[0] / "runs" / "one").config, watch=None, steps=5)
    assert timeless(rows) == timeless(train(config, tmp_path / "plain").rows())
