"""What a run on TRL shares with one at home: adapters, small policies, selections, watchers, interruptions, and what is refused."""
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from rlworkbench.core.config import Config
from rlworkbench.core.registry import recipes, watchers
from rlworkbench.engines import job
from rlworkbench.engines.config import engine_trainer
from rlworkbench.policies.micro import MICROS, random_micro
from rlworkbench.training.choices import new_trainer
from rlworkbench.training.health import StopRun, WatcherSpec
from rlworkbench.training.run import Run
from tests import trl_side
from tests.test_engine_trl import Slow, said

ALONE = SimpleNamespace(num_processes=1, is_main_process=True)
REWARD = "def odd(item, text):\n    return float(len(text) % 3)\n"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    "A config of a policy of the micro family that was never trained, and a reward that any reply can get."
    folder = tmp_path_factory.mktemp("small")
    random_micro(replace(MICROS["micro-verbose"], width=32, layers=2)).save(folder / "micro")
    (folder / "odd.py").write_text(REWARD)
    return Config(policy=str(folder / "micro"), task="verbose-sum", reward=f"{folder / 'odd.py'}:odd", max_tokens=8, prompts=2, group=4, steps=4, lr=.01, evaluate=0, threads="1", clip=1e6)


@pytest.fixture
def drifting(monkeypatch):
    "A recipe with a memory, by name."
    monkeypatch.setitem(recipes.all(), "drifting", recipes.get("grpo").but(name="drifting", advantage=Slow()))


# --- the same gradient ---
def first_gradient(trainer):
    "What reaches TRL's optimiser first."
    from transformers import TrainerCallback
    found = {}

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, *args, **named):
            found.update({n: p.grad.clone() for n, p in trainer.words.parameters().items() if p.grad is not None})
    trainer.add_callback(Keep())
    trainer.train()
    return found


def own_gradient(config):
    "A rollout of the workbench's own trainer, and its first gradient."
    mine = new_trainer(config)
    mine.policy.banned = ()
    began = {n: p.detach().clone() for n, p in mine.policy.parameters().items()}
    for step in mine.phases():
        if step.phase == "gradient":
            return step, {n: g.clone() for n, g in step.grads["all"].items()}, began


PICTURES = dict(policy="small-llava", task="digits-sum", max_tokens=6)


@pytest.mark.parametrize("changes", [{}, dict(lora=4), dict(lora=4, checkpointing=True, recipe="apo_viewr1"), dict(lora=2, micro=4, **PICTURES)], ids=["micro", "adapters", "computed-twice", "pictures"])
def test_the_first_gradient_is_that_of_the_own_loop(small, tmp_path, changes):
    """Adapters begin at the same numbers, too."""
    config = replace(small, steps=1, **changes)
    step, wanted, began = own_gradient(replace(config, checkpointing=False))
    trainer = engine_trainer(config, ALONE, str(tmp_path))
    assert {n: p.tolist() for n, p in trainer.words.parameters().items()} == {n: p.tolist() for n, p in began.items()}
    trl_side.dictate(trainer, step)
    found, largest = first_gradient(trainer), max(float(g.abs().max()) for g in wanted.values())
    assert largest > 1e-4 and max(float((found[n] - g).abs().max()) for n, g in wanted.items()) < 1e-5 * largest
    assert ("lora" in changes) == all("lora_" in n for n in found)


def test_bfloat16_is_said_to_the_launcher(small, tmp_path, monkeypatch):
    """Weights and updates in float32; the gradient is nearly that of float32, and not the same."""
    step, wanted, _ = own_gradient(small)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setattr("accelerate.state.AcceleratorState._shared_state", {})
    trainer = engine_trainer(replace(small, steps=1), ALONE, str(tmp_path))
    trl_side.dictate(trainer, step)
    found = first_gradient(trainer)
    a, b = (torch.cat([x[n].flatten() for n in wanted]) for x in (found, wanted))
    assert trainer.accelerator.mixed_precision == "bf16" and {p.dtype for p in trainer.words.parameters().values()} == {torch.float32}
    assert torch.nn.functional.cosine_similarity(a, b, 0) > .99 and (a - b).abs().max() > 1e-4 * b.abs().max()


class Draws:
    "In the place of vLLM, which needs a GPU: hands back what it is told, with the log-probs that it was drawn with."
    told = None

    def __init__(self, **said):
        Draws.said, Draws.synced = said, 0

    def sync_weights(self):
        Draws.synced += 1

    def generate(self, prompts, images, num_generations, profiler):
        step = Draws.told
        ids, logp = ([row[:n] for row, n in zip(x.tolist(), step.length.tolist())] for x in (step.ids, step.old))
        return prompts, ids, [[[v] for v in row] for row in logp], None


def test_what_is_said_to_vllm(small, tmp_path, monkeypatch):
    """Its replies and log-probs go through TRL's correction, which is 1 where both samplers agree; the gradient is that of the own loop. vLLM itself was not run."""
    config = replace(small, steps=1, **PICTURES)
    Draws.told, wanted, _ = own_gradient(config)
    monkeypatch.setattr("rlworkbench.engines.config.able", lambda vllm: None)
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", Draws)
    trainer = engine_trainer(config, ALONE, str(tmp_path), vllm=.4)
    found, largest = first_gradient(trainer), max(float(g.abs().max()) for g in wanted.values())
    assert max(float((found[n] - g).abs().max()) for n, g in wanted.items()) < 1e-5 * largest and trainer.trust.min() > .999
    assert {k: Draws.said[k] for k in ("mode", "gpu_memory_utilization", "enable_sleep_mode", "temperature", "max_completion_length")} == {
        "mode": "colocate", "gpu_memory_utilization": .4, "enable_sleep_mode": True, "temperature": 1.0, "max_completion_length": 6}
    assert Draws.said["generation_kwargs"] == {"logit_bias": {3: -100.0}} and Draws.synced == 1


def test_the_reference_is_read_where_the_policy_came_from(small, tmp_path, monkeypatch):
    monkeypatch.setattr("rlworkbench.engines.trl.save_model", lambda *a, **k: pytest.fail("it was written"))
    trainer = engine_trainer(replace(small, recipe="apo_viewr1"), ALONE, str(tmp_path))
    kept = dict(trainer.ref_model.named_parameters())
    assert all(torch.equal(p, kept[n]) for n, p in trainer.model.named_parameters())
    assert engine_trainer(replace(small, recipe="apo_viewr1", lora=2), ALONE, str(tmp_path)).ref_model is None


# --- interrupted ---
def stop_after(number):
    def watch(run, step):
        if step.clock[0] + 1 == number:
            raise KeyboardInterrupt
    return watch


def timeless(run):
    return run.metrics.drop(columns=[c for c in run.metrics if c.startswith(("time/", "cpu/"))])


def last_weights(run):
    return load_file(next(run.checkpoints()[-1].glob("*.safetensors")))


@pytest.mark.parametrize("changes", [dict(batches=2, epochs=2, watch="geometry", **PICTURES), dict(lora=2)], ids=["pictures", "adapters"])
def test_an_interrupted_run_ends_in_the_same_bits(small, drifting, tmp_path, changes):
    """Weights, log, tokens, the recipe's memory and the watchers'. The third step is made, logged and forgotten again; its line in the log is torn."""
    config = replace(small, recipe="drifting", checkpoint=2, record="full", **changes)
    whole = job.train(config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        job.train(config, tmp_path / "cut", stop_after(3))
    with open(tmp_path / "cut" / "metrics.jsonl", "a") as log:
        log.write('{"step": 9, "rew')
    again = job.resume(tmp_path / "cut")
    assert timeless(whole).equals(timeless(again)) and whole.steps() == again.steps() == [1, 2, 3, 4]
    assert all(whole.tokens(k).equals(again.tokens(k)) for k in whole.steps())
    a, b = last_weights(whole), last_weights(again)
    assert set(a) == set(b) and all(torch.equal(a[n], b[n]) for n in a) and len(set(whole.metrics["grad_norm"])) == 4
    name = f"trl/checkpoint-{4 * (config.batches or 1) * (config.epochs or 1)}/recipe"
    for end in (".json", ".safetensors"):
        assert (whole.folder / (name + end)).read_bytes() == (again.folder / (name + end)).read_bytes()
    assert '"seen": ' in (whole.folder / f"{name}.json").read_text() and "EntropyAlarm" in (whole.folder / f"{name}.json").read_text()


def test_what_a_resumed_run_looks_at_first(small, tmp_path):
    """Files that have changed are refused, an evaluation that was cut off is made, a checkpoint without an end is passed over."""
    config, reward = replace(small, steps=2, checkpoint=1, evaluate=2), tmp_path / "odd.py"
    reward.write_text(REWARD)
    run = job.train(replace(config, reward=f"{reward}:odd"), tmp_path / "run")
    result, weights = run.read("result.json"), last_weights(run)
    (run.folder / "result.json").unlink()
    assert job.resume(run.folder).read("result.json") == result
    shutil.rmtree(run.checkpoints()[-1])
    (run.folder / "trl/checkpoint-2/recipe.json").unlink()
    again = job.resume(run.folder)
    assert all(torch.equal(w, weights[n]) for n, w in last_weights(again).items()) and again.read("result.json") == result
    reward.write_text(REWARD + "\n")
    with pytest.raises(ValueError, match="the reward of .* has changed since it began"):
        job.resume(run.folder, steps=3)


def test_a_run_goes_on_beyond_its_end(small, tmp_path, monkeypatch):
    """Also where no checkpoint was asked for on the way; not under another precision."""
    whole, short = (job.train(replace(small, steps=n, checkpoint=0), tmp_path / str(n)) for n in (2, 1))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ValueError, match="began with mixed precision no, and now it would be bf16"):
        job.resume(short.folder, steps=2)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    assert (short.folder / "trl/checkpoint-1/recipe.json").is_file()
    again = job.resume(short.folder, steps=2)
    a, b = last_weights(whole), last_weights(again)
    assert timeless(whole).equals(timeless(again)) and all(torch.equal(a[n], b[n]) for n in a)


# --- what else a config says ---
def test_a_selection_narrows_the_pool(small, tmp_path):
    config = replace(small, select="random,pool=12", budget=.5, steps=2, checkpoint=1, record="full")
    run = job.train(config, tmp_path / "run")
    chosen = {str(n) for n in new_trainer(config).task.selection.ids}
    assert chosen == {str(n) for n in run.read("selection.json")["ids"]} and {*run.tokens(1)["item"], *run.tokens(2)["item"]} <= chosen


class Follows:
    "A watcher that follows the folder, and ends the run after the second step."
    def __init__(self, trainer):
        self.told, self.phases, self.policy = [], [], trainer.policy

    def __call__(self, step):
        self.phases.append((step.phase, step.clock[0] + 1, len(step.prompts)))
        step.metrics["seen"] = float(len(self.phases))
        if step.phase == "update" and step.clock[0] == 1:
            raise StopRun("enough")

    def opened(self, run):
        self.told.append(run.folder.name)

    def logged(self, step):
        self.told.append(step.metrics["step"])

    def closed(self):
        self.told.append("closed")


def test_watchers_follow_and_may_end_a_run(small, tmp_path, monkeypatch):
    made = []
    monkeypatch.setitem(watchers.all(), "follows", WatcherSpec("follows", "", lambda trainer: made.append(Follows(trainer)) or made[-1]))
    run = job.train(replace(small, watch="follows"), tmp_path / "run")
    assert made[0].told == ["run", 1, 2, "closed"]
    assert made[0].phases == [("advantage", 1, 2), ("update", 1, 2), ("advantage", 2, 2), ("update", 2, 2)] and run.metrics["seen"].tolist() == [2, 4]
    assert run.read("stopped.json") == {"step": 2, "why": "enough"} and len(run.checkpoints()) == 1
    again = job.resume(run.folder)
    assert [r["step"] for r in again.rows()] == [1, 2, 3, 4] and made[1].told == ["run", 3, 4, "closed"] and not (run.folder / "stopped.json").exists()


def test_watchers_change_no_bit(small, tmp_path):
    plain = job.train(replace(small, steps=2), tmp_path / "plain")
    watched = job.train(replace(small, steps=2, watch="geometry,film"), tmp_path / "watched")
    a, b = last_weights(plain), last_weights(watched)
    assert all(torch.equal(a[n], b[n]) for n in a) and "states/rank" in watched.metrics and "states/drift" in watched.metrics
    assert (watched.metrics[[*plain.metrics]][timeless(plain).columns]).equals(timeless(plain))


# --- what can't be ---
@pytest.mark.parametrize("args, machine, says", [
    (("--engine", "trl,bf16"), {}, "bf16, FSDP and DeepSpeed are said to accelerate launch"),
    (("--engine", "trl,vllm"), {}, "vLLM draws replies on a GPU, and torch sees none here"),
    (("--engine", "trl", "--dtype", "bfloat16"), {}, "weights in bfloat16 round most of their updates away"),
    (("--engine", "trl"), {"ACCELERATE_USE_FSDP": "true"}, "spread a model over GPUs, and torch sees none here"),
    (("--engine", "trl"), {"ACCELERATE_MIXED_PRECISION": "fp16"}, "--mixed_precision fp16 was not tried"),
    (("--engine", "trl", "--watch", "lookin"), {}, "unknown watcher 'lookin'; did you mean looking"),
    (("--engine", "trl", "--watch", "looking", "--task", "text-sum"), {}, "the watcher looking compares replies with and without their picture"),
    (("--engine", "trl", "--select", "random"), {}, "random needs a budget"),
    (("--engine", "trl", "--recipe", "dlr", "--policy", "micro-verbose"), {}, "the slot rollout = Thoughts")])
def test_what_can_t_be_is_one_sentence_and_nothing_is_written(tmp_path, monkeypatch, args, machine, says):
    for name, value in machine.items():
        monkeypatch.setenv(name, value)
    code, text = said("train", *args, "--out", tmp_path / "run")
    assert code and says in text and "\n" not in text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("version, says", [(None, "the engine trl needs TRL: pip install 'rlworkbench[engines]'"), ("1.18.2", "tested with TRL 1.16 up to, not including, 1.17, and 1.18.2 is installed")])
def test_an_engine_that_is_not_the_tested_one(tmp_path, monkeypatch, version, says):
    from importlib import metadata

    def found(name, right=metadata.version):
        if name == "trl" and version is None:
            raise metadata.PackageNotFoundError(name)
        return version if name == "trl" else right(name)
    monkeypatch.setattr("importlib.metadata.version", found)
    code, text = said("train", "--engine", "trl", "--out", tmp_path / "run")
    assert code and says in text and not (tmp_path / "run").exists()


def test_weights_in_pieces(small, monkeypatch):
    from rlworkbench.engines.config import check_config
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    check_config(replace(small, watch="trackio"))
    with pytest.raises(ValueError, match="held-out problems can't be asked: --evaluate 0"):
        check_config(replace(small, evaluate=4))
    with pytest.raises(ValueError, match="geometry can't look at the policy; trackio reads the log and can"):
        check_config(replace(small, watch="geometry"))


def test_adapters_that_are_there_already(small, tmp_path):
    run = job.train(replace(small, steps=1, lora=2), tmp_path / "run")
    assert Run.open(run.folder).config.lora == 2
    with pytest.raises(ValueError, match="has adapters already"):
        engine_trainer(replace(small, policy=str(run.folder)), ALONE, str(tmp_path))
