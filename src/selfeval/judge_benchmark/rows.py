"""Read the rows of a data file: JSON or JSON Lines, plain or compressed with xz or gzip."""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from selfeval.errors import DataError
from selfeval.texts import json_lines, parse_json, read_text, safe_json, shortened

__all__ = ["Row", "read_rows"]

V = TypeVar("V")

_LARGEST = 1 << 30
"""Size limit of a file in bytes, after decompression."""
_KIND = "data file"


@dataclass(frozen=True)
class Row:
    """A row of a data file. Its methods raise a DataError that names the file, the row and the field.

    Attributes:
        path: the file.
        where: file and row, for messages.
        values: fields of the row.
        example: a valid row, for messages.
    """

    path: Path
    where: str
    values: Mapping[str, Any]
    example: str

    def text(self, name: str, *, empty: bool = True) -> str:
        """Return a text field. A blank one is refused unless `empty`."""
        value = self.values.get(name)
        if not isinstance(value, str) or not (empty or value.strip()):
            self.refuse(name, "a text" if empty else "a text that is not empty")
        return value

    def one_of(self, name: str, allowed: Mapping[Any, V]) -> V:
        """Return the meaning of a field with a fixed set of values."""
        value = self.values.get(name)
        # Booleans equal 0 and 1, but are no label.
        if isinstance(value, bool) or not isinstance(value, str | int) or value not in allowed:
            self.refuse(name, f"one of {', '.join(map(safe_json, allowed))}")
        return allowed[value]

    def refuse(self, name: str, expected: str) -> NoReturn:
        """Raise a DataError about a field."""
        got = shortened(safe_json(self.values[name])) if name in self.values else "nothing"
        raise DataError(f'{self.where}: field "{name}" must be {expected}, got {got}; a valid row is {self.example}')


def read_rows(path: Path, example: str) -> Iterator[Row]:
    """Yield the rows of a file: a JSON list of objects, or one object per line; `.xz` and `.gz` files are decompressed.

    Args:
        path: path of the file.
        example: a valid row, for messages.

    Raises:
        DataError: the file is missing, cannot be read, has no rows, or a row is not a JSON object.
    """
    text, name = _text(path), str(path)
    is_list = text.lstrip().startswith("[")
    rows = _of_list(text, name, example) if is_list else json_lines(text, name, DataError, example)
    number = 0
    for number, values in rows:
        yield Row(path, f"{name}, {'row' if is_list else 'line'} {number}", values, example)
    if number == 0:
        raise DataError(f"{_KIND} {path} has no rows; a valid row is {example}")


def _of_list(text: str, name: str, example: str) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        values = parse_json(text)
    except ValueError as problem:
        raise DataError(
            f"{name} is not JSON ({problem}); write a JSON list of rows, or one row per line: {example}"
        ) from problem
    for number, row in enumerate(values, start=1):
        if not isinstance(row, dict):
            raise DataError(f"{name}, row {number}: not a JSON object, got {shortened(safe_json(row))}; write {example}")
        yield number, row


def _text(path: Path) -> str:
    opened: Any = {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix)
    if opened is None:
        return read_text(path, _KIND, DataError, most=_LARGEST, remedy="pass the path of an existing file")
    if not path.is_file():  # a named pipe would block
        raise DataError(f"{_KIND} {path} does not exist or is not a file; pass the path of an existing file")
    try:
        with opened(path, "rb") as file:
            data: bytes = file.read(_LARGEST + 1)
    except (OSError, EOFError, lzma.LZMAError) as problem:
        raise DataError(f"{_KIND} {path} cannot be decompressed: {problem}; download it again") from problem
    if len(data) > _LARGEST:
        raise DataError(f"{_KIND} {path} is larger than {_LARGEST >> 20:,} MiB, the limit; use a smaller file")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise DataError(f"{_KIND} {path} is not UTF-8 text ({problem}); save it as UTF-8") from problem
