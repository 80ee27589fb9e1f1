"""Ranking passages by attention, and the bed that it is tried on."""
import json
from dataclasses import replace

import pytest
import torch

from rlworkbench.core.item import Item
from rlworkbench.policies.families import family
from rlworkbench.policies.micro import Micro, random_micro
from rlworkbench.reasoning import qrranker as module
from rlworkbench.reasoning.qrranker import (
    answer_from_best,
    batched,
    embedded_scores,
    find_heads,
    head_masses,
    learn_heads,
    lines_of,
    listwise_loss,
    measure_recall,
    passage_scores,
    places,
    qrranker,
    recall,
    shortened,
)
from rlworkbench.reasoning.strategy import blind
from rlworkbench.tasks.needles import needles, needles_long

@pytest.fixture(scope="module")
def micro():
    return random_micro(Micro("micro-needles", needles))


def pointed(policy, layer, head, where):
    "Plant a head: its attention from the last words of a prompt goes to the passages that `where` names, by the tokens' keys."
    seen = module.head_masses

    def planted(policy, items):
        masses = [m.clone() for m in seen(policy, items)]
        for mass, item in zip(masses, items):
            mass[layer, head] = 0
            mass[layer, head, list(where(item))] = 1
        return masses
    return planted


def test_a_planted_head_is_found_and_ranks_perfectly(micro, monkeypatch):
    right = {i.prompt: i.meta["needles"] for split in ("validation", "test") for i in needles.items(split)[:40]}
    monkeypatch.setattr(module, "head_masses", pointed(micro, 1, 2, lambda i: right[i.prompt]))
    heads = learn_heads(micro, needles, 0, n=8)["heads"]
    assert heads[0] == (1, 2) and len(heads) == 3                      # a quarter of twelve
    found = measure_recall(micro, needles, n=40, support=8, most=1, ks=(1,), embeddings=False)
    rows = {r["way"]: r["recall"] for r in found["rows"] if r["words"] == "all"}
    assert found["heads"] == [[1, 2]] and rows["found heads"] == 1 and rows["heads by lot"] < .4
    traces = qrranker.but(heads=((1, 2),), keep=1)(micro, needles.items("test")[:4], 16, task=needles)
    assert [tuple(t.meta["kept"]) for t in traces] == [i.meta["needles"] for i in needles.items("test")[:4]]


def test_only_the_kept_passages_are_read_for_the_answer(micro, monkeypatch):
    asked = []

    class Spy(module.Reader):
        def __init__(self, policy, items):
            asked.extend(i.prompt for i in items)
            super().__init__(policy, items)
    monkeypatch.setattr(module, "Reader", Spy)
    item = needles.items("test")[3]
    trace, = answer_from_best(micro, [item], 8, task=needles, seed=0, heads=((0, 0),), keep=3)
    passages, question = lines_of(item)
    assert asked == ["\n".join([*(passages[k] for k in trace.meta["kept"]), question])] == [shortened(item, trace.meta["kept"]).prompt]
    best = torch.tensor(trace.meta["scores"]).topk(3).indices.tolist()
    assert sorted(best) == trace.meta["kept"] and len(trace.meta["scores"]) == 12


def test_alone_and_in_company_the_masses_are_the_same(micro):
    items = [needles.items("test")[0], needles_long.items("test")[1], Item("short", "Anna lives in Oslo.\nBoris lives in Rome.\nWhere does Anna live?")]
    with torch.no_grad():
        for together, alone in zip(head_masses(micro, items), [head_masses(micro, [i])[0] for i in items]):
            assert torch.allclose(together, alone, atol=1e-5)
        assert all(torch.equal(a, b) for a, b in zip(batched(micro, items, 2), head_masses(micro, items[:2])))


def test_nobody_is_told_which_passage_it_is(micro):
    items = list(needles.items("test")[:4])
    lied = [replace(i, answer="nobody", demo="", meta=i.meta | {"needles": (0,), "gold": ""}) for i in items]
    ask = lambda some: [(t.ids, t.meta["kept"]) for t in qrranker.but(heads=((0, 1),))(micro, some, 16, task=needles)]
    assert ask(items) == ask(lied)


def test_lines_that_look_alike_are_found_in_order(micro):
    item = Item("twice", "Anna keeps a cat.\nAnna keeps a cat.\nWhich animal does Anna have?")
    ids = micro.encode([item]).ids[0]
    (a, b), (c, d), (e, _) = places(micro, ids, item.prompt.split("\n"))
    assert a < b <= c < d <= e and ids[a:b].tolist() == ids[c:d].tolist()


def test_weights_that_are_no_numbers_are_an_outcome(micro):
    policy = random_micro(Micro("micro-needles", needles))
    with torch.no_grad():
        policy.tower.layers[0].self_attn.q_proj.weight.fill_(float("nan"))
    trace, = qrranker.but(heads=())(policy, needles.items("test")[:1], 16, task=needles)
    assert trace.outcome == "refused: the attention of micro-needles is not finite" and trace.spent == 0


def test_a_question_that_is_not_among_the_tokens(micro):
    trace, = qrranker.but(heads=())(micro, [Item("odd", "Qxz says.\nWvq says.\nWho says?")], 8)
    assert trace.outcome.startswith("refused: line 1 of the question can't be found")
    assert qrranker(family("qwen3"), [Item("fine", "7+5=12\n3+4=7\n3+4=?")], 4)[0].meta["passages"] == 2


def test_the_loss_prefers_what_ranks_better():
    good, bad = torch.tensor([.1, .9, .2]), torch.tensor([.9, .1, .2])
    assert listwise_loss(good, [1]) < .01 < 5 < listwise_loss(bad, [1])
    scores = torch.tensor([.3, .5, .1], requires_grad=True)
    listwise_loss(scores, [0]).backward()
    assert scores.grad[0] < 0 < scores.grad[1]


def test_recall_by_hand():
    assert recall([torch.tensor([.1, .5, .4])], [(2, 0)], 2) == [.5]
    assert find_heads([torch.tensor([[[.2, .8]], [[.9, .1]]])], [(0,)], 2) == ((1, 0), (0, 0))
    assert passage_scores(torch.ones(2, 3, 4)).tolist() == [6.] * 4


def test_embeddings_find_the_needle(minilm_built):
    scores = embedded_scores([blind(i) for i in needles.items("test")[:20]])
    assert sum(recall(scores, [i.meta["needles"] for i in needles.items("test")[:20]], 1)) >= 16


def test_what_is_written_names_its_command(micro, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "load_policy", lambda name: micro)
    module.write_recall("micro-needles", "needles", tmp_path / "found.json", n=6, support=4, embeddings=False)
    found = json.loads((tmp_path / "found.json").read_text())
    assert "write_recall('micro-needles', 'needles'" in found["command"] and found["passages"] == 12 and {r["n"] for r in found["rows"] if r["words"] == "all"} == {6}
