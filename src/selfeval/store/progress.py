"""The progress of a run, in `progress.json` of its folder, for readers in other processes.

It is a sign of life and no result: no stage reads it, no hash covers it, and it is removed when the process ends. A process
that was killed leaves it behind, so its age shows that nothing writes to the folder any more.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from selfeval.errors import InputError
from selfeval.store.files import open_file
from selfeval.texts import parse_json

__all__ = ["PROGRESS", "Progress", "read_progress", "remove_progress", "write_progress"]

PROGRESS = "progress.json"
"""File in the folder of the run, also while a later round is in progress."""

_LARGEST = 1 << 14
_KINDS: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (int, float), "float | None": (int, float)}


@dataclass(frozen=True)
class Progress:
    """The work of a process.

    Attributes:
        host: name of its machine.
        round: number of the round.
        stage: name of the stage; empty before the first one.
        seconds: seconds since the stage was begun by this process.
        step: what the progress is counted in, such as `questions`, or a step of unknown length, such as `loading`.
        done, total: units of the step; a total of 0 is unknown.
        rate: units per second, lately; 0 if unknown.
        seconds_left: estimate for the step; None if it is too early for one.
        figures: a few live figures, such as `reward 0.31`.
    """

    host: str = ""
    round: int = 1
    stage: str = ""
    seconds: float = 0.0
    step: str = ""
    done: float = 0.0
    total: float = 0.0
    rate: float = 0.0
    seconds_left: float | None = None
    figures: str = ""


def write_progress(folder: Path, progress: Progress) -> None:
    """Write the file in one step.

    Unlike results it is not synchronised to the disk: losing it loses nothing.

    Raises:
        OSError: it cannot be written.
    """
    temporary = _temporary(folder)
    # In a folder of unknown origin, a file of this name may be a link to any other.
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0)
    with os.fdopen(os.open(temporary, flags, 0o666), "w", encoding="utf-8") as file:
        file.write(json.dumps(asdict(progress)) + "\n")
    os.replace(temporary, folder / PROGRESS)


def remove_progress(folder: Path) -> None:
    """Remove the file, if it is there and can be removed."""
    for path in (_temporary(folder), folder / PROGRESS):
        with suppress(OSError):
            path.unlink()


def _temporary(folder: Path) -> Path:
    return folder / f".{PROGRESS}.part"


def read_progress(folder: Path) -> tuple[Progress, float] | None:
    """Read the progress of a run and its age in seconds; None without a readable file, which is never an error."""
    path = folder / PROGRESS
    try:
        with open_file(path) as file:
            changed, data = os.fstat(file.fileno()).st_mtime, file.read(_LARGEST + 1)
        values = parse_json(data) if len(data) <= _LARGEST else None
    except (OSError, ValueError, InputError):
        return None
    known = _checked(values) if isinstance(values, dict) else None
    return None if known is None else (Progress(**known), max(0.0, time.time() - changed))


def _checked(values: dict[str, Any]) -> dict[str, Any] | None:
    """Return the known fields, or None if one has another type or is out of range; the folder may be untrusted."""
    found = {field.name: values[field.name] for field in fields(Progress) if field.name in values}
    kinds = {field.name: str(field.type) for field in fields(Progress)}
    for name, value in found.items():
        if value is None and kinds[name] == "float | None":
            continue
        if isinstance(value, bool) or not isinstance(value, _KINDS[kinds[name]]):
            return None
        if isinstance(value, int | float) and not 0 <= value < 1e15:
            return None
    return found
