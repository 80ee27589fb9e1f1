"""What the README says can be done can be done."""
import json
import re
from pathlib import Path

import pytest
from PIL import Image
from typer.main import get_command

from rlworkbench.claims.index import claims_markdown, index_markdown
from rlworkbench.cli import main
from rlworkbench.cli.app import app
from rlworkbench.core.registry import claims, recipes, tasks
from rlworkbench.policies.tiny import random_tiny
from rlworkbench.training.run import Run
from tests import paper_index

README = (Path(__file__).parents[1] / "README.md").read_text()
OWN = re.search(r"^## Your own model and data\n.*?(?=^## )", README, re.S | re.M)[0]


def blocks(language, text):
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def test_the_python_examples_run(capsys):
    names = {}
    for block in blocks("python", README.replace(OWN, "")):
        exec(block, names)
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines()[:10]] == "sample rescore reward shape keep advantage forward loss gradient update".split()
    assert "constant_length" in printed


def test_your_own_model_and_data(tmp_path, monkeypatch, capsys):
    """The section as it stands, in an empty folder; only the number of steps is smaller."""
    (mine, python), (problems,) = blocks("python", OWN), blocks("json", OWN)
    monkeypatch.chdir(tmp_path)
    more = [{"prompt": f"What is {a}+{b}?", "answer": str(a + b)} for a in range(8) for b in range(8)]
    Path("problems.jsonl").write_text(problems + "".join(json.dumps(row) + "\n" for row in more))
    Path("mine.py").write_text(mine)
    Image.new("RGB", (48, 48), "white").save("seven-five.png")
    random_tiny().save("my-model")
    for command in re.findall(r"^    (rlworkbench .*)$", OWN, re.M):
        monkeypatch.setattr("sys.argv", command.replace("--steps 20", "--steps 2").split())
        with pytest.raises(SystemExit) as end:
            main.main()
        assert end.value.code == 0, command
    exec(python.replace("steps=20", "steps=2"), {})
    assert len(Run.open("runs/mine").metrics) == 2 and "reward" in capsys.readouterr().out
    one, two = (Run.open(f"runs/{name}").metrics for name in ("mine", "mine-too"))
    assert {"rewards/right/mean", "rewards/brief/mean", "reward"} <= set(one)
    assert (one["rewards/brief/mean"] < 0).all() and set(one) == set(two)


def test_own_model_and_data_take_ten_lines():
    code = "".join(blocks("python", OWN))
    assert len([line for line in code.splitlines() if line.strip()]) <= 10


def test_every_source_of_tasks_is_in_its_table():
    named = set(re.findall(r"^\| `([a-z-]+:)", OWN, re.M))
    assert named == {name for name in tasks.all() if name.endswith(":")}


def test_the_first_example_has_ten_lines():
    block = re.findall(r"```python\n(.*?)```", README, re.S)[0]
    assert len([line for line in block.splitlines() if line.strip()]) <= 10


def test_every_command_it_names_exists():
    commands = get_command(app).commands
    named = re.findall(r"^ +rlworkbench (\w+)(.*)$", README, re.M)
    assert {name for name, _ in named} <= set(commands) and {"train", "fork", "doctor"} <= {name for name, _ in named}
    for name, rest in named:
        known = {option for p in commands[name].params for option in p.opts}
        assert set(re.findall(r" (--[a-z-]+)", rest.partition("#")[0])) <= known, (name, rest)


def test_files_and_make_targets_it_names_exist():
    root = Path(__file__).parents[1]
    for target in re.findall(r"\]\(([^):#]+)\)", README):
        assert (root / target).exists(), target
    makefile = (root / "Makefile").read_text()
    for target in re.findall(r"(?:`|^    )make (\w+)", README, re.M):
        assert f"\n{target}:" in makefile, target


def test_the_paper_index_is_the_one_of_the_results():
    """In the README and in the notebook that is the front page. Both are written by one command."""
    said = "the paper index is not that of the committed results; write it with: python -m tests.paper_index"
    assert paper_index.parts(README)[1] == paper_index.generated(), f"README.md: {said}"
    cells = json.loads(paper_index.NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    shown = ["".join(o["data"].get("text/markdown", "")) for c in cells for o in c.get("outputs", []) if "data" in o]
    for table in (index_markdown(), claims_markdown()):
        assert table in shown, f"nbs/index.ipynb: {said}"


def test_the_paper_index_has_every_method_and_every_claim():
    table = paper_index.parts(README)[1]
    for name in (*recipes.all(), *claims.all()):
        assert f"[`{name}`](nbs/" in table, name
    links = re.findall(r"\]\((nbs/[^)]+)\)", table)
    assert len(links) > 20 and [to for to in links if not (paper_index.ROOT / to).is_file()] == []


@pytest.mark.parametrize("text", ["no comments", f"{paper_index.BEGIN} only", f"{paper_index.END}{paper_index.BEGIN}", f"{paper_index.BEGIN}{paper_index.END}" * 2])
def test_a_readme_without_a_place_for_it_is_refused(text):
    with pytest.raises(ValueError, match="once each, in this order"):
        paper_index.parts(text)
