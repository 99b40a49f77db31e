"""Labels that may be trained on: those given with `--use-for-training`, on pairs of training questions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from selfeval.labelling.pairs import LabelPair, PairKey, current_labels, latest_labels, people_choice
from selfeval.records import Label, LabelChoice, to_json
from selfeval.store import fingerprint

__all__ = ["CONFIDENCE", "labels_key", "preferences", "training_key", "training_labels"]

CONFIDENCE = 0.95
"""Confidence of a pair that a person labelled. Below 1, because people err too, and a soft label bounds the margin."""


def training_labels(labels: Iterable[Label]) -> list[Label]:
    """Return the latest label for training of each rater for each pair, without skipped ones and those taken back."""
    latest = latest_labels(label for label in labels if label.for_training)
    return [label for label in latest if label.choice != LabelChoice.SKIP]


def preferences(pairs: Sequence[LabelPair], labels: Iterable[Label]) -> Mapping[PairKey, LabelChoice]:
    """Return what people prefer on pairs of training questions, in the order of the pair: `first`, `second` or `tie`.

    Args:
        pairs: judged pairs of training questions.
        labels: all labels of the run; those that are not for training are left out.
    """
    known = {pair.key: pair for pair in pairs}
    current = current_labels(training_labels(labels), known)
    found = {key: people_choice(known[key], on_pair) for key, on_pair in current.items()}
    return {key: choice for key, choice in found.items() if choice is not None}


def training_key(labels: Iterable[Label]) -> str:
    """Return a fingerprint of the labels for training of a run, independent of their times; empty without any."""
    found = training_labels(labels)
    rows = sorted([one.question_id, one.first, one.second, one.choice.value, one.rater, one.texts] for one in found)
    return fingerprint(rows) if rows else ""


def labels_key(labels: Sequence[Label]) -> str:
    """Return a fingerprint of all labels of a run; empty without any."""
    return fingerprint([to_json(label) for label in labels]) if labels else ""
