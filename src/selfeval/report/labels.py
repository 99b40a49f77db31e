"""Labels of people in the report: the part of report.json, and the sentences of the page and the terminal."""

from __future__ import annotations

from selfeval.labelling.agreement import Agreement
from selfeval.labelling.threshold import labels_needed
from selfeval.quality.selective_risk import Threshold
from selfeval.report.figures import describe, percent
from selfeval.report.schema import HumanLabels, HumanThreshold, Report

__all__ = [
    "DEFAULT_SURE",
    "agreement_sentence",
    "has_other_gold",
    "human_labels",
    "is_gold_by_people",
    "label_sentences",
    "threshold_sentence",
    "with_labels",
]

DEFAULT_SURE = 0.8
"""Confidence below which the evaluator is unsure, without a threshold from labels."""


def human_labels(agreement: Agreement, threshold: Threshold, *, for_training: int = 0, gold: bool = False) -> HumanLabels:
    """Combine the figures from labels.

    Args:
        agreement: the agreement with people.
        threshold: the threshold from the same labels.
        for_training: number of labels for training. Default: 0.
        gold: the labels are the gold of the run. Default: False.
    """
    values = {name: value for name, value in vars(agreement).items() if name != "raters"}
    # Only the number of people: names are private, and a report may be published.
    return HumanLabels(
        **values,
        raters=len(agreement.raters),
        labels=sum(agreement.raters.values()),
        for_training=for_training,
        gold=gold,
        threshold=HumanThreshold(
            sure=threshold.value,
            error=threshold.error,
            delta=threshold.delta,
            pairs=threshold.coverage.n,
            selected=threshold.selected,
            needed=labels_needed(threshold),
            risk=threshold.risk,
            bound=threshold.bound,
            coverage=threshold.coverage,
        ),
    )


def has_other_gold(report: Report) -> bool:
    """Return whether the run has gold from its domain or from a file, which counts before labels of people."""
    return report.model.domain is not None or report.model.gold_file is not None


def is_gold_by_people(report: Report) -> bool:
    """Return whether the figures by gold are by labels of people."""
    return report.labels is not None and report.labels.gold


def with_labels(report: Report, labels: HumanLabels | None) -> Report:
    """Return a report with other labels of people, which are its gold if it has no other.

    Args:
        report: a report, with or without labels.
        labels: the labels; None without any.
    """
    if has_other_gold(report):
        return report.model_copy(update={"labels": labels})
    is_gold = labels is not None and labels.gold
    evaluator = {"accuracy_gold": labels.evaluator if labels is not None and is_gold else None}
    verdicts = {"label_accuracy_gold": labels.judge_kept if labels is not None and is_gold else None}
    return report.model_copy(
        update={
            "labels": labels,
            "evaluator": report.evaluator.model_copy(update=evaluator),
            "verdicts": report.verdicts.model_copy(update=verdicts),
        }
    )


def agreement_sentence(labels: HumanLabels) -> str:
    """Return the figures so far in one line."""
    counts = f"{labels.labelled} of {labels.pairs} pairs labelled ({labels.ties} ties, {labels.skipped} skipped)"
    if not labels.decided:
        return f"{counts}; no preference yet"
    parts = [f"evaluator agrees on {describe(labels.evaluator)}", f"judge on {describe(labels.judge)}"]
    if labels.kappa is not None:
        parts.append(f"agreement of {labels.raters} raters {describe(labels.kappa, as_percent=False)}")
    return f"{counts}; {', '.join(parts)}{_more(labels)}"


def _more(labels: HumanLabels) -> str:
    left = labels.pairs - labels.labelled - labels.skipped
    if not labels.more_labels:
        return ""
    if labels.more_labels > left:
        return f"; half the interval would take {labels.more_labels} more pairs, and {left} are left"
    return f"; {labels.more_labels} more pairs halve the interval"


def threshold_sentence(threshold: HumanThreshold) -> str:
    """Return the threshold that applies, and what it rests on."""
    if threshold.sure is None:
        return (
            f"No threshold from labels: an error of at most {percent(threshold.error)} takes at least {threshold.needed} pairs "
            f"with a preference that were drawn uniformly and on which the evaluator is right, and there are {threshold.pairs} "
            f"such pairs so far, about half of all labelled ones. The evaluator is unsure below {DEFAULT_SURE}."
        )
    return (
        f"The evaluator is unsure below {threshold.sure:g}: with probability {percent(1 - threshold.delta)}, its error against "
        f"people is at most {percent(threshold.error)} where it is sure, which is {describe(threshold.coverage)} of the pairs."
    )


def label_sentences(labels: HumanLabels) -> list[str]:
    """Return the sentences of the summary: agreement, threshold, and what else has to be known."""
    found = [f"Labels of people: {agreement_sentence(labels)}.", threshold_sentence(labels.threshold)]
    if labels.gold:
        found.append("This run has no other gold, so accuracies by gold are by people.")
    if labels.unused:
        found.append(f"{labels.unused} labels are of texts or of a set of pairs that the run no longer has, and are not used.")
    return found
