"""A pilot of how much junk does how much harm: writes nbs/selection/results/dose.json. `python -m tests.measured dose`"""
import json
import tempfile
import time
from pathlib import Path

import torch
from typer.testing import CliRunner

from rlworkbench.cli.main import app
from rlworkbench.core.files import write_text
from rlworkbench.core.registry import tasks
from rlworkbench.rollouts.sampling import Sampling
from rlworkbench.tasks.junk import skipped
from rlworkbench.training.choices import load_policy
from rlworkbench.training.evaluate import answers, verdicts

FILE = Path(__file__).parents[1] / "nbs/selection/results/dose.json"
TRAIN = ("train --recipe sft --task few:2000,junk:verbose-sum --policy micro-verbose --select dose,tag=junk,share={share} --budget .2 "
         "--steps 60 --prompts 16 --group 1 --lr 1e-3 --evaluate 0 --threads 1 --seed {seed}")
SHARES, SEEDS, PROBLEMS = (0, .25, .5, 1), range(1000, 1005), 400


def judged(policy, task) -> dict:
    "Greedy replies to test problems: how many are right, skip thinking, and are right although or because they do."
    steps = answers(policy, task.items("test")[:PROBLEMS], Sampling(0.0, task.max_tokens))
    right = torch.cat([verdicts(task, s) for s in steps]).bool()
    skip = torch.tensor([skipped(t) for s in steps for t in s.text])
    share = lambda some: round(float(right[some].float().mean()), 4) if some.any() else None
    return {"right": round(float(right.float().mean()), 4), "skipped": round(float(skip.float().mean()), 4), "right of thinking": share(~skip), "right of skipping": share(skip)}


def dose(seeds=SEEDS):
    "Train at each dose with each seed, and write what came of it."
    torch.set_num_threads(1)
    start, task, rows = time.process_time(), tasks.get("verbose-sum"), []
    for seed in seeds:
        for share in SHARES:
            with tempfile.TemporaryDirectory() as folder:
                done = CliRunner().invoke(app, [*TRAIN.format(share=share, seed=seed).split(), "--out", f"{folder}/run", "--json"])
                if done.exit_code:
                    raise SystemExit(done.output)
                rows.append({"dose": share, "seed": seed, **judged(load_policy(f"{folder}/run"), task)})
            print(rows[-1], flush=True)
    told = {"command": "python -m tests.measured dose", "trains": f"rlworkbench {TRAIN}", "problems": PROBLEMS, "verdict": "none, a pilot",
            "before": judged(load_policy("micro-verbose"), task), "rows": rows, "cpu_seconds": round(time.process_time() - start, 1)}
    write_text(FILE, json.dumps(told, indent=1) + "\n")
