"""Two processes over gloo: the same update as one, a mistake told once, a death told in a sentence, a run folder that stays whole. One launch for all of it."""
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from rlworkbench.engines import job
from rlworkbench.training.run import Run
from tests import trl_worker

ROOT, BIN = Path(__file__).parents[1], Path(sys.executable).parent
CALM = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}
DIES = """
import os
seen = 0

def fine(item, text):
    return float(len(text) % 2)

def reward(item, text):
    global seen
    seen += 1
    if os.environ.get("RANK") == "1" and seen > 3 * 8:
        os._exit(9)
    return float(len(text) % 2)
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    "What accelerate's two processes left, and what they said: an update of both, a run gone on with, a mistake, a run in whose fourth rollout the second one dies."
    home = tmp_path_factory.mktemp("two")
    (home / "dies.py").write_text(DIES)
    start = [BIN / "accelerate", "launch", "--multi_gpu", "--num_processes", 2, "--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", free_port()]
    done = subprocess.run([*map(str, start), "-m", "tests.trl_worker", str(home)], capture_output=True, text=True, cwd=ROOT, env=CALM, timeout=540)
    return home, done


def test_two_processes_make_the_update_of_one(launched, tmp_path):
    """Groups are split over the pieces, replies differ in length, some groups are dropped: what is divided by must be counted over everything."""
    home, done = launched
    assert (home / "two").is_file(), done.stderr[-2000:]
    trl_worker.run(tmp_path / "one")
    one, two = load_file(tmp_path / "one"), load_file(home / "two")
    assert set(one) == set(two) and 0 < one["kept"] == two["kept"] < len(one["advantage"])
    for name in ("advantage", "logged", "coef", "weight", "loss"):
        assert (one[name] - two[name]).abs().max() < 1e-6, name
    for update in ("0/", "1/"):
        names = [n for n in one if n.startswith(update)]
        largest = max(float(one[n].abs().max()) for n in names)
        assert largest > 1e-4 and max(float((one[n] - two[n]).abs().max()) for n in names) < 1e-5 * largest


def test_two_processes_go_on_in_the_same_bits(launched):
    home, _ = launched
    whole, again = Run.open(home / "whole"), Run.open(home / "again")
    a, b = (load_file(r.checkpoints()[-1] / "model.safetensors") for r in (whole, again))
    assert set(a) == set(b) and all(a[n].equal(b[n]) for n in a)
    timeless = [[{k: v for k, v in row.items() if not k.startswith(("time/", "cpu/"))} for row in r.rows()] for r in (whole, again)]
    assert timeless[0] == timeless[1] and len({row["grad_norm"] for row in timeless[0]}) == 4 and whole.read("engine.json")["processes"] == 2


def test_a_mistake_is_told_once(launched):
    home, done = launched
    assert done.stderr.count("can't be dealt evenly to 2 processes") == 1 and not (home / "wrong").exists()


def test_one_of_two_processes_dies(launched):
    """The other one says so, nothing half-written is left, and the run goes on from its last checkpoint."""
    home, done = launched
    out = home / "run"
    assert done.returncode != 0 and "another process of this run has died, so process 0 stops" in done.stderr, done.stderr[-2000:]
    run = Run.open(out)
    assert [r["step"] for r in run.rows()] == [1, 2, 3] and run.steps() == [1]
    assert not [f for f in out.rglob("*") if f.name.endswith((".tmp", ".new", ".old"))] and not run.checkpoints()
    assert [r["step"] for r in job.resume(out, steps=4).rows()] == [1, 2, 3, 4]
