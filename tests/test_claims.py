"""Claims: the statistics and their error rates, what is refused, and a reproduction that is interrupted, spread over processes, or fails."""
import io
import json
import math
import os
import sys
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from rlworkbench.claims import reproduce as work
from rlworkbench.claims import statistics as numbers
from rlworkbench.claims.claim import PILOT, Arm, Asked, Claim, Comparison, assess, conclude, share_right, tokens_spent
from rlworkbench.claims.reproduce import reproduce, run_arm
from rlworkbench.claims.statistics import INCONCLUSIVE, KINDS, NOT_SUPPORTED, SUPPORTED, auroc, holm, judge, paired, region
from rlworkbench.cli.main import main
from rlworkbench.core.config import Config
from rlworkbench.core.registry import claims, tasks
from rlworkbench.policies.tiny import load_tiny
from rlworkbench.recipes.grpo import grpo
from rlworkbench.recipes.reinforce import reinforce

eight = st.lists(st.floats(-5, 5), min_size=8, max_size=8).filter(lambda d: np.ptp(d) > 1e-3)


# statistics

@settings(max_examples=60, deadline=None)
@given(eight, st.floats(-3, 3))
def test_interval_and_p_are_students(differences, bound):
    ours, d = paired(differences), np.array(differences)
    theirs = stats.ttest_1samp(d, bound, alternative="greater")
    assert ours.above(bound) == pytest.approx(theirs.pvalue, abs=1e-9)
    assert ours.interval(.1) == pytest.approx(tuple(stats.ttest_1samp(d, 0).confidence_interval(.9)), abs=1e-9)


@settings(max_examples=80, deadline=None)
@given(eight, st.floats(.01, 3), st.sampled_from(KINDS))
def test_the_verdict_is_where_the_interval_lies(differences, margin, kind):
    found, (low, high) = judge([(differences, kind, margin)])[0], region(kind, margin)
    inside, outside = low < found.low and found.high < high, found.high < low or found.low > high
    assert found.verdict == (SUPPORTED if inside else NOT_SUPPORTED if outside else INCONCLUSIVE)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=7))
def test_holm_is_the_plain_step_down_procedure(p):
    rejected, left = set(), sorted(range(len(p)), key=lambda k: p[k])
    while left and p[left[0]] <= .05 / len(left):
        rejected.add(left.pop(0))
    clear = [k for k in range(len(p)) if abs(holm(p)[k] - .05) > 1e-12]
    assert {k for k in clear if holm(p)[k] <= .05} == rejected & set(clear)


@pytest.mark.parametrize("kind,truth", [("superiority", .5), ("non-inferiority", -.5), ("equivalence", .5), ("equivalence", -.5)])
@pytest.mark.parametrize("draw", ["normal", "flat"])
def test_supported_is_rarely_wrong_at_the_margin(kind, truth, draw):
    """Three thousand tables of eight seeds: at most 2.5 %, and three standard errors; small spread, so that equivalence is put to the test, too."""
    rng = np.random.default_rng(3)
    noise = rng.normal(0, .2, (3000, 8)) if draw == "normal" else rng.uniform(-.35, .35, (3000, 8))
    said = [judge([(truth + e, kind, .5)])[0].verdict for e in noise]
    assert .01 < said.count(SUPPORTED) / 3000 <= .025 + 3 * math.sqrt(.025 / 3000) + (.01 if draw == "flat" else 0)
    assert said.count(NOT_SUPPORTED) / 3000 <= .025 + 3 * math.sqrt(.025 / 3000) + (.01 if draw == "flat" else 0)


def test_a_table_of_many_is_not_a_way_to_be_right():
    """Ten comparisons without an effect: any `supported` in at most 2.5 % of tables. Without Holm it would be one in five."""
    rng, wrong, naive = np.random.default_rng(4), 0, 0
    for _ in range(800):
        table = [(d, "superiority", .5) for d in rng.normal(.5, 1, (10, 8))]
        wrong += any(j.verdict == SUPPORTED for j in judge(table))
        naive += any(judge([row])[0].verdict == SUPPORTED for row in table)
    assert wrong / 800 <= .025 + 3 * math.sqrt(.025 / 800) and naive / 800 > .12


def test_no_spread_is_an_answer():
    assert judge([([0.0] * 8, "superiority", .1)])[0].verdict == NOT_SUPPORTED
    assert judge([([0.0] * 8, "equivalence", .1)])[0].verdict == SUPPORTED
    assert judge([([.2] * 8, "superiority", .1)])[0].verdict == SUPPORTED
    assert judge([([.1] * 8, "superiority", .1)])[0].verdict == INCONCLUSIVE
    assert numbers.surprise(paired([.1] * 8), "superiority", .1) == (1.0, 1.0)


def test_auroc_counts_pairs():
    rng = np.random.default_rng(0)
    score, positive = rng.integers(0, 6, 80), rng.random(80) < .3
    pairs = [(a > b) + .5 * (a == b) for a in score[positive] for b in score[~positive]]
    assert auroc(score, positive) == pytest.approx(np.mean(pairs), abs=1e-12)
    assert auroc(-score, positive) == pytest.approx(1 - np.mean(pairs), abs=1e-12)
    assert math.isnan(auroc([1, 2], [False, False]))


# claims

TABLE = Config(task="bandit", policy="table", steps=6, prompts=3, group=4, lr=.1, evaluate=0)


class Counter:
    "A probe that counts updates."
    def __init__(self):
        self.updates = 0

    def __call__(self, step):
        self.updates += step.phase == "update"


def last_reward(done):
    return done.rows[-1]["reward"]


def updates(done):
    return done.probes["Counter"].updates


def late(done):
    return done.rows[99]["reward"]


TOY = Claim("toy", "none", "fast is better", {"fast": Arm(grpo, TABLE), "slow": Arm(reinforce, replace(TABLE, lr=1e-4))}, {"reward": last_reward},
            (Comparison("reward", "fast", "slow", .05),), seeds=8)


def judged(*verdicts):
    return [numbers.Judged(8, 0, 0, 0, 1, 1, v) for v in verdicts]


@pytest.mark.parametrize("comparisons,controls,pilot,verdict,why", [
    ((SUPPORTED, SUPPORTED), (NOT_SUPPORTED,), "", SUPPORTED, "no control shows the effect"),
    ((SUPPORTED, SUPPORTED), (INCONCLUSIVE,), "", SUPPORTED, "no control"),
    ((SUPPORTED,), (NOT_SUPPORTED, SUPPORTED), "", INCONCLUSIVE, "control 2 shows the effect"),
    ((SUPPORTED, NOT_SUPPORTED), (SUPPORTED,), "", NOT_SUPPORTED, "comparison 2"),
    ((INCONCLUSIVE, NOT_SUPPORTED), (), "", NOT_SUPPORTED, "comparison 2"),
    ((SUPPORTED, INCONCLUSIVE), (), "", INCONCLUSIVE, "comparison 2"),
    ((SUPPORTED,), (), "2 of 8 seeds", INCONCLUSIVE, "a pilot: 2 of 8 seeds"),
])
def test_the_verdict_of_a_claim(comparisons, controls, pilot, verdict, why):
    found, said = conclude(judged(*comparisons), judged(*controls), pilot)
    assert found == verdict and why in said


def test_direction_turns_the_difference():
    values = {"fast": {"reward": [.1, .2, .1, .2]}, "slow": {"reward": [.5, .7, .5, .7]}}
    up, down = (replace(TOY, comparisons=(Comparison("reward", "fast", "slow", .1, direction=d),)) for d in ("higher", "lower"))
    assert (assess(up, values)["verdict"], assess(down, values)["verdict"]) == (NOT_SUPPORTED, SUPPORTED)


@pytest.mark.parametrize("change,says", [
    ({"seeds": 7}, "8 seeds or more"), ({"comparisons": ()}, "compares nothing"),
    ({"comparisons": (Comparison("reward", "fast", "slwo", .1),)}, "did you mean slow"),
    ({"controls": (Comparison("rewrad", "fast", "slow", .1),)}, "did you mean reward"),
])
def test_a_claim_that_does_not_fit_together_is_refused(change, says):
    with pytest.raises(ValueError, match=says):
        replace(TOY, **change)


def test_probes_and_shifted_seeds():
    claim = replace(TOY, arms={"fast": Arm(grpo, TABLE, probes=(Counter,)), "slow": Arm(grpo, TABLE, shift=3, probes=(Counter,))}, measures={"reward": last_reward, "updates": updates})
    assert run_arm(claim, "fast", 0)["values"]["updates"] == 6
    assert run_arm(claim, "slow", 0)["curves"] == run_arm(claim, "fast", 3)["curves"] != run_arm(claim, "fast", 0)["curves"]


# claims that ask

ASKS = Claim("asks", "none", "greedy is better than drawing", {s: Asked(s, "tiny", "digits-read", 34, block=25) for s in ("greedy", "sampling")},
             {"right": share_right, "tokens": tokens_spent}, (Comparison("right", "greedy", "sampling", .1),), seeds=40, curves=())


def test_blocks_are_apart_and_pilots_leave_the_test_split_alone():
    arm = ASKS.arms["greedy"]
    asked = [i.id for seed in range(40) for i in arm.questions(seed)]
    assert len(asked) == len(set(asked)) == 1000 and all("/test/" in i for i in asked)
    assert all("/validation/" in i.id for i in arm.questions(PILOT + 3))
    assert [i.id for i in arm.questions(4)] == [i.id for i in ASKS.arms["sampling"].questions(4)]
    with pytest.raises(ValueError, match="block 40 of 25 questions goes beyond the 1000 items of digits-read, test"):
        work.ready(ASKS, 41, 1, None, 0)


def test_an_arm_that_asks_is_measured_on_its_traces(tmp_path):
    result = reproduce(ASKS, seeds=2, steps=3, folder=tmp_path, first=PILOT)
    arm = ASKS.arms["greedy"]
    traces = arm.method()(load_tiny(), arm.questions(PILOT + 1, 3), 34, task=tasks.get("digits-read"))
    assert result["values"]["greedy"]["right"][1] == pytest.approx(sum(t.correct for t in traces) / 3)
    assert result["values"]["greedy"]["tokens"][1] == pytest.approx(sum(t.spent for t in traces) / 3)
    assert result["why"].startswith("a pilot: 2 of 40 blocks of 25 questions, 3 steps, seeds from 1000 on")
    seen, other = [], replace(ASKS, arms=ASKS.arms | {"greedy": replace(arm, budget=33)})
    reproduce(other, seeds=2, steps=3, folder=tmp_path, first=PILOT, watch=lambda *job: seen.append(job))
    assert seen == [("greedy", PILOT), ("greedy", PILOT + 1)]


@pytest.mark.parametrize("change,says", [
    ({"seeds": 39}, "needs 1000 questions or more, asks has 975"), ({"arms": ASKS.arms | {"greedy": replace(ASKS.arms["greedy"], block=30)}}, "not asked the same questions"),
    ({"arms": ASKS.arms | {"greedy": Arm(grpo, TABLE)}}, "not asked the same questions"),
])
def test_a_claim_that_asks_different_questions_is_refused(change, says):
    with pytest.raises(ValueError, match=says):
        replace(ASKS, **change)


# reproductions

def timeless(result):
    return {k: v for k, v in result.items() if k not in ("cpu_seconds", "cpu_by_arm")}


def test_two_processes_say_what_one_says(tmp_path):
    one, two = (reproduce(TOY, seeds=3, jobs=jobs, folder=tmp_path / str(jobs)) for jobs in (1, 2))
    assert timeless(one) == timeless(two)
    assert one["values"]["fast"]["reward"] != one["values"]["slow"]["reward"]


def test_an_interrupted_reproduction_goes_on(tmp_path):
    whole, seen = reproduce(TOY, folder=tmp_path / "whole"), []

    def stop_at_five(*job):
        seen.append(job)
        if len(seen) == 5:
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        reproduce(TOY, folder=tmp_path / "cut", watch=stop_at_five)
    assert not (tmp_path / "cut" / "result.json").exists()
    (tmp_path / "cut" / "slow-1.json").write_text('{"digest": ')
    again = reproduce(TOY, folder=tmp_path / "cut", watch=lambda *job: seen.append(job))
    assert len(seen) == 5 + 16 - 4 and len(set(seen)) == 16
    assert timeless(again) == timeless(whole)


def test_what_was_measured_otherwise_is_measured_again(tmp_path):
    reproduce(TOY, seeds=2, folder=tmp_path)
    for change in ({"measures": {"reward": lambda done: done.rows[0]["reward"]}}, {"arms": TOY.arms | {"slow": Arm(grpo, TABLE)}}):
        seen = []
        reproduce(replace(TOY, **change), seeds=2, folder=tmp_path, watch=lambda *job: seen.append(job))
        assert len(seen) == 4
        reproduce(replace(TOY, **change), seeds=2, folder=tmp_path, watch=lambda *job: seen.append(job))
        assert len(seen) == 4


def test_a_failing_arm_is_reported_with_its_last_line(tmp_path):
    broken = replace(TOY, measures={"reward": last_reward, "late": late}, comparisons=TOY.comparisons)
    with pytest.raises(ValueError, match=r"the arm '\w+' failed with seed \d: IndexError: list index out of range .in late, line .*rows\[99\]"):
        reproduce(broken, seeds=2, folder=tmp_path)
    kept = next(tmp_path.glob("*.txt")).read_text()
    assert "IndexError" in kept and not list(tmp_path.glob("*.json"))
    fixed = reproduce(TOY, seeds=2, folder=tmp_path)
    assert fixed["verdict"] == INCONCLUSIVE and not list(tmp_path.glob("fast-0.txt"))


def die(done):
    os._exit(9)


def test_a_process_that_dies_is_reported(tmp_path):
    with pytest.raises(ValueError, match="a process of the reproduction died"):
        reproduce(replace(TOY, measures={"reward": die}), seeds=2, jobs=2, folder=tmp_path)


def test_a_measure_that_is_no_number_is_named(tmp_path):
    with pytest.raises(ValueError, match="the measure 'reward' is nan"):
        reproduce(replace(TOY, measures={"reward": lambda done: math.nan}), seeds=2, folder=tmp_path)


# what is registered, and the command line

@pytest.fixture
def toys(monkeypatch):
    monkeypatch.setattr(claims, "found", {"toy": TOY})


def run(folder, *arguments):
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["rlworkbench", *arguments]
    try:
        with chdir(folder), redirect_stdout(out), redirect_stderr(err):
            main()
    except SystemExit as e:
        return e.code or 0, out.getvalue(), err.getvalue()
    finally:
        sys.argv = argv


def test_the_command(tmp_path, toys):
    code, out, _ = run(tmp_path, "list", "claims")
    assert code == 0 and "not run yet" in out
    code, out, err = run(tmp_path, "reproduce", "toy", "--out", "kept.json", "--json")
    assert (code, err) == (0, "")
    result = json.loads(out.splitlines()[-1])
    assert result["seeds"] == list(range(8)) and result == json.loads((tmp_path / "kept.json").read_text())
    assert len(list((tmp_path / "runs/claims/toy").glob("*.json"))) == 17
    assert json.loads(run(tmp_path, "list", "claims", "--json")[1].splitlines()[-1])["toy"]["verdict"] == result["verdict"]
    code, out, _ = run(tmp_path, "reproduce", "toy", "--steps", "2", "--seeds", "2")
    assert code == 0 and "a pilot: 2 of 8 seeds, 2 steps" in out
    assert json.loads((tmp_path / "runs/claims/toy/result.json").read_text()) == result


@pytest.mark.parametrize("arguments,says", [
    (("toi",), "unknown claim 'toi'; did you mean toy?"), (("toy", "--seeds", "1"), "seeds must be 2 or more, got 1"),
    (("toy", "--jobs", "0"), "jobs must be 1 or more, got 0"), (("toy", "--steps", "0"), "steps must be 1 or more, got 0"),
    (("toy", "--out", "none/kept.json"), "there is no folder none"),
])
def test_bad_input_is_one_sentence(tmp_path, toys, arguments, says):
    code, out, err = run(tmp_path, "reproduce", *arguments)
    assert code == 2 and says in err and len(err.strip().splitlines()) == 1
    assert not any(tmp_path.iterdir())


RESULTS = sorted((Path(__file__).parents[1] / "nbs" / "claims" / "results").glob("*.json"))


@pytest.mark.parametrize("file", RESULTS, ids=lambda f: f.stem)
def test_a_published_result_is_of_the_claim_as_it_stands(file):
    """Arms, margins and seeds are those of the code; the verdict follows from the values."""
    result, claim = json.loads(file.read_text()), claims.get(file.stem)
    assert len(result["seeds"]) >= claim.seeds
    again = assess(claim, result["values"])
    for part in ("comparisons", "controls"):
        assert [(c["says"], c["verdict"]) for c in again[part]] == [(c["says"], c["verdict"]) for c in result[part]]
    assert (again["verdict"], again["why"]) == (result["verdict"], result["why"])
    for name, arm in claim.arms.items():
        if isinstance(arm, Asked):
            assert result["arms"][name] == arm.told()
            continue
        said, slots = result["arms"][name]["recipe"], work.show(arm.method())["is"].to_dict()
        assert said == {k: v for k, v in slots.items() if k in said or (k, v) != ("told", "as_written")}      # a slot of lessons that came later
        config = Config(**result["arms"][name]["config"])      # what a result does not say yet is at its default; the temperature stands in the recipe's law, compared above
        assert replace(config, temperature=None) == replace(arm.config, temperature=None)
