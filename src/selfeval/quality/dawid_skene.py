"""Accuracies of several judges without labels, and the probability that they give together.

The one-coin model of Dawid and Skene (1979, https://doi.org/10.2307/2346806): judge j names the better reply with probability
a_j, whichever reply that is, and the judges' errors are independent of each other.

Shapes: N pairs (in the steps: different rows of votes), J judges. A vote is +1 (the first reply is better), -1 (the second one)
or 0 (the judge abstains).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from selfeval.quality.statistics import sigmoid

__all__ = ["fit_accuracies", "vote_probability"]

Floats = NDArray[np.float64]

_START = 0.75
"""Accuracy of every judge before the first step: better than chance, which chooses between the fit and its mirror image."""
_STEPS, _TOLERANCE = 2000, 1e-9


def fit_accuracies(votes_NJ: Sequence[Sequence[int]]) -> tuple[float, ...]:
    """Estimate the accuracy of each judge from the judges' agreement, by expectation-maximisation.

    With w_j = log(a_j / (1 − a_j)) and n_j the number of votes v_ij ≠ 0 of judge j, until the accuracies no longer change:

    q_i = σ(Σ_j w_j v_ij)                                             probability that the first reply of pair i is better
    a_j = max(1/2, (Σ_{v_ij = 1} q_i + Σ_{v_ij = −1} (1 − q_i) + 1) / (n_j + 2))

    The prior of both replies is 1/2, because their order is random. The added pseudo-votes (the mode of Beta(2, 2)) keep the
    accuracies below 1 where few judges never disagree. A judge is not taken to be worse than chance: the fit cannot distinguish
    one judge that is from two that share a mistake.

    Only pairs with two votes or more count; a single vote says nothing about its judge. The accuracies of two judges are not
    identified by their agreement c = a_1 a_2 + (1 − a_1)(1 − a_2). The steps start at equal accuracies and keep two judges
    equal: a_1 = a_2 = (1 + √(2c − 1)) / 2, up to the pseudo-votes. From three judges on, each has its own accuracy, unless all
    but two guess. Judges that share their mistakes, for example because they are the same model, seem more accurate than they
    are.

    Args:
        votes_NJ: votes.

    Returns:
        [J], accuracies in [1/2, 1); 1/2 for a judge that never votes together with another one. Empty without pairs.

    Raises:
        ValueError: a vote is not 1, -1 or 0.

    Example:
        >>> agree, disagree = [(1, 1)] * 400 + [(-1, -1)] * 400, [(1, -1)] * 100 + [(-1, 1)] * 100
        >>> [round(a, 2) for a in fit_accuracies(agree + disagree)]
        [0.89, 0.89]
    """
    values = np.asarray(votes_NJ, dtype=np.float64)
    if not values.size:
        return ()
    if not np.isin(values, (-1.0, 0.0, 1.0)).all():
        raise ValueError("votes must be 1, -1 or 0")
    # Equal rows count together: there are at most 3^J.
    rows, weights_N = np.unique(values[np.count_nonzero(values, axis=1) > 1], axis=0, return_counts=True)
    counts_J = weights_N @ (rows != 0)
    accuracies_J = np.full(values.shape[1], _START)
    for _ in range(_STEPS):
        q_N = sigmoid(rows @ np.log(accuracies_J / (1.0 - accuracies_J)))
        right_J = (weights_N * q_N) @ (rows > 0) + (weights_N * (1.0 - q_N)) @ (rows < 0)
        found_J = np.maximum((right_J + 1.0) / (counts_J + 2.0), 0.5)
        if np.abs(found_J - accuracies_J).max(initial=0.0) < _TOLERANCE:
            break
        accuracies_J = found_J
    return tuple(map(float, found_J))


def vote_probability(votes_J: Sequence[int], accuracies_J: Sequence[float]) -> float:
    """Return the probability that the first reply is better, given the votes: σ(Σ_j v_j log(a_j / (1 − a_j))).

    A judge that abstains contributes nothing.

    Args:
        votes_J: votes of the judges.
        accuracies_J: their accuracies, in (0, 1).

    Example:
        >>> round(vote_probability((1, -1, 0), (0.9, 0.75, 0.6)), 6)  # odds 9 to 1 and 1 to 3
        0.75
    """
    return sigmoid(math.fsum(v * math.log(a / (1.0 - a)) for v, a in zip(votes_J, accuracies_J, strict=True)))
