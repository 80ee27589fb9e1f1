"""A pipeline that is killed in any stage comes to the same bits; mistakes are one sentence; what was done stands."""
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rlworkbench.cli.main import app, main
from rlworkbench.core.config import Config
from rlworkbench.serving.stages import pipeline_page, stage_rows
from rlworkbench.training.job import train
from rlworkbench.training.pipeline import READY, Pipeline, kept_of, open_pipeline, read_pipeline
from rlworkbench.training.run import Run
from rlworkbench.training.stages import Training
from tests.test_resume import assert_same

BANDIT = dict(task="bandit", policy="table", prompts=3, group=4, lr=.1, evaluate=3, checkpoint=2, threads="1")
STAGES = [{"name": "imitate", "recipe": "sft", "steps": 5, **BANDIT},
          {"name": "reinforce", "recipe": "grpo", "steps": 6, **BANDIT, "policy": "{previous}"},
          {"name": "again", "recipe": "reinforce", "steps": 4, **BANDIT, "policy": "{imitate}"}]
CHOOSE = {"name": "choose", "select": "rif,samples=16", "task": "bandit", "budget": .67, "threads": "1"}
LEARN = {"name": "learn", "recipe": "sft", "steps": 4, **BANDIT, "policy": "{previous}", "select": "{choose}"}
CHOICE = [STAGES[0], {**CHOOSE, "policy": "{imitate}"}, LEARN]
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
        if "select" in done["is"] and "recipe" not in done["is"]:
            assert (a / done["folder"] / "selection.json").read_bytes() == (b / done["folder"] / "selection.json").read_bytes()
            continue
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


@pytest.fixture(scope="module")
def chosen(tmp_path_factory):
    "A training, a selection with what it made, a training on what was selected; never interrupted."
    folder = tmp_path_factory.mktemp("chosen")
    read_pipeline(plan(folder, CHOICE)).run(folder / "out")
    return folder / "out"


def stopped_at(place, name, nth, monkeypatch, file, folder):
    "Run a pipeline that is interrupted when a function of a module is called for the n-th time."
    real, calls = getattr(place, name), []

    def stop(*a, **k):
        calls.append(1)
        if len(calls) == nth:
            raise Interrupted
        return real(*a, **k)
    with monkeypatch.context() as patched:
        patched.setattr(place, name, stop)
        with pytest.raises(Interrupted):
            read_pipeline(file).run(folder)


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
    stopped_at(place, name, nth, monkeypatch, plan(tmp_path), tmp_path / "killed")
    read_pipeline(plan(tmp_path)).run(tmp_path / "killed")
    assert_same_stages(whole, tmp_path / "killed")


def interrupted(folder, number, file):
    "A pipeline that ended after so many steps."
    seen = []

    def stop(run, step):
        seen.append(step)
        if len(seen) == number:
            raise Interrupted
    with pytest.raises(Interrupted):
        read_pipeline(file).run(folder, stop)


def texts_of(folder):
    return {f: f.read_text() for f in folder.rglob("*.json")}


@pytest.mark.parametrize("number", [5, 8, 13])
def test_a_folder_that_was_moved_goes_on_to_the_same_bits(number, whole, tmp_path):
    file, there = plan(tmp_path), tmp_path / "elsewhere" / "out"
    interrupted(tmp_path / "killed", number, file)
    there.parent.mkdir()
    shutil.move(tmp_path / "killed", there)
    read_pipeline(file).run(there)
    assert_same_stages(whole, there)
    assert not (tmp_path / "killed").exists() and all(f"{tmp_path}/killed" not in text for text in texts_of(there).values())


def test_a_folder_that_moves_into_its_own_place_twice_interrupted(whole, tmp_path, monkeypatch):
    from rlworkbench.training import pipeline
    file, there = plan(tmp_path), tmp_path / "out" / "out"
    interrupted(tmp_path / "out", 13, file)
    shutil.move(tmp_path / "out", tmp_path / "aside")
    shutil.move(tmp_path / "aside", there)
    real, calls = pipeline.write_text, []

    def stop(*a):
        calls.append(1)
        real(*a)
        raise Interrupted
    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "write_text", stop)
        with pytest.raises(Interrupted):
            read_pipeline(file).run(there)
    read_pipeline(file).run(there)
    assert calls == [1]
    assert_same_stages(whole, there)


def test_a_copy_and_its_original_go_on_apart(whole, tmp_path):
    file = plan(tmp_path)
    interrupted(tmp_path / "one", 8, file)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    before = texts_of(tmp_path / "one")
    read_pipeline(file).run(tmp_path / "two")
    assert texts_of(tmp_path / "one") == before
    read_pipeline(file).run(tmp_path / "one")
    for folder in ("one", "two"):
        assert_same_stages(whole, tmp_path / folder)


def test_adapters_of_a_moved_folder_lie_over_the_stage_before(tmp_path):
    law = dict(task="text-sum", steps=3, prompts=2, group=1, lr=1e-3, evaluate=0, checkpoint=1, threads="1", recipe="sft")
    file = plan(tmp_path, [{"name": "a", "policy": "small-llama", **law}, {"name": "b", "lora": 2, **law}, {"name": "c", **law}])
    read_pipeline(file).run(tmp_path / "whole")
    interrupted(tmp_path / "killed", 5, file)
    shutil.move(tmp_path / "killed", tmp_path / "moved")
    read_pipeline(file).run(tmp_path / "moved")
    for stage in ("1-a", "2-b", "3-c"):
        assert_same(tmp_path / "whole" / stage, tmp_path / "moved" / stage)


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
    ([{"name": "a", "task": "bandit"}], "stage 1: a stage has one of recipe, select, build and object; this has none, but name, task"),
    ([{"recipe": "grop"}], "stage 1 of 1, grop: unknown recipe 'grop'"),
    ([STAGES[0], {**STAGES[1], "steps": 0}], "stage 2: steps must be a whole number, 1 or more"),
    ([{**STAGES[0], "policy": "{previous}"}], "the first stage wants a policy to begin with"),
    ([STAGES[0], {**STAGES[1], "policy": "{later}"}], "policy names the stage 'later'; before it there are imitate, previous"),
    ([STAGES[0], STAGES[0]], "the name 'imitate' is taken"),
    ([{**STAGES[0], "name": "../a"}], "is taken, or is more than letters"),
    ([STAGES[0], {**STAGES[1], "group": 1}], "stage 2 of 2, reinforce: recipe 'grpo' compares replies within a group"),
    ([STAGES[0], {"name": "b", "object": "none.py:x"}], "stage 2: an object is FILE.py:NAME with an existing file"),
    ([{"build": "tinny"}], "unknown variant 'tinny'; did you mean tiny"),
    ([{"build": "micro-kk", "steps": "many"}], "stage 1: steps must be a whole number, 1 or more, got 'many'"),
    ([{"build": "micro-kk", "steps": 0}], "stage 1: steps must be a whole number, 1 or more, got 0"),
    ([{"build": "smollm2", "steps": 3}], "stage 1 of 1, smollm2: smollm2 is not trained; it takes no steps"),
    ([{"build": ["tiny"]}], "stage 1: build must be text, got ['tiny']"),
    ([STAGES[0], {**STAGES[1], "watch": "battery:until=digits-sum@2"}], "stage 2 of 2, reinforce: until wants a share above 0 and at most 1, as in digits-sum@0.75, got 'digits-sum@2'"),
    ([STAGES[0], {**STAGES[1], "watch": "batery"}], "stage 2 of 2, reinforce: unknown watcher 'batery'; did you mean battery"),
    ([STAGES[0], {**STAGES[1], "select": "randon", "budget": .5}], "unknown selector 'randon'; did you mean random"),
    ([STAGES[0], {**CHOOSE, "steps": 3}], "stage 2: unknown key 'steps'"),
    ([STAGES[0], {k: v for k, v in CHOOSE.items() if k != "budget"}], "stage 2 of 2, choose: rif needs a budget, the share of the pool to take"),
    ([STAGES[0], {**CHOOSE, "select": "stat"}], "stage 2 of 2, choose: stat selects for a purpose: query names a task"),
    ([STAGES[0], {**CHOOSE, "select": "rif,sample=3"}], "unknown option of rif 'sample'; did you mean samples"),
    ([STAGES[0], {**CHOOSE, "select": "less", "query": "text-sum", "task": "jsonl:BARE"}], "stage 2 of 2, choose: less reads demonstrations, but"),
    ([CHOOSE, {**LEARN, "task": "text-sum"}], "stage 2 of 2, learn: it learns from text-sum, but choose selects from bandit"),
    ([STAGES[0], {**LEARN, "select": "{imitate}"}], "stage 2 of 2, learn: it learns from the selection of imitate, which selects nothing"),
    ([STAGES[0], {**LEARN, "select": "{chose}"}], "select names the stage 'chose'; before it there are imitate, previous"),
])
def test_bad_plans(stages, said, tmp_path):
    (tmp_path / "bare.jsonl").write_text("\n".join(json.dumps({"prompt": f"What is {k}+1?", "answer": str(k + 1)}) for k in range(40)))
    stages = json.loads(json.dumps(stages).replace("BARE", f"{tmp_path}/bare.jsonl"))
    with pytest.raises(ValueError) as e:
        read_pipeline(plan(tmp_path, stages)).run(tmp_path / "out")
    assert said in str(e.value) and "\n" not in str(e.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("more", "said"), [
    ({"battery": [3]}, "battery is a list of names of tasks and n a number of problems, got [3] and 48"),
    ({"battery": ["digits-sun"], "stages": [{"build": "micro-kk"}]}, "unknown task 'digits-sun'; did you mean digits-sum"),
    ({"n": True}, "n a number of problems, got [] and True"),
    ({"name": 3}, "name must be text without /, got 3"),
    ({"name": "../up"}, "name must be text without /, got '../up'"),
    ({"doc": ["x"]}, "doc must be text, got ['x']"),
])
def test_wrong_values_beside_the_stages(more, said, tmp_path):
    with pytest.raises(ValueError) as e:
        read_pipeline(plan(tmp_path, **more) if "stages" not in more else plan(tmp_path, more.pop("stages"), **more)).run(tmp_path / "out")
    assert said in str(e.value) and "\n" not in str(e.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("more", [{"battery": [3]}, {"stages": [{"build": "micro-kk", "steps": "many"}]}, {"stages": [{**STAGES[0], "watch": "battery:until=digits-sum@2"}]}])
def test_wrong_values_from_the_command_line(more, tmp_path, monkeypatch, capsys):
    (tmp_path / "plan.json").write_text(json.dumps({"stages": STAGES, "battery": []} | more))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["rlworkbench", "pipeline", "plan.json", "--out", "out"])
    with pytest.raises(SystemExit) as done:
        main()
    said = capsys.readouterr().err
    assert done.value.code == 2 and said.count("\n") == 1 and said.startswith("rlworkbench: "), said
    assert sorted(f.name for f in tmp_path.iterdir()) == ["plan.json"]


def test_a_training_learns_from_what_a_stage_chose(chosen, tmp_path):
    state, told = open_pipeline(chosen), json.loads((chosen / "2-choose" / "selection.json").read_text())
    assert [(d["name"], d["policy"]) for d in state["done"]] == [("imitate", "1-imitate"), ("choose", ""), ("learn", "3-learn")]
    learned = json.loads((chosen / "3-learn" / "selection.json").read_text())
    assert learned["ids"] == told["ids"] and len(told["ids"]) == told["about"]["taken"] < told["about"]["pool"]
    assert {k: told["about"][k] for k in ("selector", "task", "policy", "query")} == {"selector": "rif", "task": "bandit", "policy": "{imitate}", "query": None}
    law = {k: v for k, v in LEARN.items() if k not in ("name", "select", "policy")} | {"policy": str(chosen / "1-imitate")}
    with_it, without = (train(Config(**law, **more), tmp_path / str(len(more))) for more in ({"select": str(chosen / "2-choose")}, {}))
    losses = Run(chosen / "3-learn").metrics["loss"].tolist()
    assert losses == with_it.metrics["loss"].tolist() != without.metrics["loss"].tolist()
    assert [r[2:5] for r in stage_rows(chosen, state)][1] == ["select rif,samples=16", "done", ""]
    again = read_pipeline(chosen / "pipeline.json")
    assert again.told() == state["plan"]


def test_what_is_chosen_depends_on_the_policy_before(chosen, tmp_path):
    stages = [{**STAGES[0], "seed": 5, "lr": 3.}, CHOOSE]
    read_pipeline(plan(tmp_path, stages)).run(tmp_path / "out")
    right = lambda folder: json.loads((folder / "2-choose" / "selection.json").read_text())["score"]
    assert right(tmp_path / "out") != right(chosen)


@pytest.mark.parametrize("where", ["choosing", "writing", "noting", "learning", "moved"])
def test_killed_around_a_selection(where, chosen, tmp_path, monkeypatch):
    from rlworkbench.training import pipeline, stages
    file, folder = plan(tmp_path, CHOICE), tmp_path / "killed"
    place, name, nth = {"choosing": (stages, "narrowed", 1), "writing": (stages, "write_text", 1), "noting": (pipeline, "save", 3)}.get(where, (None, None, None))
    if place is None:
        interrupted(folder, 7, file)
    else:
        stopped_at(place, name, nth, monkeypatch, file, folder)
    if where == "moved":
        shutil.move(folder, folder := tmp_path / "elsewhere")
        assert not (tmp_path / "killed").exists()
    read_pipeline(file).run(folder)
    assert_same_stages(chosen, folder)
    assert all(f"{tmp_path}/killed" not in text for text in texts_of(folder).values()) or where != "moved"


def test_a_selection_first_chooses_with_the_policy_it_names(tmp_path):
    state = read_pipeline(plan(tmp_path, [{**CHOOSE, "policy": "table"}, {k: v for k, v in LEARN.items() if k != "policy"}])).run(tmp_path / "out")
    assert [d["policy"] for d in state["done"]] == ["", "2-learn"]
    assert json.loads((tmp_path / "out" / "2-learn" / "config.json").read_text())["policy"] == "table"


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
    assert said.exit_code == 0 and set(json.loads(said.output)) == set(READY) == {"sft-grpo", "lmm-r1", "warm-up", "vision-r1"}
    out = CliRunner().invoke(app, ["pipeline", str(plan(tmp_path)), "--out", str(tmp_path / "out"), "--json"])
    said = json.loads(out.output.splitlines()[-1])
    assert out.exit_code == 0 and len(said["done"]) == 3 and "at" not in said
    assert [(s["name"], s["status"], s["steps"]) for s in said["stages"]] == [("imitate", "done", 5), ("reinforce", "done", 6), ("again", "done", 4)]
    assert said["stages"][0]["after"]["sampled"] == said["stages"][1]["before"]["sampled"]
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
def test_a_pipeline_killed_at_random(tmp_path):
    """SIGKILL at random instants in any stage, the same command again, until it is done: the same bits."""
    stages = [{**s, "steps": 120, "record": "full", "checkpoint": 7} for s in STAGES] + [{**CHOOSE, "select": "rif,samples=512"}, {**LEARN, "steps": 60, "checkpoint": 7}]
    file = plan(tmp_path, stages)
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", RUN, str(file), str(tmp_path / "whole")], check=True)
    length, stream, kills = time.perf_counter() - start, random.Random(0), 0
    for k in range(2):
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
    assert kills >= 2
