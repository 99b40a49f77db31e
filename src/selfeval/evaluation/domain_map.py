"""The map of the domain: similar questions close to each other, with the judge's and the evaluator's results by cluster."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from selfeval.evaluation.evaluator import JudgedPair, by_gold, by_judge
from selfeval.quality.domain_map import Clusters, find_clusters, project, typical_words
from selfeval.quality.embeddings import Embedder, Vectors
from selfeval.quality.statistics import Figure, mean_figure, sigmoid
from selfeval.records import Verdict, VerdictState
from selfeval.report.map_points import MapKind, MapPoint, cut_text, points_fingerprint
from selfeval.report.schema import Cluster, DomainMap, Labels

__all__ = ["MapText", "QuestionResults", "measure_map", "results_of"]


@dataclass(frozen=True)
class MapText:
    """A text to draw.

    Attributes:
        id: id of the question; empty for a seed or a dropped question.
        reason: why it was dropped; empty for the others.
    """

    kind: MapKind
    text: str
    id: str = ""
    reason: str = ""


@dataclass(frozen=True)
class QuestionResults:
    """Results by question id, each the mean over the pairs of the question.

    Attributes:
        kept: share of the judged pairs that were kept.
        accuracy: share of the labelled test pairs on which the evaluator is right.
        confidence: confidence of the evaluator on the test pairs.
        labels: source of the labels.
    """

    kept: Mapping[str, float]
    accuracy: Mapping[str, float]
    confidence: Mapping[str, float]
    labels: Labels


def results_of(verdicts: Sequence[Verdict], pairs: Sequence[JudgedPair], temperature: float) -> QuestionResults:
    """Average the results of the judge and of the evaluator by question.

    Args:
        verdicts: verdicts on the pairs of all questions.
        pairs: judged test pairs with the margins of the evaluator.
        temperature: temperature of the confidence, sigmoid(|margin| / temperature).
    """
    gold = by_gold(pairs)
    return QuestionResults(
        kept=_means([(v.question_id, float(v.state == VerdictState.KEPT)) for v in verdicts]),
        accuracy=_means([(p.question_id, float(p.evaluator_right)) for p in gold or by_judge(pairs)]),
        confidence=_means([(p.verdict.question_id, sigmoid(abs(p.margin) / temperature)) for p in pairs]),
        labels="gold" if gold else "judge",
    )


def _means(values: Sequence[tuple[str, float]]) -> dict[str, float]:
    found: dict[str, list[float]] = defaultdict(list)
    for question, value in values:
        found[question].append(value)
    return {question: fmean(own) for question, own in found.items()}


def measure_map(
    texts: Sequence[MapText], of: int, embedder: Embedder, results: QuestionResults
) -> tuple[DomainMap, list[MapPoint]]:
    """Draw the map.

    Args:
        texts: the texts to draw, at least one.
        of: number of texts that they were drawn from.
        embedder: embedder of the texts.
        results: results of the judge and the evaluator.

    Returns:
        The part of the report, and the points.
    """
    vectors = embedder.embed([one.text for one in texts])
    place, clusters = project(vectors), find_clusters(vectors)
    points = [_point(*row, results) for row in zip(texts, place.points_N2.tolist(), clusters.labels_N.tolist(), strict=True)]
    found = DomainMap(
        embedder=embedder.name,
        projection=place.method,
        points=len(texts),
        texts=of,
        silhouette=None if clusters.silhouette is None else round(clusters.silhouette, 4),
        labels=results.labels,
        points_hash=points_fingerprint(points),
        clusters=tuple(_clusters(texts, points, vectors, clusters)),
    )
    return found, points


def _point(one: MapText, place: Sequence[float], cluster: int, results: QuestionResults) -> MapPoint:
    return MapPoint(
        kind=one.kind,
        id=one.id,
        text=cut_text(one.text),
        reason=one.reason,
        x=place[0],
        y=place[1],
        cluster=cluster,
        kept=results.kept.get(one.id),
        accuracy=results.accuracy.get(one.id),
        confidence=results.confidence.get(one.id),
    )


def _clusters(texts: Sequence[MapText], points: Sequence[MapPoint], vectors: Vectors, clusters: Clusters) -> list[Cluster]:
    words = typical_words([one.text for one in texts], clusters.labels_N)
    return [
        _cluster([p for p in points if p.cluster == number], words[number], _example(points, vectors, number))
        for number in range(clusters.count)
    ]


def _cluster(points: Sequence[MapPoint], words: tuple[str, ...], example: str) -> Cluster:
    return Cluster(
        words=words,
        example=example,
        questions=sum(p.kind in ("train", "test") for p in points),
        seeds=sum(p.kind == "seed" for p in points),
        dropped=sum(p.kind == "dropped" for p in points),
        kept=_mean([p.kept for p in points]),
        accuracy=_mean([p.accuracy for p in points]),
        # The scale starts at one half.
        confidence=_mean([p.confidence for p in points], bounds=(0.5, 1.0)),
    )


def _mean(values: Sequence[float | None], bounds: tuple[float, float] = (0.0, 1.0)) -> Figure:
    return mean_figure([value for value in values if value is not None], bounds=bounds)


def _example(points: Sequence[MapPoint], vectors: Vectors, number: int) -> str:
    """Return the text nearest to the middle of a cluster, of a question if it has one."""
    own = np.array([place for place, p in enumerate(points) if p.cluster == number])
    asked = np.array([place for place in own.tolist() if points[place].id] or own.tolist())
    nearest = int(np.argmax(vectors[asked] @ vectors[own].mean(axis=0)))
    return points[int(asked[nearest])].text
