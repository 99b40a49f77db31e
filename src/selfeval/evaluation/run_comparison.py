"""Compare two runs on their test questions: policies, evaluators and lengths, with the interval of every difference.

Two runs share a question if its texts are equal. On shared questions the difference is paired, one unit per question: several
pairs to a question are averaged first. A question that one of the runs was trained on is left out. If too few are shared, the
difference is that of independent samples, with a wider interval and without a test.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from selfeval.evaluation.policy import CREDITS
from selfeval.quality.comparisons import FEWEST, Comparison, Finding, compare_independent, compare_means, compare_paired
from selfeval.quality.statistics import Figure, mean_figure, proportion
from selfeval.records import ComparedReplies, ScoredPair, VerdictState

__all__ = ["MEASURES", "Contrast", "Measure", "RunEvidence", "contrast", "shared_questions"]

_ENOUGH = 0.5
"""Smallest share of the smaller run's test questions that have to be shared. With fewer, leaving out the others costs more than
the pairing gains."""

Case = tuple[str, float]
"""Question id and value."""


@dataclass(frozen=True)
class RunEvidence:
    """The results of a run on its test questions.

    Attributes:
        questions: texts of its test questions, by id.
        trained: texts of all questions that it was trained on.
        compared: replies before and after training.
        scored: judged pairs with the evaluator's margins.
    """

    questions: Mapping[str, str]
    trained: frozenset[str]
    compared: Sequence[ComparedReplies]
    scored: Sequence[ScoredPair]


@dataclass(frozen=True)
class Measure:
    """A quantity in which runs are compared.

    Attributes:
        name: its name.
        cases: returns its values in a run, with their questions.
        better: `higher`, `lower`, or None if neither is.
        is_share: whether it is between 0 and 1.
        needs_gold: whether it is decided by gold.
        is_win_rate: whether it is decided by the referee.
    """

    name: str
    cases: Callable[[RunEvidence], Iterator[Case]]
    better: Literal["higher", "lower"] | None = "higher"
    is_share: bool = True
    needs_gold: bool = False
    is_win_rate: bool = False

    def figure(self, run: RunEvidence) -> Figure:
        """Return the figure of a run, as its report has it."""
        values = [value for _, value in self.cases(run)]
        if not self.is_share:
            return mean_figure(values, bounds=None)
        if all(value in (0.0, 1.0) for value in values):
            return proportion([value == 1.0 for value in values])
        return mean_figure(values)


def _gold(after: bool) -> Callable[[RunEvidence], Iterator[Case]]:
    def cases(run: RunEvidence) -> Iterator[Case]:
        for row in run.compared:
            right = row.gold_after if after else row.gold_before
            if right is not None:
                yield row.question_id, float(right)

    return cases


def _wins(run: RunEvidence) -> Iterator[Case]:
    credits: Mapping[str, float] = {str(outcome): credit for outcome, credit in CREDITS.items()}
    for row in run.compared:
        if row.outcome in credits:  # an unparsable comparison has no credit
            yield row.question_id, credits[row.outcome]


def _picks_gold(run: RunEvidence) -> Iterator[Case]:
    for row in run.scored:
        if row.gold_first is not None and row.gold_second is not None and row.gold_first != row.gold_second:
            yield row.question_id, float(row.margin != 0 and (row.margin > 0) == row.gold_first)


def _picks_judge(run: RunEvidence) -> Iterator[Case]:
    for row in run.scored:
        if row.state == VerdictState.KEPT and row.probability not in (None, 0.5):
            yield row.question_id, float(row.margin != 0 and (row.margin > 0) == ((row.probability or 0.0) > 0.5))


def _of_replies(value: Callable[[ComparedReplies], float]) -> Callable[[RunEvidence], Iterator[Case]]:
    return lambda run: ((row.question_id, value(row)) for row in run.compared)


MEASURES = (
    Measure("Gold accuracy of the policy", _gold(after=True), needs_gold=True),
    Measure("Gold accuracy before training", _gold(after=False), needs_gold=True),
    Measure("Win rate over the run's own start", _wins, is_win_rate=True),
    Measure("Evaluator accuracy, gold labels", _picks_gold, needs_gold=True),
    Measure("Evaluator accuracy, the judge's labels", _picks_judge),
    Measure("Replies cut off at the token limit", _of_replies(lambda row: float(not row.finished_after)), better="lower"),
    Measure("Reply length, tokens", _of_replies(lambda row: float(row.tokens_after)), better=None, is_share=False),
    Measure("KL to the run's own start, nats per reply", _of_replies(lambda row: row.kl), better=None, is_share=False),
)
"""All measures, in the order of the page."""


@dataclass(frozen=True)
class Contrast:
    """The difference of a measure between two runs.

    Attributes:
        ours, theirs: figures of both runs, on all their test questions.
        difference: ours minus theirs.
        paired: the paired comparison; None if the questions are not the same.
        finding: whether a difference can be claimed; `better` means that ours is higher.
    """

    ours: Figure
    theirs: Figure
    difference: Figure
    paired: Comparison | None
    finding: Finding


def contrast(measure: Measure, ours: RunEvidence, theirs: RunEvidence) -> Contrast:
    """Compare two runs in one measure: paired if they share enough questions, otherwise as independent samples."""
    figures = measure.figure(ours), measure.figure(theirs)
    a, b = _by_question(measure, ours), _by_question(measure, theirs)
    shared = [text for text in shared_questions(ours, theirs) if text in a and text in b]
    if len(shared) < max(FEWEST, _ENOUGH * min(len(a), len(b))):
        difference = compare_independent(*figures)
        return Contrast(*figures, difference, None, _finding(*figures, difference))
    compare = compare_paired if measure.is_share else compare_means
    found = compare([a[text] for text in shared], [b[text] for text in shared])
    return Contrast(*figures, found.difference, found, found.finding)


def shared_questions(ours: RunEvidence, theirs: RunEvidence) -> list[str]:
    """Return the texts of the test questions of both runs that neither was trained on, in the order of ours."""
    known, trained = set(theirs.questions.values()), ours.trained | theirs.trained
    return [text for text in dict.fromkeys(ours.questions.values()) if text in known and text not in trained]


def _by_question(measure: Measure, run: RunEvidence) -> dict[str, float]:
    """Return the mean value of each question of a run, by its text."""
    found: dict[str, list[float]] = defaultdict(list)
    for question, value in measure.cases(run):
        if question in run.questions:
            found[run.questions[question]].append(value)
    return {text: fmean(values) for text, values in found.items()}


def _finding(ours: Figure, theirs: Figure, difference: Figure) -> Finding:
    low, high = difference.ci_low, difference.ci_high
    if min(ours.n, theirs.n) < FEWEST or low is None or high is None:
        return "too_few"
    return "better" if low > 0 else "worse" if high < 0 else "unclear"
