"""The rows of the page on the diversity of the policy's replies."""

from __future__ import annotations

from selfeval.quality.statistics import Figure
from selfeval.report.figures import cells
from selfeval.report.schema import Diversity, DiversityChange

__all__ = ["diversity_rows", "diversity_sentence"]

_MEASURES = (
    ("distinct_1", "Distinct words, share of all words"),
    ("distinct_2", "Distinct bigrams, share of all bigrams"),
    ("self_bleu", "Self-BLEU: similarity of the replies, 0 to 1"),
    ("vendi", "Vendi score: effective number of different replies"),
)


def diversity_rows(diversity: Diversity | None) -> list[tuple[str, str, str, str, str]]:
    """Return the figures before and after training, and their paired differences, as rows of a table of figures."""
    if diversity is None:
        return []
    found = [(field, name, getattr(diversity, field)) for field, name in _MEASURES]
    return [row for field, name, change in found if change is not None for row in _rows(field, name, change)]


def _rows(field: str, name: str, change: DiversityChange) -> list[tuple[str, str, str, str, str]]:
    sides = (("before", change.before), ("after", change.after), ("after minus before", change.change))
    return [_row(f"{name}, {side}", figure, f"policy.diversity.{field}") for side, figure in sides]


def _row(name: str, figure: Figure, field: str) -> tuple[str, str, str, str, str]:
    return (name, *cells(figure, as_percent=False), field)


def diversity_sentence(diversity: Diversity) -> str:
    """Return a sentence that says how the replies were compared."""
    start = f"One reply to each of {diversity.questions:,} questions. The figures depend on the number of questions."
    if diversity.embedder is None:
        return f"{start} Without an embedder there is no Vendi score."
    return f"{start} The Vendi score uses the embedder {diversity.embedder}."
