"""Tell the languages of texts apart: langid (Lui and Baldwin 2012, https://aclanthology.org/P12-3005), by its port py3langid.

A naive Bayes model over byte n-grams, for 139 languages. It is part of the package, so nothing is downloaded.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from py3langid.langid import MODEL_FILE, LanguageIdentifier

from selfeval.store import as_storage_error

__all__ = ["languages_of", "share_of_languages"]

_FEWEST_LETTERS = 10
_USED = 0.05
"""Texts use a language if one of them is in it with at least this probability; close relatives are used together."""


def languages_of(texts: Iterable[str]) -> frozenset[str]:
    """Return the languages that texts may be in, as ISO 639 codes; those of texts with fewer than ten letters are not known.

    Example:
        >>> sorted(languages_of(["How many apples are left?", "Wie heißt die Hauptstadt von Frankreich?"]))
        ['de', 'en']
    """
    probabilities = [_probabilities(text) for text in texts if _is_long_enough(text)]
    return frozenset(language for found in probabilities for language, share in found.items() if share >= _USED)


def share_of_languages(text: str, languages: frozenset[str]) -> float:
    """Return the probability that a text is in one of the languages; 1 if it has fewer than ten letters.

    Example:
        >>> share_of_languages("Wie viele Äpfel sind übrig?", frozenset(["en"])) < 0.01
        True
    """
    if not _is_long_enough(text):
        return 1.0
    found = _probabilities(text)
    return sum(found.get(language, 0.0) for language in languages)


def _is_long_enough(text: str) -> bool:
    return sum(character.isalpha() for character in text) >= _FEWEST_LETTERS


def _probabilities(text: str) -> dict[str, float]:
    # A lone surrogate cannot be encoded.
    return dict(_identifier().rank(text.encode("utf-8", errors="replace").decode("utf-8")))


@cache
def _identifier() -> LanguageIdentifier:
    """Load the model, once.

    Raises:
        StorageError: the temporary folder, where py3langid unpacks its model of 70 MB, is full.
    """
    try:
        return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    except OSError as error:
        raise as_storage_error(Path(tempfile.gettempdir()), error) from error
