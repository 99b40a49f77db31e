"""An embedder without a model: counts of words, in random directions that are the same in every process."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from selfeval.quality.dedupe import units
from selfeval.quality.embeddings import Vectors, unit_rows

__all__ = ["WordCounts"]

_DIMENSIONS = 64


class WordCounts:
    """Texts that share words have similar vectors; `calls` lists the texts of each call."""

    def __init__(self, name: str = "word-counts") -> None:
        self.name = name
        self.calls: list[list[str]] = []

    def embed(self, texts: Sequence[str]) -> Vectors:
        self.calls.append(list(texts))
        found = np.zeros((len(texts), _DIMENSIONS), np.float32)
        for row, text in enumerate(texts):
            for word in units(text):
                found[row] += _direction(word)
        return unit_rows(found)


def _direction(word: str) -> Vectors:
    seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "little")
    drawn: Vectors = np.random.default_rng(seed).normal(size=_DIMENSIONS).astype(np.float32)
    return drawn
