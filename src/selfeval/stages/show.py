"""Looks at the records of a run without taking its lock."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from selfeval.config import nearest
from selfeval.errors import RunFolderError

__all__ = ["KINDS", "read_rows"]

KINDS = ("questions", "replies", "verdicts", "pairs", "dropped")


def read_rows(folder: Path, kind: str, count: int) -> list[dict[str, Any]]:
    """The first `count` records of a kind; dropped ones from every stage that dropped any.

    Raises:
        RunFolderError: no such kind, or none written yet.
    """
    if kind not in KINDS:
        raise RunFolderError(f'there are no records "{kind}"{nearest(kind, KINDS)}')
    pattern = "*/shard-*.jsonl" if kind == "dropped" else "shard-*.jsonl"
    rows: list[dict[str, Any]] = []
    for path in sorted((folder / kind).glob(pattern)):
        for number, line in enumerate(path.read_bytes().splitlines(), start=1):
            if len(rows) < count:
                rows.append(_row(path, number, line))
    if not rows:
        raise RunFolderError(f"{folder} has no {kind} (yet); run `selfeval run` further")
    return rows


def _row(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        return dict(json.loads(line))
    except (ValueError, TypeError) as error:
        raise RunFolderError(f"{path}, line {number} is damaged ({error}); remove this file and run again") from error
