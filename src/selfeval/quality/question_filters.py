"""Filters for questions written by a language model: broken text, repetition, copies of the instruction, other languages.

Self-instruct (Wang et al. 2022, https://arxiv.org/abs/2212.10560, section 2.2) drops near-duplicates and texts of the wrong
length; small models also write other kinds of junk. Each filter drops clear cases only: one lost question costs a sample, but a
filter that guesses biases the data.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from selfeval.quality.dedupe import normalise, units
from selfeval.quality.languages import languages_of, share_of_languages

__all__ = ["QuestionFilters", "is_broken", "is_repetitive", "script_shares"]

_REPLY = re.compile(r"(?:so |thus |therefore )?(?:the )?(?:final |correct |right )?answer(?: is\b|\s*:)", re.IGNORECASE)
_REFUSAL = re.compile(
    r"(?:i'?m sorry|i am sorry|i apologi[sz]e|sorry, (?:but )?i\b|"
    r"(?:unfortunately, )?i (?:can ?not|can't|am unable to|'m unable to) (?:help|assist|write|provide|fulfil|create|answer)|"
    r"i(?:'m| am) (?:ready|here|happy|glad) to (?:help|assist|answer)|how (?:can|may) i (?:help|assist) you|"
    r"please (?:provide|give|share|tell) me (?:with )?(?:more|the|your|a|some)\b|what (?:would you like|can i help))",
    re.IGNORECASE,
)
_ASSISTANT = re.compile(
    r"\b(?:as an ai(?: (?:language model|assistant))?\b|as a (?:large )?language model\b|"
    r"i(?:'m| am) (?:an ai|a (?:large )?language model|a chatbot|an? (?:ai |virtual )?assistant))",
    re.IGNORECASE,
)
_WORD = re.compile(r"[^\W\d_]{2}")
_REPEATED = re.compile(r"(.{1,60}?)\1{3,}", re.DOTALL)
_COMMON = ("DIGIT", "MATHEMATICAL", "SUPERSCRIPT", "SUBSCRIPT", "MODIFIER", "FEMININE", "MASCULINE", "MICRO", "DOUBLE-STRUCK")
_FOREIGN = 0.5
"""A question is dropped above this share of letters in scripts that the seeds do not use."""
_LEAST_OWN = 0.01
"""A question is dropped below this probability of being in a language of the seeds."""
_USED = 0.01
"""The seeds use a script if it has at least this share of their letters."""


@dataclass(frozen=True)
class QuestionFilters:
    """Filters for texts that are unusable as questions, given the seeds and the instruction of the prompt.

    Attributes:
        scripts: Unicode scripts used by the seeds.
        languages: languages used by the seeds; empty if they are too short to tell.
        worded: whether every seed has a word of at least two letters.
        instruction: normalised word trigrams of the instruction.
    """

    scripts: frozenset[str]
    languages: frozenset[str]
    worded: bool
    instruction: frozenset[tuple[str, ...]]

    @classmethod
    def of(cls, seeds: Sequence[str], instruction: str = "") -> QuestionFilters:
        """Create the filters for questions like the seeds.

        Args:
            seeds: the user's seed questions.
            instruction: Optional. Text of the prompt that asks for a question, without the examples.

        Example:
            >>> filters = QuestionFilters.of(["How many apples are left?"], "Write one new question of the same kind.")
            >>> filters.reason("apples " * 30), filters.reason("How many pears are left?")
            ('repetition', None)
        """
        shares = script_shares(seeds)
        used = frozenset(script for script, share in shares.items() if share >= _USED)
        return cls(used, languages_of(seeds), all(_has_word(seed) for seed in seeds), frozenset(_trigrams(instruction)))

    def reason(self, text: str) -> str | None:
        """Return the reason to drop a text, as recorded for dropped questions, or None if it passes all filters."""
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
        if self.languages and share_of_languages(text, self.languages) < _LEAST_OWN:
            return "other_language"
        text = text.replace("\u2019", "'")
        if _REFUSAL.match(text):
            return "refusal"
        if _ASSISTANT.search(text):
            return "assistant"
        return "reply" if _REPLY.match(text) else None

    def _repeats_instruction(self, text: str) -> bool:
        """Return whether at least four in five word trigrams of the text are in the instruction."""
        own = _trigrams(text)
        # A single trigram occurs in the instruction by chance.
        return len(own) >= 2 and sum(part in self.instruction for part in own) >= 0.8 * len(own)

    def _foreign_share(self, text: str) -> float:
        if not self.scripts:
            return 0.0
        return sum(share for script, share in script_shares([text]).items() if script not in self.scripts)


def is_broken(text: str) -> bool:
    """Return whether a text has U+FFFD (a partial character), control or private-use characters, or a lone surrogate."""
    return "\ufffd" in text or any(unicodedata.category(c) in ("Cc", "Cs", "Co") for c in text if c not in "\n\t\r")


def is_repetitive(text: str) -> bool:
    """Return whether a text mostly repeats itself.

    It does if more than half of it is one string, at least four times in a row, or if more than half of its words are the same.

    Example:
        >>> is_repetitive("how many how many how many how many how many"), is_repetitive("Is 11111111 + 1 = 11111112?")
        (True, False)
    """
    folded = " ".join(text.split()) + " "
    # A string of length p that is repeated over more than half of n characters has at most p <= n / 4 distinct 4-grams there.
    # This cheap test saves nearly every text the slow search.
    pieces = {folded[i : i + 4] for i in range(len(folded))}
    if len(pieces) <= 0.75 * len(folded) + 4 and any(
        2 * len(match[0]) > len(folded) and len(match[0]) >= 12 for match in _REPEATED.finditer(folded)
    ):
        return True
    words = units(text)
    return len(words) >= 12 and Counter(words).most_common(1)[0][1] > len(words) / 2


def script_shares(texts: Iterable[str]) -> dict[str, float]:
    """Return the share of letters in each Unicode script, identified by the first word of the letters' Unicode names.

    Letters common to all scripts (mathematical alphabets, superscripts) are not counted.

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
    # Python has no script property. The name's first word is the script: "LATIN SMALL LETTER A".
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
