"""Judged pairs with known truth, and people who label them."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence

from selfeval.labelling.pairs import CurrentLabels, LabelPair, current_labels
from selfeval.records import Label, LabelChoice, VerdictState

__all__ = ["current", "is_right", "label", "labels_of", "make_pairs", "pair", "share_right"]


def pair(number: int, margin: float = 1.0, probability: float | None = 0.9, *, question: int | None = None) -> LabelPair:
    state = VerdictState.UNPARSABLE if probability is None else VerdictState.KEPT
    if probability is not None and max(probability, 1 - probability) < 0.8:
        state = VerdictState.UNSURE
    name = f"q{number if question is None else question}"
    return LabelPair(name, f"{number}-a", f"{number}-b", state, probability, margin, f"texts-{number}")


def label(pair: LabelPair, choice: str, rater: str = "ann", *, turned: bool = False, texts: str | None = None) -> Label:
    """A label of a pair; `choice` is the position as shown."""
    first, second = (pair.second, pair.first) if turned else (pair.first, pair.second)
    time = "2026-11-30T12:00:00+00:00"
    return Label(pair.question_id, first, second, LabelChoice(choice), rater, time, False, texts or pair.texts)


def current(labels: Iterable[Label], pairs: Iterable[LabelPair]) -> CurrentLabels:
    """The current labels of some pairs."""
    return current_labels(labels, {one.key: one for one in pairs})


def labels_of(pairs: Sequence[LabelPair], better: Mapping[str, str], rater: str = "ann") -> CurrentLabels:
    """The labels of a rater who chooses `better` by the fingerprint of the pair."""
    return current([label(one, better[one.texts], rater) for one in pairs], pairs)


def make_pairs(count: int, seed: int, *, per_question: int = 1) -> tuple[list[LabelPair], dict[str, str]]:
    """Pairs whose evaluator and judge are right with the probability that they claim, and the better reply of each."""
    rng = random.Random(seed)
    pairs, better = [], {}
    for number in range(count):
        margin, confidence = rng.expovariate(0.7), rng.uniform(0.5, 1.0)
        evaluator_right = rng.random() < 1 / (1 + 2.718281828**-margin)
        first_is_better = rng.random() < 0.5
        judge_right = rng.random() < confidence
        signed = margin if evaluator_right == first_is_better else -margin
        probability = confidence if judge_right == first_is_better else 1 - confidence
        one = pair(number, signed, probability, question=number // per_question)
        pairs.append(one)
        better[one.texts] = "first" if first_is_better else "second"
    return pairs, better


def is_right(one: LabelPair, better: Mapping[str, str]) -> bool:
    return ((one.margin or 0.0) > 0) == (better[one.texts] == "first")


def share_right(pairs: Sequence[LabelPair], better: Mapping[str, str]) -> float:
    return sum(is_right(one, better) for one in pairs) / len(pairs)
