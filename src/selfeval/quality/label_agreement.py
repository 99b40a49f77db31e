"""Agreement of two raters on nominal labels, corrected for chance.

Shapes: N cases, L labels, R bootstrap resamples.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from selfeval.quality.statistics import Figure, bootstrap_interval

__all__ = ["cohen_kappa"]

Floats = NDArray[np.float64]
Codes = NDArray[np.int64]


def cohen_kappa(ours: Sequence[Hashable], theirs: Sequence[Hashable], *, seed: int = 0, resamples: int = 2000) -> Figure:
    """Compute Cohen's kappa with a 95 % percentile bootstrap interval.

    κ = (p_o − p_e) / (1 − p_e),   p_o = share of equal labels,   p_e = Σ_l ours_l theirs_l

    with the shares `ours_l` and `theirs_l` of label l. Cohen 1960 (https://doi.org/10.1177/001316446002000104).

    Args:
        ours: [N], labels of one rater.
        theirs: [N], labels of the other one for the same cases in the same order.
        seed: seed of the bootstrap. Default: 0.
        resamples: number R of bootstrap resamples, > 0. Default: 2000.

    Returns:
        κ in [-1, 1]: 1 for equal labels, 0 for the agreement of independent raters. None if it is undefined: no cases, or both
        raters used one and the same label. Resamples on which it is undefined are left out of the interval.

    Raises:
        ValueError: the lengths differ.

    Example:
        >>> round(cohen_kappa("aabb", "aabc").value, 4)  # p_o = 3/4, p_e = 1/4 + 1/8
        0.6
    """
    if len(ours) != len(theirs):
        raise ValueError(f"two raters need equal numbers of labels, got {len(ours)} and {len(theirs)}")
    if not ours:
        return Figure(None, None, None, 0)
    names = {label: code for code, label in enumerate(dict.fromkeys([*ours, *theirs]))}
    a_N, b_N = (np.array([names[label] for label in labels]) for labels in (ours, theirs))
    value = float(_kappa(a_N[None], b_N[None], len(names))[0])
    if np.isnan(value):
        return Figure(None, None, None, len(ours))
    low, high = bootstrap_interval(
        lambda index_RN: _kappa(a_N[index_RN], b_N[index_RN], len(names)), len(ours), seed=seed, resamples=resamples
    )
    return Figure(value, low, high, len(ours))


def _kappa(a_RN: Codes, b_RN: Codes, labels: int) -> Floats:
    """Return κ of each resample, NaN where it is undefined."""
    observed_R = (a_RN == b_RN).mean(-1)
    expected_R = sum(((a_RN == code).mean(-1) * (b_RN == code).mean(-1) for code in range(labels)), np.zeros(len(a_RN)))
    # Compared exactly: p_e is 1 only if both raters used a single label.
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(expected_R < 1, (observed_R - expected_R) / (1 - expected_R), np.nan)
