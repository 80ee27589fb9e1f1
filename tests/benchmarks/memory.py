"""Peak memory of whole processes: the studio while its pages are visited, and GRPO of a real language model with adapters.

As a script it is the second: `python memory.py MICRO OUT.json`, MICRO 0 for a minibatch in one piece.
"""
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.request import urlopen

ROOT = Path(__file__).parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from tests.benchmarks.measure import peak  # noqa: E402

SUMS = "reasoning-gym:chain_sum,min_terms=2,max_terms=3,min_digits=1,max_digits=1,extract=last-number,max_tokens=24"
PAGES = ("", "stepper", "inspector", "compare", "lab", "reasoning")


def training(micro: int, out: str):
    "Two steps of GRPO of smollm2 with adapters of rank 16: 8 problems, 8 replies of at most 24 tokens, float32, one minibatch, whole or in pieces."
    import torch
    torch.set_num_threads(1)
    from rlworkbench.core.config import Config
    from rlworkbench.training.choices import new_trainer
    trainer = new_trainer(Config(recipe="grpo", task=SUMS, policy="smollm2", steps=2, prompts=8, group=8, lr=1e-4, lora=16, micro=micro or None, evaluate=0, threads="1"))
    loaded, start = peak(), time.process_time()
    trainer.fit(2)
    Path(out).write_text(json.dumps({"megabytes": peak(), "loaded": loaded, "cpu_seconds_per_step": (time.process_time() - start) / 2, "parameters": sum(p.numel() for p in trainer.policy.weights().values())}))


def studio() -> dict:
    "A studio in a process of its own, before anybody looks, when each page has been opened, and after three rounds of a visitor on recorded pages."
    from gradio_client import Client

    from tests.benchmarks.studio import Visitor
    from tests.studio import some_runs
    told = {}
    with TemporaryDirectory() as tmp:
        some_runs(Path(tmp) / "runs")
        code = f"import sys; sys.argv = ['rlworkbench', 'studio', '--runs', '{tmp}/runs']; from rlworkbench.cli.main import main; main()"
        process = subprocess.Popen([sys.executable, "-u", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=tmp)
        try:
            url = next(found[0] for line in process.stdout if (found := re.search(r"http://[\d.:]+", line)))
            told["started"] = peak(process.pid)
            for page in PAGES:
                urlopen(f"{url}/{page}", timeout=120).read()
            told["pages opened"] = peak(process.pid)
            visitor = Visitor(Client(url, verbose=False, httpx_kwargs={"timeout": 120}), 0)
            for _ in range(3):
                for ask in visitor.round():
                    ask()
            told["visited"] = peak(process.pid)
        finally:
            process.terminate()
            process.wait()
    return told


def smollm2(micro: int) -> dict:
    "In a process of its own."
    with TemporaryDirectory() as tmp:
        out = Path(tmp) / "out.json"
        subprocess.run([sys.executable, "-W", "ignore", __file__, str(micro), str(out)], check=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
        return json.loads(out.read_text())


def memory() -> dict:
    "Megabytes at most."
    return {"smollm2": smollm2(0), "smollm2, 16 at once": smollm2(16), "studio": studio()}


if __name__ == "__main__":
    training(int(sys.argv[1]), sys.argv[2])
