"""One probability from all signals of a verdict: swap agreement, margin, vote entropy, disagreement and truncation.

Each look l of a judge at a pair (`quality/judge_calibration.py`) has the unbiased log-odds y_l and the signals

    agreement     1: looks with the same preference add up, others cancel, so this counts whether they agree
    margin        |y_l|
    entropy       entropy in nats of the votes that were sampled for it; 0 for a single output
    disagreement  share of the votes of a combined judge's members against its choice; 0 for other judges
    truncated     |y_l| if an output was cut off and read nevertheless, else 0: such a look has another slope

    g_l = max(0, Σ_s w_s signal_s)        z = Σ_l sign(y_l) g_l        probability that the first reply is better = σ(scale z)

or, with an isotonic regression q, z = Σ_l sign(y_l) logit q(g_l) if it is one of looks, and q(|z|) if it is one of pairs.

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
from selfeval.quality.judge_calibration import (
    FEWEST_PAIRS,
    PRIOR,
    Looks,
    agreement_accuracy,
    log_odds,
    matching_slope,
    position_bias,
    sign_agreement,
    unbiased_looks,
)
from selfeval.quality.signed_regression import (
    FEWEST_FOR_ISOTONIC,
    Steps,
    fit_steps,
    fit_weights,
    out_of_fold,
    step_probability,
    weighted,
)
from selfeval.quality.statistics import sigmoid, wilson_interval

__all__ = ["SIGNALS", "Shape", "SignalCalibration", "fit_signals_to_consistency", "fit_signals_to_labels"]

Floats = NDArray[np.float64]
Shape = Literal["temperature", "isotonic"]

SIGNALS = ("agreement", "margin", "entropy", "disagreement", "truncated")
_MARGIN = SIGNALS.index("margin")
_ROUNDS = 15
"""Rounds of expectation maximisation; the weights then change by a few hundredths at most."""


@dataclass(frozen=True)
class SignalCalibration:
    """A map from all signals of a verdict to a probability.

    Attributes:
        weights: weight of each of `SIGNALS`, in log-odds per unit.
        bias: b, log-odds by which the judge favours the reply shown first.
        scale: factor of z, the inverse of its temperature; not used with an isotonic regression.
        steps: points of the isotonic regression; empty for a temperature.
        of: whether the isotonic regression is one of `looks` or of `pairs`. Default: pairs.
    """

    weights: Mapping[str, float]
    bias: float
    scale: float = 1.0
    steps: Steps = ()
    of: Literal["looks", "pairs"] = "pairs"

    @property
    def is_useless(self) -> bool:
        """Whether every pair gets the probability 1/2."""
        return all(probability <= 0.5 for _, probability in self.steps) if self.steps else self.scale == 0.0

    def rounded(self, digits: int = 6) -> SignalCalibration:
        """Return the calibration with the precision of numbers in files, or of a command line."""
        steps = tuple((round(size, digits), round(probability, digits)) for size, probability in self.steps)
        weights = {name: round(weight, digits) for name, weight in self.weights.items()}
        return SignalCalibration(weights, round(self.bias, digits), round(self.scale, digits), steps, self.of)

    def probability(self, looks: Looks) -> float:
        """Compute the probability that the first reply is better.

        Example:
            >>> even = dict.fromkeys(SIGNALS, 0.0)
            >>> found = SignalCalibration({**even, "agreement": 0.5, "margin": 0.25}, bias=1.0)
            >>> round(found.probability(Looks((3.0, 1.0))), 3)  # y = 2 and 2, each of 0.5 + 0.25 * 2
            0.881
        """
        weight_F = np.array([self.weights[name] for name in SIGNALS])
        if self.steps and self.of == "looks":
            odds_L = [log_odds(step_probability(self.steps, size)) for size in _sizes(looks, self.bias, weight_F)]
            return sigmoid(float(np.sign(unbiased_looks(looks, self.bias)) @ np.array(odds_L)))
        z = _total(looks, self.bias, weight_F)
        if not self.steps:
            return sigmoid(self.scale * z)
        confidence = step_probability(self.steps, abs(z))
        return 0.5 if z == 0 else confidence if z > 0 else 1.0 - confidence


# -- fits ---------------------------------------------------------------------------------------------------------------


def fit_signals_to_consistency(
    pairs: Sequence[Looks], shape: Shape, groups: Sequence[Hashable] | None = None
) -> SignalCalibration | None:
    """Fit to the agreement of both orders: the signals of each look predict the preference of the other one.

    With a the accuracy of a look that the agreement of all pairs shows (`agreement_accuracy`), and the other look's errors
    independent of these signals, the two agree with probability c = q a + (1 - q)(1 - a), where q is the chance that this look
    is right. The weights maximise this likelihood by expectation maximisation, as in learning from noisy labels with a known
    error rate (Raykar et al. 2010, section 2.3, https://jmlr.org/papers/v11/raykar10a.html). The temperature is such that the
    mean of σ(scale g) is the lower bound of a; the isotonic regression is of c, and

        q = (c - (1 - a)) / (2 a - 1)        between 1/2 and 1 - 1 / (N + 2), and shrunk to the lower bound of a

    As with `fit_to_consistency`, mistakes that both orders make are not seen.

    Args:
        pairs: pairs with two looks each, none of them a tie.
        shape: the second map. `isotonic` needs `FEWEST_FOR_ISOTONIC` looks with a preference in both orders, of which a group
            counts as two; with fewer a temperature is fitted, which the result shows.
        groups: Optional. [N] question of each pair; its looks are in one fold. Default: each pair has its own.

    Returns:
        The calibration; None with fewer than `FEWEST_PAIRS` pairs.

    Raises:
        ValueError: a pair has not two looks.
    """
    if any(len(pair.values) != 2 for pair in pairs):
        raise ValueError("the consistency of a judge is measured on pairs with two looks: in order, and swapped")
    if len(pairs) < FEWEST_PAIRS:
        return None
    bias = position_bias(pairs)
    y_N2 = np.array([unbiased_looks(pair, bias) for pair in pairs])
    agreement, known_N = sign_agreement(y_N2), np.all(y_N2 != 0, axis=1)
    low, _ = wilson_interval(round(agreement * len(pairs)), len(pairs))
    likely, least = agreement_accuracy(agreement), agreement_accuracy(low)
    if least <= 0.5:
        return SignalCalibration(weighted(SIGNALS, np.zeros(len(SIGNALS))), bias, 0.0)
    # Two rows per pair: each look with its signals, and the choice of the other one.
    sign_M = np.sign(y_N2[known_N]).ravel()
    x_MF = sign_M[:, None] * np.concatenate([_signals(pair, bias) for pair, one in zip(pairs, known_N, strict=True) if one])
    other_M = (np.sign(y_N2[known_N][:, ::-1]).ravel() + 1) / 2
    fit = partial(_fit_noisy, accuracy=likely)
    known = [group for group, one in zip(groups or range(len(pairs)), known_N, strict=True) if one]
    group_M = [group for group in known for _ in range(2)]
    weights, held_MF = fit(x_MF, other_M), out_of_fold(x_MF, other_M, fit, group_M)
    size_M = np.maximum(sign_M * (x_MF * held_MF).sum(1), 0.0)
    if shape == "isotonic" and 2 * len(set(known)) >= FEWEST_FOR_ISOTONIC:
        agreed_M = ((sign_M + 1) / 2 == other_M).astype(np.float64)
        steps = _of_looks(fit_steps(size_M, agreed_M), likely, least, len(size_M))
        return SignalCalibration(weighted(SIGNALS, weights), bias, 1.0, steps, "looks")
    return SignalCalibration(weighted(SIGNALS, weights), bias, matching_slope(size_M, least))


def _fit_noisy(x_MF: Floats, other_M: Floats, accuracy: float) -> Floats:
    """Fit weights to the choices of the other look, which is right with this probability."""
    # The chance that the first reply is better, given both looks; at first from the other look alone.
    chance_M = np.where(other_M == 1, accuracy, 1.0 - accuracy)
    weights = fit_weights(x_MF, chance_M, _MARGIN)
    for _ in range(_ROUNDS):
        prior_M = sigmoid(x_MF @ weights)
        first_M = prior_M * np.where(other_M == 1, accuracy, 1.0 - accuracy)
        second_M = (1.0 - prior_M) * np.where(other_M == 1, 1.0 - accuracy, accuracy)
        weights = fit_weights(x_MF, first_M / (first_M + second_M), _MARGIN)
    return weights


def fit_signals_to_labels(pairs: Sequence[Looks], labels: Sequence[bool], shape: Shape) -> SignalCalibration | None:
    """Fit to labels: the signals of all looks together predict which reply is better.

    Args:
        pairs: [N] pairs, none of them a tie.
        labels: [N] whether the first reply is better.
        shape: the second map, fitted to out-of-fold logits: a temperature with a normal prior on its logarithm
            (`fit_temperature`), or an isotonic regression, as in `fit_signals_to_consistency`.

    Returns:
        The calibration; None with fewer than `FEWEST_PAIRS` pairs.

    Raises:
        ValueError: the lengths differ.
    """
    if len(pairs) != len(labels):
        raise ValueError(f"every pair needs a label, got {len(pairs)} pairs and {len(labels)} labels")
    if len(pairs) < FEWEST_PAIRS:
        return None
    bias, label_N = position_bias(pairs), np.array(labels, dtype=np.float64)
    x_NF = np.array([np.sign(unbiased_looks(pair, bias)) @ _signals(pair, bias) for pair in pairs])
    fit = partial(fit_weights, main=_MARGIN)
    weights, held_NF = fit(x_NF, label_N), out_of_fold(x_NF, label_N, fit)
    z_N = np.array([_total(pair, bias, weight_F) for pair, weight_F in zip(pairs, held_NF, strict=True)])
    if shape == "isotonic" and len(pairs) >= FEWEST_FOR_ISOTONIC:
        right_N = np.where(z_N == 0, 0.5, (z_N > 0) == (label_N == 1))
        return SignalCalibration(weighted(SIGNALS, weights), bias, 1.0, fit_steps(np.abs(z_N), right_N))
    scale = 1.0 / fit_temperature(z_N.tolist(), label_N.tolist(), prior=PRIOR)
    return SignalCalibration(weighted(SIGNALS, weights), bias, scale)


def _signals(looks: Looks, bias: float) -> Floats:
    """Return the signals `[L, F]` of each look, without a sign."""
    y = unbiased_looks(looks, bias)
    entropies = looks.entropies or (0.0,) * len(y)
    rows = [(1.0, abs(v), h, looks.disagreement, abs(v) * looks.truncated) for v, h in zip(y, entropies, strict=True)]
    return np.array(rows)


def _sizes(looks: Looks, bias: float, weight_F: Floats) -> Floats:
    """Return g_l of each look. Never below 0: signals can make a look worthless, but not evidence for the other reply."""
    size_L: Floats = np.maximum(_signals(looks, bias) @ weight_F, 0.0)
    return size_L


def _total(looks: Looks, bias: float, weight_F: Floats) -> float:
    """Return z, rounded: looks that cancel prefer neither reply, and a remainder of 1e-16 would have a sign."""
    return round(float(np.sign(unbiased_looks(looks, bias)) @ _sizes(looks, bias, weight_F)), 9)


def _of_looks(steps: Steps, likely: float, least: float, count: int) -> Steps:
    """Return the chance that a look is right from the chance that the other one agrees with it."""
    most, shrunk = 1.0 - 1.0 / (count + 2), (least - 0.5) / (likely - 0.5)

    def right(agreed: float) -> float:
        chance = min(max((agreed - (1.0 - likely)) / (2.0 * likely - 1.0), 0.5), most)
        return 0.5 + (chance - 0.5) * shrunk

    return tuple((size, right(agreed)) for size, agreed in steps)
