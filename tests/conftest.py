"""What several tests share: three policies, some problems, one thread, and `--slow`."""
import os
import re
import shutil
from dataclasses import dataclass, replace

import pytest
import torch

from rlworkbench.core.registry import recipes
from rlworkbench.core.step import take
from rlworkbench.policies.micro import built_folder
from rlworkbench.policies.table import TablePolicy
from rlworkbench.recipes.recipe import Recipe
from rlworkbench.recipes.slots import Group, kl_penalty, label
from rlworkbench.rollouts.parts import from_function
from rlworkbench.rollouts.sampler import sample
from rlworkbench.rollouts.sampling import Sampling
from rlworkbench.tasks.bandit import Bandit
from rlworkbench.training.job import resume, train
from rlworkbench.training.trainer import Trainer

torch.set_num_threads(1)

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

SPELL = Bandit("spell", prompts=3, length=6, letters=4, near=2)   # 'd' ends a reply, so that replies have 1 to 6 tokens
LAW = Sampling(max_tokens=SPELL.length)
Bandit.route = lambda self, item, text: tuple(enumerate(text))    # for methods that compare routes: each word goes its own way
PLAIN = Recipe("plain", rollout=Group(LAW))
Bandit.boxes = lambda self, item, text: tuple([(ord(v), t, ord(v) + 2, t + 2) for t, v in enumerate(word)] for word in (text, item.answer))   # and for methods that match boxes: a letter in its place is one
LATENT = {name for name, r in recipes.all().items() if any(hasattr(s, "around") for s in r.slots().values())}   # they need a latent policy; tests/test_latent asks them
RECIPES = [r for r in recipes.all().values() if isinstance(r, Recipe) and r.name not in LATENT]
VARIANTS = [PLAIN, *(PLAIN.but(name=f"plain_{k}", penalty=kl_penalty(.1, k)) for k in ("k1", "k2", "k3"))]


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests that take minutes as well")


def pytest_collection_modifyitems(config, items):
    blind = CHROMIUM is None and not os.environ.get("RLWB_REQUIRE_BROWSER")
    for item in items:
        if item.get_closest_marker("browser") and blind:
            item.add_marker(pytest.mark.skip(reason="no chromium on this machine"))
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="takes minutes; --slow runs it"))


@pytest.fixture(scope="session")
def minilm_built():
    "Skips where sentence embeddings have not been fetched; fails where they were to be."
    if not (built_folder("minilm") / "making.json").is_file():
        assert not os.environ.get("RLWB_REQUIRE_MINILM"), "minilm was to be built"
        pytest.skip("minilm is not built: rlworkbench build minilm")


@pytest.fixture(scope="module")
def chromium():
    "A real browser."
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-background-networking"])
        yield browser
        browser.close()


@pytest.fixture
def window(chromium):
    """A function: a page of its own, `window(url, forgiven, **how)`; `how` is what a browser context takes. What the page complains of, what answers with 400 or more, and what it asks
    of any address but `url` is collected in `page.said` and must be nothing in the end; `forgiven` is a pattern of complaints that may be."""
    pages = []

    def opened(url: str = "", forgiven: str = "", **how):
        page = chromium.new_context(**({"viewport": {"width": 1280, "height": 1000}} | how)).new_page()
        page.said = []
        say = lambda text: None if re.search(f"AbortError|errored out{forgiven and '|'}{forgiven}", text) else page.said.append(text)      # what gradio says of its own stream when a page is left
        page.on("pageerror", lambda e: say(f"error: {e}"))
        page.on("console", lambda m: say(f"console: {m.text} {m.location}") if m.type == "error" else None)
        page.on("request", lambda r: say(f"asked: {r.url}") if not r.url.startswith(tuple(filter(None, (url, "data:", "blob:", "file:")))) else None)
        page.on("response", lambda r: say(f"{r.status}: {r.url}") if r.status >= 400 else None)
        pages.append(page)
        return page
    yield opened
    for page in pages:
        page.context.close()
    assert [page.said for page in pages if page.said] == []


def interrupted(config, tmp_path, after=3) -> list:
    "The rows, without times, of a run that was never interrupted and of one that was, after so many steps, and then resumed."
    def stop(run, step):
        if step.clock[0] == after:
            raise KeyboardInterrupt
    whole = train(config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "killed", stop)
    return [[{k: v for k, v in r.items() if not k.startswith(("time/", "cpu/"))} for r in run.rows()] for run in (whole, resume(tmp_path / "killed"))]


def breaks_off(policy, error, look, monkeypatch) -> list:
    "Make the third step of a policy fail; what `look()` saw before each of the three."
    step, seen = policy.step, []

    def breaking(*args, **kw):
        seen.append(look())
        if len(seen) == 3:
            raise error("in the middle")
        return step(*args, **kw)
    monkeypatch.setattr(policy, "step", breaking, raising=False)
    return seen


class Ending(TablePolicy):
    "A table whose letter 'd' ends a reply."
    def __init__(self, logits):
        super().__init__(logits)
        self.eos = 3

    def copy(self):
        other = Ending(self.table.detach())
        other.table.requires_grad_(False)
        return other


def ending(seed=0, task=SPELL) -> Ending:
    "A table of random logits that can end its replies."
    return Ending(torch.randn(task.prompts, task.length, task.letters, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))


@dataclass(frozen=True, repr=False)
class Script(Group):
    "Replies that are dictated to a table: G strings, the same for each problem."
    replies: tuple = ()

    def __call__(self, policy, step):
        step.law, step.prompts = self.sampling, policy.encode(step.items)
        step.group = torch.arange(len(step.items)).repeat_interleave(step.size[1])
        said = [policy.tokens(r) for r in self.replies] * len(step.items)
        given = torch.tensor([(r + [0] * self.sampling.max_tokens)[:self.sampling.max_tokens] for r in said])
        sample(policy, step, self.sampling, given)
        step.origin.zero_()


def letters(item, text):
    "A judge for methods that grade the thinking: the share of letters that stand where they should."
    return sum(a == b for a, b in zip(item.answer, text)) / max(1, len(text))


def on_table(recipe, **changes) -> Recipe:
    "A recipe in its own form, with replies as long as the table allows."
    law = replace(recipe.rollout.sampling, max_tokens=LAW.max_tokens)
    order = replace(recipe.order, least=0) if hasattr(recipe.order, "least") else recipe.order   # a filter that lets all three problems pass
    parts = tuple(from_function(letters, "thinking") if label(part) == "thinking" else part for part in recipe.rewards)
    return recipe.but(**({"rollout": replace(recipe.rollout, sampling=law), "order": order, "rewards": parts, "batches": 1, "epochs": 1} | changes))


def collected(recipe, policy=None, group=8, seed=0, task=SPELL):
    "A trainer and its step as it stands before the update; the reference is another table."
    trainer = Trainer(policy or ending(), task, recipe, prompts=3, group=group, lr=.1, seed=seed)
    if trainer.reference is not None and isinstance(trainer.reference, TablePolicy):
        trainer.reference = ending(7, task)
    step = next(s for s in trainer.phases() if s.phase == "advantage")
    return trainer, take(step, torch.arange(len(step)))


def flat(policy) -> torch.Tensor:
    "All weights in one row."
    return torch.cat([p.detach().flatten() for p in policy.weights().values()])


def sharpen(policy, factor=6.0):
    "Random weights give nearly uniform replies; a larger last norm makes a policy that prefers some."
    with torch.no_grad():
        policy.tower.norm.weight.mul_(factor)
    return policy


def fresh(name: str, double=False):
    "A new policy by name."
    if name == "table":
        return ending()
    from rlworkbench.policies.families import small_qwen
    from rlworkbench.policies.tiny import random_tiny
    policy = sharpen({"random-tiny": random_tiny, "small-qwen": small_qwen}[name]())
    if double:
        policy.model.double()
    return policy


def unchanged(policy):
    "Lend a policy to tests, and see that none of them trained it."
    before = flat(policy)
    yield policy
    assert torch.equal(before, flat(policy)), "a test changed the shared policy"


@pytest.fixture(scope="session")
def table():
    yield from unchanged(fresh("table"))


@pytest.fixture(scope="session")
def random_tiny():
    yield from unchanged(fresh("random-tiny"))


@pytest.fixture(scope="session")
def small_qwen():
    yield from unchanged(fresh("small-qwen"))


@pytest.fixture(scope="session", params=["random-tiny", "small-qwen"])
def model(request):
    "Both families in turn, float32."
    return request.getfixturevalue(request.param.replace("-", "_"))


@pytest.fixture(scope="session")
def digits():
    "Two problems with a picture, two without; their prompts have different lengths."
    from rlworkbench.tasks.digits import digits_sum, text_sum
    return digits_sum.items()[:2] + text_sum.items()[:2]
