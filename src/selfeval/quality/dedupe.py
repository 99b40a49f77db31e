"""Near-duplicate detection for short texts in any language, without comparing all pairs.

Texts are compared in the form that `comparable` returns: normalised, without the label of a question, contractions written out.
Two texts are near-duplicates if they are equal in that form, or if they have the same numbers and operators *and* their
shingles overlap enough. Numbers are content: "Tom has 3 apples" and "Tom has 4 apples" are different questions, and so are
3 - 5 and 3 + 5. Numbers in English or Chinese words count like those in digits.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from selfeval.quality.number_words import with_digits
from selfeval.quality.written_questions import bare_question

__all__ = [
    "Compared",
    "NearDuplicates",
    "comparable",
    "compared",
    "is_near",
    "is_unspaced",
    "jaccard",
    "normalise",
    "quantities",
    "shingles",
    "units",
]

# Scripts without spaces between words: Thai, Lao, Myanmar, Khmer, kana, Han.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
# -, * and / are punctuation to Unicode. Between two operands (numbers, brackets, single letters), or as a sign, they
# are arithmetic.
_OPERATOR = re.compile(r"(?:(?<=[\d)])|(?<=\b[^\W\d_]))\s*([-*/])\s*(?=-?[\d(]|[^\W\d_]\b)|(?<!\w)(-)(?=\d)")
_ARITHMETIC = {"-": "−", "*": "×", "/": "÷"}
_APOSTROPHE = re.compile("[\u2018\u2019\u02bc\uff07]")
# Only clear cases: the 's of a name is a genitive ("Tom's apples"), and 'd is "had" or "would".
_IS = "it|he|she|that|this|there|here|what|who|where|when|how|why|which"
_CONTRACTIONS = [
    (re.compile(pattern, re.IGNORECASE), written_out)
    for pattern, written_out in [
        (r"\bcan't\b", "can not"),
        (r"\bcannot\b", "can not"),
        (r"\bwon't\b", "will not"),
        (r"\bshan't\b", "shall not"),
        (r"n't\b", " not"),
        (r"\blet's\b", "let us"),
        (rf"\b({_IS})'s\b", r"\1 is"),
        (r"'re\b", " are"),
        (r"'m\b", " am"),
        (r"'ll\b", " will"),
        (r"'ve\b", " have"),
    ]
]
_QUANTITY = re.compile(r"\d+(?:[.,:]\d+)*|[−×÷+^%=<>]")


def normalise(text: str) -> str:
    """Normalise a text: fold compatibility forms, case, punctuation and whitespace.

    Applies NFKC and case folding (Unicode Standard Annex 15, https://www.unicode.org/reports/tr15/), then replaces punctuation
    by spaces. Characters that change the meaning of a question are kept: decimal points, % and ^, and arithmetic - * / (as
    − × ÷). 1,000 becomes 1000.

    Args:
        text: any text in any language.

    Returns:
        Words and symbols, separated by single spaces; empty if the text has none.

    Example:
        >>> normalise("What is  3-5,  e-mail?")
        'what is 3 − 5 e mail'
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    text = _OPERATOR.sub(lambda match: _ARITHMETIC[match[1] or match[2]], _THOUSANDS.sub("", text))
    return " ".join("".join(_folded(text, i) for i in range(len(text))).split())


def comparable(text: str) -> str:
    """Return the form in which questions are compared: no label or preamble, contractions written out, normalised.

    Args:
        text: any text in any language. The contractions are English ones.

    Returns:
        The normalised text; empty if the text has no words.

    Example:
        >>> comparable("Question 2: What's the sum that they're asked for?")
        'what is the sum that they are asked for'
    """
    text = _APOSTROPHE.sub("'", bare_question(text))
    for pattern, written_out in _CONTRACTIONS:
        text = pattern.sub(written_out, text)
    return normalise(text)


def units(text: str) -> list[str]:
    """Split a text into the units of its n-grams: words, or characters if the script has no spaces.

    A single Chinese, Japanese, Thai, Lao, Khmer or Burmese character selects characters for the whole text.

    Args:
        text: any text; it is normalised first.

    Returns:
        The units in order; empty if the text has none.
    """
    folded = normalise(text)
    return list(folded.replace(" ", "")) if is_unspaced(folded) else folded.split()


def is_unspaced(text: str) -> bool:
    """Return whether a text has a character of a script without spaces between words.

    Example:
        >>> is_unspaced("two apples"), is_unspaced("两个苹果")
        (False, True)
    """
    return _UNSPACED.search(text) is not None


def shingles(text: str, size: int = 3) -> frozenset[str]:
    """Return the set of n-grams of a text. Broder 1997 (https://doi.org/10.1109/SEQUEN.1997.666900).

    Args:
        text: any text; it is normalised first.
        size: number of units (see `units`) per shingle, > 0. Default: 3.

    Returns:
        The set. A text shorter than `size` is a single shingle; an empty text has none.

    Raises:
        ValueError: size is not positive.

    Example:
        >>> sorted(shingles("Tom has 3 red apples"))
        ['3 red apples', 'has 3 red', 'tom has 3']
    """
    if size <= 0:
        raise ValueError(f"size must be positive, got {size}")
    parts = units(text)
    return frozenset(" ".join(parts[i : i + size]) for i in range(max(1, len(parts) - size + 1)) if parts)


def jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    """Compute the Jaccard similarity of two sets, |a ∩ b| / |a ∪ b|; 1 for two empty sets.

    Jaccard 1912 (https://doi.org/10.1111/j.1469-8137.1912.tb05611.x).

    Args:
        a: a set of shingles.
        b: another set of shingles.

    Returns:
        The similarity in [0, 1].
    """
    shared = len(a & b)
    return shared / (len(a) + len(b) - shared) if a or b else 1.0


def is_near(a: frozenset[str], b: frozenset[str], threshold: float) -> bool:
    """Return whether two texts with the same numbers are near-duplicates, given their shingles."""
    return jaccard(a, b) >= threshold


def quantities(text: str) -> str:
    """Return the numbers and operators of a text, sorted: two texts that differ in them are different questions.

    Args:
        text: any text.

    Example:
        >>> quantities("Tom has 3 apples and 1,000 pens. What is 3 + 1,000?")
        '+ 1000 1000 3 3'
        >>> quantities("Tom has three apples and a thousand pens."), quantities("三个苹果和十二个梨")
        ('1000 3', '12 3')
    """
    return _quantities(comparable(text))


def _quantities(folded: str) -> str:
    return " ".join(sorted(_QUANTITY.findall(with_digits(folded))))


class Compared(NamedTuple):
    """A text as it is compared.

    Attributes:
        folded: the text in the form of `comparable`.
        parts: its shingles.
        numbers: its numbers and operators (`quantities`).
    """

    folded: str
    parts: frozenset[str]
    numbers: str


@lru_cache(maxsize=4)
def compared(text: str) -> Compared:
    """Return a text as it is compared. The last texts are kept, because a text is searched for and then added."""
    folded = comparable(text)
    return Compared(folded, shingles(folded), _quantities(folded))


class NearDuplicates:
    """An index of texts that finds near-duplicates among those added earlier.

    An inverted index maps (numbers, shingle) to texts. A text with s shingles reaches a Jaccard similarity of t only with texts
    that share at least ⌈t s⌉ of them, so any s − ⌈t s⌉ + 1 of its shingles include a shared one; the rarest ones are looked up
    (prefix filtering, Bayardo et al. 2007, https://doi.org/10.1145/1242572.1242591). The result is exact. 10,000 short texts
    take a second or two.

    Args:
        threshold: minimum Jaccard similarity of near-duplicates, in (0, 1]. Default: 0.8.
        same_numbers: texts with other numbers or operators are no near-duplicates; false: they are words like others, as in
            versions of a document. Default: True.

    Raises:
        ValueError: the threshold is not in (0, 1].

    Example:
        >>> seen = NearDuplicates()
        >>> seen.add("q1", "Tom has 3 apples. How many are left?")
        >>> seen.find("tom has 3 apples -- how many are left"), seen.find("Tom has 4 apples. How many are left?")
        ('q1', None)
    """

    def __init__(self, threshold: float = 0.8, *, same_numbers: bool = True) -> None:
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold must be above 0 and at most 1, got {threshold}")
        self.threshold, self._same_numbers = threshold, same_numbers
        self._key_of: dict[str, str] = {}
        self._texts: list[tuple[str, frozenset[str]]] = []
        self._index: dict[tuple[str, str], list[int]] = {}

    def find(self, text: str) -> str | None:
        """Return the key of an equal text, otherwise of the first near-duplicate that was added, otherwise None.

        Args:
            text: any text; it is not added.
        """
        folded = compared(text).folded
        if folded in self._key_of:
            return self._key_of[folded]
        return next(self._matches(text), None)

    def find_all(self, text: str) -> list[str]:
        """Return the keys of all near-duplicates, in the order in which they were added.

        Args:
            text: any text; it is not added.
        """
        same = self._key_of.get(compared(text).folded)
        found = list(self._matches(text))
        return found if same is None or same in found else [same, *found]

    def _matches(self, text: str) -> Iterator[str]:
        parts = compared(text).parts
        candidates = sorted(self._candidates(text))
        return (self._texts[i][0] for i in candidates if is_near(parts, self._texts[i][1], self.threshold))

    def add(self, key: str, text: str) -> None:
        """Add a text under a key. If two texts are equal, `find` returns the key of the first.

        Args:
            key: key that `find` returns for near-duplicates of this text.
            text: any text.
        """
        folded, parts, _ = compared(text)
        if folded in self._key_of:
            return
        self._key_of[folded] = key
        numbers = self._key_numbers(text)
        # Keyed by the numbers as well, so texts with other numbers never meet as candidates.
        for part in parts:
            self._index.setdefault((numbers, part), []).append(len(self._texts))
        self._texts.append((key, parts))

    def _key_numbers(self, text: str) -> str:
        return compared(text).numbers if self._same_numbers else ""

    def _candidates(self, text: str) -> set[int]:
        parts, numbers = compared(text).parts, self._key_numbers(text)
        postings = sorted((self._index.get((numbers, part), []) for part in parts), key=len)
        # Subtract 1e-9, because 0.7 * 10 is 7.000000000000001 in floating point and must not be rounded up to 8.
        needed = math.ceil(self.threshold * len(parts) - 1e-9)
        return {i for posting in postings[: len(parts) - needed + 1] for i in posting}


def _folded(text: str, i: int) -> str:
    char, category = text[i], unicodedata.category(text[i])
    # A full stop, comma or colon between digits belongs to the number (3.5, 12:30).
    if category[0] in "LMN" or (char in ".,:" and text[i - 1 : i].isdecimal() and text[i + 1 : i + 2].isdecimal()):
        return char
    if char in "%^" or (category[0] == "S" and category != "Sk"):
        return f" {char} "
    # Format characters (soft hyphen, zero-width joiners) are invisible and do not separate words.
    return "" if category == "Cf" else " "
