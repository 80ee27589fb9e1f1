"""A run folder outlives what happens to it: formats, full disks, lost folders, ctrl-C, clocks, forks; and it opens without this package."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlworkbench.core.config import FORMAT, read_config
from rlworkbench.core.pictures import picture_name
from rlworkbench.policies.tiny import random_tiny
from rlworkbench.training.choices import new_trainer
from rlworkbench.training.estimate import estimate
from rlworkbench.training.job import fork_run, resume, train
from rlworkbench.training.run import Config, Run

from .test_resume import TRAIN, assert_same, what_was_learned

FIXTURES = Path(__file__).parent / "fixtures"
SMALL = dict(recipe="grpo", task="bandit", policy="table", steps=6, prompts=3, group=4, lr=.1, evaluate=0, checkpoint=2, threads="1")


def copied(folder, at):
    shutil.copytree(folder, at)
    return at


@pytest.mark.parametrize("number", range(1, FORMAT + 1))
def test_a_run_of_every_format_opens_and_goes_on(number, tmp_path):
    run = Run.open(copied(FIXTURES / f"run-{number}", tmp_path / "run"))
    assert json.loads((run.folder / "config.json").read_text())["format"] == number
    assert list(run.metrics["step"]) == [1, 2, 3, 4] and run.steps() == [1, 4]
    assert set(run.tokens(4)["segment"]) <= {"answer", "other"} and run.read("result.json")["after"]["n"] == 3
    assert len(resume(run.folder, 6).metrics) == 6


def test_a_newer_format_is_refused_and_left_alone(tmp_path):
    run = train(Config(**SMALL), tmp_path / "run")
    config = json.loads((run.folder / "config.json").read_text()) | {"format": FORMAT + 1}
    (run.folder / "config.json").write_text(json.dumps(config))
    before = sorted((f, f.stat().st_mtime_ns) for f in run.folder.rglob("*"))
    with pytest.raises(ValueError, match=f"has format {FORMAT + 1}; this version of rlworkbench reads up to {FORMAT}: upgrade it"):
        Run.open(run.folder)
    assert before == sorted((f, f.stat().st_mtime_ns) for f in run.folder.rglob("*"))


def test_a_run_is_read_without_this_package(tmp_path):
    train(Config(steps=1, prompts=2, group=2, evaluate=0, max_tokens=8), tmp_path / "run")
    code = """
import json, sys
import pandas as pd
from transformers import AutoModelForImageTextToText, AutoProcessor
config = json.load(open("run/config.json"))
metrics = pd.read_json("run/metrics.jsonl", lines=True)
tokens = pd.read_parquet("run/steps/000001.parquet")
assert (config["recipe"], len(metrics), tokens["step"].unique().tolist()) == ("grpo", 1, [1])
assert {"piece", "old", "entropy", "advantage", "segment"} <= set(tokens)
model = AutoModelForImageTextToText.from_pretrained("run/checkpoints/000001", use_safetensors=True)
AutoProcessor.from_pretrained("run/checkpoints/000001")
assert sum(p.numel() for p in model.parameters()) > 1e6
assert not [m for m in sys.modules if m.startswith("rlworkbench")]
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    files = [f for f in (tmp_path / "run").rglob("*") if f.is_file()]
    assert not [f for f in files if f.suffix in (".bin", ".pt", ".pkl", ".pickle")]


# --- what can go wrong while it is written

LIMITED = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3]))); "


@pytest.mark.parametrize("bytes", [800, 3000, 9000, 12500])
def test_a_disk_that_fills_up_leaves_a_run_that_goes_on(bytes, tmp_path):
    """No file may grow beyond a limit: it hits the log, a table or a checkpoint, whichever is larger."""
    config = SMALL | dict(steps=12, record="full")
    train(Config(**config), tmp_path / "whole")
    code = TRAIN.replace("import json, sys; ", "import json, sys; " + LIMITED)
    done = subprocess.run([sys.executable, "-c", code, json.dumps(config), str(tmp_path / "run"), str(bytes)], capture_output=True, text=True)
    assert done.returncode and "go on with: rlworkbench resume" in done.stderr.splitlines()[-1], done.stderr[-800:]
    assert not list((tmp_path / "run").rglob("*.tmp")) and not list((tmp_path / "run").rglob(".*.new"))
    resume(tmp_path / "run")
    assert_same(tmp_path / "whole", tmp_path / "run")


def test_a_folder_that_goes_away_is_said_in_a_sentence(tmp_path):
    def remove(run, step):
        if step.clock[0] == 2:
            shutil.rmtree(run.folder)
    with pytest.raises(ValueError, match="went away while the run was writing into it"):
        train(Config(**SMALL), tmp_path / "run", remove)
    assert not (tmp_path / "run").exists()


def test_a_clock_that_jumps_changes_nothing(tmp_path, monkeypatch):
    train(Config(**SMALL), tmp_path / "whole")
    real, count = time.time, iter(range(10**6))
    monkeypatch.setattr(time, "time", lambda: real() + (-1) ** next(count) * 1e9)
    train(Config(**SMALL), tmp_path / "run")
    assert_same(tmp_path / "whole", tmp_path / "run")
    metrics = Run.open(tmp_path / "run").metrics
    assert (metrics[[c for c in metrics if c.startswith("time/")]] >= 0).all(axis=None)


def test_ctrl_c_says_how_to_go_on_and_going_on_is_the_same(tmp_path):
    options = ["--task", "bandit", "--policy", "table", "--steps", "300", "--prompts", "3", "--group", "4", "--evaluate", "0", "--threads", "1"]
    command = [sys.executable, "-c", "from rlworkbench.cli.main import main; main()", "train", *options, "--out"]
    hears = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)      # a job in the background would be born deaf to it
    process = subprocess.Popen([*command, "run"], cwd=tmp_path, stderr=subprocess.PIPE, text=True, preexec_fn=hears)
    while process.poll() is None and not list(tmp_path.glob("run/checkpoints/[0-9]*")):
        time.sleep(.02)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "Traceback" not in said
    assert said.strip().splitlines()[-1] == "rlworkbench: interrupted; go on with: rlworkbench resume run"
    assert subprocess.run([*command, "whole"], cwd=tmp_path, capture_output=True).returncode == 0
    resume(tmp_path / "run")
    assert_same(tmp_path / "whole", tmp_path / "run")


def test_data_or_reward_that_changed_is_noticed(tmp_path):
    data, reward = tmp_path / "sums.jsonl", tmp_path / "mine.py"
    data.write_text("".join(json.dumps({"prompt": f"What is {a}+{b}?", "answer": str(a + b)}) + "\n" for a in range(5) for b in range(6)))
    reward.write_text("def score(item, text):\n    return float(item.answer in text)\n")
    config = Config(task=f"jsonl:{data},max_tokens=8", policy="random-tiny", reward=f"{reward}:score", steps=2, prompts=2, group=2, evaluate=0, threads="1")
    run = train(config, tmp_path / "run")
    assert set(run.digests) == {"task", "reward"} and len(resume(run.folder, 3).metrics) == 3
    reward.write_text("def score(item, text):\n    return 1.0\n")
    with pytest.raises(ValueError, match="the reward of .* has changed since it began"):
        resume(run.folder, 4)


def test_a_folder_of_somebody_elses_is_neither_written_to_nor_removed(tmp_path):
    """A model's folder has a config.json, too."""
    random_tiny().save(tmp_path / "model")
    (tmp_path / "model" / "notes").mkdir()
    (tmp_path / "model" / "notes" / "thesis.txt").write_text("mine")
    before = {f: f.read_bytes() for f in (tmp_path / "model").rglob("*") if f.is_file()}
    with pytest.raises(ValueError, match="already holds something"):
        train(Config(**SMALL), tmp_path / "model")
    assert before == {f: f.read_bytes() for f in (tmp_path / "model").rglob("*") if f.is_file()}
    with pytest.raises(ValueError, match="is not a run"):
        Run.open(tmp_path / "model")


def test_a_run_that_fails_at_once_removes_only_what_it_made(tmp_path):
    (tmp_path / "mine.py").write_text("def score(item, text):\n    return 1 / 0\n")
    config = Config(**SMALL | dict(reward=f"{tmp_path}/mine.py:score"))
    with pytest.raises(ValueError, match="ZeroDivisionError"):
        train(config, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    begun = Run.create(tmp_path / "begun", Config(**SMALL))
    (begun.folder / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="ZeroDivisionError"):
        train(config, begun.folder)
    assert (begun.folder / "notes.txt").read_text() == "mine"


def test_weights_that_changed_under_a_run_are_noticed(tmp_path):
    random_tiny().save(tmp_path / "model")
    config = Config(policy=str(tmp_path / "model"), task="text-sum", steps=1, prompts=2, group=2, max_tokens=4, evaluate=0, lora=2, threads="1")
    run = train(config, tmp_path / "run")
    assert len(resume(run.folder, 2).metrics) == 2
    random_tiny(seed=1).save(tmp_path / "model")
    with pytest.raises(ValueError, match="the policy of .* has changed since it began"):
        resume(run.folder, 3)


# --- forks

def test_a_fork_without_a_change_is_the_run(tmp_path):
    whole = train(Config(**SMALL), tmp_path / "whole")
    for at in (0, 3, 4):
        assert_same(whole.folder, fork_run(whole.folder, at, tmp_path / f"fork-{at}").folder)


def test_a_fork_of_a_fork_whose_checkpoint_is_gone_asks_its_parents(tmp_path):
    whole = train(Config(**SMALL), tmp_path / "whole")
    child, twin = (fork_run(whole.folder, 2, tmp_path / name, recipe="dapo") for name in ("child", "twin"))
    shutil.rmtree(child.folder / "checkpoints")
    assert_same(twin.folder, fork_run(child.folder, 4, tmp_path / "grandchild").folder)
    resume(child.folder, 6)
    assert_same(twin.folder, child.folder)


def test_a_fork_that_was_killed_goes_on(tmp_path):
    whole = train(Config(**SMALL), tmp_path / "whole")

    def stop(run, step):
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        fork_run(whole.folder, 3, tmp_path / "fork", stop, recipe="rloo")
    resume(tmp_path / "fork")
    assert_same(fork_run(whole.folder, 3, tmp_path / "twin", recipe="rloo").folder, tmp_path / "fork")


def test_a_fork_of_tiny_keeps_pictures_and_reference(tmp_path):
    config = dict(steps=3, prompts=2, group=2, max_tokens=8, evaluate=0, threads="1")
    whole = train(Config(**config), tmp_path / "whole")
    other = fork_run(whole.folder, 2, tmp_path / "fork")
    assert_same(whole.folder, other.folder)
    assert {f.name for f in (whole.folder / "images").iterdir()} == {f.name for f in (other.folder / "images").iterdir()}
    first = whole.tokens(1)["item"].iloc[0]
    assert (other.folder / "images" / picture_name(first, 0)).exists()


@pytest.mark.parametrize("keep, left", [(1, [6]), (2, [4, 6]), (0, [2, 4, 6])])
def test_as_many_checkpoints_stay_as_were_asked_for(keep, left, tmp_path):
    run = train(Config(**SMALL, keep=keep), tmp_path / "run")
    assert [int(c.name) for c in run.checkpoints()] == left


# --- adapters

def test_adapters_train_save_resume_and_fork_to_the_same_bits(tmp_path):
    config = dict(steps=3, prompts=2, group=2, max_tokens=8, evaluate=0, threads="1", lora=4, checkpoint=1)
    whole = train(Config(**config), tmp_path / "whole")
    part = train(Config(**config | dict(steps=1)), tmp_path / "part")
    resume(part.folder, 3)
    assert_same(whole.folder, part.folder)
    assert_same(whole.folder, fork_run(whole.folder, 2, tmp_path / "fork").folder)
    assert sum(f.stat().st_size for f in whole.checkpoints()[-1].rglob("*")) < 3e6


# --- what a run needs

def test_the_estimate_of_time_and_memory_is_about_right():
    """In a process of its own, since the largest memory that a process had is never forgotten."""
    code = """
import json, time, torch
torch.set_num_threads(1)
from rlworkbench.policies.tiny import random_tiny
from rlworkbench.training.choices import new_trainer
from rlworkbench.training.estimate import estimate
from rlworkbench.training.run import Config
trainer = new_trainer(Config(prompts=24, group=8))
need = estimate(trainer, 1)
spent = min(timed(trainer) for _ in range(2))
most = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps([need, spent, most]))
""".replace("spent =", "def timed(t):\n    start = time.process_time()\n    t.step()\n    return time.process_time() - start\nspent =")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    need, spent, peak = json.loads(out.splitlines()[-1])
    assert .4 < need["cpu_seconds"] / spent < 2.5
    assert .6 < need["megabytes"] * 1e6 / peak < 1.7


def test_micro_batches_and_adapters_lower_the_estimate():
    megabytes = lambda **how: estimate(new_trainer(Config(prompts=16, threads="1", **how)), 1)["megabytes"]
    plain = megabytes()
    assert megabytes(micro=16) < plain


def test_the_folder_of_a_run_takes_no_path_from_its_task():
    from rlworkbench.cli.train import slug
    assert slug("grpo-jsonl:/data/my problems.jsonl,verifier=exact-3") == "grpo-jsonl-my-problems.jsonl-3"
    assert os.sep not in slug("grpo-jsonl:../../x/y.jsonl-0")


def updates(run):
    "How many updates a step of a run made: the moments count them."
    return int(next(w for n, w in what_was_learned(run.folder)[0].items() if n.endswith("/step"))) / len(run.metrics)


def test_minibatches_and_passes_are_the_runs_own(tmp_path):
    """Said in the config they win over the recipe; resume, fork and `train --config` make the same updates."""
    several = Config(**SMALL | {"prompts": 4, "recipe": "kl_cov", "batches": 4, "epochs": 2})
    whole = train(several, tmp_path / "whole")
    assert json.loads((whole.folder / "config.json").read_text())["batches"] == 4 and updates(whole) == 8
    assert updates(train(Config(**SMALL | {"prompts": 4, "recipe": "kl_cov"}), tmp_path / "usual")) == 2
    assert updates(train(Config(**SMALL | {"prompts": 4, "recipe": "sft", "batches": 2}), tmp_path / "lesson")) == 2
    train(Config(**vars(several) | {"steps": 3}), tmp_path / "half")
    assert_same(whole.folder, resume(tmp_path / "half", 6).folder)
    assert_same(whole.folder, fork_run(whole.folder, 3, tmp_path / "same").folder)
    assert_same(whole.folder, train(read_config(whole.folder / "config.json"), tmp_path / "again").folder)
    other = fork_run(whole.folder, 4, tmp_path / "other", recipe="grpo")
    assert (other.config.batches, other.config.epochs) == (4, 2)


def test_a_run_of_this_format_without_the_newer_keys_opens(tmp_path):
    run = train(Config(**SMALL), tmp_path / "run")
    config = json.loads((run.folder / "config.json").read_text())
    (run.folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in ("batches", "epochs")}))
    assert Run.open(run.folder).config == Config(**SMALL) and len(resume(run.folder, 7).metrics) == 7


def test_passes_are_in_the_estimate():
    def cpu(**how):
        trainer = new_trainer(Config(prompts=8, group=4, threads="1", evaluate=0, **how))
        return min(estimate(trainer, 10)["cpu_seconds"] for _ in range(3))
    once, thrice = cpu(), cpu(epochs=6)
    assert thrice > 1.5 * once and cpu(batches=4) > .5 * once
