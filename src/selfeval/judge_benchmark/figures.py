"""The figures of a judge on labelled pairs, beside those of trivial rules on the same pairs. Pure functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from selfeval.judge_benchmark.pairs import Label, LabelledPair
from selfeval.judging.choices import is_consistent
from selfeval.quality.calibration import aurc
from selfeval.quality.comparisons import Comparison, compare_paired, compare_with_level
from selfeval.quality.label_agreement import credit_of
from selfeval.quality.statistics import Figure, clustered_mean, mean_figure, proportion
from selfeval.records import Verdict, VerdictState

__all__ = [
    "BASELINES",
    "COVERAGES",
    "Case",
    "Measured",
    "Scores",
    "choice_of",
    "length_of",
    "measure",
    "share",
]

COVERAGES = (0.25, 0.5, 0.75, 1.0)
"""Coverages at which the accuracy is reported."""


@dataclass(frozen=True)
class Case:
    """A labelled pair and what the judge made of it.

    Attributes:
        pair: the pair.
        verdict: the verdict; `first` is the pair's.
        logprobs: mean log-prob per token of each reply under the base; None if it was not computed.
    """

    pair: LabelledPair
    verdict: Verdict
    logprobs: tuple[float | None, float | None] = (None, None)


@dataclass(frozen=True)
class Scores:
    """The figures of a set of pairs for which people prefer one reply.

    Attributes:
        agreement: share of pairs on which the judge, forced to choose, prefers the reply that people prefer. No preference and
            no verdict count one half, as for the baselines.
        coverage: share of pairs with a verdict at the chosen confidence.
        agreement_kept: agreement on these.
        unparsable: share of pairs without a readable verdict.
        swap_consistency: share of pairs on which both orders choose the same, among those whose orders could be read.
    """

    agreement: Figure
    coverage: Figure
    agreement_kept: Figure
    unparsable: Figure
    swap_consistency: Figure

    def as_json(self) -> dict[str, Any]:
        """Return the figures by name, in the form of report.json."""
        return {name: figure.as_json() for name, figure in vars(self).items()}


@dataclass(frozen=True)
class Measured:
    """All figures of a judge on a data set.

    Attributes:
        pairs: number of pairs that were judged.
        ties: of which people call a tie.
        scores: on all pairs for which people prefer one reply.
        subsets: the same by subset.
        at_coverage: coverage, and agreement among the pairs with the highest confidence; no interval for dependent pairs.
        aurc: area under the risk-coverage curve.
        baselines: agreement of each rule; see `BASELINES`.
        comparisons: judge minus each baseline on the same pairs, and minus chance level.
        with_ties: share of pairs with equal labels among `first`, `second` and `tie`; None if no pair is a tie.
        annotators: agreement of one annotator with another, with ties; None with one annotator. Pairs without a majority are
            left out, as for the judge.
        with_annotators: agreement of the judge with one annotator, with ties; None with one annotator.
    """

    pairs: int
    ties: int
    scores: Scores
    subsets: dict[str, Scores]
    at_coverage: list[tuple[float, Figure]]
    aurc: float | None
    baselines: dict[str, Figure]
    comparisons: dict[str, Comparison]
    with_ties: Figure | None
    annotators: Figure | None
    with_annotators: Figure | None

    def as_json(self) -> dict[str, Any]:
        """Return all figures, in the form of report.json."""
        return {
            "pairs": self.pairs,
            "ties": self.ties,
            **self.scores.as_json(),
            "subsets": {name: scores.as_json() for name, scores in self.subsets.items()},
            "at_coverage": [{"coverage": coverage, "agreement": figure.as_json()} for coverage, figure in self.at_coverage],
            "aurc": None if self.aurc is None else round(self.aurc, 6),
            "baselines": {name: figure.as_json() for name, figure in self.baselines.items()},
            "comparisons": {name: comparison.as_json() for name, comparison in self.comparisons.items()},
            "with_ties": _optional(self.with_ties),
            "annotators": _optional(self.annotators),
            "with_annotators": _optional(self.with_annotators),
        }


def _optional(figure: Figure | None) -> dict[str, float | int | None] | None:
    return None if figure is None else figure.as_json()


# -- one pair -----------------------------------------------------------------------------------------------------------


def choice_of(verdict: Verdict) -> Label | None:
    """Return the judge's label: its preferred reply, or `tie` if it calls one or prefers neither; None without a verdict."""
    if verdict.probability is None:
        return None
    if verdict.state == VerdictState.TIE or verdict.probability == 0.5:
        return "tie"
    return "first" if verdict.probability > 0.5 else "second"


def length_of(pair: LabelledPair) -> int:
    """Return how many characters the first reply is longer than the second."""
    return len(pair.first) - len(pair.second)


def _preference_of_judge(case: Case) -> float:
    return 0.0 if case.verdict.probability is None else case.verdict.probability - 0.5


def _preference_of_logprob(case: Case) -> float:
    first, second = case.logprobs
    return 0.0 if first is None or second is None else first - second


BASELINES: dict[str, Callable[[Case], float]] = {
    "longer": lambda case: length_of(case.pair),
    "first": lambda case: 1.0,
    "mean_logprob": _preference_of_logprob,
}
"""Rules that read no question: the longer reply in characters, the first, the one with the higher mean log-prob per token."""


# -- all pairs ----------------------------------------------------------------------------------------------------------


def measure(cases: Sequence[Case]) -> Measured:
    """Measure a judge on labelled pairs.

    Pairs of the same question are dependent: intervals are then clustered by question (`clustered_mean`), and their `n` counts
    questions; otherwise shares have Wilson's interval. Comparisons have one unit per question (`compare_paired`).

    Args:
        cases: pairs with a label of the majority, and the judge's verdicts.
    """
    decided = [case for case in cases if case.pair.label != "tie"]
    credits, questions = _credits(decided, _preference_of_judge), _questions(decided)
    theirs = {name: _credits(decided, rule) for name, rule in BASELINES.items()}
    has_ties = len(decided) < len(cases)
    several = any(len(case.pair.labels) > 1 for case in cases)
    return Measured(
        pairs=len(cases),
        ties=len(cases) - len(decided),
        scores=_scores(decided),
        subsets={name: _scores([c for c in decided if c.pair.subset == name]) for name in _subsets(decided)},
        at_coverage=_at_coverage(decided),
        aurc=aurc(*_confidences(decided)),
        baselines={name: share(values, questions) for name, values in theirs.items()},
        comparisons={
            **{name: compare_paired(credits, values, questions) for name, values in theirs.items()},
            "chance": compare_with_level(credits, 0.5, questions),
        },
        with_ties=share([float(choice_of(c.verdict) == c.pair.label) for c in cases], _questions(cases)) if has_ties else None,
        annotators=_mean_of(cases, _annotators_agree) if several else None,
        with_annotators=_mean_of(cases, _judge_agrees) if several else None,
    )


def share(values: Sequence[float], questions: Sequence[str]) -> Figure:
    """Return the mean of credits in [0, 1], with an interval that is clustered by question if questions repeat."""
    if len(set(questions)) < len(questions):
        return clustered_mean(values, questions)
    if all(value in (0, 1) for value in values):
        return proportion([value == 1 for value in values])
    return mean_figure(values)


def _subsets(cases: Sequence[Case]) -> list[str]:
    names = sorted({case.pair.subset for case in cases})
    return names if len(names) > 1 else []


def _credits(cases: Sequence[Case], rule: Callable[[Case], float]) -> list[float]:
    return [credit_of(rule(case), case.pair.label) for case in cases]


def _questions(cases: Sequence[Case]) -> list[str]:
    return [case.pair.question for case in cases]


def _scores(cases: Sequence[Case]) -> Scores:
    kept = [case for case in cases if case.verdict.state == VerdictState.KEPT]
    consistent = [(case, found) for case in cases if (found := is_consistent(case.verdict)) is not None]
    return Scores(
        agreement=share(_credits(cases, _preference_of_judge), _questions(cases)),
        coverage=share([float(case.verdict.state == VerdictState.KEPT) for case in cases], _questions(cases)),
        agreement_kept=share(_credits(kept, _preference_of_judge), _questions(kept)),
        unparsable=share([float(case.verdict.probability is None) for case in cases], _questions(cases)),
        swap_consistency=share([float(found) for _, found in consistent], _questions([case for case, _ in consistent])),
    )


def _confidences(cases: Sequence[Case]) -> tuple[list[float], list[float]]:
    return [case.verdict.confidence for case in cases], _credits(cases, _preference_of_judge)


def _at_coverage(cases: Sequence[Case]) -> list[tuple[float, Figure]]:
    ranked = sorted(cases, key=lambda case: -case.verdict.confidence)
    counts = [-(-round(100 * coverage) * len(ranked) // 100) for coverage in COVERAGES]
    top = [ranked[:count] for count in counts]
    return [
        (coverage, share(_credits(group, _preference_of_judge), _questions(group)))
        for coverage, group in zip(COVERAGES, top, strict=True)
    ]


# -- annotators ---------------------------------------------------------------------------------------------------------


def _mean_of(cases: Sequence[Case], outcomes: Callable[[Case], Iterator[bool]]) -> Figure:
    """Return the mean over all outcomes of the cases, clustered by question."""
    found = [(float(outcome), case.pair.question) for case in cases for outcome in outcomes(case)]
    return clustered_mean([value for value, _ in found], [question for _, question in found])


def _annotators_agree(case: Case) -> Iterator[bool]:
    return (one == other for one, other in combinations(case.pair.labels, 2))


def _judge_agrees(case: Case) -> Iterator[bool]:
    return (choice_of(case.verdict) == label for label in case.pair.labels)
