from __future__ import annotations

import math

import numpy as np
import pytest

from selfeval.quality.embeddings import Vectors
from selfeval.quality.vendi import vendi_score


def rows(*vectors: tuple[float, ...]) -> Vectors:
    return np.array(vectors, dtype=np.float32)


def test_equal_texts_are_one_and_orthogonal_ones_are_as_many_as_there_are() -> None:
    assert vendi_score(rows((0.6, 0.8), (0.6, 0.8), (0.6, 0.8))) == pytest.approx(1.0, abs=1e-6)
    assert vendi_score(np.eye(5, 9, dtype=np.float32)) == pytest.approx(5.0)


def test_two_texts_with_cosine_c_have_the_eigenvalues_of_the_two_by_two_matrix() -> None:
    # K / 2 = [[1, c], [c, 1]] / 2 has the eigenvalues (1 + c) / 2 and (1 - c) / 2; here 0.8 and 0.2.
    expected = math.exp(-0.8 * math.log(0.8) - 0.2 * math.log(0.2))
    assert vendi_score(rows((1.0, 0.0), (0.6, 0.8))) == pytest.approx(expected, rel=1e-6)


def test_clusters_count_by_their_sizes() -> None:
    # Three of one direction and one of another: eigenvalues 3/4 and 1/4.
    expected = math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert vendi_score(rows(*[(1.0, 0.0)] * 3, (0.0, 1.0))) == pytest.approx(expected, rel=1e-6)


def test_both_sides_of_the_matrix_give_the_same_score() -> None:
    vectors = np.random.default_rng(0).normal(size=(6, 6)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    wide = np.hstack([vectors, np.zeros((6, 4), dtype=np.float32)])  # N < D: the kernel; N >= D: the covariance
    assert vendi_score(wide) == pytest.approx(vendi_score(vectors), rel=1e-6)


def test_texts_without_content_are_equal_to_each_other_and_to_nothing_else() -> None:
    assert vendi_score(rows((0.0, 0.0), (0.0, 0.0))) == pytest.approx(1.0)
    assert vendi_score(rows((1.0, 0.0), (0.0, 1.0), (0.0, 0.0))) == pytest.approx(3.0)
    assert vendi_score(np.zeros((0, 3), dtype=np.float32)) is None


def test_vectors_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match=r"length 1 or 0, got lengths from 0\.5 to 1"):
        vendi_score(rows((1.0, 0.0), (0.5, 0.0)))
