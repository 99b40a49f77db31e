"""The process that uses a run, for the message that refuses a second one, and to know when it is gone.

A process number means something only on its machine, and in its container. The process of another machine is therefore never
declared dead by its number: only a missing sign of life shows that it is gone.
"""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from selfeval.texts import shortened, visible

__all__ = ["Holder", "this_process"]


_TOLERANCE = 2.0
"""Seconds by which the start of a process may seem to move: it is computed from that of the system, which follows the clock."""


@dataclass(frozen=True)
class Holder:
    """A process that uses a run.

    Attributes:
        host: name of its machine.
        machine: its start of the system and its process namespace; process numbers are comparable only where it is equal.
        pid: its number.
        started: when it was started, in seconds since 1970.
    """

    host: str
    machine: str
    pid: int
    started: float

    def __str__(self) -> str:
        since = datetime.fromtimestamp(self.started, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        return f"process {self.pid} on {visible(shortened(self.host))}, started {since}"

    @property
    def is_here(self) -> bool:
        """Whether it is a process of this machine whose number is known here."""
        return bool(self.machine) and self.machine == _machine()

    @property
    def is_gone(self) -> bool:
        """Whether it certainly has ended; False for a process of another machine."""
        if not self.is_here:
            return False
        started = _started(self.pid)
        return started is None or abs(started - self.started) > _TOLERANCE

    def as_json(self) -> dict[str, Any]:
        """Return the values for `of`."""
        return asdict(self)

    @classmethod
    def of(cls, values: Any) -> Holder | None:
        """Read a holder from JSON values; None if they are none."""
        if not isinstance(values, dict):
            return None
        host, machine, pid, started = (values.get(field.name) for field in fields(cls))
        if not (isinstance(host, str) and isinstance(machine, str) and type(pid) is int and isinstance(started, float)):
            return None
        return cls(host, machine, pid, started) if 0 <= started < 1e11 else None


def this_process() -> Holder:
    """Return this process."""
    return Holder(platform.node(), _machine(), os.getpid(), _started(os.getpid()) or 0.0)


@cache
def _machine() -> str:
    """Return what identifies the numbering of processes; empty where the system does not say.

    The name of the host is not enough: containers often share one, and each has a process 1.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{platform.node()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> float | None:
    """Return when a process was started; None if there is none, or it has ended and its parent has not noticed yet."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else float(process.create_time())
    except psutil.Error:
        return None
