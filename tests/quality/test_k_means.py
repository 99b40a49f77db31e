from __future__ import annotations

import numpy as np

from selfeval.quality.k_means import k_means


def test_separate_groups_are_found_and_the_seed_decides_the_rest() -> None:
    rng = np.random.default_rng(0)
    vectors = np.repeat(np.eye(3), 20, axis=0) + 0.05 * rng.normal(size=(60, 3))
    found = k_means(vectors, 3, seed=0, starts=4)
    assert {frozenset(np.flatnonzero(found == label).tolist()) for label in range(3)} == {
        frozenset(range(start, start + 20)) for start in (0, 20, 40)
    }
    spread = rng.normal(size=(200, 5)).astype(np.float32)
    once = k_means(spread, 7, seed=5, starts=1, passes=3)
    assert (k_means(spread, 7, seed=5, starts=1, passes=3) == once).all()
    assert (k_means(spread, 7, seed=6, starts=1, passes=3) != once).any()
