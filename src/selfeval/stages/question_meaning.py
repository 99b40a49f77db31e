"""Comparison of questions by meaning in the stage questions: off-domain questions, paraphrases, and topics of the examples.

Every decision is a function of the seeds, the questions of earlier shards and the samples of one group, so a resumed stage
decides the same. The last bits of a vector depend on the other texts of its pass. Hence seeds, questions and samples are
embedded in fixed groups (`quality/vector_groups.py`), and the vectors of earlier questions are kept between shards.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

from selfeval.config import QuestionsConfig
from selfeval.errors import ConfigError
from selfeval.quality.dedupe import comparable
from selfeval.quality.domain_distance import FEWEST_SEEDS, SeedDomain
from selfeval.quality.embeddings import Embedder, Vectors
from selfeval.quality.semantic_duplicates import SemanticDuplicates
from selfeval.quality.topic_coverage import cluster_topics, draw_weighted, thin_cluster_weights
from selfeval.quality.vector_groups import VectorGroups, embed_in_groups
from selfeval.records import Drop

__all__ = ["Meaning", "MeaningGroup", "compares_meaning", "draw_from_topics", "topic_weights"]

T = TypeVar("T")


def compares_meaning(config: QuestionsConfig) -> bool:
    """Return whether a filter of the stage compares questions by meaning."""
    return config.paraphrase is not None or config.off_domain is not None


class Meaning:
    """The filters of one shard that compare vectors.

    Args:
        config: settings of the stage.
        embedder: computes the vectors.
        seeds: the user's seed questions.
        known: Optional. Vectors that were computed for earlier shards. Default: none.

    Raises:
        ConfigError: there are too few different seeds, or their vectors are equal.
    """

    def __init__(
        self, config: QuestionsConfig, embedder: Embedder, seeds: Sequence[str], known: VectorGroups | None = None
    ) -> None:
        numbers = _distinct(seeds)
        self._known = VectorGroups() if known is None else known
        self._embedder, self._seeds = embedder, [seeds[number] for number in numbers]
        _check_count(config, len(numbers))
        vectors = self._known.embed(embedder, self._seeds)
        distances = self._known.distances(embedder, self._seeds)
        self._domain: SeedDomain | None = None
        self._paraphrases: SemanticDuplicates | None = None
        if config.off_domain is not None:
            self._domain = SeedDomain.of(vectors, config.off_domain, distances)
            _check_scale("off_domain", self._domain.threshold / config.off_domain, len(numbers))
        if config.paraphrase is not None:
            _check_scale("paraphrase", scale := float(np.median(distances)), len(numbers))
            self._paraphrases = SemanticDuplicates(config.paraphrase * scale)
            self._add([f"seed-{number}" for number in numbers], self._seeds, vectors)

    def add_all(self, keys: Sequence[str], texts: Sequence[str]) -> None:
        """Add earlier questions, of which later ones may be paraphrases.

        Args:
            keys: their keys.
            texts: a list that only grew at its end since earlier shards, so the vectors of its full groups are known.
        """
        if self._paraphrases is not None and texts:
            self._add(keys, texts, self._known.embed(self._embedder, texts))

    def _add(self, keys: Sequence[str], texts: Sequence[str], vectors: Vectors) -> None:
        assert self._paraphrases is not None
        for key, text, vector in zip(keys, texts, vectors, strict=True):
            self._paraphrases.add(key, text, vector)

    def group(self, texts: Sequence[str]) -> MeaningGroup:
        """Embed the samples of a group, which are judged one after another."""
        vectors = embed_in_groups(self._embedder, texts)
        return MeaningGroup(self._domain, self._paraphrases, self._seeds, texts, vectors)


class MeaningGroup:
    """Samples of a group with their vectors.

    Args:
        domain: Optional. The domain of the seeds. Default: no sample is outside.
        paraphrases: Optional. Index of the questions so far. Default: no sample is a paraphrase.
        seeds: the user's seed questions.
        texts: the samples.
        vectors: `[N, D]`, one row per sample.
    """

    def __init__(
        self,
        domain: SeedDomain | None,
        paraphrases: SemanticDuplicates | None,
        seeds: Sequence[str],
        texts: Sequence[str],
        vectors: Vectors,
    ) -> None:
        self._domain, self._paraphrases, self._seeds = domain, paraphrases, seeds
        # Equal texts have equal vectors.
        self._rows = {text: row for row, text in enumerate(texts)}
        self._vectors = vectors
        self._nearest = domain.nearest(vectors) if domain is not None and len(texts) else []
        self._border = domain.border(np.array([n.distance for n in self._nearest])) if domain is not None else 0.0

    def drop(self, text: str) -> Drop | None:
        """Return the drop of a sample of the group, if it is outside the domain or a paraphrase of a question so far."""
        row = self._rows[text]
        if self._domain is not None and self._nearest[row].distance > self._border:
            distance, seed = self._nearest[row]
            detail: dict[str, Any] = {
                "distance": round(distance, 4),
                "threshold": round(self._border, 4),
                "nearest_seed": self._seeds[seed],
            }
            if self._border > self._domain.threshold:
                detail["limited"] = True
            return Drop("questions", "off_domain", text, detail)
        if self._paraphrases is None or (found := self._paraphrases.find(text, self._vectors[row])) is None:
            return None
        limit = round(self._paraphrases.radius, 4)
        return Drop(
            "questions", "paraphrase", text, {"of": found.key, "distance": round(found.distance, 4), "threshold": limit}
        )

    def accept(self, key: str, text: str) -> None:
        """Add an accepted sample of the group, of which later ones may be paraphrases."""
        if self._paraphrases is not None:
            self._paraphrases.add(key, text, self._vectors[self._rows[text]])


def _distinct(seeds: Sequence[str]) -> list[int]:
    """Return the numbers of the seeds that differ from all before them; the distance of equal ones is 0, which is no scale."""
    first: dict[str, int] = {}
    for number, seed in enumerate(seeds):
        first.setdefault(comparable(seed), number)
    return list(first.values())


def _check_count(config: QuestionsConfig, count: int) -> None:
    """Refuse seeds too few for a distance between them to mean anything.

    Raises:
        ConfigError: see above.
    """
    for name in ("off_domain", "paraphrase"):
        if getattr(config, name) is not None and count < FEWEST_SEEDS:
            raise ConfigError(
                f"questions.{name} needs at least {FEWEST_SEEDS} different seeds, whose distances to each other are its scale; "
                f"this run has {count}; add seeds, or remove the setting"
            )


_ROUNDING = 1e-6
"""Distances up to this are 0: a few times the rounding error of a product of two vectors in float32."""


def _check_scale(name: str, scale: float, count: int) -> None:
    """Refuse seeds whose vectors are equal, although their texts differ.

    Raises:
        ConfigError: see above.
    """
    if scale <= _ROUNDING:
        raise ConfigError(
            f"questions.{name} compares with the distances of the seeds to each other, but most of the {count} seeds have the "
            "same vector as another one; use seeds that differ in more than their order or punctuation, or remove the setting"
        )


# -- examples -----------------------------------------------------------------------------------------------------------


def topic_weights(seeds: Vectors, questions: Vectors, seed: int) -> list[list[float]]:
    """Return weights of the seeds and of the questions, with which each topic of a part is drawn equally often.

    Both are clustered together, because few seeds alone have no topics. A prompt draws its seeds and its questions separately,
    so the weights of each part are computed from its texts alone: those of the seeds do not depend on the number of questions.

    Args:
        seeds: vectors of the user's seed questions, `[S, D]`.
        questions: vectors of training questions so far, `[N, D]`.
        seed: seed of the clustering.
    """
    topics = cluster_topics(np.concatenate([seeds, questions]), seed)
    return [thin_cluster_weights(part).tolist() for part in (topics[: len(seeds)], topics[len(seeds) :])]


def draw_from_topics(rng: random.Random, items: Sequence[T], weights: Sequence[float] | None, count: int) -> list[T]:
    """Draw distinct items, by their weights if there are any, else uniformly."""
    return rng.sample(items, count) if weights is None else draw_weighted(rng, items, weights, count)
