"""The file of an unfinished `selfeval seeds`: every outcome so far, replaced as a whole after each batch.

It is next to the file of seeds, as NAME.partial. Its first line identifies what the questions are made of; a command with other
documents, model or settings is refused, and only a higher or lower count continues it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from selfeval.documents.questions import Outcome
from selfeval.errors import DataError
from selfeval.store import write_file
from selfeval.texts import json_lines, read_text, safe_json

__all__ = ["Progress", "dropped_file", "failed_file", "unfinished_file", "write_result"]

_LARGEST = 1 << 30


def dropped_file(target: Path) -> Path:
    """Return the file of the dropped questions: `seeds.dropped.jsonl` for `seeds.jsonl`."""
    return target.with_name(f"{target.stem}.dropped{target.suffix}")


def failed_file(target: Path) -> Path:
    """Return the file of the dropped questions if there is no seed: `seeds.failed.jsonl`. A later command replaces it."""
    return target.with_name(f"{target.stem}.failed{target.suffix}")


def unfinished_file(target: Path) -> Path:
    """Return the file of an unfinished command: `seeds.jsonl.partial`."""
    return target.with_name(f"{target.name}.partial")


class Progress:
    """The outcomes so far, in memory and on the disk.

    Args:
        target: the file of seeds.
        made_of: fingerprint of documents, model and settings.

    Raises:
        DataError: there is a file of another command, or a damaged one.
    """

    def __init__(self, target: Path, made_of: str) -> None:
        self.path, self._made_of = unfinished_file(target), made_of
        self.outcomes = self._read() if self.path.exists() else []

    def add(self, outcomes: Sequence[Outcome]) -> None:
        """Add the outcomes of a batch.

        Raises:
            StorageError: the disk is full or cannot be written; the file has the batches before.
        """
        self.outcomes = [*self.outcomes, *outcomes]
        rows: list[dict[str, Any]] = [{"made_of": self._made_of}, *map(_as_row, self.outcomes)]
        write_file(self.path, _lines(rows))

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)

    def _read(self) -> list[Outcome]:
        text = read_text(self.path, "file", DataError, most=_LARGEST, remedy="remove it to start again")
        (_, head), *rows = [*json_lines(text, str(self.path), DataError, "JSON object")] or [(0, {})]
        if head.get("made_of") != self._made_of:
            raise DataError(
                f"{self.path} has the unfinished questions of other documents, another model or other settings; run that "
                "command again to finish it, pass another --to, or remove the file"
            )
        try:
            return [_from_row(row) for _, row in rows]
        except (KeyError, TypeError) as problem:
            raise DataError(f"{self.path} is damaged ({problem!r}); remove it to start again") from problem


def _as_row(outcome: Outcome) -> dict[str, Any]:
    return {"number": outcome.number, "reason": outcome.reason, "question": outcome.question, "values": outcome.values}


def _from_row(row: dict[str, Any]) -> Outcome:
    return Outcome(row["number"], row["question"], row["reason"], row["values"])


def write_result(target: Path, outcomes: Sequence[Outcome]) -> None:
    """Write the dropped questions, if there are any, and then the seeds, whose file shows that the command is finished.

    Raises:
        StorageError: the disk is full or cannot be written.
    """
    seeds = [outcome.as_json() for outcome in outcomes if outcome.reason is None]
    dropped = [outcome.as_json() for outcome in outcomes if outcome.reason is not None]
    if dropped:
        write_file(dropped_file(target) if seeds else failed_file(target), _lines(dropped))
    if seeds:
        write_file(target, _lines(seeds))


def _lines(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(f"{safe_json(row)}\n" for row in rows)
