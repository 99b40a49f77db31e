"""labels.jsonl: the labels of people, appended line by line.

A label counts as saved only when its whole line, with the newline, is on the disk. A line without a newline at the end of the
file was cut off by a kill or a full disk: it is ignored, and removed by the next append. Every other damaged line is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from selfeval.errors import RunFolderError
from selfeval.records import Label, from_json, to_json
from selfeval.store import as_storage_error, open_file, read_rows
from selfeval.store.remote.working_copy import refuse_lost_labels

__all__ = ["LABELS", "LabelFile"]

LABELS = "labels.jsonl"
"""The file, in a run folder."""
_LOCK = ".labels.lock"
_PATIENCE = 30.0
"""Seconds to wait for another process or thread, which holds the lock for one answer."""
_POLL = 0.005
"""Seconds between two attempts. The default of the library, ten times as long, lets one of several processes starve."""
_BLOCK = 1 << 16
_REMEDY = "correct or remove this line, or restore the file from a backup; the other labels are intact"


class LabelFile:
    """The labels of a run folder. Any number of processes may append at the same time.

    Args:
        folder: the run folder.

    Example:
        >>> LabelFile(Path("runs/first")).read()
        []
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LABELS
        self._lock = folder / _LOCK

    def read(self) -> list[Label]:
        """Return all labels in the order in which they were given, also the replaced ones; empty without a file.

        Raises:
            RunFolderError: a line is damaged; the message names it.
        """
        if not self.path.exists():
            return []
        found = []
        for number, row in enumerate(read_rows(self.path, _REMEDY, appended=True), start=1):
            try:
                found.append(from_json(Label, row))
            except (TypeError, ValueError) as error:
                raise RunFolderError(f"{self.path}, line {number} is damaged ({error}); {_REMEDY}") from error
        return found

    def append(self, label: Label) -> None:
        """Write a label to the disk, after all earlier ones.

        Raises:
            StorageError: the disk is full or not writable. The earlier labels are intact and this one is not saved.
            RunFolderError: the run folder was removed, or another process holds the lock of the file for half a minute.
        """
        with self.writing() as append:
            append(label)

    @contextmanager
    def writing(self) -> Iterator[Callable[[Label], None]]:
        """Hold the lock of the file, to write further files together with a label; yield the function that appends one.

        Raises:
            StorageError, RunFolderError: see `append`.
        """
        refuse_lost_labels(self.path.parent)
        if not self.path.parent.is_dir():  # taking the lock would create it again, without the run
            raise RunFolderError(f"{self.path.parent} was removed; move it back and answer again")
        # A new object each time: two threads that share one would both hold the lock.
        lock = FileLock(self._lock)
        try:
            lock.acquire(timeout=_PATIENCE, poll_interval=_POLL)
        except Timeout as error:
            raise RunFolderError(
                f"another process has been writing {self.path} for {_PATIENCE:g} seconds; end it and answer again"
            ) from error
        except OSError as error:
            raise as_storage_error(self.path, error) from error
        try:
            yield self._append
        finally:
            lock.release()

    def _append(self, label: Label) -> None:
        line = (json.dumps(to_json(label), ensure_ascii=False) + "\n").encode()
        try:
            with self._opened() as file:
                end = _end_of_lines(file)
                file.truncate(end)
                _write(file, end, line)
        except OSError as error:
            raise as_storage_error(self.path, error) from error

    @contextmanager
    def _opened(self) -> Iterator[BinaryIO]:
        """Open the file for reading and writing; create it if necessary."""
        is_new = not self.path.exists()
        if not is_new:
            open_file(self.path).close()  # refuses a device or a named pipe, which would block
        # Unbuffered: an error appears in the write, not when the file is closed.
        with open(self.path, "x+b" if is_new else "r+b", buffering=0) as file:
            if is_new:
                _sync_folder(self.path.parent)
            yield file


def _write(file: BinaryIO, end: int, line: bytes) -> None:
    file.seek(end)
    try:
        written = 0
        while written < len(line):  # the system may accept a part, before it reports a full disk
            written += file.write(line[written:])
        os.fsync(file.fileno())
    except BaseException:
        file.truncate(end)
        raise


def _end_of_lines(file: BinaryIO) -> int:
    """Return the position after the last newline."""
    place = file.seek(0, os.SEEK_END)
    while place > 0:
        start = max(0, place - _BLOCK)
        file.seek(start)
        newline = file.read(place - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        place = start
    return 0


def _sync_folder(folder: Path) -> None:
    """Write the name of a new file to the disk."""
    if os.name != "posix":
        return  # only POSIX systems open folders
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
