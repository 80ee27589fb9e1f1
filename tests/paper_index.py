"""Write the paper index and the claims table into README.md and run nbs/index.ipynb, which shows them, again. `python -m tests.paper_index`"""
import subprocess
import sys
from pathlib import Path

from rlworkbench.claims.index import claims_markdown, index_markdown

ROOT = Path(__file__).parents[1]
README, NOTEBOOK = ROOT / "README.md", ROOT / "nbs" / "index.ipynb"
BEGIN, END = "<!-- begin: written by python -m tests.paper_index -->", "<!-- end -->"


def generated() -> str:
    "What stands between the two comments of the README."
    return f"\n{index_markdown('nbs/')}\n\n{claims_markdown('nbs/')}\n"


def parts(text: str) -> tuple:
    "What is before, between and after the two comments. Raises ValueError where they are not there once."
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"README.md must hold {BEGIN!r} and {END!r} once each, in this order")
    before, _, rest = text.partition(BEGIN)
    between, _, after = rest.partition(END)
    return before + BEGIN, between, END + after


def main():
    before, _, after = parts(README.read_text(encoding="utf-8"))
    README.write_text(f"{before}{generated()}{after}", encoding="utf-8")
    tools = Path(sys.executable).parent
    for command in (("jupyter", "nbconvert", "--to", "notebook", "--execute", "--inplace", "--log-level=ERROR"), ("nbdev-clean", "--fname")):
        subprocess.run([tools / command[0], *command[1:], NOTEBOOK], cwd=ROOT, check=True)
    print("written: README.md, nbs/index.ipynb")


if __name__ == "__main__":
    main()
