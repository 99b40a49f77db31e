"""GloVe: counts by hand, the objective, and determinism."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from selfeval.quality.embeddings.glove import cooccurrences, train_glove, vocabulary


def test_counts_are_weighted_by_distance() -> None:
    # "the cat sat the": the-cat at distance 1 and 2, the-sat at 2 and 1, cat-sat at 1, the-the at 3 (outside of the window).
    texts = [["the", "cat", "sat", "the"], ["cat"]]
    words = vocabulary(texts, 1)
    assert words == ["cat", "the", "sat"]
    expected = {("the", "cat"): 1 + 1 / 2, ("the", "sat"): 1 / 2 + 1, ("cat", "sat"): 1.0}
    found = cooccurrences(texts, words, window=2).toarray()
    for (a, b), count in expected.items():
        assert found[words.index(a), words.index(b)] == pytest.approx(count)
        assert found[words.index(b), words.index(a)] == pytest.approx(count)
    assert found.sum() == pytest.approx(2 * 4.0)


def test_rare_words_are_dropped_before_distances_are_counted() -> None:
    texts = [["a", "rare", "b"], ["a", "b"]]
    words = vocabulary(texts, 2)
    # Both times at distance 1, in both directions.
    assert cooccurrences(texts, words, window=1).toarray().tolist() == [[0, 2], [2, 0]]


def slow_glove(counts: NDArray[np.float64], dimensions: int, epochs: int, seed: int) -> NDArray[np.float64]:
    """AdaGrad on all counts at once, entry by entry, with separate biases."""
    random = np.random.default_rng(seed)
    size = len(counts)
    starts = [(random.random((size, dimensions + 1)) - 0.5) / dimensions for _ in range(2)]
    w, c = (start[:, :dimensions].copy() for start in starts)
    b, d = (start[:, dimensions].copy() for start in starts)
    squares = [np.ones_like(values) for values in (w, c, b, d)]
    for _ in range(epochs):
        gradients = [np.zeros_like(values) for values in (w, c, b, d)]
        for i, j in zip(*counts.nonzero(), strict=True):
            x = counts[i, j]
            error = min(1.0, (x / 100) ** 0.75) * (w[i] @ c[j] + b[i] + d[j] - math.log(x))
            for gradient, place, value in zip(gradients, (i, j, i, j), (c[j], w[i], 1.0, 1.0), strict=True):
                gradient[place] += error * value
        for values, square, gradient in zip((w, c, b, d), squares, gradients, strict=True):
            square += gradient**2
            values -= 0.05 * gradient / np.sqrt(square)
    return w + c


def test_training_equals_a_slow_reference() -> None:
    counts = cooccurrences([["a", "b"]] * 150 + [["c", "d", "a"]] * 7 + [["d", "b"]], ["a", "b", "c", "d"], window=2)
    expected = slow_glove(counts.toarray(), dimensions=3, epochs=5, seed=4)
    assert train_glove(counts, 3, 5, seed=4) == pytest.approx(expected, abs=1e-6)


def test_the_seed_determines_the_vectors() -> None:
    counts = cooccurrences([["a", "b", "c"], ["b", "c", "a"]], ["a", "b", "c"], window=2)
    first = train_glove(counts, 4, 3, seed=1)
    assert (first == train_glove(counts, 4, 3, seed=1)).all()
    assert (first != train_glove(counts, 4, 3, seed=2)).any()
