"""The figures of a comparison of policies: pure functions of outcomes and lengths.

Shapes: K policies, Q questions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from selfeval.evaluation.policy import CREDITS, Outcome
from selfeval.quality.bradley_terry import Game, bradley_terry
from selfeval.quality.comparisons import Comparison, compare_paired, compare_with_level
from selfeval.quality.label_agreement import krippendorff_alpha
from selfeval.quality.length_control import length_controlled_win_rate
from selfeval.quality.power import questions_needed
from selfeval.quality.statistics import Figure, mean_figure, proportion

__all__ = ["GoldFigures", "JudgeFigures", "Pair", "PairFigures", "Place", "agreement", "measure_gold", "measure_judge"]

Pair = tuple[int, int]
"""Numbers of two policies, the lower one first."""


@dataclass(frozen=True)
class PairFigures:
    """Two policies compared by one judge.

    Attributes:
        first, second: names of the policies; the figures are those of the first.
        win, tie, loss, unparsable: number of questions by outcome.
        win_rate: wins plus half the ties, over questions with a verdict.
        length_controlled: win rate at equal length, by characters.
        comparison: win rate minus one half, its exact test, and whether a difference can be claimed.
        questions_needed: number of questions at which the measured difference would be claimed with 80 % power; None if it is
            claimed already, or if no difference was measured.
    """

    first: str
    second: str
    win: int
    tie: int
    loss: int
    unparsable: int
    win_rate: Figure
    length_controlled: Figure
    comparison: Comparison
    questions_needed: int | None

    def as_json(self) -> dict[str, Any]:
        """Return the figures in the form of report.json."""
        return {
            "first": self.first,
            "second": self.second,
            "win": self.win,
            "tie": self.tie,
            "loss": self.loss,
            "unparsable": self.unparsable,
            "win_rate": self.win_rate.as_json(),
            "length_controlled": self.length_controlled.as_json(),
            "comparison": self.comparison.as_json(),
            "questions_needed": self.questions_needed,
        }


@dataclass(frozen=True)
class Place:
    """The place of a policy in the ranking of one judge.

    Attributes:
        name: name of the policy.
        strength: Bradley-Terry strength on the Elo scale, with mean 0.
        best, worst: best and worst rank that the comparisons allow: 1 plus the number of policies that are shown to be better,
            and K minus the number that are shown to be worse. Policies whose ranks overlap are tied.
    """

    name: str
    strength: Figure
    best: int
    worst: int

    @property
    def ranks(self) -> str:
        """Ranks as text.

        Example:
            >>> Place("a", Figure(None, None, None, 0), 1, 2).ranks
            '1-2'
        """
        return str(self.best) if self.best == self.worst else f"{self.best}-{self.worst}"

    def as_json(self) -> dict[str, Any]:
        """Return the place in the form of report.json."""
        return {"name": self.name, "strength": self.strength.as_json(), "best_rank": self.best, "worst_rank": self.worst}


@dataclass(frozen=True)
class JudgeFigures:
    """The figures of one judge.

    Attributes:
        judge: name of the judge.
        ranking: the policies, strongest first.
        pairs: every pair of policies, in the order of the policies.
    """

    judge: str
    ranking: tuple[Place, ...]
    pairs: tuple[PairFigures, ...]

    def as_json(self) -> dict[str, Any]:
        """Return the figures in the form of report.json."""
        return {
            "judge": self.judge,
            "ranking": [place.as_json() for place in self.ranking],
            "pairs": [pair.as_json() for pair in self.pairs],
        }


@dataclass(frozen=True)
class GoldFigures:
    """Correctness by gold.

    Attributes:
        accuracy: share of right replies of each policy, by name.
        pairs: first and second policy, and the paired difference of their correctness, first minus second.
    """

    accuracy: Mapping[str, Figure]
    pairs: tuple[tuple[str, str, Comparison], ...]

    def as_json(self) -> dict[str, Any]:
        """Return the figures in the form of report.json."""
        return {
            "accuracy": {name: figure.as_json() for name, figure in self.accuracy.items()},
            "pairs": [{"first": a, "second": b, "difference": found.as_json()} for a, b, found in self.pairs],
        }


def measure_judge(
    judge: str, names: Sequence[str], outcomes: Mapping[Pair, Sequence[Outcome]], lengths: Sequence[Sequence[int]]
) -> JudgeFigures:
    """Compute the figures of one judge.

    Args:
        judge: name of the judge.
        names: [K], the policies.
        outcomes: [Q] outcomes of every pair of policies, for the first.
        lengths: [K, Q], characters of each reply.
    """
    pairs = {pair: _pair(names, pair, found, lengths) for pair, found in outcomes.items()}
    games = [
        Game(question, *pair, CREDITS[found])
        for pair, row in outcomes.items()
        for question, found in enumerate(row)
        if found != "unparsable"
    ]
    return JudgeFigures(judge, _ranking(names, pairs, bradley_terry(games, len(names))), tuple(pairs.values()))


def _pair(names: Sequence[str], pair: Pair, outcomes: Sequence[Outcome], lengths: Sequence[Sequence[int]]) -> PairFigures:
    # Unparsable comparisons are left out rather than counted as ties, as in the report of a run.
    decided = [question for question, found in enumerate(outcomes) if found != "unparsable"]
    scores = [CREDITS[outcomes[question]] for question in decided]
    longer = [float(lengths[pair[0]][question] - lengths[pair[1]][question]) for question in decided]
    counts, comparison = Counter(outcomes), compare_with_level(scores)
    open_ = comparison.finding in ("unclear", "too_few")
    return PairFigures(
        first=names[pair[0]],
        second=names[pair[1]],
        win=counts["win"],
        tie=counts["tie"],
        loss=counts["loss"],
        unparsable=counts["unparsable"],
        win_rate=mean_figure(scores),
        length_controlled=length_controlled_win_rate(scores, longer),
        comparison=comparison,
        questions_needed=questions_needed([2 * score - 1 for score in scores]) if open_ else None,
    )


def _ranking(names: Sequence[str], pairs: Mapping[Pair, PairFigures], strengths: Sequence[Figure]) -> tuple[Place, ...]:
    better, worse = Counter[int](), Counter[int]()
    for (first, second), figures in pairs.items():
        finding = figures.comparison.finding
        if finding in ("better", "worse"):
            winner, loser = (first, second) if finding == "better" else (second, first)
            better[loser] += 1
            worse[winner] += 1
    places = [
        Place(name, strength, 1 + better[number], len(names) - worse[number])
        for number, (name, strength) in enumerate(zip(names, strengths, strict=True))
    ]
    # The order of the command line where a strength is undefined.
    return tuple(sorted(places, key=lambda place: -(place.strength.value or 0.0)))


def measure_gold(names: Sequence[str], right: Sequence[Sequence[bool | None]]) -> GoldFigures:
    """Compute accuracies, and paired differences on the questions whose both replies gold can judge.

    Args:
        names: [K], the policies.
        right: [K, Q], whether each reply is right; None if gold does not know the question.
    """
    accuracy = {name: proportion([one for one in row if one is not None]) for name, row in zip(names, right, strict=True)}
    pairs = []
    for first in range(len(names)):
        for second in range(first + 1, len(names)):
            known = [(a, b) for a, b in zip(right[first], right[second], strict=True) if a is not None and b is not None]
            found = compare_paired([float(a) for a, _ in known], [float(b) for _, b in known])
            pairs.append((names[first], names[second], found))
    return GoldFigures(accuracy, tuple(pairs))


def agreement(judges: Sequence[Mapping[Pair, Sequence[Outcome]]]) -> Figure | None:
    """Return Krippendorff's alpha of the outcomes of several judges; None for fewer than two.

    Args:
        judges: outcomes of the same pairs and questions by each judge. An unparsable one is a missing label.
    """
    if len(judges) < 2:
        return None
    columns = [[found for row in judge.values() for found in row] for judge in judges]
    return krippendorff_alpha(
        [[None if label == "unparsable" else label for label in case] for case in zip(*columns, strict=True)]
    )
