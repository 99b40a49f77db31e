"""Read texts and references from files: plain text with one text per line, or JSON lines with a named field."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from selfeval.errors import DataError
from selfeval.texts import json_lines, nearest, read_text, shortened

__all__ = ["read_hypotheses", "read_other", "read_references"]

_JSON = (".jsonl", ".json")
_LARGEST = 1 << 30
_REMEDY = "pass a text file with one text per line, or JSON lines"


def read_hypotheses(path: Path, field: str) -> list[str]:
    """Read one text per line; a blank line of a plain text file is an empty text.

    Args:
        path: the file; JSON lines if its name ends in .jsonl or .json.
        field: name of the field with the text, for JSON lines.

    Raises:
        DataError: the file is missing, empty or malformed; the message names the line.
    """
    found = []
    for number, texts in enumerate(_lines(path, field), start=1):
        if len(texts) != 1:
            raise DataError(f'{path}, line {number}: "{field}" has {len(texts)} texts; a line to score has one')
        found.append(texts[0])
    return found


def read_other(path: Path, field: str, hypotheses: Path, count: int) -> list[str]:
    """Read the texts of another system: one per line, and as many lines as the file of texts.

    Args:
        path, field: see `read_hypotheses`.
        hypotheses: the file of the texts, for messages.
        count: its number of lines.

    Raises:
        DataError: as `read_hypotheses`, or the file has another number of lines.
    """
    found = read_hypotheses(path, field)
    _check_count(path, len(found), hypotheses, count)
    return found


def read_references(paths: Sequence[Path], field: str, hypotheses: Path, count: int) -> list[list[str]]:
    """Read the references of each text from one or more files, which have as many lines as the file of texts.

    Args:
        paths: the files. In JSON lines, the field may have a list of several references.
        field: name of the field with the reference, for JSON lines.
        hypotheses: the file of the texts, for messages.
        count: its number of lines.

    Raises:
        DataError: a file is missing or malformed, or has another number of lines.
    """
    found: list[list[str]] = [[] for _ in range(count)]
    for path in paths:
        lines = _lines(path, field)
        _check_count(path, len(lines), hypotheses, count)
        for references, texts in zip(found, lines, strict=True):
            references += texts
    return found


def _check_count(path: Path, lines: int, hypotheses: Path, count: int) -> None:
    if lines != count:
        raise DataError(
            f"{hypotheses} has {count:,} lines and {path} {lines:,}; line i of each file belongs to the same case, so "
            "their numbers must be equal. Texts with line breaks need JSON lines"
        )


def _lines(path: Path, field: str) -> list[list[str]]:
    text = read_text(path, "file", DataError, most=_LARGEST, remedy=_REMEDY)
    if path.suffix.lower() in _JSON:
        rows = json_lines(text, str(path), DataError, json.dumps({field: "..."}))
        found = [_texts(values, field, f"{path}, line {number}") for number, values in rows]
    else:
        # The newline at the end of the file ends the last line; it does not begin another one.
        found = [[line] for line in text.removesuffix("\n").split("\n")] if text else []
    if not found:
        raise DataError(f"{path} is empty; {_REMEDY}")
    return found


def _texts(values: dict[str, Any], field: str, where: str) -> list[str]:
    if field not in values:
        raise DataError(
            f'{where}: missing "{field}", the field with the text; name another one with --field or --reference-field'
            f"{nearest(field, list(values))}"
        )
    value = values[field]
    texts = value if isinstance(value, list) else [value]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise DataError(f'{where}: "{field}" must be a string or a list of strings, got {shortened(json.dumps(value))}')
    return texts
