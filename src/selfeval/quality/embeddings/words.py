"""Vectors of texts from vectors of their words.

Shapes: N texts, D dimensions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from selfeval.quality.dedupe import units
from selfeval.quality.embeddings.protocol import Vectors, unit_rows

__all__ = ["WordVector", "common_direction", "pool_words", "rarity_weights"]

WordVector = Callable[[str], NDArray[np.float32] | None]
"""Returns the vector of a word; None if it has none."""

_SMOOTHING = 1e-3
"""a of the SIF weights; the paper recommends 1e-3 to 1e-4."""


def rarity_weights(texts: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return the SIF weight of each word, a / (a + p(w)) with a = 0.001 and the word's share p(w) of all words.

    Arora et al. 2017 (https://openreview.net/forum?id=SyK00v5xx), section 3.

    Args:
        texts: the words of each text.

    Example:
        >>> {word: round(weight, 4) for word, weight in rarity_weights([["a", "a", "b", "a"]]).items()}
        {'a': 0.0013, 'b': 0.004}
    """
    counts = Counter(word for words in texts for word in words)
    total = sum(counts.values())
    return {word: _SMOOTHING / (_SMOOTHING + count / total) for word, count in counts.items()}


def pool_words(texts: Sequence[str], vector: WordVector, dimensions: int, weights: Mapping[str, float] | None) -> Vectors:
    """Return the weighted mean of the vectors of each text's words, `[N, D]`; zeros if no word has one.

    Args:
        texts: N texts; they are split as `dedupe.units` splits them, in Chinese into characters.
        vector: returns the vector of a word.
        dimensions: D.
        weights: weights by word; an unseen word has weight 1, the limit for rare words. None: all words weigh 1.
    """
    found = np.zeros((len(texts), dimensions), np.float32)
    for row, text in enumerate(texts):
        total = 0
        for word in units(text):
            if (known := vector(word)) is not None:
                found[row] += known * np.float32(1.0 if weights is None else weights.get(word, 1.0))
                total += 1
        found[row] /= max(1, total)
    return found


def common_direction(vectors_ND: Vectors) -> NDArray[np.float32]:
    """Return the first right singular vector `[D]` of the vectors, which SIF subtracts; zeros if there are no vectors.

    Args:
        vectors_ND: vectors of the corpus, not centred.
    """
    if not vectors_ND.any():
        return np.zeros(vectors_ND.shape[1], np.float32)
    _, _, directions = np.linalg.svd(unit_rows(vectors_ND).astype(np.float64), full_matrices=False)
    found: NDArray[np.float32] = directions[0].astype(np.float32)
    return found
