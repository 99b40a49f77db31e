"""Paired comparisons on the same cases: the difference with its interval, an exact test, and a finding.

Two separate intervals do not show whether there is a difference on the same cases: they may overlap although the difference is
clear, and may be disjoint if there are few cases. A comparison has one unit per question: several pairs or replies to a
question are averaged first, because they are not independent. A difference is claimed if three conditions hold:

- at least `FEWEST` questions were compared;
- the exact two-sided test of wins against losses has p <= `LEVEL`;
- the interval of the difference excludes 0, on the same side.

`compare_independent` is for cases that are not the same: it has an interval, but no test.

Without a true difference, one is claimed in at most 5 % of draws, for any number of questions.

Shapes: N cases, U units (questions).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from selfeval.quality.statistics import Figure, mcnemar_exact, mean_figure, paired_difference, proportion

__all__ = [
    "FEWEST",
    "LEVEL",
    "Comparison",
    "Finding",
    "Test",
    "compare_independent",
    "compare_means",
    "compare_paired",
    "compare_with_level",
]

FEWEST = 6
"""Fewest questions for a claim: with five wins in five questions the exact test has p = 2 / 2^5 = 0.0625."""
LEVEL = 0.05
"""Significance level: the largest p-value at which a difference is claimed."""

Finding = Literal["better", "worse", "unclear", "too_few"]
Test = Literal["mcnemar_exact", "sign_exact", "binomial_exact"]


@dataclass(frozen=True)
class Comparison:
    """A paired difference.

    Attributes:
        difference: ours minus theirs; `n` counts questions.
        wins: number of questions on which ours is higher.
        losses: number of questions on which theirs is higher. The other questions are ties.
        p_value: p-value of the exact test that wins and losses are equally likely; None without questions.
        test: `mcnemar_exact` for binary credits on both sides, `binomial_exact` for binary credits against a level,
            `sign_exact` if there are half credits or several cases per question. All three are the same two-sided binomial
            test of wins against losses.
        finding: whether a difference can be claimed, by the rule in the module docstring.
    """

    difference: Figure
    wins: int
    losses: int
    p_value: float | None
    test: Test
    finding: Finding

    def as_json(self) -> dict[str, Any]:
        """Return {"difference", "wins", "losses", "p_value", "test", "finding"}, as report.json has it.

        Example:
            >>> compare_paired([1.0] * 3 + [0.5], [0.0] * 3 + [0.5]).as_json()["finding"]
            'too_few'
        """
        return {
            "difference": self.difference.as_json(),
            "wins": self.wins,
            "losses": self.losses,
            "p_value": None if self.p_value is None else float(f"{self.p_value:.6g}"),
            "test": self.test,
            "finding": self.finding,
        }


def compare_paired(ours: Sequence[float], theirs: Sequence[float], questions: Sequence[Hashable] | None = None) -> Comparison:
    """Compare two systems by their credits on the same cases, such as the correctness of evaluator and judge.

    difference   mean over questions of (ours − theirs), averaging the cases of each question
    interval     Newcombe's (`paired_difference`) for binary credits with one case per question; otherwise the adjusted
                 Student interval of `mean_figure` over questions, in [−1, 1]
    test         exact binomial test of wins against losses, `mcnemar_exact`

    Args:
        ours: [N], in [0, 1]: 1 for right, 0 for wrong, 0.5 for half a credit.
        theirs: [N], credits of the other system for the same cases in the same order.
        questions: [N], Optional. The question of each case. Default: every case is a separate question.

    Raises:
        ValueError: the lengths differ, or a credit is outside [0, 1].

    Example:
        >>> compare_paired([1.0] * 8 + [0.0] * 2, [0.0] * 8 + [1.0, 0.0]).p_value
        0.0390625
    """
    _check_credits(ours)
    _check_credits(theirs)
    if len(ours) != len(theirs):
        raise ValueError(f"paired credits need equal lengths, got {len(ours)} and {len(theirs)}")
    units = _units([a - b for a, b in zip(ours, theirs, strict=True)], questions)
    # One binary case per question: the sharper interval for paired shares applies.
    if _is_binary([*ours, *theirs]) and len(units) == len(ours):
        figure = paired_difference([b == 1 for b in theirs], [a == 1 for a in ours])
        return _comparison(units, figure, "mcnemar_exact")
    return _comparison(units, mean_figure(units, bounds=(-1.0, 1.0)), "sign_exact")


def compare_with_level(scores: Sequence[float], level: float = 0.5, questions: Sequence[Hashable] | None = None) -> Comparison:
    """Compare a mean credit with a fixed level, such as a win rate with one half, or an accuracy with chance level.

    Args:
        scores: [N], in [0, 1]: 1 for a win, 0 for a loss, 0.5 for a tie.
        level: the level of no difference, in (0, 1). The test of wins against losses is meaningful only at 0.5. Default: 0.5.
        questions: [N], Optional. The question of each case. Default: every case is a separate question.

    Returns:
        Mean score minus the level. Interval: Wilson's for binary scores with one case per question; otherwise the adjusted
        Student interval of `mean_figure` over questions.

    Raises:
        ValueError: a score is outside [0, 1].

    Example:
        >>> compare_with_level([1.0] * 9 + [0.0]).finding
        'better'
    """
    _check_credits(scores)
    units = _units([score - level for score in scores], questions)
    if _is_binary(scores) and len(units) == len(scores):
        share = proportion([score == 1 for score in scores])
        return _comparison(units, _less(share, level), "binomial_exact")
    return _comparison(units, mean_figure(units, bounds=(-level, 1 - level)), "sign_exact")


def compare_means(ours: Sequence[float], theirs: Sequence[float]) -> Comparison:
    """Compare two systems by an unbounded quantity on the same questions, such as the KL or the length of replies.

    difference   mean of (ours − theirs)
    interval     Student's, without bounds (`mean_figure`)
    test         exact binomial test of the questions on which ours is higher against those on which it is lower

    Args:
        ours: [N], finite, one value per question.
        theirs: [N], values of the other system for the same questions in the same order.

    Raises:
        ValueError: the lengths differ, or a value is not finite.

    Example:
        >>> compare_means([3.0, 5.0, 4.0], [1.0, 2.0, 3.0]).difference.value
        2.0
    """
    if len(ours) != len(theirs):
        raise ValueError(f"paired values need equal lengths, got {len(ours)} and {len(theirs)}")
    units = [a - b for a, b in zip(ours, theirs, strict=True)]
    return _comparison(units, mean_figure(units, bounds=None), "sign_exact")


def compare_independent(ours: Figure, theirs: Figure) -> Figure:
    """Return the difference of two figures of independent cases, such as accuracies on different questions.

    d = x − y,   [d − √((x − x_low)² + (y_high − y)²),  d + √((x_high − x)² + (y − y_low)²)]

    Method 10 of Newcombe 1998 (Statistics in Medicine 17, pages 873 to 890) for shares with Wilson's intervals; Zou and Donner
    2008 (https://doi.org/10.1002/sim.3095) derive it for other intervals. Where the cases are the same, `compare_paired` has a
    sharper interval.

    Args:
        ours: a figure, with its 95 % interval.
        theirs: the figure of the other system, from other cases.

    Returns:
        Ours minus theirs; `n` counts the cases of both. None if a value is undefined; no interval if one of them has none.

    Example:
        >>> compare_independent(proportion([True] * 56 + [False] * 14), proportion([True] * 48 + [False] * 32)).as_json()
        {'value': 0.2, 'ci_low': 0.052432, 'ci_high': 0.333871, 'n': 150}
    """
    n = ours.n + theirs.n
    if ours.value is None or theirs.value is None:
        return Figure(None, None, None, n)
    x, y, difference = ours.value, theirs.value, ours.value - theirs.value
    ends = (ours.ci_low, ours.ci_high, theirs.ci_low, theirs.ci_high)
    if None in ends:
        return Figure(difference, None, None, n)
    x_low, x_high, y_low, y_high = (float(end or 0.0) for end in ends)
    low = difference - math.hypot(x - x_low, y_high - y)
    return Figure(difference, low, difference + math.hypot(x_high - x, y - y_low), n)


def _comparison(units: Sequence[float], difference: Figure, test: Test) -> Comparison:
    wins, losses = sum(unit > 0 for unit in units), sum(unit < 0 for unit in units)
    p_value = mcnemar_exact(wins, losses) if units else None
    return Comparison(difference, wins, losses, p_value, test, _finding(difference, wins, losses, p_value))


def _finding(difference: Figure, wins: int, losses: int, p_value: float | None) -> Finding:
    low, high = difference.ci_low, difference.ci_high
    if difference.n < FEWEST or p_value is None or low is None or high is None:
        return "too_few"
    if p_value > LEVEL or low <= 0 <= high:
        return "unclear"
    # Interval and test may disagree on the side if a few large differences outweigh many small ones.
    if low > 0:
        return "better" if wins > losses else "unclear"
    return "worse" if losses > wins else "unclear"


def _units(differences: Sequence[float], questions: Sequence[Hashable] | None) -> list[float]:
    """Return the mean difference of each question."""
    if questions is None:
        return list(differences)
    if len(questions) != len(differences):
        raise ValueError(
            f"cases and questions must have equal lengths, got {len(differences)} cases and {len(questions)} questions"
        )
    by_question: dict[Hashable, list[float]] = defaultdict(list)
    for question, difference in zip(questions, differences, strict=True):
        by_question[question].append(difference)
    return [fmean(values) for values in by_question.values()]


def _check_credits(credits: Sequence[float]) -> None:
    outside = [credit for credit in credits if not 0 <= credit <= 1]
    if outside:
        raise ValueError(f"credits must be in [0, 1], got {outside[:5]}")


def _is_binary(credits: Sequence[float]) -> bool:
    return all(credit in (0, 1) for credit in credits)


def _less(figure: Figure, level: float) -> Figure:
    if figure.value is None or figure.ci_low is None or figure.ci_high is None:
        return figure
    return Figure(figure.value - level, figure.ci_low - level, figure.ci_high - level, figure.n)
