"""Calibrate the probabilities of a judge, on its own consistency or on labels.

A judge looks at a pair once or, in both orders, twice. A look is the log-odds x = log(p / (1 - p)) of its probability p that
the first reply is better. With the reply shown first favoured by b (in log-odds), the looks are

    x_1 = s_1 + b   in order          y_1 = x_1 - b
    x_2 = s_2 - b   swapped           y_2 = x_2 + b

and the calibrated probability that the first reply is better is σ(w Σ y). One slope w serves the pairs whose judge finished,
another one the pairs with an output that was cut off and read nevertheless.

Shapes: N pairs; a pair has one look or two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from selfeval.quality.calibration import fit_temperature
from selfeval.quality.statistics import sigmoid, wilson_interval

__all__ = [
    "FEWEST_PAIRS",
    "PRIOR",
    "Calibration",
    "Looks",
    "agreement_accuracy",
    "fit_to_consistency",
    "fit_to_labels",
    "log_odds",
    "matching_slope",
    "position_bias",
    "sign_agreement",
    "unbiased_agreement",
    "unbiased_looks",
]

T = TypeVar("T")
Floats = NDArray[np.float64]

FEWEST_PAIRS = 50
"""Pairs below which nothing is fitted."""
PRIOR = 0.5
"""Standard deviation of the normal prior on log w of labels, as for the temperature of the evaluator."""
_LARGEST = 1e-4
"""Probabilities are clipped to [1e-4, 1 - 1e-4]: closer to 0 or 1 their log-odds depend on rounding."""
_STEEPEST = 10.0
_HALVINGS = 60


@dataclass(frozen=True)
class Looks:
    """The verdict of a judge on a pair, as log-odds.

    Attributes:
        values: log-odds that the first reply is better, one or two: in order, swapped.
        truncated: whether an output was cut off, and its verdict read after an appended lead.
        entropies: entropy in nats of the sampled votes of each look. Default: none were sampled.
        disagreement: share of the votes of a combined judge's members that are against its choice, in [0, 1/2]. Default: 0.
    """

    values: tuple[float, ...]
    truncated: bool = False
    entropies: tuple[float, ...] = ()
    disagreement: float = 0.0


@dataclass(frozen=True)
class Calibration:
    """A map from the looks of a judge to a probability.

    Attributes:
        slope: w of pairs whose judge finished.
        truncated_slope: w of pairs with an output that was cut off.
        bias: b, in log-odds; positive if the judge favours the reply shown first.
    """

    slope: float
    truncated_slope: float
    bias: float = 0.0

    @property
    def is_useless(self) -> bool:
        """Whether every pair gets the probability 1/2."""
        return max(self.slope, self.truncated_slope) == 0.0

    def probability(self, looks: Looks) -> float:
        """Compute the probability that the first reply is better: σ(w Σ y).

        Example:
            >>> Calibration(slope=0.5, truncated_slope=0.0, bias=1.0).probability(Looks((3.0, -1.0)))  # y = 2 and 0
            0.7310585786300049
        """
        slope = self.truncated_slope if looks.truncated else self.slope
        return sigmoid(slope * math.fsum(unbiased_looks(looks, self.bias)))


def log_odds(probability: float) -> float:
    """Return log(p / (1 - p)), with p clipped to [1e-4, 1 - 1e-4]."""
    clipped = min(max(probability, _LARGEST), 1.0 - _LARGEST)
    return math.log(clipped) - math.log1p(-clipped)


def agreement_accuracy(agreement: float) -> float:
    """Return the accuracy of each of two equally good, independent looks that agree with this probability.

    c = a² + (1 - a)², so a = (1 + √(2c - 1)) / 2; 1/2 if they agree no more often than by chance. This is the one-coin model of
    Dawid and Skene (1979, https://doi.org/10.2307/2346806) with two observers.

    Example:
        >>> agreement_accuracy(0.68)
        0.8
    """
    return (1.0 + math.sqrt(max(0.0, round(2.0 * agreement - 1.0, 12)))) / 2.0


def fit_to_consistency(pairs: Sequence[Looks]) -> Calibration | None:
    """Calibrate a judge that compares in both orders on the agreement of its orders, without labels.

    b is the median of (x_1 - x_2) / 2. With c the lower bound of Wilson's 95 % interval of the share of pairs whose y_1 and y_2
    have the same sign, the accuracy of a look is a = `agreement_accuracy`(c), and w is such that the mean confidence of a look
    is that:

    mean σ(w |y|) = a

    The lower bound, because a is very steep in c near chance: 56 % of agreement would give each look 67 %. A judge that is not
    shown to agree with itself more often than by chance gets w = 0, a probability of 1/2 for every pair. The probability of a
    pair takes the errors of both orders as independent. A mistake that does not depend on the order is not seen, so this is an
    upper bound of the confidence that the judge deserves; only labels can show a lower one.

    Args:
        pairs: pairs with two looks each, none of them a tie.

    Returns:
        The calibration, with w of at most 10. Truncated pairs have the slope of all pairs if there are fewer than
        `FEWEST_PAIRS` of them, and so have the others. None with fewer than `FEWEST_PAIRS` pairs.

    Raises:
        ValueError: a pair has not two looks.
    """
    if any(len(pair.values) != 2 for pair in pairs):
        raise ValueError("the consistency of a judge is measured on pairs with two looks: in order, and swapped")
    if len(pairs) < FEWEST_PAIRS:
        return None
    bias = position_bias(pairs)
    cut = [pair for pair in pairs if pair.truncated]
    whole = [pair for pair in pairs if not pair.truncated]
    slope, truncated = (_consistent_slope(_enough(some, pairs), bias) for some in (whole, cut))
    return Calibration(slope, truncated, bias)


def unbiased_agreement(pairs: Sequence[Looks]) -> float:
    """Return the share of pairs whose two looks prefer the same reply after the position bias is subtracted.

    A look that prefers neither counts one half; 1/2 without pairs. The bias is that of these pairs (`fit_to_consistency`).

    Args:
        pairs: pairs with two looks each.

    Example:
        >>> unbiased_agreement([Looks((4.0, -3.0)), Looks((3.0, -4.0)), Looks((5.0, -6.0)), Looks((9.0, -8.0))])
        0.75
    """
    return sign_agreement(np.array([unbiased_looks(pair, position_bias(pairs)) for pair in pairs])) if pairs else 0.5


def fit_to_labels(pairs: Sequence[Looks], labels: Sequence[bool]) -> Calibration | None:
    """Calibrate a judge on labels.

    b is the median of (x_1 - x_2) / 2 over the pairs with two looks (0 without any), and w = 1 / T with the temperature T of
    `fit_temperature` on Σ y, with a normal prior on log T of standard deviation 0.5 around 0.

    Args:
        pairs: [N] pairs, none of them a tie.
        labels: [N] whether the first reply is better.

    Returns:
        The calibration; see `fit_to_consistency`.

    Raises:
        ValueError: the lengths differ.
    """
    if len(pairs) != len(labels):
        raise ValueError(f"every pair needs a label, got {len(pairs)} pairs and {len(labels)} labels")
    if len(pairs) < FEWEST_PAIRS:
        return None
    bias = position_bias(pairs)
    labelled = list(zip(pairs, labels, strict=True))
    cut = [one for one in labelled if one[0].truncated]
    whole = [one for one in labelled if not one[0].truncated]
    slope, truncated = (_labelled_slope(_enough(some, labelled), bias) for some in (whole, cut))
    return Calibration(slope, truncated, bias)


def _enough(some: Sequence[T], every: Sequence[T]) -> Sequence[T]:
    return some if len(some) >= FEWEST_PAIRS else every


def unbiased_looks(looks: Looks, bias: float) -> list[float]:
    """Return the looks less the position bias: y_1 and y_2, or the only look as it is."""
    if len(looks.values) == 1:
        return list(looks.values)
    first, second = looks.values
    # Rounded: a look that is all bias prefers neither reply, and its remainder of 1e-16 would have a sign.
    return [round(first - bias, 9), round(second + bias, 9)]


def position_bias(pairs: Sequence[Looks]) -> float:
    """Return b, the median position bias of the pairs with two looks; 0 without any."""
    both = [pair.values for pair in pairs if len(pair.values) == 2]
    return median((first - second) / 2 for first, second in both) if both else 0.0


def sign_agreement(y_N2: Floats) -> float:
    """Return the share of pairs whose two looks `[N, 2]` have the same sign."""
    # A look of exactly 0 agrees with half of the others.
    return fmean((np.sign(y_N2[:, 0]) * np.sign(y_N2[:, 1]) + 1.0) / 2.0)


def _consistent_slope(pairs: Sequence[Looks], bias: float) -> float:
    y_N2 = np.array([unbiased_looks(pair, bias) for pair in pairs])
    low, _ = wilson_interval(round(sign_agreement(y_N2) * len(pairs)), len(pairs))
    return matching_slope(np.abs(y_N2).ravel(), agreement_accuracy(low))


def matching_slope(size_M: Floats, accuracy: float) -> float:
    """Return w in [0, 10] with mean σ(w |y|) = accuracy, by bisection; the bound if none is steep enough."""
    low, high = 0.0, _STEEPEST
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if float(sigmoid(middle * size_M).mean()) < accuracy else (low, middle)
    return low


def _labelled_slope(labelled: Sequence[tuple[Looks, bool]], bias: float) -> float:
    sums = [math.fsum(unbiased_looks(pair, bias)) for pair, _ in labelled]
    return 1.0 / fit_temperature(sums, [float(label) for _, label in labelled], prior=PRIOR)
