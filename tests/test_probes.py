"""Every probe: on a recorded run, on a live trainer, on nine families; it finds what it promised and leaves everything as it was."""
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from rlworkbench.core.config import Config
from rlworkbench.core.item import Item
from rlworkbench.core.options import options_of
from rlworkbench.core.registry import probes
from rlworkbench.core.trace import Trace
from rlworkbench.diagnostics.probe import Probe, scene_of, tokens_of
from rlworkbench.policies.families import FAMILIES, family
from rlworkbench.training.choices import load_policy, new_trainer
from rlworkbench.training.job import resume, train
from rlworkbench.training.run import Run
from tests.test_families import SEEING, drawn, noise

PROBES = {name: p for name, p in probes.all().items() if not {"latent", "prior", "posterior", "latent/path"} & {*p.needs}}   # the latent ones: tests/test_latent
READING_MODELS = [name for name, probe in PROBES.items() if probe.reads == "policy"]
every = pytest.mark.parametrize("name", PROBES)
LAW = Config(recipe="grpo", task="digits-sum", policy="tiny", steps=3, prompts=3, group=4, lr=1e-4, evaluate=0, record="full", checkpoint=2, keep=9, seed=3, watch="looking,geometry,battery:n=4")


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
    refusals = {"": "", "a task that judges replies": "no task judges", "a picture": "" if kind in SEEING else "none of these problems has a picture"}
    expected = refusals[PROBES[name].wants]
    assert refused.startswith(expected) and bool(refused) == bool(expected), refused


@pytest.mark.parametrize("name", [n for n, p in PROBES.items() if p.reads == "tokens"])
def test_it_reads_a_trace(name):
    traces = [Trace(f"t{k}", prompt="2+3", pieces=["<think>", "2", "+3", "</think>", "<answer>", "5", "</answer>", ""], ids=[5, 6, 7, 8, 9, 10, 11, 0], correct=float(k % 2),
                    columns={c: [.1 * (k + 1)] * 8 for c in ("entropy", "old", "logp", "collision", "advantage", "weight", "coef", "ratio", "clipped", "reward", "ref", "kl")})
              for k in range(4)]
    assert not ask(PROBES[name], traces)
    short = ask(PROBES[name], [replace(traces[0], pieces=["<b>", ""], ids=[1, 0], columns={c: v[:2] for c, v in traces[0].columns.items()}, segment=None, origin=None, text=None)])
    assert bool(short) == (name == "uncertainty"), short      # one reply alone is not right and wrong


# --- bad input ---

@pytest.mark.parametrize("name", READING_MODELS)
def test_finite_weights_that_make_infinite_states_are_refused(name, scenes):
    broken, step = family("llama"), scenes["llama"][1]
    with torch.no_grad():
        [w for n, w in broken.weights().items() if n.endswith("norm.weight")][-1].fill_(3e38)
    with pytest.raises(ValueError, match="not finite"):
        PROBES[name]((broken, step))


def test_what_is_not_there_is_said_in_one_sentence(tmp_path, recorded):
    empty = Run.create(tmp_path / "empty", LAW)
    for name, probe in PROBES.items():
        assert "yet" in ask(probe, empty), name
    for name in READING_MODELS:
        assert ask(PROBES[name], "runs/mine"), name
    with pytest.raises(ValueError, match="no recorded step 77"):
        tokens_of(recorded, steps=[77])


@every
def test_an_option_that_does_not_fit_is_one_sentence_with_the_options(name, recorded):
    probe = PROBES[name]
    options = options_of(probe.measure)
    takes = [n for n, p in options.items() if p.kind is not p.VAR_KEYWORD]
    said = ask_with(probe, recorded, no_such_option=3)
    assert "no_such_option" in said and all(n in said for n in takes)
    for option, known in options.items():
        wrong = {int: "many", float: "much", str: 3, bool: "perhaps", list: [object()], dict: 3}.get(known.annotation)
        if wrong is not None:
            said = ask_with(probe, recorded, **{option: wrong})
            assert option in said or known.annotation is list
        if known.annotation is int and isinstance(known.default, int) and known.default > 0:
            assert f"{option} must be a whole number, 1 or more" in ask_with(probe, recorded, **{option: 0})


def ask_with(probe, subject, **options) -> str:
    "The refusal; it has to be one."
    with pytest.raises(ValueError) as refused:
        probe(subject, **options)
    said = str(refused.value)
    assert 20 < len(said) < 500 and "\n" not in said, said
    return said


FAR = {"logit-lens": {"depths": 99}, "latent-lens": {"depths": [99]}, "eigenscore": {"depth": 99}, "sensitivity": {"depth": 99}, "thinking-path": {"depth": 99}, "attribution": {"reply": 999},
       "sources": {"reply": 999}, "occlusion": {"token": 999}, "token-gradients": {"reply": 999}, "influence": {"places": [(0, 999)]}, "looking": {"ways": "away"}, "faithfulness": {"methods": ["guess"]},
       "forks": {"share": 7.0}, "layer-gradients": {"segment": "tail"}, "trial-update": {"how": "luck"}, "entropy-bands": {"quantiles": 9}}


@pytest.mark.parametrize("name", FAR)
def test_a_value_out_of_range_is_one_sentence(name, recorded):
    ask_with(PROBES[name], recorded, **FAR[name])


def test_a_single_value_stands_for_a_list(recorded):
    assert set(PROBES["logit-lens"](recorded, depths=1).table["depth"]) == {1}
    assert set(PROBES["looking"](recorded, ways="blur").table["way"]) == {"blur"}


def test_a_fault_of_the_probes_own_is_not_the_users(trainer):
    broken = Probe("broken", "does it break?", "policy", lambda scene, n=1: [][n], None, {"a": "number"}, "Nothing.")
    with pytest.raises(IndexError):
        broken(trainer)
    with pytest.raises(ValueError, match="broken can't be asked with n=2: list index out of range"):
        broken(trainer, n=2)


@pytest.fixture(scope="session")
def of_words(tmp_path_factory):
    "A run without any picture."
    return train(replace(LAW, task="text-sum", watch=None), tmp_path_factory.mktemp("probes") / "words")


PICTURED = {"occlusion": {"grid": (4, 4)}, "attribution": {"baseline": "picture"}, "looking": {}, "visual-gain": {}, "latent-lens": {}}


@pytest.mark.parametrize("name", PICTURED)
def test_where_there_is_no_picture_it_says_so(name, of_words):
    assert "picture" in ask_with(PROBES[name], of_words, **PICTURED[name])
    policy = scene_of(of_words).policy
    ids = [*policy.tokens("5"), policy.eos]
    trace = Trace("words", prompt="2+3=", pieces=[policy.piece(t) for t in ids], ids=ids)
    assert "picture" in ask_with(PROBES[name], (policy, trace), **PICTURED[name])


@pytest.mark.parametrize("name", ["occlusion", "attribution"])
def test_words_alone_can_be_asked_about(name, of_words):
    table = PROBES[name](of_words).table
    assert len(table) and (table["picture"] < 0).all()


# --- watchers ---
def test_watchers_write_into_the_log_and_change_nothing(recorded, tmp_path):
    config = replace(LAW, steps=7, record="small", watch="looking, geometry", checkpoint=3, keep=0)
    plain, watched = train(replace(config, watch=None), tmp_path / "plain"), train(config, tmp_path / "watched")
    mine = [c for c in watched.metrics if c.startswith(("looking/", "states/"))]
    assert {"looking/gain", "looking/prior", "states/drift", "states/rank"} <= set(mine)
    assert watched.metrics[mine].notna().all(axis=1).tolist() == [True, False, False, False, False, True, False]
    same_log = lambda a, b, drop=(): a.drop(columns=[c for c in a if c.startswith(("time/", "cpu/")) or c in drop]).equals(b.drop(columns=[c for c in b if c.startswith(("time/", "cpu/")) or c in drop]))
    assert same_log(plain.metrics, watched.metrics, mine)
    weights = lambda run: load_policy(str(run.folder)).weights()
    assert all(torch.equal(w, weights(plain)[n]) for n, w in weights(watched).items())
    for late in ("000006", "000007"):
        shutil.rmtree(watched.folder / "checkpoints" / late)
    whole = watched.metrics
    assert same_log(whole, resume(watched.folder).metrics), "a resumed run goes on recording, against the same first frame"


@pytest.mark.parametrize("watch, says", [("lookin", "did you mean looking"), ("nothing at all", "known: battery, battery:, film, geometry, latents, looking, trackio")])
def test_an_unknown_watcher_is_refused_before_anything_is_written(watch, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        train(replace(LAW, watch=watch), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="have none"):
        train(replace(LAW, task="text-sum", watch="looking"), tmp_path / "run")
    with pytest.raises(ValueError, match="is a lesson and draws none"):
        train(replace(LAW, recipe="sft", watch="film"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


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
