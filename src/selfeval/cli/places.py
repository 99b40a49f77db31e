"""Run folders on the command line: paths, and URLs of runs in an object store."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated

import typer

from selfeval.errors import InputError
from selfeval.store.remote.places import home_of, run_path

__all__ = ["RunFolder", "for_labels", "for_reading", "for_writing", "kept_fresh", "place"]

_REFRESH = 15.0
"""Seconds between two looks at the URLs of runs that are shown."""


def place(text: str) -> Path:
    """Parse a folder or a URL. That of a URL is a folder of the cache, which may not exist yet."""
    try:
        return run_path(text)
    except InputError as error:
        raise typer.BadParameter(str(error)) from None


RunFolder = Annotated[
    Path,
    typer.Argument(metavar="DIR", parser=place, help="Run folder or URL, e.g. runs/embedded or s3://bucket/runs/shop."),
]


def for_reading(folder: Path) -> Path:
    """Return a run folder after fetching what has changed at its URL, if it has one."""
    if home_of(folder) is not None:
        from selfeval.store.remote.mirror import fetched

        fetched(folder, _note)
    return folder


@contextmanager
def for_writing(folder: Path | None) -> Iterator[None]:
    """Hold the lease of a run at a URL and upload what the block writes; do nothing for other folders."""
    if folder is None or home_of(folder) is None:
        yield
        return
    from selfeval.store.remote.mirror import opened

    with opened(folder, _note):
        yield


@contextmanager
def for_labels(folder: Path) -> Iterator[None]:
    """Open a run for labels. During a run in progress on this machine, that run uploads them."""
    home = home_of(folder)
    if home is not None:
        from selfeval.store.remote.working_copy import WorkingCopy

        copy = WorkingCopy(home)
        with copy.fetching:
            is_in_progress = copy.is_written_here
        home = None if is_in_progress else home
    with for_writing(None if home is None else folder):
        yield


@contextmanager
def kept_fresh(folders: Sequence[Path]) -> Iterator[None]:
    """Fetch the runs at URLs, now and regularly while the block runs."""
    remote = [folder for folder in folders if home_of(for_reading(folder)) is not None]
    ended = threading.Event()
    thread = threading.Thread(target=_refresh, args=(remote, ended), name="fetch", daemon=True)
    if remote:
        thread.start()
    try:
        yield
    finally:
        ended.set()


def _refresh(folders: Sequence[Path], ended: threading.Event) -> None:
    from selfeval.store.remote.mirror import fetched

    while not ended.wait(_REFRESH):
        for folder in folders:
            # Shown when the store answers again; the pages show the time of the last change.
            with suppress(InputError, OSError):  # OSError: the disk of the working copy is full
                fetched(folder)


def _note(text: str) -> None:
    typer.echo(f"Note: {text}", err=True)
