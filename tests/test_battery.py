"""The battery asks the same of everybody and moves nothing; the watcher changes no number of a run and goes on after an interruption."""
import pytest
import torch

from rlworkbench.core.config import Config
from rlworkbench.core.registry import probes, tasks, watchers
from rlworkbench.policies.tiny import load_tiny
from rlworkbench.training.battery import BATTERY, Kept, ask, battery_of, can_read
from rlworkbench.training.choices import load_policy, new_trainer

LAW = dict(policy="tiny", steps=3, prompts=2, evaluate=0, threads="1", lr=3e-4)
WATCH = "battery:every=2/n=4/skills=digits-read+text-sum"


def test_who_is_asked_what():
    assert battery_of(load_tiny()) == tuple(n for n in BATTERY if n != "kk")
    assert not can_read(load_policy("small-llama"), tasks.get("digits-read"))
    assert can_read(load_policy("small-llama"), tasks.get("text-sum"))
    assert not can_read(load_policy("table"), tasks.get("text-sum"))


def test_a_broken_policy_scores_nothing():
    policy = load_tiny()
    with torch.no_grad():
        for w in policy.weights().values():
            w.mul_(0)
    assert set(ask(policy, ["digits-read", "digits-count"], 6).values()) == {0.0}


def test_asking_moves_nothing():
    policy = load_tiny()
    before, mode = {k: v.clone() for k, v in policy.weights().items()}, policy.model.train().training
    state = torch.get_rng_state()
    ask(policy, ["digits-max"], 4)
    assert torch.equal(state, torch.get_rng_state()) and policy.model.training == mode
    assert all(torch.equal(before[k], v) for k, v in policy.weights().items())


@pytest.mark.parametrize("how", [dict(recipe="grpo", task="text-sum", group=4), dict(recipe="sft", task="text-sum", group=1), dict(recipe="clip_cov", task="text-sum", group=4)])
def test_a_watched_run_is_the_same_run(how):
    plain, watched = new_trainer(Config(**LAW, **how)), new_trainer(Config(**LAW, **how, watch=WATCH))
    plain.fit(3)
    rows = watched.fit(3)
    assert all(torch.equal(w, watched.policy.weights()[k]) for k, w in plain.policy.weights().items())
    assert [("battery/text-sum" in r, "battery/start/text-sum" in r) for r in rows] == [(False, True), (True, False), (True, False)]
    assert rows[2]["battery/text-sum"] == ask(watched.policy, ["text-sum"], 4)["text-sum"]


def test_the_start_is_asked_before_the_first_step():
    trainer = new_trainer(Config(**LAW | {"lr": .05}, recipe="sft", task="text-sum", group=1, watch=WATCH))
    rows = trainer.fit(3)
    assert rows[0]["battery/start/digits-read"] == ask(load_tiny(), ["digits-read"], 4)["digits-read"] > rows[2]["battery/digits-read"]
    found = probes.get("forgetting")(rows).table
    assert set(found[found["step"] == 0]["change"]) == {0.0} and found[found["step"] == 3].set_index("skill")["change"]["digits-read"] < -.4


@pytest.mark.parametrize(("watch", "said"), [("battery:n=0", "n must be a whole number, 1 or more"), ("battery:skills=kk", "can't be asked kk"), ("battery:skills=digit-read", "did you mean digits-read"),
                                             ("battery:until=kk@1", "unknown skill 'kk'"), ("battery:until=digits-sum@much", "until wants TASK@SHARE"), ("battery:until=text-sum@2", "a share above 0 and at most 1"), ("battery:until=text-sum@0", "a share above 0"), ("battery:split=tset", "did you mean test")])
def test_bad_options(watch, said):
    with pytest.raises(ValueError) as e:
        new_trainer(Config(**LAW, recipe="sft", task="text-sum", group=1, watch=watch))
    assert said in str(e.value) and "\n" not in str(e.value)


def test_listed():
    assert {"battery", "battery:"} <= set(watchers.all())


def test_backward_transfer_by_hand():
    kept = Kept(("before", "a", "b"), ("old", "a", "b"), ((.9, .1, .1), (.6, .8, .1), (.7, .5, .9)), ("", "a", "b"))
    assert kept.transfer().tolist() == pytest.approx([-.2, -.3, 0]) and kept.backward() == pytest.approx(-.25)
