"""The report in a real browser: nothing fetched, nothing in the console, readable at 1280 and at 390 pixels."""

import pytest

from rlworkbench.serving.report import write_report
from rlworkbench.training.job import train
from rlworkbench.training.run import Config

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    return write_report(train(Config(steps=2, prompts=4, group=4, evaluate=8, threads="1"), folder / "run"))


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_report(report, window, width, scheme):
    from playwright.sync_api import expect
    page = window("file:", viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.goto(f"file://{report}")
    expect(page.locator("h1")).to_have_text("grpo on digits-sum")
    expect(page.locator(".rlw-strip").first).to_be_visible()
    if width == 1280:
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0] < 100")
    assert dark == (scheme == "dark")
