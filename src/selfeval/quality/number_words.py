"""Numbers written in words, in English and Chinese, replaced by digits: "twenty one apples" and 二十一个苹果 have
the number 21.

A number that is overlooked makes two different questions equal, and a word that is taken for a number by mistake (三 in
三明治, sandwich) at most keeps two equal questions. So every numeral counts, except a single "one" and 一, which are mostly
articles and pronouns: "which one", 一起 (together). Ordinals, fractions and "twice" are words like others.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal, getcontext
from typing import Final

__all__ = ["with_digits"]

_TEENS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
    "nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_SMALL: Final = {word: value for value, word in enumerate(_TEENS.split())} | {
    word: value for value, word in zip(range(20, 100, 10), _TENS.split(), strict=True)
}
_SCALES: Final = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_WORD = "|".join((*_SMALL, *_SCALES))
# "3 million" is one number, and "5 two-digit numbers" are two.
_PHRASE = re.compile(rf"(?:\b\d+(?:\.\d+)? (?={'|'.join(_SCALES)}))?\b(?:{_WORD})(?: (?:and )?(?:{_WORD}))*\b")

_DIGITS: Final = {"〇": 0, "零": 0, "两": 2, "兩": 2} | {char: value for value, char in enumerate("一二三四五六七八九", 1)}
_UNITS: Final = {"十": 10, "百": 100, "千": 1000}
_MYRIADS: Final = {"万": 10**4, "萬": 10**4, "亿": 10**8, "億": 10**8}
_ALL_UNITS: Final = {**_UNITS, **_MYRIADS}
_ALL_DIGITS = "".join(_DIGITS)
_NUMERALS = "".join((*_DIGITS, *_ALL_UNITS))
# 一两个 is one or two, 十二三 is 12 or 13, and 二〇二三 is a year. 一两 is a weight as well, which is then read as two numbers.
_RANGE = re.compile(rf"(?<![{_ALL_DIGITS}])(?:一[二两兩]|[二两兩]三|三四|四五|五六|六七|七八|八九)(?![{_ALL_DIGITS}])")
_CHINESE = re.compile(rf"\d+(?:\.\d+)?[{''.join(_ALL_UNITS)}]+|[{_NUMERALS}]+")


def with_digits(folded: str) -> str:
    """Replace the numbers that are written in words by digits.

    Args:
        folded: a text as `selfeval.quality.dedupe.normalise` returns it, so "twenty-one" is "twenty one".

    Example:
        >>> with_digits("two hundred and five apples or 3 million"), with_digits("which one has twenty one")
        ('205 apples or 3000000', 'which one has 21')
        >>> with_digits("一百零五个苹果和十二个梨"), with_digits("一起买3万个")
        ('105个苹果和12个梨', '一起买30000个')
    """
    found = _PHRASE.sub(lambda match: _read(match[0], lambda run: " ".join(_english(run.split()))), folded)
    return _CHINESE.sub(lambda match: _read(match[0], _chinese), found)


def _read(run: str, convert: Callable[[str], str]) -> str:
    """Return the digits of a number in words, or the words if it has too many digits to be exact."""
    try:
        return convert(run)
    except OverflowError:
        return run


# -- English ------------------------------------------------------------------------------------------------------------


class _Number:
    """An English number as far as it was read.

    Attributes:
        total: the part with scales that are complete, such as thousands.
        group: the part below the last scale; None right after a scale.
        limit: the next scale must be smaller than this.
        words: number of words.
    """

    def __init__(self) -> None:
        self.total, self.limit, self.words = Decimal(0), 10**15, 0
        self.group: Decimal | None = None

    def take(self, word: str) -> bool:
        """Add a word, and return whether it continues this number."""
        taken = self._scale(_SCALES[word]) if word in _SCALES else self._small(word)
        self.words += taken
        return taken

    def _small(self, word: str) -> bool:
        value, group = Decimal(_SMALL.get(word, word)), self.group
        if group is not None and not (
            (group >= 100 and group % 100 == 0 and value > 0) or (group % 100 >= 20 and group % 10 == 0 and 0 < value < 10)
        ):
            return False
        self.group = value + (group or 0)
        return True

    def _scale(self, scale: int) -> bool:
        if scale >= self.limit or self.group == 0:
            return False
        if scale == 100:
            if self.group is not None and self.group >= 100:
                return False
            self.group = scale * (Decimal(1) if self.group is None else self.group)
            return True
        self.total += scale * (1 if self.group is None else self.group)
        # Nothing follows a dozen: "two dozen five" is two numbers.
        self.group, self.limit = (Decimal(0), 0) if scale == 12 else (None, scale)
        return True

    @property
    def is_joined_by_and(self) -> bool:
        """Whether "and" may continue the number: after a scale. "Twenty and five" are two numbers."""
        return self.group % 100 == 0 and self.group >= 100 if self.group else bool(self.total)

    def split_before(self, word: str) -> tuple[_Number, _Number]:
        """Return this number without the words that belong to the next one, and the start of that one.

        In "three million two million", the second "million" shows that "two" begins a number.
        """
        following = _Number()
        if word in _SCALES and self.total and self.group:
            following.group, following.words, self.group = self.group, 1, None
        return self, following

    @property
    def value(self) -> Decimal:
        return self.total + (self.group or 0)


def _english(words: Sequence[str]) -> Iterator[str]:
    """Yield the numbers of a run of number words, of which there may be several: "nineteen ninety"."""
    number = _Number()
    for place, word in enumerate(words):
        is_joined = place == 0 or words[place - 1] != "and" or (number.is_joined_by_and and _is_last_part(words[place:]))
        if word == "and" or (is_joined and number.take(word)):
            continue
        complete, number = number.split_before(word) if is_joined else (number, _Number())
        yield _shown(complete)
        number.take(word)
    yield _shown(number)


def _is_last_part(words: Sequence[str]) -> bool:
    """Return whether words begin with a number below 100, which is no number of hundreds: "five" and not "five hundred"."""
    scale = next((word for word in words if word == "and" or word in _SCALES), "")
    return words[0] in _SMALL and scale not in ("dozen", "hundred")


def _shown(number: _Number) -> str:
    return "one" if number.value == 1 and number.words == 1 else _plain(number.value)


def _plain(value: Decimal) -> str:
    if value.adjusted() >= getcontext().prec:
        raise OverflowError(f"a number of {value.adjusted() + 1} digits")
    return f"{int(value)}" if value == int(value) else f"{value.normalize():f}"


# -- Chinese ------------------------------------------------------------------------------------------------------------


def _chinese(run: str) -> str:
    """Return the digits of a run of numerals, both numbers of a range, or the run itself if it is no number."""
    if run == "一" or all(char in "百千" or char in _MYRIADS for char in run):
        return run
    if found := _RANGE.search(run):
        return " ".join(_value(f"{run[: found.start()]}{digit}{run[found.end() :]}") for digit in found[0])
    return _value(run)


def _value(run: str) -> str:
    if all(char in _DIGITS for char in run):
        return "".join(str(_DIGITS[char]) for char in run)
    head = re.match(r"[\d.]*", run)
    assert head is not None
    return _plain(_sum(run[head.end() :], Decimal(head[0]) if head[0] else None))


def _sum(run: str, digit: Decimal | None) -> Decimal:
    """Return the value of numerals with units, after a digit that was read already or none: 三百五 is 350, 三百零五 is 305."""
    total, section, place = Decimal(0), Decimal(0), 1
    for char in run:
        if char in _DIGITS:
            # Digits without a unit between them have places: 二〇万 is 20 万.
            digit = Decimal(_DIGITS[char]) if not digit else 10 * digit + _DIGITS[char]
            place = 1 if char in "〇零" else place
        elif char in _UNITS:
            section += (1 if digit is None else digit) * _UNITS[char]
            digit, place = None, _UNITS[char] // 10
        else:
            section += digit or 0
            total = (
                (total + section) * _MYRIADS[char] if total and _MYRIADS[char] == 10**8 else total + section * _MYRIADS[char]
            )
            section, digit, place = Decimal(0), None, _MYRIADS[char] // 10
    return total + section + (digit or 0) * place
