"""The latent lab: what it draws is what was recorded, endpoints of two visitors, and a real browser that scrubs, walks an axis and sees the answer change."""
import json
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from rlworkbench.cli.main import app
from rlworkbench.core.registry import tasks
from rlworkbench.serving.filmed import LATENT, MOMENTS, build_recorded_latent, recorded, shipped_moments, shipped_policy
from rlworkbench.serving.frame import served
from rlworkbench.serving.lab import Lab, LabView, lab_view, live, screen
from rlworkbench.serving.moments import SIDES, read, write
from rlworkbench.serving.places import Places
from rlworkbench.serving.space import clouds_svg, panel, plane
from rlworkbench.serving.thinker import Thinker, Thought, another, answer, latent, walk
from rlworkbench.training.job import train
from rlworkbench.training.run import Config

SMALL = dict(task="digits-sum-silent", policy="random-tiny", prompts=2, steps=2, lr=1e-3, evaluate=0, checkpoint=1, keep=3, threads="1")


def latent_runs(folder: Path) -> Places:
    "amvl: two checkpoints of a latent run; sft: a run without latents."
    train(Config(recipe="amvl", **SMALL), folder / "amvl")
    train(Config(recipe="sft", **SMALL), folder / "sft")
    return Places(folder)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return latent_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def thinker():
    run = recorded()
    return Thinker(shipped_policy(), tasks.get(run.task), run.problems())


# ---- what is recorded

def marks(page: str) -> dict:
    "{mark: (x, y)} of a picture of clouds."
    return {m[0]: (float(m[1]), float(m[2])) for m in re.findall(r'data-move="(\w+)" data-x="([\d.]+)" data-y="([\d.]+)"', page)}


def test_the_shipped_run_is_small_and_names_no_machine():
    size = {f.name: f.stat().st_size for f in shipped_moments().iterdir()}
    assert sum(size.values()) - size["weights.safetensors"] < 400_000 and size["weights.safetensors"] < 300_000
    text = (shipped_moments() / "moments.json").read_text() + (shipped_moments() / "making.json").read_text()
    assert all(word not in text for word in ("/home", "/root", "/tmp", "runs/"))


def test_marks_lie_where_the_means_are_projected_to():
    run = recorded()
    flat = plane(run)
    for at in (0, 5, 11):
        seen = marks(clouds_svg(run, at))
        drawn = torch.tensor([seen[f"{side}{k}"] for side in SIDES for k in range(len(run.items))], dtype=torch.double)
        mean = torch.cat([flat.at[side][at] for side in SIDES])
        for axis, sign in ((0, 1), (1, -1)):       # pixels grow downwards
            x, y = drawn[:, axis] - drawn[:, axis].mean(), sign * (mean[:, axis] - mean[:, axis].mean())
            assert float((x * y).sum() / (x.norm() * y.norm())) > .9999


def test_one_plane_serves_all_moments():
    "A problem that stands still in the space stands still on the page, whatever the others do."
    run = recorded()
    laws = {side: tuple(x.clone() for x in law) for side, law in run.laws.items()}
    for law in laws.values():
        law[0][:, 7] = law[0][3, 7].clone()
    still = replace(run, laws=laws)
    first, last = (marks(clouds_svg(still, at)) for at in (0, 11))
    assert first["prior7"] == last["prior7"] and first["posterior7"] == last["posterior7"] and first["prior8"] != last["prior8"]


def test_the_panel_asks_every_question_of_the_wing_but_that_of_the_page():
    from rlworkbench.core.registry import probes
    of_wing = {p.doc for n, p in probes.all().items() if {"latent", "prior", "posterior"} <= {*p.needs} and n != "latent-clouds"}
    asked = {q[:1].lower() + q[1:] for q in re.findall("<h3>(.*?)</h3>", panel(recorded(), 5))}
    assert asked == of_wing


def test_a_moment_is_on_screen_in_time():
    lab, worst = Lab(Places("/nowhere")), 0
    screen(lab, LabView())
    for step in recorded().steps:
        began = time.perf_counter()
        assert screen(lab, LabView(step=step, problem=step % 80)).clouds
        worst = max(worst, time.perf_counter() - began)
    assert worst < .2


# ---- what is wrong

def test_a_run_without_latents_is_one_sentence_and_the_shipped_run(places):
    seen = screen(Lab(places), LabView(run="sft"))
    assert "has no latents: it was trained by sft; rlworkbench train --recipe amvl makes a run that has." in seen.note
    assert seen.view.run == LATENT and seen.clouds and len(seen.steps) == MOMENTS


@pytest.mark.parametrize("name", ["..", "%2e%2e", "/etc", "a\0", "x" * 999, "<script>alert(1)</script>"])
def test_a_name_that_is_no_run_is_a_sentence(places, name):
    seen = screen(Lab(places), lab_view({"run": name}) if name.isprintable() and len(name) < 300 else LabView(run=name))
    assert seen.note.count("rlw-error") == 1 and "<script" not in seen.note and str(places.runs) not in seen.note and seen.clouds


def test_a_run_of_ones_own(places):
    lab = Lab(places)
    assert lab.names() == [LATENT, "amvl"]
    before = screen(lab, LabView(run="amvl"))
    assert before.wait and not before.clouds and "are being asked" in before.note
    looked = []
    seen = screen(lab, LabView(run="amvl"), lambda k, of: looked.append((k, of)))
    assert seen.steps == (1, 2) and looked == [(0, 2), (1, 2)] and not seen.note
    assert not screen(lab, LabView(run="amvl", step=1)).wait
    found = live(lab, LabView(run="amvl", slot=3, at=2.0), "me")
    assert found.answer and not found.wrong


def test_another_k_or_width_is_the_sentence_of_saving(places, tmp_path):
    folder = places.runs / "mixed"
    train(Config(recipe="amvl", **SMALL), folder)
    kept = json.loads((folder / "checkpoints/000001/latent.json").read_text())
    (folder / "checkpoints/000001/latent.json").write_text(json.dumps(kept | {"width": 9}))
    seen = screen(Lab(places), LabView(run="mixed"), lambda k, of: None)
    assert "does not fit" in seen.note and str(places.runs) not in seen.note and seen.view.run == LATENT
    from rlworkbench.serving.filmed import policy_of
    with pytest.raises(ValueError, match="has slots 4, and 3 was asked for; they can't be changed after training"):
        policy_of(places, "amvl", {"slots": 3, "width": 16})


def test_latents_that_are_no_numbers_name_step_slot_and_problem(tmp_path, thinker):
    run = recorded()
    laws = {side: tuple(x.clone() for x in law) for side, law in run.laws.items()}
    laws["prior"][1][4, 2, 1, 0] = float("inf")
    write(replace(run, laws=laws), tmp_path)
    with pytest.raises(ValueError, match=f"step {run.steps[4]}: latent slot 1 of item {re.escape(run.items[2])} is inf"):
        read(tmp_path, "mine")
    broken = Thinker(thinker.policy, thinker.task, thinker.items)
    broken.step.prior[0][3, 2, 1] = float("nan")
    with pytest.raises(ValueError, match="latent slot 2 of item"):
        answer(broken, Thought(3))


# ---- thinking by hand

def test_a_thought_is_what_the_policy_thinks_itself(thinker):
    "Unmoved, the answer is that of the policy as it answers anybody."
    from rlworkbench.rollouts.sampling import Sampling
    from rlworkbench.training.evaluate import answers
    plain = answers(thinker.policy, thinker.items[:12], Sampling(0.0, thinker.task.max_tokens))[0].text
    assert [answer(thinker, Thought(k)).text for k in range(12)] == plain


def test_walking_an_axis_moves_answers(thinker):
    moved = 0
    for k in range(6):
        places, curves = walk(thinker, Thought(k))
        assert all(0 <= p <= 1 for c in curves.values() for p in c) and max(sum(c[i] for c in curves.values()) for i in range(len(places))) < 1 + 1e-4
        moved += max(max(c) - min(c) for c in curves.values()) > .2
    assert moved >= 2


def test_another_problems_thought_is_the_mean_of_its_prior(thinker):
    for k in (0, 7, 79):
        other = another(thinker, k)
        assert thinker.items[other].answer != thinker.items[k].answer
        assert torch.equal(latent(thinker, Thought(k, "another problem"))[0], thinker.step.prior[0][other])
        assert torch.equal(latent(thinker, Thought(k, "posterior"))[0], thinker.step.posterior[0][k])


def test_thoughts_are_listened_to(thinker):
    "Another problem's thought makes that problem's answer likelier and the own answer less so, the own posterior the own answer likelier: each by two standard errors of its mean over 40 problems."
    gained = {"theirs": [], "own": [], "after": []}
    for k in range(40):
        own, found, after = thinker.items[k].answer, answer(thinker, Thought(k, "another problem")), answer(thinker, Thought(k, "posterior"))
        theirs = thinker.items[found.other].answer
        for name, (seen, which) in {"theirs": (found, theirs), "own": (found, own), "after": (after, own)}.items():
            gained[name].append(seen.likely[which] - seen.before[which])
    mean, off = ({n: f(torch.tensor(v)).item() for n, v in gained.items()} for f in (torch.mean, lambda x: x.std() / len(x) ** .5))
    assert mean["theirs"] > 2 * off["theirs"] and mean["own"] < -2 * off["own"] and mean["after"] > 2 * off["after"], (mean, off)


def test_what_is_looked_at_changes_no_weight_and_no_stream(thinker):
    before, stream = {n: w.clone() for n, w in thinker.policy.weights().items()}, torch.get_rng_state()
    answer(thinker, Thought(5, heat=2.0, draw=9, slot=1, at=-3.0))
    assert torch.equal(stream, torch.get_rng_state()) and all(torch.equal(w, before[n]) for n, w in thinker.policy.weights().items())
    assert not any(w.grad is not None for w in thinker.policy.weights().values())


# ---- runs that can be opened

def test_only_runs_with_a_prior_and_a_posterior_are_listed(tmp_path):
    "A run of SoftCoT has thoughts, and nothing that they could be compared with: it is not offered, and asked for by name it is one sentence."
    places = latent_runs(tmp_path)
    train(Config(recipe="softcot", **SMALL), tmp_path / "soft")
    assert Lab(places).names() == [LATENT, "amvl"]
    note = screen(Lab(places), LabView(run="soft")).note
    assert "rlw-error" in note and "thoughts of an assistant, which have no posterior" in note and "softcot" in note


# ---- the command

def test_the_command_makes_what_the_lab_reads(tmp_path):
    card = build_recorded_latent(tmp_path / "made", steps=1, n=20)
    made, policy = read(tmp_path / "made", "made"), shipped_policy(tmp_path / "made")
    assert made.steps == (0, 1) and 0 <= card[made.task]["greedy"] <= 1
    with torch.no_grad():
        mean = policy.prior(policy.asked(policy.encode(made.problems())))[0]
    assert (mean - made.laws["prior"][0][-1]).abs().max() < .02
    out = CliRunner().invoke(app, ["build", LATENT, "--out", str(tmp_path / "made")])
    assert "already holds a policy; --force replaces it" in str(out.exception)


# ---- endpoints

def test_every_endpoint_has_a_name_and_none_holds_a_model():
    from rlworkbench.apps.lab import build
    for event in build(Places("/nowhere")).fns.values():
        held = [c.cell_contents for c in getattr(event.fn, "__closure__", None) or ()]
        assert event.api_name and not any(isinstance(h, torch.nn.Module) for h in held), event.api_name
        asks = re.search("asked|film|source|heat|slot|axis|_at|redraw|home", event.api_name)
        if event.api_name == "release":      # of a visitor who has gone
            continue
        assert bool(asks) == (event.concurrency_id == "model") and bool(asks) != (event.queue is False), event.api_name


@pytest.fixture(scope="module")
def page_alone(places):
    from rlworkbench.apps.lab import build
    demo = build(places)
    url = served(demo, wait=False)
    yield url
    demo.close(verbose=False)


def test_endpoints_of_two_visitors(page_alone):
    from gradio_client import Client
    one, two = (Client(page_alone, verbose=False) for _ in range(2))
    for client, problem in ((one, 3), (two, 12)):
        client.predict(api_name="/lab")
        assert f"problem={problem}" in str(client.predict(problem, api_name="/lab_problem"))
    for client, problem, at in ((one, 3, 2.0), (two, 12, -1.5)):
        assert "rlw-likely" in str(client.predict(api_name="/lab_problem_asked"))
        assert f"problem={problem}&at={at}" in str(client.predict(at, api_name="/lab_at"))
    began, scrubbed = time.perf_counter(), str(one.predict(0, api_name="/lab_scrub"))
    assert "step=0&problem=3&at=2.0" in scrubbed and time.perf_counter() - began < 1
    assert "step=" not in str(two.predict(1, api_name="/lab_slot"))
    assert "After 0 steps" in scrubbed and "After 22 steps" in str(one.predict(api_name="/lab_after"))
    assert "has no latents" in str(two.predict("sft", api_name="/lab_run"))
    assert "problem=5" in str(two.predict(5, api_name="/lab_choose"))
    two.predict("amvl", api_name="/lab_run")
    two.predict(api_name="/lab_run_film")
    assert "After 2 steps" in str(two.predict(1, api_name="/lab_scrub")) and "run=amvl" in str(two.predict(0, api_name="/lab_scrub"))


# ---- a real browser

@pytest.fixture
def page(window, page_alone):
    return window(page_alone)


def shares(page) -> list:
    return page.locator("#answer .rlw-likely .n").all_inner_texts()


@pytest.mark.browser
def test_scrub_walk_and_come_back(page, page_alone):
    from playwright.sync_api import expect
    page.goto(f"{page_alone}/?__theme=dark")
    expect(page.locator("#clouds [data-move]").first).to_be_visible(timeout=15_000)
    assert page.locator("#clouds [data-move]").count() == 160 and "After 240 steps" in page.locator("#clouds").inner_text()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 28)"
    expect(page.locator("#answer .rlw-likely")).to_be_visible(timeout=30_000)

    at = page.locator("#clouds [data-move=prior5]").get_attribute("data-x")
    page.locator("#says h1").click()
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#clouds")).to_contain_text("After 218 steps")
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#clouds")).to_contain_text("After 196 steps")
    assert page.locator("#clouds [data-move=prior5]").get_attribute("data-x") != at
    page.locator("#moment input[type=range]").focus()
    page.keyboard.press("Home")
    expect(page.locator("#clouds")).to_contain_text("After 0 steps")
    expect(page.locator("#panel figure")).to_have_count(7)

    page.locator("#clouds [data-token='12']").press("Enter")
    expect(page.locator("#problem-card")).to_contain_text("Problem 12;")
    page.wait_for_function("location.search.includes('problem=12')")
    expect(page.locator("#walk svg")).to_be_visible(timeout=15_000)
    page.wait_for_timeout(600)
    before = shares(page)
    page.locator("#at input[type=range]").focus()
    for _ in range(6):
        page.keyboard.press("ArrowRight")
    page.wait_for_function("location.search.includes('at=3')", timeout=15_000)
    expect(page.locator("#walk")).to_contain_text("here")
    assert shares(page) != before
    page.get_by_label("2", exact=True).first.check()
    page.wait_for_function("location.search.includes('slot=2')", timeout=15_000)

    here, said = page.url, shares(page)
    page.goto(here)
    expect(page.locator("#answer .rlw-likely")).to_be_visible(timeout=30_000)
    assert shares(page) == said and page.url == here and "After 0 steps" in page.locator("#clouds").inner_text()
    page.locator("#home").click()
    page.wait_for_function("!location.search.includes('at=')", timeout=15_000)


@pytest.mark.browser
def test_a_run_without_latents_and_a_phone(page, page_alone):
    from playwright.sync_api import expect
    page.set_viewport_size({"width": 390, "height": 800})
    page.goto(f"{page_alone}/?run=sft")
    expect(page.locator("#note")).to_contain_text("has no latents: it was trained by sft", timeout=15_000)
    expect(page.locator("#answer .rlw-likely")).to_be_visible(timeout=30_000)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    for part in ("#clouds svg", "#answer .rlw-likely", "#trends svg >> nth=0"):
        box = page.locator(part).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 390 and box["width"] > 280, part
