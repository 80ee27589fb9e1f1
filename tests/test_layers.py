"""The wings stand in order, importing the package is cheap, and modules and functions stay short."""
import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "rlworkbench"
WINGS = ("core", "show", "tasks", "policies", "rollouts", "recipes", "training", "diagnostics", "latent", "reasoning", "selection", "multimodal",
         "engines", "claims", "serving", "cli")
MODULES = sorted(p for p in PACKAGE.glob("*/*.py") if p.name != "__init__.py" and p.parent.name != "assets")
every_module = pytest.mark.parametrize("path", MODULES, ids=lambda p: f"{p.parent.name}/{p.stem}")


@cache
def numbers() -> dict:
    "(wing, module) -> its notebook's number."
    return {(p.parent.name, p.stem[3:]): int(p.stem[:2]) for p in (ROOT / "nbs").glob("*/[0-9][0-9]_*.ipynb")}


def imported(path: Path, tree=None) -> set:
    "(wing, module) of every import of our own, wherever in the file it stands; module is None for a whole wing."
    package, found = ("rlworkbench", path.parent.name), []
    for node in ast.walk(tree or ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [a.name.split(".") for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [*package[:len(package) - node.level + 1]] if node.level else []
            base += node.module.split(".") if node.module else []
            found += [base + [a.name] for a in node.names]
    own = {(*f[1:3], None, None)[:2] for f in found if f[0] == "rlworkbench"}
    return {(wing, module) for wing, module in own if wing and not wing.startswith("_")}


def place(wing: str, module: str) -> tuple:
    "Where a module stands: the order of its wing, its number."
    return WINGS.index(wing), numbers()[wing, module]


def breaches(path: Path, tree=None) -> list:
    "Imports of a module that point downwards or sideways."
    here, out = place(path.parent.name, path.stem), []
    for wing, module in sorted(imported(path, tree), key=str):
        if (wing, module) not in numbers():
            out.append(f"{wing}.{module} has no notebook")
        elif place(wing, module) >= here:
            out.append(f"{wing}.{module}")
    return out


def test_every_module_has_a_notebook_and_a_wing():
    assert len(MODULES) >= 25
    assert {p.parent.name for p in PACKAGE.glob("*/__init__.py")} <= set(WINGS) | {"apps", "assets"}
    assert [f"{p.parent.name}/{p.stem}" for p in MODULES if (p.parent.name, p.stem) not in numbers()] == []
    wings = [(w, n) for (w, _), n in numbers().items() if w in WINGS]
    assert sorted(w for w in wings if wings.count(w) > 1) == [], "two notebooks of a wing share a number"


@every_module
def test_imports_point_upwards(path):
    assert (path.parent.name, path.stem) in numbers(), "no notebook"
    assert breaches(path) == []


@pytest.mark.parametrize("path,line,caught", [
    ("core/step.py", "from rlworkbench.policies.policy import Policy", ["policies.policy"]),
    ("core/step.py", "from ..training.trainer import Trainer", ["training.trainer"]),
    ("core/step.py", "from .registry import recipes", ["core.registry"]),
    ("core/step.py", "def f():\n    import rlworkbench.tasks.task", ["tasks.task"]),
    ("core/step.py", "from ..tasks import task", ["tasks.task"]),
    ("rollouts/scorer.py", "from .sampling import Sampling\nfrom ..core.step import Step\nimport torch", []),
    ("training/trainer.py", "from .health import StopRun\nfrom ..recipes.slots import Spec", []),
])
def test_a_wrong_import_would_be_seen(path, line, caught):
    assert breaches(PACKAGE / path, ast.parse(line)) == caught


def test_importing_the_package_is_cheap():
    """Neither torch nor transformers nor gradio, nor anything else that takes a while."""
    heavy = "torch transformers gradio pandas numpy sklearn plotly matplotlib".split()
    code = f"import sys, rlworkbench; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("module", ["training.trainer", "policies.table", "recipes.sft", "rollouts.scorer"])
def test_what_needs_no_hub_model_loads_no_transformers(module):
    code = f"import sys, rlworkbench.{module}; print([m for m in ('transformers', 'gradio', 'plotly') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


@every_module
def test_modules_are_short(path):
    method = path.parent.name == "recipes" and path.stem not in ("slots", "recipe")
    lines = len(path.read_text().splitlines())
    assert lines <= (80 if method else 250)


def functions(tree):
    "Every function that is not inside another one, with the lines of its body, docstring not counted."
    todo = list(tree.body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.ClassDef):
            todo += node.body
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            yield node.name, body[-1].end_lineno - body[0].lineno + 1 if body else 0


@every_module
def test_functions_are_short(path):
    long = {name: n for name, n in functions(ast.parse(path.read_text())) if n > 30}
    assert long == {}


@every_module
def test_a_module_does_nothing_when_imported(path):
    """Definitions, constants, decorators: no loop, no printing, no file opened at the top level."""
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign, ast.If, ast.Try)
    for node in ast.parse(path.read_text()).body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        assert docstring or isinstance(node, allowed), f"line {node.lineno}: {ast.unparse(node)[:80]}"
