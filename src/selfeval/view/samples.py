"""The newest replies that were sampled in policy training, with their questions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from selfeval.errors import InputError
from selfeval.records import Question, Sampled, from_json
from selfeval.runs.reader import KINDS, RunReader, round_folder
from selfeval.store import read_rows
from selfeval.view.drawn import Drawn, version_of

__all__ = ["Sample", "newest_samples"]

_SHOWN = 6
_REMEDY = "resume the run, which checks its files"
_TEXTS: Drawn[Mapping[str, str]] = Drawn(256)


@dataclass(frozen=True)
class Sample:
    """A sampled reply.

    Attributes:
        key: the same for the same reply, whenever the page is rendered.
        question: text of its question.
        sampled: the record.
    """

    key: str
    question: str
    sampled: Sampled


def newest_samples(reader: RunReader) -> list[Sample]:
    """Return a few replies of the last iteration, the last one first; empty before the first.

    Raises:
        RunFolderError: a file is damaged.
    """
    paths = sorted(reader.folder.glob(KINDS["sampled"].files[0]))
    if not paths:
        return []
    try:
        rows = [from_json(Sampled, row) for row in read_rows(paths[-1], _REMEDY)]
    except OSError:  # set aside by the run since
        return []
    # Replies to a question are next to each other: one of each question shows more.
    first = list({row.question_id: (number, row) for number, row in enumerate(rows)}.values())[-_SHOWN:]
    return [Sample(f"{row.step}-{number}", _text(reader, row.question_id), row) for number, row in reversed(first)]


def _text(reader: RunReader, question: str) -> str:
    """Return the text of a training question, which may be of an earlier round."""
    for number in range(reader.round, 0, -1):
        for path in sorted(round_folder(reader.root, number).glob(KINDS["questions"].files[0])):
            texts = _TEXTS.get(path, version_of([path]), lambda path=path: _questions(path))  # type: ignore[misc]
            if question in texts:
                return texts[question]
    return ""


def _questions(path: Path) -> Mapping[str, str]:
    try:
        records = [from_json(Question, row) for row in read_rows(path, _REMEDY)]
    except (OSError, InputError):  # its page shows why
        return {}
    return {record.id: record.text for record in records}
