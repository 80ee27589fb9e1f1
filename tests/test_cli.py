"""The command line as a user meets it: in an empty folder, with right and with wrong input."""
import io
import json
import subprocess
import sys
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlworkbench.cli.main import main
from rlworkbench.core.files import read_json_lines

REWARDS = """
def good(item, text): return len(text) / 100
def nan(item, text): return float("nan")
def word(item, text): return "high"
def broken(item, text): return 1 / 0
def late(item, text, calls=[]): return 0
def short(text): return 1.0
number = 3
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("user")
    (path / "mine.py").write_text(REWARDS)
    (path / "syntax.py").write_text("def f(:\n")
    (path / "full").mkdir()
    (path / "full" / "thesis.txt").write_text("do not touch")
    return path


def run(folder, *arguments):
    "The entry point in this process: starting Python and torch anew for each case would take minutes."
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["rlworkbench", *arguments]
    try:
        with chdir(folder), redirect_stdout(out), redirect_stderr(err):
            main()
        code = 0
    except SystemExit as e:
        code = e.code or 0
    finally:
        sys.argv = argv
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def snapshot(folder):
    return {p.relative_to(folder): p.read_bytes() if p.is_file() else None for p in sorted(Path(folder).rglob("*"))}


QUICK = ("--policy", "table", "--task", "bandit", "--prompts", "3", "--group", "4", "--evaluate", "0", "--steps", "2")
BAD = {
    "unknown recipe": (("train", *QUICK, "--recipe", "grop"), "did you mean grpo"),
    "unknown task": (("train", *QUICK[:2], "--task", "bandito", "--steps", "2"), "unknown task 'bandito'; did you mean bandit"),
    "unknown policy": (("train", "--policy", "tinny"), "unknown policy 'tinny'; did you mean tiny"),
    "missing folder as policy": (("train", "--policy", "models/none"), "cannot load a policy from 'models/none'"),
    "steps 0": (("train", *QUICK[:-2], "--steps", "0"), "steps must be a whole number, 1 or more, got 0"),
    "steps -3": (("train", *QUICK[:-2], "--steps", "-3"), "steps must be a whole number, 1 or more, got -3"),
    "group of one": (("train", *QUICK, "--group", "1", "--recipe", "grpo"), "group must be 2 or more, got 1"),
    "prompts 0": (("train", *QUICK, "--prompts", "0"), "prompts must be a whole number"),
    "lr 0": (("train", *QUICK, "--lr", "0"), "lr must be above 0"),
    "lr negative": (("train", *QUICK, "--lr", "-1"), "lr must be above 0"),
    "temperature 0": (("train", *QUICK, "--temperature", "0"), "for evaluation only"),
    "temperature negative": (("train", *QUICK, "--temperature", "-1"), "temperature must be 0 or more"),
    "max tokens 0": (("train", *QUICK, "--max-tokens", "0"), "max_tokens must be a whole number, 1 or more"),
    "micro 0": (("train", *QUICK, "--micro", "0"), "micro must be a whole number"),
    "record": (("train", *QUICK, "--record", "everything"), "record must be small or full"),
    "threads": (("train", *QUICK, "--threads", "many"), "threads must be a positive number or 'auto'"),
    "reward NaN": (("train", *QUICK, "--reward", "mine.py:nan"), "the reward 'nan' of item bandit/train/"),
    "reward no number": (("train", *QUICK, "--reward", "mine.py:word"), "is 'high', not a number"),
    "reward raises": (("train", *QUICK, "--reward", "mine.py:broken"), "the reward 'broken' failed on item bandit/train/"),
    "reward with one argument": (("train", *QUICK, "--reward", "mine.py:short"), "must take (item, text)"),
    "reward missing": (("train", *QUICK, "--reward", "mine.py:none"), "mine.py has no function 'none'"),
    "reward not callable": (("train", *QUICK, "--reward", "mine.py:number"), "mine.py has no function 'number'"),
    "reward without function": (("train", *QUICK, "--reward", "mine.py"), "FILE.py:FUNCTION"),
    "reward file missing": (("train", *QUICK, "--reward", "gone.py:f"), "with an existing file"),
    "reward file broken": (("train", *QUICK, "--reward", "syntax.py:f"), "syntax.py failed to import: SyntaxError"),
    "reward for a lesson": (("train", *QUICK, "--recipe", "sft", "--reward", "coin"), "takes no --reward"),
    "folder that holds something": (("train", *QUICK, "--out", "full"), "full already holds something"),
    "config missing": (("train", "--config", "gone.json"), "gone.json is not a config"),
    "config not JSON": (("train", "--config", "mine.py"), "mine.py is not a config"),
    "eval unknown task": (("eval", "tiny", "--task", "chess"), "unknown task 'chess'"),
    "eval n 0": (("eval", "tiny", "--n", "0"), "n and k must be 1 or more"),
    "show unknown": (("show", "dapoo"), "did you mean dapo"),
    "list unknown": (("list", "recipe"), "did you mean recipes"),
    "report of no run": (("report", "full"), "full is not a run"),
    "build unknown": (("build", "huge"), "unknown variant 'huge'"),
    "build onto something": (("build", "tiny", "--out", "full"), "full already holds something"),
    "build onto something by force": (("build", "tiny", "--out", "full", "--force"), "full already holds something"),
    "demo of no steps": (("demo", "--steps", "0"), "steps must be 1 or more"),
    "a policy that can't answer the task": (("train", "--policy", "table", "--task", "digits-sum", "--prompts", "2", "--group", "2"), "answers the task 'bandit' only"),
    "resume of no run": (("resume", "full"), "full is not a run"),
    "out is a file": (("train", *QUICK, "--out", "mine.py"), "mine.py"),
    "report into a folder that is not there": (("report", "full", "--html", "gone/r.html"), "full is not a run"),
    "validate unknown": (("validate", "digit-sum"), "did you mean digits-sum"),
    "demo onto something": (("demo", "--out", "full", "--force"), "full already holds something"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence(folder, name):
    arguments, says = BAD[name]
    before = snapshot(folder / "full")
    done = run(folder, *arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert says in done.stderr
    lines = [line for line in done.stderr.strip().splitlines() if line]
    assert len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    assert snapshot(folder / "full") == before


def test_train_writes_a_run_and_refuses_to_overwrite_it(folder):
    first = run(folder, "train", *QUICK, "--recipe", "grpo", "--out", "runs/a", "--json")
    assert first.returncode == 0, first.stderr
    assert json.loads(first.stdout.splitlines()[-1])["steps"] == 2
    kept = snapshot(folder / "runs/a")
    assert len(read_json_lines(folder / "runs/a/metrics.jsonl")) == 2
    again = run(folder, "train", *QUICK, "--recipe", "grpo", "--out", "runs/a")
    assert again.returncode == 2 and "runs/a already holds a run" in again.stderr
    assert snapshot(folder / "runs/a") == kept


def test_a_run_can_be_run_again_from_its_config(folder):
    assert run(folder, "train", *QUICK, "--out", "runs/b").returncode == 0
    assert run(folder, "train", "--config", "runs/b/config.json", "--out", "runs/c").returncode == 0
    timeless = [[{k: v for k, v in row.items() if not k.startswith(("time/", "cpu/"))} for row in read_json_lines(folder / f"runs/{r}/metrics.jsonl")] for r in "bc"]
    assert timeless[0] == timeless[1]


def test_own_reward_is_a_column(folder):
    assert run(folder, "train", *QUICK, "--reward", "mine.py:good", "--out", "runs/d").returncode == 0
    assert "rewards/good/mean" in read_json_lines(folder / "runs/d/metrics.jsonl")[0]


def test_a_run_that_failed_at_once_does_not_block_its_folder(folder):
    assert run(folder, "train", *QUICK, "--reward", "mine.py:nan", "--out", "runs/e").returncode == 2
    assert run(folder, "train", *QUICK, "--out", "runs/e").returncode == 0


def test_settings_are_read_from_the_folder(folder):
    (folder / "settings.ini").write_text("[workbench]\nruns_path = elsewhere\nseed = 7\n")
    try:
        assert run(folder, "train", *QUICK, "--recipe", "rloo").returncode == 0
        assert (folder / "elsewhere/rloo-bandit-7/metrics.jsonl").exists()
        (folder / "settings.ini").write_text("[workbench]\nsead = 7\n")
        wrong = run(folder, "train", *QUICK)
        assert wrong.returncode == 2 and "unknown key 'sead'" in wrong.stderr
    finally:
        (folder / "settings.ini").unlink()


def test_a_run_folder_is_no_demo(folder):
    """--force of the demo must not remove what an ordinary run wrote."""
    assert run(folder, "train", *QUICK, "--recipe", "grpo", "--out", "mine/grpo").returncode == 0
    kept = snapshot(folder / "mine")
    refused = run(folder, "demo", "--out", "mine", "--force")
    assert refused.returncode == 2 and "mine already holds something" in refused.stderr
    assert snapshot(folder / "mine") == kept


def test_broken_settings_are_one_sentence(folder):
    (folder / "settings.ini").write_text("[workbench]\nno equals sign\n")
    try:
        done = run(folder, "train", *QUICK)
        assert done.returncode == 2 and "can't be read" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    finally:
        (folder / "settings.ini").unlink()


def test_report_and_resume_of_a_run_that_was_not_looked_at_before(folder):
    from rlworkbench.training.job import train
    from rlworkbench.training.run import Config
    train(Config(task="bandit", policy="table", steps=2, prompts=3, group=4, evaluate=3), folder / "runs/f", before=False)
    assert run(folder, "report", "runs/f").returncode == 0
    assert run(folder, "resume", "runs/f", "--steps", "3").returncode == 0


def test_lists_and_json(folder):
    recipes = json.loads(run(folder, "list", "recipes", "--json").stdout.splitlines()[-1])
    assert {"reinforce", "rloo", "reinforce_pp", "grpo", "dr_grpo", "dapo", "gspo", "cispo", "entropy20", "sft"} <= set(recipes)
    difference = json.loads(run(folder, "show", "grpo", "dr_grpo", "--json").stdout.splitlines()[-1])
    assert {"advantage", "normalise"} <= set(difference)
    doctor = json.loads(run(folder, "doctor", "--json").stdout.splitlines()[-1])
    assert doctor["torch"] and doctor["threads"] >= 1
    assert run(folder, "validate", "digits-sum", "--limit", "5").returncode == 0


def test_eval_of_a_policy_with_intervals(folder):
    found = json.loads(run(folder, "eval", "tiny", "--n", "16", "--k", "2", "--json").stdout.splitlines()[-1])
    assert found["greedy_low"] <= found["greedy"] <= found["greedy_high"]
    assert found["format"] > .9


def test_the_installed_command_speaks_to_a_terminal(folder):
    command = Path(sys.executable).parent / "rlworkbench"
    done = subprocess.run([command, "train", *QUICK, "--recipe", "grop"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("rlworkbench: unknown recipe 'grop'; did you mean grpo") and done.stderr.count("\n") == 1
    assert "train" in subprocess.run([command, "--help"], cwd=folder, capture_output=True, text=True).stdout


# what is said, and how often something is made

def test_names_never_run_into_the_text(folder):
    for kind in ("recipes", "tasks", "policies", "claims"):
        said, known = run(folder, "list", kind).stdout.splitlines(), json.loads(run(folder, "list", kind, "--json").stdout.splitlines()[-1])
        width = max(map(len, known))
        assert [line[:width].rstrip() for line in said] == sorted(known)
        assert all(line[width:width + 2] == "  " and line[width + 2:width + 3] != " " for line in said if line[width:].strip())
    assert max(map(len, known)) != 18


@pytest.fixture(scope="module")
def small_run(folder):
    assert run(folder, "train", *QUICK[:-2], "--steps", "4", "--seed", "0", "--evaluate", "0", "--out", "small").returncode == 0
    return "small"


def test_diff_says_in_words_where_nothing_differs(folder, small_run):
    own = json.loads((folder / small_run / "config.json").read_text())["recipe"]
    same = run(folder, "diff", small_run, "--step", "2", "--recipes", own).stdout
    assert "There is nothing to compare with" in same and "Empty DataFrame" not in same
    alike = run(folder, "diff", small_run, "--step", "2", "--recipes", "gspo,dr_grpo").stdout
    assert "Empty DataFrame" not in alike and ("pushes every token as" in alike or "tokens that gspo pushes otherwise" in alike)


def test_diff_counts_the_steps_it_makes_again(folder, small_run, monkeypatch):
    from rlworkbench.cli import ask
    bars = []

    class Bar:
        def __init__(self, total, quiet):
            self.total, self.done = total, 0
            bars.append(self)

        def update(self):
            self.done += 1

        def __enter__(self):
            return self

        def __exit__(self, *what):
            pass
    monkeypatch.setattr(ask, "bar", Bar)
    assert run(folder, "diff", small_run, "--step", "4", "--recipes", "gspo").returncode == 0
    assert [(b.total, b.done) for b in bars] == [(3, 3)]


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_train_makes_its_trainer_once(folder, monkeypatch, tmp_path, more):
    """An order that looks at the policy looks once, not once more for the estimate."""
    from rlworkbench.recipes.rif import solvable
    looks, look = [], solvable.prepare

    def counted(self, *what):
        looks.append(1)
        return look(self, *what)
    monkeypatch.setattr(solvable, "prepare", counted)
    done = run(folder, "train", *QUICK[:-2], "--recipe", "rif", "--steps", "2", "--evaluate", "0", "--out", str(tmp_path / "once"), *more)
    assert done.returncode == 0, done.stderr
    assert len(looks) == 1


def test_the_estimate_leaves_no_trace_in_the_run(folder, tmp_path):
    """The trainer that was tried out is the one that trains: the same bits as one that was not."""
    from rlworkbench.training.job import train
    from rlworkbench.training.run import Config, Run
    from tests.test_resume import assert_same
    for recipe in ("rif", "stapo_random", "sft"):
        assert run(folder, "train", *QUICK[:-2], "--recipe", recipe, "--steps", "4", "--evaluate", "0", "--seed", "3", "--threads", "1",
                   "--out", str(tmp_path / recipe)).returncode == 0
        config = Run.open(tmp_path / recipe).config
        assert_same(tmp_path / recipe, train(Config(**vars(config)), tmp_path / f"{recipe}-again").folder)
