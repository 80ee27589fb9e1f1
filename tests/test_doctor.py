"""`doctor` says what is so: installed, built, cached, writable, fast; quickly, and it writes nothing."""
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

COMMAND = Path(sys.executable).parent / "rlworkbench"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a-file").write_text("in the way\n")
    (tmp_path / "settings.ini").write_text("[workbench]\nruns_path = a-file/runs\ndata_path = built\nthreads = 2\n")
    for name, size in (("micro-kk", 300_000), ("half-made", 100)):
        (tmp_path / "built" / name).mkdir(parents=True)
        (tmp_path / "built" / name / "model.safetensors").write_bytes(b"x" * size)
    (tmp_path / "built/micro-kk/making.json").write_text("{}")
    (tmp_path / "hub/hub/models--someone--something").mkdir(parents=True)
    return tmp_path


def doctor(folder, *options, **env) -> str:
    done = subprocess.run([COMMAND, "doctor", *options], cwd=folder, capture_output=True, text=True, env=os.environ | env, check=True)
    assert done.stderr == ""
    return done.stdout


def test_it_says_what_is_so(folder):
    before = sorted(folder.rglob("*"))
    env = {k: "" for k in ("HF_HUB_CACHE",)} | {"HF_HOME": str(folder / "hub")}
    facts = json.loads(doctor(folder, "--json", **env))
    assert facts["torch"] == version("torch") and facts["transformers"] == version("transformers")
    assert facts["settings"] == str(folder / "settings.ini") and facts["threads"] == 2
    assert (facts["runs"], facts["runs_writable"]) == (str(folder / "a-file/runs"), False)
    assert (facts["data"], facts["data_writable"]) == (str(folder / "built"), True)
    assert facts["built_megabytes"]["micro-kk"] == .3 and set(facts["built_megabytes"]) == {"tiny", "micro-kk"}
    assert 5 < facts["built_megabytes"]["tiny"] < 20
    assert facts["hub_cache"] == str(folder / "hub/hub") and facts["hub_cache_exists"] and facts["hub_cache_models"] == ["someone/something"]
    assert facts["disk_free_gigabytes"] > 0 and facts["memory_gigabytes"] >= facts["memory_free_gigabytes"] > 0
    assert facts["devices"][0] == "cpu" and facts["cores"] >= 1 and facts["load"] >= 0
    assert facts["gflops_one_thread"] > .5 and facts["gflops_all_threads"] > .1
    assert sorted(folder.rglob("*")) == before


def test_people_get_the_same(folder):
    facts, said = json.loads(doctor(folder, "--json")), doctor(folder)
    rows = {line[:22].strip(): line[23:] for line in said.splitlines() if not line.startswith("With threads")}
    assert set(rows) == {k.replace("_", " ") for k in facts}
    assert rows["runs writable"] == "no" and rows["data writable"] == "yes" and rows["torch"] == facts["torch"]
    assert "micro-kk 0.3" in rows["built megabytes"]


def test_extras_are_told_by_what_they_lack(monkeypatch):
    import importlib.metadata

    from rlworkbench.cli.look import packages
    needs = ["torch>=2", 'gone-package>=1; extra == "tasks"', "math-verify; extra == 'tasks'", 'pytest>=9; extra == "dev"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: needs)
    assert packages()["extras"] == {"tasks": "lacks gone-package", "dev": "installed"}


def test_it_loads_only_what_it_needs(folder):
    done = subprocess.run([sys.executable, "-X", "importtime", COMMAND, "doctor"], cwd=folder, capture_output=True, text=True, check=True)
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert {"torch", "rlworkbench.cli.look"} <= loaded
    assert not {"transformers", "peft", "gradio", "plotly", "pandas", "sklearn", "trl"} & loaded
