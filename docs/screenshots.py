"""Take the screenshots of docs/guides/view.md and docs/guides/label.md in Chromium, from a finished run.

python docs/screenshots.py RUN

Nothing is labelled: the page of labels asks for the first pair. The pictures are looked at before they are committed.
"""

from __future__ import annotations

import argparse
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn
from playwright.sync_api import sync_playwright

from selfeval.serve.gate import Access
from selfeval.serve.process import listen
from selfeval.view.app import make_view
from selfeval.view.label_desk import LabelDesk
from selfeval.view.opened import OpenedRuns

GUIDES = Path(__file__).parent / "guides"
SIZE = {"width": 1120, "height": 760}
PAGES = {"view": "", "label": "/label"}
"""Name of the picture, and end of the address of its page."""


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve the pages of a run in a thread; yield the address of its overview."""
    runs, listener = OpenedRuns([folder]), listen("127.0.0.1", 0)
    application = make_view(runs, Access(None, loopback=True), LabelDesk(rater="ann"))
    server = uvicorn.Server(uvicorn.Config(application, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    (name,) = runs.named()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/view/run/{name}"
    server.should_exit = True
    thread.join(10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    folder = parser.parse_args().run
    with served(folder) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name, end in PAGES.items():
            page = browser.new_page(viewport=SIZE)
            page.goto(address + end)
            page.screenshot(path=GUIDES / f"{name}.png")
            print(f"wrote {GUIDES / f'{name}.png'}")
        browser.close()


if __name__ == "__main__":
    main()
