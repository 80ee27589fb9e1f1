"""The studio and what strangers send: files that unpack to very much, runs that name files elsewhere; and the studio from the wheel, from its file, from make."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import urllib.request
import venv
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rlworkbench.core.pictures import data_uri, png_bytes
from rlworkbench.serving.asking import model_of
from rlworkbench.serving.compare import compared
from rlworkbench.serving.deeds import asked as asked_others
from rlworkbench.serving.deeds import asking
from rlworkbench.serving.hub import hub
from rlworkbench.serving.inspection import Inspection, asked
from rlworkbench.serving.inspection import shown as inspected
from rlworkbench.serving.moves import handed_in
from rlworkbench.serving.places import Places
from rlworkbench.serving.sessions import Sessions
from rlworkbench.serving.stepping import Desk, Spot
from rlworkbench.serving.stepping import shown as stepped
from rlworkbench.serving.uploads import uploaded
from rlworkbench.serving.view import View
from rlworkbench.training.job import train
from rlworkbench.training.run import Config
from tests.studio import server as server

ROOT = Path(__file__).parents[1]
OPENED = {"into": None}      # a list: paths that are opened are appended to it


def heard(event, given):
    if OPENED["into"] is not None and event in ("open", "os.scandir", "os.listdir") and isinstance(given[0], (str, bytes, os.PathLike)):
        OPENED["into"].append(os.fsdecode(given[0]))


sys.addaudithook(heard)


# what a file unpacks to

def blank(side: int = 4096) -> Image.Image:
    return Image.new("1", (side, side), 1)


def same(text: str, n: int):
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(n, np.int32)), pa.array([text]))


def table(**columns):
    return lambda file: pq.write_table(pa.table(columns), file, compression="zstd")


def text(what):
    return lambda file: file.write_text(what() if callable(what) else what)


RECORDED = dict(step=same("1", 100_000).cast(pa.string()), item=["a"] * 100_000, group=[0] * 100_000, reply=list(range(100_000)), position=[0] * 100_000, token=[1] * 100_000, piece=["x"] * 100_000)
BOMBS = {   # name: (writes the file, what is said of it)
    "pictures of one trace": (text(lambda: json.dumps({"trace": 1, "id": "a", "images": [data_uri(blank())] * 200})), "pixels; at most 33,554,432"),
    "pictures in messages, spelled oddly": (text(lambda: json.dumps([{"role": "user", "content": [{"type": "image_url", "image_url": data_uri(blank())}] * 200}]).replace("data:", "dat\\u0061:")), "pixels"),
    "pictures in a trajectory": (text(lambda: json.dumps({"id": "a", "content": [{"class_": "image_observation", "content": data_uri(blank()), "source": "user"}] * 200})), "pixels"),
    "pictures in a table": (table(images=[[png_bytes(blank())] * 50] * 10), "pixels"),
    "pictures of branches in a table": (table(branches=[json.dumps([{"images": [data_uri(blank())] * 99}])]), "pixels"),
    "one picture of many pixels": (text(lambda: json.dumps({"trace": 1, "id": "a", "images": [data_uri(blank(9000))]})), "pixels"),
    "a long text said often": (table(step=[1] * 50_000, prompt=same("x" * 10**6, 50_000), completion=same("y" * 10**6, 50_000)), "unpacks to more than 32 MB"),
    "a long text in lists": (table(pieces=pa.ListArray.from_arrays(pa.array([0, 100_000]), same("x" * 10**5, 100_000).cast(pa.dictionary(pa.int32(), pa.string())))), "unpacks to more than 32 MB"),
    "words to be cut": (table(step=[1], prompt=["q"], completion=["a " * 6_000_000]), "unpacks to more than 32 MB"),
    "a page that is long": (table(z=["x" * 200_000_000]), "unpacks to more than 32 MB"),
    "a list of zeros": (table(z=[np.zeros(30_000_000, np.int64)]), "values; at most 4,000,000"),
    "rows of nothing": (table(z=pa.nulls(5_000_000)), "rows; at most 200,000"),
    "wide values": (table(z=pa.array([b"\0" * 100_000] * 4000, pa.binary(100_000))), "unpacks to more than 32 MB"),
    "many replies": (table(**RECORDED), "traces; at most 5,000"),
    "many traces": (text('{"trace": 1, "id": "a"}\n' * 300_000), "traces; at most 5,000"),
    "many lists": (text(lambda: "[" + "[]," * 2_600_000 + "1]"), "values"),
    "depth without an end": (text("[" * 2_000_000), "nested too deeply"),
    "depth": (text('{"trace": 1, "id": "a", "meta": ' + '{"a":' * 900 + "1" + "}" * 901), "more than 200 deep"),
    "many digits": (text('{"trace": 1, "id": "a", "columns": {"e": [' + "9" * 5000 + "]}}"), "a number has too many digits"),
    "a large number": (text(json.dumps({"trace": 1, "id": "a", "pieces": ["x"], "columns": {"e": [10**400]}})), "can't be read as traces (OverflowError"),
    "half a character": (text(json.dumps({"trace": 1, "id": "\ud800"})), "half a character"),
    "compressed": (lambda file: file.write_bytes(__import__("gzip").compress(b"0" * 10**7)), "is no text"),
    "large on the disk": (lambda file: os.truncate(file, 9 * 2**20) if file.touch() is None else None, "has 9 MB; at most 8"),
}
CHILD = """
import json, resource, sys, time
from pathlib import Path
from rlworkbench.serving.inspection import Inspection
from rlworkbench.serving.moves import handed_in
from rlworkbench.serving.places import Places
desk, out = Inspection(Places("/nowhere")), {}
status = Path("/proc/self/status")      # getrusage would begin at what the parent had
peak = lambda: int(status.read_text().split("VmHWM:")[1].split()[0]) / 1024 if status.exists() else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
start = peak()
for file in sorted(Path(sys.argv[1]).iterdir()):
    began = time.process_time()
    try:
        said = handed_in(desk, file) and "it was opened"
    except ValueError as e:
        said = str(e)
    out[file.name] = said, time.process_time() - began, peak() - start
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    "What a fresh process says of each file, after how many seconds, and by how many MB its memory had grown until then."
    folder = tmp_path_factory.mktemp("bombs")
    for name, (write, _) in BOMBS.items():
        write(folder / name)
    assert max(f.stat().st_size for f in folder.iterdir() if f.name != "large on the disk") < 8 * 2**20
    out = subprocess.run([sys.executable, "-c", CHILD, str(folder)], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
    assert out.returncode == 0, out.stderr[-2000:]
    return json.loads(out.stdout)


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_file_that_is_large_is_one_sentence_in_bounded_time(refused, name):
    said, seconds, _ = refused[name]
    assert BOMBS[name][1] in said and said.startswith(name) and "\n" not in said and len(said) < 300 and "/tmp" not in said
    assert seconds < 5


def test_no_such_file_fills_the_memory(refused):
    assert max(grown for _, _, grown in refused.values()) < 400


def test_what_is_within_the_bounds_is_opened(tmp_path):
    desk = Inspection(Places(tmp_path))
    n = 100_000
    (tmp_path / "long.jsonl").write_text(json.dumps({"trace": 1, "id": "a", "images": [data_uri(blank())] * 2, "pieces": ["wörd "] * n, "columns": {"entropy": [.5] * n}}))
    view = handed_in(desk, tmp_path / "long.jsonl")
    assert "100,000 words" in inspected(desk, view).says and len(desk.exhibit(view).trace.images) == 2


def test_a_jpeg_of_many_scans_is_refused(tmp_path):
    Image.new("RGB", (64, 64), "navy").save(tmp_path / "a.jpg", progressive=True)
    whole = (tmp_path / "a.jpg").read_bytes()
    assert uploaded(whole).size == (64, 64)
    last = whole.rindex(b"\xff\xda")
    with pytest.raises(ValueError, match="scans would take very long"):
        uploaded(whole[:-2] + whole[last:-2] * 1000 + whole[-2:])


def test_a_file_dropped_on_the_page_that_is_too_much_is_a_sentence_there(server, tmp_path):
    from gradio_client import Client, handle_file
    BOMBS["a long text said often"][0](tmp_path / "often.parquet")
    client = Client(server.url, verbose=False)
    said = str(client.predict(handle_file(tmp_path / "often.parquet"), api_name="/file"))
    assert "ften.parquet unpacks to more than 32 MB" in said and "rlw-error" in said
    assert "<h1>second</h1>" in client.predict("second", api_name="/hub_of")


# runs that name files elsewhere

@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A run of tiny with pictures, recorded in full, with a checkpoint; and one of a table."
    folder = tmp_path_factory.mktemp("made")
    train(Config(steps=2, prompts=2, group=2, evaluate=0, record="full", threads="1", max_tokens=8), folder / "tiny")
    train(Config(steps=2, task="bandit", policy="table", prompts=2, group=2, evaluate=0, record="full", threads="1"), folder / "table")
    return folder


@pytest.fixture
def sent(made, tmp_path):
    "A function: a runs folder into which somebody put a run whose config names this; `outside` is what no page may open."
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "rows.jsonl").write_text('{"prompt": "the SECRET question", "answer": "2", "id": "x"}\n')
    pq.write_table(pa.table({"prompt": ["the SECRET question"], "answer": ["2"]}), outside / "rows.parquet")
    shutil.copytree(made / "tiny", outside / "run")
    Image.new("RGB", (8, 8)).save(outside / "private.png")
    def put(kind="tiny", **named):
        shutil.copytree(made / kind, tmp_path / "runs" / "sent")
        (tmp_path / "runs" / "pictures.jsonl").write_text(json.dumps({"prompt": "the SECRET question", "answer": "2", "image": "../outside/private.png"}) + "\n")
        file = tmp_path / "runs" / "sent" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {k: v.replace("HERE", str(tmp_path)) for k, v in named.items()}))
        return Places(tmp_path / "runs")
    return put


@pytest.fixture
def opened(tmp_path):
    "Which files under `outside` were opened."
    OPENED["into"] = seen = []
    yield lambda: [p for p in seen if str(tmp_path / "outside") in os.path.realpath(p)]
    OPENED["into"] = None


TASKS = ["jsonl:HERE/outside/rows.jsonl", "parquet:HERE/outside/rows.parquet,limit=1", "silent:jsonl:HERE/outside/rows.jsonl", "jsonl:HERE/runs/../outside/rows.jsonl",
         "jsonl:HERE/runs/pictures.jsonl", "datasets:HERE/outside"]


@pytest.mark.parametrize("name", TASKS)
def test_a_task_elsewhere_is_not_opened_and_what_is_recorded_is_shown(sent, opened, name):
    places = sent(task=name)
    desk, inspection = Desk(places, Sessions(2)), Inspection(places)
    hub(places, "sent")
    step, reply, both = stepped(desk, Spot("sent", 2), None), inspected(inspection, View(run="sent", reply=1)), compared(places, ["sent", "recorded"])
    assert "data-token" in step.board and step.card and "leads out of the runs folder" in step.note and "--data FOLDER" in step.note
    assert "data-token" in reply.reply and "sent, step 1, reply 1" in reply.says and "<img" in reply.picture
    assert "leads out of the runs folder" in asked(inspection, View(run="sent", reply=1)).wrong and "leads out of the runs folder" in both and "<svg" in both
    assert opened() == [] and "SECRET" not in str((step, reply, both))


def test_a_folder_that_was_named_at_the_start_is_opened(sent, opened, tmp_path):
    (tmp_path / "outside" / "rows.jsonl").write_text(json.dumps({"prompt": "the OPEN question", "answer": "2"}) + "\n")
    sent(task="jsonl:HERE/outside/rows.jsonl")
    places = Places(tmp_path / "runs", data=[tmp_path / "outside"])
    assert places.elsewhere(places.open("sent")) == "" and "leads out of the runs folder" not in stepped(Desk(places), Spot("sent", 1), None).note
    assert opened(), "the ear that the other tests rely on hears nothing"


POLICIES = ["HERE/outside/run", "HERE/runs/../outside/run", "merge:linear,tiny,HERE/outside/run", "merge:task,tiny,tiny,parent=HERE/outside/run", "somebody/never-seen"]


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_elsewhere_is_not_loaded(sent, opened, name, monkeypatch):
    places = sent("table", policy=name)
    monkeypatch.setattr("rlworkbench.serving.asking._loaded", lambda *given: pytest.fail(f"it was loaded: {given}"))
    with pytest.raises(ValueError, match="leads out of the runs folder|pages fetch nothing"):
        model_of(places, "sent@000002")
    assert asked(Inspection(places), View(run="sent")).wrong and "data-token" in inspected(Inspection(places), View(run="sent")).reply
    assert opened() == []


@pytest.mark.parametrize("says", [{"source": "merge:linear,tiny,HERE/outside/run,"}, {"source": "latent:"}])
def test_a_checkpoint_that_names_a_policy_elsewhere_is_not_loaded(sent, opened, says, monkeypatch, tmp_path):
    places = sent("table")
    at = tmp_path / "runs" / "sent" / "checkpoints" / "000002"
    (at / "policy.json").write_text(json.dumps(says).replace("HERE", str(tmp_path)))
    (at / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": f"{tmp_path}/outside/run"}))
    monkeypatch.setattr("rlworkbench.serving.asking._loaded", lambda *given: pytest.fail(f"it was loaded: {given}"))
    with pytest.raises(ValueError, match="its checkpoint '000002' leads out of the runs folder"):
        model_of(places, "sent@000002")
    assert opened() == []


@pytest.mark.parametrize("named", [{"parent": "HERE/outside/run@1"}, {"policy": "HERE/outside/run"}, {"task": "jsonl:HERE/outside/rows.jsonl"}, {"parent": "HERE/runs/chain@1"}])
def test_steps_of_a_run_that_names_what_lies_elsewhere_are_not_made_again(sent, opened, named, tmp_path, made):
    places = sent("table", **named)
    shutil.copytree(made / "table", tmp_path / "runs" / "chain")       # a parent inside of the runs folder that itself has one outside
    file = tmp_path / "runs" / "chain" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"parent": f"{tmp_path}/outside/run@1"}))
    said = "".join(asking(Desk(places), Spot("sent", 2), None, ["dapo"]))
    assert "rlw-error" in said and "leads out of the runs folder" in said and opened() == []


def test_the_steps_of_an_honest_run_are_made_again(made):
    assert "<svg" in asked_others(Desk(Places(made)), Spot("table", 2), None, ["dapo"])


@pytest.mark.parametrize("part", ["checkpoints/000002/trainer.safetensors", "checkpoints/000002", "steps/000001.parquet"])
def test_a_link_deep_inside_that_leads_out_is_refused(sent, part, tmp_path):
    places = sent("table")
    at = tmp_path / "runs" / "sent" / part
    shutil.rmtree(at) if at.is_dir() else at.unlink()
    at.symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match="holds a link to a place outside"):
        places.open("sent")


def test_a_recorded_step_that_would_fill_the_memory_is_a_sentence(sent, tmp_path):
    places = sent("table")
    table(**{k: same("x" * 10**6, 100_000) if k == "piece" else v for k, v in RECORDED.items()})(tmp_path / "runs" / "sent" / "steps" / "000002.parquet")
    for page in (hub(places, "sent"), stepped(Desk(places), Spot("sent", 2), None).note, inspected(Inspection(places), View(run="sent", step=2)).says):
        assert "unpacks to more than 256 MB" in page and str(tmp_path) not in page
    assert "data-token" in inspected(Inspection(places), View(run="sent", step=1)).reply


def test_a_log_that_would_fill_the_memory_is_a_sentence(sent, tmp_path):
    places = sent("table")
    os.truncate(tmp_path / "runs" / "sent" / "metrics.jsonl", 2**33)
    with pytest.raises(ValueError, match="metrics.jsonl has 8192 MB; at most 64 are read"):
        places.open("sent")
    assert "at most 64 are read" in hub(places, "sent")


def test_a_visitor_trains_registered_names_only():
    from rlworkbench.serving.workers import visitors
    for named in ({"task": "jsonl:"}, {"task": "jsonl:/etc/passwd"}, {"policy": "merge:"}, {"policy": "/etc"}, {"reward": "a.py:b"}, {"max_tokens": 10**6}):
        with pytest.raises(ValueError):
            visitors(Config(**named))
    assert asdict(visitors(Config())) == asdict(Config())


# from where it is started

def launched(command: list, cwd, **env) -> tuple:   # process, what it said until it named its address
    "Start a studio; it is ended by whoever asked."
    process = subprocess.Popen(command, cwd=cwd, env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"} | env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True, start_new_session=True)
    timer = threading.Timer(120, os.killpg, (process.pid, signal.SIGKILL))
    timer.start()
    said = []
    for line in process.stdout:
        said.append(line)
        if "studio: http" in line:
            break
    timer.cancel()
    return process, "".join(said)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "An environment with the wheel, built from a copy of the sources, and with the dependencies, but not the checkout."
    folder = tmp_path_factory.mktemp("wheel")
    for part in ("rlworkbench", "apps", "nbs/claims/results"):
        shutil.copytree(ROOT / part, folder / "source" / part, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / part, folder / "source")
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(folder / "source")], check=True, capture_output=True)
    shutil.rmtree(folder / "source")
    venv.create(folder / "env", with_pip=False)
    built, = folder.glob("*.whl")
    subprocess.run([sys.executable, "-m", "pip", "--python", str(folder / "env/bin/python"), "install", "--quiet", "--no-deps", "--no-index", str(built)], check=True, capture_output=True)
    (next((folder / "env/lib").glob("python3*")) / "site-packages/borrowed.pth").write_text(f"{Path(np.__file__).parents[1]}\n")
    return folder / "env"


def commands(wheel, port) -> dict:
    "Ways to start the studio: command and folder."
    bin = Path(sys.executable).parent
    return {"the wheel": ([wheel / "bin/rlworkbench", "studio", "--port", str(port)], wheel.parent), "its file": ([sys.executable, ROOT / "apps/studio.py"], wheel.parent),
            "make": (["make", "-o", ".venv/.apps", "studio", f"BIN={bin}"], ROOT)}


@pytest.mark.parametrize("way", ["the wheel", "its file", "make"])
def test_the_studio_opens_with_the_recorded_run(wheel, way):
    import socket
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    where = subprocess.run([wheel / "bin/python", "-c", "import rlworkbench.apps.studio as s; print(s.__file__)"], cwd=wheel.parent, capture_output=True, text=True)
    assert where.stdout.startswith(str(wheel)), where.stderr
    process, said = launched(*commands(wheel, port)[way])
    try:
        url = re.search(r"studio: (http://127\.0\.0\.1:\d+)", said)
        assert url, said
        for page in ("", "/stepper", "/inspector", "/compare"):
            text = urllib.request.urlopen(url[1] + page, timeout=60).read().decode()
            assert "gradio_config" in text
            assert page or "The recorded run" in text and "Held-out greedy accuracy" in text
        if way == "the wheel":
            from gradio_client import Client
            client = Client(url[1], verbose=False)
            assert "supported at this scale" in str(client.predict(api_name="/compare_claims")) and "data-token" in str(client.predict(api_name="/stepper_arrive")) and "recorded, step 1" in str(client.predict(api_name="/inspector_arrive"))
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(20)


def test_make_studio_installs_the_extra_and_starts_it():
    own = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}      # these tests are run by make, too
    said = subprocess.run(["make", "--no-print-directory", "-n", "-B", "studio", "PYTHON=true"], cwd=ROOT, capture_output=True, text=True, check=True, env=own).stdout
    assert "-e '.[apps]'" in said and said.strip().endswith("rlworkbench studio")
