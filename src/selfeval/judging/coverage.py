"""How well a tokenizer can write the seeds: a model cannot work in a language that its tokenizer spells out byte by byte.

Tokenizers of bytes represent every text, so nothing is lost and nothing fails: the embedded model reads Chinese as three
unrelated tokens a character and writes garbled text. Two measures tell that in time: what is lost on the way through the
tokenizer, and how many words are spelled letter by letter.
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
"""Share of lost characters from which on a note is given."""
_SPELLED = 0.5
"""Share of spelled-out letters from which on a note is given."""
_LETTERS_PER_TOKEN = 2.0
"""A word of fewer bytes per token is spelled out: a token is hardly more than a letter, or less than one."""


@dataclass(frozen=True)
class Coverage:
    """What becomes of texts in a tokenizer.

    Attributes:
        lost: share of their characters, without white space, that are unknown or do not come back.
        spelled: share of the letters of their words that stand in words spelled out letter by letter or byte by byte.
        example: a word that is spelled out most, or a text that is lost.
    """

    lost: float
    spelled: float
    example: str


def coverage(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Coverage:
    """Measure what a tokenizer loses of texts, and what it spells out.

    Args:
        tokenizer: of the model.
        texts: in the domain, such as the seeds.
    """
    lost = [(_lost(tokenizer, text), text) for text in texts]
    characters = sum(_characters(text).total() for text in texts)
    words = list(dict.fromkeys(word for text in texts for word in _WORD.findall(text) if len(word.encode()) >= 3))
    rates = [(_bytes_per_token(tokenizer, word), word) for word in words]
    letters = sum(len(word) for _, word in rates)
    spelled = [(rate, word) for rate, word in rates if rate < _LETTERS_PER_TOKEN]
    example = max(lost)[1] if any(count for count, _ in lost) else min(spelled)[1] if spelled else ""
    return Coverage(
        sum(count for count, _ in lost) / max(1, characters), sum(len(word) for _, word in spelled) / max(1, letters), example
    )


def check_seeds(tokenizer: PreTrainedTokenizerBase, seeds: Sequence[str], model: str) -> str | None:
    """A note where a tokenizer writes the seeds badly; None where it writes them well.

    Raises:
        SeedsError: nothing of the seeds survives.
    """
    found = coverage(tokenizer, seeds)
    shown = found.example if len(found.example) <= 40 else found.example[:37] + "..."
    advice = "replies will be garbled; use a model that was trained on this language, or seeds in the model's own domain"
    if found.lost >= 0.99:
        raise SeedsError(f'the tokenizer of {model} cannot write the seeds at all ("{shown}" becomes unknown tokens); {advice}')
    if found.lost >= _LOST:
        return f'the tokenizer of {model} loses {found.lost:.0%} of the seeds\' characters (for example in "{shown}"); {advice}'
    if found.spelled >= _SPELLED:
        return (
            f"the tokenizer of {model} spells {found.spelled:.0%} of the seeds' words letter by letter (for example "
            f'"{shown}"), so the model has hardly seen such text; {advice}'
        )
    return None


def _lost(tokenizer: Any, text: str) -> int:
    """Characters that do not come back; unknown tokens come back as something else or as nothing."""
    known = [i for i in _ids(tokenizer, text) if i != tokenizer.unk_token_id]
    return (_characters(text) - _characters(str(tokenizer.decode(known)))).total()


def _characters(text: str) -> Counter[str]:
    """Without case and white space, which many tokenizers change on purpose."""
    return Counter("".join(unicodedata.normalize("NFKC", text).casefold().split()))


def _bytes_per_token(tokenizer: Any, word: str) -> float:
    """At the beginning of a text or behind a space, wherever it takes fewer tokens."""
    return len(word.encode()) / max(1, min(len(_ids(tokenizer, word)), len(_ids(tokenizer, " " + word))))


def _ids(tokenizer: Any, text: str) -> list[int]:
    return [int(i) for i in tokenizer.encode(text, add_special_tokens=False)]
