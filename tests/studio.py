"""One studio for all tests of its pages: it runs once, on a folder with a few small runs besides the recorded one."""
import atexit
import shutil
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from rlworkbench.serving.frame import free, served
from rlworkbench.serving.places import Places
from rlworkbench.training.job import train
from rlworkbench.training.run import Config

@dataclass(frozen=True)
class Server:
    "A studio that runs."
    url: str
    runs: Path
    places: Places
    demo: object


def some_runs(folder: Path):
    "second: two steps of tiny on digits; bandit/K: three seeds of one config; bandit/rloo: another recipe."
    train(Config(steps=2, prompts=2, group=4, evaluate=0, record="full", threads="1", lr=3e-5), folder / "second")
    table = dict(task="bandit", policy="table", steps=6, prompts=3, group=4, evaluate=0, record="full", threads="1", lr=.1)
    for seed in range(3):
        train(Config(seed=seed, **table), folder / "bandit" / str(seed))
    train(Config(recipe="rloo", **table), folder / "bandit" / "rloo")


@cache
def running() -> Server:
    "The studio, started when first asked for."
    from rlworkbench.apps.studio import studio
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    some_runs(folder / "runs")
    places = Places(folder / "runs")
    demo = studio(places)
    url = served(demo, free(), wait=False)
    atexit.register(demo.close, verbose=False)
    return Server(url, folder / "runs", places, demo)


@pytest.fixture(scope="session")
def server() -> Server:
    return running()
