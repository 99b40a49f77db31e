"""The figures of a comparison of runs as rows of text: each run's figure, and the differences from the first run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from selfeval.evaluation.run_comparison import MEASURES, Contrast, Measure, contrast
from selfeval.quality.statistics import Figure
from selfeval.report.figures import cells, number, points, tested
from selfeval.view.compared_runs import ComparedRun

__all__ = ["DifferenceCell", "FigureRow", "figure_rows"]

_WORDS = {"unclear": "◇ no significant difference", "too_few": "◇ too few questions"}
_OPPOSITE = {"better": "worse", "worse": "better"}


@dataclass(frozen=True)
class DifferenceCell:
    """The difference of a run from the first one, as text.

    Attributes:
        value: the difference; empty if it is not measured.
        interval: its 95% interval.
        test: the test with its p-value and n, or that the samples are independent.
        word: whether a difference is shown.
        standing: colour class of the word.
    """

    value: str = ""
    interval: str = ""
    test: str = ""
    word: str = ""
    standing: str = ""


@dataclass(frozen=True)
class FigureRow:
    """A measure.

    Attributes:
        name: its name.
        figures: value, interval and n of each run.
        differences: differences of the runs after the first one.
    """

    name: str
    figures: tuple[tuple[str, str, str], ...]
    differences: tuple[DifferenceCell, ...]


def figure_rows(runs: Sequence[ComparedRun]) -> list[FigureRow]:
    """Return the rows of all measures that at least one run has."""
    rows = [_row(measure, runs) for measure in MEASURES]
    return [row for row in rows if any(n for _, _, n in row.figures)]


def _row(measure: Measure, runs: Sequence[ComparedRun]) -> FigureRow:
    first, *others = runs
    figures = tuple(cells(measure.figure(run.evidence), as_percent=measure.is_share) for run in runs)
    return FigureRow(measure.name, figures, tuple(_difference(measure, first, other) for other in others))


def _difference(measure: Measure, first: ComparedRun, other: ComparedRun) -> DifferenceCell:
    if measure.needs_gold and first.gold != other.gold:
        return DifferenceCell(word="◇ another gold")
    if measure.is_win_rate and first.referee != other.referee:
        return DifferenceCell(word="◇ another referee")
    found = contrast(measure, other.evidence, first.evidence)
    if found.difference.value is None:
        return DifferenceCell()
    word, standing = _finding(measure, found)
    return DifferenceCell(
        _amount(found.difference.known, measure), _interval(found.difference, measure), _test(found), word, standing
    )


def _finding(measure: Measure, found: Contrast) -> tuple[str, str]:
    """Return the finding in words, and its colour class."""
    if found.finding in _WORDS:
        return _WORDS[found.finding], "unclear"
    arrow = "▲" if found.finding == "better" else "▼"
    if measure.better is None:
        return f"{arrow} {'higher' if found.finding == 'better' else 'lower'}", "unclear"
    finding = found.finding if measure.better == "higher" else _OPPOSITE[found.finding]
    return f"{arrow} {finding}", finding


def _amount(difference: float, measure: Measure) -> str:
    sign = "+" if difference > 0 else ""
    return f"{sign}{points(difference) if measure.is_share else number(difference)}"


def _interval(figure: Figure, measure: Measure) -> str:
    if figure.ci_low is None or figure.ci_high is None:
        return "no interval"
    low, high = (_amount(end, measure).removeprefix("+").removesuffix(" points") for end in (figure.ci_low, figure.ci_high))
    return f"{low} to {high}"


def _test(found: Contrast) -> str:
    if found.paired is None:
        return f"independent samples, n = {found.theirs.n:,} and {found.ours.n:,}"
    text = f"paired, {tested(found.paired)}, n = {found.difference.n:,}"
    # No line break inside of `p = 0.25`.
    return text.replace(" = ", "\u00a0=\u00a0").replace(" < ", "\u00a0<\u00a0")
