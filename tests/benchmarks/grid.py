"""Every representation with every algorithm, trained on: writes nbs/selection/results/grid.json. `python -m tests.benchmarks.grid [SKILL ...]`"""
import json
import sys
import time
from pathlib import Path

import torch

from rlworkbench.core.files import write_text
from rlworkbench.core.registry import tasks
from rlworkbench.policies.tiny import load_tiny
from rlworkbench.selection.grid import Course, grid, parts

FILE = Path(__file__).parents[2] / "nbs/selection/results/grid.json"


def main(skills, problems=400, taken=40):
    torch.set_num_threads(1)
    FILE.parent.mkdir(exist_ok=True)
    found, policy = json.loads(FILE.read_text()) if FILE.is_file() else {}, load_tiny()
    for k, skill in enumerate(skills):
        start, task = time.process_time(), tasks.get(f"skills-{skill}")
        pool, query = tasks.get("skills").items()[problems * k:problems * (k + 1)], task.items("validation")[:32]
        course = Course(policy, task.items("test")[:60], task, seed=k)
        found[skill] = {"cells": grid(course, pool, query, skill, taken, at_random=3), "parts": parts(course, pool, query, most=taken)}
        found[skill]["cpu_seconds"] = round(time.process_time() - start, 1)
        write_text(FILE, json.dumps(found) + "\n")
        print(skill, found[skill]["cpu_seconds"], flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or ("max",))
