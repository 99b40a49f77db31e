"""The density of texts."""

from __future__ import annotations

import doctest

import numpy as np
import pytest

from selfeval.quality import centrality
from selfeval.quality.centrality import densities


def test_the_density_is_the_mean_of_the_positive_similarities() -> None:
    x = np.array([[1, 0], [0.6, 0.8], [-1, 0], [0, 0]], dtype=np.float32)
    # (1 + 0.6 + 0 + 0) / 4, (0.6 + 1 + 0 + 0) / 4, 1 / 4, 0
    assert densities(x) == pytest.approx([0.4, 0.4, 0.25, 0.0])
    assert densities(x[:0]).size == 0


def test_many_vectors_are_compared_in_blocks() -> None:
    x = np.tile(np.eye(2, dtype=np.float32), (3000, 1))
    assert densities(x) == pytest.approx([0.5] * 6000)


def test_the_examples_of_the_documentation() -> None:
    found = doctest.testmod(centrality)
    assert (found.failed, found.attempted > 0) == (0, True)
