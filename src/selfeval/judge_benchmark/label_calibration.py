"""Calibrate a judge on human labels: fitted on a half of them, and measured on the other half."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from selfeval.config import JUDGES, VerdictsConfig
from selfeval.judge_benchmark.figures import Case
from selfeval.judging.calibrated import looks_of
from selfeval.judging.protocol import Judgement
from selfeval.quality.calibration import calibration_error
from selfeval.quality.judge_calibration import Calibration, Looks, fit_to_labels
from selfeval.quality.judge_signals import SIGNALS, SignalCalibration, fit_signals_to_labels
from selfeval.quality.label_agreement import credit_of
from selfeval.quality.selective_risk import Threshold, choose_threshold
from selfeval.quality.signed_regression import Steps
from selfeval.quality.statistics import Figure
from selfeval.records import Verdict, VerdictState
from selfeval.stages.judge_fit import calibrated_verdict

__all__ = ["LabelCalibration", "calibrate_on_labels", "credit", "threshold_of"]


@dataclass(frozen=True)
class LabelCalibration:
    """A calibration on labels.

    Attributes:
        slope, truncated_slope, bias: see `Calibration`; of signals, both slopes are `SignalCalibration.scale`.
        fitted: number of labelled pairs that it was fitted to, one per question.
        ece_before: expected calibration error of the recorded confidence on the other pairs.
        ece: expected calibration error of the calibrated confidence on the same pairs.
        threshold: the smallest calibrated confidence with the wanted error rate, with a guarantee, chosen on the same pairs.
        weights: weights of `SIGNALS`; empty if the log-odds alone are calibrated.
        steps: points of an isotonic regression; empty without one.
    """

    slope: float
    truncated_slope: float
    bias: float
    fitted: int
    ece_before: Figure
    ece: Figure
    threshold: Threshold
    weights: tuple[float, ...] = ()
    steps: Steps = ()

    @property
    def settings(self) -> tuple[str, ...]:
        """The settings with which a run uses this calibration; `verdicts.keep` among them if a threshold has the error rate."""
        slopes = {"slope": self.slope} if self.weights else {"slope": self.slope, "truncated_slope": self.truncated_slope}
        values: dict[str, Any] = {"method": "given", **slopes, "bias": self.bias}
        if self.weights:
            values |= {"map": "isotonic" if self.steps else "temperature", "weights": _as_list(self.weights)}
        if self.steps:
            values["steps"] = f"[{','.join(map(_as_list, self.steps))}]"
        keep = () if self.threshold.value is None else (f"verdicts.keep={self.threshold.value:g}",)
        return (*(f"verdicts.calibration.{name}={value}" for name, value in values.items()), *keep)


def calibrate_on_labels(cases: Sequence[Case], error: float, config: VerdictsConfig) -> LabelCalibration | None:
    """Fit a calibration to a random half of the labelled pairs, and measure it on the others.

    It is one of the log-odds, or of all signals of a verdict (`verdicts.calibration.map`).

    None if the half has fewer than 50 pairs with a verdict, or if the recorded probabilities cannot be traced back: they were
    calibrated with given values, and the judge does not ask both orders.

    Args:
        cases: pairs for which people prefer one reply, with the judge's verdicts.
        error: wanted error rate of kept verdicts, in (0, 1).
        config: settings with which the verdicts were made.
    """
    if config.calibration.method == "given" and not JUDGES[config.judge].asks_both_orders:
        return None
    fitting, others = _halves(cases)
    labelled = [(looks, case.pair.label == "first") for case in fitting if (looks := _looks(case)) is not None]
    found = _fitted([looks for looks, _ in labelled], [label for _, label in labelled], config.calibration.map)
    if found is None:
        return None
    after = [dataclasses.replace(case, verdict=calibrated_verdict(case.verdict, found, config)) for case in others]
    signals = found if isinstance(found, SignalCalibration) else None
    slopes = (found.scale, found.scale) if isinstance(found, SignalCalibration) else (found.slope, found.truncated_slope)
    return LabelCalibration(
        *(*slopes, found.bias, len(labelled)),
        ece_before=_calibration_error(others),
        ece=_calibration_error(after),
        threshold=threshold_of(after, error),
        weights=() if signals is None else tuple(signals.weights[name] for name in SIGNALS),
        steps=() if signals is None else signals.steps,
    )


def _fitted(
    looks: Sequence[Looks], labels: Sequence[bool], shape: Literal["slope", "temperature", "isotonic"]
) -> Calibration | SignalCalibration | None:
    """Fit to labels, rounded as printed: a run that is given these numbers has the confidences that are measured here."""
    if shape != "slope":
        signals = fit_signals_to_labels(looks, labels, shape)
        return signals and signals.rounded(4)
    found = fit_to_labels(looks, labels)
    return found and Calibration(*(round(value, 4) for value in (found.slope, found.truncated_slope, found.bias)))


def _as_list(values: Sequence[float]) -> str:
    # Without spaces: a list with spaces is several words of a shell.
    return f"[{','.join(f'{value:g}' for value in values)}]"


def _halves(cases: Sequence[Case]) -> tuple[list[Case], list[Case]]:
    """Split the pairs at random by their question. One pair per question: the figures need independent cases."""
    distinct = {case.pair.question: case for case in reversed(cases)}
    mixed = sorted(distinct, key=lambda question: hashlib.sha256(question.encode()).digest())
    ordered = [distinct[question] for question in mixed]
    return ordered[: -(-len(ordered) // 2)], ordered[-(-len(ordered) // 2) :]


def _looks(case: Case) -> Looks | None:
    verdict = case.verdict
    if verdict.state == VerdictState.TIE:
        return None
    return looks_of(Judgement(verdict.probability, verdict.tie, verdict.evidence))


def _calibration_error(cases: Sequence[Case]) -> Figure:
    chosen = [(case.verdict.confidence, found == 1) for case in cases if (found := credit(case)) != 0.5]
    return calibration_error([confidence for confidence, _ in chosen], [right for _, right in chosen])


def credit(case: Case) -> float:
    """Return 1 if the judge prefers the reply that people prefer, 0 if it prefers the other one, and one half otherwise."""
    probability = case.verdict.probability
    return credit_of(0.0 if probability is None else probability - 0.5, case.pair.label)


def threshold_of(cases: Sequence[Case], error: float) -> Threshold:
    """Choose the smallest confidence with the wanted error rate, with one pair per question: it needs independent cases."""
    distinct = list({case.pair.question: case for case in reversed(cases)}.values())
    confidence = [case.verdict.confidence if _can_be_kept(case.verdict) and credit(case) != 0.5 else 0.0 for case in distinct]
    return choose_threshold(confidence, [credit(case) == 1 for case in distinct], error)


def _can_be_kept(verdict: Verdict) -> bool:
    """Return whether a threshold decides: a tie and an unparsable verdict are never kept."""
    return verdict.state in (VerdictState.KEPT, VerdictState.UNSURE)
