"""Labels of several raters: their majority, the credit of a preference, and their agreement corrected for chance.

Shapes: N cases (for alpha, those with two labels or more), L labels, R bootstrap resamples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from selfeval.quality.statistics import Figure, bootstrap_interval

__all__ = ["cohen_kappa", "credit_of", "krippendorff_alpha", "majority"]

Floats = NDArray[np.float64]
Codes = NDArray[np.int64]

L = TypeVar("L", bound=Hashable)


def majority(labels: Sequence[L]) -> L | None:
    """Return the most frequent label; None if there is none, or if several are as frequent.

    Example:
        >>> majority(["first", "tie", "first"]), majority(["first", "tie", "second"])
        ('first', None)
    """
    counts = Counter(labels).most_common(2)
    if not counts or (len(counts) == 2 and counts[0][1] == counts[1][1]):
        return None
    return counts[0][0]


def credit_of(preference: float, label: str | None) -> float:
    """Return 1 if a preference for the first reply (positive) or the second (negative) is people's, 0 if not, 1/2 for none."""
    return 0.5 if preference == 0 else float((preference > 0) == (label == "first"))


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


def krippendorff_alpha(labels: Sequence[Sequence[Hashable | None]], *, seed: int = 0, resamples: int = 2000) -> Figure:
    """Compute Krippendorff's alpha for nominal labels of any number of raters, with a 95 % percentile bootstrap interval.

    α = 1 − D_o / D_e,   D_o = Σ_u Σ_l n_ul (m_u − n_ul) / (m_u − 1) / n,   D_e = Σ_l n_l (n − n_l) / (n (n − 1))

    with n_ul raters that give case u the label l, m_u = Σ_l n_ul labels of the case, n_l = Σ_u n_ul and n = Σ_l n_l. Cases
    with fewer than two labels carry no information and are left out. Krippendorff 2011, "Computing Krippendorff's
    Alpha-Reliability", section C (https://repository.upenn.edu/asc_papers/43).

    Args:
        labels: the labels of each case, one per rater; None if the rater gave no label.
        seed: seed of the bootstrap over cases. Default: 0.
        resamples: number R of bootstrap resamples, > 0. Default: 2000.

    Returns:
        α, at most 1: 1 for equal labels, 0 for the agreement of independent raters. None if it is undefined: no case with two
        labels, or only one label was used. Resamples on which it is undefined are left out of the interval.

    Example:
        >>> round(krippendorff_alpha(list(zip("0100000010", "1110010000"))).value, 3)
        0.095
    """
    known = [[label for label in case if label is not None] for case in labels]
    paired = [case for case in known if len(case) > 1]
    if not paired:
        return Figure(None, None, None, 0)
    names = {label: code for code, label in enumerate(dict.fromkeys(label for case in paired for label in case))}
    counts_NL = np.zeros((len(paired), len(names)))
    for place, case in enumerate(paired):
        for label in case:
            counts_NL[place, names[label]] += 1
    size_N = counts_NL.sum(-1)
    disagreement_N = (counts_NL * (size_N[:, None] - counts_NL)).sum(-1) / (size_N - 1)
    value = float(_alpha(disagreement_N.sum()[None], counts_NL.sum(0)[None])[0])
    if np.isnan(value):
        return Figure(None, None, None, len(paired))
    low, high = bootstrap_interval(
        lambda index_RN: _alpha(disagreement_N[index_RN].sum(-1), counts_NL[index_RN].sum(1)),
        len(paired),
        seed=seed,
        resamples=resamples,
    )
    return Figure(value, low, high, len(paired))


def _alpha(disagreement_R: Floats, counts_RL: Floats) -> Floats:
    """Return α of each resample, NaN where only one label occurs."""
    n_R = counts_RL.sum(-1)
    # n times D_e; the factor 1 / n of D_o cancels.
    expected_R = (counts_RL * (n_R[:, None] - counts_RL)).sum(-1) / (n_R - 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(expected_R > 0, 1 - disagreement_R / expected_R, np.nan)
