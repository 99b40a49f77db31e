"""Pairs of replies that people label, and the people's majority on each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from selfeval.quality.label_agreement import majority
from selfeval.records import Label, LabelChoice, ScoredPair, Verdict, VerdictState
from selfeval.store import fingerprint

__all__ = [
    "CurrentLabels",
    "LabelPair",
    "PairKey",
    "choice_on",
    "current_labels",
    "key_of",
    "latest_labels",
    "of_scored",
    "of_verdicts",
    "people_choice",
    "texts_of",
]

PairKey = tuple[str, str, str]
"""Question and both replies by id, independent of their order."""

CurrentLabels = Mapping[PairKey, Sequence[Label]]
"""The current label of each rater, by pair."""


@dataclass(frozen=True)
class LabelPair:
    """A judged pair that people may label.

    Attributes:
        question_id: the question.
        first, second: reply ids, in the order of the verdict.
        state: state of the judge's verdict.
        probability: the judge's probability that `first` is better; None if unparsable.
        margin: evaluator score of `first` minus that of `second`; None for a pair of a training question.
        texts: fingerprint of the question and both replies (`texts_of`).
    """

    question_id: str
    first: str
    second: str
    state: VerdictState
    probability: float | None
    margin: float | None
    texts: str

    @property
    def key(self) -> PairKey:
        """Identity of the pair, the same for both orders of the replies."""
        return key_of(self.question_id, self.first, self.second)


def key_of(question_id: str, one: str, other: str) -> PairKey:
    """Return the identity of a pair, the same for both orders of the replies."""
    return question_id, min(one, other), max(one, other)


def texts_of(question: str, one: str, other: str) -> str:
    """Return a fingerprint of a question and two replies, the same for both orders of the replies.

    A rerun with other settings reuses ids for other texts, which the labels are not about.
    """
    return fingerprint([question, *sorted((one, other))])


def of_scored(scored: Iterable[ScoredPair], questions: Mapping[str, str], replies: Mapping[str, str]) -> list[LabelPair]:
    """Return the judged test pairs with the evaluator's margins.

    Args:
        scored: judged test pairs.
        questions: texts by question id.
        replies: texts by reply id.
    """
    return [
        LabelPair(
            *(pair.question_id, pair.first, pair.second, pair.state, pair.probability, pair.margin),
            texts_of(questions[pair.question_id], replies[pair.first], replies[pair.second]),
        )
        for pair in scored
    ]


def of_verdicts(verdicts: Iterable[Verdict], questions: Mapping[str, str], replies: Mapping[str, str]) -> list[LabelPair]:
    """Return judged pairs without margins; see `of_scored`."""
    return [
        LabelPair(
            *(verdict.question_id, verdict.first, verdict.second, verdict.state, verdict.probability, None),
            texts_of(questions[verdict.question_id], replies[verdict.first], replies[verdict.second]),
        )
        for verdict in verdicts
    ]


def latest_labels(labels: Iterable[Label]) -> list[Label]:
    """Return the latest label of each rater for each pair and its texts, without those that were taken back.

    Args:
        labels: labels in the order in which they were given.

    Returns:
        The labels in the same order.
    """
    latest: dict[tuple[str, PairKey, str], Label] = {}
    for label in labels:
        # With the texts: a label of new texts, whose ids a rerun has reused, is no answer to the earlier ones.
        key = label.rater, key_of(label.question_id, label.first, label.second), label.texts
        # Removed first: a replacement is the rater's most recent answer, and dictionaries keep the order of insertion.
        latest.pop(key, None)
        if label.choice != LabelChoice.UNDO:
            latest[key] = label
    return list(latest.values())


def current_labels(labels: Iterable[Label], pairs: Mapping[PairKey, LabelPair]) -> CurrentLabels:
    """Return the latest labels by pair; see `latest_labels`.

    Labels of other texts than those of the pairs are left out.

    Args:
        labels: labels in the order in which they were given.
        pairs: the pairs by their identity.
    """
    found = defaultdict[PairKey, list[Label]](list)
    for label in latest_labels(labels):
        key = key_of(label.question_id, label.first, label.second)
        if key in pairs and pairs[key].texts == label.texts:
            found[key].append(label)
    return {key: tuple(on_pair) for key, on_pair in found.items()}


def choice_on(pair: LabelPair, label: Label) -> LabelChoice:
    """Return a label in the order of the pair instead of the order shown."""
    if label.first == pair.first:
        return label.choice
    turned = {LabelChoice.FIRST: LabelChoice.SECOND, LabelChoice.SECOND: LabelChoice.FIRST}
    return turned.get(label.choice, label.choice)


def people_choice(pair: LabelPair, labels: Sequence[Label]) -> LabelChoice | None:
    """Return the majority of the raters in the order of the pair: `first`, `second` or `tie`.

    Returns:
        None if every rater skipped the pair, or if no answer is the most frequent one.
    """
    return majority([choice for label in labels if (choice := choice_on(pair, label)) != LabelChoice.SKIP])
