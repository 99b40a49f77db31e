"""Runs at a URL: fetched for reading, and opened for writing with uploads in the background.

Files are written to the working copy as in any run folder. A thread lists the copy after changes, at most once per interval,
and now and then for those of other processes (`selfeval.store.remote.listing`). The list is a state in which a kill could have
left the folder, so the run can be resumed from it. New contents are uploaded as objects, then the index is replaced
(`selfeval.store.remote.index`). A kill at any point leaves the index before or the index after.

While the store is away, the run continues, because its working copy is complete. Only the loss of the lease ends it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import Timeout

from selfeval.errors import InputError, RunFolderError, StorageError
from selfeval.store.changes import observing
from selfeval.store.remote.index import INDEX, OBJECTS, Entry, Index, epoch_of, object_name, read_index
from selfeval.store.remote.lease import Lease, Timing, claim, lost, read_credentials_again
from selfeval.store.remote.listing import copy_start, listed
from selfeval.store.remote.objects import Objects, open_objects
from selfeval.store.remote.places import Home, home_of, is_url, run_path
from selfeval.store.remote.reaching import reach
from selfeval.store.remote.threads import in_threads
from selfeval.store.remote.working_copy import Facts, MissingObjectError, State, WorkingCopy, facts_of, hash_of

__all__ = ["Mirror", "fetched", "opened"]

_ATTEMPTS = 5
_IN_MEMORY = 8 << 20
"""Size in bytes up to which a file is read once for its hash and its upload."""
_LAST_UPLOADS = 3
"""Further looks at the working copy before a run is closed."""
_NOT_READ = ("checkpoints", "replaced")
"""Folders of a run or round that only a resumed run needs, and that may be larger than everything else."""

Say = Callable[[str], object]


def _silent(text: str) -> None:
    """Say nothing."""


# -- reading ------------------------------------------------------------------------------------------------------------


def fetched(place: str | Path, say: Say = _silent, timing: Timing | None = None) -> Path:
    """Return a run folder for reading: for a URL, the working copy, brought up to date.

    Only changed files are fetched, and no checkpoints. If a process of this machine writes to the run, its working copy is
    returned as it is, and so are results that a killed process of this machine could not upload.

    Args:
        place: folder or URL of a run, or of one of its rounds.
        say: Optional. Called with notes for the user.
        timing: see `Timing`.

    Raises:
        InputError: there is no run at the URL, it cannot be reached, or an object is damaged.
    """
    path = run_path(place)
    home = home_of(path)
    assert home is not None or not is_url(place)
    if home is None:
        return path
    timing, copy = timing or Timing(), WorkingCopy(home)
    with copy.fetching:
        if not copy.is_written_here:
            _fetch_for_reading(copy, open_objects(home.url), say, timing)
    return path


def _fetch_for_reading(copy: WorkingCopy, objects: Objects, say: Say, timing: Timing) -> None:
    found = read_index(objects, copy.home.url, timing.patience)
    if found is None:
        raise RunFolderError(
            f"there is no run at {copy.home.url}; pass the URL of a run written by `selfeval run --output URL`"
        )
    if not _is_ahead(copy, found[0], say):
        _fetch(copy, objects, say, timing, found, left_out=_NOT_READ)


def _is_ahead(copy: WorkingCopy, index: Index | None, say: Say) -> bool:
    """Return whether the copy continues from the index, with results that are not uploaded yet."""
    state = copy.read_state()
    if not state.is_ahead:
        return False
    if state.has_seen(index):
        return True
    say(
        f"another machine has continued {copy.home.url}; results of this machine that were not uploaded are kept in "
        f"{copy.set_aside()}"
    )
    return False


def _fetch(
    copy: WorkingCopy,
    objects: Objects,
    say: Say,
    timing: Timing,
    found: tuple[Index, str] | None,
    left_out: tuple[str, ...] = (),
) -> tuple[Index, str] | None:
    """Bring the copy up to date and return the index and its version, which was `found`; None if there is none any more."""
    read, missing = "", ""
    for _ in range(_ATTEMPTS):
        found = read_index(objects, copy.home.url, timing.patience) if read else found
        if found is None:
            return None
        if found[0].id == read:
            raise RunFolderError(
                f"{copy.home.url}/{missing} is missing, although the index lists it; restore this object from an earlier "
                "version or a backup"
            )
        try:
            if count := copy.fetch(objects, found[0], timing.patience, left_out):
                say(f"fetched {count:,} files from {copy.home.url}")
            return found
        # The index was replaced while it was read, and objects that it does not list any more were removed.
        except MissingObjectError as error:
            read, missing = found[0].id, str(error)
    raise StorageError(
        f"the run at {copy.home.url} changes faster than it can be fetched; rerun the same command, which keeps the files that "
        "were fetched, or wait until the run is finished"
    )


# -- writing ------------------------------------------------------------------------------------------------------------


@contextmanager
def opened(place: str | Path, say: Say = _silent, timing: Timing | None = None) -> Iterator[Path]:
    """Open a run folder for writing: for a URL, the working copy, with the lease of the run, and upload what the block writes.

    Args:
        place: folder or URL of a run, which need not exist.
        say: Optional. Called with notes for the user.
        timing: see `Timing`.

    Raises:
        RunFolderError: another process uses the run, has taken it over, or an object is damaged.
        StorageError: the store cannot be reached; the working copy is intact.
    """
    path = run_path(place)
    home = home_of(path)
    # Never a plain folder for a URL: nothing would be uploaded.
    assert home is not None or not is_url(place)
    if home is None:
        yield path
        return
    mirror = Mirror(home, say, timing or Timing())
    try:
        with observing(mirror.changed):
            yield path
    except BaseException as cause:
        # The error of the block matters more; results that are not uploaded stay here.
        try:
            mirror.close(hurried=isinstance(cause, KeyboardInterrupt))
        except InputError as error:
            if error is not cause:
                say(f"the last results are not uploaded, they are only in {path}: {error}")
        raise
    mirror.close()


class Mirror:
    """Uploads of a working copy, from the lease of its run to `close`.

    Args:
        home: URL of the run, and its places on this machine.
        say: called with notes for the user.
        timing: see `Timing`.

    Raises:
        RunFolderError: another process uses the run, or an object is damaged.
        StorageError: the store cannot be reached.
    """

    def __init__(self, home: Home, say: Say, timing: Timing) -> None:
        self._home, self._say, self._timing, self._copy = home, say, timing, WorkingCopy(home)
        self._objects = open_objects(home.url)
        self._failure: BaseException | None = None
        self._is_away = False
        self._dead: set[str] = set()
        self._by_hash: dict[str, str] = {}
        self._not_listed: dict[str, str] = {}
        self._alone = [threading.Lock() for _ in range(16)]
        self._wake, self._closing, self._hurry = threading.Event(), threading.Event(), threading.Event()
        # In the background, failing calls are not repeated once `close` is called, which uploads everything itself.
        self._gives_up = self._closing
        with self._copy.fetching:
            self._lock()
            try:
                self._lease = Lease(self._objects, home.url, timing)
                self._begin(say)
            except BaseException:
                self._copy.writing.release()
                raise
        self._thread = threading.Thread(target=self._work, name="upload", daemon=True)
        self._thread.start()

    def _lock(self) -> None:
        try:
            self._copy.writing.acquire(timeout=0)
        except Timeout as error:
            raise RunFolderError(
                f"another process of this machine is using {self._home.url}; wait for it, or use another URL"
            ) from error

    def _begin(self, say: Say) -> None:
        try:
            if not self._lease.excludes:
                say(
                    f"warning: writes to {self._home.url} cannot be made conditional, so a second process that starts at the "
                    "same moment may not be refused; start one only"
                )
            found = self._bring_up_to_date(say)
            self._version: str | None
            self._index, self._version = found or (Index(id=""), None)
            self._state = self._copy.read_state()
            # A killed process may have replaced the index without noting it; the copy contains either one.
            self._state = replace(self._state, base=self._index.id, pending="")
            if self._lease.taken_over:
                # From now on the earlier holder, which may only be suspended, cannot replace the index.
                self._replace_index(dict(self._index.files))
            self._copy.root.mkdir(parents=True, exist_ok=True)
            self._state = replace(self._state, base=self._index.id, pending="", is_ahead=True)
            self._copy.write_state(self._state)
        except BaseException:
            self._lease.abandon()
            raise

    def _bring_up_to_date(self, say: Say) -> tuple[Index, str] | None:
        """Fetch the run, unless the copy continues from it. Return the index and its version; None for a new run."""
        found = read_index(self._objects, self._home.url, self._timing.patience)
        if _is_ahead(self._copy, found[0] if found else None, say):
            return found
        if found is None:
            if aside := self._copy.set_aside():
                say(f"there is no run at {self._home.url} any more; its earlier working copy is kept in {aside}")
            return None
        return _fetch(self._copy, self._objects, say, self._timing, found)

    # -- uploading ------------------------------------------------------------------------------------------------------

    def changed(self, path: Path) -> None:
        """Note that a file was written.

        Raises:
            RunFolderError: another process has taken over the run.
        """
        if not Path(os.path.abspath(path)).is_relative_to(self._copy.root):
            return
        self._check()
        self._wake.set()

    def _check(self) -> None:
        self._lease.check()
        if self._failure is not None:
            raise self._failure

    def _work(self) -> None:
        while True:
            self._wake.wait(self._timing.look)
            # Changes of some seconds are uploaded together.
            if self._closing.wait(self._timing.interval):
                return
            self._wake.clear()
            # Set between the wait and the clear: without this, `close` would wait for ever.
            if self._closing.is_set():
                return
            try:
                self._upload_or_note()
            except BaseException as error:
                self._failure = error  # raised by the next change, in the thread that works on the run
                return

    def _upload_or_note(self) -> None:
        """Upload the present state, or note that the store is away; the next upload has everything."""
        try:
            self.upload()
        except StorageError as error:
            read_credentials_again(self._objects, self._home.url, error)
            if not self._is_away and not self._closing.is_set():
                self._say(f"warning: {error}")
            self._is_away = True
        else:
            if self._is_away:
                self._say(f"uploads to {self._home.url} work again")
            self._is_away = False

    def upload(self) -> None:
        """Upload the present state of the copy.

        Raises:
            StorageError: the store cannot be reached.
            RunFolderError: another process has taken over the run.
        """
        known = {path: facts for path, (_, facts) in self._state.files.items()}
        found = listed(self._copy.root, known, self._home.staging)
        if found is None:
            raise StorageError(
                f"other processes rename files of the working copy {self._copy.root} all the time, so it cannot be uploaded as "
                f"a whole; {self._advice}"
            )
        if self._index.files and not found.facts:
            raise StorageError(
                f"the working copy {self._copy.root} is empty, so nothing was uploaded and {self._home.url} is unchanged; "
                "rerun the same command"
            )
        self._by_hash = {entry.sha256: entry.object for entry in self._index.files.values()} | self._not_listed
        uploaded = in_threads(lambda part: self._upload_one(*part), found.parts.items())
        entries = {path: entry for path, (entry, _) in self._state.files.items()} | dict(
            zip(found.parts, uploaded, strict=True)
        )
        files = {path: entries[path] for path in found.facts}
        if files != self._index.files:
            self._replace_index(files)
        elif not found.parts:
            return
        self._state = State(self._index.id, "", True, {path: (entry, found.facts[path]) for path, entry in files.items()})
        self._write_state(self._state)

    def _write_state(self, state: State) -> None:
        # Not by a thread that an interrupted command has left behind: another process may use the copy by now.
        self._lease.check()
        self._copy.write_state(state)

    @property
    def _advice(self) -> str:
        """Continuation of a sentence about a failed upload."""
        if not self._closing.is_set():
            return f"the run continues, its results are in {self._copy.root}, and the upload will be repeated"
        return (
            f"nothing is lost: the results are in {self._copy.root}. Check the credentials, the quota and the network, and "
            "rerun the same command on this machine"
        )

    def _upload_one(self, path: str, part: Path) -> Entry:
        """Upload the content of a file, unless an object has it, and return its entry."""
        before = facts_of(part)
        assert before is not None
        found = self._stored(path, part, before)
        if found is None:
            # What it was has not changed, because lines are only appended to a file that is not replaced.
            private = part.with_name(f"{part.name}.copy")
            copy_start(part, private, before[1])
            found = self._stored(path, private, before)
            private.unlink()
        assert found is not None, f"{path}: another process writes to the staging folder"
        return found

    def _stored(self, path: str, part: Path, facts: Facts) -> Entry | None:
        """Upload a file as `_upload_one` does; return None if a large one was appended to in the meantime."""
        before = facts_of(part)
        assert before is not None
        data = part.read_bytes() if before[1] <= _IN_MEMORY else part
        digest = hashlib.sha256(data).hexdigest() if isinstance(data, bytes) else hash_of(part)
        with self._alone[int(digest[:2], 16) % len(self._alone)]:  # two files may have the same content
            name = self._by_hash.get(digest)
            is_new = name is None
            if name is None:
                name = object_name(self._lease.epoch, digest)
                self._put(name, data, path)
            # A large file is read twice: if it was appended to in between, its object does not have the hash.
            if not isinstance(data, bytes) and facts_of(part) != before:
                return None
            if is_new:
                # Not uploaded again if this upload fails at another file.
                self._by_hash[digest] = self._not_listed[digest] = name
        return Entry(name, digest, len(data) if isinstance(data, bytes) else before[1], facts[2])

    def _put(self, name: str, data: bytes | Path, path: str) -> None:
        self._lease.check()
        reach(lambda: self._objects.upload(name, data), self._home.url, f"upload {path}", **self._settings)

    @property
    def _settings(self) -> dict[str, Any]:
        return {"patience": self._timing.patience, "advice": self._advice, "hurry": self._gives_up}

    def _replace_index(self, files: dict[str, Entry]) -> None:
        self._lease.check()
        new = Index(files, self._lease.epoch)
        # Before it is written: after a kill in between, the copy is known to contain it.
        self._write_state(replace(self._state, pending=new.id))
        version = self._claim_index(new, self._version)
        if version is None and (mine := self._unanswered_version()) is not None:
            version = self._claim_index(new, mine)
        if version is None:
            raise lost(self._home.url)
        before, after = ({entry.object for entry in index.files.values()} for index in (self._index, new))
        self._index, self._version, self._not_listed = new, version, {}
        # One index later, so that a reader of the index before this one finds its objects.
        self._remove(self._dead - after)
        self._dead = before - after

    def _claim_index(self, new: Index, version: str | None) -> str | None:
        return claim(self._objects, INDEX, new.as_bytes(), version, self._home.url, **self._settings)

    def _unanswered_version(self) -> str | None:
        """Return the version of the index if this holder wrote it: an earlier write may have arrived without an answer."""
        found = read_index(self._objects, self._home.url, self._timing.patience)
        return found[1] if found is not None and found[0].epoch == self._lease.epoch else None

    def _remove(self, names: set[str]) -> None:
        # The others are removed at the end of the next run.
        with suppress(StorageError):
            for name in names:
                reach(lambda name=name: self._objects.remove(name), self._home.url, f"remove {name}", patience=0.0)  # type: ignore[misc]

    # -- the end --------------------------------------------------------------------------------------------------------

    def close(self, *, hurried: bool = False) -> None:
        """Upload everything, remove objects that are not needed any more, and release the lease.

        Args:
            hurried: whether the user waits, after Ctrl-C: nothing is uploaded if the store does not answer within
                `Timing.hurry` seconds, and failing calls are not repeated. Default: False.

        Raises:
            StorageError: the store cannot be reached; the working copy is intact.
            RunFolderError: another process has taken over the run.
        """
        try:
            self._finish(hurried)
        except BaseException:
            # Also Ctrl-C during the last upload.
            self._hurry.set()
            self._lease.abandon()
            raise
        finally:
            shutil.rmtree(self._home.staging, ignore_errors=True)
            self._copy.writing.release()

    def _finish(self, hurried: bool) -> None:
        self._closing.set()
        self._wake.set()
        if hurried:
            self._hurry.set()
            if not self._lease.answers():
                raise StorageError(f"{self._home.url} does not answer; {self._advice}")
        self._thread.join()
        self._gives_up = self._hurry
        self._check()
        self.upload()
        # Labels that were saved during the upload, which may take minutes.
        for _ in range(_LAST_UPLOADS):
            self.upload()
        self._sweep()
        self._write_state(replace(self._state, is_ahead=False))
        # A new run that was refused has written nothing, and leaves nothing.
        self._lease.release(remove=self._version is None)

    def _sweep(self) -> None:
        """Remove the objects that no file needs, also those that a killed process left."""
        used = {entry.object for entry in self._index.files.values()}
        try:
            names = reach(lambda: self._objects.names(OBJECTS), self._home.url, "list the objects", patience=0.0)
        except StorageError:
            return
        # Objects of a later holder, if there is one by now, have a higher number.
        ours = {name for name in names if (epoch := epoch_of(name)) is not None and epoch <= self._lease.epoch}
        self._remove(ours - used)
