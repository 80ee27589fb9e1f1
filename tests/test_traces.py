"""Traces: whatever is written comes back, whatever is foreign is read as its engine laid it out, whatever is broken is refused in one sentence."""
import base64
import json
import random
import struct
import warnings
import zlib
from dataclasses import replace

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from rlworkbench.core.formats import from_record, read_traces, to_record, write_traces
from rlworkbench.core.imports import open_traces, read_prime, read_run, read_trl
from rlworkbench.core.messages import from_messages, to_messages
from rlworkbench.core.pictures import picture_of, png_bytes
from rlworkbench.core.protocol import adp_faults, from_adp, to_adp
from rlworkbench.core.step import ORIGINS, SEGMENTS
from rlworkbench.core.trace import Trace

torch.set_num_threads(1)
NOISE = Image.frombytes("RGB", (9, 7), random.Random(0).randbytes(9 * 7 * 3))
PIECES = st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", "<obs", "erve>", " 7", "é", "数", "🧮", "\n", "", '"', "\\", "\x00", "a" * 50]) | st.text(
    alphabet=st.characters(exclude_categories=["Cs"]), max_size=4)
quick = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def traces(draw, depth=1):
    n = draw(st.integers(0, 6))
    def each(x):
        return draw(st.lists(x, min_size=n, max_size=n))
    number = st.none() | st.floats(allow_nan=False)
    t = Trace(draw(PIECES), draw(PIECES), draw(st.sampled_from([(), (NOISE,), (NOISE, NOISE.convert("L"))])) if depth else (), each(PIECES),
              draw(st.sampled_from([[], [10 ** 12 + i for i in range(n)]])), text=draw(st.none() | PIECES), segment=draw(st.sampled_from([None, 1])) and each(st.sampled_from(SEGMENTS)),
              origin=each(st.sampled_from(ORIGINS)), columns={k: each(number) for k in draw(st.sets(PIECES, max_size=2))},
              top=each(st.none() | st.lists(st.tuples(st.integers(0, 99), PIECES, st.floats(max_value=0)), max_size=3)) if draw(st.booleans()) else None,
              parts=draw(st.dictionaries(PIECES, number, max_size=2)), correct=draw(st.none() | st.sampled_from([0., .5, 1.])), answer=draw(PIECES),
              outcome=draw(st.sampled_from(["ok", "truncated", "unknown", "refused: kein Budget ✗"])), unseen=draw(st.integers(0, 5)), source={"step": draw(st.integers())})
    grown = draw(st.lists(traces(depth=0), max_size=2)) if depth else []
    t.branches = [replace(b, at=draw(st.integers(0, n)), why=draw(PIECES)) for b in grown]
    return t


@quick
@given(st.lists(traces(), min_size=1, max_size=3), st.sampled_from(["t.jsonl", "t.parquet"]))
def test_files_give_back_what_was_written(tmp_path, written, name):
    write_traces(written, tmp_path / name)
    assert read_traces(tmp_path / name) == written
    assert open_traces(tmp_path / name) == written


@quick
@given(traces())
def test_conversations_give_back_what_was_written(trace):
    """Through JSON, and with a schema that has nothing to complain of."""
    assert from_messages(json.loads(json.dumps(to_messages(trace)))) == trace
    trajectory = json.loads(json.dumps(to_adp(trace)))
    assert adp_faults(trajectory) == []
    assert from_adp(trajectory) == trace
    bare = from_adp(to_adp(trace, keep=False))
    assert (bare.prompt, bare.images, bare.ids, bare.columns) == (trace.prompt, trace.images, [], {})


def test_equality_sees_a_pixel_and_a_number():
    """The round trips above compare with ==, so == must tell traces apart."""
    t = Trace("t", images=(NOISE,), pieces=["a"], columns={"entropy": [.5]}, branches=[Trace("b", pieces=["x"], at=1)])
    other = NOISE.copy()
    other.putpixel((0, 0), tuple(255 - c for c in NOISE.getpixel((0, 0))))
    assert t == from_record(to_record(t))
    assert t != replace(t, images=(other,))
    assert t != replace(t, columns={"entropy": [.25]})
    assert t != replace(t, branches=[Trace("b", pieces=["y"], at=1)])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK", "YCbCr", "F"])
def test_pictures_of_every_mode(mode):
    back = picture_of(png_bytes(NOISE.convert("L").convert(mode) if mode == "I;16" else NOISE.convert(mode)))
    assert back.size == (9, 7)
    assert back.mode == (mode if mode not in ("CMYK", "YCbCr", "F") else "RGB")


def test_the_parquet_is_readable_without_this_package(tmp_path):
    write_traces([Trace("a", "3 + 4?", (NOISE,), ["7", ""], [18, 1], columns={"entropy": [.5, None]}), Trace("b")], tmp_path / "t.parquet")
    table = pd.read_parquet(tmp_path / "t.parquet")
    assert table["id"].tolist() == ["a", "b"]
    assert table["pieces"][0].tolist() == ["7", ""]
    assert table["ids"][0].tolist() == [18, 1]
    assert table["column:entropy"][0][0] == .5
    assert table["images"][0][0][:4] == b"\x89PNG"
    assert table["column:entropy"][1] is None


def trl_table():
    """What GRPOTrainer.log writes: step, prompt, completion, rewards by function, extras, advantage."""
    return pd.DataFrame({"step": [5, 5, 5, 5], "prompt": ["<|im_start|>user\n2+2?"] * 2 + ["3+3?"] * 2,
                         "completion": ["<think>2+2</think> 4", "vier ✓", "", "6"], "accuracy_reward": [1., 0., 0., float("nan")],
                         "length": [.25, .5, 0., 1.], "gold": ["4", "4", "6", None], "advantage": [.5, -.5, -1., 1.]})


def test_trl(tmp_path):
    folder = tmp_path / "completions"
    folder.mkdir()
    for step in (10, 5):
        trl_table().assign(step=step).to_parquet(folder / f"completions_{step:05d}.parquet")
    found = open_traces(tmp_path)
    assert found == read_trl(folder)
    assert [t.source["step"] for t in found] == [5] * 4 + [10] * 4
    first, second, third, fourth = found[:4]
    assert first.prompt == "<|im_start|>user\n2+2?"
    assert [t.text for t in found[:4]] == ["<think>2+2</think> 4", "vier ✓", "", "6"]
    assert first.parts == {"accuracy_reward": 1., "length": .25}
    assert fourth.parts == {"accuracy_reward": None, "length": 1.}
    assert [t.meta for t in (first, fourth)] == [{"gold": "4", "advantage": .5}, {"gold": None, "advantage": 1.}]
    assert [t.source["group"] for t in found] == [0, 0, 1, 1] * 2
    assert first.segment == ["think"] * 3 + ["other"]
    assert first.column("advantage") == [.5] * 4
    assert (first.unit, first.ids, first.correct, first.outcome) == ("words", [], None, "unknown")
    assert (len(third), third.columns) == (0, {"advantage": []})


def test_trl_conversational(tmp_path):
    """Lists of messages instead of texts, which parquet holds as lists of structs."""
    table = pa.table({"step": [1], "prompt": [[{"role": "user", "content": "2+2?"}]], "completion": [[{"role": "assistant", "content": "4"}]], "r": [1.]})
    pq.write_table(table, tmp_path / "completions_00001.parquet")
    trace, = read_trl(tmp_path)
    assert (trace.prompt, trace.text, trace.parts) == ("2+2?", "4", {"r": 1.})


@pytest.mark.parametrize("column, values, said", [("step", ["now"] * 4, "the step 'now' is no whole number"), ("step", [[1]] * 4, "is no whole number"),
                                                  ("completion", [1, 2, 3, 4], "neither text nor messages"), ("prompt", [["x"]] * 4, "neither text nor messages")])
def test_trl_tables_of_another_kind(tmp_path, column, values, said):
    trl_table().assign(**{column: values}).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(ValueError, match=rf"t\.parquet, row 1: .*{said}"):
        open_traces(tmp_path / "t.parquet")


@pytest.mark.parametrize("column, value", [("token", "x"), ("step", "x"), ("reply", "x"), ("origin", "oracle"), ("piece", 3)])
def test_recorded_steps_of_another_kind(tmp_path, column, value):
    row = {"step": [1], "item": "a", "group": 0, "reply": 0, "position": 0, "token": 5, "piece": "x", "origin": "policy", "entropy": .5}
    pd.DataFrame(row).to_parquet(tmp_path / "t.parquet")
    assert [(t.ids, t.columns) for t in open_traces(tmp_path / "t.parquet")] == [([5], {"entropy": [.5]})]
    pd.DataFrame(row | {column: [value]}).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(ValueError, match=r"t\.parquet holds no recorded steps"):
        open_traces(tmp_path / "t.parquet")


def prime_line(**other):
    """One record of prime-rl's TokenExporter, schema version 1: prompt 11 12, then a turn, a tool's answer, a turn."""
    n = 6
    return {"schema_version": 1, "step": 7, "export_step": 7, "rank": 1, "micro_step": 0, "micro_sequence_idx": 3, "export_sequence_idx": 4, "run_id": None,
            "env_name": "gsm8k", "token_ids": [11, 12, 7, 8, 9, 1], "position_ids": list(range(n)), "loss_mask": [False, False, True, True, False, True],
            "advantages": [0., 0., .5, .5, 0., .5], "losses": [{}] * n, "rewards": [1.] * n, "inference_logprobs": [0., 0., -1., -2., 0., -.5],
            "trainer_logprobs": [None, -3., -1.5, -1.75, -2., -.5], "entropy": [2., 2., .5, 1., 1., .25], "mismatch_kl": [None, None, .125, .25, None, 0.],
            "log_importance_ratio": [None, None, -.5, .25, None, 0.], "importance_ratio": [None, None, .625, 1.25, None, 1.],
            "prob_delta": [0.] * n, "is_masked": [False, False, True, True, False, False], "is_masked_high": [False, False, False, True, False, False],
            "is_masked_low": [False, False, True, False, False, False]} | other


def test_prime(tmp_path):
    for step, rank in ((10, 0), (9, 1), (9, 0)):
        folder = tmp_path / "token_exports" / f"step_{step}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"rank_{rank}.jsonl").write_text((json.dumps(prime_line(step=step, rank=rank), separators=(",", ":")) + "\n") * 2)
    found = open_traces(tmp_path, piece=lambda i: {7: "<answer>", 8: "4", 9: "!"}.get(i, ""))
    assert [(t.source["step"], t.source["rank"]) for t in found] == [(9, 0)] * 2 + [(9, 1)] * 2 + [(10, 0)] * 2
    t = found[0]
    assert (t.ids, t.meta["prompt_ids"], t.text, t.prompt) == ([7, 8, 9, 1], [11, 12], "<answer>4!", "")
    assert t.origin == ["policy", "policy", "given", "policy"]
    assert t.column("logp") == [-1.5, -1.75, -2., -.5]
    assert t.column("old") == [-1., -2., 0., -.5]
    assert t.column("ratio") == [.625, 1.25, None, 1.]
    assert t.column("mismatch_kl") == [.125, .25, None, 0.]
    assert t.column("clipped") == [-1., 1., 0., 0.]
    assert t.column("reward") == [1.] * 4
    assert t.source == {"engine": "prime-rl", "decoded": True, "step": 9, "export_step": 7, "rank": 0, "env_name": "gsm8k"}
    assert "run_id" not in t.source and "losses" not in t.columns


def test_prime_without_texts_has_none(tmp_path):
    (tmp_path / "rank_0.jsonl").write_text(json.dumps(prime_line()))
    t, = read_prime(tmp_path / "rank_0.jsonl")
    assert (t.text, t.prompt, t.pieces, t.unit) == ("", "", ["[7]", "[8]", "[9]", "[1]"], "tokens")
    with pytest.raises(ValueError, match="has token numbers but no text"):
        to_messages(t)
    write_traces([t], tmp_path / "t.parquet")
    assert open_traces(tmp_path / "t.parquet") == [t]


def test_a_run_of_ours(tmp_path):
    """A step that the trainer recorded, against the Step itself."""
    from rlworkbench.policies.families import small_qwen
    from rlworkbench.recipes.recipe import Recipe
    from rlworkbench.recipes.slots import Group
    from rlworkbench.rollouts.sampling import Sampling
    from rlworkbench.tasks.digits import digits_sum
    from rlworkbench.training.run import Config, Run
    from rlworkbench.training.trainer import Trainer
    policy = small_qwen()
    step = Trainer(policy, digits_sum, Recipe("grpo", rollout=Group(Sampling(max_tokens=5))), prompts=2, group=2).step()
    run = Run.create(tmp_path / "run", Config())
    run.record(policy, step)
    found = open_traces(tmp_path / "run", prompts={i.id: i.prompt for i in step.items})
    assert found == read_run(tmp_path / "run", {i.id: i.prompt for i in step.items})
    assert len(found) == 4
    for n, t in enumerate(found):
        length, item = int(step.length[n]), step.items[int(step.group[n])]
        assert t.ids == step.ids[n, :length].tolist()
        assert t.column("entropy") == pytest.approx(step.entropy[n, :length].tolist())
        assert t.column("advantage") == pytest.approx([float(step.advantage[n])] * length)
        assert (t.prompt, t.correct, t.source["group"]) == (item.prompt, float(step.correct[n]), int(step.group[n]))
        assert [p.tobytes() for p in t.images] == [p.tobytes() for p in item.images]
        assert t.segment == [SEGMENTS[s] for s in step.segment[n, :length].tolist()]
    one, = (tmp_path / "run" / "steps").glob("*.parquet")
    assert [t.ids for t in open_traces(one)] == [t.ids for t in found]
    assert open_traces(one)[0].images == found[0].images


def bomb(side=60_000):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")).decode()


def asking(picture):
    seen = {"class_": "image_observation", "content": picture, "source": "user"}
    return {"trace": {"trace": 1, "id": "a", "images": [picture]},
            "messages": {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": picture}}]}]},
            "trajectory": {"id": "a", "content": [seen]},
            "web": {"id": "a", "content": [{"class_": "web_observation", "image_observation": {"content": picture, "source": "user"}}]}}


@pytest.mark.parametrize("side", [4097, 9_000, 60_000])
@pytest.mark.parametrize("form", ["trace", "messages", "trajectory", "web"])
def test_bombs_are_refused_before_they_are_decoded(tmp_path, form, side):
    (tmp_path / "f.json").write_text(json.dumps(asking(bomb(side))[form]))
    with warnings.catch_warnings(), pytest.raises(ValueError, match=r"f\.json.* at most 16777216 are read"):
        warnings.simplefilter("ignore")
        open_traces(tmp_path / "f.json")


@pytest.mark.parametrize("form", ["messages", "trajectory", "web"])
@pytest.mark.parametrize("reference", ["../secret.png", "ABSOLUTE", "link.png", "http://127.0.0.1:9/x.png", "file:///etc/passwd"])
def test_pictures_are_read_beside_the_file_and_nowhere_else(tmp_path, form, reference):
    beside = tmp_path / "beside"
    beside.mkdir()
    NOISE.save(tmp_path / "secret.png")
    NOISE.save(beside / "open.png")
    (beside / "link.png").symlink_to(tmp_path / "secret.png")
    reference = str(tmp_path / "secret.png") if reference == "ABSOLUTE" else reference
    for picture, images in (("open.png", (NOISE,)), (reference, ())):
        (beside / "f.json").write_text(json.dumps(asking(picture)[form]))
        trace, = open_traces(beside / "f.json")
        assert trace.images == images
        assert trace.meta.get("pictures", []) == ([] if images else [reference])


BROKEN = {"empty": b"", "blank": b"\n \n", "no text": b"\xff\xfe\x00{", "no JSON": b"hello", "half a line": b'{"trace": 1, "id": "a"}\n{"trace": 1, "i',
          "a number": b"17", "nothing known": b'{"x": 1}', "deep": b"[" * 200_000, "newer": b'{"trace": 2, "id": "a"}', "no id": b'{"trace": 1}',
          "wrong kind": b'{"trace": 1, "id": "a", "pieces": [1, 2]}', "wrong column": b'{"trace": 1, "id": "a", "pieces": ["x"], "columns": {"e": ["y"]}}',
          "wrong top": b'{"trace": 1, "id": "a", "pieces": ["x"], "top": [[[1]]]}', "wrong ids": b'{"trace": 1, "id": "a", "pieces": ["x"], "ids": ["y"]}',
          "short": b'{"trace": 1, "id": "a", "pieces": ["x"], "ids": [1, 2]}', "branch": b'{"trace": 1, "id": "a", "branches": [3]}',
          "message": b'{"messages": [{"role": 1}]}', "messages": b'{"messages": 3}', "trajectory": b'{"id": "a", "content": [{"class_": "x"}]}',
          "prime": b'{"token_ids": [1], "loss_mask": [true, false]}', "prime losses": b'{"token_ids": [1], "loss_mask": [true], "losses": [3]}',
          "prime version": b'{"schema_version": 3, "token_ids": [1], "loss_mask": [true]}', "only the mark": b"PAR1", "half parquet": b"PAR1" + b"x" * 99 + b"PAR1",
          "nested branches": b'{"trace": 1, "id": "a", "branches": [' * 400 + b"]}" * 400,
          "not base64": b'{"trace": 1, "id": "a", "images": ["data:image/png;base64,_"]}', "no picture": b'{"trace": 1, "id": "a", "images": ["data:image/png;base64,AAAA"]}'}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
def test_broken_files_are_refused_in_one_sentence(tmp_path, content):
    file = tmp_path / "f.any"
    file.write_bytes(content)
    with pytest.raises(ValueError) as refused:
        open_traces(file)
    said = str(refused.value)
    assert "f.any" in said and "\n" not in said and len(said) < 400


def test_the_line_is_named(tmp_path):
    file = tmp_path / "f.jsonl"
    file.write_text('{"trace": 1, "id": "a"}\n\n{"trace": 1, "id": "b", "outcome": "lost"}\n')
    with pytest.raises(ValueError, match=r"f\.jsonl, line 3: trace 'b': unknown outcome 'lost'"):
        open_traces(file)


@pytest.mark.parametrize("seed", range(30))
def test_damaged_parquet_is_refused_or_read_but_never_worse(tmp_path, seed):
    """Bits flip in a file: an error in one sentence, or traces; no other exception."""
    rng = random.Random(seed)
    file = tmp_path / "t.parquet"
    write_traces([Trace(f"t{i}", "?", (NOISE,), ["a", "b"], [1, 2], columns={"entropy": [.5, None]}) for i in range(3)], file)
    data = bytearray(file.read_bytes())
    if seed % 2:
        data = data[:rng.randrange(4, len(data))]
    else:
        for _ in range(3):
            data[rng.randrange(4, len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)
    try:
        found = open_traces(file)
    except ValueError as e:
        assert "t.parquet" in str(e) and "\n" not in str(e)
    else:
        assert seed % 2 == 0 and all(isinstance(t, Trace) for t in found)


GOOD = {"schema_version": "1.5.0", "id": "a", "details": {"x": 1}, "available_code_languages": ["python"], "content": [
    {"class_": "text_observation", "content": "Plot it.", "name": None, "source": "user"},
    {"class_": "code_action", "language": "python", "content": "plot()", "description": None, "tool_call_id": "c1", "reward": .5},
    {"class_": "web_observation", "html": None, "axtree": "a plot", "url": "http://a", "image_observation": None, "viewport_size": [10, 10], "tool_call_id": "c1"},
    {"class_": "message_action", "content": "Done.", "description": "as asked"}]}


def test_trajectories_of_others_go_out_as_they_came(tmp_path):
    (tmp_path / "sample_std.json").write_text(json.dumps([GOOD, GOOD | {"id": "b"}], indent=2))
    first, second = open_traces(tmp_path / "sample_std.json")
    assert to_adp(first, keep=False) == GOOD
    assert from_adp(to_adp(second)) == second
    assert first.text == "```python\nplot()\n```a plotas asked\nDone."
    assert {w for w, _, _ in first.spans("origin")} == {"policy", "tool"}
    assert first.parts == {"reward": .5}


@quick
@given(st.data())
def test_spoiled_trajectories_are_refused(data):
    """Any one field of another kind, missing or too many is a fault; the validator never raises."""
    bad = json.loads(json.dumps(GOOD))
    place = data.draw(st.sampled_from([bad, *bad["content"]]))
    optional = {"schema_version", "details", "name", "description", "reward", "available_code_languages", "html", "axtree", "url", "image_observation", "viewport_size"}
    key = data.draw(st.sampled_from(sorted(place)))
    how = data.draw(st.sampled_from(["kind", "gone", "extra"] if key not in optional else ["kind", "extra"]))
    if how == "gone":
        place.pop(key)
    else:
        place[key if how == "kind" else "surplus"] = data.draw(st.sampled_from([True, {3}, object()]))
    assert adp_faults(GOOD) == []
    assert adp_faults(bad)
    with pytest.raises(ValueError, match="no trajectory of the Agent Data Protocol"):
        from_adp(bad)


@pytest.mark.parametrize("junk", [None, 3, "x", [], {}, {"id": None}, {"id": "a", "content": None}, {"id": "a", "content": [None]}, {"id": "a", "content": [[]]},
                                  {"id": "a", "content": [], "schema_version": 1}, {"id": "a", "content": [], "details": []},
                                  {"id": "a", "content": [{"class_": ["text_observation"]}]}, {"id": "a", "content": [{"class_": "trajectory"}]}])
def test_the_validator_survives_anything(junk):
    assert adp_faults(junk) and all(isinstance(f, str) for f in adp_faults(junk))
