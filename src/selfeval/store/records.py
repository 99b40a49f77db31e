"""JSON Lines files of records, written atomically and read line by line, so errors name the damaged line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from selfeval.errors import RunFolderError
from selfeval.records import from_json, to_json
from selfeval.store.files import open_file, write_file
from selfeval.texts import LONGEST_LINE, parse_json, read_lines

__all__ = ["as_lines", "read_records", "read_rows", "write_records"]

R = TypeVar("R")


def write_records(path: Path, records: Iterable[Any]) -> None:
    """Write records atomically."""
    write_file(path, as_lines(records))


def as_lines(records: Iterable[Any]) -> bytes:
    """Serialise records as JSON Lines."""
    return "".join(json.dumps(to_json(record), ensure_ascii=False) + "\n" for record in records).encode()


def read_records(path: Path, kind: type[R], remedy: str) -> list[R]:
    """Read the records in a file.

    Args:
        path: path of the file.
        kind: class of the records.
        remedy: advice for the error message about a damaged line.

    Raises:
        RunFolderError: a line is damaged; the message names it.
    """
    return list(_read(path, lambda value: from_json(kind, value), remedy))


def read_rows(path: Path, remedy: str, *, appended: bool = False) -> Iterator[dict[str, Any]]:
    """Read the lines of a file as JSON objects.

    Args:
        path: path of the file.
        remedy: advice for the error message about a damaged line.
        appended: the file is appended to, so skip a truncated last line (no newline) left by a kill. Default: False.

    Raises:
        RunFolderError: a line is damaged; the message names it.
    """
    return _read(path, _as_object, remedy, appended=appended)


def _as_object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"a JSON {type(value).__name__}, expected an object")
    return value


def _read(path: Path, convert: Callable[[Any], R], remedy: str, *, appended: bool = False) -> Iterator[R]:
    def damaged(number: int, line: bytes | str, problem: Exception) -> RunFolderError:
        return RunFolderError(f"{path}, line {number} is damaged ({problem}); {remedy}")

    found = read_lines(_lines(path, appended=appended), lambda line: convert(parse_json(line, lenient=True)), damaged)
    return (value for _, value in found)


def _lines(path: Path, *, appended: bool) -> Iterator[bytes]:
    """Yield lines of at most one byte over the limit; read as bytes because text mode also splits at U+2028."""
    with open_file(path) as file:
        while line := file.readline(LONGEST_LINE + 1):
            # A line over the limit has no newline either, but is passed on, to be refused as too long.
            if appended and not line.endswith(b"\n") and len(line) <= LONGEST_LINE:
                return
            yield line
