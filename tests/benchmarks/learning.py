"""Learning curves of plain GRPO: this workbench and TRL's own GRPOTrainer, five seeds, from the same weights, on the same problems in the same order, under the same law.

As a script it is one run: `python learning.py WAY SEED OUT.json`. Bed: `micro-routes` on `route-sum`. TRL is set to the same numbers: no bfloat16, no checkpointing, no penalty, loss type grpo,
rewards scaled within the group, AdamW without decay at a constant rate, gradients clipped at norm 1, one update per rollout. What differs is the stream of random numbers.
"""
import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

STEPS, SEEDS, PROMPTS, GROUP, LR = 60, 5, 8, 8, 3e-4
WAYS = ("ours", "trl")


def trainer_of(seed):
    "Our trainer: its base policy, problems and order are those of both ways."
    from rlworkbench.core.config import Config
    from rlworkbench.training.beds import base_policy
    from rlworkbench.training.choices import new_trainer
    base_policy("micro-routes")
    return new_trainer(Config(recipe="grpo", task="route-sum", policy="micro-routes", steps=STEPS, prompts=PROMPTS, group=GROUP, lr=LR, evaluate=0, seed=seed, threads="1"))


def problems(trainer) -> list:
    "The problems of all steps in the order in which our trainer takes them."
    from rlworkbench.training.collect import begin
    out = []
    for _ in range(STEPS):
        out += begin(trainer).items
        trainer.done += 1
    return out


def ours(seed, home) -> list:
    "Share of right replies in each step."
    return [row["correct"] for row in trainer_of(seed).fit(STEPS)]


def trl(seed, home) -> list:
    "The same from TRL. Raises AssertionError if it would read other tokens."
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    mine = trainer_of(seed)
    policy, task, items, right = mine.policy, mine.task, problems(mine), []
    rows = [{"prompt": [{"role": "user", "content": item.prompt}], "number": k} for k, item in enumerate(items)]
    read = policy.tokenizer.apply_chat_template(rows[0]["prompt"], add_generation_prompt=True, return_dict=False)
    assert list(read) == policy.encode(items[:1]).ids[0].tolist()

    def judge(completion_ids, number, **_):
        found = [task.score(items[n], policy.text([i for i in ids if i != policy.eos]))["correct"] for ids, n in zip(completion_ids, number)]
        right.append(sum(found) / len(found))
        return found
    settings = GRPOConfig(
        output_dir=home, use_cpu=True, bf16=False, activation_checkpointing=False, report_to="none", disable_tqdm=True, logging_strategy="no", save_strategy="no", seed=seed,
        per_device_train_batch_size=PROMPTS * GROUP, gradient_accumulation_steps=1, num_generations=GROUP, max_completion_length=task.max_tokens, max_steps=STEPS,
        loss_type="grpo", scale_rewards="group", beta=0.0, epsilon=.2, learning_rate=LR, lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0,
        top_k=0, top_p=1.0, temperature=1.0, shuffle_dataset=False)
    trainer = GRPOTrainer(model=policy.model, reward_funcs=judge, args=settings, processing_class=policy.tokenizer, train_dataset=Dataset.from_list(rows))
    trainer.train()
    return right


def worker(way, seed, out):
    "One run in a process of its own."
    import torch
    torch.set_num_threads(1)
    with TemporaryDirectory() as home:
        start = time.process_time()
        right = {"ours": ours, "trl": trl}[way](int(seed), home)
        Path(out).write_text(json.dumps({"right": right, "seconds": time.process_time() - start}))


def one(way, seed, tmp) -> dict:
    "Run one process and read what it wrote."
    out = Path(tmp) / "out.json"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-W", "ignore", __file__, way, str(seed), str(out)], capture_output=True, text=True, env=environment, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{way}, seed {seed} failed: {done.stderr[-1500:]}")
    return json.loads(out.read_text())


def ratio(first, second) -> tuple:
    "Mean of second over mean of first, and its 95 % interval over seeds: Student's, of the logarithm of each seed's ratio."
    from scipy.stats import t
    logs = [math.log(b / a) for a, b in zip(first, second)]
    half = t.ppf(.975, len(logs) - 1) * statistics.stdev(logs) / math.sqrt(len(logs))
    return tuple(math.exp(statistics.mean(logs) + x) for x in (0, -half, half))


def learning(repeats=SEEDS) -> dict:
    "Area under the share of right replies, ours over TRL's: the mean ratio over seeds with its interval, and the mean curves."
    runs = {way: [] for way in WAYS}
    with TemporaryDirectory() as tmp:
        for seed in range(repeats):
            for way in WAYS if seed % 2 == 0 else WAYS[::-1]:
                runs[way].append(one(way, seed, tmp))
    area = {way: [statistics.mean(run["right"]) for run in runs[way]] for way in WAYS}
    middle, low, high = ratio(area["trl"], area["ours"])
    curves = {way: [round(statistics.mean(x), 4) for x in zip(*(run["right"] for run in runs[way]))] for way in WAYS}
    return {"ratio": middle, "low": low, "high": high, "areas": area, "curves": curves, "cpu_seconds": {way: statistics.median(r["seconds"] for r in runs[way]) for way in WAYS},
            "last_ten": {way: statistics.mean(c[-10:]) for way, c in curves.items()}, "seeds": repeats, "steps": STEPS, "bed": "micro-routes on route-sum"}


if __name__ == "__main__":
    worker(*sys.argv[1:4])
