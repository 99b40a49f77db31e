from __future__ import annotations

import numpy as np
import pytest

from selfeval.quality import domain_distance
from selfeval.quality.domain_distance import SeedDomain, leave_one_out_distances
from selfeval.quality.embeddings import Vectors, unit_rows


def on_circle(*degrees: float) -> Vectors:
    """Vectors of length 1 in the plane; two of them have the cosine of the angle between them."""
    angles = np.deg2rad(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def distance(degrees: float) -> float:
    return 1.0 - float(np.cos(np.deg2rad(degrees)))


def test_leave_one_out_distances_are_those_of_the_nearest_other_text() -> None:
    found = leave_one_out_distances(on_circle(0, 10, 30, 70))
    assert found == pytest.approx([distance(d) for d in (10, 10, 20, 40)], abs=1e-6)


def test_with_few_seeds_the_farthest_one_times_the_margin_is_the_border() -> None:
    seeds = on_circle(0, 10, 20, 30, 60)
    assert SeedDomain.of(seeds, 1.0).threshold == pytest.approx(distance(30), abs=1e-6)
    assert SeedDomain.of(seeds, 1.5).threshold == pytest.approx(1.5 * distance(30), abs=1e-6)


def test_with_many_seeds_a_share_of_them_may_be_farther() -> None:
    # 100 seeds in 99 steps of half a degree and one of 60 degrees: rank ⌈0.98 · 101⌉ = 99, so the far one does not count.
    seeds = on_circle(*(i / 2 for i in range(99)), 109)
    assert SeedDomain.of(seeds, 1.0).threshold == pytest.approx(distance(0.5), abs=1e-6)


def test_the_nearest_seed_is_named() -> None:
    domain = SeedDomain.of(on_circle(0, 10, 20, 30, 60), 1.0)
    [near, far] = domain.nearest(on_circle(21, 120))
    assert (near.seed, far.seed) == (2, 4)
    assert near.distance == pytest.approx(distance(1), abs=1e-6)
    assert far.distance == pytest.approx(distance(60), abs=1e-6)
    assert near.distance < domain.threshold < far.distance


def test_questions_of_the_domain_are_rarely_outside() -> None:
    """Without a margin, the share beyond the border is at most 1 / (S + 1) = 1 / 21 on average; here of 100 × 50 texts."""
    rng, outside = np.random.default_rng(0), []
    for _ in range(100):
        texts = unit_rows(rng.normal(size=(70, 8)).astype(np.float32))
        domain = SeedDomain.of(texts[:20], 1.0)
        outside += [nearest.distance > domain.threshold for nearest in domain.nearest(texts[20:])]
    assert 0.02 < np.mean(outside) < 1 / 21 + 0.01


def test_at_most_a_share_of_a_group_is_beyond_the_border() -> None:
    domain = SeedDomain.of(on_circle(0, 10, 20, 30, 60), 1.0)
    few, most = np.array([0.0] * 15 + [1.5]), np.array([0.0, *np.linspace(0.6, 0.9, 16)])
    assert domain.border(few) == domain.threshold
    assert sum(most > domain.border(most)) == 8
    assert domain.border(np.array([])) == domain.threshold


def test_a_group_of_a_few_texts_may_be_dropped_as_a_whole() -> None:
    domain = SeedDomain.of(on_circle(0, 10, 20, 30, 60), 1.0)
    assert [domain.border(np.full(size, 1.5)) > domain.threshold for size in (1, 2, 15, 16)] == [False, False, False, True]


def test_equal_texts_are_not_at_a_negative_distance() -> None:
    vectors = np.repeat(unit_rows(np.random.default_rng(0).normal(size=(50, 97)).astype(np.float32)), 2, axis=0)
    assert (1 - (vectors * vectors).sum(1)).min() < 0  # rounding
    assert leave_one_out_distances(vectors).min() == 0.0


def test_blocks_give_the_distances_of_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(domain_distance, "_BLOCK", 3)
    vectors = unit_rows(np.random.default_rng(0).normal(size=(10, 4)).astype(np.float32))
    expected = [min(1 - float(a @ b) for j, b in enumerate(vectors) if j != i) for i, a in enumerate(vectors)]
    assert leave_one_out_distances(vectors) == pytest.approx(expected, abs=1e-6)


def test_too_few_seeds_and_a_margin_below_1_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 5 seeds, got 4"):
        SeedDomain.of(on_circle(0, 1, 2, 3))
    with pytest.raises(ValueError, match=r"at least 1, got 0\.9"):
        SeedDomain.of(on_circle(0, 1, 2, 3, 4), 0.9)
