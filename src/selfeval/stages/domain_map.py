"""The texts of the map of the domain: a sample of the questions, the seeds, and the dropped questions."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TypeVar

from selfeval.evaluation.domain_map import MapText, QuestionResults, measure_map
from selfeval.quality.embeddings import Embedder
from selfeval.quality.embeddings.cache import EMBEDDINGS
from selfeval.quality.embeddings.registry import embedder_of
from selfeval.records import Question, Split
from selfeval.report.map_points import MAP_FILE, MapPoints
from selfeval.report.schema import DomainMap
from selfeval.stages.context import Context
from selfeval.stages.shards import POISONED

__all__ = ["draw_map", "fit_embedder", "texts_of_domain"]

_MOST_SEEDS, _MOST_DROPPED = 0.1, 0.3
"""Shares of the points that seeds and dropped questions take at most."""

T = TypeVar("T")


def texts_of_domain(context: Context, questions: Collection[Question]) -> list[str]:
    """Return the texts to which the embedder of the map is fitted: the seeds and the questions of the round."""
    return [*(seed.question for seed in context.seeds), *(question.text for question in questions)]


def fit_embedder(context: Context, texts: Sequence[str]) -> Embedder:
    """Return the embedder of `[embeddings]`, fitted to these texts."""
    # Vectors of a server cost money, and are kept; others are computed in one pass, whose batches do not depend on a resume.
    folder = context.store.root / EMBEDDINGS if context.config.embeddings.spec.is_remote else None
    return embedder_of(context.config, context.backbone, texts, folder=folder, note=context.terminal.note)


def draw_map(
    context: Context, questions: Collection[Question], embedder: Embedder, results: QuestionResults
) -> DomainMap | None:
    """Draw the map, write its points, and return the part of the report; None without any text.

    Args:
        context: context of the round.
        questions: all questions of the round.
        embedder: embedder of the texts.
        results: results of the judge and the evaluator by question.
    """
    texts, of = _texts(context, questions)
    if not texts:
        return None
    found, points = measure_map(texts, of, embedder, results)
    context.store.write_json(context.store.root / MAP_FILE, MapPoints(points=tuple(points)).as_json())
    return found


def _texts(context: Context, questions: Collection[Question]) -> tuple[list[MapText], int]:
    """Draw the texts at random, by the seed of the run; return them and the number of all texts."""
    most = context.config.evaluation.map_points
    seeds = [MapText("seed", seed.question) for seed in context.seeds]
    dropped = [d for d in context.store.read_dropped("questions") if d.text.strip() and d.reason != POISONED]
    drops = [MapText("dropped", d.text, reason=d.reason) for d in dropped]
    asked = [MapText("test" if q.split == Split.TEST else "train", q.text, id=q.id) for q in questions]
    drawn = [
        *_draw(context, "seeds", seeds, int(_MOST_SEEDS * most)),
        *_draw(context, "dropped", drops, int(_MOST_DROPPED * most)),
    ]
    return [*_draw(context, "questions", asked, most - len(drawn)), *drawn], len(asked) + len(seeds) + len(drops)


def _draw(context: Context, name: str, texts: Sequence[T], most: int) -> list[T]:
    """Draw at most so many texts, and keep their order."""
    if len(texts) <= most:
        return list(texts)
    places = context.random("map", name).sample(range(len(texts)), most)
    return [texts[place] for place in sorted(places)]
