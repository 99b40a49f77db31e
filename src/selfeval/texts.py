"""Text from the user: bounded file reading, JSON lines with line numbers, and escaping of text for the terminal."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from selfeval.errors import InputError

__all__ = [
    "LONGEST_LINE",
    "Line",
    "format_bytes",
    "has_half_character",
    "json_lines",
    "json_object",
    "nearest",
    "parse_json",
    "read_bytes",
    "read_lines",
    "read_text",
    "safe_json",
    "shortened",
    "text_digest",
    "visible",
]

R = TypeVar("R")

LONGEST_LINE = 64 << 20
"""Size limit of a line of records in bytes; a reply of 128k tokens takes about one MiB."""

Line = tuple[int, dict[str, Any]]
"""Line number, counted from 1, and the JSON object in the line."""

_SHOWN = 80
_DEEPEST = 100
"""Maximum nesting depth of lists and objects in a line; Python's own limit depends on the caller's stack depth."""
_HALF = re.compile("[\ud800-\udfff]")
# C0 and C1 controls (U+009B alone can begin an escape sequence), and the bidirectional marks that reorder output.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def read_text(path: Path, kind: str, error: type[InputError], *, most: int, remedy: str) -> str:
    """Read a UTF-8 text file, with or without a byte order mark.

    Named pipes and devices are refused: reading one could block forever or fill the memory.

    Args:
        path: path of the file.
        kind: its name in messages, such as "seeds file".
        error: class of the errors.
        most: maximum size in bytes.
        remedy: advice for the error message.

    Raises:
        InputError: an instance of `error`; the file is missing, not a regular file, too large, unreadable or not UTF-8.
    """
    data = read_bytes(path, kind, error, most, remedy)
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as problem:
        raise error(f"{kind} {path} is not UTF-8 text ({problem}); save it as UTF-8") from problem


def read_bytes(path: Path, kind: str, error: type[InputError], most: int, remedy: str) -> bytes:
    """Read a file; see `read_text`.

    Raises:
        InputError: an instance of `error`; the file is missing, not a regular file, too large or unreadable.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError
        with open(path, "rb", opener=_open_without_waiting) as file:
            facts = os.fstat(file.fileno())
            if not stat.S_ISREG(facts.st_mode):
                raise error(f"{kind} {path} is a named pipe or a device, not a file; {remedy}")
            if facts.st_size > most:
                raise error(f"{kind} {path} is larger than {most >> 20:,} MiB, the limit; use a smaller file")
            return file.read(facts.st_size)  # `read` allocates its argument in full
    except (OSError, ValueError) as problem:  # ValueError: NUL in the path
        _refuse(path, kind, error, remedy, problem)


def _open_without_waiting(name: str, flags: int) -> int:
    """Open a file without blocking; a named pipe would otherwise wait for a writer."""
    return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))


def _refuse(path: Path, kind: str, error: type[InputError], remedy: str, problem: OSError | ValueError) -> NoReturn:
    reasons: dict[type[Exception], str] = {
        FileNotFoundError: "does not exist",
        IsADirectoryError: "is a folder, not a file",
        PermissionError: "cannot be read: permission denied",
    }
    reason = reasons.get(type(problem))
    if reason is None:
        reason = f"cannot be read: {getattr(problem, 'strerror', None) or problem}"
    raise error(f"{kind} {visible(str(path))} {reason}; {remedy}") from problem


def read_lines(
    lines: Iterable[bytes | str],
    parse: Callable[[bytes | str], R],
    error: Callable[[int, bytes | str, Exception], InputError],
    *,
    skip_blank: bool = False,
) -> Iterator[tuple[int, R]]:
    """Yield the number and the parsed value of each line. All JSON Lines are read by this function.

    Args:
        lines: the lines. Those longer than `LONGEST_LINE` are refused, so a reader need not return more than a byte over it.
        parse: parses a line; raises TypeError or ValueError for a malformed one.
        error: makes an error from the number of a line, the line, and the reason.
        skip_blank: skip blank lines instead of parsing them. Default: False.

    Raises:
        InputError: made by `error`; a line is too long or malformed.
    """
    for number, line in enumerate(lines, start=1):
        if skip_blank and not line.strip():
            continue
        try:
            if len(line) > LONGEST_LINE:
                raise ValueError(f"it is longer than {LONGEST_LINE >> 20} MiB")
            value = parse(line)
        except (TypeError, ValueError) as problem:
            raise error(number, line, problem) from problem
        yield number, value


def json_lines(text: str | Iterable[bytes], where: str, error: type[InputError], example: str) -> Iterator[Line]:
    """Yield the objects of a user's JSON lines; blank lines are skipped.

    Args:
        text: the lines, as a text or one by one.
        where: the file's name, for messages.
        error: class of the errors.
        example: a valid line, for messages.

    Raises:
        InputError: an instance of `error`; a line is not a JSON object. The message names it and shows its beginning.
    """

    def refused(number: int, line: bytes | str, problem: Exception) -> InputError:
        seen = line.decode("utf-8", "replace") if isinstance(line, bytes) else line
        return error(f"{where}, line {number}: {problem}; got {shortened(seen.strip())}; write one {example} per line")

    lines = text.split("\n") if isinstance(text, str) else text  # splitlines would also split at U+2028
    return read_lines(lines, json_object, refused, skip_blank=True)


def json_object(line: bytes | str) -> dict[str, Any]:
    """Parse a JSON object of the user: a line of a file, or a whole text.

    Raises:
        TypeError: it is not an object.
        ValueError: not UTF-8, not JSON, or a text in it has an unpaired surrogate.
    """
    try:
        values = parse_json((line.decode("utf-8-sig") if isinstance(line, bytes) else line).strip())
    except UnicodeDecodeError as problem:
        raise ValueError(f"not UTF-8 text ({problem})") from problem
    except ValueError as problem:
        reason = problem.msg if isinstance(problem, json.JSONDecodeError) else str(problem)
        raise ValueError(f"not JSON ({reason})") from problem
    if not isinstance(values, dict):
        raise TypeError("not a JSON object")
    if has_half_character(values):
        raise ValueError("an unpaired surrogate")
    return values


def parse_json(data: str | bytes, *, lenient: bool = False) -> Any:
    """Parse a JSON value.

    Args:
        data: text, or bytes of UTF-8.
        lenient: accept non-finite numbers, and any depth that the interpreter can parse: for files written by this package and
            by libraries, which are large and read often. Default: False.

    Raises:
        ValueError: not UTF-8, not JSON, nested too deeply (100 levels unless lenient), a number with thousands of digits, or a
            non-finite number.
    """
    text = data.decode("utf-8") if isinstance(data, bytes) else data
    try:
        value = json.loads(text) if lenient else json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    except RecursionError as problem:
        raise ValueError("nested too deeply" if lenient else f"nested more than {_DEEPEST} levels deep") from problem
    except json.JSONDecodeError:
        raise
    except ValueError as problem:
        is_long = "set_int_max_str_digits" in str(problem)
        raise ValueError("an integer with thousands of digits" if is_long else str(problem)) from problem
    if not lenient and _is_deep(value):
        raise ValueError(f"nested more than {_DEEPEST} levels deep")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"the number {shortened(text)} is too large")
    return value


def _is_deep(value: Any) -> bool:
    level: list[Any] = [value]
    for _ in range(_DEEPEST):
        level = [inner for outer in level for inner in _inner(outer)]
        if not level:
            return False
    return True


def _inner(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def has_half_character(value: Any) -> bool:
    """Return whether a text, or any key or text inside lists and objects, contains a lone surrogate, which no file can hold."""
    if isinstance(value, str):
        return _HALF.search(value) is not None
    keys = any(has_half_character(key) for key in value) if isinstance(value, dict) else False
    return keys or any(has_half_character(inner) for inner in _inner(value))


def format_bytes(count: float, digits: int = 3) -> str:
    """Format a number of bytes in binary units.

    Args:
        count: bytes.
        digits: significant digits; the integer part is never truncated. Default: 3.

    Example:
        >>> format_bytes(900), format_bytes(3_300_000), format_bytes(14 * 2**30), format_bytes(23.98 * 2**30, digits=4)
        ('900 bytes', '3.15 MiB', '14.0 GiB', '23.98 GiB')
    """
    if abs(count) < 1024:
        return f"{count:.0f} bytes"
    power = min(3, int(math.log(abs(count), 1024)))
    value = count / 1024**power
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f} {('KiB', 'MiB', 'GiB')[power - 1]}"


def text_digest(text: str) -> bytes:
    """Return the SHA-256 of a text in UTF-8. Half characters, which a model can write, have a digest as well."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def shortened(text: str) -> str:
    """Return the beginning of a text, for messages."""
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def safe_json(value: Any, indent: int | None = None) -> str:
    """Serialise to JSON that keeps non-ASCII text readable and contains no control character that a terminal interprets.

    Raises:
        ValueError: a number is NaN or infinite, which JSON cannot represent.
    """
    text = json.dumps(value, ensure_ascii=False, indent=indent, allow_nan=False)
    return _UNSAFE.sub(lambda found: found[0] if found[0] == "\n" else f"\\u{ord(found[0]):04x}", text)


def visible(text: str, keep: str = "") -> str:
    r"""Return `text` with control characters escaped as in `\x1b`, so printing it cannot move the cursor or change colours.

    Args:
        text: any text.
        keep: control characters that are not escaped, such as the newline. Default: none.
    """
    return _UNSAFE.sub(lambda found: found[0] if found[0] in keep else _escaped(found[0]), text)


def _escaped(character: str) -> str:
    names = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
    code = ord(character)
    return names.get(character) or (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}")


def nearest(name: str, allowed: Sequence[str], elsewhere: Mapping[str, str] | None = None) -> str:
    """Return `; did you mean "x"?` for the closest name, or the list of allowed names if none is close.

    Args:
        name: the unknown name.
        allowed: names that are allowed in its place.
        elsewhere: Optional. Names that belong to another place, with the full name to suggest. Default: none.
    """
    others = elsewhere or {}
    close = difflib.get_close_matches(name, [*allowed, *others], n=1, cutoff=0.5)
    return f'; did you mean "{others.get(close[0], close[0])}"?' if close else f"; allowed: {', '.join(sorted(allowed))}"
