"""The studio as programs see it: two clients, every endpoint named, nothing that holds a model, a password, twenty at once."""
import gc
import re
import socket
import sys
import types

import pytest
import torch
from gradio_client import Client

from rlworkbench.serving.frame import PAGES, served
from rlworkbench.serving.places import Places
from tests.benchmarks.studio import crowd
from tests.studio import models_in, server  # noqa: F401

@pytest.fixture(scope="module")
def two(server):  # noqa: F811
    return Client(server.url, verbose=False), Client(server.url, verbose=False)


def test_the_first_page_is_there_before_anything_is_asked(server):  # noqa: F811
    "The recorded run stands in what the server sends first."
    import urllib.request
    text = urllib.request.urlopen(server.url, timeout=20).read().decode()
    assert "The recorded run" in text and "Held-out greedy accuracy" in text


def test_what_is_remembered_of_visitors_is_bounded(server):  # noqa: F811
    import gradio as gr
    assert server.demo.app.state_holder.capacity == 200
    with gr.Blocks() as page:
        gr.Button().click(lambda: None, None, gr.State(0), api_name="touch")
    url = served(page, wait=False, sessions=3)
    for _ in range(7):
        Client(url, verbose=False).predict(api_name="/touch")
    assert len(page.app.state_holder.session_data) == 3
    page.close(verbose=False)


def test_two_clients_see_what_each_asked_for(two):
    one, other = two
    a, b = one.predict("second", api_name="/hub_of"), other.predict("bandit/0", api_name="/hub_of")
    assert "<h1>second</h1>" in a and "<h1>bandit/0</h1>" in b and "<h1>second</h1>" not in b


@pytest.mark.parametrize("name", ["..", "/etc/passwd", "%2e%2e%2fetc", "<script>alert(1)</script>", "a\0b"])
def test_a_wrong_name_is_a_sentence(two, name):
    said = two[0].predict(name, api_name="/hub_of")
    assert 'role="alert"' in said and "<script" not in said and "Traceback" not in said
    assert 'role="alert"' in two[0].predict([name], "correct", api_name="/compare_measure")


def test_seeds_are_one_curve(two):
    page = two[0].predict(["bandit/0", "bandit/1", "bandit/2", "bandit/rloo"], "entropy", api_name="/compare_measure")
    assert "95 % interval" in page and "bandit/0, bandit/1, bandit/2" in page and "group_zscore" in page


def test_claims_and_papers(two):
    assert "rlworkbench reproduce clip_higher" in two[0].predict(api_name="/compare_claims")
    assert "arxiv.org/abs/2503.14476" in two[0].predict(api_name="/compare_papers")


def test_every_endpoint_is_named(server):  # noqa: F811
    functions = list(server.demo.fns.values())
    assert len(functions) > 5
    assert [f.name for f in functions if f.fn is not None and not (f.api_name or f.api_visibility == "private")] == []
    named = [f.api_name for f in functions if f.api_name]
    assert len(set(named)) == len(named), "two events of one name"
    assert min(f.concurrency_limit for f in functions if f.concurrency_id == "model" and f.concurrency_limit != "default") == 1, "gradio takes the lowest of an id"


def test_no_page_holds_a_model(tmp_path):
    "Pages that were just built, so that nothing of a visitor is there yet."
    from rlworkbench.apps.studio import studio
    demo = studio(Places(tmp_path))
    assert len(demo.fns) > 40 and models_in(demo) == []


def hiding(model) -> list:
    "Ways in which an event might hold a model."
    import functools

    from rlworkbench.serving.sessions import Sessions
    class Page:
        def __init__(self):
            self.__dict__["desk"] = {"a": [({"b": model},)]}
        def look(self):
            return self
    class Slotted:
        __slots__ = ("model",)
    def steps():
        inside = model
        yield
        yield inside
    next(waiting := steps())
    slotted, sessions = Slotted(), Sessions()
    slotted.model = model
    sessions.open("me", lambda: model)
    deep = functools.reduce(lambda inner, k: (lambda: inner), range(20), lambda: model)
    return [lambda: model, deep, Page().look, functools.partial(print, model), lambda x=model: x, lambda *, x=model: x, lambda: slotted, lambda: sessions, waiting, {model: 1}]


@pytest.mark.parametrize("way", range(10))
def test_a_model_is_found_wherever_a_page_may_hide_it(way):
    import gradio as gr
    hidden = hiding(torch.nn.Linear(2, 2))[way]
    with gr.Blocks() as demo:
        gr.Button().click(lambda: hidden, api_name="guilty")
    assert ("guilty", "Linear") in models_in(demo)
    with gr.Blocks() as demo:
        gr.State(value={"a": hidden}) if not isinstance(hidden, (types.GeneratorType, dict)) else gr.Button().click(lambda h=hidden: h, api_name="State")
    assert any(k == "Linear" for _, k in models_in(demo))


def test_all_pages_answer_and_none_asks_elsewhere(server):  # noqa: F811
    import urllib.request
    for page in (p for p in PAGES if p.there):
        text = urllib.request.urlopen(f"{server.url}/{page.path}", timeout=20).read().decode()
        assert "gradio_config" in text and re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="https?://(?!127\.)[^"]*', text) == []


def test_a_password_is_asked_for(server, tmp_path):  # noqa: F811
    import urllib.error
    import urllib.request

    from rlworkbench.apps.studio import build
    demo = build(Places(tmp_path))
    url = served(demo, auth=("me", "secret"), wait=False)
    try:
        assert "The recorded run" not in urllib.request.urlopen(url, timeout=20).read().decode()
        with pytest.raises(Exception):
            Client(url, verbose=False)
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(f"{url}/config", timeout=20)
        assert "The recorded run" in Client(url, auth=("me", "secret"), verbose=False).predict("", api_name="/hub_of")
    finally:
        demo.close(verbose=False)


def test_many_clients_at_once(server):  # noqa: F811
    found = crowd(server.url, clients=20, seconds=5)
    assert found["errors"] == [] and found["crossed"] == 0 and found["answers"] >= 20
    gc.collect()


@pytest.mark.parametrize("given, says", [(["--port", "{port}"], "port {port} is in use; choose another --port"), (["none-such"], "none-such is not a run"),
                                         (["--auth", "me"], "--auth must be USER:PASSWORD"), (["--limit", "0"], "--limit must be 1 or more"),
                                         (["--runs", "none-such"], "there is none at none-such"), (["--port", "99999"], "--port must be 1 to 65535")])
def test_what_can_not_work_is_one_sentence(given, says, capsys, monkeypatch):
    from rlworkbench.cli.main import main
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        port = str(s.getsockname()[1])
        monkeypatch.setattr(sys, "argv", ["rlworkbench", "studio", *(g.replace("{port}", port) for g in given)])
        with pytest.raises(SystemExit) as e:
            main()
    said = capsys.readouterr().err
    assert e.value.code == 2 and says.replace("{port}", port) in said and len(said.strip().splitlines()) == 1


def test_a_port_that_another_program_takes_first(server, monkeypatch):  # noqa: F811
    import urllib.request

    import gradio as gr

    import rlworkbench.serving.frame as frame
    with gr.Blocks() as demo:
        gr.HTML("here")
    taken, free = int(server.url.rsplit(":", 1)[1]), frame.free
    asked = []
    monkeypatch.setattr(frame, "free", lambda port=None: asked.append(port) or (taken if len(asked) == 1 or port else free()))
    try:
        url = served(demo, wait=False)
        assert asked == [None, None] and url != server.url and "here" in urllib.request.urlopen(f"{url}/config", timeout=20).read().decode()
    finally:
        demo.close(verbose=False)
    with gr.Blocks() as demo, pytest.raises(ValueError, match=f"^port {taken} is in use; choose another --port$"):
        served(demo, taken, wait=False)


def test_without_gradio_it_names_the_extra(capsys, monkeypatch):
    from rlworkbench.cli.main import main
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setattr(sys, "argv", ["rlworkbench", "studio"])
    with pytest.raises(SystemExit) as e:
        main()
    assert e.value.code == 2 and "pip install 'rlworkbench[apps]'" in capsys.readouterr().err
