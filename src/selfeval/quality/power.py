"""Sample size: the number of questions at which a measured difference would probably be claimed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

from selfeval.quality.comparisons import FEWEST, LEVEL
from selfeval.quality.statistics import finite

__all__ = ["POWER", "questions_needed"]

POWER = 0.8
"""Default probability that a true difference of the measured size is claimed."""


def questions_needed(differences: Sequence[float], *, power: float = POWER) -> int | None:
    """Return the number of questions at which a difference of the measured size is claimed with the given probability.

    n = (z_{1−α/2} √ψ + z_β √(ψ − δ²))² / δ² + 1 / |δ|,   δ = mean(d),   ψ = mean(d²),   α = 0.05

    With differences of −1, 0 and 1, ψ is the share of questions that are not ties, and the first term is the sample size of
    McNemar's test: Connor 1987, equation 3 (https://doi.org/10.2307/2531961). The test of `quality/comparisons.py` is exact,
    therefore conservative; 1 / |δ| is a continuity correction for it, as in Casagrande, Pike and Smith 1978
    (https://doi.org/10.2307/2530613).

    The result is a planning figure: the measured difference is itself uncertain, and the true one may be smaller. In
    simulations of the claim with 80 or more questions its probability was within 4 points of 0.8, below 30 questions within 9.

    Args:
        differences: [N], ours minus theirs on each question, in [−1, 1]: twice the distance of a score from one half, or the
            difference of two credits.
        power: probability β of a claim, in (0, 1). Default: 0.8.

    Returns:
        The number of questions, at least `FEWEST`; None if no difference was measured.

    Raises:
        ValueError: a difference is not in [−1, 1], or the power is not in (0, 1).

    Example:
        >>> questions_needed([1.0] * 6 + [-1.0] * 4)  # 60 % against 40 %, without ties
        199
    """
    if not 0 < power < 1:
        raise ValueError(f"power must be between 0 and 1, got {power}")
    d_N = finite(differences, "differences")
    if d_N.size and not -1 <= d_N.min() <= d_N.max() <= 1:
        raise ValueError(f"differences must be in [-1, 1], got {d_N.min()} to {d_N.max()}")
    delta = abs(float(d_N.mean())) if d_N.size else 0.0
    # A sum of wins and losses is exact; one of other credits may leave 1e-17 instead of 0.
    if delta < 1e-12:
        return None
    psi, normal = float((d_N * d_N).mean()), NormalDist()
    reach = normal.inv_cdf(1 - LEVEL / 2) * math.sqrt(psi) + normal.inv_cdf(power) * math.sqrt(max(0.0, psi - delta * delta))
    return max(FEWEST, math.ceil((reach / delta) ** 2 + 1 / delta))
