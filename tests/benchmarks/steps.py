"""A whole GRPO step, replies drawn, scored and learned from: this workbench and TRL, each in processes of its own, in turn.

As a script it is one of these processes: `python steps.py WAY CASE OUT.json`. Both get the same weights, prompts of the same length, eight replies to each, as many tokens in every reply (neither
end, padding nor a picture's placeholder can be drawn), a reward of a pure function, AdamW, no divergence from a reference, one update per rollout. TRL is set for a CPU: no bfloat16, no
gradient checkpointing. `lean` is the micro-batch of least memory, one group; the others take all replies at once. Ours writes its health columns, TRL its log.
"""
import json
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

from tests.benchmarks.attribution import peak, spelled, tokenizer  # noqa: E402

GROUP, TOKENS, STEPS, FIRST = 8, 32, 8, 2     # replies to a prompt, tokens of a reply, steps of a process, steps that are not timed
CASES = {     # name: problems, words of a prompt, vocabulary, side of the picture
    "words, P16": (4, 16, 512, 0), "words, P128": (4, 128, 512, 0), "words, P384": (4, 384, 512, 0), "words, P128, V16k": (4, 128, 16384, 0),
    "pictures, 36 tokens": (8, 12, 96, 48), "pictures, 256 tokens": (8, 12, 96, 128), "pictures, 36 tokens, V16k": (8, 12, 16384, 48),
}
WAYS = ("ours", "ours, lean", "trl", "trl, lean")


def text_model(size, side):
    "A random Qwen2, width 128, 4 layers, and its words."
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=size, hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
                         initializer_range=.08, pad_token_id=0, eos_token_id=1, bos_token_id=2)
    return Qwen2ForCausalLM(config), tokenizer(size)


def picture_model(size, side):
    "A random Llava of the shape of `tiny`, and its processor."
    import torch
    from transformers import LlavaForConditionalGeneration

    from rlworkbench.policies.tiny import tiny_config, tiny_processor
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(tiny_config(size, side)), tiny_processor(side)


def questions(problems, words, side) -> list:
    "(text, picture or None) of each problem; all texts equally long."
    import numpy as np
    import torch
    from PIL import Image
    if not side:
        return [(spelled(row), None) for row in torch.randint(3, 500, (problems, words), generator=torch.Generator().manual_seed(1))]
    noise = np.random.default_rng(1)
    return [("7+5=" * (words // 4), Image.fromarray(noise.integers(0, 255, (side, side, 3), dtype=np.uint8))) for _ in range(problems)]


def pays(ids) -> float:
    "A reward of the tokens alone."
    return sum(int(i) % 7 == 0 for i in ids) / len(ids)


def ours(model, words, problems, micro=None):
    "A function that takes one training step."
    from dataclasses import dataclass

    from rlworkbench.core.item import Item
    from rlworkbench.policies.hugging import HuggingPolicy
    from rlworkbench.recipes.grpo import grpo
    from rlworkbench.recipes.slots import Group
    from rlworkbench.rollouts.sampling import Sampling
    from rlworkbench.tasks.task import Task
    from rlworkbench.training.trainer import Trainer
    items = [Item(f"steps/train/{k}", text, () if picture is None else (picture,)) for k, (text, picture) in enumerate(problems)]

    @dataclass(frozen=True)
    class Same(Task):
        def items(self, split="train"):
            return items

    def reward(step):
        import torch
        return {"sevens": torch.tensor([pays(row[:n]) for row, n in zip(step.ids.tolist(), step.length.tolist())])}
    policy = HuggingPolicy(model, words, "random")
    recipe = grpo.but(rewards=(reward,), rollout=Group(Sampling(max_tokens=TOKENS, banned=(policy.eos, policy.pad))))
    return Trainer(policy, Same("same"), recipe, len(items), GROUP, lr=1e-5, micro=micro, drift=0, watchers=()).step


def never(words) -> list:
    "Tokens that no reply may hold: padding, end, and what stands for a picture."
    return [0, 1, *words.convert_tokens_to_ids(["<image>"])] if hasattr(words, "convert_tokens_to_ids") and "<image>" in words.get_vocab() else [0, 1]


def trl(model, words, problems, home, lean):
    "A function that trains all steps and gives the CPU seconds at the end of each."
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    rows = [{"prompt": [{"role": "user", "content": text}]} | ({} if picture is None else {"image": picture}) for text, picture in problems]
    at, batch = [], len(rows) * GROUP

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            at.append(time.process_time())
    settings = GRPOConfig(
        output_dir=home, use_cpu=True, bf16=False, activation_checkpointing=False, report_to="none", disable_tqdm=True, logging_strategy="no", save_strategy="no", seed=0,
        per_device_train_batch_size=GROUP if lean else batch, gradient_accumulation_steps=batch // GROUP if lean else 1, num_generations=GROUP, max_completion_length=TOKENS,
        max_steps=STEPS, loss_type="grpo", beta=0.0, learning_rate=1e-5, lr_scheduler_type="constant", top_k=0, top_p=1.0, temperature=1.0,
        generation_kwargs={"suppress_tokens": never(getattr(words, "tokenizer", words))}, shuffle_dataset=False)
    trainer = GRPOTrainer(model=model, reward_funcs=lambda completion_ids, **_: [pays(row) for row in completion_ids], args=settings,
                          processing_class=words, train_dataset=Dataset.from_list(rows), callbacks=[Clock()])

    def run():
        trainer.train()
        return at
    return run


def worker(way, case, out):
    "One process: build, note the memory, run, write times."
    import torch
    torch.set_num_threads(1)
    problems, length, size, side = CASES[case]
    model, words = (picture_model if side else text_model)(size, side)
    given = questions(problems, length, side)
    if way.startswith("ours"):
        step = ours(model, words, given, GROUP if way == "ours, lean" else None)

        def run():
            at = []
            for _ in range(STEPS):
                step()
                at.append(time.process_time())
            return at
    else:
        run = trl(model, words, given, str(Path(out).parent), way == "trl, lean")
    before = peak()
    at = run()
    spent = [b - a for a, b in zip(at, at[1:])][FIRST - 1:]
    Path(out).write_text(json.dumps({"seconds": spent, "megabytes": peak() - before}))


def one(way, case, tmp):
    "Run one process and read what it wrote."
    out = Path(tmp) / "out.json"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TRL_EXPERIMENTAL_SILENCE": "1"}
    done = subprocess.run([sys.executable, "-W", "ignore", __file__, way, case, str(out)], capture_output=True, text=True, env=environment, cwd=tmp)
    if done.returncode:
        raise RuntimeError(f"{way}, {case} failed: {done.stderr[-1500:]}")
    return json.loads(out.read_text())


def steps(repeats=3) -> dict:
    "CPU seconds of a whole step and the memory it takes on top of the model's, A B C C B A."
    told = {}
    for case in CASES:
        found = {way: [] for way in WAYS}
        with TemporaryDirectory() as tmp:
            for k in range(repeats):
                for way in WAYS if k % 2 == 0 else WAYS[::-1]:
                    found[way].append(one(way, case, tmp))
        told[case] = compared(found)
        print(case, told[case], flush=True)
    return told


def compared(found) -> dict:
    "Medians, and ratios of neighbouring processes."
    seconds = {way: [statistics.median(f["seconds"]) for f in runs] for way, runs in found.items()}
    out = {way: {"seconds": statistics.median(seconds[way]), "megabytes": statistics.median(f["megabytes"] for f in runs)} for way, runs in found.items()}
    for mine, theirs in (("ours", "trl"), ("ours, lean", "trl, lean")):
        ratios = sorted(b / a for a, b in zip(seconds[mine], seconds[theirs]))
        out[theirs] |= {"ratio": statistics.median(ratios), "ratio_min": ratios[0], "ratio_max": ratios[-1], "memory_of_ours": out[mine]["megabytes"] / out[theirs]["megabytes"]}
    return out


if __name__ == "__main__":
    worker(*sys.argv[1:4])
