"""The lease of a run at a URL: at most one process writes to the run.

The lease is an object, `lease.json`, with the process that holds it and the time when it was last renewed. It is created and
replaced by conditional writes only, so of two processes that want it at the same time one is refused by the store. The holder
renews it in short intervals. A process that was killed leaves it behind; another one takes it over

- at once, if the holder was a process of this machine and has ended, or
- if it has not been renewed for `Timing.expiry` seconds and then is not renewed during `Timing.watch` seconds either. The
  second condition needs no common clock: a machine whose clock is ahead does not take the lease of a live process.

Every holder gets a number, `epoch`, one higher than the one before. A holder that was suspended and lost the lease cannot
write to the run any more, because its successor has replaced the index (`selfeval.store.remote.mirror`).
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from selfeval.errors import InputError, RunFolderError, StorageError
from selfeval.store.holder import Holder, this_process
from selfeval.store.remote.index import read_index
from selfeval.store.remote.objects import Objects
from selfeval.store.remote.reaching import PATIENCE, is_refusal, reach
from selfeval.store.remote.threads import within
from selfeval.texts import parse_json

__all__ = ["LEASE", "Lease", "Timing", "claim", "lost", "read_credentials_again"]

LEASE = "lease.json"
"""Name of the lease among the objects of a run."""


@dataclass(frozen=True)
class Timing:
    """Times in seconds.

    Attributes:
        beat: between two renewals of the lease.
        expiry: without a renewal after which the lease may be taken over.
        watch: during which an expired lease is watched before it is taken over; longer than `beat`.
        settle: between writing and reading a lease where other writers may not be excluded.
        interval: minimum between two uploads.
        look: after which the working copy is listed although this process has changed nothing, because others may have.
        patience: during which a failing call is repeated.
        hurry: during which a command waits for a store that may be away, after Ctrl-C or when an upload has failed.
    """

    beat: float = 15.0
    expiry: float = 60.0
    watch: float = 20.0
    settle: float = 2.0
    interval: float = 10.0
    look: float = 50.0
    patience: float = PATIENCE
    hurry: float = 10.0


@dataclass(frozen=True)
class _Record:
    """Content of the lease; without a holder it is free."""

    epoch: int
    holder: Holder | None
    renewed: float
    id: str

    def as_bytes(self) -> bytes:
        holder = None if self.holder is None else self.holder.as_json()
        return json.dumps({"epoch": self.epoch, "holder": holder, "renewed": self.renewed, "id": self.id}).encode()

    def renew(self, **values: Any) -> _Record:
        """Return a new record: each is different from every other, because a version is that of a content."""
        return replace(self, renewed=time.time(), id=uuid.uuid4().hex, **values)


class Lease:
    """The lease of a run, held by this process until `release`.

    Args:
        objects: the objects of the run.
        url: URL of the run, for messages.
        timing: see `Timing`.

    Attributes:
        epoch: number of this holder.
        taken_over: whether another process held it and has not released it, or somebody has removed it.

    Raises:
        RunFolderError: another process holds it, or the lease is damaged.
        StorageError: the store cannot be reached.
    """

    def __init__(self, objects: Objects, url: str, timing: Timing) -> None:
        self._objects, self._url, self._timing = objects, url, timing
        self._ended, self._thread = threading.Event(), threading.Thread(target=self._beat, name="lease", daemon=True)
        self._renewing, self._is_silent = threading.Lock(), False
        found = self._read()
        # A lease that somebody removed: the number must not begin again at 1.
        last = found[0].epoch if found is not None else self._last_epoch()
        self.taken_over = found[0].holder is not None if found is not None else last > 0
        if found is not None:
            self._wait_for(*found)
        before = None if found is None else found[1]
        self._record = _Record(last + 1, this_process(), 0.0, "").renew()
        self._version = self._claim(before)
        self._lost = False
        self.excludes = self._does_exclude(before)
        self._thread.start()

    @property
    def epoch(self) -> int:
        """Number of this holder, from 1."""
        return self._record.epoch

    def _read(self) -> tuple[_Record, str] | None:
        found = reach(lambda: self._objects.read_version(LEASE), self._url, "read the lease", patience=self._timing.patience)
        return None if found is None else (_parsed(found[0], self._url), found[1])

    def _last_epoch(self) -> int:
        """Return the number of the last holder by the index; 0 for a new run."""
        found = read_index(self._objects, self._url, self._timing.patience)
        return 0 if found is None else found[0].epoch

    # -- taking it ------------------------------------------------------------------------------------------------------

    def _wait_for(self, record: _Record, version: str) -> None:
        """Return once the lease can be taken over.

        Raises:
            RunFolderError: its holder is alive.
        """
        if record.holder is None or record.holder.is_gone:
            return
        silent = time.time() - record.renewed
        if silent < self._timing.expiry:
            raise _in_use(self._url, record.holder, silent, self._timing)
        time.sleep(self._timing.watch)
        again = self._read()
        if again is not None and again[1] != version:
            raise _in_use(self._url, again[0].holder, 0.0, self._timing)

    def _claim(self, version: str | None) -> str:
        mine = self._put(self._record, version)
        if mine is not None and self._objects.settles:
            time.sleep(self._timing.settle)
            found = self._read()
            mine = mine if found is not None and found[0] == self._record else None
        if mine is None:
            found = self._read()
            raise _in_use(self._url, None if found is None else found[0].holder, 0.0, self._timing)
        return mine

    def _put(self, record: _Record, version: str | None) -> str | None:
        return claim(self._objects, LEASE, record.as_bytes(), version, self._url, self._timing.patience)

    def _does_exclude(self, before: str | None) -> bool:
        """Return whether the store refuses a write whose condition does not hold.

        Some stores with the protocol of S3 ignore the condition, and would let two processes write.
        """
        if not self._objects.conditional:
            return False
        record = self._record.renew()
        data = record.as_bytes()
        accepted = reach(
            lambda: self._objects.put_if(LEASE, data, before), self._url, "write the lease", patience=self._timing.patience
        )
        if accepted is not None:
            self._record, self._version = record, accepted
        return accepted is None

    # -- holding it -----------------------------------------------------------------------------------------------------

    def _beat(self) -> None:
        while not self._ended.wait(self._timing.beat) and not self._lost:
            # A failed renewal is repeated at the next beat. If the lease expires meanwhile, the index still protects the run.
            try:
                self.renew()
            except StorageError as error:
                read_credentials_again(self._objects, self._url, error)

    def renew(self) -> None:
        """Renew the lease.

        Raises:
            StorageError: the store cannot be reached.
        """
        with self._renewing:
            self._replace(self._record.renew(), min(self._timing.beat, self._timing.patience), self._ended)

    def _replace(self, record: _Record, patience: float, hurry: threading.Event | None = None) -> None:
        """Replace the lease of this holder, or note that another process has taken it over."""
        if not self._lost:
            version = self._put_mine(record, patience, hurry)
            self._lost = self._lost or version is None
            if version is not None:
                self._record, self._version = record, version

    def _put_mine(self, record: _Record, patience: float, hurry: threading.Event | None) -> str | None:
        """Replace the lease of this holder. Return its new version, or None if another process has taken it over."""
        data = record.as_bytes()
        version = claim(self._objects, LEASE, data, self._version, self._url, patience, hurry=hurry)
        if version is None and (mine := self._found_version(patience)) is not None:
            version = claim(self._objects, LEASE, data, mine, self._url, patience, hurry=hurry)
        return version

    def _found_version(self, patience: float) -> str | None:
        """Return the version of the lease if this holder wrote it.

        A renewal may have arrived although its answer was lost; then its version is not known here.
        """
        found = reach(lambda: self._objects.read_version(LEASE), self._url, "read the lease", patience=patience)
        if found is None:
            return None
        with suppress(RunFolderError):  # damaged, so not written by this process
            record = _parsed(found[0], self._url)
            if (record.epoch, record.holder) == (self._record.epoch, self._record.holder):
                return found[1]
        return None

    def check(self) -> None:
        """Refuse to continue without the lease.

        Raises:
            RunFolderError: another process has taken it over.
        """
        if self._lost:
            raise lost(self._url)

    def release(self, *, remove: bool = False) -> None:
        """Free the lease. Nothing happens if another process has taken it over.

        Args:
            remove: whether nothing was written to the run, so nothing of it must stay. Default: False. Otherwise the lease
                is replaced, because removing cannot be made to depend on its version everywhere.

        Raises:
            StorageError: the store cannot be reached.
        """
        self._ended.set()
        with self._renewing:
            # Renewed before it is removed: until it expires, no other process takes it over.
            self._replace(self._record.renew() if remove else self._record.renew(holder=None), self._timing.patience)
            if remove and not self._lost:
                reach(lambda: self._objects.remove(LEASE), self._url, "remove the lease", patience=self._timing.patience)

    def answers(self) -> bool:
        """Return whether the store takes a renewal within `Timing.hurry` seconds."""
        self._is_silent = not within(self._timing.hurry, self.renew)
        return not self._is_silent

    def abandon(self) -> None:
        """Try to free the lease for `Timing.hurry` seconds. No write of this process to the run begins from now on."""
        self._ended.set()
        if not self._is_silent:
            within(self._timing.hurry, self.release)
        self._lost = True


def lost(url: str) -> RunFolderError:
    """Return the error of a process whose lease was taken over."""
    return RunFolderError(
        f"another process has taken over {url}, because this one had not renewed its lease; only that process may write to it. "
        "Wait for it, then rerun the same command"
    )


def read_credentials_again(objects: Objects, url: str, error: StorageError) -> None:
    """Read the credentials again after a refusal: somebody may have renewed them, in files of the service."""
    if is_refusal(error):
        with suppress(StorageError):  # repeated after the next refusal
            reach(objects.reconnect, url, "read the credentials", patience=0.0)


def claim(
    objects: Objects,
    name: str,
    data: bytes,
    version: str | None,
    url: str,
    patience: float,
    *,
    advice: str = "",
    hurry: threading.Event | None = None,
) -> str | None:
    """Write an object if its version is still the given one, although answers may be lost on the way.

    Args:
        objects: the objects of the run.
        name: the object.
        data: its new content, different from every earlier one.
        version: its version; None if it must not exist.
        url: URL of the run, for messages.
        patience: see `reach`.
        advice: see `reach`.
        hurry: see `reach`.

    Returns:
        Its new version, or None if another process has written it.

    Raises:
        StorageError: the store cannot be reached.
    """
    settings: dict[str, Any] = {"patience": patience, "advice": advice, "hurry": hurry}
    new = reach(lambda: objects.put_if(name, data, version), url, f"write {name}", **settings)
    if new is None:
        # The first attempt may have succeeded, and its answer was lost; then the second one was refused.
        found = reach(lambda: objects.read_version(name), url, f"read {name}", **settings)
        new = found[1] if found is not None and found[0] == data else None
    return new


def _parsed(data: bytes, url: str) -> _Record:
    try:
        values = parse_json(data)
        epoch, renewed = values["epoch"], values["renewed"]
        if type(epoch) is not int or epoch < 0 or not isinstance(renewed, int | float):
            raise ValueError("its values have other types")
        holder = None if values["holder"] is None else Holder.of(values["holder"])
        if holder is None and values["holder"] is not None:
            raise ValueError("its holder is no process")
        return _Record(epoch, holder, float(renewed), str(values["id"]))
    except (ValueError, KeyError, TypeError, InputError) as error:
        raise RunFolderError(
            f"{url}/{LEASE} is damaged ({error}); make sure that no process uses the run, remove this object, and rerun the "
            "same command"
        ) from error


def _in_use(url: str, holder: Holder | None, silent: float, timing: Timing) -> RunFolderError:
    who = "another process" if holder is None else str(holder)
    seen = f"its last sign of life was {max(silent, 0.0):.0f} seconds ago"
    return RunFolderError(
        f"{url} is in use by {who}; {seen}. Wait for it, or use another URL; if it was killed, rerun the same command in "
        f"{max(timing.expiry - silent, 1.0):.0f} seconds"
    )
