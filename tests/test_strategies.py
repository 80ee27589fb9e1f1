"""Every strategy: on micro, on tiny and on nine families; the same again, within its budget, with all it spent in the Trace, and no exception for a user's question."""
import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from rlworkbench.claims.nolan import answer_pushed_wrongly
from rlworkbench.cli.main import app
from rlworkbench.core.formats import from_record, to_record
from rlworkbench.core.item import Item
from rlworkbench.core.registry import strategies
from rlworkbench.core.trace import Trace
from rlworkbench.policies.experts import EXPERTS
from rlworkbench.policies.families import FAMILIES, family
from rlworkbench.policies.micro import MICROS, random_micro
from rlworkbench.policies.table import uniform
from rlworkbench.policies.tiny import load_tiny
from rlworkbench.reasoning.contrast import divergence, push
from rlworkbench.reasoning.drafts import decode
from rlworkbench.reasoning.sequential import in_rounds, own_verdicts, steps_of
from rlworkbench.reasoning.streaming import Progress
from rlworkbench.tasks.bandit import bandit
from rlworkbench.tasks.digits import digits_sum
from rlworkbench.tasks.sevens import sevens_even
from rlworkbench.tasks.verbose import verbose_sum
from rlworkbench.training.beds import make_micro
from tests.conftest import breaks_off
from tests.test_families import ITEMS, Lottery, noise

STRATEGIES = strategies.all()
every = pytest.mark.parametrize("name", STRATEGIES)
BUDGET = 24


class Quiz(Lottery):
    "Short replies, feedback that complains now and then."
    name, max_tokens = "quiz", 8

    def feedback(self, item, text):
        return None if len(text) % 3 else "That is too long or too short."


@pytest.fixture(scope="session")
def tiny():
    "Asked once: with its first pass transformers registers hooks of its own."
    policy = load_tiny()
    STRATEGIES["greedy"](policy, digits_sum.items("test")[:1], 2)
    return policy


def ask(name, policy, items, budget=BUDGET, task=None, **more):
    return STRATEGIES[name](policy, items, budget, task=task, **more)


def tokens_of(trace: Trace) -> list:
    return [trace.ids, [tokens_of(b) for b in trace.branches]]


def written(traces: list) -> list:
    return [(tokens_of(t), t.outcome, t.spent) for t in traces]


def check(traces, items, budget):
    "What holds for every Trace of every strategy."
    assert [t.id for t in traces] == [i.id for i in items]
    for t, i in zip(traces, items):
        assert t.prompt == i.prompt and len(t.images) == len(i.images)
        assert t.outcome in ("ok", "truncated", "unknown") or t.outcome.startswith("refused: ")
        assert 0 <= t.spent <= budget
        assert t.outcome.startswith("refused") or t.spent > 0
        for _, b in t.walk():
            assert all(o == "given" or v is not None and v <= 1e-6 for o, v in zip(b.origin, b.columns.get("old", [])))


# --- policies ---
@every
@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family(name, kind):
    policy = family(kind)
    items = ITEMS if policy.sees else [i for i in ITEMS if not i.images]
    traces = ask(name, policy, items, task=Quiz(items))
    check(traces, items, BUDGET)
    looks = STRATEGIES[name].looks
    assert [t.outcome.startswith("refused") for t in traces] == [looks and not i.images for i in items]


@every
def test_micro(name):
    items, policy = verbose_sum.items("test")[:3], random_micro(MICROS["micro-verbose"])
    check(ask(name, policy, items, task=verbose_sum), items, BUDGET)


@every
def test_a_policy_without_an_end_token(name):
    items = bandit.items()
    traces = ask(name, uniform(), items, 12, task=bandit)
    check(traces, items, 12)
    assert all(t.outcome in ("unknown", "truncated") or t.outcome.startswith("refused: ") for t in traces)


# --- determinism ---
@every
def test_the_same_seed_alone_and_in_company(tiny, name):
    items = digits_sum.items("test")[:4]
    together = ask(name, tiny, items, 102, task=digits_sum, rng=7)
    assert written(together) == written(ask(name, tiny, items, 102, task=digits_sum, rng=7))
    assert written(together[::-1]) == written(ask(name, tiny, items[::-1], 102, task=digits_sum, rng=7))
    assert written(together) == written(ask(name, tiny, items, 102, task=digits_sum, rng=7, batch=1))


def exact(traces: list) -> list:
    return [(t.ids, t.text, t.columns, t.origin, t.outcome, t.spent, t.answer, t.meta, exact(t.branches)) for t in traces]


@every
def test_watched_it_is_the_same_and_every_token_was_told(tiny, name):
    own, items, seen = STRATEGIES[name], digits_sum.items("test")[:2], []
    ready = own.but(**own.prepare(tiny, digits_sum, 0)) if own.prepare else own
    progress = Progress(lambda: seen.append([progress.trace(i) for i in items]))
    plain, watched = ready(tiny, items, 68, task=digits_sum, rng=3), ready(tiny, items, 68, task=digits_sum, rng=3, watch=progress)
    assert exact(watched) == exact(plain)
    assert all(a.spent <= b.spent for before, after in pairwise(seen) for a, b in zip(before, after))
    assert all(t.correct is None and t.meta == {"unfinished": True} for t in seen[-1])
    gradients = [t.unseen * (name == "nabla-reasoner") for t in watched]
    assert [t.spent for t in seen[-1]] == [t.spent - g for t, g in zip(watched, gradients)]


@pytest.mark.parametrize("name", ["sampling", "self-consistency", "cautious", "revised", "best-of-n-oracle"])
def test_another_seed_draws_another_reply(tiny, name):
    items = digits_sum.items("test")[:4]
    assert written(ask(name, tiny, items, 102, task=digits_sum, rng=1)) != written(ask(name, tiny, items, 102, task=digits_sum, rng=2))


@every
def test_nothing_of_the_policy_moves(tiny, name):
    before = {n: w.clone() for n, w in tiny.weights().items()}
    state, hooks = torch.get_rng_state(), lambda: [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in tiny.model.modules()]
    there = hooks()
    ask(name, tiny, digits_sum.items("test")[:2], 68, task=digits_sum)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[n], w) and w.grad is None for n, w in tiny.weights().items())
    assert hooks() == there


@pytest.mark.parametrize("name", ["cot-vector", "cot-vector-learned", "fractional", "fractional-vote"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_hooks_come_off_in_the_middle_of_a_reply(tiny, name, error, monkeypatch):
    own, hooks = STRATEGIES[name], lambda: sum(len(m._forward_hooks) for m in tiny.tower.modules())
    ready = own.but(**own.prepare(tiny, digits_sum, 0))
    before, passes = hooks(), breaks_off(tiny, error, hooks, monkeypatch)
    with pytest.raises(error, match="in the middle"):
        ready(tiny, digits_sum.items("test")[:2], 68, task=digits_sum)
    assert min(passes) > before == hooks()


# --- what is spent ---
@every
def test_every_token_that_was_drawn_is_in_the_trace(tiny, name, monkeypatch):
    "Counted where tokens are drawn, not where traces are made."
    drawn, items = [], digits_sum.items("test")[:3]
    own = STRATEGIES[name]
    ready = own.but(**own.prepare(tiny, digits_sum, 0)) if own.prepare else own

    def counting(readers, *args, **kw):
        found = decode(readers, *args, **kw)
        drawn.append(len(readers) * sum(map(len, found.ids)))
        return found
    module = __import__(own.run.__module__, fromlist=["decode"])
    if hasattr(module, "slopes"):
        def charging(policy, prompts, ids, *more, slopes=module.slopes):
            "Forward and backward over a reply: three times its tokens."
            drawn.append(3 * len(ids))
            return slopes(policy, prompts, ids, *more)
        monkeypatch.setattr(module, "slopes", charging)
    monkeypatch.setattr(module, "decode", counting)
    monkeypatch.setattr("rlworkbench.reasoning.parallel.decode", counting)
    traces = ready(tiny, items, 102, task=digits_sum)
    assert sum(t.spent for t in traces) == sum(drawn) > 0


@every
def test_a_trace_survives_being_written(tiny, name):
    for trace in ask(name, tiny, digits_sum.items("test")[:2], 68, task=digits_sum):
        again = from_record(to_record(trace), "here")
        assert (tokens_of(again), again.spent, again.outcome, again.text) == (tokens_of(trace), trace.spent, trace.outcome, trace.text)


# --- who may know the answer ---
@every
def test_only_an_oracle_reads_the_answer(tiny, name):
    items = digits_sum.items("test")[:6]
    lied = [replace(i, answer="99", demo="<answer>99</answer>", meta={k: v for k, v in i.meta.items() if k != "think"}) for i in items]
    true, false = (written(ask(name, tiny, some, 136, task=digits_sum)) for some in (items, lied))
    assert (true != false) == STRATEGIES[name].oracle
    assert all(t.meta.get("oracle", False) == STRATEGIES[name].oracle for t in ask(name, tiny, items[:1], 34, task=digits_sum))


# --- bad input ---
@every
def test_questions_that_cannot_be_asked_are_outcomes(tiny, name):
    good = digits_sum.items("test")[0]
    items = [replace(good, id="empty", prompt=" "), good, replace(good, id="blind", images=())]
    for budget in (0, -3, 1, 2, 5, 34):
        traces = ask(name, tiny, items, budget, task=digits_sum)
        check(traces, items, max(budget, 0))
        assert traces[0].outcome.startswith("refused: ")
        assert budget >= 1 or all("below one token" in t.outcome for t in traces)
    assert ("the question has none" in traces[2].outcome) == STRATEGIES[name].looks


@every
def test_without_a_task(tiny, name):
    items = digits_sum.items("test")[:2]
    traces = ask(name, tiny, items)
    check(traces, items, BUDGET)
    assert all(t.correct is None for t in traces)


@every
def test_a_picture_for_a_policy_that_reads_text(name):
    policy, item = random_micro(MICROS["micro-verbose"]), Item("seen", "<auto>1+2=?", images=(noise(0),))
    assert "reads text only" in ask(name, policy, [item])[0].outcome


@every
def test_weights_that_are_no_numbers(name):
    policy = load_tiny()
    with torch.no_grad():
        policy.tower.norm.weight.fill_(float("nan"))
    traces = ask(name, policy, digits_sum.items("test")[:2], 68, task=digits_sum)
    assert all("not finite" in t.outcome for t in traces)
    assert all(t.spent == 0 for t in traces)


@every
def test_no_questions(tiny, name):
    assert ask(name, tiny, []) == []


def test_a_think_tag_that_never_closes(tiny):
    item = digits_sum.items("test")[0]
    for name in ("forced", "revised", "cautious"):
        trace, = ask(name, tiny, [item], 9, task=digits_sum)
        assert (trace.outcome, trace.answer, trace.correct) == ("truncated", "", 0.0)


# --- verdicts of its own ---
def test_a_complaint_cuts_at_its_step_and_enough_calm_ends(tiny):
    asked, item = [], digits_sum.items("test")[0]

    def judge(policy, items, replies, budget, tries, seed, temperature):
        asked.append((tries[0], [*replies[0].ids]))
        return {0: steps_of([policy.piece(t) for t in replies[0].ids])[1][0] if len(asked) == 1 else None}
    trace, = in_rounds(tiny, [item], 200, task=digits_sum, seed=0, temperature=1.0, memory=True, least=2, judge=judge)
    at = steps_of([tiny.piece(t) for t in asked[0][1]])[1][0]
    assert [n for n, _ in asked] == [1, 2, 3] and asked[0][1][:at] == asked[1][1][:at] and trace.ids == asked[1][1] == asked[2][1]
    assert [b.at for b in trace.branches] == [at] and trace.branches[0].ids == asked[0][1][at:] and trace.meta["rewritten"] == 1
    asked.clear()
    short, = in_rounds(tiny, [item], len(trace.ids) + 5, task=digits_sum, seed=0, temperature=1.0, memory=True, least=2, judge=judge)
    assert short.meta["rewritten"] == 0 and short.spent <= len(trace.ids) + 5


@pytest.mark.parametrize("said, blamed", [("1", 0), ("2", 1), ("0", None), ("9", None), ("no", None)])
def test_a_verdict_names_a_step(tiny, monkeypatch, said, blamed):
    from rlworkbench.reasoning import sequential
    item = digits_sum.items("test")[0]
    reply, = (sequential.Reply().give(tiny.tokens("<observe>563</observe><think>5+6=1;1+3=4</think><answer>4</answer>")) for _ in "a")
    reply.why = "end"
    real, words = sequential.decode, tiny.tokens(f"{said}</answer>")[:-1]

    def saying(*args, **kw):
        found = real(*args, **kw)
        found.ids[0], found.old[0], found.entropy[0] = words, [0.0] * len(words), [0.0] * len(words)
        return found
    monkeypatch.setattr(sequential, "decode", saying)
    with torch.no_grad():
        found = own_verdicts(tiny, [item], {0: reply}, 100, [1], 0, 1.0)
    steps = steps_of([tiny.piece(t) for t in reply.ids])
    assert found == {0: None if blamed is None else steps[blamed][0]}
    assert reply.branches[0].prompt == "<verify>5+6=1;1+3=4?" and reply.spent == len(words)


def test_a_picture_of_one_pixel_and_a_prompt_of_many_words(tiny):
    odd = [Item("pixel", "What is the sum?", images=(Image.new("RGB", (1, 1)),)), Item("long", "What is the sum?" + "+" * 150, images=(noise(0),))]
    for name in ("greedy", "nolan", "self-consistency"):
        check(ask(name, tiny, odd), odd, BUDGET)


# --- a planted prior ---
@pytest.fixture(scope="session")
def habitual():
    "tiny-prior after a quarter of its lessons: the habit is there."
    return make_micro(EXPERTS["tiny-prior"], steps=25)


def sevens(policy):
    "Shares of 48 pictures: counter ones that were read as ending in a seven, counter right, consistent right."
    items = [sevens_even.item("validation", k) for k in range(48)]
    traces = STRATEGIES["greedy"](policy, items, 24, task=sevens_even)
    of = lambda tag, f: sum(f(t) for t, i in zip(traces, items) if tag in i.tags) / 24
    return of("counter", lambda t: t.answer.endswith("7")), of("counter", lambda t: t.correct), of("consistent", lambda t: t.correct)


def test_a_planted_prior_leans_the_way_it_was_planted(tiny, habitual):
    before, after = sevens(tiny), sevens(habitual)
    assert before[0] < .2 < after[0] and after[2] > after[1] + .15
    assert after[2] > before[2] + .2


@pytest.mark.parametrize("whose", ["shuffled", "borrowed"])
def test_a_wrong_push_is_as_long_as_the_right_one(tiny, monkeypatch, whose):
    caught, items = [], sevens_even.items("validation")[:4]

    def once(readers, rows, room, mix, **kw):
        own, other = torch.randn(2, 4, tiny.vocabulary, generator=torch.Generator().manual_seed(0))
        own[:, list(tiny.banned)] = other[:, list(tiny.banned)] = -1e4
        caught.append((push(divergence(own, other))[:, None] * (own - other), mix(own, other) - own))
        return decode(readers, rows, room, law=kw["law"])
    monkeypatch.setattr("rlworkbench.claims.nolan.decode", once)
    answer_pushed_wrongly(tiny, items, 48, task=sevens_even, seed=0, whose=whose)
    (right, wrong), = caught
    same = right if whose == "shuffled" else right.roll(1, 0)
    assert torch.allclose(same.sort(-1).values, wrong.sort(-1).values, atol=1e-4) and not torch.allclose(right, wrong, atol=.1)
    assert wrong[:, list(tiny.banned)].abs().max() < 1e-3


# --- the command line ---
def test_eval_compares_strategies(tmp_path):
    page = tmp_path / "page.html"
    done = CliRunner().invoke(app, ["eval", "tiny", "--strategy", "greedy,best-of-n-oracle", "--budgets", "68,34", "--n", "4", "--seed", "1", "--html", str(page), "--json"])
    told = json.loads(done.output.splitlines()[-1])
    assert [(r["strategy"], r["budget"], r["oracle"]) for r in told["summary"]] == [
        (s, b, o) for s, o in (("greedy", False), ("best-of-n-oracle", True)) for b in (34, 68)]
    assert not any(r["front"] for r in told["summary"] if r["oracle"])
    assert [(r["against"], r["budget"]) for r in told["paired"]] == [("greedy", 34), ("greedy", 68)]
    assert page.read_text().count("<svg") == 2 and told["command"] in page.read_text()


@pytest.mark.parametrize("more,says", [(("--strategy", "gredy"), "did you mean greedy"), (("--strategy", "greedy", "--budgets", "32,x"), "budgets are whole numbers"),
                                       (("--strategy", "greedy,greedy"), "named twice"), (("--strategy", "greedy", "--html", "nowhere/page.html"), "there is no folder")])
def test_a_mistake_on_the_command_line_is_one_sentence(more, says):
    with pytest.raises(ValueError, match=says):
        CliRunner().invoke(app, ["eval", "tiny", "--n", "2", *more], catch_exceptions=False)


def test_list_strategies_tells_oracles_apart():
    done = CliRunner().invoke(app, ["list", "strategies", "--json"])
    told = json.loads(done.output.splitlines()[-1])
    assert set(told) == set(STRATEGIES)
    assert {n for n, s in told.items() if s["oracle"]} == {"best-of-n-oracle"}
    assert "[oracle]" in CliRunner().invoke(app, ["list", "strategies"]).output
