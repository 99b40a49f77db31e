"""Score the replies before and after training against references of the user's file."""

from __future__ import annotations

from collections.abc import Sequence

from selfeval.evaluation.policy import Answered
from selfeval.quality.text_metrics.scoring import MetricName, text_metrics
from selfeval.report.schema import ReferenceMetric, ReferenceScores

__all__ = ["REFERENCE_METRICS", "check_packages", "compare_with_references", "score_by_references"]

REFERENCE_METRICS: tuple[MetricName, ...] = ("bleu", "chrf", "rougeL", "meteor")
"""Metrics of the report: n-grams of words, n-grams of characters, the common subsequence, and aligned words."""


def check_packages() -> None:
    """Refuse to work without the libraries of the metrics, before replies are sampled for them.

    Raises:
        MissingPackageError: a library of the extra `data` is not installed.
    """
    text_metrics(["a"], [["a"]], metrics=REFERENCE_METRICS)


def score_by_references(answered: Sequence[Answered], references: Sequence[Sequence[str]]) -> ReferenceScores | None:
    """Compare the overlap of the replies before and after training with references.

    Args:
        answered: test questions with both replies.
        references: references of each question; those without one are left out.

    Returns:
        The scores; None if no question has a reference.

    Raises:
        MissingPackageError: a library of the extra `data` is not installed.
    """
    known = [(a, several) for a, several in zip(answered, references, strict=True) if several]
    if not known:
        return None
    return compare_with_references([a.before for a, _ in known], [a.after for a, _ in known], [s for _, s in known])


def compare_with_references(
    before: Sequence[str], after: Sequence[str], references: Sequence[Sequence[str]]
) -> ReferenceScores:
    """Compare the overlap of replies before and after training with references.

    Args:
        before, after: [N] replies.
        references: [N], at least one reference for each.

    Raises:
        MissingPackageError: a library of the extra `data` is not installed.
    """
    found = text_metrics(after, references, metrics=REFERENCE_METRICS, against=before)
    rows = []
    for name, score in found.scores.items():
        assert score.other is not None
        assert score.difference is not None
        rows.append(ReferenceMetric(name=name, before=score.other, after=score.figure, difference=score.difference))
    return ReferenceScores(language=found.language, metrics=tuple(rows))
