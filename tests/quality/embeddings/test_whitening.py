"""Whitening: the covariance becomes the identity, and few texts leave it well-defined."""

from __future__ import annotations

import numpy as np
import pytest

from selfeval.quality.embeddings.protocol import Vectors
from selfeval.quality.embeddings.whitening import fit_whitening


def correlated(count: int, width: int = 6) -> Vectors:
    random = np.random.default_rng(0)
    found: Vectors = (random.normal(size=(count, width)) @ random.normal(size=(width, width)) + 5).astype(np.float32)
    return found


def test_the_covariance_becomes_the_identity() -> None:
    vectors = correlated(400)
    white = fit_whitening(vectors, shrinkage=0.0).apply(vectors).astype(np.float64)
    assert white.mean(axis=0) == pytest.approx(np.zeros(6), abs=1e-5)
    assert np.cov(white.T, bias=True) == pytest.approx(np.eye(6), abs=1e-4)


def test_kept_components_are_those_of_the_largest_variance() -> None:
    # Variances 9, 4 and 1 along the axes, so two components drop the last axis.
    vectors = np.array([[3, 0, 0], [-3, 0, 0], [0, 2, 0], [0, -2, 0], [0, 0, 1], [0, 0, -1]], dtype=np.float32)
    white = fit_whitening(vectors, dimensions=2, shrinkage=0.0).apply(vectors)
    # The variance of the first axis is (9 + 9) / 6 = 3, so 3 becomes sqrt(3); that of the second 8 / 6, so 2 becomes sqrt(3).
    assert np.abs(white[[0, 2]]) == pytest.approx(np.array([[3**0.5, 0], [0, 3**0.5]]), abs=1e-5)
    assert white[4] == pytest.approx([0, 0], abs=1e-6)


def test_the_shrinkage_mixes_the_variance_with_the_mean_one() -> None:
    # C = diag(4, 0) and tr C / D = 2; with r = 1/2, S = diag(3, 1).
    vectors = np.array([[2, 0], [-2, 0]], dtype=np.float32)
    whitening = fit_whitening(vectors, shrinkage=0.5)
    assert whitening.apply(np.array([[3, 5]], np.float32)) == pytest.approx(np.array([[3**0.5, 5]]), abs=1e-5)


def test_fewer_texts_than_dimensions_stay_finite_and_separate() -> None:
    vectors = np.random.default_rng(1).normal(size=(5, 64)).astype(np.float32)
    whitening = fit_whitening(vectors, dimensions=256)
    white = whitening.apply(vectors)
    assert white.shape == (5, 64)
    assert np.isfinite(white).all()
    # The same texts in another order give the same map, because the original axes are kept.
    assert fit_whitening(vectors[::-1].copy(), dimensions=256).apply(vectors) == pytest.approx(white, abs=1e-4)


def test_a_small_corpus_shrinks_by_at_least_64_texts() -> None:
    # Ledoit and Wolf find no noise in x x^T, which is C = diag(1, 0) for all 8 texts; r = 64 / 72, so S = diag(5 / 9, 4 / 9).
    vectors = np.array([[1, 0], [-1, 0]] * 4, dtype=np.float32)
    found = fit_whitening(vectors).apply(np.array([[1, 1]], np.float32))[0]
    assert found == pytest.approx([(9 / 5) ** 0.5, (9 / 4) ** 0.5], abs=1e-5)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_without_variance_vectors_keep_their_scale(count: int) -> None:
    vectors = np.full((count, 4), 2.0, np.float32)
    found = fit_whitening(vectors).apply(np.full((1, 4), 3.0, np.float32))
    assert found == pytest.approx(np.full((1, 4), 3.0 if count == 0 else 1.0))
