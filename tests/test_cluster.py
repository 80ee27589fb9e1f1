"""A reproduction over a Ray cluster of two workers on this machine: the same numbers, a worker that is killed, a cluster that isn't there."""
import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from rlworkbench.claims.claim import Arm, Claim, Comparison
from rlworkbench.claims.cluster import joined
from rlworkbench.claims.reproduce import reproduce
from rlworkbench.cli.main import main
from rlworkbench.core.config import Config
from rlworkbench.core.registry import claims
from rlworkbench.recipes.grpo import grpo

BED = Config(task="bandit", policy="table", steps=4, prompts=3, group=4, lr=.1, evaluate=0)


class Measure:
    "The last reward. A worker that comes to it while the file is there removes it and is killed; with `always`, each time it comes to one seed."
    def __init__(self, file, always=False):
        self.file, self.always = str(file), always

    def __call__(self, done):
        if self.always and done.seed == 1 and Path(self.file).exists():
            os.kill(os.getpid(), signal.SIGKILL)
        if not self.always and Path(self.file).exists():
            Path(self.file).unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return done.rows[-1]["reward"]

    def __repr__(self):
        return "the last reward"


def claim(measure) -> Claim:
    arms = {"fast": Arm(grpo, BED), "slow": Arm(grpo, replace(BED, lr=1e-4))}
    return Claim("toy", "none", "fast is better", arms, {"reward": measure}, (Comparison("reward", "fast", "slow", .05),), seeds=8)


def timeless(result):
    return {k: v for k, v in result.items() if k not in ("cpu_seconds", "cpu_by_arm")}


@pytest.fixture(scope="module")
def cluster():
    with joined("local", 2) as by:
        yield by


def listening() -> list:
    "Addresses on which processes of the cluster listen."
    family = [p for p in psutil.process_iter(["name"]) if any(word in p.info["name"] for word in ("raylet", "gcs_server", "ray::"))]
    found = []
    for p in family:
        with suppress(psutil.NoSuchProcess):      # a worker of a job that was killed may be going
            found += [c.laddr.ip.removeprefix("::ffff:") for c in p.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    return found


def test_two_workers_say_what_one_process_says(cluster, tmp_path):
    toy, seen = claim(Measure(tmp_path / "none")), []
    far = reproduce(toy, seeds=3, folder=tmp_path / "far", by=cluster, watch=lambda *job: seen.append(job))
    assert timeless(far) == timeless(reproduce(toy, seeds=3, folder=tmp_path / "here"))
    assert sorted(seen) == sorted((arm, seed) for arm in toy.arms for seed in range(3)) and len(list((tmp_path / "far").glob("*-*.json"))) == 6
    reproduce(toy, seeds=3, folder=tmp_path / "far", by=cluster, watch=lambda *job: seen.append(job))
    assert len(seen) == 6


def test_the_job_of_a_killed_worker_is_taken_up_again(cluster, tmp_path):
    (tmp_path / "kill").touch()
    toy = claim(Measure(tmp_path / "kill"))
    found = reproduce(toy, seeds=3, folder=tmp_path / "far", by=cluster)
    assert not (tmp_path / "kill").exists()
    assert timeless(found) == timeless(reproduce(toy, seeds=3, folder=tmp_path / "here"))


@pytest.mark.slow
def test_a_job_that_kills_each_worker_is_named_and_the_next_call_goes_on(cluster, tmp_path):
    (tmp_path / "kill").touch()
    toy, seen = claim(Measure(tmp_path / "kill", always=True)), []
    with pytest.raises(ValueError, match=r"the job of arm '\w+' with seed 1 was lost three times \(WorkerCrashedError: .* more are missing, what is finished stays, run it again"):
        reproduce(toy, seeds=3, folder=tmp_path / "far", by=cluster, watch=lambda *job: seen.append(job))
    assert not (tmp_path / "far" / "result.json").exists() and {seed for _, seed in seen} == {0}
    (tmp_path / "kill").unlink()
    found = reproduce(toy, seeds=3, folder=tmp_path / "far", by=cluster, watch=lambda *job: seen.append(job))
    assert len(seen) == len(set(seen)) == 6
    assert timeless(found) == timeless(reproduce(toy, seeds=3, folder=tmp_path / "here"))


def fail(done):
    return done.rows[99]["reward"]


def test_a_failing_arm_is_reported_with_its_line(cluster, tmp_path):
    with pytest.raises(ValueError, match=r"the arm '\w+' failed with seed \d: IndexError: list index out of range .in fail, line"):
        reproduce(claim(fail), seeds=2, folder=tmp_path, by=cluster)
    assert "IndexError" in next(tmp_path.glob("*.txt")).read_text() and not list(tmp_path.glob("*.json"))


def test_a_local_cluster_listens_on_loopback_alone(cluster):
    found = listening()
    assert len(found) >= 3 and all(address == "127.0.0.1" for address in found)


# the command

def run(folder, monkeypatch, capsys, *arguments):
    monkeypatch.setattr(claims, "found", {"toy": claim(Measure("none"))})
    monkeypatch.setattr(sys, "argv", ["rlworkbench", "reproduce", "toy", *arguments])
    monkeypatch.chdir(folder)
    code = 0
    try:
        main()
    except SystemExit as e:
        code = e.code or 0
    return code, *capsys.readouterr()


@pytest.fixture
def deaf():
    "A port where nobody answers."
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


@pytest.mark.parametrize("address,says", [("127.0.0.1:{}", "no Ray cluster answers at 127.0.0.1:"), ("ray://127.0.0.1:{}", "no Ray cluster answers at ray://127.0.0.1:"),
                                          ("nowhere", "--ray must be local, auto, HOST:PORT or ray://HOST:PORT, got 'nowhere'")])
def test_a_cluster_that_is_not_there(tmp_path, monkeypatch, capsys, deaf, address, says):
    code, out, err = run(tmp_path, monkeypatch, capsys, "--ray", address.format(deaf), "--out", "kept.json")
    assert code == 2 and says in err and len(err.strip().splitlines()) == 1 and not any(tmp_path.iterdir())


def test_without_the_package(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    code, out, err = run(tmp_path, monkeypatch, capsys, "--ray", "local")
    assert code == 2 and err.strip().endswith("--ray needs the package ray: pip install 'rlworkbench[ray]'") and not any(tmp_path.iterdir())


def test_ray_is_loaded_only_where_it_is_asked_for():
    code = "import sys, rlworkbench.cli.main, rlworkbench.claims.cluster; from rlworkbench.core.registry import claims; claims.all(); print('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"


SCRIPT = """
import sys
from rlworkbench.cli.main import main
from rlworkbench.core.registry import claims
from tests.test_cluster import Measure, claim
claims.found = {"toy": claim(Measure("kill"))}
sys.argv = ["rlworkbench", "reproduce", "toy", "--ray", "local", "--jobs", "2", "--seeds", "2", "--json"]
main()
"""


@pytest.mark.slow
def test_the_command_starts_a_cluster_and_leaves_it(tmp_path):
    """From the command line, with a worker that is killed; the last line is the result. Ray says in a line of its own that a worker died."""
    (tmp_path / "kill").touch()
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])})
    assert done.returncode == 0, done.stderr[-2000:]
    assert timeless(json.loads(done.stdout.splitlines()[-1])) == timeless(reproduce(claim(Measure(tmp_path / "kill")), seeds=2, folder=tmp_path / "here"))
    assert len(list((tmp_path / "runs/claims/toy").glob("*-*.json"))) == 4 and not (tmp_path / "kill").exists()
