"""Labelled pairs: a question, two replies, and which of them people prefer."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from selfeval.quality.label_agreement import majority

__all__ = ["LABELS", "Label", "LabelledPair", "in_random_order", "merged", "sampled"]

Label = Literal["first", "second", "tie"]
LABELS: tuple[Label, ...] = get_args(Label)
_SWAPPED: dict[Label, Label] = {"first": "second", "second": "first", "tie": "tie"}


@dataclass(frozen=True)
class LabelledPair:
    """A question with two replies, and the labels of one or more people.

    Attributes:
        question: the question.
        first, second: the replies, in the order in which a judge sees them first.
        labels: the label of each annotator; empty if nobody has labelled it yet.
        subset: part of the data set that it belongs to. Default: empty.
    """

    question: str
    first: str
    second: str
    labels: tuple[Label, ...]
    subset: str = ""

    @property
    def label(self) -> Label | None:
        """The most frequent label; None if there is none, or if several are as frequent."""
        return majority(self.labels)

    @property
    def swapped(self) -> LabelledPair:
        """The same pair with the replies in the other order."""
        labels = tuple(_SWAPPED[label] for label in self.labels)
        return replace(self, first=self.second, second=self.first, labels=labels)


def in_random_order(question: str, chosen: str, rejected: str, subset: str = "") -> LabelledPair:
    """Return a pair in a random order that depends only on its texts: the position must not reveal the label."""
    pair = LabelledPair(question, chosen, rejected, ("first",), subset)
    turned = random.Random(f"{question}/{chosen}/{rejected}").random() < 0.5
    return pair.swapped if turned else pair


def merged(pairs: Iterable[LabelledPair]) -> list[LabelledPair]:
    """Merge pairs with the same texts, in either order: their labels are those of several annotators."""
    found: dict[tuple[str, str, str], LabelledPair] = {}
    for pair in pairs:
        known = found.get((pair.question, pair.second, pair.first))
        one = pair.swapped if known is not None else pair
        key = (one.question, one.first, one.second)
        before = found.get(key)
        found[key] = one if before is None else replace(before, labels=(*before.labels, *one.labels))
    return list(found.values())


def sampled(pairs: Sequence[LabelledPair], limit: int | None, seed: int) -> list[LabelledPair]:
    """Return a random sample of pairs, in their order; all of them without a limit.

    Args:
        pairs: the pairs.
        limit: maximum number of pairs; None for all.
        seed: seed of the sample.
    """
    if limit is None or limit >= len(pairs):
        return list(pairs)
    picked = random.Random(f"{seed}/sample").sample(range(len(pairs)), limit)
    return [pairs[number] for number in sorted(picked)]
