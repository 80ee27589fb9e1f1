"""Every registered recipe trains twenty steps from the command line, on a bed where it has something to do and on digits-sum with `tiny`.

`python -m tests.test_every_recipe_trains [RECIPE ...]` prints what each cost."""
import io
import json
import math
import sys
import tempfile
import time
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from rlworkbench.cli.main import main
from rlworkbench.core.registry import recipes
from rlworkbench.recipes.recipe import Lesson
from rlworkbench.training.beds import VARIANTS, base_policy
from rlworkbench.training.run import Run

ROOT = Path(__file__).parents[1]
USUAL = ("verbose-sum", "micro-verbose")
BEDS = {**dict.fromkeys(("justrl", "stapo", "stapo_probability", "stapo_entropy", "stapo_random", "clip_cov", "kl_cov"), ("synonyms", "micro-synonyms")),
        "route_diversity": ("route-sum", "micro-routes"), "observe_r1": ("digits-sum-levels", "tiny"), "rif": ("digits-sum-1", "tiny"),
        **dict.fromkeys(("drift", "drift_random"), ("digits-chains", "tiny-reader")), "vision_r1": ("frames", "table-frames")}
REFUSED = {"vision_r1"}    # by digits-sum, which knows no boxes
CASES = [(name, *where) for name in recipes.all() for where in (BEDS.get(name, USUAL), ("digits-sum", "tiny")) if where[0] != "digits-sum" or name not in REFUSED]


def trained(recipe, task, policy, out, steps=20) -> tuple:
    "Exit code, what was said, CPU seconds."
    argv, said, start = sys.argv, io.StringIO(), time.process_time()
    sys.argv = ["rlworkbench", "train", "--recipe", recipe, "--task", task, "--policy", policy, "--steps", str(steps), "--prompts", "4", "--group", "4",
                "--lr", "1e-4", "--evaluate", "0", "--threads", "1", "--seed", "0", "--out", str(out), "--json"]
    try:
        with chdir(ROOT), redirect_stdout(said), redirect_stderr(said):
            main()
    except SystemExit as e:
        return e.code or 0, said.getvalue(), time.process_time() - start
    finally:
        sys.argv = argv


def looked_at(out, recipe, steps=20):
    "A run as it should be: all steps, finite, the weights moved, all of it in its config."
    run = Run.open(out)
    rows = run.rows()
    assert [r["step"] for r in rows] == list(range(1, steps + 1)) and run.config.recipe == recipe
    assert all(v is not None and (not isinstance(v, float) or math.isfinite(v)) for r in rows for v in r.values())
    assert any(r.get("grad_norm", 0) > 0 for r in rows), "nothing was learned"
    assert isinstance(recipes.get(recipe), Lesson) or {"entropy", "reward", "correct"} <= set(rows[-1])


@pytest.mark.slow
@pytest.mark.parametrize("recipe,task,policy", CASES, ids=lambda x: x)
def test_twenty_steps(recipe, task, policy, tmp_path):
    for variant in (v for v in VARIANTS if v == policy or v in str(recipes.get(recipe))):
        base_policy(variant)
    code, said, _ = trained(recipe, task, policy, tmp_path / "run")
    assert code == 0, said
    assert json.loads(said.splitlines()[-1])["steps"] == 20
    looked_at(tmp_path / "run", recipe)


@pytest.mark.parametrize("recipe", sorted(REFUSED))
def test_what_a_task_lacks_is_said(recipe, tmp_path):
    code, said, _ = trained(recipe, "digits-sum", "tiny", tmp_path / "run")
    assert code == 2 and "which 'digits-sum' does not have; scenes-boxes does" in " ".join(said.split()) and not (tmp_path / "run").exists()


def test_every_recipe_has_a_bed_that_exists():
    from rlworkbench.core.registry import policies, tasks
    assert set(BEDS) <= set(recipes.all())
    for task, policy in {*BEDS.values(), USUAL}:
        assert task in tasks.all() and policy in policies.all()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        for number, (recipe, task, policy) in enumerate(c for c in CASES if c[0] in (sys.argv[1:] or recipes.all())):
            code, said, seconds = trained(recipe, task, policy, Path(folder) / str(number))
            if code == 0:
                looked_at(Path(folder) / str(number), recipe)
            print(f"{recipe:18} {task:18} {policy:15} {seconds:6.1f} CPU s  {'ok' if code == 0 else said.strip().splitlines()[-1]}", flush=True)
