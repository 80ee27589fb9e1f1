"""Benchmarks, each in a process of its own; what it finds is written to tests/benchmarks/results/NAME.json, and all of it drawn on one page.

    python -m tests.benchmarks                    all of them, then the page
    python -m tests.benchmarks NAME ...           these
    python -m tests.benchmarks --page             only the page: tests/benchmarks/bench.html
    python -m tests.benchmarks --list             their names
"""
import importlib
import json
import os
import re
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory

from rlworkbench.core.files import write_text
from tests.benchmarks.measure import machine, peak, versions
from tests.benchmarks.page import RESULTS, write_page

ROOT = Path(__file__).parents[2]
BENCHMARKS = {     # name: (module, function, arguments)
    "whole step": ("steps", "steps", {}), "learning": ("learning", "learning", {}), "scaling": ("scaling", "scaling", {}), "memory": ("memory", "memory", {}),
    "what binds": ("binds", "binds", {}),
    "head": ("basics", "head", {}), "attribution": ("attribution", "attribution", {}),
    "rollouts, 36 image tokens": ("basics", "rollouts", {}), "rollouts, 256 image tokens": ("basics", "rollouts", {"image": 128, "prompts": 8}),
    "scoring, 128 prompt tokens": ("basics", "scoring", {}), "health": ("basics", "health", {}), "recording": ("basics", "recording", {}), "whatif": ("basics", "whatif", {}),
    "pictures": ("basics", "pictures", {}), "run folders": ("basics", "folders", {}), "startup": ("basics", "startup", {}), "latent": ("latent", "latent", {}),
    "drift": ("injection", "injection", {}), "strategies": ("strategies", "strategies", {}), "selection": ("selection", "selection", {}), "plateau of imitation": ("basics", "plateau", {}),
}


def inside(name: str, out: str):
    "One benchmark, in this process."
    import torch
    torch.set_num_threads(1)
    module, function, how = BENCHMARKS[name]
    cpu, wall = time.process_time(), time.perf_counter()
    found = getattr(importlib.import_module(f"tests.benchmarks.{module}"), function)(**how)
    Path(out).write_text(json.dumps({"found": found, "cpu_seconds": round(time.process_time() - cpu, 1), "wall_seconds": round(time.perf_counter() - wall, 1), "megabytes": round(peak())}))


def measured(name: str) -> dict:
    "One benchmark in a fresh process on one thread, with the day, the machine, its load before and after, and the versions."
    before, environment = os.getloadavg()[0], os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with TemporaryDirectory() as tmp:
        out = Path(tmp) / "out.json"
        subprocess.run([sys.executable, "-W", "ignore", "-m", "tests.benchmarks", "--inside", name, str(out)], check=True, cwd=ROOT, env=environment)
        told = json.loads(out.read_text())
    return {"name": name, "date": str(date.today()), "machine": machine() | {"threads": 1}, "load": [round(before, 2), round(os.getloadavg()[0], 2)], "versions": versions()} | told


def file_of(name: str) -> Path:
    "Where a benchmark's result is kept."
    return RESULTS / f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}.json"


def main(arguments) -> int:
    if arguments[:1] == ["--inside"]:
        return inside(*arguments[1:]) or 0
    if arguments == ["--list"]:
        print("\n".join(BENCHMARKS))
        return 0
    names = [a for a in arguments if a != "--page"]
    if unknown := [n for n in names if n not in BENCHMARKS]:
        print(f"unknown benchmark {unknown[0]!r}; known: {'; '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    failed = []
    for name in names or ([] if arguments else BENCHMARKS):
        try:
            result = measured(name)
        except subprocess.CalledProcessError:
            failed.append(name)
            continue
        write_text(file_of(name), json.dumps(result, indent=1) + "\n")
        print(f"{name}: {result['cpu_seconds']} CPU seconds in this process, load {result['load']}", flush=True)
    print(f"page: {write_page()}")
    if failed:
        print(f"failed: {'; '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
