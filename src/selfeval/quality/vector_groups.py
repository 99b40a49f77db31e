"""Vectors of a growing list of texts, computed in fixed groups and kept in memory.

The last bits of a vector depend on the other texts of its pass, and a decision that compares vectors must be the same after a
resume. So texts are embedded in groups that depend on their order alone. A list that grows at its end keeps its full groups,
and each is embedded once per process.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from selfeval.quality.domain_distance import leave_one_out_distances
from selfeval.quality.embeddings import Embedder, Vectors

__all__ = ["GROUP", "VectorGroups", "embed_in_groups"]

GROUP = 32
"""Texts of a group."""


def embed_in_groups(embedder: Embedder, texts: Sequence[str]) -> Vectors:
    """Embed texts in groups of 32, in their order, and keep nothing.

    Args:
        embedder: computes the vectors.
        texts: N texts.

    Returns:
        `[N, D]`.
    """
    return VectorGroups().embed(embedder, texts)


class VectorGroups:
    """Keeps the vectors of full groups, and the distances of texts that were requested.

    Example:
        >>> from selfeval.quality.embeddings import unit_rows
        >>> class Lengths:
        ...     name = "lengths"
        ...     def embed(self, texts):
        ...         print(len(texts), "embedded")
        ...         return unit_rows(np.array([[len(text), 1] for text in texts], dtype=np.float32))
        >>> groups, texts = VectorGroups(), ["a" * n for n in range(40)]
        >>> groups.embed(Lengths(), texts[:34]).shape
        32 embedded
        2 embedded
        (34, 2)
        >>> groups.embed(Lengths(), texts).shape
        8 embedded
        (40, 2)
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, tuple[str, ...]], Vectors] = {}
        self._distances: dict[tuple[str, tuple[str, ...]], NDArray[np.float64]] = {}

    def embed(self, embedder: Embedder, texts: Sequence[str]) -> Vectors:
        """Return the vectors of texts, `[N, D]`; full groups that were embedded before are not embedded again.

        Args:
            embedder: computes the vectors; those of embedders with different names are kept apart.
            texts: N texts.
        """
        groups = [tuple(texts[start : start + GROUP]) for start in range(0, len(texts), GROUP)]
        return np.concatenate([self._group(embedder, group) for group in groups]) if groups else np.zeros((0, 1), np.float32)

    def _group(self, embedder: Embedder, texts: tuple[str, ...]) -> Vectors:
        key = embedder.name, texts
        if key in self._kept:
            return self._kept[key]
        vectors = embedder.embed(texts)
        # A smaller group is the last one, and will be replaced when the list grows.
        if len(texts) == GROUP:
            self._kept[key] = vectors
        return vectors

    def distances(self, embedder: Embedder, texts: Sequence[str]) -> NDArray[np.float64]:
        """Return the distance of each text to the nearest other one, `[N]`, computed once.

        Args:
            embedder: computes the vectors.
            texts: N texts, N > 1.
        """
        key = embedder.name, tuple(texts)
        if key not in self._distances:
            self._distances[key] = leave_one_out_distances(self.embed(embedder, texts))
        return self._distances[key]
