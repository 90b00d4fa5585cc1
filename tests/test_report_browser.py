"""The page in a real browser: every chart drawn, nothing fetched, nothing wider than the screen."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import analysis_tables as planted
import pytest

from analysis import report

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def chromium() -> str | None:
    """The browser named by $CHROMIUM, else the first on the path."""
    names = (os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome")
    return next((found for name in names if name and (found := shutil.which(name))), None)


pytestmark = pytest.mark.skipif(
    chromium() is None,
    reason="no Chromium found; install it (Debian, Ubuntu: apt-get install chromium) or name it in $CHROMIUM",
)


@pytest.fixture(scope="module")
def page_path(tmp_path_factory) -> Path:
    return report.build(planted.write(tmp_path_factory.mktemp("sweep")))


@pytest.fixture(scope="module")
def browser() -> Iterator:
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright to run the browser test")
    with playwright.sync_playwright() as starter:
        started = starter.chromium.launch(executable_path=chromium(), args=FLAGS)
        yield started
        started.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_page_in_a_browser(page_path, browser, width, scheme):
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    problems, requests = [], []
    page.on("console", lambda message: problems.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(page_path.as_uri())
    page.wait_for_function("document.documentElement.dataset.drawn", timeout=60_000)
    assert problems == []
    assert requests and all(url.startswith(("file:", "data:")) for url in requests), requests

    drawn = page.eval_on_selector_all(
        ".chart",
        """charts => charts.map(chart => {
            const picture = chart.querySelector("svg, canvas");
            const box = picture ? picture.getBoundingClientRect() : {width: 0, height: 0};
            const marks = chart.querySelectorAll("[class*=mark-] path").length;
            return {name: chart.id, width: box.width, height: box.height, marks};
        })""",
    )
    assert len(drawn) > 20
    for chart in drawn:
        assert chart["width"] > 100 and chart["height"] > 50 and chart["marks"] > 0, chart

    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()
