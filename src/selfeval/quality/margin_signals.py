"""The probability that an ensemble of evaluators is right about a pair, from its margin and the disagreement of its members.

With the margin m (score of the first reply minus that of the second, the mean over members) and its standard deviation d over
the members, a pair has the signals

    choice        1
    margin        |m|
    disagreement  d; 0 for a single evaluator

    g = max(0, Σ_s w_s signal_s)        P(right) = σ(scale g), or an isotonic regression q(g)

Members that disagree are less often right (Lakshminarayanan et al. 2017, section 2.4, https://arxiv.org/abs/1612.01474), as
far as they do not share their mistakes.

Shapes: N pairs, F signals.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from selfeval.quality.calibration import fit_temperature
from selfeval.quality.signed_regression import (
    FEWEST_FOR_ISOTONIC,
    Steps,
    fit_steps,
    fit_weights,
    out_of_fold,
    step_probability,
    weighted,
)
from selfeval.quality.statistics import sigmoid

__all__ = ["MARGIN_SIGNALS", "MarginCalibration", "fit_margin_signals"]

Floats = NDArray[np.float64]

MARGIN_SIGNALS = ("choice", "margin", "disagreement")


@dataclass(frozen=True)
class MarginCalibration:
    """A map from margin and disagreement to the probability that the preferred reply is the better one.

    Attributes:
        weights: weight of each of `MARGIN_SIGNALS`, in log-odds per unit.
        scale: factor of g, the inverse of its temperature; not used with an isotonic regression.
        steps: points of the isotonic regression; empty for a temperature.
    """

    weights: Mapping[str, float]
    scale: float = 1.0
    steps: Steps = ()

    def confidence(self, margin: float, disagreement: float) -> float:
        """Compute the probability that the reply with the higher score is better; 1/2 if the scores are equal.

        Example:
            >>> found = MarginCalibration({"choice": 0.0, "margin": 0.5, "disagreement": -1.0})
            >>> round(found.confidence(-4.0, 0.0), 3), round(found.confidence(4.0, 1.0), 3)
            (0.881, 0.731)
        """
        if margin == 0:
            return 0.5
        signals = (1.0, abs(margin), disagreement)
        size = max(0.0, sum(self.weights[name] * value for name, value in zip(MARGIN_SIGNALS, signals, strict=True)))
        return step_probability(self.steps, size) if self.steps else sigmoid(self.scale * size)


def fit_margin_signals(
    margins: Sequence[float],
    disagreements: Sequence[float],
    labels: Sequence[float],
    shape: Literal["temperature", "isotonic"],
    *,
    prior: float,
    groups: Sequence[Hashable] | None = None,
) -> MarginCalibration:
    """Fit to pairs that the evaluators were not trained on.

    Args:
        margins: [N] margins, N > 0.
        disagreements: [N] standard deviations of the margins over members.
        labels: [N] probability that the first reply is better.
        shape: the second map, fitted to out-of-fold logits. `isotonic` needs pairs of `FEWEST_FOR_ISOTONIC` groups; with fewer
            a temperature is fitted, which the result shows.
        prior: standard deviation of the normal prior on the logarithm of the temperature (`fit_temperature`).
        groups: Optional. [N] question of each pair; its pairs are in one fold. Default: each pair has its own.

    Raises:
        ValueError: there is no pair, or the lengths differ.
    """
    margin_N, label_N = np.array(margins, dtype=np.float64), np.array(labels, dtype=np.float64)
    x_NF = np.sign(margin_N)[:, None] * np.stack([np.ones(len(margin_N)), np.abs(margin_N), np.array(disagreements)], axis=1)
    fit = partial(fit_weights, main=MARGIN_SIGNALS.index("margin"))
    weights, held_NF = weighted(MARGIN_SIGNALS, fit(x_NF, label_N)), out_of_fold(x_NF, label_N, fit, groups)
    size_N = np.maximum(np.sign(margin_N) * (x_NF * held_NF).sum(1), 0.0)
    if shape == "isotonic" and len(set(groups or range(len(size_N)))) >= FEWEST_FOR_ISOTONIC:
        right_N = np.where(margin_N == 0, 0.5, np.where(margin_N > 0, label_N, 1.0 - label_N))
        steps = tuple((round(size, 6), round(chance, 6)) for size, chance in fit_steps(size_N, right_N))
        return MarginCalibration(weights, 1.0, steps)
    scale = 1.0 / fit_temperature((np.sign(margin_N) * size_N).tolist(), label_N.tolist(), prior=prior)
    return MarginCalibration(weights, round(scale, 6))
