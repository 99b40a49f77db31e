"""Show the records of a run on the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

from selfeval.errors import InputError
from selfeval.texts import safe_json

if TYPE_CHECKING:
    from selfeval.runs.reader import RunReader

__all__ = ["first_rows", "layout", "unusual_rows"]

_MOST_NUMBERS = 16
"""Maximum number of token ids shown per reply."""


def first_rows(reader: RunReader, kind: str, count: int) -> list[dict[str, Any]]:
    """Return the first `count` records of a kind; for dropped records, the first `count` of every stage and reason.

    Raises:
        RunFolderError: there is no such kind, none is written yet, or a file is damaged.
    """
    if kind != "dropped":
        return list(islice(reader.rows(kind), count))
    shown: Counter[Any] = Counter()
    rows = []
    for row in reader.rows(kind):
        group = (row.get("stage"), row.get("reason"))
        shown[group] += 1
        if shown[group] <= count:
            rows.append(row)
    return rows


def unusual_rows(reader: RunReader, kind: str, count: int) -> list[dict[str, Any]]:
    """Return the `count` questions that are least like the others, each with its `perplexity` under a model of the others.

    Raises:
        InputError: the kind is not `questions`, or there are fewer than two different questions.
        RunFolderError: no questions are written yet, or a file is damaged.
    """
    from selfeval.quality.ngram_model import cross_perplexities

    if kind != "questions":
        raise InputError(f"--unusual orders questions, got {kind}; write: selfeval show DIR questions --unusual")
    rows = list(reader.rows(kind))
    try:
        values = cross_perplexities([row["text"] for row in rows])
    except ValueError as error:
        raise InputError(f"the questions of {reader.folder} cannot be compared: {error}") from error
    found = [{**row, "perplexity": round(value, 2)} for row, value in zip(rows, values, strict=True)]
    return sorted(found, key=lambda row: -row["perplexity"])[:count]


def layout(row: Mapping[str, Any]) -> str:
    """Return a record as JSON with one field per line. A long list of numbers is truncated and ends with its length."""
    fields = [f"  {safe_json(name)}: {_field(value)}" for name, value in row.items()]
    return "{\n" + ",\n".join(fields) + "\n}"


def _field(value: Any) -> str:
    if isinstance(value, list) and len(value) > _MOST_NUMBERS and all(isinstance(item, int | float) for item in value):
        value = [*value[:_MOST_NUMBERS], f"... {len(value)} in all"]
    return safe_json(value)
