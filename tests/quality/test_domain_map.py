from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from selfeval.quality.domain_map import find_clusters, project, typical_words
from selfeval.quality.embeddings import Vectors, unit_rows


def groups(sizes: tuple[int, ...], *, spread: float = 0.15, seed: int = 0) -> tuple[Vectors, list[int]]:
    """Vectors around orthogonal directions, and the group of each."""
    generator = np.random.default_rng(seed)
    owners = [group for group, size in enumerate(sizes) for _ in range(size)]
    order = generator.permutation(len(owners))
    shuffled = [owners[i] for i in order]
    vectors = np.eye(len(sizes), 16)[shuffled] + spread * generator.normal(size=(len(owners), 16)) / 4
    return unit_rows(vectors.astype(np.float32)), shuffled


@pytest.mark.parametrize("sizes", [(30, 20), (40, 30, 20, 10, 12)])
def test_separate_groups_are_the_clusters_and_the_largest_is_first(sizes: tuple[int, ...]) -> None:
    vectors, owners = groups(sizes)
    found = find_clusters(vectors)
    assert found.count == len(sizes)
    assert found.silhouette is not None
    assert found.silhouette > 0.7
    assert len(set(zip(found.labels_N.tolist(), owners, strict=True))) == len(sizes), "one to one"
    assert np.bincount(found.labels_N).tolist() == sorted(sizes, reverse=True)


def test_few_or_equal_texts_are_one_cluster() -> None:
    assert find_clusters(groups((8, 7))[0]).count == 1
    equal = find_clusters(np.tile(np.eye(1, 8, dtype=np.float32), (50, 1)))
    assert (equal.count, equal.silhouette) == (1, None)
    assert find_clusters(np.zeros((0, 4), dtype=np.float32)).count == 0
    two = np.repeat(np.eye(2, 8, dtype=np.float32), 20, axis=0)
    assert find_clusters(two).count == 1  # as many distinct texts as clusters: no silhouette is defined inside them


@pytest.mark.parametrize("sizes", [(60, 50, 40), (12, 10)])
def test_neighbours_on_the_map_are_of_the_same_group_and_the_map_is_reproducible(sizes: tuple[int, ...]) -> None:
    vectors, owners = groups(sizes)
    found = project(vectors)
    assert found.method == ("t-SNE" if sum(sizes) >= 30 else "PCA")
    assert found.points_N2.min() >= 0
    assert found.points_N2.max() <= 1
    assert np.ptp(found.points_N2, axis=0).max() == pytest.approx(1.0)
    distances = np.linalg.norm(found.points_N2[:, None] - found.points_N2[None], axis=2) + 9 * np.eye(len(vectors))
    same = [owners[i] == owners[j] for i, j in enumerate(distances.argmin(axis=1))]
    assert sum(same) / len(same) > 0.97
    assert np.array_equal(project(vectors).points_N2, found.points_N2)


def test_equal_and_missing_texts_have_a_place_too() -> None:
    assert project(np.tile(np.eye(1, 8, dtype=np.float32), (40, 1))).points_N2.tolist() == [[0.5, 0.5]] * 40
    assert project(np.zeros((0, 8), dtype=np.float32)).points_N2.shape == (0, 2)
    assert project(np.eye(2, 1, dtype=np.float32)).points_N2[:, 1].tolist() == [0.5, 0.5]


def test_typical_words_are_those_of_class_based_tf_idf() -> None:
    texts = ["The cat sat.", "The cat ran.", "The dog sat on the dog.", "A dog."]
    labels = np.array([0, 0, 1, 1])
    # Cluster 0 has 6 words: the 2, cat 2, sat, ran; cluster 1 has 7 (one letter is no word): the 2, dog 3, sat, on. A = 6.5.
    cat, ran, the = (share / 6 * math.log(1 + 6.5 / f) for share, f in ((2, 2), (1, 1), (2, 4)))
    assert cat > ran > the > 0.9 * ran
    # "the" and "sat" are left out: 2 of 6 is hardly more than 4 of 13, and 1 of 6 than 2 of 13.
    assert typical_words(texts, labels) == [("cat", "ran"), ("dog", "on")]


def test_chinese_words_are_pairs_of_characters_without_their_overlaps_and_numbers() -> None:
    texts = ["小明有3个苹果，吃了1个苹果。", "苹果有5个。", "火车走了7公里。", "火车快，火车到站。"]
    first, second = typical_words(texts, np.array([0, 0, 1, 1]), most=2)
    assert first[0] == "苹果"
    assert second[0] == "火车"
    assert all("果" not in word and "苹" not in word for word in first[1:]), "no part of a word that is there already"


def test_a_single_cluster_has_its_most_frequent_words_and_one_of_numbers_has_none() -> None:
    assert typical_words(["apples apples pears", "apples"], np.array([0, 0]), most=1) == [("apples",)]
    assert typical_words(["1 + 2", "3"], np.array([0, 0])) == [()]
    assert typical_words(["apples", "1 + 1"], np.array([0, 1]))[1] == ()


def test_map_and_clusters_are_computed_by_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    svd = np.linalg.svd

    def counted(*args: Any, **options: Any) -> Any:
        threads.extend(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas")
        return svd(*args, **options)

    monkeypatch.setattr(np.linalg, "svd", counted)
    with threadpool_limits(2):  # a machine with one core would have a single thread anyway
        project(groups((8, 7))[0])
        find_clusters(groups((8, 7))[0])
    assert set(threads) == {1}
