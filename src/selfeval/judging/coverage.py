"""Measure how well a tokenizer covers the seeds: a model cannot work in a language that its tokenizer spells out byte by byte.

Byte-level tokenizers represent every text, so nothing is lost and nothing fails: the embedded model reads Chinese as three
unrelated tokens per character and writes garbled text. Two measures detect this in time: the characters lost in a round trip
through the tokenizer, and the words spelled out letter by letter.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from selfeval.errors import SeedsError

__all__ = ["Coverage", "check_seeds", "coverage"]

_WORD = re.compile(r"[^\W\d_]+")
_LOST = 0.01
"""Share of lost characters from which a note is shown."""
_SPELLED = 0.5
"""Share of spelled-out letters from which a note is shown."""
_LETTERS_PER_TOKEN = 2.0
"""A word with fewer bytes per token counts as spelled out: each token is about one letter or less."""


@dataclass(frozen=True)
class Coverage:
    """How well a tokenizer represents some texts.

    Attributes:
        lost: share of the characters, without white space, that are unknown or do not survive a round trip.
        spelled: share of the letters that are in words spelled out letter by letter or byte by byte.
        example: the word with the fewest bytes per token, or a text that is lost.
    """

    lost: float
    spelled: float
    example: str


def coverage(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Coverage:
    """Measure which share of texts a tokenizer loses or spells out.

    Args:
        tokenizer: tokenizer of the model.
        texts: texts of the domain, such as the seeds.
    """
    lost = [(_lost(tokenizer, text), text) for text in texts]
    characters = sum(_characters(text).total() for text in texts)
    # Each word once. Very short words have few bytes per token however they are encoded.
    words = list(dict.fromkeys(word for text in texts for word in _WORD.findall(text) if len(word.encode()) >= 3))
    rates = [(_bytes_per_token(tokenizer, word), word) for word in words]
    letters = sum(len(word) for _, word in rates)
    spelled = [(rate, word) for rate, word in rates if rate < _LETTERS_PER_TOKEN]
    # Tuples compare by their first item: the text with the most losses, or the word with the fewest bytes per token.
    example = max(lost)[1] if any(count for count, _ in lost) else min(spelled)[1] if spelled else ""
    return Coverage(
        sum(count for count, _ in lost) / max(1, characters), sum(len(word) for _, word in spelled) / max(1, letters), example
    )


def check_seeds(tokenizer: PreTrainedTokenizerBase, seeds: Sequence[str], model: str) -> str | None:
    """Return a note if a tokenizer represents the seeds badly, else None.

    Raises:
        SeedsError: the tokenizer loses at least 99% of the characters.
    """
    found = coverage(tokenizer, seeds)
    shown = found.example if len(found.example) <= 40 else found.example[:37] + "..."
    advice = "replies will be garbled; use a model that was trained on this language, or seeds from the model's domain"
    if found.lost >= 0.99:
        raise SeedsError(
            f'the tokenizer of {model} cannot encode the seeds at all ("{shown}" becomes unknown tokens); {advice}'
        )
    if found.lost >= _LOST:
        return f'the tokenizer of {model} loses {found.lost:.0%} of the seeds\' characters (for example in "{shown}"); {advice}'
    if found.spelled >= _SPELLED:
        return (
            f"the tokenizer of {model} splits {found.spelled:.0%} of the seeds' words into single characters (for example "
            f'"{shown}"), so the model has hardly seen such text; {advice}'
        )
    return None


def _lost(tokenizer: Any, text: str) -> int:
    """Count the characters that do not survive a round trip; unknown tokens decode to something else or to nothing."""
    known = [i for i in _ids(tokenizer, text) if i != tokenizer.unk_token_id]
    return (_characters(text) - _characters(str(tokenizer.decode(known)))).total()


def _characters(text: str) -> Counter[str]:
    """Count characters, ignoring case and white space, which many tokenizers change on purpose."""
    return Counter("".join(unicodedata.normalize("NFKC", text).casefold().split()))


def _bytes_per_token(tokenizer: Any, word: str) -> float:
    """Return the bytes per token of a word, at the start of a text or after a space, whichever takes fewer tokens."""
    return len(word.encode()) / max(1, min(len(_ids(tokenizer, word)), len(_ids(tokenizer, " " + word))))


def _ids(tokenizer: Any, text: str) -> list[int]:
    return [int(i) for i in tokenizer.encode(text, add_special_tokens=False)]
