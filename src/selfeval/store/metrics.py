"""Metrics in JSON Lines, the only files of a run that are appended to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from selfeval.errors import RunFolderError
from selfeval.store.files import as_storage_error, write_file
from selfeval.store.records import read_rows

__all__ = ["add_metrics", "keep_metrics", "read_metrics"]

_REMEDY = "remove it and rerun the same command"


def add_metrics(path: Path, values: Mapping[str, Any]) -> None:
    """Append a line.

    Raises:
        StorageError: the disk is full or not writable.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
    except OSError as error:
        raise as_storage_error(path, error) from error


def keep_metrics(path: Path, last_step: int) -> None:
    """Remove lines after `last_step`, written by a run that was killed after its last checkpoint."""
    # Rewritten atomically; a truncated last line is dropped with the rest.
    lines = read_metrics(path)
    write_file(path, "".join(json.dumps(line) + "\n" for line in lines if line["step"] <= last_step))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read all lines; skip a truncated last line.

    Raises:
        RunFolderError: another line is damaged.
    """
    if not path.exists():
        return []
    rows = list(read_rows(path, _REMEDY, appended=True))
    for number, row in enumerate(rows, start=1):
        if not isinstance(row.get("step"), int | float):
            raise RunFolderError(f"{path}, line {number} is damaged (it has no step); {_REMEDY}")
    return rows
