"""What was selected for a run is selected once: live trainers, workers and begun folders take what is there."""
import json
import signal
from dataclasses import replace

import pytest

from rlworkbench.core.config import Config
from rlworkbench.selection.selection import Selector
from rlworkbench.serving import rivals, workers  # noqa: F401, forks of live trainers
from rlworkbench.serving.live import Live
from rlworkbench.training import choices, job
from rlworkbench.training.choices import selection_in
from rlworkbench.training.job import train
from rlworkbench.training.run import Run
from rlworkbench.training.stages import Training

SFT = Config(recipe="sft", task="bandit", policy="table", select="random", budget=.5, steps=3, prompts=2, group=1, lr=.1, evaluate=0, threads="1")
GRPO = replace(SFT, recipe="grpo", group=3)


@pytest.fixture
def asked(monkeypatch):
    "Names of the selectors that were asked, one for each time."
    said, real = [], Selector.__call__

    def call(self, *a, **k):
        said.append(self.name)
        return real(self, *a, **k)
    monkeypatch.setattr(Selector, "__call__", call)
    return said


def ids(trainer):
    return [i.id for i in trainer.task.items("train")]


def unbegun(folder, config=SFT):
    "The folder of a run that ended before its first step."
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patched:
        patched.setattr(job, "work", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
        train(config, folder)
    assert (folder / "selection.json").is_file() and not (folder / "metrics.jsonl").exists()
    return folder


def test_a_live_trainer_selects_once(asked):
    live = Live(GRPO)
    chosen = ids(live.trainer)
    list(live.run(2))
    live.fork("reinforce")
    assert ids(live.trainer) == chosen
    live.reset()
    assert ids(live.trainer) == chosen and len(chosen) < len(choices.tasks.get("bandit").items("train"))
    assert asked == ["random"]


def test_a_worker_takes_the_selection_of_a_folder_that_never_made_a_step(asked, tmp_path, monkeypatch):
    folder = unbegun(tmp_path / "run")
    before = json.loads((folder / "selection.json").read_text())
    monkeypatch.setattr(signal, "signal", lambda *a: None)
    workers.desk(folder).mkdir()
    (workers.desk(folder) / "config.json").write_text(json.dumps(vars(SFT)))
    workers.begin(folder)
    assert asked == ["random"] and len(Run.open(folder).rows()) == 3
    assert json.loads((folder / "selection.json").read_text()) == before


@pytest.mark.parametrize("again", [lambda folder: train(SFT, folder), lambda folder: Training(SFT).run(folder)], ids=["train", "stage"])
def test_a_begun_folder_is_not_selected_for_again(again, asked, tmp_path):
    again(unbegun(tmp_path / "run"))
    whole = train(SFT, tmp_path / "whole")
    assert asked == ["random", "random"] and Run.open(tmp_path / "run").metrics["loss"].tolist() == whole.metrics["loss"].tolist()


@pytest.mark.parametrize("change", [{"seed": 1}, {"budget": .25}, {"select": "all"}], ids=str)
def test_another_config_selects_anew(change, asked, tmp_path):
    folder = unbegun(tmp_path / "run")
    assert selection_in(folder, SFT) is not None and selection_in(folder, replace(SFT, **change)) is None
    train(replace(SFT, **change), folder)
    assert len(asked) == 2


def test_edited_data_select_anew(tmp_path):
    rows = [json.dumps({"prompt": f"What is {k}+1?", "answer": str(k + 1), "demo": f"<answer>{k + 1}</answer>"}) for k in range(40)]
    (tmp_path / "mine.jsonl").write_text("\n".join(rows))
    config = replace(SFT, task=f"jsonl:{tmp_path}/mine.jsonl", policy="small-llama")
    folder = unbegun(tmp_path / "run", config)
    assert selection_in(folder, config) is not None
    (tmp_path / "mine.jsonl").write_text("\n".join(rows[::-1]))
    assert selection_in(folder, config) is None


def test_without_a_selection_there_is_none(tmp_path):
    assert selection_in(tmp_path, SFT) is None and Live(replace(GRPO, select=None, budget=None)).chosen is None
