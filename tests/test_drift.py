"""DRIFT and merging, where a lesson would be tedious: random numbers, bad input, the command line, an interrupted run."""
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlworkbench.cli.main import main
from rlworkbench.core.registry import policies, recipes
from rlworkbench.core.step import Step
from rlworkbench.policies.lora import add_lora
from rlworkbench.policies.merge import Direction, added, average, by_lot, difference, linear, merged, tower_prefix, tower_weights
from rlworkbench.recipes.disperse import few
from rlworkbench.recipes.drift import MODES, bent, drift, inject
from rlworkbench.recipes.followed import followed
from rlworkbench.recipes.recipe import Lesson, Term
from rlworkbench.recipes.sft import next_token, sft
from rlworkbench.tasks.digits import digits_sum
from rlworkbench.training.choices import load_policy
from rlworkbench.training.job import resume, train
from rlworkbench.training.run import Config, Run
from rlworkbench.training.trainer import Trainer
from tests.test_resume import assert_same

NUMBERS = st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=1, max_size=9)
AWAY = Direction("random-tiny", "tiny")


def lesson(**changes) -> Lesson:
    return drift.but(**{"name": "bent", "forward": followed(AWAY), "gradient": inject(AWAY), **changes})


def trainer(recipe, policy="tiny", **how) -> Trainer:
    return Trainer(load_policy(policy), digits_sum, recipe, prompts=4, watchers=(), **{"steps": 4, "lr": 1e-4, **how})


@settings(max_examples=80, deadline=None)
@given(NUMBERS, st.floats(0, 4), st.sampled_from(MODES))
def test_bending_is_linear_in_alpha_and_never_leads_away(numbers, alpha, mode):
    g, delta = torch.tensor(numbers, dtype=torch.float64).T
    none, some, twice = (bent(g, delta, a, mode) for a in (0., alpha, 2 * alpha))
    assert torch.equal(none, g)
    assert torch.allclose(twice - some, some - none, atol=1e-9)
    assert float(-((some - g) * delta).sum()) >= -1e-9
    assert some.isfinite().all()


@settings(max_examples=60, deadline=None)
@given(NUMBERS, st.floats(.01, 100))
def test_only_absolute_reads_the_length_of_the_direction(numbers, factor):
    g, delta = torch.tensor(numbers, dtype=torch.float64).T
    for mode in ("gradnorm", "adaptive_cosine"):
        if float(delta.norm()) > 1e-6:
            assert torch.allclose(bent(g, delta, 1., mode), bent(g, factor * delta, 1., mode), atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(NUMBERS, st.floats(0, 1))
def test_merges_agree_where_they_must(numbers, strength):
    a, b = torch.tensor(numbers, dtype=torch.float64).T
    a, b = {"layers.0.w": a}, {"layers.0.w": b}
    close = lambda x, y: torch.allclose(x["layers.0.w"], y["layers.0.w"], atol=1e-9)
    assert close(linear(a, b, strength), average([a, b], [1 - strength, strength]))
    assert close(linear(a, b, strength), linear(b, a, 1 - strength))
    assert close(added(a, difference(b, a), strength), linear(a, b, strength))


def test_the_step_goes_where_it_is_bent_and_further_with_alpha():
    """With plain gradients' cosine next to nothing, what is realised after AdamW grows with the strength."""
    cosines = []
    for alpha in (0., .5, 2.):
        t = trainer(lesson(gradient=inject(AWAY, alpha)))
        cosines.append([t.step().metrics["drift/step"] for _ in range(3)])
    assert all(abs(c) < .1 for c in cosines[0])
    assert all(a < b < c for a, b, c in zip(*cosines))
    assert min(cosines[2]) > .3


def test_alpha_zero_is_imitation():
    one, other = trainer(lesson(gradient=inject(AWAY, 0.))), trainer(sft)
    for t in (one, other):
        t.fit(2)
    assert all(torch.equal(a, b) for a, b in zip(one.policy.weights().values(), other.policy.weights().values()))


def test_micro_batches_change_nothing_but_rounding():
    whole, pieces = trainer(lesson()), trainer(lesson(), micro=3)
    a, b = whole.step().metrics, pieces.step().metrics
    assert a["drift/step"] == pytest.approx(b["drift/step"], abs=1e-3)
    assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_eyes_norms_and_embeddings_are_left_to_the_loss():
    seen = {}

    def spy(grads, step):
        seen["before"], seen["after"] = dict(grads["all"]), inject(AWAY)(grads, step)
        return seen["after"]
    t = trainer(lesson(gradient=spy))
    t.step()
    prefix = tower_prefix(t.policy)
    for n, g in seen["before"].items():
        matrix = n.startswith(prefix + "layers.") and n.endswith("_proj.weight")
        assert torch.equal(g, seen["after"][n]) != matrix, n


def test_the_control_is_drawn_by_the_runs_seed_and_is_as_long():
    grads = {"all": {n: torch.ones_like(d) for n, d in AWAY.tensors().items()}}
    one, again, other = (inject(AWAY, 1., "absolute", lot=True)(grads, Step(seed=s)) for s in (3, 3, 4))
    for n, d in AWAY.tensors().items():
        assert torch.equal(one[n], again[n]) and not torch.equal(one[n], other[n])
        assert float((one[n] - 1).norm()) == pytest.approx(float(d.norm()), rel=1e-4)
        assert float(by_lot(AWAY, 3)[n].norm()) == pytest.approx(float(d.norm()), rel=1e-4)


@pytest.mark.parametrize("toward,says", [
    (Direction("small-llava", "tiny"), r"tiny and small-llava are no checkpoints of one language model: embed_tokens.weight is \(138, 160\) in the one and \(104, 32\)"),
    (Direction("micro-none", "tiny"), "unknown policy 'micro-none'"),
    (Direction("table", "tiny"), "'table' is a table"),
    (Direction("tiny", "tiny"), "there is no direction from tiny to tiny"),
    (Direction("random-tiny", "tiny", only="wings"), "no weight that matches 'wings' differs"),
])
def test_experts_that_do_not_go_together_are_refused_before_the_first_step(toward, says):
    with pytest.raises(ValueError, match=says):
        trainer(lesson(forward=followed(toward)))


def test_experts_of_another_vocabulary(monkeypatch):
    load = policies.get("random-tiny").load

    def with_a_word_more():
        policy = load()
        policy.tokenizer.add_tokens(["seventeen"])
        return policy
    monkeypatch.setitem(policies.all(), "wordy", type(policies.get("tiny"))("wordy", with_a_word_more))
    with pytest.raises(ValueError, match="the token 'seventeen' is number None in the vocabulary of the one and .* of the other"):
        Direction("wordy", "tiny").tensors()


def test_a_policy_without_the_directions_weights():
    with pytest.raises(ValueError, match=r"does not fit the policy: \S+q_proj.weight is \(160, 160\) in the direction and \(32, 32\) in the policy"):
        trainer(lesson(), "small-llava").step()
    policy = add_lora(load_policy("tiny"), 2)
    with pytest.raises(ValueError, match="does not fit the policy: .* not among the weights that learn"):
        Trainer(policy, digits_sum, lesson(), prompts=2, watchers=()).step()
    with pytest.raises(ValueError, match="has adapters laid over it"):
        tower_weights(policy)


def test_a_prior_that_is_not_built_names_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="rlworkbench build tiny-rea(soner|der)$"):
        Direction("tiny-reasoner", "tiny-reader", only="nothing is cached").tensors()


def test_merging_keeps_everything_outside_the_tower():
    mixed, into = merged("linear", ["tiny", "random-tiny"], strength=1.), policies.get("tiny").load()
    prefix = tower_prefix(into)
    for n, w in into.weights().items():
        assert torch.equal(mixed.weights()[n], w) != n.startswith(prefix) or not w.std(), n


def command(*argv) -> tuple:
    said, before = StringIO(), sys.argv
    sys.argv = ["rlworkbench", *map(str, argv)]
    try:
        with redirect_stdout(said), redirect_stderr(said):
            main()
    except SystemExit as e:
        return e.code or 0, said.getvalue()
    finally:
        sys.argv = before
    return 0, said.getvalue()


def test_merged_policies_at_the_command_line():
    code, said = command("eval", "merge:linear,tiny,random-tiny,strength=0.05", "--n", 4, "--k", 2, "--json")
    assert code == 0 and 0 <= json.loads(said.splitlines()[-1])["sampled"] <= 1
    code, said = command("eval", "merge:task,tiny,random-tiny", "--n", 4)
    assert code == 2 and "needs parent=NAME" in said and len(said.strip().splitlines()) == 1


@pytest.fixture
def registered(monkeypatch):
    "The lesson under a name of its own, as a plug-in would add it."
    monkeypatch.setitem(recipes.all(), "bent", lesson(order=few(8)))


def test_it_trains_from_the_command_line(registered, tmp_path):
    code, said = command("train", "--recipe", "bent", "--steps", 2, "--prompts", 4, "--evaluate", 0, "--threads", 1, "--out", tmp_path / "run", "--json")
    assert code == 0, said
    rows = Run.open(tmp_path / "run").rows()
    assert [r["step"] for r in rows] == [1, 2] and all(r["drift/step"] > .2 and r["drift/length"] > 0 for r in rows)


def test_interrupted_and_taken_up_again_it_ends_in_the_same_bits(registered, tmp_path):
    config = dict(recipe="bent", prompts=4, evaluate=0, checkpoint=1, threads="1")
    train(Config(steps=3, **config), tmp_path / "whole")
    train(Config(steps=2, **config), tmp_path / "part")
    resume(tmp_path / "part", steps=3)
    assert_same(tmp_path / "whole", tmp_path / "part")


def test_a_step_given_up_halfway_leaves_nothing_that_a_checkpoint_could_not_hold(tmp_path):
    whole, broken = trainer(lesson()), trainer(lesson(), keep=2)
    phases = broken.phases()
    while next(phases).phase != "loss":
        pass
    phases.close()
    broken.step()
    whole.step()
    broken.step()
    assert broken.back(1) == "snapshot"
    assert broken.memory == {"followed": {}} == whole.memory
    assert all(torch.equal(a, b) for a, b in zip(whole.policy.weights().values(), broken.policy.weights().values()))


def test_terms_apart_and_together_are_bent_alike():
    two = lesson(terms=(Term("first", next_token, scale=.25), Term("second", next_token, scale=.75)))
    one, other = trainer(lesson()), trainer(two)
    for t in (one, other):
        t.step()
    moved = max(float((a - b).detach().abs().max()) for a, b in zip(one.policy.weights().values(), other.policy.weights().values()))
    assert moved < 1e-5
