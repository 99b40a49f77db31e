"""The working copy of a run at a URL: what is in it, and how it is brought up to date.

`state.json` records which index the copy is of, and size, time and number of each file when it was fetched or uploaded. A file
with the same facts is unchanged and not read again.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout

from selfeval.errors import RunFolderError
from selfeval.store.fence import FENCE
from selfeval.store.files import open_to_umask, read_object, write_json
from selfeval.store.progress import PROGRESS
from selfeval.store.remote.index import Entry, Index
from selfeval.store.remote.objects import Objects
from selfeval.store.remote.places import Home, home_of
from selfeval.store.remote.reaching import reach
from selfeval.store.remote.threads import in_threads
from selfeval.store.run_lock import LOCK

__all__ = [
    "Facts",
    "MissingObjectError",
    "State",
    "WorkingCopy",
    "facts_of",
    "files_of",
    "hash_of",
    "refuse_lost_labels",
]

_LEFT_OUT = (LOCK, FENCE, ".labels.lock", PROGRESS)
_MADE_HERE = ("search", "embeddings")
"""Folders that reading commands write to: indexes, which are made again if they are not those of the records, and vectors of
texts, which are found by the hash of the text."""
_UNFINISHED = (".part", ".old")

Facts = tuple[int, int, int]
"""Number, size in bytes and time of change in nanoseconds of a file."""


class MissingObjectError(Exception):
    """An object of the index is gone, because the index was replaced after it was read."""


@dataclass(frozen=True)
class State:
    """The facts about a working copy.

    Attributes:
        base: id of the index that it was fetched or uploaded as; empty if there was none.
        pending: id of an index that was perhaps written, before a kill.
        is_ahead: whether the copy may have results that are not uploaded, because a process writes to it or was killed.
        files: entry and facts of each file of that index that is in the copy.
    """

    base: str = ""
    pending: str = ""
    is_ahead: bool = False
    files: Mapping[str, tuple[Entry, Facts]] = field(default_factory=dict)

    def has_seen(self, index: Index | None) -> bool:
        """Return whether the copy contains everything that an index lists."""
        return (index.id if index else "") in (self.base, self.pending)


class WorkingCopy:
    """The working copy of a run.

    Args:
        home: URL of the run, and its places on this machine.
    """

    def __init__(self, home: Home) -> None:
        home.remember()
        self.home, self.root = home, home.copy
        self.fetching = FileLock(home.cache / "fetching.lock")
        self.writing = FileLock(home.cache / "writing.lock")

    @property
    def is_written_here(self) -> bool:
        """Whether a process of this machine writes to the copy. To be asked by a process that holds `fetching`."""
        try:
            with self.writing.acquire(timeout=0):
                return False
        except Timeout:
            return True

    # -- state ----------------------------------------------------------------------------------------------------------

    def read_state(self) -> State:
        """Read the state; that of an empty copy if there is none, or if the copy itself was removed."""
        if not self.home.state.exists() or not self.root.is_dir():
            return State()
        values = read_object(self.home.state, "base", "pending", "is_ahead", "files", remedy=f"remove {self.home.cache}")
        files = {path: (Entry(**entry), (*facts,)) for path, (entry, facts) in values["files"].items()}
        # Without run.json, somebody has emptied the copy, and there is nothing to keep.
        is_ahead = values["is_ahead"] and (self.root / "run.json").is_file()
        return State(values["base"], values["pending"], is_ahead, files)

    def write_state(self, state: State) -> None:
        """Write the state."""
        files = {path: [asdict(entry), list(facts)] for path, (entry, facts) in state.files.items()}
        values = {"base": state.base, "pending": state.pending, "is_ahead": state.is_ahead, "files": files}
        write_json(self.home.state, values)

    # -- fetching -------------------------------------------------------------------------------------------------------

    def fetch(self, objects: Objects, index: Index, patience: float, left_out: tuple[str, ...] = ()) -> int:
        """Bring the copy to the state of an index. Only changed files are fetched, and each is compared with its hash.

        Args:
            objects: the objects of the run.
            index: the index.
            patience: see `reach`.
            left_out: names of folders that are not needed. Default: none.

        Returns:
            Number of files fetched.

        Raises:
            MissingObjectError: the index was replaced meanwhile.
            RunFolderError: an object is damaged.
            StorageError: the store cannot be reached.
        """
        state = self.read_state()
        files = index.files
        present = {path: facts for path, entry in files.items() if (facts := self._present(path, entry, state)) is not None}
        missing = {path: files[path] for path in files if path not in present and not _is_in(path, left_out)}
        # It is kept until all are fetched: the index of a run in progress may be replaced meanwhile, again and again.
        self.home.staging.mkdir(exist_ok=True)
        # All are fetched and compared before the first file is put in its place.
        parts = in_threads(lambda path: self._fetch_one(objects, path, missing[path], patience), missing)
        # Not only files of the state: a copy of a run that another machine continued may have others, such as old checkpoints.
        for path, _ in list(files_of(self.root)):
            if path not in present and (path in state.files or not _is_in(path, _MADE_HERE)):
                (self.root / path).unlink(missing_ok=True)
        for path, part in zip(missing, parts, strict=True):
            present[path] = self._put(part, path)
        shutil.rmtree(self.home.staging, ignore_errors=True)
        _remove_empty_folders(self.root)
        # A lock that another machine's run cannot hold would say that no process is working on it.
        (self.root / LOCK).unlink(missing_ok=True)
        self.write_state(State(index.id, files={path: (files[path], facts) for path, facts in present.items()}))
        return len(missing)

    def _present(self, path: str, entry: Entry, state: State) -> Facts | None:
        """Return the facts of a file if its content is that of an entry."""
        if (facts := facts_of(self.root / path)) is None:
            return None
        known = state.files.get(path)
        same = known[0].sha256 if known and known[1] == facts else hash_of(self.root / path)
        return facts if same == entry.sha256 else None

    def _fetch_one(self, objects: Objects, path: str, entry: Entry, patience: float) -> Path:
        """Fetch an object into the staging folder, unless an earlier attempt has, and compare it with its hash."""
        part, url = self.home.staging / f"{entry.sha256}-{hashlib.sha256(path.encode()).hexdigest()[:16]}", self.home.url
        if not _has_content(part, entry) and not reach(
            lambda: objects.download(entry.object, part), url, f"read {path}", patience=patience
        ):
            raise MissingObjectError(entry.object)
        if not _has_content(part, entry):
            size = part.stat().st_size
            raise RunFolderError(
                f"{path} is damaged at {url}: the object {entry.object} has {size:,} bytes that do not match the recorded hash "
                f"({entry.bytes:,} bytes); restore this object from an earlier version or a backup"
            )
        open_to_umask(part)
        os.utime(part, ns=(entry.modified, entry.modified))
        return part

    def _put(self, part: Path, path: str) -> Facts:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(part, target)
        facts = facts_of(target)
        assert facts is not None
        return facts

    def set_aside(self) -> Path | None:
        """Move the copy away, if it has anything; return its new place."""
        if not self.root.is_dir() or not any(self.root.iterdir()):
            return None
        numbers = (path.name.partition("-")[2] for path in self.home.cache.glob("superseded-*"))
        number = max((int(found) for found in numbers if found.isdigit()), default=0) + 1
        target = self.home.cache / f"superseded-{number}"
        os.replace(self.root, target)
        self.home.state.unlink(missing_ok=True)
        return target


def refuse_lost_labels(folder: Path) -> None:
    """Refuse to write labels to a working copy that nothing uploads.

    Raises:
        RunFolderError: no process of this machine has opened the run for writing.
    """
    home = home_of(folder)
    if home is None:
        return
    copy = WorkingCopy(home)
    with copy.fetching:
        is_written = copy.is_written_here
    if not is_written:
        raise RunFolderError(f"labels written here would not be uploaded to {home.url}; use: selfeval label {home.url}")


# -- files --------------------------------------------------------------------------------------------------------------


def files_of(root: Path) -> Iterator[tuple[str, Facts]]:
    """Yield path and facts of every file of a run folder, except locks, links, signs of life and unfinished files."""
    for place, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not _is_unfinished(name))
        for name in sorted(names):
            path = Path(place, name)
            if name in _LEFT_OUT or _is_unfinished(name) or path.is_symlink():
                continue
            if (facts := facts_of(path)) is not None:  # None: removed just now
                yield path.relative_to(root).as_posix(), facts


def _is_in(path: str, folders: tuple[str, ...]) -> bool:
    """Return whether a path is in a folder with one of these names; a round has its own folders in `rounds/02`."""
    return any(part in folders for part in path.split("/")[:-1])


def _has_content(path: Path, entry: Entry) -> bool:
    return path.is_file() and path.stat().st_size == entry.bytes and hash_of(path) == entry.sha256


def _is_unfinished(name: str) -> bool:
    return name.startswith(".") and name.endswith(_UNFINISHED)


def facts_of(path: Path) -> Facts | None:
    """Return the facts of a file; None if there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def hash_of(path: Path) -> str:
    """Return the SHA-256 of the bytes of a file, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove_empty_folders(root: Path) -> None:
    for place, _, _ in os.walk(root, topdown=False):
        if Path(place) != root:
            with suppress(OSError):  # not empty
                os.rmdir(place)
