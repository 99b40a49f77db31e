from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from selfeval.quality.embeddings import unit_rows
from selfeval.quality.topic_coverage import cluster_topics, draw_weighted, thin_cluster_weights


def test_separate_topics_are_separate_clusters() -> None:
    rng = np.random.default_rng(0)
    centres = np.repeat(np.eye(4, 6), [50, 20, 5, 3], axis=0)
    clusters = cluster_topics(unit_rows((centres + 0.02 * rng.normal(size=centres.shape)).astype(np.float32)), 0, 4)
    groups = np.split(clusters, [50, 70, 75])
    assert [len(set(group.tolist())) for group in groups] == [1, 1, 1, 1]
    assert len(set(clusters.tolist())) == 4
    weights = thin_cluster_weights(clusters)
    assert [sum(part) for part in np.split(weights, [50, 70, 75])] == pytest.approx([0.25] * 4)
    assert weights[0] == pytest.approx(0.25 / 50)


def test_the_clusters_depend_only_on_texts_and_seed() -> None:
    vectors = unit_rows(np.random.default_rng(1).normal(size=(200, 8)).astype(np.float32))
    first = cluster_topics(vectors, 7)
    assert np.array_equal(first, cluster_topics(vectors.copy(), 7))
    assert len(set(first.tolist())) == 10  # √(200 / 2)


def test_few_and_equal_texts_have_few_clusters() -> None:
    assert cluster_topics(np.zeros((0, 3), dtype=np.float32), 0).tolist() == []
    assert cluster_topics(np.ones((1, 3), dtype=np.float32), 0).tolist() == [0]
    assert len(set(cluster_topics(np.ones((50, 3), dtype=np.float32), 0).tolist())) == 1


def test_draws_follow_the_weights() -> None:
    """The first of two draws is c with probability 3 / 5; the second is c with 1/5 · 3/4 twice, so c is drawn in 0.9."""
    rng = random.Random(0)
    drawn = [tuple(draw_weighted(rng, "abc", [1.0, 1.0, 3.0], 2)) for _ in range(4000)]
    first = Counter(pair[0] for pair in drawn)
    assert first["c"] / 4000 == pytest.approx(0.6, abs=0.03)
    assert sum("c" in pair for pair in drawn) / 4000 == pytest.approx(0.9, abs=0.02)
    assert all(a != b for a, b in drawn)


def test_a_draw_takes_as_long_with_one_heavy_item_as_without() -> None:
    """Drawing again until all are distinct would take some 10^12 attempts."""
    assert sorted(draw_weighted(random.Random(0), "abc", [1.0, 1e-12, 1e-12], 3)) == ["a", "b", "c"]


def test_impossible_draws_are_refused() -> None:
    assert draw_weighted(random.Random(0), [], [], 0) == []
    with pytest.raises(ValueError, match="0 to 2, got 3"):
        draw_weighted(random.Random(0), "ab", [1.0, 1.0], 3)
    with pytest.raises(ValueError, match="positive, got 0"):
        draw_weighted(random.Random(0), "ab", [1.0, 0.0], 1)
