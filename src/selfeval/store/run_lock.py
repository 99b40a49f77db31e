"""The lock of a run folder: it excludes other processes of this machine, and those of others on a shared file system.

The system's lock (`flock`) on `.lock` decides. On NFS, Linux sends it to the server, so it holds between machines, unless the
file system is mounted with `nolock` or `local_lock`, or is another one whose locks hold on one machine only. There, the record
of the holder in `.lock` and the age of its progress show that a process of another machine is at work.
"""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from selfeval.errors import InputError, RunFolderError, StorageError
from selfeval.store.fence import dismiss_writer
from selfeval.store.files import as_storage_error, open_file
from selfeval.store.holder import Holder, this_process
from selfeval.store.progress import PROGRESS
from selfeval.texts import parse_json

__all__ = ["LOCK", "RunLock", "is_locked", "read_holder"]

LOCK = ".lock"
"""Name of the lock in a run folder."""

_SILENT = 60.0
"""Seconds without a sign of life after which a process of another machine counts as ended; a run writes one every 10."""
_LARGEST = 4096
_LOCKS = Path("/proc/locks")


class RunLock:
    """The lock of a run folder, held by this process until `release`.

    Args:
        root: the folder.

    Raises:
        RunFolderError: another process holds it.
        OSError: the lock cannot be opened.
        StorageError: the holder cannot be recorded in it.
    """

    def __init__(self, root: Path) -> None:
        self._path = root / LOCK
        before = _content(self._path)
        self._lock = FileLock(self._path)
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            # Some versions of filelock empty the file when they open it, even if they do not get the lock.
            _restore(self._path, before)
            raise _in_use(root, _holder(before)) from error
        try:
            _refuse_another_machine(root, _holder(before))
            self._record(json.dumps(this_process().as_json()))
            dismiss_writer(root)  # a worker of the process before, which may live on for some seconds
        except BaseException:
            # While it is locked. Without the record, the next attempt would not find the process that works here.
            _restore(self._path, before)
            self._lock.release()
            raise

    def _record(self, text: str) -> None:
        try:
            with self._path.open("r+b") as file:
                file.truncate(0)
                file.write(text.encode())
        except OSError as error:
            raise as_storage_error(self._path, error) from error

    def release(self) -> None:
        """Release the lock; the folder may be gone."""
        if self._lock.is_locked:
            with suppress(StorageError):
                self._record("")
        self._lock.release()


def _in_use(root: Path, holder: Holder | None) -> RunFolderError:
    who = "" if holder is None else f" ({holder})"
    return RunFolderError(f"another process is using {root}{who}; wait for it, or use another folder")


def _refuse_another_machine(root: Path, holder: Holder | None) -> None:
    """Refuse a folder in which a process of another machine works, although its lock does not hold here.

    Raises:
        RunFolderError: it wrote its progress a short time ago.
    """
    if holder is None or holder.is_here or (silent := _silence(root)) is None or silent >= _SILENT:
        return
    raise RunFolderError(
        f"{root} was left by {holder}, which wrote to it {silent:.0f} seconds ago. If it still runs, wait for it; if it was "
        f"killed, rerun the same command in {_SILENT - silent:.0f} seconds"
    )


def _silence(root: Path) -> float | None:
    """Return the age of the progress in seconds by the clock of the file system; None if there is none.

    Both times are set by the server of a shared file system. The clock of this machine may differ from that of the other.
    """
    try:
        os.utime(root / LOCK)
        return max(0.0, os.stat(root / LOCK).st_mtime - os.stat(root / PROGRESS).st_mtime)
    except OSError:
        return None


def _content(path: Path) -> bytes:
    try:
        with open_file(path) as file:
            return file.read(_LARGEST)
    except (OSError, InputError):
        return b""


def _restore(path: Path, before: bytes) -> None:
    if before and not _content(path):
        with suppress(OSError):
            path.write_bytes(before)


def _holder(content: bytes) -> Holder | None:
    try:
        return Holder.of(parse_json(content)) if content else None
    except ValueError:
        return None


def read_holder(root: Path) -> Holder | None:
    """Return the process that holds the lock of a run folder, or that was killed while it did; None if it is not known."""
    return _holder(_content(root / LOCK))


def is_locked(folder: Path) -> bool | None:
    """Return whether a process holds the lock of a run folder, without trying to lock it.

    Trying would make a run fail that begins at the same moment. Linux lists all locks of this machine with the numbers of
    their files.

    Returns:
        None if it is not known: on other systems, if there is no lock file, or if a process of another machine holds it.
    """
    try:
        wanted = str(os.stat(folder / LOCK).st_ino)
        lines = _LOCKS.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    # 1: FLOCK  ADVISORY  WRITE 10801 fe:00:5408994 0 EOF
    # The device is not compared: overlay and btrfs report another one here than in `stat`. NFS turns flock into POSIX locks.
    if any(re.search(rf" (FLOCK|POSIX) .*:{wanted} ", line) for line in lines):
        return True
    holder = read_holder(folder)
    return None if holder is not None and not holder.is_here else False
