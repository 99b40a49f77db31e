"""The pages of records, of a question and of the report in a real browser: accessibility, phones, and use without a mouse."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from test_browser import axe_core

from selfeval.serve.gate import Access
from selfeval.view.app import make_view
from selfeval.view.opened import OpenedRuns
from slow import slow
from view_runs import make_view_run

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: no page is opened in a browser")

CHROMIUM = Path("/usr/bin/chromium")
LONG = " 这道题很长，没有空格也要换行。" + "verylongword" * 12
PAGES = (
    "verdicts?state=kept&sort=-confidence",
    "verdicts?q=nothing+like+it",
    "replies",
    "compared",
    "dropped",
    "question/q0",
    "question/q9",
    "report",
)
SCHEMES = (slow(1280, "light"), slow(1280, "dark"), slow(360, "light"), (360, "dark"))


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server over a run with long words, in a thread."""
    folder = tmp_path_factory.mktemp("view") / "shop"
    make_view_run(folder, text=LONG)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    view = make_view(OpenedRuns([folder]), Access(None, loopback=True))
    server = uvicorn.Server(uvicorn.Config(view, log_level="warning", lifespan="off", ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/view/run/shop"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not CHROMIUM.exists():
        pytest.skip("chromium is not installed: no page is opened in a browser here")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.mark.parametrize(("width", "scheme"), SCHEMES)
def test_no_page_breaks_a_rule_of_accessibility_or_is_wider_than_the_screen(
    address: str, browser: Any, width: int, scheme: str
) -> None:
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    rules = axe_core()
    for path in PAGES:
        page.goto(f"{address}/{path}")
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path
        page.evaluate(rules)
        found = page.evaluate("axe.run(document).then(found => found.violations)")
        serious = [(one["id"], one["nodes"][0]["html"][:200]) for one in found if one["impact"] in ("serious", "critical")]
        assert serious == [], path
    page.close()
    assert said == [], "the policy of the page blocks nothing that it needs"


def test_a_search_works_with_the_keyboard_alone_and_without_scripts(address: str, browser: Any) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(f"{address}/verdicts")
    page.focus("#q")
    page.keyboard.type('"21 plus"')
    page.keyboard.press("Enter")
    page.wait_for_url("**q=%2221*")
    assert page.locator("tbody tr").count() == 1
    page.focus("tbody a")
    page.keyboard.press("Enter")
    page.wait_for_url("**/question/q21**")
    assert page.locator("article:target").count() == 1
    context.close()


def test_a_narrow_screen_shows_records_as_cards_with_the_names_of_their_fields(address: str, browser: Any) -> None:
    page = browser.new_page(viewport={"width": 360, "height": 800})
    page.goto(f"{address}/verdicts?q=says")
    cell = page.locator("tbody tr:first-child td").nth(5)
    assert cell.evaluate("cell => getComputedStyle(cell, '::before').content") == '"Confidence"'
    assert page.locator("tbody tr").first.evaluate("row => row.getBoundingClientRect().width") <= 360
    page.close()
