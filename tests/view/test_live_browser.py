"""The live pages in Chromium: what changes without a reload, what survives a refresh, and a server that is gone for a while."""

from __future__ import annotations

import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from compared_runs import QUESTIONS, begin_run, compared, finish_run, log_steps, scored, write_samples
from selfeval.store import Progress, RunStore, write_progress
from selfeval.view import index as indexing
from served import wait_for
from slow import slow
from view_server import axe, browser, served

CHART = "[aria-label^='KL to the reference']"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as opened:
        yield opened


@contextmanager
def _page(chromium: Any, **options: Any) -> Iterator[Any]:
    """Open an empty page; the test fails if a script or the browser reports an error."""
    context = chromium.new_context(**options)
    page = context.new_page()
    page.set_default_timeout(60_000)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page
    context.close()
    assert errors == []


def _work(store: RunStore, done: int) -> None:
    """Write what a run writes in one iteration of its policy."""
    log_steps(store, [done])
    write_samples(store, done)
    progress = Progress(
        platform.node(), 1, "policy", float(done), "policy", float(done), 1000.0, 1.0, 1000.0 - done, "reward 0.3"
    )
    write_progress(store.root, progress)


@contextmanager
def _working(folder: Path) -> Iterator[RunStore]:
    """A run whose policy is trained by a thread, an iteration every 0.2 s."""
    store = begin_run(folder)
    ended = threading.Event()

    def work() -> None:
        for done in range(1, 1000):
            _work(store, done)
            if ended.wait(0.2):
                return

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield store
    finally:
        ended.set()
        thread.join()
        store.close()


def test_progress_curves_and_samples_change_without_a_reload(tmp_path: Path, chromium: Any) -> None:
    with _working(tmp_path / "live"), served(tmp_path) as server, _page(chromium) as page:
        page.goto(f"{server.url}/run/live")
        page.evaluate("window.mine = 1")
        seen = [page.locator(selector) for selector in (".now .line", CHART, ".cards .said >> nth=0")]
        before = [(one.get_attribute("aria-label"), one.text_content()) for one in seen]
        page.wait_for_function(
            "([line, said]) => document.querySelector('.now .line').textContent !== line"
            " && document.querySelector('.cards .said').textContent !== said",
            arg=[before[0][1], before[2][1]],
        )
        page.wait_for_function("label => !document.querySelector(`[aria-label='${label}']`)", arg=before[1][0])
        assert "left" in page.locator(".now .left").text_content()
        assert page.evaluate("window.mine") == 1, "the page was not loaded again"


def test_focus_details_scroll_and_selection_survive(tmp_path: Path, chromium: Any) -> None:
    with _working(tmp_path / "live"), served(tmp_path) as server, _page(chromium) as page:
        page.goto(f"{server.url}/run/live")
        page.locator("details[data-key=config] summary").click()
        page.evaluate(
            """() => {
              const text = document.querySelector("tr[data-key=questions] .counts").firstChild;
              getSelection().setBaseAndExtent(text, 0, text, 5);
              document.querySelector("tr[data-key=questions] a").focus({preventScroll: true});
            }"""
        )
        page.mouse.wheel(0, 300)
        page.wait_for_timeout(300)
        kept = """() => ({
          focus: document.activeElement.textContent, open: document.querySelector("details[data-key=config]").open,
          selection: getSelection().toString(), scroll: Math.round(scrollY)})"""
        before, line = page.evaluate(kept), page.locator(".now .line").text_content()
        page.wait_for_function("line => document.querySelector('.now .line').textContent !== line", arg=line)
        assert page.evaluate(kept) == before
        assert before["focus"] == "questions"
        assert before["open"]
        assert before["selection"] == "train"
        assert before["scroll"] > 0


def test_a_change_of_stage_is_announced_and_numbers_are_not(tmp_path: Path, chromium: Any) -> None:
    store = begin_run(tmp_path / "live")
    _work(store, 1)
    with served(tmp_path) as server, _page(chromium) as page:
        page.goto(f"{server.url}/run/live")
        page.evaluate(
            """() => {
              window.said = [];
              const status = document.querySelector("[role=status]");
              const options = {childList: true, characterData: true, subtree: true};
              new MutationObserver(() => said.push(status.textContent)).observe(status, options);
            }"""
        )
        _work(store, 2)
        page.get_by_text("2 of 1,000").wait_for()
        assert page.evaluate("said") == []
        store.record_stage("policy", state="finished", seconds=3.0, counts={"iterations": 2})
        write_progress(store.root, Progress(platform.node(), 1, "evaluation", 1.0))
        page.wait_for_function("() => said.length > 0")
        assert page.evaluate("said") == ["The stage evaluation is in progress. 2 of 8 stages are finished."]
    store.close()


def test_a_server_that_is_gone_is_shown_and_found_again(tmp_path: Path, chromium: Any) -> None:
    store = begin_run(tmp_path / "live")
    _work(store, 1)
    with served(tmp_path) as server, _page(chromium) as page:
        page.goto(f"{server.url}/run/live")
        server.stop()
        status = page.locator("[role=status]")
        status.get_by_text("The server does not answer.").wait_for()
        assert "1 of 1,000" in page.locator(".now .line").text_content(), "the last known state stays"
        _work(store, 2)
        server.start()
        page.get_by_text("2 of 1,000").wait_for()
        assert "in progress" in status.text_content()
    store.close()


@pytest.mark.slow
def test_a_table_is_refreshed_until_its_index_is_complete(
    tmp_path: Path, chromium: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin_run(tmp_path / "live").close()
    chunks, may_read = indexing._chunks, threading.Event()
    monkeypatch.setattr(indexing, "_chunks", lambda path, file: may_read.wait(60) and chunks(path, file))
    with served(tmp_path) as server, _page(chromium) as page:
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url) if "x-fragment" in request.headers else None)
        page.goto(f"{server.url}/run/live/questions")
        page.evaluate("window.mine = 1")
        page.get_by_text("Indexing the records").wait_for()
        wait_for(lambda: page.wait_for_timeout(100) or asked)
        may_read.set()
        page.get_by_text(f"{2 * QUESTIONS} records").wait_for()
        assert page.get_by_text("Indexing the records").count() == 0
        count = len(asked)
        page.wait_for_timeout(5000)  # two refreshes and a half
        assert len(asked) == count, "a complete table is not fetched again"
        assert page.evaluate("window.mine") == 1, "the page was not loaded again"


def test_the_filters_of_a_table_are_refreshed_with_it(tmp_path: Path, chromium: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    begin_run(tmp_path / "live").close()
    chunks, may_read = indexing._chunks, threading.Event()
    monkeypatch.setattr(indexing, "_chunks", lambda path, file: may_read.wait(60) and chunks(path, file))
    with served(tmp_path) as server, _page(chromium) as page:
        page.goto(f"{server.url}/run/live/questions")
        page.locator("summary", has_text="Filters").click()
        page.get_by_label("Question id").fill("q1")
        assert page.get_by_label("Split").count() == 0, "no record with a split is indexed yet"
        may_read.set()
        page.get_by_text(f"{2 * QUESTIONS} records").wait_for()
        assert page.get_by_label("Split").count() == 0, "a form is left alone while a field of it has the focus"
        page.locator("h1").click()
        split = page.get_by_label("Split")
        split.wait_for()
        assert split.locator("option").all_text_contents() == ["any", f"test ({QUESTIONS})", f"training ({QUESTIONS})"]
        assert page.get_by_label("Question id").input_value() == "q1", "what was typed stays"


def test_refreshing_can_be_paused_with_the_keyboard(tmp_path: Path, chromium: Any) -> None:
    store = begin_run(tmp_path / "live")
    _work(store, 1)
    with served(tmp_path) as server, _page(chromium) as page:
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url) if "x-fragment" in request.headers else None)
        page.goto(f"{server.url}/run/live")
        button = page.get_by_role("button", name="Pause refreshing")
        button.focus()
        page.keyboard.press("Enter")
        page.get_by_text("Not refreshed: paused.").wait_for()
        _work(store, 2)
        time.sleep(0.5)  # an answer that was on its way
        count = len(asked)
        time.sleep(3)
        assert len(asked) == count
        page.keyboard.press("Enter")
        page.get_by_text("2 of 1,000").wait_for()
    store.close()


@pytest.mark.slow
def test_the_list_shows_new_runs_and_keeps_the_selection(tmp_path: Path, chromium: Any) -> None:
    with served(tmp_path) as server, _page(chromium) as page:
        page.goto(f"{server.url}/")
        page.get_by_text("No runs yet").wait_for()
        for name in ("a", "b"):
            store = begin_run(tmp_path / name)
            finish_run(store, [compared(n) for n in range(QUESTIONS)])
            store.close()
        for name in ("a", "b"):
            page.get_by_label(f"Compare {name}").check()
        _work(begin_run(tmp_path / "c"), 1)
        page.get_by_role("link", name="c", exact=True).wait_for()
        page.get_by_role("button", name="Compare the selected runs").click()
        page.get_by_role("heading", name="Compare runs").wait_for()
        assert "run=a" in page.url
        assert "run=b" in page.url
        assert "run=c" not in page.url


def test_the_pages_work_without_scripts(tmp_path: Path, chromium: Any) -> None:
    for name in ("a", "b"):
        store = begin_run(tmp_path / name)
        log_steps(store, range(5))
        finish_run(store, [compared(n, gold_after=name == "a") for n in range(QUESTIONS)])
        store.close()
    with served(tmp_path) as server, _page(chromium, java_script_enabled=False) as page:
        page.goto(f"{server.url}/")
        page.get_by_label("Filter by").fill("a")
        page.get_by_role("button", name="Apply").click()
        assert page.url.endswith("/view/?q=a&sort=changed")
        page.goto(f"{server.url}/")
        for name in ("a", "b"):
            page.get_by_label(f"Compare {name}").check()
        page.get_by_role("button", name="Compare the selected runs").click()
        page.get_by_label("Show").select_option("a" if "run=a&run=b" in page.url else "b")
        page.get_by_role("button", name="Apply").click()
        assert page.get_by_role("article").count() == QUESTIONS


@pytest.mark.parametrize(("width", "scheme"), [slow(1280, "light"), slow(1280, "dark"), slow(360, "light"), (360, "dark")])
def test_pages_break_no_rule_of_accessibility_and_fit(scheme: str, width: int, tmp_path: Path, chromium: Any) -> None:
    live = begin_run(tmp_path / "live")
    _work(live, 1)
    live.add_metrics("watchdogs", {"step": 1, "name": "length_drift", "message": "longer", "action": "warn"})
    begin_run(tmp_path / "a-run-with-a-rather-long-name-that-does-not-fit-on-a-telephone").close()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("{")
    for name in ("a", "b"):
        store = begin_run(tmp_path / name, seed=len(name) + ord(name))
        log_steps(store, range(30))
        pairs = [scored(n, right=n > 2) for n in range(QUESTIONS)]
        finish_run(store, [compared(n, gold_after=name == "a", after="word " * 200) for n in range(QUESTIONS)], pairs)
        store.close()
    options = {"viewport": {"width": width, "height": 900}, "color_scheme": scheme, "bypass_csp": True}
    with served(tmp_path) as server, _page(chromium, **options) as page:
        for path in ("/", "/run/live", "/run/a", "/compare?run=a&run=b", "/compare?run=a&run=b&run=live"):
            page.goto(f"{server.url}{path}")
            assert axe(page) == [], path
            assert page.evaluate("document.documentElement.scrollWidth") <= width, path
    live.close()


def test_the_policy_of_the_pages_blocks_nothing_of_them(tmp_path: Path, chromium: Any) -> None:
    with _working(tmp_path / "live"), served(tmp_path) as server, _page(chromium) as page:
        refused: list[str] = []
        page.on("console", lambda message: refused.append(message.text) if message.type in ("error", "warning") else None)
        for path in ("/", "/run/live"):
            page.goto(f"{server.url}{path}")
            page.wait_for_timeout(2500)
        assert refused == []
