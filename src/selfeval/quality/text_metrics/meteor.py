"""METEOR by nltk (Lavie and Agarwal 2007, https://aclanthology.org/W07-0734), from 0 to 1."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from selfeval.errors import MissingPackageError
from selfeval.quality.text_metrics.sacrebleu_metrics import tokenizer_of
from selfeval.quality.text_metrics.splitting import Splitting, stemmer_of

__all__ = ["meteor", "stages_of"]


def meteor(hypotheses: Sequence[str], references: Sequence[Sequence[str]], splitting: Splitting) -> list[float]:
    """Compute METEOR of each line: words are aligned by equality, then by stems, then by synonyms.

    Synonyms are those of WordNet, for English, and only if it is among the data of nltk on this machine; nothing is downloaded.
    Parameters are those of 2007: alpha 0.9, beta 3, gamma 0.5; METEOR 1.5, a Java program, has others and paraphrase tables.

    Args:
        hypotheses: [N].
        references: [N], one or more for each line; the best one counts.
        splitting: the tokenizer and the stemmer.
    """
    score = _meteor_score()
    tokenizer, stemmer, wordnet = tokenizer_of(splitting), _Stems(splitting.stemmer), _synonyms(splitting)

    def words(text: str) -> list[str]:
        return str(tokenizer(text)).split()

    return [
        float(score([words(reference) for reference in refs], words(text), stemmer=stemmer, wordnet=wordnet))
        for text, refs in zip(hypotheses, references, strict=True)
    ]


def stages_of(splitting: Splitting) -> str:
    """Return by which of equality, stems and synonyms METEOR aligns words here, in words."""
    names = ["exact"]
    if splitting.stemmer:
        names.append("stem")
    if not isinstance(_synonyms(splitting), _NoSynonyms):
        names.append("WordNet synonyms")
    return " and ".join(names)


class _Stems:
    """A stemmer that remembers: the same words return in every line."""

    def __init__(self, name: str) -> None:
        self.stem = lru_cache(maxsize=100_000)(stemmer_of(name).stem)


class _NoSynonyms:
    """In the place of WordNet if it is not installed, or the language is not English."""

    def synsets(self, word: str) -> list[Any]:
        return []


def _synonyms(splitting: Splitting) -> Any:
    from nltk.corpus import wordnet

    if splitting.language != "en":
        return _NoSynonyms()
    try:
        wordnet.ensure_loaded()
    except LookupError:
        return _NoSynonyms()
    return wordnet


def _meteor_score() -> Any:
    try:
        from nltk.translate.meteor_score import meteor_score
    except ImportError as error:
        raise MissingPackageError("METEOR", "nltk", extra="data") from error
    return meteor_score
