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
        for line in path.read_text(encoding="utf-8").splitlines():
            if len(rows) < count:
                rows.append(json.loads(line))
    if not rows:
        raise RunFolderError(f"{folder} has no {kind} (yet); run `selfeval run` further")
    return rows
