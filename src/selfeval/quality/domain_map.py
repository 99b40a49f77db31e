"""A map of texts: two coordinates for each of them, clusters, and the typical words of each cluster.

scikit-learn is imported when a function needs it, because it takes seconds.

Shapes: N texts, D dimensions, K clusters, W words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from selfeval.quality.dedupe import units
from selfeval.quality.embeddings import Vectors
from selfeval.quality.k_means import k_means

__all__ = ["Clusters", "Projection", "find_clusters", "project", "typical_words"]

Floats = NDArray[np.float64]
Numbers = NDArray[np.int64]

CLUSTER_COUNTS = (2, 3, 4, 5, 6, 8, 10, 12)
FEWEST_PER_CLUSTER = 8
"""Fewest texts per cluster, on average."""
TEXTS_PER_CANDIDATE, FEWEST_CLUSTERS = 40, 6
"""With N texts there are at least N / 40 clusters, or 6. The silhouette alone prefers two clusters of very different sizes."""
FEWEST_FOR_TSNE = 30
DIMENSIONS = 30
"""Principal components that are clustered and projected."""
PERPLEXITY = 30.0
STEPS = 500
TYPICAL = 1.2
"""A typical word is at least so many times as frequent in its cluster as in all texts."""


@dataclass(frozen=True)
class Projection:
    """Coordinates `[N, 2]` in [0, 1], with one scale for both axes, and how they were computed."""

    points_N2: Floats
    method: Literal["t-SNE", "PCA"]


@dataclass(frozen=True)
class Clusters:
    """The cluster of each text, from 0, largest first.

    Attributes:
        labels_N: number of the cluster.
        silhouette: mean silhouette of the texts, in [-1, 1]; None with a single cluster.
    """

    labels_N: Numbers
    silhouette: float | None

    @property
    def count(self) -> int:
        """Number of clusters."""
        return int(self.labels_N.max()) + 1 if len(self.labels_N) else 0


def project(vectors: Vectors) -> Projection:
    """Project vectors to two dimensions, so that similar texts are close to each other.

    t-SNE from the first principal components, which keep the global order: van der Maaten and Hinton 2008
    (https://jmlr.org/papers/v9/vandermaaten08a.html), Kobak and Berens 2019 (https://doi.org/10.1038/s41467-019-13056-x). Few
    texts are projected to their two principal components. The result is the same on every call with equal vectors, because one
    thread computes it: several add their terms in any order.

    Args:
        vectors: `[N, D]`. 1,000 texts take about two seconds, 2,000 five.
    """
    with threadpool_limits(1):
        return _project(vectors)


def _project(vectors: Vectors) -> Projection:
    reduced_ND = _reduced(vectors)
    if len(vectors) < FEWEST_FOR_TSNE or not reduced_ND.any():
        return Projection(_scaled(reduced_ND[:, :2]), "PCA")
    from sklearn.manifold import TSNE

    start_N2 = reduced_ND[:, :2] / reduced_ND[:, 0].std() * 1e-4
    perplexity = min(PERPLEXITY, (len(vectors) - 1) / 3)
    tsne = TSNE(perplexity=perplexity, init=start_N2.astype(np.float32), max_iter=STEPS, random_state=0)
    return Projection(_scaled(tsne.fit_transform(reduced_ND)), "t-SNE")


def _reduced(vectors: Vectors) -> Floats:
    """Return the first principal components, `[N, at most 30]`, and at least two columns."""
    x_ND = vectors.astype(np.float64)
    centred_ND = x_ND - x_ND.mean(axis=0) if len(x_ND) else x_ND
    left, sizes, _ = np.linalg.svd(centred_ND, full_matrices=False)
    found_ND = left[:, :DIMENSIONS] * sizes[:DIMENSIONS]
    # The sign of a component is arbitrary; fixed by its largest entry, so libraries agree.
    if len(found_ND):
        found_ND = found_ND * np.where(found_ND[abs(found_ND).argmax(axis=0), range(found_ND.shape[1])] < 0, -1.0, 1.0)
    return np.pad(found_ND, ((0, 0), (0, max(0, 2 - found_ND.shape[1]))))


def _scaled(points_N2: Floats) -> Floats:
    if not len(points_N2):
        return np.zeros((0, 2))
    low, high = points_N2.min(axis=0), points_N2.max(axis=0)
    middle, reach = (low + high) / 2, float((high - low).max()) or 1.0
    return np.asarray((points_N2 - middle) / reach + 0.5, dtype=np.float64)


def find_clusters(vectors: Vectors) -> Clusters:
    """Cluster texts with k-means, with the number of clusters whose mean silhouette is the largest.

    Rousseeuw 1987 (https://doi.org/10.1016/0377-0427(87)90125-7). Candidates are 2 to 12 clusters (6 to 12 for 240 texts or
    more), with at least eight texts per cluster on average; fewer texts are a single cluster. The result is the same on every
    call with equal vectors; one thread computes it.

    Args:
        vectors: `[N, D]`.
    """
    with threadpool_limits(1):
        return _find_clusters(vectors)


def _find_clusters(vectors: Vectors) -> Clusters:
    reduced_ND = _reduced(vectors)
    distinct = len(np.unique(reduced_ND.round(9), axis=0))
    fewest = min(FEWEST_CLUSTERS, len(vectors) // TEXTS_PER_CANDIDATE)
    counts = [k for k in CLUSTER_COUNTS if fewest <= k <= len(vectors) // FEWEST_PER_CLUSTER and k < distinct]
    if not counts:
        return Clusters(np.zeros(len(vectors), dtype=np.int64), None)
    from sklearn.metrics import silhouette_score

    found = [k_means(reduced_ND, k, seed=0, starts=4) for k in counts]
    scores = [float(silhouette_score(reduced_ND, labels_N)) for labels_N in found]
    best = int(np.argmax(scores))
    return Clusters(_by_size(found[best]), scores[best])


def _by_size(labels_N: Numbers) -> Numbers:
    """Number the clusters by falling size."""
    order = np.argsort(-np.bincount(labels_N), kind="stable")
    return np.argsort(order)[labels_N].astype(np.int64)


def typical_words(texts: Sequence[str], labels_N: Numbers, *, most: int = 4) -> list[tuple[str, ...]]:
    """Return the typical words of each cluster, by class-based TF-IDF.

    tf(w, k) log(1 + A / f(w)), with the share tf of the word in the cluster, its number f in all texts, and the mean number A
    of words per cluster. Grootendorst 2022 (https://arxiv.org/abs/2203.05794). In scripts without spaces, pairs of characters
    are the words. Numbers are left out, and so are words that are not more frequent in the cluster than elsewhere.

    Args:
        texts: N texts.
        labels_N: cluster of each text, from 0.
        most: largest number of words.

    Returns:
        One tuple per cluster; empty for a cluster without typical words.
    """
    from sklearn.feature_extraction.text import CountVectorizer

    count = int(labels_N.max()) + 1 if len(labels_N) else 0
    joined: list[list[str]] = [[] for _ in range(count)]
    for text, label in zip(texts, labels_N.tolist(), strict=True):
        joined[label] += _words(text)
    if not any(joined):
        return [()] * count
    vectorizer = CountVectorizer(analyzer=list)
    counts_KW = vectorizer.fit_transform(joined).toarray().astype(np.float64)
    names = vectorizer.get_feature_names_out().tolist()
    return [_best(names, *row, most) for row in zip(*_weights(counts_KW), strict=True)]


def _weights(counts_KW: Floats) -> tuple[Floats, Floats]:
    """Return the weight of each word in each cluster, and how many times as frequent it is there as in all texts."""
    shares_KW = counts_KW / np.maximum(counts_KW.sum(axis=1, keepdims=True), 1)
    total_W = counts_KW.sum(axis=0)
    weights_KW = shares_KW * np.log1p(counts_KW.sum() / len(counts_KW) / total_W)
    return weights_KW, shares_KW / (total_W / total_W.sum())


def _best(names: Sequence[str], weights_W: Floats, ratios_W: Floats, most: int) -> tuple[str, ...]:
    # A cluster with most of the texts has the words of all texts; then the largest weights are the typical words.
    wanted_W = ratios_W >= TYPICAL if (ratios_W >= TYPICAL).any() else weights_W > 0
    found: list[str] = []
    for place in np.argsort(-np.where(wanted_W, weights_W, 0), kind="stable"):
        if len(found) == most or not wanted_W[place] or not weights_W[place]:
            break
        if not any(_overlap(names[place], other) for other in found):
            found.append(names[place])
    return tuple(found)


def _words(text: str) -> list[str]:
    """Return the words of a text, without numbers; pairs of letters that are next to each other in scripts without spaces."""
    parts = units(text)
    if all(len(part) == 1 for part in parts) and any(_is_unspaced(part) for part in parts):
        return [first + second for first, second in pairwise(parts) if _is_unspaced(first) and _is_unspaced(second)]
    return [part for part in parts if len(part) > 1 and any(letter.isalpha() for letter in part)]


def _is_unspaced(letter: str) -> bool:
    return ord(letter) >= 0x0E00 and letter.isalpha()


def _overlap(word: str, other: str) -> bool:
    """Return whether two pairs of characters share a character at their ends, as parts of one longer word do."""
    pairs = len(word) == len(other) == 2 and _is_unspaced(word[0]) and _is_unspaced(other[0])
    return pairs and (word[0] == other[1] or word[1] == other[0])
