"""Two processes over gloo: the same update as one, a death told in a sentence, a run folder that stays whole."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from rlworkbench.engines import job
from rlworkbench.training.run import Run
from tests import trl_worker

pytestmark = pytest.mark.slow
ROOT, BIN = Path(__file__).parents[1], Path(sys.executable).parent
CALM = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}


def free_port() -> int:
    import socket
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def launch(*args, port=None):
    "What accelerate says of two processes on CPUs."
    start = [BIN / "accelerate", "launch", "--multi_gpu", "--num_processes", 2, "--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", port or free_port()]
    return subprocess.run([*map(str, start), *map(str, args)], capture_output=True, text=True, cwd=ROOT, env=CALM, timeout=540)


def test_two_processes_make_the_update_of_one(tmp_path):
    """Groups are split over the pieces, replies differ in length, half the rows may be dropped: what is divided by must be counted over everything."""
    trl_worker.run(tmp_path / "one")
    done = launch("-m", "tests.trl_worker", tmp_path / "two", 2)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = load_file(tmp_path / "one"), load_file(tmp_path / "two")
    assert set(one) == set(two) and one["kept"] == two["kept"] > 0
    for name in ("advantage", "logged", "coef", "weight", "loss"):
        assert (one[name] - two[name]).abs().max() < 1e-6, name
    for update in ("0/", "1/"):
        names = [n for n in one if n.startswith(update)]
        largest = max(float(one[n].abs().max()) for n in names)
        assert largest > 1e-4 and max(float((one[n] - two[n]).abs().max()) for n in names) < 1e-5 * largest


DIES = """
import os
seen = 0

def reward(item, text):
    global seen
    seen += 1
    if os.environ.get("RANK") == "1" and seen > 3 * 8:
        os._exit(9)
    return {"correct": float(len(text) % 2)}
"""


def test_one_of_two_processes_dies(tmp_path):
    """In the fourth rollout. The other one says so, nothing half-written is left, and the run goes on from its last checkpoint."""
    (tmp_path / "dies.py").write_text(DIES)
    out = tmp_path / "run"
    done = launch("--no_python", BIN / "rlworkbench", "train", "--engine", "trl", "--steps", 5, "--prompts", 2, "--group", 4, "--evaluate", 0, "--reward", f"{tmp_path / 'dies.py'}:reward",
                  "--threads", 1, "--out", out)
    assert done.returncode != 0
    assert "another process of this run has died, so process 0 stops" in done.stderr
    run = Run.open(out)
    assert [r["step"] for r in run.rows()] == [1, 2, 3] and run.steps() == [1]
    assert not [f for f in out.rglob("*") if f.name.endswith((".tmp", ".new", ".old"))] and not run.checkpoints()
    assert [r["step"] for r in job.resume(out, steps=4).rows()] == [1, 2, 3, 4]


def test_a_mistake_is_told_once(tmp_path):
    done = launch("--no_python", BIN / "rlworkbench", "train", "--engine", "trl", "--prompts", 3, "--group", 3, "--out", tmp_path / "run")
    assert done.returncode != 0 and done.stderr.count("can't be dealt evenly to 2 processes") == 1
    assert not (tmp_path / "run").exists()
