"""Paraphrases: questions with the same meaning in other words.

The index of `quality/dedupe.py` compares words, so it misses a question that is asked in other words. This one compares
vectors. Numbers and operators must agree exactly, because vectors hardly distinguish "3 apples" from "4 apples".
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from selfeval.quality.dedupe import quantities

__all__ = ["Paraphrase", "SemanticDuplicates"]


class Paraphrase(NamedTuple):
    """The nearest text with the same numbers.

    Attributes:
        key: its key.
        distance: 1 − cosine of the two vectors.
    """

    key: str
    distance: float


class SemanticDuplicates:
    """An index of texts and vectors that finds paraphrases among those added earlier.

    Texts are compared only with those of the same numbers and operators, so a search takes a product of one vector with the
    vectors of these.

    Args:
        radius: maximum distance 1 − cosine of a paraphrase, >= 0.

    Raises:
        ValueError: the radius is negative.

    Example:
        >>> seen = SemanticDuplicates(radius=0.1)
        >>> seen.add("q1", "How many are 3 apples?", np.array([1.0, 0.0]))
        >>> seen.find("What do 3 apples add up to?", np.array([1.0, 0.0]))
        Paraphrase(key='q1', distance=0.0)
        >>> seen.find("How many are 4 apples?", np.array([1.0, 0.0])), seen.find("Are 3 apples red?", np.array([0.0, 1.0]))
        (None, None)
    """

    def __init__(self, radius: float) -> None:
        if radius < 0:
            raise ValueError(f"radius must not be negative, got {radius}")
        self.radius = radius
        self._groups: dict[str, _Rows] = defaultdict(_Rows)

    def add(self, key: str, text: str, vector: NDArray[np.floating]) -> None:
        """Add a text under a key.

        Args:
            key: key that `find` returns for paraphrases of this text.
            text: any text.
            vector: its vector, `[D]`, of length 1.
        """
        self._groups[quantities(text)].add(key, vector)

    def find(self, text: str, vector: NDArray[np.floating]) -> Paraphrase | None:
        """Return the nearest text with the same numbers and operators, if it is within the radius.

        Args:
            text: any text; it is not added.
            vector: its vector, `[D]`, of length 1.
        """
        group = self._groups.get(quantities(text))
        nearest = None if group is None else group.nearest(vector)
        return nearest if nearest is not None and nearest.distance <= self.radius else None


_SMALLEST, _LARGEST = 4, 1024
"""Rows of the first block, and of later ones at most: most groups are small."""


class _Rows:
    """Vectors with their keys, in blocks of fp32, the precision of embedders. A block is never copied."""

    def __init__(self) -> None:
        self._keys: list[str] = []
        self._blocks: list[NDArray[np.float32]] = []
        self._starts: list[int] = []

    def add(self, key: str, vector: NDArray[np.floating]) -> None:
        count = len(self._keys)
        if not self._blocks or count == self._starts[-1] + len(self._blocks[-1]):
            self._blocks.append(np.zeros((min(max(_SMALLEST, count), _LARGEST), len(vector)), dtype=np.float32))
            self._starts.append(count)
        self._blocks[-1][count - self._starts[-1]] = vector
        self._keys.append(key)

    def nearest(self, vector: NDArray[np.floating]) -> Paraphrase:
        """Return the nearest of at least one row; of equally near ones, the first."""
        query = vector.astype(np.float32)
        similarities = np.concatenate([block @ query for block in self._blocks])[: len(self._keys)]
        # A sum of D products in fp32 is off by at most D ε. The candidates within that distance are compared in fp64.
        reach = 2 * len(query) * float(np.finfo(np.float32).eps)
        candidates = np.flatnonzero(similarities >= similarities.max() - reach).tolist()
        exact = np.stack([self._row(number) for number in candidates]).astype(np.float64) @ vector.astype(np.float64)
        best = int(exact.argmax())
        return Paraphrase(self._keys[candidates[best]], max(0.0, 1.0 - float(exact[best])))

    def _row(self, number: int) -> NDArray[np.float32]:
        block = bisect_right(self._starts, number) - 1
        row: NDArray[np.float32] = self._blocks[block][number - self._starts[block]]
        return row
