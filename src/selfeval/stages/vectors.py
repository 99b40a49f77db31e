"""Figures of the evaluation that need vectors: the map of the domain, and the diversity of the replies.

No other figure needs them, and hours of work precede them, so an embedder that fails leaves them out with a note.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from selfeval.errors import ConfigError, EndpointError, MemoryLimitError, MissingPackageError, ModelError
from selfeval.evaluation.diversity import MOST_QUESTIONS, ReplyVectors
from selfeval.evaluation.domain_map import QuestionResults
from selfeval.quality.embeddings import Vectors
from selfeval.records import Question
from selfeval.report.schema import DomainMap
from selfeval.stages.context import Context
from selfeval.stages.domain_map import draw_map, fit_embedder, texts_of_domain

__all__ = ["embed_replies", "map_of_domain"]

_FAILURES = (ConfigError, EndpointError, MemoryLimitError, MissingPackageError, ModelError)
_MOST_UNKNOWN = 0.05
"""Share of the replies that may be without a known word. They all have the same vector, so they would count as equal."""


def map_of_domain(context: Context, questions: Collection[Question], results: QuestionResults) -> DomainMap | None:
    """Draw the map; None, with a note, if the embedder fails, and None with `evaluation.map_points = 0`.

    Args:
        context: context of the round.
        questions: all questions of the round.
        results: results of the judge and the evaluator by question.
    """
    if not context.config.evaluation.map_points:
        return None
    try:
        return draw_map(context, questions, fit_embedder(context, texts_of_domain(context, questions)), results)
    except _FAILURES as error:
        context.terminal.note(f"no map of the domain: {error}")
        return None


def embed_replies(context: Context, before: Sequence[str], after: Sequence[str]) -> ReplyVectors | None:
    """Embed the replies before and after training, by an embedder that is fitted to both.

    One that is fitted to the questions does not know the words that only replies have.

    Args:
        context: context of the round.
        before, after: texts of the replies, in the order of their questions. At most the first `MOST_QUESTIONS` are used.

    Returns:
        The vectors. None with `evaluation.map_points = 0`; None, with a note, if the embedder fails or if the vectors of more
        than 5 % of the replies are zero although they have text.
    """
    if not context.config.evaluation.map_points or not before:
        return None
    texts = [*before[:MOST_QUESTIONS], *after[:MOST_QUESTIONS]]
    try:
        embedder = fit_embedder(context, texts)
        vectors = embedder.embed(texts)
    except _FAILURES as error:
        context.terminal.note(f"no Vendi score of the replies: {error}")
        return None
    unknown = _unknown(texts, vectors)
    if unknown > _MOST_UNKNOWN * len(texts):
        context.terminal.note(
            f"no Vendi score of the replies: {embedder.name} has no vector for {unknown} of {len(texts)} replies; use another "
            "embeddings.embedder"
        )
        return None
    half = len(texts) // 2
    return ReplyVectors(embedder.name, vectors[:half], vectors[half:])


def _unknown(texts: Sequence[str], vectors: Vectors) -> int:
    """Return the number of texts with a row of zeros. An empty reply rightly has one."""
    return sum(bool(text.strip()) and not np.any(row) for text, row in zip(texts, vectors, strict=True))
