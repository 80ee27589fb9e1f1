"""The benchmarks' own machinery: intervals, aims and when they are met, the page that is committed, and what the runner refuses."""
import json
import re
import subprocess
import sys

import numpy as np
import pytest

from tests.benchmarks.__main__ import BENCHMARKS, file_of, main
from tests.benchmarks.bars import BARS, Bar, case, number, ratio
from tests.benchmarks.binds import counted_as
from tests.benchmarks.learning import ratio as ratio_of_means
from tests.benchmarks.measure import in_turn, interval, machine
from tests.benchmarks.page import OUT, RESULTS, judged, page, read
from tests.benchmarks.scaling import slope

def test_the_page_is_that_of_the_results():
    assert OUT.read_text() == page(read()), "make it again: python -m tests.benchmarks --page"


def test_the_page_needs_nothing_but_itself():
    text = OUT.read_text()
    assert not re.search(r"<script|src=|href=|url\(|@import", text) and len(text) < 400_000
    assert machine()["processor"] not in ("", "x86_64") and "prefers-color-scheme:dark" in text


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.json")), ids=lambda f: f.stem)
def test_a_result_says_when_where_and_with_what(file):
    result = json.loads(file.read_text())
    assert result["name"] in BENCHMARKS and file_of(result["name"]) == file
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", result["date"]) and result["machine"]["threads"] == 1 and "torch" in result["versions"] and result["found"]


def test_each_aim_is_of_a_benchmark_and_every_result_can_be_read():
    assert {bar.benchmark for bar in BARS} <= set(BENCHMARKS)
    there = read()
    assert all(value is not None for bar, value, *_ in judged(there) if bar.benchmark in there)


@pytest.mark.parametrize("bar,found,met", [
    (Bar("x", "", "", ratio(), least=2), {"ratio": 2.1, "ratio_low": 1.5, "ratio_high": 3}, True), (Bar("x", "", "", ratio(), least=2), {"ratio": 1.9, "ratio_min": 1.5, "ratio_max": 3}, False),
    (Bar("x", "", "", ratio(), most=2), {"ratio": 2.1}, False), (Bar("x", "", "", number("a", "b"), most=2), {"a": {"b": 2}}, True),
    (Bar("x", "", "", ratio(), least=.9, most=1.1), {"ratio": 1, "ratio_low": .95, "ratio_high": 1.05}, True),
    (Bar("x", "", "", ratio(), least=.9, most=1.1), {"ratio": 1, "ratio_low": .85, "ratio_high": 1.05}, False),
])
def test_when_an_aim_is_met(bar, found, met):
    assert bar.met(found) is met


@pytest.mark.parametrize("low, high, sure", [(2.1, 3, True), (1.9, 3, False), (None, None, True)])
def test_an_aim_is_met_beyond_doubt_where_the_whole_interval_says_so(low, high, sure):
    assert Bar("x", "", "", lambda f: (2.5, low, high), least=2).sure({}) is sure


@pytest.mark.parametrize("lean, value", [(3.0, (2.0, 1.9, 2.2)), (1.5, (1.5, None, None))])
def test_each_side_is_taken_at_its_faster_micro_batch(lean, value):
    found = {"ours": {"seconds": 1.0}, "ours, lean": {"seconds": 1.4}, "trl": {"seconds": 2.0, "ratio": 2.0, "ratio_min": 1.9, "ratio_max": 2.2}, "trl, lean": {"seconds": lean}}
    assert case("words")({"words": found}) == value


def test_every_function_of_a_step_is_counted_once():
    names = ("<built-in method torch._C._nn.linear>", "<method 'run_backward' of 'torch._C._EngineBase' objects>", "<built-in method torch.multinomial>", "<method 'softmax' of 'torch._C.TensorBase' objects>",
             "<built-in method torch._C._nn.scaled_dot_product_attention>", "<method 'pow' of 'torch._C.TensorBase' objects>", "<built-in method builtins.any>")
    assert [counted_as(n) for n in names] == ["matrix products", "way back", "drawing", "softmax and its like", "attention", "other tensor operations", "Python and the rest"]


def test_the_interval_covers_the_median():
    """Five ratios around 2, five hundred times: the interval holds the true median nearly as often as a bootstrap of five can."""
    rng = np.random.default_rng(0)
    held = [low <= 2 <= high for low, high in (interval(sorted(rng.normal(2, .2, 5)), 400) for _ in range(300))]
    assert .85 < np.mean(held) <= 1
    assert interval([3.0] * 5) == (3.0, 3.0)


def test_two_ways_in_turn():
    order = []
    found = in_turn(lambda: order.append("a"), lambda: order.append("b"), repeats=3)
    assert "".join(order) == "ab" + "ab" + "ba" + "ab" and found["ratio_min"] <= found["ratio"] <= found["ratio_max"]


def test_ratios_of_means_and_slopes():
    middle, low, high = ratio_of_means([1, 2, 4], [2, 4, 8])
    assert (middle, low, high) == pytest.approx((2, 2, 2))
    assert slope((1, 2, 4, 8), (3, 12, 48, 192)) == pytest.approx(2)


def test_an_unknown_benchmark_is_refused(capsys):
    assert main(["heda"]) == 2 and capsys.readouterr().err.startswith("unknown benchmark 'heda'; known: whole step")


def test_a_benchmark_runs_in_a_process_of_its_own(tmp_path):
    subprocess.run([sys.executable, "-m", "tests.benchmarks", "--inside", "startup", str(tmp_path / "out.json")], check=True)
    told = json.loads((tmp_path / "out.json").read_text())
    assert set(told) == {"found", "cpu_seconds", "wall_seconds", "megabytes"} and told["found"]["import"] > 0
