"""Write the progress of a run to its folder while it is in progress, from a thread that looks at the terminal's state."""

from __future__ import annotations

import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from selfeval.stages.terminal import Terminal
from selfeval.store import Progress, remove_progress, write_progress

__all__ = ["progress_file"]

_SECONDS = 1.0
"""Seconds between two writes of changed progress."""
_SIGN_OF_LIFE = 10.0
"""Seconds after which the file is written again although nothing has changed."""


@contextmanager
def progress_file(folder: Path, terminal: Terminal) -> Iterator[None]:
    """Keep `progress.json` in a run folder up to date while the block runs, and remove it in the end.

    Nothing that the block computes depends on it: a failed write is ignored, and a folder that was replaced is left alone.

    Args:
        folder: folder of the run, which is locked by this process.
        terminal: shows the progress.
    """
    ended = threading.Event()
    thread = threading.Thread(target=_keep, args=(folder, terminal, ended), name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _keep(folder: Path, terminal: Terminal, ended: threading.Event) -> None:
    host, mine = platform.node(), _number(folder)
    written, at = None, 0.0
    while not ended.is_set() and _number(folder) == mine:
        now, progress = time.monotonic(), replace(terminal.progress(), host=host)
        if written is None or now - at > _SIGN_OF_LIFE or _news(progress) != _news(written):
            with suppress(OSError):  # a full disk is reported by the results, which matter
                write_progress(folder, progress)
            written, at = progress, now
        ended.wait(_SECONDS)
    if _number(folder) == mine:
        remove_progress(folder)


def _news(progress: Progress) -> Progress:
    """Return the progress without times, which change at every look."""
    return replace(progress, seconds=0.0, seconds_left=None)


def _number(folder: Path) -> int | None:
    """Return the number of a folder in its file system; None if it is gone."""
    try:
        return os.stat(folder).st_ino
    except OSError:
        return None
