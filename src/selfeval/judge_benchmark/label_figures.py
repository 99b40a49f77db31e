"""How far a judge agrees with a person, its biases, and the threshold for a wanted error rate. Pure functions on cases.

Shapes: N pairs, R bootstrap resamples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from selfeval.config import VerdictsConfig
from selfeval.evaluation.judge_probe import shown_first
from selfeval.judge_benchmark.figures import Case, choice_of, share
from selfeval.judge_benchmark.label_calibration import LabelCalibration, calibrate_on_labels, credit, threshold_of
from selfeval.judging.choices import is_consistent
from selfeval.quality.calibration import aurc, calibration_error, risk_coverage
from selfeval.quality.label_agreement import cohen_kappa
from selfeval.quality.selective_risk import Threshold
from selfeval.quality.statistics import Figure, bootstrap_interval, mean_figure, proportion

__all__ = ["LabelCheck", "check_labels", "length_slope"]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class LabelCheck:
    """Figures of a judge against human labels; those without cases have no value.

    Attributes:
        pairs: number of labelled pairs.
        ties: of which the label is a tie. The other figures, except `kappa`, are on pairs for which people prefer one reply.
        agreement: share on which the judge, forced to choose, prefers the same reply; no preference counts one half.
        kappa: Cohen's kappa of the labels first, second and tie, on the pairs with a verdict.
        swap_consistency: share of pairs on which both orders choose the same.
        shown_first: share of the orders that chose the reply shown first; one half without order bias.
        longer_better, shorter_better: agreement where people prefer the longer reply, and the shorter one.
        length_slope: see `length_slope`.
        ece: expected calibration error of the confidence, on the pairs with a preference of the judge.
        aurc: area under the risk-coverage curve.
        risk_coverage: (coverage, risk) of the surest pairs.
        threshold: the smallest confidence with the wanted error rate, with a guarantee.
        calibration: a calibration on half of the labels; None if it cannot be fitted (`calibrate_on_labels`).
    """

    pairs: int
    ties: int
    agreement: Figure
    kappa: Figure
    swap_consistency: Figure
    shown_first: Figure
    longer_better: Figure
    shorter_better: Figure
    length_slope: Figure
    ece: Figure
    aurc: float | None
    risk_coverage: tuple[tuple[float, float], ...]
    threshold: Threshold
    calibration: LabelCalibration | None

    @property
    def setting(self) -> str | None:
        """The setting with which a run keeps verdicts of the wanted error rate; None if no threshold has it."""
        return None if self.threshold.value is None else f"verdicts.keep={self.threshold.value:g}"

    def as_json(self) -> dict[str, Any]:
        """Return all figures, in the form of report.json."""
        return {"setting": self.setting, **{name: _as_json(value) for name, value in vars(self).items()}}


def _as_json(value: Any) -> Any:
    if isinstance(value, Figure):
        return value.as_json()
    if isinstance(value, LabelCalibration):
        return {"settings": list(value.settings), **{name: _as_json(part) for name, part in vars(value).items()}}
    if isinstance(value, Threshold):
        return {name: _as_json(part) for name, part in vars(value).items()}
    if isinstance(value, tuple):
        return [_as_json(list(point)) if isinstance(point, tuple) else _as_json(point) for point in value]
    if isinstance(value, list):
        return [round(number, 6) for number in value]
    return round(value, 6) if isinstance(value, float) else value


def check_labels(cases: Sequence[Case], error: float, config: VerdictsConfig) -> LabelCheck:
    """Compare a judge with human labels.

    Args:
        cases: pairs with a label, and the judge's verdicts.
        error: wanted error rate of kept verdicts, in (0, 1).
        config: settings with which the verdicts were made.

    Raises:
        ValueError: error is not in (0, 1).
    """
    decided = [case for case in cases if case.pair.label != "tie"]
    credits = [credit(case) for case in decided]
    read = [(str(choice), str(case.pair.label)) for case in cases if (choice := choice_of(case.verdict)) is not None]
    consistent = [agree for case in decided if (agree := is_consistent(case.verdict)) is not None]
    gains = [_gain(case) for case in decided]
    confidence = [case.verdict.confidence for case in decided]
    chosen = [(c, credit == 1) for c, credit in zip(confidence, credits, strict=True) if credit != 0.5]
    return LabelCheck(
        pairs=len(cases),
        ties=len(cases) - len(decided),
        agreement=share(credits, [case.pair.question for case in decided]),
        kappa=cohen_kappa([ours for ours, _ in read], [theirs for _, theirs in read]),
        swap_consistency=proportion(consistent),
        shown_first=mean_figure([found for case in decided if (found := shown_first(case.verdict)) is not None]),
        longer_better=mean_figure([credit for credit, gain in zip(credits, gains, strict=True) if gain > 0]),
        shorter_better=mean_figure([credit for credit, gain in zip(credits, gains, strict=True) if gain < 0]),
        length_slope=length_slope(gains, credits),
        ece=calibration_error([c for c, _ in chosen], [right for _, right in chosen]),
        aurc=aurc(confidence, credits),
        risk_coverage=tuple(risk_coverage(confidence, credits)) if credits else (),
        threshold=threshold_of(decided, error),
        calibration=calibrate_on_labels(decided, error, config),
    )


def length_slope(gains: Sequence[float], credits: Sequence[float]) -> Figure:
    """Compute the least-squares slope of a judge's credit on the log-ratio of the lengths of the better and the worse reply.

    credit ~ a + slope · log2(length of the better reply / length of the worse reply)

    A judge that is right more often where the better reply is longer has a positive slope: each doubling of the ratio adds this
    much to its agreement. 0 without length bias, if difficulty does not depend on length.

    Args:
        gains: [N] log-ratios to base 2.
        credits: [N] credits in [0, 1].

    Returns:
        The slope with a percentile bootstrap interval; None if all ratios are equal.

    Example:
        >>> length_slope([-1.0, 0.0, 1.0, 2.0], [0.0, 0.0, 1.0, 1.0]).value
        0.4
    """
    x_N, y_N = np.asarray(gains, dtype=np.float64), np.asarray(credits, dtype=np.float64)
    # Compared exactly: equal ratios have no slope, and their computed variance may be 1e-32.
    if x_N.size < 2 or x_N.min() == x_N.max():
        return Figure(None, None, None, x_N.size)
    low, high = bootstrap_interval(lambda index_RN: _slopes(x_N[index_RN], y_N[index_RN]), x_N.size)
    return Figure(float(_slopes(x_N[None], y_N[None])[0]), low, high, x_N.size)


def _slopes(x_RN: Floats, y_RN: Floats) -> Floats:
    """Return the slope of each resample, NaN where all ratios are equal."""
    centred_RN = x_RN - x_RN.mean(-1, keepdims=True)
    variance_R = np.where(x_RN.min(-1) < x_RN.max(-1), (centred_RN**2).sum(-1), np.nan)
    # Rounded: equal credits have no slope, and the computed one may be 1e-17.
    return np.asarray(np.round((centred_RN * y_RN).sum(-1) / variance_R, 12), dtype=np.float64)


def _gain(case: Case) -> float:
    """Return log2 of how many times the better reply is longer than the worse one, in characters; one is added to both."""
    first, second = len(case.pair.first) + 1, len(case.pair.second) + 1
    return math.log2(first / second if case.pair.label == "first" else second / first)
