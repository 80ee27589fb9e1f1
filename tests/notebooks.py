"""Execute every notebook in a kernel of its own, two at a time; the committed files stay as they are. `python -m tests.notebooks [PATH ...]`"""
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]


def execute(notebook: Path, folder: str) -> tuple:
    "Run one notebook; its name, seconds, and what went wrong."
    start = time.perf_counter()
    command = [sys.executable, "-m", "jupyter", "nbconvert", "--to", "notebook", "--execute", "--log-level=ERROR", "--output-dir", folder,
               "--output", str(notebook.relative_to(ROOT / "nbs")).replace("/", "-"), str(notebook)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return notebook.relative_to(ROOT), time.perf_counter() - start, "" if done.returncode == 0 else done.stderr[-3000:]


def main(paths) -> int:
    notebooks = [Path(p).resolve() for p in paths] or sorted((ROOT / "nbs").rglob("*.ipynb"))
    failed = 0
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        for name, seconds, wrong in pool.map(lambda n: execute(n, folder), notebooks):
            print(f"{'FAIL' if wrong else 'ok':4} {seconds:6.1f} s  {name}", flush=True)
            failed += bool(wrong)
            if wrong:
                print(wrong)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
