"""How far the evaluator and the judge agree with people, estimated from labels for all judged test pairs.

Conventions: several raters count by their majority. Agreement is measured on the pairs for which people prefer one reply; an
evaluator or a judge that prefers neither counts one half. Ties count in kappa only. A skipped pair has no label.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from selfeval.labelling.pairs import CurrentLabels, LabelPair, choice_on, people_choice
from selfeval.labelling.queue import UNIFORM, Draw
from selfeval.labelling.weights import Share, draw_probabilities, labels_to_halve, lure_weights, weighted_share
from selfeval.quality.label_agreement import cohen_kappa, credit_of, krippendorff_alpha
from selfeval.quality.statistics import Figure
from selfeval.records import LabelChoice, VerdictState

__all__ = ["Agreement", "Answered", "answered_pairs", "measure_agreement"]


@dataclass(frozen=True)
class Agreement:
    """Agreement of the labels of people with all judged test pairs. A figure's `n` counts questions, except that of `kappa`.

    Attributes:
        pairs: number of judged test pairs, which the figures are about.
        labelled: number of pairs with a label of at least one person.
        decided: of which people prefer one reply.
        ties: of which people call a tie.
        skipped: number of pairs that every person who saw them skipped.
        raters: number of labels of each person, without skipped pairs.
        evaluator: share of the pairs on which the evaluator prefers the reply that people prefer.
        judge: the same for the judge, on the pairs with a readable verdict.
        judge_kept: the same, on the pairs whose verdict was kept.
        kappa: agreement between people on `first`, `second` and `tie`: Cohen's kappa for two of them, Krippendorff's alpha for
            more, on the pairs that several labelled; None for a single person.
        more_labels: number of further pairs that halve the width of the evaluator's interval; None without a decided pair.
        unused: labels of texts that are not in the run any more, of an earlier queue, or after a pair that nobody answered.
    """

    pairs: int
    labelled: int
    decided: int
    ties: int
    skipped: int
    raters: Mapping[str, int]
    evaluator: Figure
    judge: Figure
    judge_kept: Figure
    kappa: Figure | None
    more_labels: int | None
    unused: int

    def as_json(self) -> dict[str, Any]:
        """Return all values in the form of report.json."""
        return {name: value.as_json() if isinstance(value, Figure) else value for name, value in vars(self).items()}


@dataclass(frozen=True)
class Answered:
    """A pair that someone labelled or skipped.

    Attributes:
        draw: the pair at its place in the queue.
        choice: people's majority in the order of the pair; None without one.
        weight: its LURE weight for the mean over all pairs.
    """

    draw: Draw
    choice: LabelChoice | None
    weight: float

    @property
    def is_decided(self) -> bool:
        """Whether people prefer one reply."""
        return self.choice in (LabelChoice.FIRST, LabelChoice.SECOND)


def answered_pairs(queue: Sequence[Draw], labels: CurrentLabels) -> list[Answered]:
    """Return the labelled and skipped pairs in the order of the queue, with their weights.

    Pairs after the first one that nobody answered (taken back, for example) are left out: the probability of each draw is known
    only given all earlier draws.

    Args:
        queue: all pairs in the order of the draws.
        labels: current labels by pair, given in this order.
    """
    answered = list(takewhile(lambda draw: draw.pair.key in labels, queue))
    if not answered:
        return []
    q_N = draw_probabilities([draw.weight for draw in queue], UNIFORM)
    weights = lure_weights(q_N[: len(answered)].tolist(), q_N.size).tolist()
    return [
        Answered(draw, people_choice(draw.pair, labels[draw.pair.key]), weight)
        for draw, weight in zip(answered, weights, strict=True)
    ]


def measure_agreement(queue: Sequence[Draw], labels: CurrentLabels, given: int | None = None) -> Agreement:
    """Estimate the agreement with people over all pairs of a queue.

    Args:
        queue: all pairs in the order of the draws.
        labels: current labels by pair, given in this order.
        given: Optional. Number of current labels, used or not. Default: that of `labels`.
    """
    given = sum(map(len, labels.values())) if given is None else given
    answered = answered_pairs(queue, labels)
    labels = {pair.draw.pair.key: labels[pair.draw.pair.key] for pair in answered}
    by_choice = Counter(pair.choice for pair in answered)
    labelled = [pair for pair in answered if _is_labelled(pair, labels)]
    raters = _raters(labels)
    evaluator = _share(answered, _evaluator_preference)
    return Agreement(
        pairs=len(queue),
        labelled=len(labelled),
        decided=by_choice[LabelChoice.FIRST] + by_choice[LabelChoice.SECOND],
        ties=by_choice[LabelChoice.TIE],
        skipped=len(answered) - len(labelled),
        raters=raters,
        evaluator=evaluator.figure,
        judge=_share([p for p in answered if p.draw.pair.probability is not None], _judge_preference).figure,
        judge_kept=_share([p for p in answered if p.draw.pair.state == VerdictState.KEPT], _judge_preference).figure,
        kappa=_kappa([pair.draw.pair for pair in answered], labels) if len(raters) > 1 else None,
        more_labels=labels_to_halve(evaluator, len(labelled)),
        unused=given - sum(map(len, labels.values())),
    )


def _is_labelled(pair: Answered, labels: CurrentLabels) -> bool:
    return any(label.choice != LabelChoice.SKIP for label in labels[pair.draw.pair.key])


def _raters(labels: CurrentLabels) -> dict[str, int]:
    given = [label for on_pair in labels.values() for label in on_pair if label.choice != LabelChoice.SKIP]
    return dict(sorted(Counter(label.rater for label in given).items()))


def _share(answered: Sequence[Answered], preference: Callable[[LabelPair], float]) -> Share:
    decided = [pair for pair in answered if pair.is_decided]
    return weighted_share(
        [credit_of(preference(pair.draw.pair), pair.choice) for pair in decided],
        [pair.weight for pair in decided],
        [pair.draw.pair.question_id for pair in decided],
    )


def _evaluator_preference(pair: LabelPair) -> float:
    return pair.margin or 0.0


def _judge_preference(pair: LabelPair) -> float:
    return 0.0 if pair.probability is None else pair.probability - 0.5


def _kappa(pairs: Sequence[LabelPair], labels: CurrentLabels) -> Figure:
    rows = [_row(pair, labels) for pair in pairs]
    names = sorted({name for row in rows for name in row})
    if len(names) > 2:
        return krippendorff_alpha([[row.get(name) for name in names] for row in rows])
    both = [row for row in rows if len(row) == 2]
    return cohen_kappa([row[names[0]] for row in both], [row[names[1]] for row in both])


def _row(pair: LabelPair, labels: CurrentLabels) -> dict[str, LabelChoice]:
    """Return the label of each rater in the order of the pair, without skips."""
    found = {label.rater: choice_on(pair, label) for label in labels[pair.key]}
    return {rater: choice for rater, choice in found.items() if choice != LabelChoice.SKIP}
