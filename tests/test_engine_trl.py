"""Recipes inside TRL's trainer against the workbench's own loop: same replies, same advantages, weights, coefficients, loss, gradient. The measured table is committed."""
import json
import socket
from dataclasses import dataclass

import pytest
import torch
from typer.testing import CliRunner

from rlworkbench.cli.main import app
from rlworkbench.core.config import Config
from rlworkbench.core.registry import recipes, tasks
from rlworkbench.core.step import Step
from rlworkbench.engines import job, pieces
from rlworkbench.engines.fit import refusals
from rlworkbench.recipes.recipe import Recipe
from rlworkbench.recipes.rif import solvable
from rlworkbench.recipes.slots import Spec
from rlworkbench.rollouts.parts import from_function
from rlworkbench.training.choices import load_policy, new_trainer
from rlworkbench.training.run import Run
from tests import trl_side
from tests.trl_side import G, P, in_float32, in_float64, runnable

DIGITS = tasks.get("digits-sum")
RUNS = runnable(DIGITS)
BARS = {"float64": 1e-10, "float32": 1e-5}
TWICE = ("grpo", "apo_viewr1", "cispo", "gspo", "kl_cov", "rif", "route_diversity", "trust_grpo")   # ratios and divergences end to end, too; all of them are in the committed table
AWAY = "updates with ratios away from 1"


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    "A trainer on TRL, a rollout of the workbench's own, and what the policy was."
    policy = trl_side.unbanned("tiny")
    step = trl_side.mixed(policy, DIGITS, trl_side.rollout(policy, DIGITS, recipes.get("grpo")))
    return trl_side.build(tmp_path_factory.mktemp("trl"), policy, DIGITS, recipes.get("apo_viewr1")), step, policy.copy()


def within(found: dict, bar: float):
    return all(v <= bar for k, v in found.items() if not k.startswith("updates")) and found["updates with a gradient"] > 0


@pytest.mark.parametrize("name", RUNS)
def test_the_same_numbers_as_the_own_loop(both, name):
    trainer, step, reference = both
    recipe, _ = RUNS[name]
    assert within(in_float64(trainer, recipe, step), BARS["float64"])
    found = in_float32(trainer, recipe, step, reference, 1 + (name in TWICE))
    assert within(found, BARS["float32"]) and (found[AWAY] > 0) == (name in TWICE)


def test_the_replies_leave_something_to_compare(both):
    """Something right and something wrong in each group, and a mistake that is longer than what is right."""
    _, step, _ = both
    right = torch.tensor([DIGITS.score(step.items[g], text)["correct"] > 0 for g, text in zip(step.group.tolist(), step.text)])
    groups = [(step.length[(step.group == g) & right].double(), step.length[(step.group == g) & ~right].double()) for g in range(P)]
    assert all(len(a) and len(b) for a, b in groups) and any(b.max() > a.mean() for a, b in groups)


def test_a_wrong_factor_would_be_seen(both, monkeypatch):
    trainer, step, reference = both
    right = pieces.piece_loss
    monkeypatch.setattr("rlworkbench.engines.trl.piece_loss", lambda *a: 1.001 * right(*a))
    assert not within(in_float64(trainer, recipes.get("grpo"), step), BARS["float64"])
    assert not within(in_float32(trainer, recipes.get("grpo"), step, reference, 1), BARS["float32"])


def test_torn_groups_would_be_seen(both, monkeypatch):
    """kl_cov has two minibatches; TRL's own shuffle would tear the groups apart."""
    trainer, step, _ = both
    monkeypatch.setattr(pieces, "minibatches", lambda s, n, stream: iter(torch.arange(len(s)).reshape(-1, n).T))
    assert not within(in_float64(trainer, recipes.get("kl_cov"), step), BARS["float64"])


def test_every_recipe_is_in_the_committed_table_or_refused():
    table = json.loads(trl_side.TABLE.read_text())["recipes"]
    assert all(within(row[kind], bar) and row[kind][AWAY] > 0 for row in table.values() for kind, bar in BARS.items())
    named = {n for n, r in recipes.all().items() if isinstance(r, Recipe) and (not refusals(r, task=DIGITS) or getattr(r.keep, "refill", 0))}
    assert set(table) == named


# --- through TRL's own loop ---
def test_through_trl_s_own_training_loop(tmp_path):
    """Two pieces, accumulated by TRL; what reaches its optimiser is the gradient of the workbench's trainer."""
    from transformers import TrainerCallback
    mine = new_trainer(Config(policy="tiny", prompts=P, group=G, steps=1))
    mine.policy.banned = ()
    for step in mine.phases():
        if step.phase == "gradient":
            wanted = {n: g.clone() for n, g in step.grads["all"].items()}
            break
    policy = trl_side.unbanned("tiny")
    trainer = trl_side.build(tmp_path, policy, DIGITS, recipes.get("grpo"))
    rows = trl_side.dictate(trainer, step)
    assert [r["item"] for r in rows[::G]] == [DIGITS.items("train").index(i) if isinstance(DIGITS.items("train"), list) else r["item"] for i, r in zip(step.items, rows[::G])]
    found = {}

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, *args, **named):
            found.update({n: p.grad.clone() for n, p in policy.parameters().items() if p.grad is not None})
    trainer.add_callback(Keep())
    trainer.train()
    largest = max(float(g.abs().max()) for g in wanted.values())
    assert set(found) == set(wanted) and max(float((found[n] - g).abs().max()) for n, g in wanted.items()) < 1e-5 * largest
    assert [i.id for i in trainer.now.items] == [i.id for i in step.items]
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(sum(step.terms.values())), abs=1e-7)
    assert list(trainer._logs["advantages"]) == pytest.approx(step.advantage.tolist(), abs=1e-6)


def test_the_order_is_the_recipe_s(both):
    """The problems of the first rollouts are those that the workbench's own trainer asks."""
    trainer, *_ = both
    mine = new_trainer(Config(policy="tiny", prompts=P, group=G, steps=3))
    trl_side.use(trainer, recipes.get("grpo"))
    sampler = trainer._get_train_sampler()
    for k in range(3):
        wanted = mine.recipe.order(mine.pool, Step(seed=0, drawn=k * P, size=(P, G)))
        assert sampler.problems(k) == wanted
    rows = list(sampler)[:P * G]
    assert rows == [i for i in sampler.problems(0) for _ in range(G)] and len(list(sampler)) == len(sampler)


def test_an_order_that_is_prepared(tmp_path):
    policy = trl_side.unbanned("tiny")
    trainer = trl_side.build(tmp_path, policy, DIGITS, recipes.get("grpo").but(name="few", order=solvable(samples=2, problems=6, least=1, most=2)))
    stay = trainer.memory["solvable"]["order"].tolist()
    assert 0 < len(stay) <= 6 and set(trainer._get_train_sampler().problems(0)) <= set(stay)


def test_the_ratio_of_another_sampler_weighs_the_policy_term(both, monkeypatch):
    """What vLLM drew comes with `importance_sampling_ratio`; half of it, half the gradient."""
    import trl
    trainer, step, reference = both
    right = trl.GRPOTrainer._generate_and_score_completions
    whole = in_float32(trainer, recipes.get("grpo"), step, reference, 1)
    monkeypatch.setattr(trl.GRPOTrainer, "_generate_and_score_completions", lambda self, inputs: (out := right(self, inputs)) | {"importance_sampling_ratio": torch.full((len(out["advantages"]), 1), .5)})
    half = in_float32(trainer, recipes.get("grpo"), step, reference, 1)
    assert whole["gradient"] < 1e-5 and half["gradient"] == pytest.approx(.5, abs=1e-4) and half["weight"] == pytest.approx(.5)


# --- memory ---
@dataclass(frozen=True, repr=False)
class Slow(Spec):
    "A baseline that remembers: a moving average of the mean reward."
    share: float = .5

    def init(self):
        return {"mean": torch.zeros(()), "seen": 0}

    def __call__(self, step):
        return step.reward - step.memory["Slow"]["mean"].to(step.reward)

    def after(self, step, grads=None):
        held = step.memory["Slow"]
        return {"mean": held["mean"].lerp(step.reward.mean().float().cpu(), self.share), "seen": held["seen"] + 1}


def test_memory_survives_trl_s_checkpoints(tmp_path):
    recipe = recipes.get("grpo").but(name="slow", advantage=Slow(), rewards=(from_function(lambda item, text: len(text) % 3, "thirds"),))
    step = trl_side.rollout(load_policy("small-llava"), DIGITS, recipe)

    def trainer():
        made = trl_side.build(tmp_path, trl_side.unbanned("small-llava"), DIGITS, recipe, max_steps=2, save_strategy="steps", save_steps=1)
        trl_side.dictate(made, step)
        return made
    whole = trainer()
    whole.train()
    first = tmp_path / "checkpoint-1"
    assert {"recipe.json", "recipe.safetensors"} <= {f.name for f in first.iterdir()}
    again = trainer()
    again.train(resume_from_checkpoint=str(first))
    assert again.memory["Slow"]["seen"] == whole.memory["Slow"]["seen"] == 2
    assert again.memory["Slow"]["mean"] == whole.memory["Slow"]["mean"] != 0
    (first / "recipe.json").unlink()
    with pytest.raises(ValueError, match="it has no recipe.json"):
        trainer().train(resume_from_checkpoint=str(first))


# --- the command line ---
def said(*args):
    done = CliRunner().invoke(app, [*map(str, args)])
    return done.exit_code, str(done.exception) if done.exception else done.output


def test_a_run_opens_everywhere_and_goes_on(tmp_path):
    folder = tmp_path / "run"
    config = Config(policy="tiny", steps=3, prompts=2, group=4, evaluate=4, checkpoint=1, record="full", threads="1")
    run = job.train(config, folder)
    assert [r["step"] for r in run.rows()] == run.steps() == [1, 2, 3]
    assert {"reward", "entropy", "loss", "grad_norm", "ratio/first", "kl/old", "groups/all_right", "completions/mean_length"} <= set(run.rows()[0])
    tokens = run.tokens(2)
    assert {"advantage", "old", "logp", "ratio", "weight", "coef", "surrogate", "entropy", "segment", "rewards/correct"} <= set(tokens)
    assert (folder / "images").is_dir() and any((folder / "images").iterdir()) and run.read("result.json")["after"]["n"] == 4
    assert not list((folder / "checkpoints").rglob("*.bin"))
    assert said("report", folder)[0] == 0
    assert said("probe", "entropy-by-step", folder)[0] == 0
    code, text = said("resume", folder, "--steps", 4)
    assert code == 0 and len(Run.open(folder).rows()) == 4
    assert said("resume", folder, "--steps", 4)[1].endswith("--steps N beyond that goes on")


@pytest.mark.parametrize("args, says", [
    (("--engine", "verl"), "unknown engine 'verl'; there are own and trl"),
    (("--engine", "trl", "--recipe", "dapo"), "the slot keep = mixed_groups(9) asks for a refill"),
    (("--engine", "trl", "--recipe", "sft"), "needs 'demos'"),
    (("--engine", "trl", "--policy", "table", "--task", "bandit"), "is no Hugging Face model"),
    (("--engine", "trl", "--prompts", 3, "--micro", 7), "--micro 7 does not divide"),
    (("--engine", "trl", "--dry-run"), "--dry-run estimates the workbench's own loop")])
def test_what_can_t_be_is_one_sentence_and_nothing_is_written(tmp_path, args, says):
    code, text = said("train", *args, "--out", tmp_path / "run")
    assert code and says in text and "\n" not in text
    assert not (tmp_path / "run").exists()


def test_a_port_in_use_is_one_sentence(monkeypatch):
    """The first of two processes, as accelerate starts it, and somebody else who listens."""
    monkeypatch.setattr("accelerate.PartialState._shared_state", {})
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match=f"port {port} is in use by another program; choose a free one: accelerate launch --main_process_port N"):
            job.processes()


def test_one_process_where_two_were_asked_for(monkeypatch):
    """`accelerate launch --cpu` starts one process, whatever number it is given."""
    for name, value in {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ValueError, match="accelerate launch --cpu starts one process"):
        job.processes()
