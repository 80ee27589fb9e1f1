"""Execute every notebook in a process of its own, two at a time; the committed files stay as they are. `python -m tests.notebooks [PATH ...]`"""
import contextlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
PRELOADED = ("torch", "transformers", "pandas", "plotly.graph_objects", "sklearn", "IPython", "ipywidgets", "fastcore.test")


def cells(notebook: Path) -> list:
    "The code of a notebook."
    return ["".join(c["source"]) for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == "code"]


def execute(notebook: Path) -> tuple:
    "Run one notebook in this process, which is a fresh one; its name, seconds, and what it said if it went wrong."
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config
    start = time.perf_counter()
    os.chdir(notebook.parent)
    with tempfile.TemporaryFile("w+") as said, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        shell = InteractiveShell.instance(colors="nocolor", config=Config({"HistoryManager": {"enabled": False}}))
        sys.path[0] = str(notebook.parent)
        right = all(shell.run_cell(code).success for code in cells(notebook))
        said.seek(0)
        told = "" if right else said.read()[-3000:] or "failed without a word"
    return notebook.relative_to(ROOT), time.perf_counter() - start, told


def main(paths) -> int:
    notebooks = [Path(p).resolve() for p in paths] or sorted((ROOT / "nbs").rglob("*.ipynb"), reverse=True)      # the long ones, tutorials and reasoning, not last
    failed = 0
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")    # its processes begin with the large libraries loaded and nothing else
    context.set_forkserver_preload([*PRELOADED])
    with context.Pool(2, maxtasksperchild=1) as pool:
        for name, seconds, wrong in pool.imap(execute, notebooks, chunksize=1):
            print(f"{'FAIL' if wrong else 'ok':4} {seconds:6.1f} s  {name}", flush=True)
            failed += bool(wrong)
            if wrong:
                print(wrong)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
