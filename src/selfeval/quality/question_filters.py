"""Filters for questions that a language model wrote: broken text, repetition, the instruction itself, another script.

Self-instruct (Wang et al. 2022, https://arxiv.org/abs/2212.10560, section 2.2) drops near-duplicates and texts of the wrong
length; small models write other junk as well. Every filter is meant to be certain: a good question that is lost costs a sample,
but a filter that guesses biases the data. A language that shares its script with the seeds is therefore not told apart.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from selfeval.quality.dedupe import normalise, units

__all__ = ["QuestionFilters", "is_broken", "is_repetitive", "script_shares"]

_REPLY = re.compile(r"(?:so |thus |therefore )?(?:the )?(?:final |correct |right )?answer(?: is\b|\s*:)", re.IGNORECASE)
_WORD = re.compile(r"[^\W\d_]{2}")
_REPEATED = re.compile(r"(.{1,60}?)\1{3,}", re.DOTALL)
_COMMON = ("DIGIT", "MATHEMATICAL", "SUPERSCRIPT", "SUBSCRIPT", "MODIFIER", "FEMININE", "MASCULINE", "MICRO", "DOUBLE-STRUCK")
_FOREIGN = 0.5
"""Share of a question's letters in scripts that the seeds do not use, above which it is dropped."""
_USED = 0.01
"""Share of the seeds' letters from which on they use a script."""


@dataclass(frozen=True)
class QuestionFilters:
    """Filters for texts that are unusable as questions, given the seeds and the instruction that asked for them.

    Attributes:
        scripts: Unicode scripts that the seeds use.
        worded: every seed has a word of two letters or more.
        instruction: normalised trigrams of the instruction's words.
    """

    scripts: frozenset[str]
    worded: bool
    instruction: frozenset[tuple[str, ...]]

    @classmethod
    def of(cls, seeds: Sequence[str], instruction: str = "") -> QuestionFilters:
        """The filters for questions like the seeds.

        Args:
            seeds: the user's own questions.
            instruction: the words of the prompt that asks for a question, without examples.

        Example:
            >>> filters = QuestionFilters.of(["How many apples are left?"], "Write one new question of the same kind.")
            >>> filters.reason("apples " * 30), filters.reason("How many pears are left?")
            ('repetition', None)
        """
        shares = script_shares(seeds)
        used = frozenset(script for script, share in shares.items() if share >= _USED)
        return cls(used, all(_has_word(seed) for seed in seeds), frozenset(_trigrams(instruction)))

    def reason(self, text: str) -> str | None:
        """Why a text is no usable question: a name for the record of what was dropped; None where nothing is wrong."""
        if is_broken(text):
            return "broken_characters"
        if self.worded and not _has_word(text):
            return "no_words"
        if is_repetitive(text):
            return "repetition"
        if self._repeats_instruction(text):
            return "instruction"
        if self._foreign_share(text) > _FOREIGN:
            return "other_script"
        return "reply" if _REPLY.match(text) else None

    def _repeats_instruction(self, text: str) -> bool:
        """Four in five of its word trigrams are the instruction's."""
        own = _trigrams(text)
        return len(own) >= 2 and sum(part in self.instruction for part in own) >= 0.8 * len(own)

    def _foreign_share(self, text: str) -> float:
        if not self.scripts:
            return 0.0
        return sum(share for script, share in script_shares([text]).items() if script not in self.scripts)


def is_broken(text: str) -> bool:
    """Whether a text holds U+FFFD (half a character), control or private characters, or half a surrogate pair."""
    return "\ufffd" in text or any(unicodedata.category(c) in ("Cc", "Cs", "Co") for c in text if c not in "\n\t\r")


def is_repetitive(text: str) -> bool:
    """Whether a text says little else than one thing again and again.

    More than half of it is one piece, four times or more in a row; or more than half of its words are the same word.

    Example:
        >>> is_repetitive("how many how many how many how many how many"), is_repetitive("Is 11111111 + 1 = 11111112?")
        (True, False)
    """
    folded = " ".join(text.split()) + " "
    # A piece of length p, repeated over more than half of n characters, has at most p <= n / 4 different beginnings there. The
    # search is slow, and this spares nearly every text the search.
    pieces = {folded[i : i + 4] for i in range(len(folded))}
    if len(pieces) <= 0.75 * len(folded) + 4 and any(
        2 * len(match[0]) > len(folded) and len(match[0]) >= 12 for match in _REPEATED.finditer(folded)
    ):
        return True
    words = units(text)
    return len(words) >= 12 and Counter(words).most_common(1)[0][1] > len(words) / 2


def script_shares(texts: Iterable[str]) -> dict[str, float]:
    """Share of the letters of texts in each Unicode script, by the first word of the letters' names.

    Letters that all scripts use (mathematical alphabets, superscripts) are left out.

    Example:
        >>> script_shares(["ab \u0431\u0432"])
        {'LATIN': 0.5, 'CYRILLIC': 0.5}
    """
    counts = Counter(script for text in texts for character in text if (script := _script(character)))
    total = sum(counts.values())
    return {script: count / total for script, count in counts.items()}


@lru_cache(maxsize=1 << 16)
def _script(character: str) -> str:
    if unicodedata.category(character)[0] != "L":
        return ""
    name = unicodedata.name(character, "").removeprefix("FULLWIDTH ").removeprefix("HALFWIDTH ")
    first = name.split(" ")[0]
    return "" if first in _COMMON else first


def _has_word(text: str) -> bool:
    return bool(_WORD.search(text)) or any(map(_is_unspaced, text))


def _is_unspaced(character: str) -> bool:
    return _script(character) in ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "THAI", "LAO", "KHMER", "MYANMAR")


def _trigrams(text: str) -> list[tuple[str, ...]]:
    words = normalise(text).split()
    return list(zip(words, words[1:], words[2:], strict=False))
