"""Looks at the records of a run without taking its lock."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from selfeval.config import nearest
from selfeval.errors import RunFolderError
from selfeval.store import check_files
from selfeval.store import read_rows as rows_of
from selfeval.texts import safe_json

__all__ = ["KINDS", "layout", "read_rows"]

KINDS = ("questions", "replies", "verdicts", "pairs", "dropped")


def read_rows(folder: Path, kind: str, count: int) -> list[dict[str, Any]]:
    """The first `count` records of a kind; of the dropped ones, the first `count` of every stage and reason.

    Raises:
        RunFolderError: no such kind, none written yet, or a file is damaged.
    """
    if kind not in KINDS:
        raise RunFolderError(f'there are no records "{kind}"{nearest(kind, KINDS)}')
    pattern = "*/shard-*.jsonl" if kind in ("dropped", "pairs") else "shard-*.jsonl"
    rows: list[dict[str, Any]] = []
    shown: Counter[Any] = Counter()
    for path in sorted((folder / kind).glob(pattern), key=lambda path: (path.parent.name != "train", path)):
        if kind != "dropped" and len(rows) >= count:
            break
        check_files(folder, [path])
        for row in rows_of(path, "remove this file and redo it: selfeval run --output DIR"):
            group = (row.get("stage"), row.get("reason")) if kind == "dropped" else None
            shown[group] += 1
            if shown[group] <= count:
                rows.append(row)
    if not rows:
        raise RunFolderError(f"{folder} has no {kind} (yet); run `selfeval run` further")
    return rows


_MOST_NUMBERS = 16
"""Token ids that are shown of a reply."""


def layout(row: Mapping[str, Any]) -> str:
    """A record as JSON with one field a line; long lists of numbers are cut, and the last item says how many there are."""
    fields = [f"  {safe_json(name)}: {_field(value)}" for name, value in row.items()]
    return "{\n" + ",\n".join(fields) + "\n}"


def _field(value: Any) -> str:
    if isinstance(value, list) and len(value) > _MOST_NUMBERS and all(isinstance(item, int | float) for item in value):
        value = [*value[:_MOST_NUMBERS], f"... {len(value)} in all"]
    return safe_json(value)
