"""A run that is killed and taken up again ends in the same bits as one that was not."""
import json
import random
import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file

from rlworkbench.core.files import read_json_lines
from rlworkbench.training.job import resume, train
from rlworkbench.training.run import Config, Run

TRAIN = ("import json, sys; from rlworkbench.training.job import train; from rlworkbench.training.run import Config; "
         "train(Config(**json.loads(sys.argv[1])), sys.argv[2])")
RESUME = "import sys; from rlworkbench.training.job import resume; resume(sys.argv[1])"


def what_was_learned(folder):
    "Weights, moments and metrics of a run, without times."
    last = Run.open(folder).checkpoints()[-1]
    tensors = {f"{f.name}/{k}": v for f in sorted(last.glob("*.safetensors")) for k, v in load_file(f).items()}
    rows = [{k: v for k, v in row.items() if not k.startswith(("time/", "cpu/"))} for row in read_json_lines(folder / "metrics.jsonl")]
    return tensors, rows


def assert_same(a, b):
    (tensors_a, rows_a), (tensors_b, rows_b) = what_was_learned(a), what_was_learned(b)
    assert rows_a == rows_b
    assert tensors_a.keys() == tensors_b.keys()
    assert all((tensors_a[k] == tensors_b[k]).all() for k in tensors_a)


def kill_and_resume(config, whole, folder, seconds):
    "Start in a process, SIGKILL it after so many seconds, take it up again until it is done."
    process = subprocess.Popen([sys.executable, "-c", TRAIN, json.dumps(config), str(folder)], stderr=subprocess.DEVNULL)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
        if not (folder / "config.json").exists():
            train(Config(**config), folder)
        else:
            try:
                resume(folder)
            except ValueError as e:
                assert "already" in str(e)
    assert_same(whole, folder)


def test_tiny_killed_once(tmp_path):
    config = dict(recipe="grpo", steps=4, prompts=2, group=4, evaluate=0, checkpoint=2, threads="1")
    train(Config(**config), tmp_path / "whole")
    stopped = Run.create(tmp_path / "killed", Config(**config))

    def stop(run, step):
        if step.clock[0] == 2:
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        train(Config(**config), stopped.folder, stop)
    resume(stopped.folder)
    assert_same(tmp_path / "whole", stopped.folder)


@pytest.mark.parametrize("policy", ["tiny", "small-qwen"])
def test_both_families_train_save_and_go_on(policy, tmp_path):
    config = dict(recipe="grpo", policy=policy, prompts=2, group=2, max_tokens=8, evaluate=0, threads="1")
    train(Config(steps=2, **config), tmp_path / "whole")
    train(Config(steps=1, **config), tmp_path / "part")
    resume(tmp_path / "part", steps=2)
    assert_same(tmp_path / "whole", tmp_path / "part")


def test_an_interrupted_last_evaluation_can_be_finished(tmp_path):
    run = train(Config(recipe="grpo", task="bandit", policy="table", steps=2, prompts=3, group=4, evaluate=3), tmp_path / "run")
    (run.folder / "result.json").unlink()
    assert resume(run.folder).read("result.json")["after"]["n"] == 3


def test_a_watcher_that_stops_a_run_leaves_it_whole(tmp_path):
    from rlworkbench.training.choices import new_trainer
    from rlworkbench.training.health import StopRun
    from rlworkbench.training.job import work
    config = Config(recipe="grpo", task="bandit", policy="table", steps=4, prompts=3, group=4, evaluate=0)

    def stop(step):
        if step.phase == "update" and step.clock[0] == 1:
            raise StopRun("enough")
    trainer, run = new_trainer(config), Run.create(tmp_path / "stopped", config)
    trainer.watchers.append(stop)
    work(run, trainer, config, 4)
    assert run.read("stopped.json") == {"step": 2, "why": "enough"} and len(run.metrics) == 2
    resume(run.folder)
    train(config, tmp_path / "whole")
    assert_same(tmp_path / "whole", run.folder)


def test_a_run_has_one_writer(tmp_path):
    config = Config(recipe="grpo", task="bandit", policy="table", steps=2, prompts=3, group=4, evaluate=0)
    run = Run.create(tmp_path / "run", config)
    with run.locked(), pytest.raises(ValueError, match="is being written by another process"):
        resume(run.folder)


def test_a_checkpoint_of_another_shape_is_refused(tmp_path):
    config = Config(recipe="grpo", task="bandit", policy="table", steps=2, prompts=3, group=4, evaluate=0)
    run = train(config, tmp_path / "run")
    at = run.checkpoints()[-1] / "trainer.safetensors"
    at.write_bytes(at.read_bytes()[:100])
    with pytest.raises(ValueError, match="is broken"):
        resume(run.folder, 4)


@pytest.mark.slow
def test_thirty_kills(tmp_path):
    """SIGKILL at 30 random instants, several of them inside a checkpoint: 30 times the same bits."""
    config = dict(recipe="dapo", task="bandit", policy="table", steps=400, prompts=3, group=8, lr=.05, evaluate=0, checkpoint=3, record="full", threads="1")
    start = time.perf_counter()
    train(Config(**config), tmp_path / "whole")
    length, stream = time.perf_counter() - start, random.Random(0)
    for k in range(30):
        kill_and_resume(config, tmp_path / "whole", tmp_path / f"killed-{k}", 3.5 + stream.random() * length)
