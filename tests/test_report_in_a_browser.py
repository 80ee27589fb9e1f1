"""The report in a real browser: nothing fetched, nothing in the console, readable at 1280 and at 390 pixels."""

import pytest

from rlworkbench.serving.report import write_report
from rlworkbench.training.job import train
from rlworkbench.training.run import Config
from tests.conftest import CHROMIUM

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    return write_report(train(Config(steps=2, prompts=4, group=4, evaluate=8, threads="1"), folder / "run"))


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_report(report, width, scheme):
    from playwright.sync_api import expect, sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-background-networking"])
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        asked, said = [], []
        page.on("request", lambda r: asked.append(r.url))
        page.on("console", lambda m: said.append(m.text))
        page.on("pageerror", lambda e: said.append(str(e)))
        page.goto(f"file://{report}")
        expect(page.locator("h1")).to_have_text("grpo on digits-sum")
        expect(page.locator(".rlw-strip").first).to_be_visible()
        assert [u for u in asked if not u.startswith(("file://", "data:"))] == [] and said == []
        if width == 1280:
            assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0] < 100")
        assert dark == (scheme == "dark")
        browser.close()
