from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from evidence_records import reply, verdict
from selfeval.evaluation.domain_map import MapText, measure_map, results_of
from selfeval.evaluation.evaluator import JudgedPair
from selfeval.quality.dedupe import units
from selfeval.quality.embeddings import Vectors, unit_rows
from selfeval.quality.statistics import sigmoid
from selfeval.records import Split, VerdictState
from selfeval.report.map_points import LONGEST_TEXT

TOPICS = ("apple pear basket fruit", "bus train station minute")


class BagOfWords:
    """An embedder: counts of the words of each topic, and a little of the length of the text."""

    name = "words"

    def embed(self, texts: Sequence[str]) -> Vectors:
        counts = [[sum(word in topic.split() for word in units(text)) for topic in TOPICS] for text in texts]
        rows = [[*own, 0.01 * (len(text) % 7)] for own, text in zip(counts, texts, strict=True)]
        return unit_rows(np.array(rows, dtype=np.float32))


def asked(topic: int, number: int) -> str:
    words = TOPICS[topic].split()
    return f"How many {words[number % 4]} and {words[(number // 4 + 1 + number) % 4]} are there, number {number}?"


def judged(question: str, margin: float, right: tuple[bool, bool] | None) -> JudgedPair:
    replies = (reply(f"{question}-r0", "1"), reply(f"{question}-r1", "2"))
    return JudgedPair(verdict(question), replies, margin, 0.0, right)


def questions() -> list[MapText]:
    """Twenty questions on fruit, ten on travel, and a seed and a drop on travel."""
    first = [MapText("test" if n % 2 else "train", asked(0, n), f"a{n}") for n in range(20)]
    second = [MapText("test", asked(1, n), f"b{n}") for n in range(10)]
    return [*first, *second, MapText("seed", asked(1, 3)), MapText("dropped", f"{asked(1, 2)} " * 9, reason="too_long")]


def test_results_are_averaged_by_question_and_gold_comes_first() -> None:
    verdicts = [verdict("q1", 0.9), verdict("q1", 0.5, VerdictState.UNSURE), verdict("q2", 0.9, split=Split.TRAIN)]
    found = results_of(verdicts, [judged("q1", 2.0, (True, False)), judged("q3", -4.0, (True, False))], temperature=2.0)
    assert found.kept == {"q1": 0.5, "q2": 1.0}
    assert found.accuracy == {"q1": 1.0, "q3": 0.0}
    assert found.confidence == {"q1": pytest.approx(sigmoid(1.0)), "q3": pytest.approx(sigmoid(2.0))}
    assert found.labels == "gold"
    assert results_of(verdicts, [judged("q1", 2.0, None)], temperature=1.0).labels == "judge"


def test_clusters_have_the_figures_of_their_questions() -> None:
    pairs = [judged(f"a{n}", 3.0, (True, False)) for n in range(1, 20, 2)]
    pairs += [judged(f"b{n}", 1.0, (n < 4, n >= 4)) for n in range(10)]
    verdicts = [verdict(f"b{n}", 0.9 if n < 5 else None, VerdictState.KEPT if n < 5 else VerdictState.TIE) for n in range(10)]
    found, points = measure_map(questions(), 500, BagOfWords(), results_of(verdicts, pairs, temperature=1.0))
    fruit, travel = found.clusters
    assert (fruit.questions, fruit.seeds, fruit.dropped) == (20, 0, 0)
    assert (travel.questions, travel.seeds, travel.dropped) == (10, 1, 1)
    assert set(fruit.words) <= set(TOPICS[0].split())
    assert set(travel.words) <= set(TOPICS[1].split())
    assert (fruit.accuracy.value, fruit.accuracy.n) == (1.0, 10)
    assert (travel.accuracy.value, travel.accuracy.n) == (0.4, 10)
    assert (travel.kept.value, travel.kept.n) == (0.5, 10)
    assert (fruit.kept.value, fruit.kept.n) == (None, 0)
    assert travel.confidence.value == pytest.approx(sigmoid(1.0))
    assert travel.confidence.ci_low is not None
    assert travel.confidence.ci_low >= 0.5
    assert (found.points, found.texts, found.embedder, found.projection) == (32, 500, "words", "t-SNE")
    assert len(points) == 32
    assert {p.cluster for p in points if p.id.startswith("a")} == {0}
    assert travel.example in {p.text for p in points if p.id.startswith("b")}, "a question, not the seed or the drop"
    assert max(len(point.text) for point in points) == LONGEST_TEXT
    assert points[-1].text.endswith("…")


def test_a_map_of_few_texts_is_one_cluster() -> None:
    found, points = measure_map([MapText("seed", "An apple?")], 1, BagOfWords(), results_of([], [], temperature=1.0))
    assert [cluster.words for cluster in found.clusters] == [("an", "apple")]
    assert found.silhouette is None
    assert (points[0].x, points[0].y) == (0.5, 0.5)
    assert found.clusters[0].example == "An apple?"
