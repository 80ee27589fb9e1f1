"""One studio for all tests of its pages: it runs once, on a folder with a few small runs besides the recorded one."""
import atexit
import functools
import shutil
import tempfile
import types
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch

from rlworkbench.core.step import Step
from rlworkbench.policies.policy import Policy
from rlworkbench.serving.frame import served
from rlworkbench.serving.places import Places
from rlworkbench.training.job import train
from rlworkbench.training.run import Config
from rlworkbench.training.trainer import Trainer

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
    url = served(demo, wait=False)
    atexit.register(demo.close, verbose=False)
    return Server(url, folder / "runs", places, demo)


def reached(start) -> list:
    """All that something holds on to, however deep: closures, bound and partial functions, defaults, containers, attributes of objects; what a page's parts begin with.
    Not what a module holds, which is one for all visitors."""
    seen, left = {}, [start]
    while left:
        x = left.pop()
        if id(x) in seen or isinstance(x, (str, bytes, int, float, type, type(None), types.ModuleType)):
            continue
        seen[id(x)] = x
        if isinstance(x, types.MethodType):
            left += [x.__self__, x.__func__]
        elif isinstance(x, functools.partial):
            left += [x.func, x.args, x.keywords]
        elif isinstance(x, types.FunctionType):
            left += [c.cell_contents for c in x.__closure__ or () if c != types.CellType()] + [x.__defaults__, x.__kwdefaults__, getattr(x, "__wrapped__", None)]
        elif isinstance(x, types.GeneratorType):
            left += [x.gi_frame and x.gi_frame.f_locals]
        elif isinstance(x, Mapping):
            left += [*x.keys(), *x.values()]
        elif isinstance(x, (list, tuple, set, frozenset, deque)):
            left += x
        else:
            left += [getattr(x, "__dict__", None), *(getattr(x, s, None) for k in type(x).__mro__ for s in names_of(k))]
    return list(seen.values())


def names_of(kind: type) -> list:
    "The slots of a class."
    slots = kind.__dict__.get("__slots__", ())
    return [slots] if isinstance(slots, str) else list(slots)


def models_in(demo) -> list:
    "(endpoint, kind) of each model, trainer or tensor that the events or parts of a page hold on to."
    def held(x):
        return [type(o).__name__ for o in reached(x) if isinstance(o, (torch.nn.Module, Policy, Trainer, torch.Tensor, Step))]
    return [(f.api_name, k) for f in demo.fns.values() for k in held(f.fn)] + [(type(b).__name__, k) for b in demo.blocks.values() for k in held(getattr(b, "value", None))]


@pytest.fixture(scope="session")
def server() -> Server:
    return running()
