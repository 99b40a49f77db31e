"""How the text metrics split texts of a language: the tokenizer of BLEU, the words of ROUGE, and the stems of METEOR."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import regex

from selfeval.errors import InputError
from selfeval.quality.languages import languages_of
from selfeval.texts import nearest

__all__ = ["LANGUAGES", "TOKENIZERS", "Splitting", "Words", "language_of", "splitting_of", "stemmer_of"]

_SCRIPTS = {
    "ja": r"[\p{Hiragana}\p{Katakana}]",
    "zh": r"\p{Han}",
    "th": r"\p{Thai}",
    "lo": r"\p{Lao}",
    "km": r"\p{Khmer}",
    "my": r"\p{Myanmar}",
}
"""Scripts without spaces between words. Kana come first, because Japanese text has Han characters too."""
_STEMMERS = {
    "da": "danish",
    "de": "german",
    "es": "spanish",
    "fi": "finnish",
    "fr": "french",
    "hu": "hungarian",
    "it": "italian",
    "nl": "dutch",
    "no": "norwegian",
    "pt": "portuguese",
    "ro": "romanian",
    "ru": "russian",
    "sv": "swedish",
}
"""Snowball stemmers of nltk, by language."""
LANGUAGES = ("en", *_STEMMERS, *_SCRIPTS, "other")
"""Languages that the metrics split differently; `other` is any language with spaces between words, without stems."""
TOKENIZERS = ("13a", "intl", "zh", "char", "none")
"""Tokenizers of BLEU and METEOR. With `none`, the words of a text are already separated by white space."""
_UNSPACED = "".join(_SCRIPTS.values()).replace("[", "").replace("]", "")
_WORD = regex.compile(rf"[{_UNSPACED}]|(?:(?![{_UNSPACED}])[\p{{L}}\p{{M}}\p{{N}}_])+")
_LETTER = regex.compile(r"\p{L}")
_SHARE = 0.2
_SAMPLE = 200
"""Number of texts that decide the language."""


@dataclass(frozen=True)
class Splitting:
    """How texts are split.

    Attributes:
        language: one of `LANGUAGES`.
        tokenizer: tokenizer of BLEU and METEOR, one of `TOKENIZERS`.
        characters: whether the script has no spaces, so that its characters are the words of ROUGE.
        stemmer: name of the stemmer of METEOR; empty without one.
    """

    language: str
    tokenizer: str
    characters: bool
    stemmer: str


def splitting_of(language: str, texts: Sequence[str], tokenizer: str | None = None) -> Splitting:
    """Return how to split texts of a language.

    Args:
        language: one of `LANGUAGES`, or `auto` to find it from the texts.
        texts: references, or other texts in the language.
        tokenizer: Optional. Another tokenizer of BLEU and METEOR. Default: `zh` for Chinese, `char` for other scripts without
            spaces, `13a` otherwise.

    Raises:
        InputError: no such language or tokenizer.
    """
    if language not in (*LANGUAGES, "auto"):
        raise InputError(f'language "{language}" is unknown{nearest(language, ["auto", *LANGUAGES])}')
    if tokenizer is not None and tokenizer not in TOKENIZERS:
        raise InputError(f'tokenizer "{tokenizer}" is unknown{nearest(tokenizer, TOKENIZERS)}')
    found = language_of(texts) if language == "auto" else language
    default = "zh" if found == "zh" else "char" if found in _SCRIPTS else "13a"
    stemmer = "porter" if found == "en" else _STEMMERS.get(found, "")
    return Splitting(found, tokenizer or default, found in _SCRIPTS, stemmer)


def language_of(texts: Sequence[str]) -> str:
    """Return the language of texts, one of `LANGUAGES`: by script, otherwise by `selfeval.quality.languages`.

    Example:
        >>> language_of(["How many apples are left?"]), language_of(["还剩几个苹果？"])
        ('en', 'zh')
    """
    joined = "\n".join(texts[:_SAMPLE])
    letters = len(_LETTER.findall(joined))
    for language, script in _SCRIPTS.items():
        if len(regex.findall(script, joined)) > _SHARE * letters:
            return language
    found = languages_of([joined])
    if "en" in found or not found:
        # Too few letters for the model: names and numbers, which English rules split as well as any.
        return "en" if joined.isascii() or found else "other"
    known = [language for language in sorted(found) if language in _STEMMERS]
    return known[0] if len(known) == len(found) == 1 else "other"


class Words:
    """Splits texts for ROUGE into the words of any script, in lower case; characters where a script has no spaces.

    The tokenizer of `rouge_score` keeps only a to z and 0 to 9, which leaves nothing of a Chinese text and breaks German words
    at umlauts.

    Example:
        >>> Words().tokenize("GPU 很快, naïve!")
        ['gpu', '很', '快', 'naïve']
    """

    def tokenize(self, text: str) -> list[str]:
        """Return the words of a text."""
        found: list[str] = _WORD.findall(text.lower())
        return found


def stemmer_of(name: str) -> Any:
    """Return nltk's stemmer of a name in `Splitting`, or one that changes nothing."""
    from nltk.stem import PorterStemmer, SnowballStemmer

    if not name:
        return _NoStems()
    return PorterStemmer() if name == "porter" else SnowballStemmer(name)


class _NoStems:
    def stem(self, word: str) -> str:
        return word
