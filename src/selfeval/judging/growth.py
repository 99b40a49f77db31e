"""Sizes of the values of a template, and bounds on the result of operations that can make a large one from small arguments.

A size is a number of characters: that of a text is its length, that of a list, tuple, set or mapping includes everything
that it contains, as if it were printed. A bound may be larger than the result, but never smaller.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence, ValuesView
from collections.abc import Set as AbstractSet
from typing import Any

from jinja2.exceptions import SecurityError
from jinja2.utils import Namespace

__all__ = [
    "LARGEST_TEXT",
    "Size",
    "filter_growth",
    "growth_of_operator",
    "method_growth",
    "refuse_large",
    "size_of",
]

LARGEST_TEXT = 1 << 22
"""Maximum number of characters of a value: more than the longest context of a language model."""

_DEEPEST = 16
"""Maximum depth of nested lists and mappings."""

_LARGEST_NUMBER = 1 << 64
_NUMBER = re.compile(r"\d+")
_DIRECTIVE = re.compile(r"%(?:\([^)]*\))?[-#0 +]*\d*(?:\.\d*)?")
_STAR = re.compile(r"%[-#0 +]*\d*\.?\*")
_NESTED_KEY = re.compile(r"%\([^)]*\(")
_FIELD = re.compile(r"\{[^{}]*\}")
_NESTED = re.compile(r"\{[^{}]*[{\[]")
"""Beginnings of fields that `_FIELD` does not read as `str.format` does; all numbers of such a text count."""


class Size:
    """A total that refuses to grow too large."""

    def __init__(self) -> None:
        self.total = 0

    def add(self, size: int) -> None:
        """Add the size of another part.

        Raises:
            SecurityError: the total is larger than `LARGEST_TEXT`.
        """
        self.total += size
        refuse_large(self.total, "a text or list")


def refuse_large(size: int, what: str) -> None:
    """Refuse a size above the limit.

    Raises:
        SecurityError: it is larger than `LARGEST_TEXT`.
    """
    if size > LARGEST_TEXT:
        raise SecurityError(
            f"{what} may reach more than {LARGEST_TEXT:,} characters, and a template may not make a larger text or list"
        )


def size_of(value: Any) -> int:
    """Return the size of a value.

    Raises:
        SecurityError: it is larger than `LARGEST_TEXT`, or nested too deeply.
    """
    if isinstance(value, str | bytes):  # by far the most frequent case
        refuse_large(len(value), "a text")
        return len(value)
    total = Size()
    _add(value, total, 0)
    return total.total


def _add(value: Any, total: Size, depth: int) -> None:
    if isinstance(value, str | bytes | range):
        total.add(len(value) + 2)
    elif isinstance(value, int):
        total.add(value.bit_length() // 3 + 2)
    elif isinstance(value, Mapping | Sequence | AbstractSet | ValuesView | Namespace):
        if depth == _DEEPEST:
            raise SecurityError(f"a template may nest lists and mappings {_DEEPEST} deep at most")
        total.add(2)
        for part in _parts(value):
            _add(part, total, depth + 1)
    else:
        total.add(2)


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, Namespace):  # it is printed with its values, but does not list them
        value = object.__getattribute__(value, "_Namespace__attrs")
    return value.items() if isinstance(value, Mapping) else value


# -- operators ----------------------------------------------------------------------------------------------------------


def growth_of_operator(operator: str, left: Any, right: Any) -> int:
    """Return a bound on the size of `left operator right`.

    Raises:
        SecurityError: the numbers are too large to compute with.
    """
    if operator == "**":
        return _power(left, right)
    if operator == "%" and isinstance(left, str | bytes):
        return _percent(left, [right])
    if operator == "*":
        return _product(left, right)
    return size_of(left) + size_of(right)


def _power(left: Any, right: Any) -> int:
    if not (isinstance(left, int | float) and isinstance(right, int | float) and abs(right) <= 64 and abs(left) <= 1e6):
        raise SecurityError("a template may only raise numbers up to 1,000,000 to powers up to 64")
    return 0


def _product(left: Any, right: Any) -> int:
    if sizes := [_length(value) for value in (left, right) if hasattr(value, "__len__")]:
        # A sequence times an integer is a repetition; two sequences are left to Python's own TypeError.
        return sizes[0] * next((value for value in (left, right) if isinstance(value, int)), 0)
    if any(isinstance(value, int) and abs(value) > _LARGEST_NUMBER for value in (left, right)):
        raise SecurityError("a template multiplies numbers that are too large; the limit is 2 ** 64")
    return 0


# -- methods and filters ------------------------------------------------------------------------------------------------


def _percent(text: Any, values: Sequence[Any]) -> int:
    """Bound `text % values`: every directive may show the largest value, as wide as the numbers in the directives."""
    written = text if isinstance(text, str) else str(text)
    digits = _NUMBER.findall(written if _NESTED_KEY.search(written) else " ".join(_DIRECTIVE.findall(written)))
    widths = sum(map(_number, digits))
    if _STAR.search(written):  # the width is one of the values
        widths += written.count("%") * max(_numbers(values), default=0)
    return len(written) + widths + written.count("%") * max((size_of(value) for value in values), default=0)


def _format(text: str, *values: Any, **named: Any) -> int:
    """Bound `str.format`: every field may show the largest value, as wide as the numbers in the fields."""
    shown, nested = [*values, *named.values()], _NESTED.search(text)
    widths = sum(map(_number, _NUMBER.findall(text if nested else " ".join(_FIELD.findall(text)))))
    if nested:  # the width is one of the values
        widths += text.count("{") * max(_numbers(shown), default=0)
    return len(text) + widths + text.count("{") * max((size_of(value) for value in shown), default=0)


def _number(digits: str) -> int:
    # Eight digits are too many in any case, and Python refuses to read thousands of them.
    return int(digits) if len(digits) < 8 else LARGEST_TEXT + 1


def _numbers(values: Sequence[Any]) -> list[int]:
    """Return all integers in the values, in lists and mappings among them, and those written in texts."""
    found: list[int] = []
    for value in values:
        if isinstance(value, int):
            found.append(abs(value))
        elif isinstance(value, str):
            found += map(_number, _NUMBER.findall(value))
        elif isinstance(value, Mapping):
            found += _numbers(list(value.values()))
        elif isinstance(value, list | tuple):
            found += _numbers(value)
    return found


def _padded(text: Any, width: int = 0, *_: Any) -> int:
    return max(_length(text), width)


def _replaced(text: Any, old: Any, new: Any, count: Any = None) -> int:
    times = str(text).count(str(old))
    return _length(text) + times * _length(new)


def _joined(items: Any, separator: Any = "", attribute: Any = None) -> int:
    return size_of(items) + len(items) * _length(separator)


def _expanded(text: str | bytes, tabsize: int = 8) -> int:
    tabs = text.count("\t") if isinstance(text, str) else text.count(b"\t")
    return len(text) + tabs * tabsize


def _translated(text: str, table: Any) -> int:
    return len(text) * (size_of(table) + 1)


def _indented(text: Any, width: Any = 4, first: bool = False, blank: bool = False) -> int:
    return _length(text) + (len(str(text).splitlines()) + 1) * (width if isinstance(width, int) else len(width))


def _wrapped(
    text: Any, width: int = 79, break_long_words: bool = True, wrapstring: str | None = None, break_on_hyphens: bool = True
) -> int:
    # A line and the next one together are at least as long as the width, apart from the ends of the text's own lines.
    breaks = 2 * _length(text) // max(width, 1) + len(str(text).splitlines()) + 1
    return _length(text) + breaks * len(wrapstring or "\n")


def _as_json(value: Any, indent: int | None = None) -> int:
    return size_of(value) * (1 + (_DEEPEST + 1) * (indent or 0))


def _added(items: Any, attribute: Any = None, start: Any = 0) -> int:
    # A list as the start would be copied once for every item.
    return 0 if isinstance(start, int | float) else len(items) * size_of(start) + size_of(items) ** 2


def _filled(count: int, fill: Any) -> int:
    return count * (size_of(fill) + 1)


def _rounded(value: Any, precision: int = 0, method: str = "common") -> int:
    return abs(precision)


def _by_width(value: Any, length: int = 1, *_: Any, **__: Any) -> int:
    return length


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str | bytes) else size_of(value)


_PADDED = dict.fromkeys(("center", "ljust", "rjust", "zfill"), _padded)

_METHODS: Mapping[str, Callable[..., int]] = {
    **_PADDED,
    "expandtabs": _expanded,
    "format": _format,
    "format_map": lambda text, values: _format(text, **values),
    "join": lambda separator, items: _joined(items, separator),
    "replace": _replaced,
    "to_bytes": _by_width,
    "translate": _translated,
}

_FILTERS: Mapping[str, Callable[..., int]] = {
    "batch": lambda value, linecount, fill_with=None: _filled(linecount, fill_with),
    "center": _padded,
    "format": lambda text, *values, **named: _percent(text, [*values, *named.values()]),
    "indent": _indented,
    "join": lambda items, d="", attribute=None: _joined(items, d, attribute),
    "replace": lambda s, old, new, count=None: _replaced(s, old, new),
    "round": _rounded,
    "slice": lambda value, slices, fill_with=None: _filled(slices, fill_with),
    "sum": _added,
    "tojson": _as_json,
    "wordwrap": _wrapped,
}


def method_growth(name: str, receiver: Any, values: Sequence[Any], named: Mapping[str, Any]) -> int:
    """Return a bound on the size of the result of a method of a text or number; 0 if it cannot grow.

    Args:
        name: name of the method.
        receiver: the object that has the method; None for a function.
        values: positional arguments.
        named: keyword arguments.
    """
    bound = _METHODS.get(name) if isinstance(receiver, str | bytes | int) else None
    return bound(receiver, *values, **named) if bound else 0


def filter_growth(name: str, values: Sequence[Any], named: Mapping[str, Any]) -> int:
    """Return a bound on the size of the result of a filter; 0 if it cannot grow.

    Args:
        name: name of the filter.
        values: the filtered value and the positional arguments.
        named: keyword arguments.
    """
    bound = _FILTERS.get(name)
    return bound(*values, **named) if bound else 0
