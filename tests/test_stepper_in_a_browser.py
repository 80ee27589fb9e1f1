"""The stepper as a page that needs nothing, and in a real JupyterLab: keys, buttons, and Python hears of it."""
import json
import os
import re
import socket
import subprocess
import sys
import time

import pytest

from rlworkbench.show.stepper import frames_of, stepper_html

pytestmark = pytest.mark.browser

CELL = """from rlworkbench.show.stepper import Stepper
from IPython.display import display
seen = Stepper({"one": "first frame", "two": "second frame", "three": "third frame"})
display(seen)"""


@pytest.fixture
def page(window):
    return window("file:", viewport={"width": 1100, "height": 900})


def driven(page, box):
    "Forth with the button, on with the key, to the end, and no further; back to the start."
    from playwright.sync_api import expect
    expect(box.locator(".label")).to_have_text("one")
    box.get_by_label("one on (right arrow)").click()
    expect(box.locator(".label")).to_have_text("two")
    box.press("ArrowRight")
    expect(box.locator(".place")).to_have_text("3/3")
    box.press("ArrowRight")
    expect(box.locator(".frame")).to_have_text("third frame")
    box.press("Home")
    expect(box.locator(".label")).to_have_text("one")
    expect(box.get_by_label("one back (left arrow)")).to_be_disabled()
    box.locator("input[type=range]").fill("1")
    expect(box.locator(".frame")).to_have_text("second frame")


def test_as_a_page(page, tmp_path):
    frames = frames_of({"one": "first frame", "two": "second frame", "three": "third frame"})
    (tmp_path / "page.html").write_text(f"<!doctype html><meta charset=utf-8>{stepper_html(frames)}")
    page.goto(f"file://{tmp_path}/page.html")
    driven(page, page.locator(".rlw-stepper"))


def test_two_alike_on_one_page_both_step(page, tmp_path):
    frames = frames_of({"one": "first frame", "two": "second frame", "three": "third frame"})
    (tmp_path / "page.html").write_text(f"<!doctype html><meta charset=utf-8>{stepper_html(frames)}{stepper_html(frames, 99)}")
    page.goto(f"file://{tmp_path}/page.html")
    assert page.locator(".rlw-stepper .place").all_text_contents() == ["1/3", "3/3"]
    driven(page, page.locator(".rlw-stepper").first)


def test_what_a_user_wrote_is_text(page, tmp_path):
    nasty = "</script><img src=x onerror=\"document.title='broken'\">"
    (tmp_path / "page.html").write_text(f"<!doctype html><meta charset=utf-8>{stepper_html(frames_of({nasty: nasty, 'two': 'b'}))}")
    page.goto(f"file://{tmp_path}/page.html")
    assert page.locator(".rlw-stepper .label").text_content() == nasty and page.locator(".rlw-stepper pre").text_content() == nasty
    assert page.title() != "broken" and page.locator(".rlw-stepper img").count() == 0


@pytest.fixture
def lab(tmp_path):
    "A JupyterLab on a free port of this machine, with one notebook."
    cell = {"cell_type": "code", "id": "a", "metadata": {}, "execution_count": None, "outputs": [], "source": CELL}
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    (tmp_path / "lesson.ipynb").write_text(json.dumps({"cells": [cell], "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}))
    env = os.environ | {"HOME": str(tmp_path), "JUPYTER_CONFIG_DIR": str(tmp_path / "config"), "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime"), "IPYTHONDIR": str(tmp_path / "ipython")}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", "--port=0", "--ServerApp.root_dir=" + str(tmp_path), "--allow-root",
               "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", "--LabApp.news_url=None"]
    server = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    try:
        for line in server.stderr:
            if found := re.search(r"http://127\.0\.0\.1:\d+/lab\?token=\w+", line):
                break
        else:
            raise AssertionError("JupyterLab did not start")
        port = int(re.search(r":(\d+)/", found.group()).group(1))
        until = time.monotonic() + 60
        while socket.socket().connect_ex(("127.0.0.1", port)) and time.monotonic() < until:     # it names its address before it listens there
            time.sleep(.1)
        yield found.group().replace("/lab?", "/lab/tree/lesson.ipynb?")
    finally:
        server.terminate()
        server.wait(20)


def test_in_jupyterlab(window, lab):
    from playwright.sync_api import expect
    page = window(lab.partition("/lab")[0], "^(console|4)", viewport={"width": 1100, "height": 900})      # JupyterLab complains of itself
    page.goto(lab)
    expect(page.locator(".jp-NotebookPanel .jp-Cell").first).to_be_visible(timeout=60_000)
    expect(page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").first).to_be_attached(timeout=60_000)
    box = page.locator(".jp-OutputArea .rlw-stepper")
    for _ in range(6):      # a kernel that is not there yet swallows the key
        page.locator(".jp-Cell .cm-content").first.click()
        page.keyboard.press("Shift+Enter")
        try:
            expect(box.first).to_be_visible(timeout=20_000)
            break
        except AssertionError:
            continue
    box = box.first
    expect(box).to_be_visible()
    driven(page, box)
    page.locator(".jp-Cell .cm-content").last.click()
    page.keyboard.type("print('python says', seen.at)")
    page.keyboard.press("Shift+Enter")
    expect(page.locator(".jp-OutputArea-output", has_text="python says 1").first).to_be_visible(timeout=30_000)
