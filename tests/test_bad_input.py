"""Whatever a user gets wrong: one sentence that names it, exit code 2, and every file as it was.

Each case runs the real entry point in a process of its own (forked from one that has imported the package), in a copy of a small user's folder:
data, rewards, three models, three runs. The controls at the end show that the same commands work where nothing is wrong.
"""
import fcntl
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from rlworkbench.core.config import FORMAT, Config
from rlworkbench.core.item import Item
from rlworkbench.policies.families import family, small_qwen
from rlworkbench.policies.loading import load_hugging
from rlworkbench.policies.tiny import random_tiny
from rlworkbench.training.job import train

SERVER = """
import json, os, signal, sys, traceback
from rlworkbench.cli.main import main
from rlworkbench.core.registry import policies, recipes, tasks
import rlworkbench.cli.look, rlworkbench.cli.ask, rlworkbench.serving.replay, rlworkbench.serving.report, rlworkbench.training.job, rlworkbench.training.estimate
for registry in (policies, recipes, tasks):
    registry.all()
print("ready", flush=True)
for line in sys.stdin:
    case = json.loads(line)
    child = os.fork()
    if not child:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    os._exit(0)
signal.alarm(120)
os.chdir(case["folder"])
for number, file in ((1, case["out"]), (2, case["err"])):
    os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
sys.argv, code = ["rlworkbench", *case["arguments"]], 0
try:
    main()
except SystemExit as e:
    code = e.code or 0
except BaseException:
    traceback.print_exc()
    code = 1
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)      # without the long good-bye of a big interpreter
"""
OFFLINE = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

REWARDS = """
def good(item, text): return len(text) / 100
def nan(item, text): return float("nan")
def infinite(item, text): return float("inf")
def word(item, text): return "high"
def nothing(item, text): return None
def parts(item, text): calls.append(text); return {"a": 1.0} if len(calls) % 3 else {"b": 1.0}
def no_parts(item, text): return {}
def word_part(item, text): return {"a": 1.0, "b": "high"}
def broken(item, text): return 1 / 0
def long_story(item, text): raise RuntimeError("first line\\nsecond line")
def short(text): return 1.0
calls = []
def third(item, text):
    calls.append(text)
    if len(calls) == 3: raise KeyError("colour")
    return 1.0
def late(item, text):
    calls.append(text)
    if len(calls) > 60: raise OverflowError("sixty are enough")
    return 1.0
number = 3
"""


# --- a user's folder

def lines(*rows) -> bytes:
    return "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows).encode()


SUMS = [{"prompt": f"What is {a}+{b}?", "answer": str(a + b), "split": s} for a, s in enumerate(("train",) * 6 + ("validation", "test")) for b in range(3)]
GOOD = {"prompt": "What is 1+1?", "answer": "2"}


def bomb() -> bytes:
    "A PNG of a few bytes whose header promises 10,000 megapixels."
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    "What every case gets a copy of."
    at = tmp_path_factory.mktemp("library")
    (at / "problems.jsonl").write_bytes(lines(*SUMS))
    (at / "train-only.jsonl").write_bytes(lines(*(s for s in SUMS if s["split"] == "train")))
    (at / "mine.py").write_text(REWARDS)
    (at / "note.txt").write_text("a regular file\n")
    (at / "full").mkdir()
    (at / "full/thesis.txt").write_text("do not touch\n")
    Image.new("RGB", (24, 24), "red").save(at / "red.png")
    for name, policy in (("model", random_tiny()), ("text", family("llama")), ("other", small_qwen())):
        policy.save(at / name)
    quick = dict(prompts=3, group=4, checkpoint=2, keep=0, threads="1")
    train(Config(task="bandit", policy="table", steps=6, lr=.1, evaluate=3, **quick), at / "runs/table")
    own = dict(task=f"jsonl:{at}/problems.jsonl,max_tokens=6", policy=str(at / "text"), reward=f"{at}/mine.py:good", steps=4, evaluate=0, **quick)
    train(Config(**own), at / "runs/own")
    train(Config(**own, lora=2), at / "runs/lora")
    for name in ("own", "lora"):
        file = at / "runs" / name / "config.json"
        file.write_text(file.read_text().replace(f"{at}/", ""))
    return at


def snapshot(folder: Path) -> dict:
    "Every path below a folder with its size and a hash of its content."
    of = lambda p: (p.stat().st_size, hashlib.blake2b(p.read_bytes()).hexdigest()) if p.is_file() else "folder"
    return {str(p.relative_to(folder)): of(p) for p in sorted(folder.rglob("*"))}


# --- what can be done to it

def write(name, content):
    def change(folder):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return change


def remove(name):
    return lambda folder: shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()


def copy(name, to):
    return lambda folder: shutil.copytree(folder / name, folder / to, dirs_exist_ok=True) if (folder / name).is_dir() else shutil.copy(folder / name, folder / to)


def cut(name, share=.5):
    def change(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:int(len(data) * share)])
    return change


def replace(name, old, new):
    def change(folder):
        text = (folder / name).read_text()
        assert old in text, f"{name} holds no {old!r}"
        (folder / name).write_text(text.replace(old, new))
    return change


def edit(name, **keys):
    "Set keys of a JSON file; None removes one."
    def change(folder):
        data = json.loads((folder / name).read_text())
        data |= keys
        (folder / name).write_text(json.dumps({k: v for k, v in data.items() if v is not None}))
    return change


def weights(name, alter):
    def change(folder):
        save_file(alter(load_file(folder / name)), folder / name, {"format": "pt"})
    return change


def as_pickle(folder):
    "The weights as torch.save writes them, no safetensors."
    torch.save(load_file(folder / "text/model.safetensors"), folder / "text/pytorch_model.bin")
    (folder / "text/model.safetensors").unlink()


def parquet(rows):
    def change(folder):
        import pandas as pd
        pd.DataFrame(rows).to_parquet(folder / "x.parquet")
    return change


def lock(name):
    def change(folder):
        held = open(folder / name / ".lock", "w")
        fcntl.flock(held, fcntl.LOCK_EX)
        return held
    return change


# --- the cases

@dataclass(frozen=True)
class Case:
    name: str
    arguments: tuple
    says: tuple
    changes: tuple = ()


CASES = []


def case(name, arguments, says, *changes):
    CASES.append(Case(name, tuple(arguments), (says,) if isinstance(says, str) else says, changes))


QUICK = ("train", "--policy", "table", "--task", "bandit", "--prompts", "3", "--group", "4", "--evaluate", "0", "--steps", "2", "--out", "new")
OWN = ("train", "--policy", "text", "--prompts", "2", "--group", "2", "--evaluate", "0", "--steps", "2", "--max-tokens", "6", "--out", "new")
MINE = (*OWN, "--task", "jsonl:problems.jsonl")


def data(name, content, says, *options, file="x.jsonl", kind="jsonl"):
    case(f"data: {name}", (*OWN, "--task", f"{kind}:{file}{''.join(options)}"), says, *((write(file, content),) if isinstance(content, bytes) else content))


data("broken line", lines(GOOD, '{"prompt": "x", "answer":'), ("x.jsonl, line 2", "is not JSON"))
data("empty file", b"", ("x.jsonl has no rows",))
data("wrong column", lines({"question": "x", "answer": "2"}), ("x.jsonl", "'prompt' is missing", "question, answer"))
data("gold that the verifier rejects", lines(GOOD, {"prompt": "x", "answer": "abc"}), ("x.jsonl, line 2", "'answer'", "'abc' is not a number"), ",verifier=numeric")
data("missing picture", lines(GOOD | {"images": "none.png"}), ("x.jsonl, line 1", "'images'", "'none.png' can't be read"))
data("broken picture", [write("x.jsonl", lines(GOOD | {"images": "text.png"})), write("text.png", "text")], ("x.jsonl, line 1", "'text.png' is not a picture"))
data("decompression bomb", [write("x.jsonl", lines(GOOD | {"images": "b.png"})), write("b.png", bomb())], ("x.jsonl, line 1", "'b.png' has 100000 x 100000 pixels"))
data("picture for a model that reads text", lines(*(GOOD | {"images": "red.png", "id": str(k), "split": "train"} for k in range(3))), ("text reads text only, but x.jsonl, line 1 has 1 picture",))
data("one picture among many texts", lines(*({"prompt": f"What is {k}+1?", "answer": str(k + 1), "split": "train"} | ({"images": "red.png"} if k == 40 else {}) for k in range(60))),
     ("text reads text only, but x.jsonl, line 41 has 1 picture",))
case("data: held-out picture for a model that reads text", (*OWN, "--evaluate", "4", "--task", "jsonl:x.jsonl"), "text reads text only, but x.jsonl, line 3 has 1 picture",
     write("x.jsonl", lines(*(GOOD | {"split": s, "id": s} | ({"images": "red.png"} if s == "test" else {}) for s in ("train", "validation", "test")))))
data("not UTF-8", b'{"prompt": "s\xfc\xdf", "answer": "2"}\n', ("x.jsonl, line 1", "is not UTF-8"))
data("no training rows", lines(GOOD | {"split": "test"}), ("jsonl:x.jsonl has no problem in its split 'train'",))
data("unknown option", lines(GOOD), ("unknown option 'lmit'", "limit"), ",lmit=3")
data("no such file", [], ("there is no file x.jsonl",))
data("truncated parquet", [parquet([GOOD] * 50), cut("x.parquet")], ("x.parquet can't be read as parquet",), file="x.parquet", kind="parquet")
data("row of a parquet", [parquet([GOOD, {"prompt": "x", "answer": None}])], ("x.parquet, row 2", "'answer'"), file="x.parquet", kind="parquet")
data("folder that is no dataset", [], ("full is not a folder that datasets wrote",), file="full", kind="datasets")
data("unknown generator", [], ("unknown reasoning-gym dataset 'chain_sun'", "chain_sum"), file="chain_sun", kind="reasoning-gym")
data("option of a generator", [], ("'max_numbr'", "max_numbers"), file="gcd,max_numbr=3", kind="reasoning-gym")
case("data: no held-out rows to evaluate on", (*OWN, "--task", "jsonl:train-only.jsonl", "--evaluate", "4"), "no problem in its split 'test' (train 18, validation 0, test 0)")
case("data: no held-out rows for eval", ("eval", "text", "--task", "jsonl:train-only.jsonl"), "no problem in its split 'test'")
case("data: broken line for validate", ("validate", "jsonl:x.jsonl"), "there is no file x.jsonl")

# probes and watchers
ASK = ("probe", "calibration", "runs/own")
case("probe: unknown option", (*ASK, "--set", "bin=3"), ("there is no option 'bin'", "calibration takes bins=10"))
case("probe: option of another kind", (*ASK, "--set", "bins=many"), ("bins must be a whole number", "calibration takes bins=10"))
case("probe: option out of range", (*ASK, "--set", "bins=0"), "bins must be a whole number, 1 or more")
case("probe: option without a value", (*ASK, "--set", "bins"), "--set wants NAME=VALUE, got 'bins'")
case("probe: option said twice", (*ASK, "--set", "bins=3", "--set", "bins=4"), "--set bins is said twice")
case("probe: token that is not there", ("probe", "attribution", "runs/own", "--set", "token=999"), "999")
case("probe: a picture where there is none", ("probe", "occlusion", "runs/own", "--set", "grid=3,3"), "there is no picture to lay a grid over")
case("watch: unknown", (*QUICK, "--watch", "lookin"), "unknown watcher 'lookin'; did you mean looking")
case("watch: no picture", (*MINE, "--watch", "looking"), "the watcher looking compares replies with and without their picture")

# models
RUN = ("--task", "jsonl:problems.jsonl")
VLM = ("train", "--policy", "model", "--prompts", "2", "--group", "2", "--evaluate", "0", "--steps", "2", "--max-tokens", "6", "--out", "new")
case("data: picture that ends too soon", (*VLM, "--policy", "./model", "--task", "jsonl:x.jsonl"), ("red.png", "is damaged"),
     write("x.jsonl", lines(*(GOOD | {"images": "red.png", "split": "train"} for _ in range(3)))), cut("red.png", .6))
case("model: no such folder", (*MINE, "--policy", "models/none"), ("cannot load a policy from 'models/none'",))
case("model: unknown name", (*MINE, "--policy", "tinny"), "unknown policy 'tinny'; did you mean tiny")
case("model: of the hub, offline", (*MINE, "--policy", "someone/something"), ("cannot load a policy from 'someone/something'",))
case("model: not built yet", (*MINE, "--policy", "micro-kk"), "rlworkbench build micro-kk", write("settings.ini", "[workbench]\ndata_path = nowhere\n"))
case("model: folder without config", (*MINE, "--policy", "./full"), ("cannot load a policy from './full'", "config.json"))
case("model: broken config", (*MINE, "--policy", "./text"), ("cannot load a policy from './text'", "config.json"), write("text/config.json", '{"model_type": '))
case("model: config of no model", (*MINE, "--policy", "./text"), ("cannot load a policy from './text'", "model_type"), write("text/config.json", "{}"))
case("model: unknown kind of model", (*MINE, "--policy", "./text"), ("cannot load a policy from './text'", "warp9"), edit("text/config.json", model_type="warp9"))
case("model: config with a word for a size", (*MINE, "--policy", "./text"), ("cannot load a policy from './text'", "hidden_size"), edit("text/config.json", hidden_size="big"))
case("model: config with impossible sizes", (*MINE, "--policy", "./text"), ("cannot load a policy from './text'",), edit("text/config.json", num_attention_heads=7))
case("model: no chat template", (*MINE, "--policy", "./text"), ("text has no chat template", "chat_template.jinja"), remove("text/chat_template.jinja"))
case("model: chat template that is broken", (*MINE, "--policy", "./text"), ("the chat template of text", "fails"), write("text/chat_template.jinja", "{% for m in messages %}"))
case("model: chat template that fails", (*MINE, "--policy", "./text"), ("the chat template of text", "fails", "no system"),
     write("text/chat_template.jinja", "{{ raise_exception('no system') }}"))
case("model: chat template that says nothing", (*MINE, "--policy", "./text"), ("the chat template of text", "empty"), write("text/chat_template.jinja", "{# nothing #}"))
case("model: .bin only", (*MINE, "--policy", "./text"), ("cannot load a policy from './text'", "safetensors"), as_pickle)
case("model: weights missing", (*MINE, "--policy", "./text"), ("cannot load a policy from './text'", "safetensors"), remove("text/model.safetensors"))
case("model: truncated safetensors", (*MINE, "--policy", "./text"), ("cannot load a policy from './text'", "safetensors"), cut("text/model.safetensors"))
case("model: safetensors that are text", (*MINE, "--policy", "./text"), ("cannot load a policy from './text'", "safetensors"), write("text/model.safetensors", "not weights"))
case("model: empty safetensors", (*MINE, "--policy", "./text"), ("cannot load a policy from './text'", "safetensors"), write("text/model.safetensors", b""))
case("model: some weights missing", (*MINE, "--policy", "./text"), ("cannot load a policy from './text'", "model.norm.weight", "not in its files"),
     weights("text/model.safetensors", lambda w: {k: v for k, v in w.items() if k != "model.norm.weight"}))
case("model: weights of another shape", (*MINE, "--policy", "./text"), ("cannot load a policy from './text'", "model.norm.weight"),
     weights("text/model.safetensors", lambda w: w | {"model.norm.weight": torch.ones(7)}))
case("model: weights of another family", (*MINE, "--policy", "./text"), ("cannot load a policy from './text'", "in its files"), copy("other/model.safetensors", "text/model.safetensors"))
case("model: no tokenizer", (*MINE, "--policy", "./text"), ("cannot load a policy from './text'",), remove("text/tokenizer.json"), remove("text/tokenizer_config.json"))
case("model: broken tokenizer", (*MINE, "--policy", "./text"), ("cannot load a policy from './text'",), write("text/tokenizer.json", "{"))
case("model: tokenizer larger than the model", (*MINE, "--policy", "./text"), ("the tokenizer of text", "the model has", "same folder"),
     replace("text/tokenizer.json", '"What": ', '"What": 9'))
case("model: no picture part", (*VLM, "--task", "digits-sum", "--policy", "./model"), ("cannot load a policy from './model'",), *(remove(f"model/{f}") for f in ("processor_config.json",)))
case("model: processor and model disagree on image tokens", (*VLM, "--task", "digits-sum", "--policy", "./model"),
     ("the processor of model writes 9 image placeholders where the model makes 36 features", "same folder"), replace("model/processor_config.json", '"patch_size": 8', '"patch_size": 16'))
case("model: another mark for pictures", (*VLM, "--task", "digits-sum", "--policy", "./model"), ("the processor of model writes 0 image placeholders where the model makes 36 features",),
     edit("model/config.json", image_token_id=9, image_token_index=9))
case("model: table for a task with words", (*MINE, "--policy", "table"), "the policy 'table' answers the task 'bandit' only")
case("model: adapters over nothing", (*MINE, "--policy", "adapters"), ("adapters", "which model"), copy("runs/lora/checkpoints/000004", "adapters"),
     edit("adapters/adapter_config.json", base_model_name_or_path=""))
case("model: adapters whose config is broken", (*MINE, "--policy", "./adapters"), ("adapters/adapter_config.json", "is not JSON"), copy("runs/lora/checkpoints/000004", "adapters"),
     write("adapters/adapter_config.json", "{"))
case("model: adapters whose weights are missing", (*MINE, "--policy", "./adapters"), ("adapters holds no adapter_model.safetensors",), copy("runs/lora/checkpoints/000004", "adapters"),
     edit("adapters/adapter_config.json", base_model_name_or_path="text"), remove("adapters/adapter_model.safetensors"))
case("model: adapters whose weights are torn", (*MINE, "--policy", "./adapters"), ("the adapters in", "adapters"), copy("runs/lora/checkpoints/000004", "adapters"),
     edit("adapters/adapter_config.json", base_model_name_or_path="text"), cut("adapters/adapter_model.safetensors"))
case("model: adapters of another model", (*MINE, "--policy", "./adapters"), ("the adapters in", "do not fit"), copy("runs/lora/checkpoints/000004", "adapters"),
     edit("adapters/adapter_config.json", base_model_name_or_path="other"))
case("model: eval of a torn model", ("eval", "./text", *RUN), ("cannot load a policy from './text'", "safetensors"), cut("text/model.safetensors"))

# runs
TABLE, MY, LORA = "runs/table", "runs/own", "runs/lora"
LAST = f"{MY}/checkpoints/000004"
for command in (("resume", "full"), ("report", "full"), ("fork", "full", "--at", "1", "--out", "new")):
    case(f"run: {command[0]} of a folder that is none", command, "full is not a run: it has no config.json")
case("run: resume of nothing", ("resume", "gone"), "gone is not a run")
case("run: report of a file", ("report", "note.txt"), "note.txt is not a run")
case("run: newer format", ("resume", TABLE, "--steps", "9"), (f"{TABLE}/config.json has format {FORMAT + 1}", "upgrade it"), edit(f"{TABLE}/config.json", format=FORMAT + 1))
case("run: format is a word", ("resume", TABLE), (f"{TABLE}/config.json", "format"), edit(f"{TABLE}/config.json", format="new"))
case("run: config is no JSON", ("report", TABLE), f"{TABLE}/config.json is not a config", write(f"{TABLE}/config.json", '{"recipe": '))
case("run: config is a list", ("report", TABLE), (f"{TABLE}/config.json is not a config", "no object"), write(f"{TABLE}/config.json", "[1]"))
case("run: config is not UTF-8", ("report", TABLE), f"{TABLE}/config.json is not a config", write(f"{TABLE}/config.json", b"\xff\xfe{}"))
case("run: unknown key", ("resume", TABLE), (f"{TABLE}/config.json", "unknown key 'sead'"), edit(f"{TABLE}/config.json", sead=3))
WRONG = {"recipe": 3, "task": ["bandit"], "policy": 7, "steps": "many", "prompts": 2.5, "group": None, "max_tokens": "long", "temperature": "hot", "lr": "small",
         "clip": [1], "micro": "few", "batches": "some", "epochs": 1.5, "seed": "first", "reward": 4, "record": "all", "threads": 2, "cpu_seconds": "some", "evaluate": True, "checkpoint": -1,
         "keep": "two", "lora": {}, "device": 0, "dtype": "float16", "checkpointing": "yes", "parent": 5}
for key, value in WRONG.items():
    case(f"config: {key} = {value!r}", ("train", "--config", "c.json", "--out", "new"), ("c.json", f"{key} must be", repr(value)), write("c.json", json.dumps({key: value})))
case("config: seed = -1", ("train", "--config", "c.json", "--out", "new"), ("c.json", "seed must be a whole number, 0 or more, got -1"), write("c.json", '{"seed": -1}'))
case("config: batches that do not divide", ("train", "--config", "c.json", "--out", "new"), ("c.json", "batches must divide prompts"), write("c.json", '{"prompts": 24, "batches": 5}'))
case("config: missing", ("train", "--config", "gone.json"), "gone.json is not a config")
case("config: a folder", ("train", "--config", "full"), "full is not a config")
case("config: of a fork", ("train", "--config", "c.json", "--out", "new"), "rlworkbench fork makes such a run",
     write("c.json", json.dumps({"parent": "runs/table@2", "policy": "table", "task": "bandit", "prompts": 3, "evaluate": 0})))
case("run: log broken in the middle", ("report", TABLE), f"{TABLE}/metrics.jsonl, line 2: not JSON", replace(f"{TABLE}/metrics.jsonl", '{"step": 2', '{"step 2'))
case("run: log broken in the middle, resumed", ("resume", TABLE, "--steps", "9"), f"{TABLE}/metrics.jsonl, line 2: not JSON", replace(f"{TABLE}/metrics.jsonl", '{"step": 2', '{"step 2'))
case("run: log of something else", ("resume", TABLE, "--steps", "9"), (f"{TABLE}/metrics.jsonl, line 1", "step"), write(f"{TABLE}/metrics.jsonl", '[1]\n{"epoch": 3}\n'))
case("run: log that is not UTF-8", ("report", TABLE), (f"{TABLE}/metrics.jsonl", "UTF-8"), write(f"{TABLE}/metrics.jsonl", b"\xff\xfe\n"))
case("run: result broken", ("report", TABLE), f"{TABLE}/result.json", cut(f"{TABLE}/result.json"))
case("run: result of something else", ("report", TABLE), f"{TABLE}/result.json", write(f"{TABLE}/result.json", '{"accuracy": 1}'))
case("run: replies broken", ("report", TABLE), f"{TABLE}/replies.json", write(f"{TABLE}/replies.json", "["))
case("run: truncated parquet", ("report", TABLE), f"{TABLE}/steps/000001.parquet", cut(f"{TABLE}/steps/000001.parquet"))
case("run: empty parquet", ("report", TABLE), f"{TABLE}/steps/000001.parquet", write(f"{TABLE}/steps/000001.parquet", b""))
case("run: parquet of something else", ("report", TABLE), (f"{TABLE}/steps/000001.parquet", "no column 'step'"), parquet([GOOD]), copy("x.parquet", f"{TABLE}/steps/000001.parquet"))
case("run: recipe that is not here", ("report", TABLE), "unknown recipe 'grop'; did you mean grpo", edit(f"{TABLE}/config.json", recipe="grop"))
case("run: trainer.json missing", ("resume", TABLE, "--steps", "9"), (f"{TABLE}/checkpoints/000006", "trainer.json"), remove(f"{TABLE}/checkpoints/000006/trainer.json"))
case("run: trainer.json broken", ("resume", TABLE, "--steps", "9"), (f"the checkpoint {TABLE}/checkpoints/000006 is broken",), cut(f"{TABLE}/checkpoints/000006/trainer.json"))
case("run: trainer.json of something else", ("resume", TABLE, "--steps", "9"), (f"the checkpoint {TABLE}/checkpoints/000006 can't be taken up", "lacks 'weights'"),
     write(f"{TABLE}/checkpoints/000006/trainer.json", '{"dict": {"done": {"value": 6}}}'))
case("run: trainer.safetensors truncated", ("resume", TABLE, "--steps", "9"), (f"the checkpoint {TABLE}/checkpoints/000006 is broken",), cut(f"{TABLE}/checkpoints/000006/trainer.safetensors"))
case("run: trainer.safetensors of another step", ("resume", MY, "--steps", "9"), (f"the checkpoint {LAST} can't be taken up", "lacks"), weights(f"{LAST}/trainer.safetensors", lambda w: dict(list(w.items())[3:])))
case("run: eval of a torn checkpoint", ("eval", TABLE, "--task", "bandit"), (f"{TABLE}/checkpoints/000006 is broken",), cut(f"{TABLE}/checkpoints/000006/trainer.safetensors"))
case("run: eval of a run without checkpoint", ("eval", TABLE, "--task", "bandit"), f"{TABLE} has no checkpoint", remove(f"{TABLE}/checkpoints"))
case("run: checkpoint of another family", ("resume", MY, "--steps", "9"), (LAST, "does not fit"), copy("other", LAST))
case("run: checkpoint's weights truncated", ("resume", MY, "--steps", "9"), (LAST, "safetensors"), cut(f"{LAST}/model.safetensors"))
case("run: checkpoint's weights of another shape", ("resume", MY, "--steps", "9"), (LAST, "model.norm.weight"), weights(f"{LAST}/model.safetensors", lambda w: w | {"model.norm.weight": torch.ones(7)}))
case("run: adapters that don't fit", ("resume", LORA, "--steps", "9"), (f"{LORA}/checkpoints/000004", "adapters are not those of this model"),
     weights(f"{LORA}/checkpoints/000004/adapter_model.safetensors", lambda w: {k: v[:1].contiguous() for k, v in w.items()}))
case("run: adapters of another model", ("resume", LORA, "--steps", "9"), (f"{LORA}/checkpoints/000004", "adapters are not those of this model"),
     weights(f"{LORA}/checkpoints/000004/adapter_model.safetensors", lambda w: {k.replace("q_proj", "z_proj"): v for k, v in w.items()}))
case("run: adapters torn", ("resume", LORA, "--steps", "9"), (f"{LORA}/checkpoints/000004",), cut(f"{LORA}/checkpoints/000004/adapter_model.safetensors"))
case("run: its model is gone", ("resume", MY, "--steps", "9"), "'text'", remove("text"))
case("run: its data is gone", ("resume", MY, "--steps", "9"), "there is no file problems.jsonl", remove("problems.jsonl"))
case("run: its reward is gone", ("resume", MY, "--steps", "9"), "mine.py", remove("mine.py"))
case("run: its data has changed", ("resume", MY, "--steps", "9"), (f"the task of {MY} has changed since it began",), replace("problems.jsonl", "What is 0+1?", "What is 1+0?"))
case("run: its reward has changed", ("resume", MY, "--steps", "9"), (f"the reward of {MY} has changed since it began",), replace("mine.py", "/ 100", "/ 99"))
case("run: resume at its end", ("resume", TABLE), f"{TABLE} is at step 6 already; --steps N beyond that goes on")
case("run: resume before its end", ("resume", TABLE, "--steps", "2"), f"{TABLE} is at step 6 already", write(f"{TABLE}/stopped.json", '{"step": 6, "why": "alarm"}'))
for steps in ("0", "-1"):
    case(f"run: resume to step {steps}", ("resume", TABLE, "--steps", steps), f"steps must be a whole number, 1 or more, got {steps}")
case("run: locked", ("resume", TABLE, "--steps", "9"), f"{TABLE} is being written by another process", lock(TABLE))
for at, says in (("99", "a fork can begin at 0 to 6, got 99"), ("7", "a fork can begin at 0 to 6, got 7"), ("-1", "a fork can begin at 0 to 6, got -1")):
    case(f"fork: at {at}", ("fork", TABLE, "--at", at, "--out", "new", "--steps", "200"), (TABLE, "has 6 steps", says))
case("fork: at the end without further steps", ("fork", TABLE, "--at", "6", "--out", "new"), ("begins at step 6", "--steps N beyond that"))
case("fork: onto a run", ("fork", TABLE, "--at", "2", "--out", MY), f"{MY} already holds a run")
case("fork: onto itself", ("fork", TABLE, "--at", "2", "--out", TABLE), f"{TABLE} already holds a run")
case("fork: onto something", ("fork", TABLE, "--at", "2", "--out", "full"), "full already holds something")
case("fork: unknown recipe", ("fork", TABLE, "--at", "2", "--out", "new", "--recipe", "grop"), "unknown recipe 'grop'; did you mean grpo")
case("fork: impossible rate", ("fork", TABLE, "--at", "2", "--out", "new", "--lr", "-1"), "lr must be")
case("fork: reward file missing", ("fork", TABLE, "--at", "2", "--out", "new", "--reward", "gone.py:f"), "with an existing file")
case("fork: its parent is gone", ("resume", "child", "--steps", "9"), ("runs/gone", "is not a run"), copy(TABLE, "child"), edit("child/config.json", parent="runs/gone@2"),
     remove("child/checkpoints"))
case("fork: its parent is no address", ("resume", "child", "--steps", "9"), ("parent", "FOLDER@STEP"), copy(TABLE, "child"), edit("child/config.json", parent="somewhere"),
     remove("child/checkpoints"))

# options
for option, key, values in (("--steps", "steps", ("0", "-1")), ("--prompts", "prompts", ("0", "-1")), ("--group", "group", ("0", "-1")), ("--batches", "batches", ("0", "-1")), ("--epochs", "epochs", ("0", "-1")), ("--seed", "seed", ("-1",)), ("--max-tokens", "max_tokens", ("0", "-1")),
                            ("--micro", "micro", ("0", "-1")), ("--lr", "lr", ("0", "-1", "nan", "inf")), ("--temperature", "temperature", ("-1", "nan", "inf")),
                            ("--evaluate", "evaluate", ("-1",)), ("--keep", "keep", ("-1",)), ("--lora", "lora", ("-1",)), ("--threads", "threads", ("0", "-1", "nan"))):
    for value in values:
        case(f"option: {option} {value}", (*QUICK, option, value), (f"{key} must be", value))
    if option != "--threads":
        case(f"option: {option} many", (*QUICK, option, "many"), (option, "valid"))
case("option: --temperature 0", (*QUICK, "--temperature", "0"), "temperature 0 are for evaluation only")
for batches in ("2", "4"):
    case(f"option: --batches {batches} of 3 problems", (*QUICK, "--batches", batches), f"batches must divide prompts, got {batches} minibatches of 3 problems")
case("option: --seed one", (*QUICK, "--seed", "one"), ("--seed", "valid integer"))
case("option: --group 1", (*QUICK, "--group", "1", "--recipe", "grpo"), "group must be 2 or more, got 1")
case("option: --record", (*QUICK, "--record", "all"), "record must be small or full, got 'all'")
case("option: --device cuda", (*QUICK, "--device", "cuda:99"), "there is no device cuda:99 on this machine")
case("option: --device", (*QUICK, "--device", "gpu"), "got 'gpu'")
case("option: --dtype", (*QUICK, "--dtype", "float16"), "dtype must be float32 or bfloat16, got 'float16'")
case("option: --dtype of a table", (*QUICK, "--dtype", "bfloat16"), "'table' is a table; it has no bfloat16")
case("option: --dtype without adapters", (*QUICK, "--policy", "random-tiny", "--task", "digits-sum", "--dtype", "bfloat16"),
     "round most of their updates away; --lora N")
case("option: --lora on a table", (*QUICK, "--lora", "4"), "'table' is no Hugging Face model")
case("option: --checkpointing a table", (*QUICK, "--checkpointing"), "'table' is no Hugging Face model")
case("option: --recipe", (*QUICK, "--recipe", "grop"), "unknown recipe 'grop'; did you mean grpo")
case("option: --task", (*QUICK, "--task", "bandito"), "unknown task 'bandito'; did you mean bandit")
case("option: no such option", (*QUICK, "--stepz", "3"), ("--stepz", "--steps"))
case("option: without value", ("train", "--steps"), "--steps")
case("option: a stray word", ("train", "grpo"), "grpo")
case("command: unknown", ("trian",), ("trian", "train"))
for name, says in (("nan", "of item jsonl"), ("infinite", "a reward must be finite"), ("word", "is 'high', not a number"), ("nothing", "is None, not a number"),
                   ("word_part", "the reward 'b' of item"), ("broken", "ZeroDivisionError: division by zero"), ("third", "KeyError: 'colour'"),
                   ("long_story", "RuntimeError: first line second line"), ("parts", ", the first reply had ["), ("no_parts", "has a reward without parts"),
                   ("short", "must take (item, text)"), ("none", "mine.py has no function 'none'; it has"), ("number", "mine.py has no function 'number'"), ("", "has no function ''")):
    says = says.replace("of item jsonl", "of item problems/")
    case(f"reward: {name or 'no name'}", (*MINE, "--reward", f"mine.py:{name}"), (says,))
case("reward: file missing", (*MINE, "--reward", "gone.py:f"), "FILE.py:FUNCTION with an existing file, got 'gone.py:f'")
case("reward: no function named", (*MINE, "--reward", "mine.py"), "FILE.py:FUNCTION")
case("reward: a folder", (*MINE, "--reward", "full:f"), "FILE.py:FUNCTION")
case("reward: not Python", (*MINE, "--reward", "red.png:f"), "red.png")
case("reward: syntax error", (*MINE, "--reward", "s.py:f"), ("s.py failed to import: SyntaxError", "line 1"), write("s.py", "def f(:\n"))
case("reward: import of what is not there", (*MINE, "--reward", "s.py:f"), ("s.py failed to import", "no_such_module"), write("s.py", "import no_such_module\n"))
case("reward: file that ends the program", (*MINE, "--reward", "s.py:f"), ("s.py failed to import", "SystemExit"), write("s.py", "raise SystemExit(0)\n"))
case("reward: for a lesson", (*MINE, "--recipe", "sft", "--reward", "mine.py:good"), "takes no --reward")
case("recipe: a lesson without demonstrations", (*MINE, "--recipe", "sft"), ("problems.jsonl, line 1 has no demonstration", "'sft' learns from given replies"))
case("recipe: a need that the task can't meet", (*QUICK, "--recipe", "trust_grpo"), ("'trust_grpo'", "thinking needs a task with a method steps", "'bandit'"))
case("recipe: a route that the task can't tell", (*MINE, "--recipe", "route_diversity"), ("'route_diversity'", "needs a task with a method route"))

# where it goes
case("out: below a regular file", (*QUICK, "--out", "note.txt/run"), "note.txt/run")
case("out: a regular file", (*QUICK, "--out", "note.txt"), "note.txt already holds something")
case("out: a folder that holds something", (*QUICK, "--out", "full"), "full already holds something")
case("out: a run", (*QUICK, "--out", TABLE), f"{TABLE} already holds a run")
case("out: runs folder of the settings is a file", QUICK[:-2], "note.txt", write("settings.ini", "[workbench]\nruns_path = note.txt\n"))
case("out: of a fork, below a regular file", ("fork", TABLE, "--at", "2", "--out", "note.txt/run"), "note.txt/run")
case("out: html into a folder that is not there", ("report", TABLE, "--html", "gone/r.html"), "cannot write gone/r.html: there is no folder gone")
case("out: html is a folder", ("report", TABLE, "--html", "full"), "full")
case("out: html below a regular file", ("report", TABLE, "--html", "note.txt/r.html"), "note.txt/r.html")
case("out: build below a regular file", ("build", "tiny", "--steps", "1", "--out", "note.txt/b"), "note.txt/b can't be written: note.txt is a file")
case("out: build onto a regular file", ("build", "tiny", "--steps", "1", "--out", "note.txt"), "note.txt already holds something")
case("out: build onto something", ("build", "tiny", "--out", "full", "--force"), "full already holds something")
case("out: demo below a regular file", ("demo", "--out", "note.txt/d"), "note.txt/d")
case("out: demo onto something", ("demo", "--out", "full", "--force"), "full already holds something")

# the other commands, the settings
case("build: unknown", ("build", "huge"), "unknown variant 'huge'")
case("build: no steps", ("build", "tiny", "--steps", "0"), "steps must be 1 or more, got 0")
case("demo: no steps", ("demo", "--steps", "0"), "steps must be 1 or more, got 0")
case("validate: unknown", ("validate", "digit-sum"), "did you mean digits-sum")
for limit in ("0", "-1"):
    case(f"validate: --limit {limit}", ("validate", "digits-sum", "--limit", limit), f"limit must be 1 or more, got {limit}")
case("list: unknown", ("list", "recipe"), "did you mean recipes")
for step in ("0", "7", "-1"):
    case(f"diff: step {step}", ("diff", TABLE, "--step", step, "--recipes", "rloo"), (TABLE, "1 to 6", step))
case("diff: unknown recipe", ("diff", TABLE, "--step", "2", "--recipes", "rlo"), "unknown recipe 'rlo'; did you mean rloo")
case("diff: no recipe", ("diff", TABLE, "--step", "2", "--recipes", ","), "recipe")
case("diff: of no run", ("diff", "full", "--step", "2", "--recipes", "rloo"), "full is not a run")
case("diff: html into a folder that is not there", ("diff", TABLE, "--step", "2", "--recipes", "rloo", "--html", "gone/d.html"), "there is no folder gone")
case("diff: checkpoint broken", ("diff", TABLE, "--step", "6", "--recipes", "rloo"), "is broken", cut(f"{TABLE}/checkpoints/000004/trainer.safetensors"))
case("show: unknown", ("show", "dapoo"), "did you mean dapo")
case("show: second unknown", ("show", "grpo", "dapoo"), "did you mean dapo")
case("report: without a run", ("report",), ("argument", "run"))
case("eval: unknown task", ("eval", "tiny", "--task", "chess"), "unknown task 'chess'")
for option in ("--n", "--k"):
    for value in ("0", "-1"):
        case(f"eval: {option} {value}", ("eval", "tiny", option, value), ("n and k must be 1 or more", value))
case("eval: --seed -1", ("eval", "tiny", "--seed", "-1", "--n", "2"), "seed must be 0 or more, got -1")
case("demo: --seed -1", ("demo", "--seed", "-1"), "seed must be 0 or more, got -1")
case("reproduce: --first-seed -1", ("reproduce", "clip_higher", "--first-seed", "-1"), "--first-seed must be 0 or more, got -1")
case("eval: threads", ("eval", "tiny", "--threads", "0"), "threads must be")
case("doctor: a stray word", ("doctor", "now"), "now")
for name, content, says in (("no equals sign", "[workbench]\nno equals sign\n", "can't be read"), ("unknown key", "[workbench]\nsead = 7\n", "unknown key 'sead'"),
                            ("seed", "[workbench]\nseed = first\n", "seed must be a whole number, 0 or more, got 'first'"), ("negative seed", "[workbench]\nseed = -1\n", "0 or more, got '-1'"), ("device", "[workbench]\ndevice = gpu\n", "got 'gpu'"),
                            ("threads", "[workbench]\nthreads = some\n", "threads must be a positive number or 'auto', got 'some'"),
                            ("twice", "[workbench]\nseed = 1\nseed = 2\n", "can't be read"), ("not UTF-8", b"[workbench]\nruns_path = \xff\n", "can't be read"),
                            ("empty path", "[workbench]\nruns_path =\n", "runs_path")):
    case(f"settings: {name}", QUICK[:-2], ("settings.ini", says) if name not in ("device", "threads") else says, write("settings.ini", content))
case("settings: doctor", ("doctor",), ("settings.ini", "unknown key"), write("settings.ini", "[workbench]\nsead = 7\n"))


# --- running them

@pytest.fixture(scope="module")
def shell():
    "(folder, arguments) -> exit code, stdout, stderr, each time in a new process."
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=OFFLINE)
    assert server.stdout.readline() == "ready\n"

    def run(folder, arguments):
        said = {name: folder.parent / f"{folder.name}.{name}" for name in ("out", "err")}
        server.stdin.write(json.dumps({"folder": str(folder), "arguments": arguments} | {k: str(v) for k, v in said.items()}) + "\n")
        server.stdin.flush()
        return SimpleNamespace(code=int(server.stdout.readline()), **{k: v.read_text(errors="replace") for k, v in said.items()})
    yield run
    server.stdin.close()
    server.wait(10)


@pytest.fixture
def folder(library, tmp_path):
    yield Path(shutil.copytree(library, tmp_path / "user"))
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_bad_input(case, folder, shell):
    held = [change(folder) for change in case.changes]
    before = snapshot(folder)
    done = shell(folder, case.arguments)
    assert "Traceback" not in done.err and done.code == 2, done.err + done.out
    assert done.err.startswith("rlworkbench: ") and done.err.endswith("\n") and done.err.count("\n") == 1, done.err
    assert [s for s in case.says if s not in done.err] == [], done.err
    assert len(done.err) < 500, done.err
    assert snapshot(folder) == before
    del held


GOOD_COMMANDS = {
    "train the table": QUICK,
    "train on own data": (*MINE, "--reward", "mine.py:good"),
    "train a model that sees": (*VLM, "--task", "digits-sum", "--policy", "./model"),
    "train adapters": (*MINE, "--lora", "2"),
    "run a config again": ("train", "--config", "runs/own/config.json", "--out", "new"),
    "resume the table": ("resume", TABLE, "--steps", "7"),
    "resume on own data": ("resume", MY, "--steps", "5"),
    "resume adapters": ("resume", LORA, "--steps", "5"),
    "fork": ("fork", TABLE, "--at", "3", "--out", "new", "--recipe", "rloo"),
    "diff": ("diff", TABLE, "--step", "5", "--recipes", "rloo,dapo"),
    "report": ("report", TABLE),
    "eval of a run": ("eval", TABLE, "--task", "bandit", "--n", "3"),
    "eval of own data": ("eval", "./text", "--task", "jsonl:problems.jsonl,max_tokens=6", "--n", "3"),
    "validate": ("validate", "jsonl:problems.jsonl"),
    "no command": (),
}


@pytest.mark.parametrize("name", GOOD_COMMANDS)
def test_the_same_commands_work_where_nothing_is_wrong(name, folder, shell):
    done = shell(folder, GOOD_COMMANDS[name])
    assert done.code == 0, done.err


def test_a_template_that_the_folder_lacks_can_be_passed(folder):
    template = (folder / "text/chat_template.jinja").read_text()
    (folder / "text/chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="text has no chat template"):
        load_hugging(folder / "text")
    asked = [Item("a", "What is 1+1?")]
    assert load_hugging(folder / "text", template=template).encode(asked).ids[0].equal(family("llama").encode(asked).ids[0])


def test_a_lock_that_is_held_is_not_broken(folder, shell):
    held = lock(TABLE)(folder)
    assert shell(folder, ("report", TABLE)).code == 0      # reading needs no lock
    assert shell(folder, ("resume", TABLE, "--steps", "7")).code == 2
    held.close()
    assert shell(folder, ("resume", TABLE, "--steps", "7")).code == 0


def test_a_dry_run_leaves_nothing(folder, shell):
    before = snapshot(folder)
    done = shell(folder, (*MINE, "--dry-run", "--json"))
    assert done.code == 0 and set(json.loads(done.out)) >= {"cpu_seconds", "megabytes"}, done.err
    assert snapshot(folder) == before


def test_a_reward_that_fails_later_leaves_a_run_that_opens(folder, shell):
    done = shell(folder, (*MINE, "--reward", "mine.py:late", "--steps", "40"))
    assert done.code == 2 and "OverflowError: sixty are enough" in done.err and done.err.count("\n") == 1, done.err
    assert json.loads((folder / "new/metrics.jsonl").read_text().splitlines()[0])["step"] == 1
    assert shell(folder, ("report", "new")).code == 0


@pytest.mark.parametrize("case", [c for c in CASES if c.name in ("model: truncated safetensors", "reward: third", "option: --steps many", "run: truncated parquet")], ids=lambda c: c.name)
def test_the_installed_command_says_the_same(case, folder):
    for change in case.changes:
        change(folder)
    done = subprocess.run([Path(sys.executable).parent / "rlworkbench", *case.arguments], cwd=folder, capture_output=True, text=True, env=OFFLINE)
    assert done.returncode == 2 and done.stderr.startswith("rlworkbench: ") and done.stderr.count("\n") == 1, done.stderr
    assert [s for s in case.says if s not in done.stderr] == []
