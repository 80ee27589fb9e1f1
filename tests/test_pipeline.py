"""A pipeline that is killed in any stage comes to the same bits; mistakes are one sentence; what was done stands."""
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rlworkbench.cli.main import app
from rlworkbench.serving.stages import pipeline_page, stage_rows
from rlworkbench.training.pipeline import READY, Pipeline, kept_of, open_pipeline, read_pipeline
from rlworkbench.training.stages import Training
from tests.test_resume import assert_same

BANDIT = dict(task="bandit", policy="table", prompts=3, group=4, lr=.1, evaluate=3, checkpoint=2, threads="1")
STAGES = [{"name": "imitate", "recipe": "sft", "steps": 5, **BANDIT},
          {"name": "reinforce", "recipe": "grpo", "steps": 6, **BANDIT, "policy": "{previous}"},
          {"name": "again", "recipe": "reinforce", "steps": 4, **BANDIT, "policy": "{imitate}"}]
RUN = "import sys; from rlworkbench.training.pipeline import read_pipeline; read_pipeline(sys.argv[1]).run(sys.argv[2])"


def plan(folder, stages=STAGES, **more):
    "A plan in a file."
    file = folder / "plan.json"
    file.write_text(json.dumps({"name": "three", "stages": stages, "battery": []} | more))
    return file


def assert_same_stages(a, b):
    one, other = open_pipeline(a), open_pipeline(b)
    assert [(d["name"], d["battery"]) for d in one["done"]] == [(d["name"], d["battery"]) for d in other["done"]]
    assert one["before"] == other["before"] and other["failed"] is None
    for done in one["done"]:
        assert_same(a / done["folder"], b / done["folder"])
        assert json.loads((a / done["folder"] / "result.json").read_text()) == json.loads((b / done["folder"] / "result.json").read_text())


class Interrupted(BaseException):
    "What a killed process looks like from inside: nothing is tidied up."


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "All three stages, never interrupted."
    folder = tmp_path_factory.mktemp("whole")
    read_pipeline(plan(folder)).run(folder / "out")
    return folder / "out"


@pytest.mark.parametrize("number", [0, 4, 6, 12])
def test_stopped_after_a_step_of_any_stage(number, whole, tmp_path):
    seen = []

    def stop(run, step):
        seen.append(step)
        if len(seen) == number + 1:
            raise Interrupted
    with pytest.raises(Interrupted):
        read_pipeline(plan(tmp_path)).run(tmp_path / "killed", stop)
    read_pipeline(plan(tmp_path)).run(tmp_path / "killed")
    assert_same_stages(whole, tmp_path / "killed")


@pytest.mark.parametrize("where", ["evaluating", "saving", "making", "noting"])
def test_stopped_between_steps(where, whole, tmp_path, monkeypatch):
    from rlworkbench.training import job, pipeline, run
    place, name, nth = {"evaluating": (job, "evaluate", 4), "saving": (run, "write_state", 5), "making": (job, "new_trainer", 2), "noting": (pipeline, "save", 3)}[where]
    real, calls = getattr(place, name), []

    def stop(*a, **k):
        calls.append(1)
        if len(calls) == nth:
            raise Interrupted
        return real(*a, **k)
    with monkeypatch.context() as patched:
        patched.setattr(place, name, stop)
        with pytest.raises(Interrupted):
            read_pipeline(plan(tmp_path)).run(tmp_path / "killed")
    read_pipeline(plan(tmp_path)).run(tmp_path / "killed")
    assert_same_stages(whole, tmp_path / "killed")


def test_a_stage_begins_with_what_the_one_before_left(whole):
    of = lambda stage, when: json.loads((whole / stage / "result.json").read_text())[when]["sampled"]
    assert of("2-reinforce", "before") == of("3-again", "before") == of("1-imitate", "after") != of("2-reinforce", "after")


def test_what_is_done_is_not_done_again(whole, tmp_path):
    files = {f: f.stat().st_mtime_ns for f in whole.rglob("*.safetensors")}
    read_pipeline(plan(tmp_path)).run(whole)
    assert files and all(f.stat().st_mtime_ns == t for f, t in files.items())


def test_a_failed_stage_leaves_the_others_standing(tmp_path):
    spec = tmp_path / "mine.py"
    spec.write_text("class Odd:\n    def run(self, folder):\n        open(folder)\n")
    broken = [STAGES[0], {"name": "odd", "object": f"{spec}:Odd"}]
    with pytest.raises(ValueError, match="stage 2 of 2, odd: .*No such file"):
        read_pipeline(plan(tmp_path, broken)).run(tmp_path / "out")
    assert [d["name"] for d in open_pipeline(tmp_path / "out")["done"]] == ["imitate"]
    assert "<b>Stopped:</b> stage 2 of 2, odd" in pipeline_page(tmp_path / "out")
    assert [r[3] for r in stage_rows(tmp_path / "out", open_pipeline(tmp_path / "out"))] == ["done", "failed"]
    spec.write_text("from pathlib import Path\nclass Odd:\n    def run(self, folder):\n        Path(folder).mkdir()\n")
    state = read_pipeline(plan(tmp_path, [*broken, STAGES[1]])).run(tmp_path / "out")
    assert [(d["name"], d["policy"]) for d in state["done"]] == [("imitate", "1-imitate"), ("odd", ""), ("reinforce", "3-reinforce")] and state["failed"] is None


def test_a_policy_that_was_damaged_between_stages_is_noticed(tmp_path):
    read_pipeline(plan(tmp_path, STAGES[:1])).run(tmp_path / "out")
    with pytest.raises(Interrupted):
        read_pipeline(plan(tmp_path, STAGES[:2])).run(tmp_path / "out", lambda run, step: (_ for _ in ()).throw(Interrupted()) if step.clock[0] == 3 else None)
    weights = next((tmp_path / "out" / "1-imitate").rglob("*.safetensors"))
    weights.write_bytes(weights.read_bytes() + b" ")
    with pytest.raises(ValueError, match="stage 2 of 2, reinforce: the checkpoint .*1-imitate.* is broken"):
        read_pipeline(plan(tmp_path, STAGES[:2])).run(tmp_path / "out")


@pytest.mark.parametrize(("stages", "said"), [
    ([], "wants a list of stages"),
    ([{"name": "a", "task": "bandit"}], "stage 1: a stage has one of recipe, build and object; this has none, but name, task"),
    ([{"recipe": "grop"}], "stage 1 of 1, grop: unknown recipe 'grop'"),
    ([STAGES[0], {**STAGES[1], "steps": 0}], "stage 2: steps must be a whole number, 1 or more"),
    ([{**STAGES[0], "policy": "{previous}"}], "the first stage wants a policy to begin with"),
    ([STAGES[0], {**STAGES[1], "policy": "{later}"}], "policy names the stage 'later'; before it there are imitate, previous"),
    ([STAGES[0], STAGES[0]], "the name 'imitate' is taken"),
    ([{**STAGES[0], "name": "../a"}], "is taken, or is more than letters"),
    ([STAGES[0], {**STAGES[1], "group": 1}], "stage 2 of 2, reinforce: recipe 'grpo' compares replies within a group"),
    ([STAGES[0], {"name": "b", "object": "none.py:x"}], "stage 2: an object is FILE.py:NAME with an existing file"),
    ([{"build": "tinny"}], "unknown variant 'tinny'; did you mean tiny"),
])
def test_bad_plans(stages, said, tmp_path):
    with pytest.raises(ValueError) as e:
        read_pipeline(plan(tmp_path, stages)).run(tmp_path / "out")
    assert said in str(e.value) and "\n" not in str(e.value)
    assert not (tmp_path / "out").exists()


def test_demonstrations_that_are_missing_are_said_before_the_first_stage(tmp_path):
    (tmp_path / "mine.jsonl").write_text("\n".join(json.dumps({"prompt": f"What is {k}+1?", "answer": str(k + 1)}) for k in range(40)))
    stages = [{"name": "a", "recipe": "grpo", "policy": "small-llama", "task": "text-sum", "steps": 1, "evaluate": 0},
              {"name": "b", "recipe": "sft", "task": f"jsonl:{tmp_path}/mine.jsonl", "steps": 1, "evaluate": 0}]
    with pytest.raises(ValueError, match="stage 2 of 2, b: .*has no demonstration; 'sft' learns from given replies"):
        read_pipeline(plan(tmp_path, stages)).run(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_else(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="already holds something that is no pipeline"):
        read_pipeline(plan(tmp_path)).run(tmp_path / "out")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


def test_a_stage_is_anything_that_runs(tmp_path):
    from dataclasses import replace

    class Choose:
        def run(self, folder):
            folder.mkdir()
            (folder / "chosen.jsonl").write_text("\n".join(json.dumps({"prompt": f"What is {k}+2?", "answer": str(k + 2), "demo": f"<answer>{k + 2}</answer>"}) for k in range(40)))
    train = read_pipeline(plan(tmp_path, [{"name": "x", "recipe": "sft", "policy": "small-llama", "task": "text-sum", "steps": 2, "prompts": 2, "group": 1, "evaluate": 0}])).stages["x"]
    learn = Training(replace(train.config, task="jsonl:{choose}/chosen.jsonl"))
    state = Pipeline("mine", {"choose": Choose(), "learn": learn}, battery=()).run(tmp_path / "out")
    assert [(d["name"], d["policy"]) for d in state["done"]] == [("choose", ""), ("learn", "2-learn")]


def test_ready_ones_can_be_had_from_the_command_line(tmp_path):
    said = CliRunner().invoke(app, ["pipeline", "--json"])
    assert said.exit_code == 0 and set(json.loads(said.output)) == set(READY) == {"sft-grpo", "lmm-r1", "warm-up"}
    out = CliRunner().invoke(app, ["pipeline", str(plan(tmp_path)), "--out", str(tmp_path / "out"), "--json"])
    assert out.exit_code == 0 and len(json.loads(out.output.splitlines()[-1])["done"]) == 3
    assert (tmp_path / "out" / "report.html").is_file()
    assert "report:" in CliRunner().invoke(app, ["report", str(tmp_path / "out")]).output


def test_a_mistake_is_one_sentence_and_exit_2(tmp_path):
    done = subprocess.run([str(Path(sys.executable).parent / "rlworkbench"), "pipeline", "lmm-r2"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "did you mean lmm-r1" in done.stderr


def test_the_matrix_says_which_stage_taught_what():
    state = {"name": "x", "before": {"digits-read": .9, "kk": 0.}, "n": 10, "done": [
        {"name": "a", "battery": {"digits-read": .5, "kk": .4}, "is": {"recipe": "sft", "task": "few:9,kk"}}, {"name": "b", "battery": {}, "is": {"build": "tiny"}},
        {"name": "c", "battery": {"digits-read": .7, "kk": .1}, "is": {"recipe": "grpo", "task": "digits-read"}}]}
    kept = kept_of(state)
    assert kept.taught == ("", "kk", "digits-read") and [kept.since(k) for k in (0, 1)] == [2, 1]
    assert kept.backward() == pytest.approx(-.3)


@pytest.mark.slow
def test_a_pipeline_killed_twelve_times(tmp_path):
    """SIGKILL at random instants in any stage, the same command again, until it is done: the same bits."""
    stages = [{**s, "steps": 120, "record": "full", "checkpoint": 7} for s in STAGES]
    file = plan(tmp_path, stages)
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", RUN, str(file), str(tmp_path / "whole")], check=True)
    length, stream, kills = time.perf_counter() - start, random.Random(0), 0
    for k in range(6):
        for _ in range(12):
            process = subprocess.Popen([sys.executable, "-c", RUN, str(file), str(tmp_path / f"killed-{k}")], stderr=subprocess.DEVNULL)
            try:
                process.wait(length * (.3 + .6 * stream.random()))
                break
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                kills += 1
        read_pipeline(file).run(tmp_path / f"killed-{k}")
        assert_same_stages(tmp_path / "whole", tmp_path / f"killed-{k}")
    assert kills >= 6
