"""The pages of `selfeval view`: without a socket for most tests, and on a real one for a browser."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi.testclient import TestClient

from selfeval.serve.gate import Access
from selfeval.view.app import make_view
from selfeval.view.opened import OpenedRuns
from served import wait_for

__all__ = ["AXE_RULES", "FRAGMENT", "Served", "axe", "browser", "client", "served"]

FRAGMENT = {"X-Fragment": "1"}
"""Header of the script that refreshes a page."""
AXE_RULES = """
() => axe.run(document, {runOnly: {type: "tag", values: ["wcag2a", "wcag2aa", "best-practice"]}}).then(found =>
  found.violations.map(v => [v.id, v.impact, v.nodes.length, v.nodes[0].html.slice(0, 160)]))
"""


def client(folder: Path, token: str | None = None) -> TestClient:
    """Return a client of the pages over the runs in a folder."""
    return TestClient(make_view(OpenedRuns([folder]), Access(token, loopback=True)), base_url="http://127.0.0.1:8000")


class Served:
    """A server of the pages in a thread, which can be stopped and started again at the same address."""

    def __init__(self, folder: Path) -> None:
        self._application = make_view(OpenedRuns([folder]), Access(None, loopback=True))
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self._server: Any = None
        self._thread: Any = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/view"

    def start(self) -> None:
        config = uvicorn.Config(
            self._application, port=self.port, log_level="error", lifespan="off", ws="none", timeout_graceful_shutdown=1
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        wait_for(lambda: self._server.started)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(30)


@contextmanager
def served(folder: Path) -> Iterator[Served]:
    """Serve the pages over the runs in a folder until the block ends."""
    made = Served(folder)
    made.start()
    try:
        yield made
    finally:
        made.stop()


@contextmanager
def browser() -> Iterator[Any]:
    """Open Chromium; the test is skipped where it or Playwright is not installed."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: no page is opened in a browser"
    )
    chromium = Path("/usr/bin/chromium")
    if not chromium.is_file():
        pytest.skip("chromium is not installed: no page is opened in a browser here")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=str(chromium), args=["--no-sandbox"])
        try:
            yield opened
        finally:
            opened.close()


def axe(page: Any) -> list[Any]:
    """Return the accessibility rules that an open page breaks; its context must bypass the Content-Security-Policy."""
    from test_browser import axe_core

    page.evaluate(axe_core())
    found: list[Any] = page.evaluate(AXE_RULES)
    return found
