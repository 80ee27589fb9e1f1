"""Flow steering, where a lesson would be tedious: hooks in the middle of a reply, odd clouds, broken weights, what is taken for an end."""
import pytest
import torch

from rlworkbench.policies.micro import MICROS, random_micro
from rlworkbench.policies.tiny import load_tiny
from rlworkbench.reasoning.flowsteer import (
    Flow,
    both_kinds,
    carried,
    end_tokens,
    fit_velocity,
    flowing,
    flowsteer,
    learn_flow,
    mmd,
    network,
    scales,
    states_at_ends,
    straight,
)
from rlworkbench.reasoning.parallel import greedy
from rlworkbench.reasoning.strategy import blind
from rlworkbench.tasks.digits import digits_sum
from rlworkbench.tasks.verbose import verbose_sum
from tests.conftest import breaks_off

@pytest.fixture(scope="module")
def tiny():
    policy = load_tiny()
    greedy(policy, digits_sum.items("test")[:1], 2)
    return policy


def planted(policy, shift=1.0, tokens=None):
    "A flow whose end is known: every coordinate goes up by `shift`."
    width = policy.config.hidden_size
    return Flow(1, end_tokens(policy) if tokens is None else tokens, (99, 99), torch.zeros(width), torch.ones(width), lambda xt: shift * torch.ones_like(xt[:, :-1]))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_hooks_come_off_in_the_middle_of_a_reply(tiny, error, monkeypatch):
    hooks = lambda: sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in tiny.tower.modules())
    before, passes = hooks(), breaks_off(tiny, error, hooks, monkeypatch)
    with pytest.raises(error, match="in the middle"):
        flowsteer.but(flow=planted(tiny))(tiny, digits_sum.items("test")[:2], 34)
    assert min(passes) == before + 2 and hooks() == before


def test_nothing_before_the_first_end_differs_and_something_after_it_does(tiny):
    "Log-probs up to and with the first end of a step are those of greedy."
    items = digits_sum.items("test")[:6]
    for plain, moved in zip(greedy(tiny, items, 34), flowsteer.but(flow=planted(tiny, 3.0))(tiny, items, 34)):
        ends = torch.isin(torch.tensor(plain.ids), end_tokens(tiny)).nonzero()[:, 0].tolist()
        first = ends[0] + 1 if ends else len(plain.ids)
        assert moved.ids[:first] == plain.ids[:first] and moved.column("old")[:first] == pytest.approx(plain.column("old")[:first], abs=1e-5)
        assert not ends or moved.column("old")[first:] != plain.column("old")[first:]


def test_ends_are_what_contains_a_semicolon_or_a_line_break(tiny):
    pieces = {tiny.piece(t) for t in end_tokens(tiny).tolist()}
    assert ";" in pieces and all(";" in p or "\n" in p for p in pieces) and tiny.eos not in end_tokens(tiny)


def test_modes_where_there_are_some_else_the_longest_and_the_shortest(tiny):
    micro = random_micro(MICROS["micro-verbose"])
    verbose, concise = both_kinds(micro, [blind(i) for i in verbose_sum.items("test")[:3]], 8, 0)
    assert {i.prompt[:6] for i, _ in verbose} == {"<long>"} and {i.prompt[:7] for i, _ in concise} == {"<short>"}
    verbose, concise = both_kinds(tiny, [blind(i) for i in digits_sum.items("test")[:4]], 34, 0)
    assert all(len(a) >= len(b) for (_, a), (_, b) in zip(verbose, concise)) and len(verbose) == len(concise) == 4


def test_states_are_those_after_an_end_and_never_of_the_last_token(tiny):
    item, end = blind(digits_sum.items("test")[0]), end_tokens(tiny)
    ids = [t for t in tiny.tokens(digits_sum.gold(digits_sum.items("test")[0])) if t != tiny.eos]
    semicolon = tiny.tokens(";")[0]
    with torch.no_grad():
        n = sum(t in end.tolist() for t in ids)
        assert len(states_at_ends(tiny, [(item, ids)], 2, end)) == n
        assert len(states_at_ends(tiny, [(item, [*ids, semicolon])], 2, end)) == n
        assert len(states_at_ends(tiny, [(item, [*ids, semicolon, ids[0]])], 2, end)) == n + 1
        assert torch.allclose(states_at_ends(tiny, [(item, ids), (item, [*ids, semicolon, ids[0]])], 2, end)[:n], states_at_ends(tiny, [(item, ids)], 2, end), atol=1e-4)


def test_too_few_states_move_nothing(tiny):
    with torch.no_grad():
        flow = learn_flow(tiny, digits_sum, 0, n=1)["flow"]
    assert flow.velocity is None and min(flow.n) < 16
    items = digits_sum.items("test")[:2]
    assert [t.ids for t in flowsteer.but(flow=flow)(tiny, items, 34)] == [t.ids for t in greedy(tiny, items, 34)]


def test_a_flow_finds_a_shift_and_a_change_of_scale():
    rng = torch.Generator().manual_seed(0)
    x0, x1 = torch.randn(600, 3, generator=rng), torch.randn(600, 3, generator=rng) * .2 + 2
    y = carried(fit_velocity(x0[:300], x1[:300], 0, 200), x0[300:])
    assert (y.mean(0) - 2).abs().max() < .15 and y.std(0).max() < .45      # the shift leaves it at 1
    shifted = x0[300:] + x1[:300].mean(0) - x0[:300].mean(0)
    assert mmd(y, x1[300:]) < .5 * mmd(shifted, x1[300:])


def test_the_same_seed_learns_the_same_flow_and_draws_from_nobody():
    x0, x1 = torch.randn(40, 3, generator=torch.Generator().manual_seed(1)), torch.ones(40, 3)
    before = torch.get_rng_state()
    a, b, c = (fit_velocity(x0, x1, seed, 5)[0].weight for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c) and torch.equal(before, torch.get_rng_state())
    assert network(3, 8, 8, 0)[-1].out_features == 3


def test_the_baseline_shifts_by_the_difference_of_the_means():
    clouds = (torch.zeros(2), torch.ones(2)), (torch.tensor([1., -2.]), torch.ones(2))
    flow = Flow(1, torch.tensor([1]), (20, 20), torch.tensor([5., 5.]), torch.tensor([2., .5]), None, clouds)
    x = torch.tensor([[1., 2.], [3., 4.]])
    assert torch.allclose(straight(flow).move(x), x + torch.tensor([2., -1.]), atol=1e-5)
    assert torch.allclose(straight(flow).move(x, .5), x + torch.tensor([1., -.5]), atol=1e-5)


def test_columns_that_never_vary_are_not_divided_by_nothing():
    middle, spread = scales(torch.zeros(5, 2))
    assert torch.isfinite(spread).all() and (spread > 0).all() and (middle == 0).all()


def test_a_flow_of_another_policy_is_refused_in_one_sentence(tiny):
    flow = planted(random_micro(MICROS["micro-verbose"]))
    trace, = flowsteer.but(flow=flow)(tiny, digits_sum.items("test")[:1], 8)
    assert trace.outcome == "refused: the flow is one of depth 1 and width 80; tiny has 4 layers of width 160"
    with pytest.raises(ValueError, match="depth 1 and width 80"), flowing(tiny, flow):
        pass
