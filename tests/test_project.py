"""The project as a whole: generated files, notebooks, the two configuration files, the wheel."""
import ast
import configparser
import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "nbs").rglob("*.ipynb"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_export_has_no_drift(tmp_path):
    """Exporting the notebooks again gives the files that are there."""
    copy = tmp_path / "copy"
    subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", str(ROOT), str(copy)], check=True)
    for part in ("nbs", "rlworkbench"):
        subprocess.run(["cp", "-r", str(ROOT / part), str(copy)], check=True)
    before = {p.relative_to(copy): p.read_text() for p in (copy / "rlworkbench").rglob("*.py")}
    subprocess.run([sys.executable, "-c", "from nbdev.export import nb_export; import nbdev.doclinks as d; d.nbdev_export()"], cwd=copy, check=True, capture_output=True)
    after = {p.relative_to(copy): p.read_text() for p in (copy / "rlworkbench").rglob("*.py")}
    assert [str(p) for p in after if before.get(p) != after[p]] == []
    assert set(before) == set(after)


def test_settings_and_pyproject_agree():
    ini = configparser.ConfigParser()
    ini.read(ROOT / "settings.ini")
    ours, project, nbdev = ini["DEFAULT"], PROJECT["project"], PROJECT["tool"]["nbdev"]
    version = re.search(r'__version__ = "(.+)"', (ROOT / "rlworkbench/__init__.py").read_text())[1]
    assert ours["lib_name"] == ours["repo"] == project["name"]
    assert ours["version"] == version
    assert ours["description"] == project["description"]
    assert f">={ours['min_python']}" == project["requires-python"]
    assert ours["git_url"] == project["urls"]["Repository"]
    for key in ("tst_flags", "readme_nb", "branch"):
        assert ours[key] == nbdev[key]
    assert ini["DEFAULT"]["author"] == project["authors"][0]["name"]


def test_workbench_section_is_what_the_program_reads():
    from dataclasses import fields

    from rlworkbench.core.settings import Settings
    ini = configparser.ConfigParser(interpolation=None)
    ini.read(ROOT / "settings.ini")
    assert {k for k in ini["workbench"] if k not in ini.defaults()} == {f.name for f in fields(Settings)}


def test_package_list_matches_the_tree():
    found = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "rlworkbench").rglob("__init__.py")}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) - set(PROJECT["tool"]["setuptools"]["package-dir"]) == found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: str(p.relative_to(ROOT / "nbs")))
def test_notebook_is_clean(path):
    text = path.read_text()
    notebook = json.loads(text)
    cells = notebook["cells"]
    markdown = ["".join(c["source"]) for c in cells if c["cell_type"] == "markdown"]
    outputs = [o for c in cells for o in c.get("outputs", [])]
    assert len(text) < 400_000
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert all(c.get("execution_count") is None for c in cells if c["cell_type"] == "code")
    assert markdown[0].startswith("# ") and "\n> " in markdown[0]
    assert outputs, "no executed output"
    assert not [o for o in outputs if o["output_type"] == "error"]
    for folder in (ROOT, Path.home(), tempfile.gettempdir(), "/home", "/Users"):
        assert f"{folder}/" not in text, f"a path of a machine: {folder}"
    assert all(len(json.dumps(o)) < 100_000 for o in outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: str(p.relative_to(ROOT / "nbs")))
def test_exported_cells_are_short(path):
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and source.startswith("#| export"):
            tree = ast.parse(source)
            classes = [n for n in tree.body if isinstance(n, ast.ClassDef)]
            assert len(source.splitlines()) <= (100 if classes else 60), source[:80]


def test_no_file_is_too_large():
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    assert [n for n in names if n and (ROOT / n).is_file() and (ROOT / n).stat().st_size > 8 * 2**20] == []


def test_no_pickle_and_no_remote_code():
    for path in (ROOT / "rlworkbench").rglob("*.py"):
        source = path.read_text()
        assert not re.search(r"import pickle|torch\.load\(|trust_remote_code=True", source), path


def test_wheel_works_in_a_clean_environment(tmp_path):
    """Built, unpacked into an environment that sees only the dependencies, and used."""
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)], check=True, capture_output=True)
    wheel, = tmp_path.glob("*.whl")
    venv.create(tmp_path / "env", system_site_packages=False, with_pip=True)
    python = tmp_path / "env/bin/python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True, capture_output=True)
    site = subprocess.run([sys.executable, "-c", "import torch, pathlib; print(pathlib.Path(torch.__file__).parents[1])"], capture_output=True, text=True, check=True)
    (next((tmp_path / "env/lib").glob("python3*")) / "site-packages/borrowed.pth").write_text(site.stdout.strip() + "\n")
    done = subprocess.run([python, "-I", "-c", "import rlworkbench; print(rlworkbench.__file__)"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert str(tmp_path / "env") in done.stdout
    out = subprocess.run([tmp_path / "env/bin/rlworkbench", "eval", "tiny", "--n", "8", "--json"], cwd=tmp_path, capture_output=True, text=True,
                         env=os.environ | {"PYTHONSAFEPATH": "1"})
    assert out.returncode == 0, out.stderr[-1000:]
    assert 0 <= json.loads(out.stdout.splitlines()[-1])["sampled"] <= 1
