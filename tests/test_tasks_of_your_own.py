"""Files of a user's own, generators of others, drawn scenes: bad input is told in one sentence, good input gives the same items in every form."""
import io
import json
import struct
import warnings
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rlworkbench.core.registry import tasks
from rlworkbench.policies.tiny import tiny_processor
from rlworkbench.tasks.digits import draw_digits
from rlworkbench.tasks.files import LARGEST
from rlworkbench.tasks.own import jsonl
from rlworkbench.tasks.scenes import scenes_box, scenes_count, scenes_odd, scenes_relation
from rlworkbench.tasks.task import SPLITS, validate
from rlworkbench.tasks.verifiers import VERIFIERS, verifier

SCENES = (scenes_count, scenes_relation, scenes_odd, scenes_box)
GOOD = {"prompt": "What is 1+1?", "answer": "2"}


def png(side=8, colour="red", mode="RGB") -> bytes:
    out = io.BytesIO()
    Image.new(mode, (side, side), colour).save(out, "PNG")
    return out.getvalue()


def bomb(width, height) -> bytes:
    "A PNG of a few bytes whose header promises any size."
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def lines(*rows) -> bytes:
    return "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows).encode()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "red.png").write_bytes(png())
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "page.svg").write_text("<svg/>")
    (tmp_path / "bomb.png").write_bytes(bomb(100_000, 100_000))
    (tmp_path / "large.png").write_bytes(bomb(9_000, 8_000))
    (tmp_path / "cells").mkdir()
    return tmp_path


BAD = {                     # the file's bytes, options, what the sentence names
    "broken JSON": (lines(GOOD, '{"prompt": "x", "answer":'), "", ("x.jsonl, line 2", "is not JSON")),
    "torn in the middle": (lines('{"prompt": "x", "ans', GOOD), "", ("x.jsonl, line 1", "is not JSON")),
    "JSON that is a list": (lines(GOOD, GOOD, '["a", "b"]'), "", ("x.jsonl, line 3", "list")),
    "JSON that is a number": (lines("3", GOOD), "", ("x.jsonl, line 1", "is a number")),
    "one list for the whole file": (json.dumps([GOOD, GOOD]).encode(), "", ("x.jsonl, line 1", "list")),
    "deep JSON": (lines(GOOD, "[" * 100_000), "", ("x.jsonl, line 2", "is not JSON")),
    "a number of many digits": (lines(GOOD, '{"prompt": "x", "answer": ' + "9" * 5000 + "}"), "", ("x.jsonl, line 2", "is not JSON")),
    "wrong column": (lines({"question": "x", "answer": "2"}), "", ("x.jsonl", "'prompt'", "question, answer")),
    "wrong answer column": (lines({"prompt": "x", "gold": "2"}), "", ("x.jsonl", "'answer'", "prompt, gold")),
    "named column missing": (lines(GOOD), ",prompt=question", ("x.jsonl", "'question'", "prompt, answer")),
    "picture column missing": (lines(GOOD), ",images=figure", ("x.jsonl", "'figure'", "prompt, answer")),
    "column missing in one row": (lines(GOOD, {"prompt": "x"}), "", ("x.jsonl, line 2", "'answer'", "missing")),
    "null prompt": (lines(GOOD, {"prompt": None, "answer": "2"}), "", ("x.jsonl, line 2", "'prompt'", "missing")),
    "empty file": (b"", "", ("x.jsonl", "has no rows")),
    "only blank lines": (b"\n  \n\n", "", ("x.jsonl", "has no rows")),
    "prompt is a list": (lines({"prompt": ["x"], "answer": "2"}), "", ("x.jsonl, line 1", "'prompt'", "is a list, not text")),
    "prompt is blank": (lines({"prompt": "  ", "answer": "2"}), "", ("x.jsonl, line 1", "'prompt'", "is empty")),
    "answer is an object": (lines({"prompt": "x", "answer": {}}), "", ("x.jsonl, line 1", "'answer'", "is an object")),
    "answer is true": (lines({"prompt": "x", "answer": True}), "", ("x.jsonl, line 1", "'answer'", "true or false")),
    "answer is empty": (lines({"prompt": "x", "answer": ""}), "", ("x.jsonl, line 1", "'answer'", "is empty")),
    "not UTF-8": (lines(GOOD) + '{"prompt": "süß", "answer": "2"}'.encode("latin-1"), "", ("x.jsonl, line 2", "is not UTF-8")),
    "UTF-16": (lines(GOOD).decode().encode("utf-16"), "", ("x.jsonl, line 1", "is not UTF-8")),
    "missing picture": (lines(GOOD | {"images": "none.png"}), "", ("x.jsonl, line 1", "'images'", "'none.png'", "No such file")),
    "second picture missing": (lines(GOOD | {"images": ["red.png", "none.png"]}), "", ("x.jsonl, line 1", "'none.png'")),
    "picture is text": (lines(GOOD | {"images": "text.png"}), "", ("x.jsonl, line 1", "'text.png'", "is not a picture")),
    "picture is SVG": (lines(GOOD | {"images": "page.svg"}), "", ("x.jsonl, line 1", "'page.svg'", "PNG, JPEG")),
    "picture is a folder": (lines(GOOD | {"images": "cells"}), "", ("x.jsonl, line 1", "'cells'", "Is a directory")),
    "picture is a bomb": (lines(GOOD | {"images": "bomb.png"}), "", ("x.jsonl, line 1", "'bomb.png'", "100000 x 100000 pixels")),
    "picture is too large": (lines(GOOD | {"images": "large.png"}), "", ("x.jsonl, line 1", "'large.png'", "9000 x 8000 pixels")),
    "picture is an address": (lines(GOOD | {"images": "https://example.org/a.png"}), "", ("x.jsonl, line 1", "'https://example.org/a.png'")),
    "picture is a number": (lines(GOOD | {"images": 3}), "", ("x.jsonl, line 1", "'images'", "is a number, not a path")),
    "picture path has a null": (lines(GOOD | {"images": "a\0b"}), "", ("x.jsonl, line 1", "'images'", "null")),
    "more marks than pictures": (lines(GOOD | {"prompt": "<image> and <image>?", "images": "red.png"}), "", ("x.jsonl, line 1", "2 marks <image>")),
    "a mark and no picture": (lines(GOOD | {"prompt": "<image>?"}), "", ("x.jsonl, line 1", "'prompt'", "1 marks <image>")),
    "gold is no number": (lines(GOOD, {"prompt": "x", "answer": "abc"}), ",verifier=numeric", ("x.jsonl, line 2", "'answer'", "'abc' is not a number")),
    "gold is no letter": (lines({"prompt": "x", "answer": "Paris"}), ",verifier=choice", ("x.jsonl, line 1", "'Paris' is not a letter from A to H")),
    "gold is no formula": (lines({"prompt": "x", "answer": "Paris"}), ",verifier=math", ("x.jsonl, line 1", "'answer'", "contains a word")),
    "broken pattern": (lines({"prompt": "x", "answer": "(a"}), ",verifier=regex", ("x.jsonl, line 1", "'answer'", "is not a pattern")),
    "pattern that everything fits": (lines({"prompt": "x", "answer": ".*"}), ",verifier=regex", ("x.jsonl, line 1", "everything fits")),
    "gold can't be found again": (lines({"prompt": "x", "answer": "Paris"}), ",extract=last-number", ("x.jsonl, line 1", "can't be found again")),
    "unknown verifier in a row": (lines(GOOD | {"verifier": "fuzzy"}), "", ("x.jsonl, line 1", "'verifier'", "unknown verifier 'fuzzy'")),
    "duplicate id": (lines(GOOD | {"id": "a"}, GOOD | {"id": "b"}, GOOD | {"id": "a"}), "", ("x.jsonl, line 3", "'id'", "'a' occurs twice, first in line 1")),
    "id meets a line's number": (lines(GOOD | {"id": "2"}, GOOD), "", ("x.jsonl, line 2", "'id'", "'2' occurs twice")),
    "bad split": (lines(GOOD | {"split": "dev"}), "", ("x.jsonl, line 1", "'split'", "'dev'", "train, validation or test")),
    "split for some rows": (lines(GOOD | {"split": "test"}, GOOD), "", ("x.jsonl, line 2", "'split'", "is missing")),
    "level is a word": (lines(GOOD | {"level": "hard"}), "", ("x.jsonl, line 1", "'level'", "not a whole number")),
    "tags are numbers": (lines(GOOD | {"tags": [1, 2]}), "", ("x.jsonl, line 1", "'tags'")),
    "unknown option": (lines(GOOD), ",lmit=3", ("unknown option 'lmit'", "limit")),
    "option without value": (lines(GOOD), ",limit=", ("limit has no value",)),
    "option without equals": (lines(GOOD), ",limit", ("limit has no value",)),
    "unknown verifier": (lines(GOOD), ",verifier=exakt", ("unknown verifier 'exakt'", "exact")),
    "unknown extraction": (lines(GOOD), ",extract=box", ("unknown extraction 'box'", "boxed")),
    "bad tolerance": (lines(GOOD), ",verifier=numeric:much", ("numeric:much", "must be a number")),
    "negative tolerance": (lines(GOOD), ",verifier=numeric:-1", ("numeric:-1", "0 or more")),
    "limit 0": (lines(GOOD), ",limit=0", ("limit must be a whole number, 1 or more, got '0'",)),
    "limit is a word": (lines(GOOD), ",limit=all", ("limit must be a whole number", "'all'")),
    "max_tokens negative": (lines(GOOD), ",max_tokens=-5", ("max_tokens must be a whole number",)),
}
ELSEWHERE = {               # a name, what the sentence names
    "no file": ("jsonl:gone.jsonl", ("there is no file gone.jsonl",)),
    "nothing after the colon": ("jsonl:", ("jsonl:FILE",)),
    "a folder where a file is wanted": ("jsonl:cells", ("cells is a folder", "wants a file")),
    "a file where a folder is wanted": ("datasets:red.png", ("red.png is a file", "wants a folder")),
    "a folder that is no dataset": ("datasets:cells", ("cells is not a folder that datasets wrote",)),
    "no folder": ("datasets:gone", ("there is no folder gone",)),
    "parquet that is a picture": ("parquet:red.png", ("red.png can't be read as parquet",)),
    "unknown dataset of the gym": ("reasoning-gym:chain_sun", ("unknown reasoning-gym dataset 'chain_sun'", "chain_sum")),
    "no dataset of the gym": ("reasoning-gym:", ("wants a name after the colon",)),
    "nothing like a dataset of the gym": ("reasoning-gym:QQQQ", ("unknown reasoning-gym dataset 'QQQQ'", "in all")),
    "left out of the gym": ("reasoning-gym:rush_hour", ("left out",)),
    "unknown option of the gym": ("reasoning-gym:gcd,max_numbr=3", ("'max_numbr'", "max_numbers")),
    "option of the gym without value": ("reasoning-gym:gcd,max_numbers", ("max_numbers has no value",)),
    "impossible option of the gym": ("reasoning-gym:gcd,min_numbers=9,max_numbers=3", ("gcd", "min_numbers=9")),
    "option of the gym of the wrong kind": ("reasoning-gym:gcd,max_numbers=many", ("gcd", "many")),
    "seed is not the user's": ("reasoning-gym:gcd,seed=3", ("unknown option 'seed'",)),
    "max_tokens of the gym": ("reasoning-gym:gcd,max_tokens=0", ("max_tokens must be a whole number",)),
    "extraction of the gym": ("reasoning-gym:gcd,extract=tags", ("unknown extraction 'tags'", "tag")),
    "unknown source": ("csv:x.csv", ("unknown task 'csv:x.csv'",)),
}


def sentence(name) -> str:
    "What is said when a task is asked for; it must be a ValueError, and nothing may be warned of."
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError) as caught:
            tasks.get(name)
    return str(caught.value)


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_told_in_one_sentence(folder, case):
    content, options, words = BAD[case]
    (folder / "x.jsonl").write_bytes(content)
    said = sentence(f"jsonl:x.jsonl{options}")
    assert [w for w in words if w not in said] == [], said
    assert "\n" not in said and len(said) < 400 and "Error" not in said.replace("SyntaxError", ""), said


@pytest.mark.parametrize("case", ELSEWHERE)
def test_a_bad_name_is_told_in_one_sentence(folder, case):
    name, words = ELSEWHERE[case]
    said = sentence(name)
    assert [w for w in words if w not in said] == [], said
    assert "\n" not in said and len(said) < 500, said


def test_truncated_parquet(folder):
    import pandas as pd
    pd.DataFrame([GOOD] * 50).to_parquet("whole.parquet")
    whole = (folder / "whole.parquet").read_bytes()
    for size in (0, 3, len(whole) // 2, len(whole) - 1):
        (folder / "torn.parquet").write_bytes(whole[:size])
        said = sentence("parquet:torn.parquet")
        assert said.startswith("torn.parquet can't be read as parquet") and "\n" not in said


def test_parquet_with_damaged_bytes_inside(folder):
    import pandas as pd
    pd.DataFrame([{"prompt": f"What is {k}+1?", "answer": str(k + 1)} for k in range(500)]).to_parquet("x.parquet", compression="gzip")
    data = bytearray((folder / "x.parquet").read_bytes())
    data[40:400] = b"\xff" * 360
    (folder / "x.parquet").write_bytes(data)
    assert sentence("parquet:x.parquet").startswith("x.parquet can't be read as parquet")


def test_a_row_of_a_table_is_named(folder):
    import pandas as pd
    pd.DataFrame([GOOD, {"prompt": "x", "answer": "abc"}]).to_parquet("x.parquet")
    assert "x.parquet, row 2, column 'answer': 'abc' is not a number" in sentence("parquet:x.parquet,verifier=numeric")


def test_all_faults_are_listed_and_pixels_are_looked_at(folder):
    (folder / "damaged.png").write_bytes(png(64)[:-40])
    (folder / "x.jsonl").write_bytes(lines(GOOD, GOOD | {"images": "damaged.png"}, "{", {"prompt": 1, "answer": []}))
    found = jsonl.faults("x.jsonl")
    assert [(where, name) for where, name, _ in found] == [("line 2", "images"), ("line 3", ""), ("line 4", "prompt"), ("line 4", "answer")]
    assert "'damaged.png' is damaged" in found[0][2]
    assert "(and 2 more faults: rlworkbench validate jsonl:x.jsonl)" in sentence("jsonl:x.jsonl")


def test_a_damaged_picture_is_named_when_it_is_asked_for(folder):
    (folder / "damaged.png").write_bytes(png(64)[:-40])
    (folder / "x.jsonl").write_bytes(lines(GOOD | {"images": "damaged.png", "split": "train"}))
    with pytest.raises(ValueError, match="the picture damaged.png is damaged"):
        tasks.get("jsonl:x.jsonl").items()[0]


def test_the_cap_is_below_the_one_that_pillow_warns_at():
    assert LARGEST < Image.MAX_IMAGE_PIXELS


def test_an_empty_split_is_told_and_not_validated(folder):
    (folder / "x.jsonl").write_bytes(lines(*(GOOD | {"prompt": f"{k}?", "split": "train"} for k in range(4))))
    task = tasks.get("jsonl:x.jsonl")
    assert task.splits == ("train",) and validate(task) == []
    with pytest.raises(ValueError, match=r"no problem in its split 'test' \(train 4, validation 0, test 0\)"):
        task.items("test")


def test_a_leak_in_the_users_own_split_is_found(folder):
    rows = [GOOD | {"prompt": "What is  1+1?", "split": "train"}, GOOD | {"prompt": "what is 1+1?", "split": "test"}]
    (folder / "x.jsonl").write_bytes(lines(*rows))
    assert "also occurs in train" in validate(tasks.get("jsonl:x.jsonl"))[0][2]


# ---- the same problems in three forms

def twenty():
    "Twenty problems, half of them with one or two pictures, which some share."
    rows = []
    for k in range(20):
        pictures = [] if k % 2 else [draw_digits([k // 4 * 3, k // 4 * 3 + 1])] + ([draw_digits([100 + k])] if k % 3 == 0 else [])
        rows.append({"prompt": f"What is shown in № {k}?", "answer": str(k), "level": k % 3, "tags": ["a", f"t{k % 2}"], "demo": f"<answer>{k}</answer>", "pictures": pictures})
    return rows


def as_bytes(picture) -> bytes:
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def three(folder):
    import pandas as pd
    from datasets import Dataset, Features, List, Value
    from datasets import Image as Feature
    rows, said = twenty(), []
    for k, row in enumerate(rows):
        names = []
        for i, p in enumerate(row["pictures"]):
            (folder / "cells" / f"{k}-{i}.png").write_bytes(as_bytes(p))
            names.append(f"cells/{k}-{i}.png")
        said.append({n: v for n, v in row.items() if n != "pictures"} | {"images": names})
    (folder / "twenty.jsonl").write_bytes(lines(*said))
    inside = [s | {"images": [{"bytes": as_bytes(p), "path": None} for p in r["pictures"]]} for s, r in zip(said, rows)]
    pd.DataFrame(inside).to_parquet("twenty.parquet")
    features = Features({"prompt": Value("string"), "answer": Value("string"), "level": Value("int64"), "tags": List(Value("string")),
                         "demo": Value("string"), "images": List(Feature())})
    Dataset.from_list(inside, features=features).save_to_disk("hugging/twenty")
    return [tasks.get(n + ",max_tokens=9") for n in ("jsonl:twenty.jsonl", "parquet:twenty.parquet", "datasets:hugging/twenty")]


def test_the_same_problems_in_three_forms(three):
    first, *others = three
    assert sum(len(first.rows[s]) for s in SPLITS) == 20
    assert len({t.digest for t in three}) == 3
    for other in others:
        assert other.splits == first.splits and other.max_tokens == 9
        for split in first.splits:
            assert list(other.items(split)) == list(first.items(split))
            assert [i.images[0].mode for i in other.items(split) if i.images] == ["RGB"] * sum(bool(i.images) for i in first.items(split))
    assert all(validate(t) == [] for t in three)


def test_problems_that_share_a_picture_share_a_split(three):
    where = {}
    for split in three[0].splits:
        for item in three[0].items(split):
            for picture in item.images:
                assert where.setdefault(picture.tobytes(), split) == split
    assert len(where) < 14


def test_a_dataset_with_splits(folder):
    from datasets import Dataset, DatasetDict
    DatasetDict({s: Dataset.from_list([{"prompt": f"{s} {k}?", "answer": str(k)} for k in range(3)]) for s in SPLITS}).save_to_disk("parts")
    task = tasks.get("datasets:parts,verifier=numeric")
    assert [[i.prompt for i in task.items(s)] for s in SPLITS] == [[f"{s} {k}?" for k in range(3)] for s in SPLITS]


def test_a_column_called_image_is_taken(folder):
    (folder / "x.jsonl").write_bytes(lines(*(GOOD | {"image": "red.png", "prompt": "<image>\nColour?", "split": s} for s in SPLITS)))
    item = tasks.get("jsonl:x.jsonl").items()[0]
    assert item.prompt == "Colour?" and item.images[0].getpixel((0, 0)) == (255, 0, 0)


def test_limit_suffix_and_columns(folder):
    rows = [{"question": f"{k}?", "gold": k, "split": "train"} for k in range(10)]
    (folder / "a, b.jsonl").write_bytes(b"\xef\xbb\xbf" + lines(*rows))
    task = tasks.get(r"jsonl:a, b.jsonl,prompt=question,answer=gold,limit=3,suffix=\nThink, then answer.,extract=whole,verifier=numeric")
    assert [i.prompt for i in task.items()] == [f"{k}?\nThink, then answer." for k in range(3)]
    assert task.score(task.items()[2], " 2.0 ") == {"correct": 1.0}


def test_a_problem_keeps_its_split_when_the_file_grows(folder):
    rows = [GOOD | {"prompt": f"What is {k}+1?"} for k in range(300)]
    before, after = [], []
    for found, n in ((before, 200), (after, 300)):
        (folder / "x.jsonl").write_bytes(lines(*rows[:n]))
        task = tasks.get("jsonl:x.jsonl")
        found += [{i.prompt: s for s in SPLITS for i in task.items(s)}]
    assert all(after[0][p] == s for p, s in before[0].items())
    assert len(set(after[0].values())) == 3


# ---- round trip

text = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=30).filter(lambda t: t.strip() and "<image>" not in t)
problem = st.fixed_dictionaries({"prompt": text, "answer": text.map(str.strip).filter(bool)},
                                optional={"level": st.integers(0, 9), "tags": st.lists(text, max_size=3), "demo": text, "split": st.just("train")})


@settings(max_examples=150, deadline=None)
@given(rows=st.lists(problem, min_size=1, max_size=8), ascii=st.booleans())
def test_random_problems_survive_the_round_trip(tmp_path_factory, rows, ascii):
    rows = [{**r, "split": "train"} for r in rows]
    path = tmp_path_factory.mktemp("trip") / "x.jsonl"
    path.write_bytes("\n".join(json.dumps(r, ensure_ascii=ascii) for r in rows).encode())
    task = tasks.get(f"jsonl:{path},extract=whole")
    for row, item in zip(rows, task.items(), strict=True):
        assert (item.prompt, item.answer, item.demo, item.level, item.tags) == (row["prompt"], row["answer"], row.get("demo", ""), row.get("level", 0), tuple(row.get("tags", ())))
        assert task.score(item, task.gold(item))["correct"] == 1 and task.score(item, task.wrong(item))["correct"] == 0


@settings(max_examples=200, deadline=None)
@given(name=st.sampled_from([n for n in VERIFIERS if n != "math"]), gold=st.text(max_size=12) | st.integers().map(str) | st.from_regex(r"-?\d{1,3}(,\d{3})?(/\d+)?", fullmatch=True))
def test_a_gold_that_is_accepted_is_right_and_has_a_wrong_answer(name, gold):
    judge = verifier(name)
    if judge.accepts(gold):
        assert judge.check(judge.right(gold), gold) and not judge.check(judge.wrong(gold), gold)
    else:
        assert judge.fault(gold)


@settings(max_examples=200, deadline=None)
@given(answer=st.text(max_size=60), name=st.sampled_from(list(VERIFIERS)))
def test_no_answer_makes_a_verifier_raise(name, answer):
    gold = {"exact": "x", "numeric": "1/3", "choice": "B", "regex": r"(a+)+b", "set": "a,b", "math": r"\frac{1}{2}"}[name]
    assert verifier(name).check(answer, gold) in (True, False)


# ---- scenes

@pytest.mark.parametrize("task", SCENES, ids=lambda t: t.name)
def test_tiny_can_read_and_write_every_scene(task):
    tokenizer = tiny_processor().tokenizer
    unknown = tokenizer.unk_token_id
    longest = 0
    for item in (i for s in SPLITS for i in task.items(s)[:300]):
        for said in (item.prompt, item.demo, item.answer, task.gold(item), task.wrong(item)):
            ids = tokenizer(said, add_special_tokens=False)["input_ids"]
            assert unknown not in ids, said
            assert tokenizer.decode(ids) == said
        longest = max(longest, len(tokenizer(task.gold(item), add_special_tokens=False)["input_ids"]) + 1)
    assert longest <= task.max_tokens
    assert unknown in tokenizer("How many circles?", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("task,most", [(scenes_count, .25), (scenes_relation, .55), (scenes_odd, .19), (scenes_box, .1)], ids=lambda v: getattr(v, "name", ""))
def test_no_constant_answer_beats_chance(task, most):
    items = task.items("test")[:500]
    answers = {i.answer for i in items[:200]}
    earned = max(sum(task.score(i, f"<answer>{a}</answer>")["correct"] for i in items) / len(items) for a in answers)
    assert earned <= most + .03


def test_scenes_are_disjoint_and_answers_follow_from_what_is_drawn():
    for task in SCENES:
        assert validate(task, limit=400) == []
    for item in scenes_relation.items()[:200]:
        w = item.prompt.rstrip("?").split()
        things = {t[:2]: t for t in item.meta["things"]}
        one, other = things[tuple(w[2:4])], things[tuple(w[-2:])]
        middle = lambda t, axis: t[axis] + t[4] / 2
        holds = {"above": middle(one, 3) < middle(other, 3), "below": middle(one, 3) > middle(other, 3),
                 "left": middle(one, 2) < middle(other, 2), "right": middle(one, 2) > middle(other, 2)}[w[4]]
        assert item.answer == ("yes" if holds else "no")
    for item in scenes_count.items()[:200]:
        assert int(item.answer) == sum(" ".join(t[:2]) == " ".join(item.prompt.rstrip("?").split()[-2:]) for t in item.meta["things"])


# ---- the gym

@pytest.mark.parametrize("rest", ["gcd", "basic_arithmetic,max_terms=3,extract=last-number", "simple_equations", "puzzle24", "acre", "rubiks_cube", "power_function"])
def test_datasets_of_the_gym_validate(rest):
    assert validate(tasks.get(f"reasoning-gym:{rest}"), limit=5) == []


def test_the_gym_gives_the_same_items_and_leaves_the_generator_alone():
    import random
    random.seed(5)
    state = random.getstate()
    first = tasks.get("reasoning-gym:list_functions")
    again = tasks.get("reasoning-gym:list_functions")
    assert [first.item("train", k) for k in range(8)] == [again.item("train", k) for k in reversed(range(8))][::-1]
    assert random.getstate() == state


def test_an_answer_is_not_run(folder):
    made = folder / "made-by-a-reply"
    for text in (f"[open({str(made)!r}, 'w')]", f"__import__('os').system('touch {made}')", f"open({str(made)!r},'w')"):
        for name in ("n_queens", "countdown", "simple_integration", "spiral_matrix"):
            task = tasks.get(f"reasoning-gym:{name}")
            item = task.items()[0]
            assert task.score(item, f"<answer>{text}</answer>")["correct"] == 0
    assert not made.exists()


def test_partial_credit_stays_within_0_and_1():
    task = tasks.get("reasoning-gym:spell_backward")
    for item in task.items()[:30]:
        points = task.score(item, f"<answer>{item.answer}s</answer>")["partial"]
        assert 0 <= points <= 1
        assert sum(task.score(item, "").values()) == 0


def test_an_integral_is_not_solved_by_writing_it_down():
    task = tasks.get("reasoning-gym:simple_integration")
    item = task.items()[0]
    integrand = item.meta["entry"]["metadata"]["integrand"]
    assert task.score(item, task.gold(item))["correct"] == 1
    assert task.score(item, f"<answer>Integral({integrand}, {item.meta['entry']['metadata']['variable']})</answer>")["correct"] == 0


# ---- the command line

def test_validate_prints_the_bad_lines(folder, capsys):
    from typer.testing import CliRunner

    from rlworkbench.cli.main import app
    (folder / "x.jsonl").write_bytes(lines(GOOD, "{", {"prompt": "x", "answer": "abc"}))
    out = CliRunner().invoke(app, ["validate", "jsonl:x.jsonl,verifier=numeric"])
    assert out.exit_code == 1
    assert "line 2: is not JSON" in out.output and "line 3 answer: 'abc' is not a number" in out.output and "2 faults" in out.output
    (folder / "x.jsonl").write_bytes(lines(GOOD))
    out = CliRunner().invoke(app, ["validate", "jsonl:x.jsonl,verifier=numeric", "--json"])
    assert out.exit_code == 0 and json.loads(out.output.splitlines()[-1]) == {"task": "jsonl:x.jsonl,verifier=numeric", "faults": []}
    out = CliRunner().invoke(app, ["list", "tasks"])
    assert "jsonl:" in out.output and "FILE,option=value" in out.output
