"""Every probe: on a recorded run, on a live trainer, on nine families; it finds what it promised and leaves everything as it was."""
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from rlworkbench.core.config import Config
from rlworkbench.core.item import Item
from rlworkbench.core.registry import probes
from rlworkbench.core.trace import Trace
from rlworkbench.diagnostics.probe import Probe, scene_of, tokens_of
from rlworkbench.policies.families import FAMILIES, family
from rlworkbench.training.choices import new_trainer
from rlworkbench.training.job import train
from rlworkbench.training.run import Run
from tests.test_families import SEEING, drawn, noise

PROBES = probes.all()
READING_MODELS = [name for name, probe in PROBES.items() if probe.reads == "policy"]
every = pytest.mark.parametrize("name", PROBES)
LAW = Config(recipe="grpo", task="digits-sum", policy="tiny", steps=3, prompts=3, group=4, lr=1e-4, evaluate=0, record="full", checkpoint=2, keep=9, seed=3)


@pytest.fixture(scope="session")
def recorded(tmp_path_factory):
    "A short run of tiny, every step written down."
    return train(LAW, tmp_path_factory.mktemp("probes") / "run")


@pytest.fixture(scope="session")
def trainer():
    made = new_trainer(LAW)
    made.fit(1)
    return made


@pytest.fixture(scope="session")
def scenes():
    "Each family with a picture where it takes one, and replies to two problems."
    items = [Item("one", "What is the sum of the digits?", images=(noise(0),)), Item("two", "Which is largest?", images=(noise(2),))]
    made = {}
    for name in FAMILIES:
        policy = family(name)
        made[name] = policy, drawn(policy, items if name in SEEING else [replace(i, images=()) for i in items])
    return made


def state(policy) -> dict:
    "All that a probe might disturb."
    model, hooks = policy.model, 0
    for m in model.modules():
        hooks += sum(len(getattr(m, h)) for h in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"))
    return {"weights": {n: w.detach().clone() for n, w in policy.weights().items()}, "grads": [w.grad is None for w in policy.weights().values()],
            "learns": [w.requires_grad for w in policy.weights().values()], "modes": [m.training for m in model.modules()], "hooks": hooks,
            "torch": torch.get_rng_state(), "numpy": np.random.get_state()[1].copy(), "cache": model.config.use_cache if hasattr(model.config, "use_cache") else None,
            "attention": model.config._attn_implementation}


def same(a: dict, b: dict):
    assert all(torch.equal(a["weights"][n], w) for n, w in b["weights"].items()), "a probe changed the weights"
    for what in ("grads", "learns", "modes", "hooks", "cache", "attention"):
        assert a[what] == b[what], f"a probe changed {what}"
    assert torch.equal(a["torch"], b["torch"]) and np.array_equal(a["numpy"], b["numpy"]), "a probe used up a random stream"


def whole(finding):
    "A finding is one: what was promised is there, numbers are numbers, and it can be drawn."
    assert len(finding.table) and set(finding.probe.columns) <= set(finding.table.columns)
    numbers = finding.table[[*finding.probe.columns]].select_dtypes("number")
    assert not np.isinf(numbers.to_numpy(dtype=float)).any()
    assert numbers.empty or numbers.notna().to_numpy().any()
    page = finding._repr_html_()
    assert "<" in page and len(page) > 200 and finding.probe.caption[:20].split("<")[0] in page


def ask(probe, subject):
    "A finding, or a refusal in one sentence."
    try:
        whole(probe(subject))
    except ValueError as refusal:
        said = str(refusal)
        assert 20 < len(said) < 300 and "\n" not in said, said
        return said
    return ""


@every
def test_it_says_what_has_to_be_known(name):
    probe = PROBES[name]
    assert probe.doc.endswith("?") and probe.caption.endswith(".") and probe.cost and probe.columns
    assert name == name.lower() and " " not in name
    assert all(isinstance(k, str) and len(v) > 2 for k, v in probe.columns.items())


@every
def test_it_reads_a_recorded_run(name, recorded):
    files = {f: f.stat().st_mtime_ns for f in recorded.folder.rglob("*")}
    whole(PROBES[name](recorded))
    assert {f: f.stat().st_mtime_ns for f in recorded.folder.rglob("*")} == files, "a probe wrote into the run"


@every
def test_it_reads_a_live_trainer_and_leaves_it_as_it_was(name, trainer):
    probe, policy = PROBES[name], trainer.policy
    before, at = state(policy), (trainer.done, trainer.drawn)
    if probe.reads == "log":
        twin = new_trainer(LAW)
        whole(probe(twin.fit(3)))
    else:
        policy.train(True)
        before["modes"] = [m.training for m in policy.model.modules()]
        whole(probe(trainer))
    same(before, state(policy))
    assert at == (trainer.done, trainer.drawn)
    policy.train(False)


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("name", READING_MODELS)
def test_it_reads_every_family(name, kind, scenes):
    policy, step = scenes[kind]
    before = state(policy)
    refused = ask(PROBES[name], (policy, step))
    same(before, state(policy))
    if refused and kind in SEEING:
        assert kind.split("-")[0] in refused.lower() or policy.name in refused, f"a family with pictures was refused without being named: {refused}"


@pytest.mark.parametrize("name", [n for n, p in PROBES.items() if p.reads == "tokens"])
def test_it_reads_a_trace(name):
    traces = [Trace(f"t{k}", prompt="2+3", pieces=["<think>", "2", "+3", "</think>", "<answer>", "5", "</answer>", ""], ids=[5, 6, 7, 8, 9, 10, 11, 0], correct=float(k % 2),
                    columns={c: [.1 * (k + 1)] * 8 for c in ("entropy", "old", "logp", "collision", "advantage", "weight", "coef", "ratio", "clipped", "reward", "ref", "kl")})
              for k in range(4)]
    ask(PROBES[name], traces)
    assert ask(PROBES[name], [replace(traces[0], pieces=["<b>", ""], ids=[1, 0], columns={c: v[:2] for c, v in traces[0].columns.items()}, segment=None, origin=None, text=None)]) is not None


# --- bad input ---
def test_what_is_not_there_is_said_in_one_sentence(tmp_path, recorded):
    empty = Run.create(tmp_path / "empty", LAW)
    for name, probe in PROBES.items():
        assert "yet" in ask(probe, empty), name
    for name in READING_MODELS:
        assert ask(PROBES[name], "runs/mine"), name
    with pytest.raises(ValueError, match="no recorded step 77"):
        tokens_of(recorded, steps=[77])


def test_a_missing_column_names_what_records_it(recorded):
    tokens = tokens_of(recorded)
    for name, probe in PROBES.items():
        if probe.reads == "tokens":
            for need in probe.needs:
                with pytest.raises(ValueError, match=f"no column '{need}', which this probe reads; it is recorded by"):
                    probe(tokens.drop(columns=need))


def test_a_probe_that_fails_still_puts_everything_back(trainer):
    def measure(scene):
        scene.policy.train(True)
        torch.rand(3)
        next(iter(scene.policy.weights().values())).sum().backward()
        raise ValueError("gave up in the middle of it")
    before = state(trainer.policy)
    probe = Probe("broken", "does it break?", "policy", measure, None, {"a": "number"}, "Nothing.")
    with pytest.raises(ValueError, match="gave up"):
        probe(trainer)
    same(before, state(trainer.policy))


def test_a_scene_of_a_run_has_the_replies_that_were_recorded(recorded):
    scene, table = scene_of(recorded, 2), recorded.tokens(2)
    for i, (_, rows) in enumerate(table.groupby("reply")):
        assert scene.step.ids[i, :int(scene.step.length[i])].tolist() == rows["token"].tolist()
        assert scene.step.items[int(scene.step.group[i])].id == rows["item"].iloc[0]
    assert all(i.images for i in scene.step.items)
    scored = pd.Series(scene.step.correct.tolist())
    assert scored.tolist() == table.groupby("reply")["correct"].first().tolist()
