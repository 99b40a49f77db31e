"""Apply a calibration to the judgements of a judge."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from selfeval.config import VerdictsConfig
from selfeval.judging.protocol import Comparison, Judge, JudgeFit, Judgement
from selfeval.quality.judge_calibration import Calibration, Looks, log_odds
from selfeval.quality.judge_signals import SIGNALS, SignalCalibration
from selfeval.quality.statistics import rounded
from selfeval.records import (
    CombinedEvidence,
    Evidence,
    PairwiseEvidence,
    SampledPairwiseEvidence,
    SampledPointwiseEvidence,
    Unreadable,
)

__all__ = ["CalibratedJudge", "calibrated", "calibration_of", "looks_of", "rounded_judgement"]


class CalibratedJudge:
    """A judge whose probabilities are calibrated. The evidence is unchanged, so a judgement can be calibrated again.

    Args:
        judge: the judge.
        calibration: the map from its log-odds to a probability.
    """

    def __init__(self, judge: Judge, calibration: Calibration | SignalCalibration) -> None:
        self._judge, self._calibration = judge, calibration

    def judge(self, comparisons: Sequence[Comparison], advance: Callable[[int], None] | None = None) -> list[Judgement]:
        """Judge every comparison, and calibrate the probabilities."""
        # Rounded first, so a recorded verdict that is calibrated later has the same probability.
        return [calibrated(rounded_judgement(j), self._calibration) for j in self._judge.judge(comparisons, advance)]


def calibration_of(config: VerdictsConfig, fit: JudgeFit) -> Calibration | SignalCalibration | None:
    """Return the calibration of a judge: that of the settings, or that which was fitted; None if there is none.

    Args:
        config: settings of the verdicts.
        fit: what was estimated from the judge's verdicts before.
    """
    given = config.calibration
    if given.method == "given" and given.weights:
        weights = dict(zip(SIGNALS, given.weights, strict=True))
        return SignalCalibration(weights, given.bias, given.slope, given.steps)
    if given.method == "given":
        return Calibration(given.slope, given.truncated_slope, given.bias)
    return fit.calibration if config.fits_consistency else None


def looks_of(judgement: Judgement) -> Looks | None:
    """Return the log-odds of a judgement that is not calibrated: those of both orders, or those of its probability.

    None if there is no verdict. A verdict counts as truncated if any output was cut off and read nevertheless.
    """
    if judgement.probability is None:
        return None
    evidence = judgement.evidence
    truncated = evidence is not None and Unreadable.TRUNCATED in evidence.causes
    if not isinstance(evidence, PairwiseEvidence):
        return Looks((log_odds(judgement.probability),), truncated, (_entropy(evidence),), _disagreement(evidence))
    assert evidence.in_order is not None
    assert evidence.swapped is not None
    sampled = evidence.vote_entropies if isinstance(evidence, SampledPairwiseEvidence) else (None, None)
    entropies = tuple(entropy or 0.0 for entropy in sampled)
    return Looks((log_odds(evidence.in_order), log_odds(evidence.swapped)), truncated, entropies)


def _entropy(evidence: Evidence | None) -> float:
    """Return the mean vote entropy of a verdict with one look; 0 if no votes were sampled."""
    if isinstance(evidence, CombinedEvidence):
        return fmean(_entropy(member) for member in evidence.members) if evidence.members else 0.0
    if not isinstance(evidence, (SampledPairwiseEvidence, SampledPointwiseEvidence)):
        return 0.0
    known = [entropy for entropy in evidence.vote_entropies if entropy is not None]
    return fmean(known) if known else 0.0


def _disagreement(evidence: Evidence | None) -> float:
    """Return the smaller share of the votes of the members of a combined judge; 0 for another judge."""
    votes = [vote for vote in evidence.votes if vote] if isinstance(evidence, CombinedEvidence) else []
    return min(votes.count(1), votes.count(-1)) / len(votes) if votes else 0.0


def calibrated(judgement: Judgement, calibration: Calibration | SignalCalibration) -> Judgement:
    """Return the judgement with its calibrated probability.

    Args:
        judgement: a judgement that is not calibrated.
        calibration: the map from its log-odds to a probability.
    """
    looks = looks_of(judgement)
    return judgement if looks is None else replace(judgement, probability=calibration.probability(looks))


def rounded_judgement(judgement: Judgement) -> Judgement:
    """Return a judgement with the precision of numbers in files."""
    return Judgement(rounded(judgement.probability), rounded(judgement.tie), _rounded(judgement.evidence))


def _rounded(evidence: Any) -> Any:
    if evidence is None:
        return None
    values = {field.name: _rounded_value(getattr(evidence, field.name)) for field in dataclasses.fields(evidence)}
    return dataclasses.replace(evidence, **values)


def _rounded_value(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_rounded_value, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):  # of a member
        return _rounded(value)
    return rounded(value) if isinstance(value, float) else value
