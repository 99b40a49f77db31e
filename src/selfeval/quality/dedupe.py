"""Near-duplicates among short texts in any language, without comparing all pairs.

Two texts are near-duplicates when they are equal after `normalise`, or when they hold the same numbers and operators
*and* their shingles overlap enough. Numbers are content: "Tom has 3 apples" and "Tom has 4 apples" are different
questions, and so are 3 - 5 and 3 + 5.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterator

__all__ = ["NearDuplicates", "jaccard", "normalise", "shingles", "units"]

# Scripts that are written without spaces between words: Thai, Lao, Myanmar, Khmer, kana, Han.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
# -, * and / are punctuation to Unicode. Between two operands (numbers, brackets, single letters), or as a sign, they
# are arithmetic.
_OPERATOR = re.compile(r"(?:(?<=[\d)])|(?<=\b[^\W\d_]))\s*([-*/])\s*(?=-?[\d(]|[^\W\d_]\b)|(?<!\w)(-)(?=\d)")
_ARITHMETIC = {"-": "−", "*": "×", "/": "÷"}
_QUANTITY = re.compile(r"\d+(?:[.,:]\d+)*|[−×÷+^%=<>]")


def normalise(text: str) -> str:
    """Reduce a text to what it says: compatibility forms, case, punctuation and whitespace are folded.

    NFKC and case folding (Unicode Standard Annex 15, https://www.unicode.org/reports/tr15/), then punctuation becomes a
    space. Characters that change a question stay: decimal points, % and ^, and arithmetic - * / (as − × ÷). 1,000 becomes 1000.

    Args:
        text: any text in any language.

    Returns:
        Words and symbols, separated by single spaces; empty when the text has none.

    Example:
        >>> normalise("What is  3-5,  e-mail?")
        'what is 3 − 5 e mail'
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    text = _OPERATOR.sub(lambda match: _ARITHMETIC[match[1] or match[2]], _THOUSANDS.sub("", text))
    return " ".join("".join(_folded(text, i) for i in range(len(text))).split())


def units(text: str) -> list[str]:
    """Split a text into what its n-grams are made of: words, or characters where the script has no spaces.

    One Chinese, Japanese, Thai, Lao, Khmer or Burmese character anywhere decides for characters.

    Args:
        text: any text; it is normalised here.

    Returns:
        The units in order; empty when the text has none.
    """
    folded = normalise(text)
    return list(folded.replace(" ", "")) if _UNSPACED.search(folded) else folded.split()


def shingles(text: str, size: int = 3) -> frozenset[str]:
    """Collect the n-grams of a text as a set. Broder 1997 (https://doi.org/10.1109/SEQUEN.1997.666900).

    Args:
        text: any text; it is normalised here.
        size: units (see `units`) per shingle, > 0.

    Returns:
        The set; a text shorter than `size` is one shingle, an empty one none.

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
    """Measure the overlap of two sets: |a ∩ b| / |a ∪ b|. Two empty sets are equal: 1.

    Jaccard 1912 (https://doi.org/10.1111/j.1469-8137.1912.tb05611.x).

    Args:
        a: a set of shingles.
        b: another.

    Returns:
        In [0, 1].
    """
    shared = len(a & b)
    return shared / (len(a) + len(b) - shared) if a or b else 1.0


class NearDuplicates:
    """Remember texts and find an earlier one that says nearly the same.

    An inverted index leads from (numbers, shingle) to texts. A text with s shingles reaches Jaccard t only with one
    that shares at least ⌈t s⌉ of them, so one of any s − ⌈t s⌉ + 1 shingles is enough to find it, and the rarest are
    looked up (prefix filtering, Bayardo et al. 2007, https://doi.org/10.1145/1242572.1242591). The answer is exact.
    10,000 short texts take a second or two.

    Args:
        threshold: Jaccard overlap of the shingles from which two texts are near-duplicates, in (0, 1].

    Raises:
        ValueError: the threshold is not in (0, 1].

    Example:
        >>> seen = NearDuplicates()
        >>> seen.add("q1", "Tom has 3 apples. How many are left?")
        >>> seen.find("tom has 3 apples -- how many are left"), seen.find("Tom has 4 apples. How many are left?")
        ('q1', None)
    """

    def __init__(self, threshold: float = 0.8) -> None:
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold must be above 0 and at most 1, got {threshold}")
        self.threshold = threshold
        self._key_of: dict[str, str] = {}
        self._texts: list[tuple[str, frozenset[str]]] = []
        self._index: dict[tuple[str, str], list[int]] = {}

    def find(self, text: str) -> str | None:
        """Return the key of an earlier near-duplicate: an equal text, else the first that was added, else None.

        Args:
            text: any text; it is not remembered.
        """
        folded = normalise(text)
        if folded in self._key_of:
            return self._key_of[folded]
        return next(self._matches(text), None)

    def find_all(self, text: str) -> list[str]:
        """Return the keys of all earlier near-duplicates, in the order in which they were added.

        Args:
            text: any text; it is not remembered.
        """
        same = self._key_of.get(normalise(text))
        found = list(self._matches(text))
        return found if same is None or same in found else [same, *found]

    def _matches(self, text: str) -> Iterator[str]:
        folded, parts = normalise(text), shingles(text)
        return (self._texts[i][0] for i in sorted(self._candidates(folded, parts)) if self._is_near(parts, self._texts[i][1]))

    def add(self, key: str, text: str) -> None:
        """Remember a text under a key. Of two equal texts the first keeps the key that `find` returns.

        Args:
            key: what `find` returns for a near-duplicate of this text.
            text: any text.
        """
        folded = normalise(text)
        if folded in self._key_of:
            return
        self._key_of[folded] = key
        parts, numbers = shingles(text), _numbers(folded)
        for part in parts:
            self._index.setdefault((numbers, part), []).append(len(self._texts))
        self._texts.append((key, parts))

    def _candidates(self, folded: str, parts: frozenset[str]) -> set[int]:
        numbers = _numbers(folded)
        postings = sorted((self._index.get((numbers, part), []) for part in parts), key=len)
        # 1e-9: 0.7 * 10 is 7.000000000000001 in floating point, and must not become 8.
        needed = math.ceil(self.threshold * len(parts) - 1e-9)
        return {i for posting in postings[: len(parts) - needed + 1] for i in posting}

    def _is_near(self, a: frozenset[str], b: frozenset[str]) -> bool:
        return jaccard(a, b) >= self.threshold


def _numbers(folded: str) -> str:
    return " ".join(sorted(_QUANTITY.findall(folded)))


def _folded(text: str, i: int) -> str:
    char, category = text[i], unicodedata.category(text[i])
    if category[0] in "LMN" or (char in ".,:" and text[i - 1 : i].isdecimal() and text[i + 1 : i + 2].isdecimal()):
        return char
    if char in "%^" or (category[0] == "S" and category != "Sk"):
        return f" {char} "
    # Format characters (soft hyphen, zero-width joiners) are invisible and do not part words.
    return "" if category == "Cf" else " "
