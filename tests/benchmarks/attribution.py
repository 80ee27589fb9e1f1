"""Input x gradient of every token of a reply: this workbench, Captum and Inseq, each in processes of its own, in turn.

As a script it is one of these processes: `python attribution.py WAY PROMPT TOKENS OUT.json`. It needs torch and transformers, and the package whose way it is.
"""
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
SIZES = ((48, 24), (128, 64))     # prompt tokens, reply tokens
CALLS = 3                         # timed in a process, after one that is not
INSEQ = "RLWORKBENCH_INSEQ_PYTHON"  # the python of an environment with inseq 0.7


def tokenizer(size=512):
    "One word per number: w000 w001 ..."
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    inner = Tokenizer(models.WordLevel({f"w{i:03d}": i for i in range(size)}, unk_token="w000"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="w000", eos_token="w001", bos_token="w002", unk_token="w000",
                                   chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}")


def spelled(ids) -> str:
    "Numbers as the tokenizer reads them."
    return " ".join(f"w{int(i):03d}" for i in ids)


def model():
    "A random Qwen2, width 128, 4 layers, 512 words."
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=512, hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
                         initializer_range=.08, pad_token_id=0, eos_token_id=1, bos_token_id=2)
    return Qwen2ForCausalLM(config).eval()


def prepared(way, model, words, prompt, reply):
    "A function of nothing that gives (T,P): the rows of the reply's tokens, the columns of the prompt's."
    P = len(prompt)
    if way.startswith("ours"):
        from rlworkbench.diagnostics.rows import every_token
        from rlworkbench.policies.hugging import HuggingPolicy
        from rlworkbench.policies.policy import Prompts
        policy = HuggingPolicy(model, words, "random-qwen2")
        room = {} if way == "ours" else {"room": 2**16}
        return lambda: every_token(policy, Prompts([prompt], [{}]), reply, **room)[:, :P]
    if way == "captum":
        from captum.attr import LayerGradientXActivation, LLMGradientAttribution, TextTokenInput
        asked = LLMGradientAttribution(LayerGradientXActivation(model, model.model.embed_tokens), words)
        given = TextTokenInput(spelled(prompt), words)
        return lambda: asked.attribute(given, target=reply).token_attr
    import inseq
    from inseq.attr.step_functions import probability_fn
    inseq.register_step_function(lambda args, **more: probability_fn(args, **more).log(), "log_prob", overwrite=True)
    asked = inseq.load_model(model, "input_x_gradient", tokenizer=words)
    texts = spelled(prompt), spelled([*prompt.tolist(), *reply.tolist()])

    def run():
        out = asked.attribute(*texts, attributed_fn="log_prob", show_progress=False, pretty_progress=False)
        return out.sequence_attributions[0].target_attributions.sum(-1).T[-len(reply):, :P]
    return run


def peak() -> float:
    "Megabytes that this process held at most. Not getrusage: there a process begins with what its parent held."
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def worker(way, P, T, out):
    "One process: build, note the memory, run, write times and the result."
    import torch
    net, words = model(), tokenizer()
    ids = torch.randint(3, 512, (P + T,), generator=torch.Generator().manual_seed(1))
    run = prepared(way, net, words, ids[:P], ids[P:])
    with torch.no_grad():
        net(ids[None, :2])
    before = peak()
    value, times = run(), []
    after = peak()
    for _ in range(CALLS):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    Path(out).write_text(json.dumps({"seconds": times, "megabytes": after - before, "value": value.tolist()}))


def apart(a, b):
    "Largest difference, and as a share of the largest value."
    import torch
    a, b = torch.tensor(a), torch.tensor(b)
    return float((a - b).abs().max()), float((a - b).abs().max() / b.abs().max())


def one(way, python, P, T, tmp):
    "Run one process and read what it wrote."
    out = Path(tmp) / "out.json"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([python, "-W", "ignore", __file__, way, str(P), str(T), str(out)], capture_output=True, text=True, env=environment, cwd=tmp)
    if done.returncode:
        raise RuntimeError(f"{way} failed: {done.stderr[-800:]}")
    return json.loads(out.read_text())


def installed(module) -> bool:
    "Is a package there?"
    import importlib.util
    return importlib.util.find_spec(module) is not None


def attribution(repeats=5) -> dict:
    "CPU seconds, peak memory and agreement, at each size; the ways in turn, A B C C B A."
    from tempfile import TemporaryDirectory
    ways, skipped = {"ours": sys.executable, "ours, less room": sys.executable}, {}
    if installed("captum"):
        ways["captum"] = sys.executable
    else:
        skipped["captum"] = "not installed: pip install 'rlworkbench[bench]'"
    if os.environ.get(INSEQ):
        ways["inseq"] = os.environ[INSEQ]
    else:
        skipped["inseq"] = f"{INSEQ} does not name the python of an environment with inseq 0.7"
    out = {"skipped": skipped, "repeats": repeats}
    for P, T in SIZES:
        found = {way: [] for way in ways}
        with TemporaryDirectory() as tmp:
            for k in range(repeats):
                for way in (list(ways) if k % 2 == 0 else list(ways)[::-1]):
                    found[way].append(one(way, ways[way], P, T, tmp))
        out[f"P{P} T{T}"] = compared(found)
    return out


def compared(found) -> dict:
    "Medians, ratios of neighbouring processes, and how far values are apart."
    seconds = {way: [statistics.median(f["seconds"]) for f in runs] for way, runs in found.items()}
    out = {way: {"seconds": statistics.median(seconds[way]), "megabytes": statistics.median(f["megabytes"] for f in runs)} for way, runs in found.items()}
    for way in found:
        if way != "ours":
            difference, share = apart(found["ours"][0]["value"], found[way][0]["value"])
            out[way] |= {"largest_difference": difference, "relative": share}
            for mine in ("ours", "ours, less room") if way in ("captum", "inseq") else ():
                ratios = sorted(b / a for a, b in zip(seconds[mine], seconds[way]))
                out[way] |= {f"ratio to {mine}": statistics.median(ratios), f"ratio_min to {mine}": ratios[0], f"ratio_max to {mine}": ratios[-1]}
    return out


if __name__ == "__main__":
    worker(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
