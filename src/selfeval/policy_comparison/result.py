"""The result of a comparison, and its rows of text for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from selfeval import __version__
from selfeval.policy_comparison.figures import GoldFigures, JudgeFigures, PairFigures
from selfeval.policy_comparison.sources import Questions
from selfeval.quality.statistics import Figure
from selfeval.report.figures import cells, describe_difference

__all__ = ["GOLD_HEADER", "PAIR_HEADER", "RANK_HEADER", "PolicyComparison", "gold_rows", "pair_rows", "rank_rows", "sentences"]

RANK_HEADER = ("policy", "rank", "strength (Elo)", "95% interval", "n")
PAIR_HEADER = ("win rate of", "against", "value", "95% interval", "n", "win/tie/loss", "at equal length", "difference")
GOLD_HEADER = ("right by gold", "value", "95% interval", "n")


@dataclass(frozen=True)
class PolicyComparison:
    """The result of `compare`.

    Attributes:
        policies: names of the policies.
        judge_run: run of the judges.
        questions: the questions, and how many were left out.
        judges: figures of each judge; the first one is the main one.
        agreement: Krippendorff's alpha of the outcomes of several judges; None for one judge.
        gold: correctness by gold; None without gold.
        notes: what a reader has to know about judges, questions and gold.
    """

    policies: tuple[str, ...]
    judge_run: str
    questions: Questions
    judges: tuple[JudgeFigures, ...]
    agreement: Figure | None
    gold: GoldFigures | None
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Return everything in the form of report.json; figures are objects of `value`, `ci_low`, `ci_high` and `n`."""
        asked = self.questions
        return {
            "policies": list(self.policies),
            "judge_run": self.judge_run,
            "questions": {
                "used": len(asked.used),
                "common": asked.common,
                "left_out_trained": asked.trained,
                "left_out_missing": asked.missing,
            },
            "judges": [figures.as_json() for figures in self.judges],
            "agreement": None if self.agreement is None else self.agreement.as_json(),
            "gold": None if self.gold is None else self.gold.as_json(),
            "notes": list(self.notes),
            "version": __version__,
        }


def rank_rows(judge: JudgeFigures) -> list[tuple[str, ...]]:
    """Return the ranking, a row per policy, as `RANK_HEADER` names the columns."""
    return [(place.name, place.ranks, *_points(place.strength)) for place in judge.ranking]


def pair_rows(judge: JudgeFigures) -> list[tuple[str, ...]]:
    """Return the pairs, a row per pair, as `PAIR_HEADER` names the columns."""
    return [
        (
            *(pair.first, pair.second, *cells(pair.win_rate)),
            *(f"{pair.win}/{pair.tie}/{pair.loss}", cells(pair.length_controlled)[0], _finding(pair)),
        )
        for pair in judge.pairs
    ]


def gold_rows(gold: GoldFigures) -> list[tuple[str, ...]]:
    """Return the accuracies, a row per policy, as `GOLD_HEADER` names the columns."""
    return [(name, *cells(figure)) for name, figure in gold.accuracy.items()]


def sentences(result: PolicyComparison) -> Iterator[str]:
    """Yield what the tables do not say: questions, unreadable verdicts, gold differences, agreement, and notes."""
    for judge in result.judges:
        if unreadable := sum(pair.unparsable for pair in judge.pairs):
            yield f"{judge.judge}: comparisons without a verdict, which are left out: {unreadable:,}"
    if result.gold is not None:
        for first, second, found in result.gold.pairs:
            yield f"right by gold, {first} minus {second}: {describe_difference(found)}"
    if result.agreement is not None:
        value, interval, n = cells(result.agreement, as_percent=False)
        yield f"Krippendorff's alpha of {', '.join(j.judge for j in result.judges)}: {value} ({interval}, n = {n} comparisons)"
    if len(result.policies) > 2:
        yield "each difference is tested at a level of 5%, without a correction for the number of pairs"
    for note in result.notes:
        yield f"note: {note}"


_FINDINGS = {"better": "better", "worse": "worse", "unclear": "not clear", "too_few": "too few questions"}


def _finding(pair: PairFigures) -> str:
    found = _FINDINGS[pair.comparison.finding]
    return found if pair.questions_needed is None else f"{found}; about {pair.questions_needed:,} questions needed"


def _points(figure: Figure) -> tuple[str, str, str]:
    """Return value, interval and n in whole Elo points."""
    if figure.value is None or figure.ci_low is None or figure.ci_high is None:
        return "not measured", "", str(figure.n)
    return f"{figure.value:+.0f}", f"{figure.ci_low:+.0f} to {figure.ci_high:+.0f}", str(figure.n)
