"""Metrics of the judge's verdicts: their states, their consistency, and the accuracy of the resulting labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import fmean

from selfeval.judging.choices import is_consistent
from selfeval.quality.judge_calibration import Calibration
from selfeval.quality.judge_signals import SignalCalibration
from selfeval.quality.statistics import Figure, mean_figure, proportion
from selfeval.records import (
    AgreementEvidence,
    CombinedEvidence,
    PointwiseEvidence,
    SampledPairwiseEvidence,
    SampledPointwiseEvidence,
    Unreadable,
    Verdict,
    VerdictState,
)
from selfeval.report.schema import JudgeCalibration, JudgeMember, JudgeProbe, JudgeSignals, UnreadableOrders, Verdicts

__all__ = ["count_causes", "label_is_right", "measure_verdicts"]


def measure_verdicts(
    verdicts: Sequence[Verdict],
    labels: Sequence[bool | None] | None,
    *,
    from_file: bool,
    probe: JudgeProbe | None = None,
    calibration: Calibration | SignalCalibration | None = None,
) -> Verdicts:
    """Measure the verdicts of both splits.

    Args:
        verdicts: all verdicts.
        labels: whether each kept label is right by gold (`label_is_right`); None without gold.
        from_file: whether the labels are from the user's file.
        probe: Optional. Diagnosis of the judge from the first pairs. Default: the judge was not probed.
        calibration: Optional. Calibration of the judge's probabilities. Default: none.
    """
    states = Counter(verdict.state for verdict in verdicts)
    # None for pairs of the user's file and for orders that were not parsed; the share leaves them out.
    consistent = [is_consistent(verdict) for verdict in verdicts]
    return Verdicts(
        judged=len(verdicts),
        source="file" if from_file else "judge",
        kept=states[VerdictState.KEPT],
        tie=states[VerdictState.TIE],
        unsure=states[VerdictState.UNSURE],
        unparsable=states[VerdictState.UNPARSABLE],
        unreadable_orders=UnreadableOrders(**count_causes(verdicts)),
        kept_share=proportion([verdict.state == VerdictState.KEPT for verdict in verdicts]),
        swap_consistency=proportion([found for found in consistent if found is not None]),
        majority_share=_majority_share(verdicts),
        vote_entropy=_vote_entropy(verdicts),
        mean_grade=_mean_grade(verdicts),
        members=_members(verdicts),
        calibration=None if calibration is None else _calibration(calibration),
        probe=probe,
        label_accuracy_gold=None if labels is None else proportion([right for right in labels if right is not None]),
    )


def _calibration(found: Calibration | SignalCalibration) -> JudgeCalibration:
    if isinstance(found, Calibration):
        return JudgeCalibration(**vars(found))
    signals = JudgeSignals(**found.weights, steps=found.steps)
    # The slope of a look that was cut off is the sum of two weights, so there is one scale.
    return JudgeCalibration(slope=found.scale, truncated_slope=found.scale, bias=found.bias, signals=signals)


def _majority_share(verdicts: Sequence[Verdict]) -> Figure | None:
    ballots = [verdict.evidence for verdict in verdicts if isinstance(verdict.evidence, AgreementEvidence)]
    return mean_figure([ballot.share for ballot in ballots if ballot.share is not None]) if ballots else None


def _vote_entropy(verdicts: Sequence[Verdict]) -> Figure | None:
    sampled = [v.evidence for v in verdicts if isinstance(v.evidence, (SampledPairwiseEvidence, SampledPointwiseEvidence))]
    means = [fmean(known) for evidence in sampled if (known := [e for e in evidence.vote_entropies if e is not None])]
    return mean_figure(means, bounds=None) if sampled else None


def _mean_grade(verdicts: Sequence[Verdict]) -> Figure | None:
    graded = [verdict.evidence for verdict in verdicts if isinstance(verdict.evidence, PointwiseEvidence)]
    means = [fmean(known) for evidence in graded if (known := [grade for grade in evidence.grades if grade is not None])]
    return mean_figure(means, bounds=None) if graded else None


def _members(verdicts: Sequence[Verdict]) -> tuple[JudgeMember, ...] | None:
    rows = [verdict.evidence for verdict in verdicts if isinstance(verdict.evidence, CombinedEvidence)]
    return tuple(_member(place, rows) for place in range(len(rows[0].judges))) if rows else None


def _member(place: int, rows: Sequence[CombinedEvidence]) -> JudgeMember:
    agreed = []
    for row in rows:
        own, others = row.votes[place], [vote for n, vote in enumerate(row.votes) if n != place and vote]
        if own and others:
            agreed.append(fmean(vote == own for vote in others))
    return JudgeMember(
        judge=rows[0].judges[place],
        accuracy=rows[0].accuracies[place],
        voted=proportion([bool(row.votes[place]) for row in rows]),
        agreement=mean_figure(agreed),
    )


def count_causes(verdicts: Sequence[Verdict]) -> dict[str, int]:
    """Return the number of unreadable outputs by cause: orders, of which a pair has up to two, or votes."""
    causes = Counter(cause for v in verdicts if v.evidence is not None for cause in v.evidence.causes)
    return {cause.value: causes[cause] for cause in Unreadable}


def label_is_right(verdict: Verdict, right: tuple[bool | None, bool | None]) -> bool | None:
    """Return whether a kept label chose a right reply over a wrong one.

    None if the question has no gold answer, or if the label prefers neither reply.

    Args:
        verdict: a kept verdict.
        right: whether each reply is right by gold.
    """
    first, second = right
    if first is None or second is None or verdict.probability is None or verdict.probability == 0.5:
        return None
    return first and not second if verdict.probability > 0.5 else second and not first
