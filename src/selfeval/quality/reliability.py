"""Agreement of several judges beyond chance: Krippendorff's alpha for nominal labels.

Shapes: U units (pairs judged), C categories.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from selfeval.quality.statistics import Figure, bootstrap_interval

__all__ = ["krippendorff_alpha"]

Floats = NDArray[np.float64]


def krippendorff_alpha(judges: Sequence[Sequence[Hashable | None]], *, seed: int = 0) -> Figure:
    """Return Krippendorff's alpha of nominal labels, with a bootstrap interval over units.

    alpha = 1 - D_o / D_e

    With n_uc the number of judges that gave unit u the category c, n_u = sum_c n_uc, n_c = sum_u n_uc and n = sum_c n_c over
    units with n_u >= 2:

    D_o = 1/n sum_u (n_u^2 - sum_c n_uc^2) / (n_u - 1)
    D_e = (n^2 - sum_c n_c^2) / (n (n - 1))

    1 is full agreement, 0 the agreement of labels drawn at random from all labels given, and less than 0 systematic
    disagreement.

    Krippendorff 2011, Computing Krippendorff's alpha-reliability, section C (https://repository.upenn.edu/asc_papers/43).

    Args:
        judges: the labels of each judge, one per unit in the same order; None where a judge gave no label.
        seed: seed of the bootstrap.

    Returns:
        alpha; `n` counts the units with at least two labels. Without two different labels among them alpha is undefined.
        The interval needs two units; it leaves out resamples with one label only, so it is too narrow on few units.

    Raises:
        ValueError: fewer than two judges, or judges with different numbers of units.

    Example:
        >>> round(krippendorff_alpha([["A", "A", "B", None], ["A", "B", "B", "A"]]).known, 3)
        0.444
    """
    counts_UC = _counts(judges)
    units = len(counts_UC)
    value = float(_alpha(counts_UC)) if units else math.nan
    if math.isnan(value) or units < 2:
        return Figure(None if math.isnan(value) else value, None, None, units)
    low, high = bootstrap_interval(lambda indices_RU: _alpha(counts_UC[indices_RU]), units, seed=seed)
    return Figure(value, low, high, units)


def _counts(judges: Sequence[Sequence[Hashable | None]]) -> Floats:
    """Count the labels of each unit that has at least two."""
    lengths = sorted({len(labels) for labels in judges})
    if len(judges) < 2 or len(lengths) > 1:
        raise ValueError(
            f"got {len(judges)} judges with {lengths} units; give at least 2 judges, each with one label or None per unit"
        )
    categories = {label: c for c, label in enumerate(dict.fromkeys(x for labels in judges for x in labels if x is not None))}
    counts_UC = np.zeros((lengths[0], len(categories)))
    for labels in judges:
        for unit, label in enumerate(labels):
            if label is not None:
                counts_UC[unit, categories[label]] += 1
    usable: Floats = counts_UC[counts_UC.sum(axis=1) >= 2]
    return usable


def _alpha(counts_UC: Floats) -> Floats:
    """Compute alpha over the last two axes; NaN where all labels are the same."""
    n_U, n_C = counts_UC.sum(axis=-1), counts_UC.sum(axis=-2)
    n = n_U.sum(axis=-1)
    chance = n**2 - (n_C**2).sum(axis=-1)
    observed = ((n_U**2 - (counts_UC**2).sum(axis=-1)) / (n_U - 1)).sum(axis=-1)
    return np.asarray(1 - (n - 1) * observed / np.where(chance == 0, np.nan, chance))
