"""What the README says can be done can be done."""
import re
from pathlib import Path

from rlworkbench.cli import main  # noqa: F401, registers the commands
from rlworkbench.cli.app import app

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_python_examples_run(capsys):
    names = {}
    for block in re.findall(r"```python\n(.*?)```", README, re.S):
        exec(block, names)
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines()[:10]] == "sample rescore reward shape keep advantage forward loss gradient update".split()
    assert "constant_length" in printed


def test_the_first_example_has_ten_lines():
    block = re.findall(r"```python\n(.*?)```", README, re.S)[0]
    assert len([line for line in block.splitlines() if line.strip()]) <= 10


def test_every_command_it_names_exists():
    commands = {c.name or c.callback.__name__ for c in app.registered_commands}
    named = set(re.findall(r"^ +rlworkbench (\w+)", README, re.M))
    assert named and named <= commands
    for options in re.findall(r"^ +rlworkbench train (.*)$", README, re.M):
        for option in re.findall(r"--([a-z-]+)", options):
            assert option.replace("-", "_") in next(c.callback.__annotations__ for c in app.registered_commands if c.callback.__name__ == "train"), option


def test_files_and_make_targets_it_names_exist():
    root = Path(__file__).parents[1]
    for target in re.findall(r"\]\(([^):#]+)\)", README):
        assert (root / target).exists(), target
    makefile = (root / "Makefile").read_text()
    for target in re.findall(r"(?:`|^    )make (\w+)", README, re.M):
        assert f"\n{target}:" in makefile, target
