"""Pearson's chi-square test."""

from __future__ import annotations

import torch

__all__ = ["chi_square_p", "p_value"]


def p_value(statistic: float, freedom: int) -> float:
    """Return the upper tail probability of the chi-square distribution."""
    return float(torch.special.gammaincc(torch.tensor(freedom / 2, dtype=torch.float64), torch.tensor(statistic / 2).double()))


def chi_square_p(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Run Pearson's test; cells with an expected count below 5 are merged."""
    expected = probabilities * counts.sum() / probabilities.sum()
    big = expected >= 5
    observed = torch.cat([counts[big], counts[~big].sum()[None]])
    wanted = torch.cat([expected[big], expected[~big].sum()[None]]).clamp_min(1e-9)
    return p_value(float(((observed - wanted) ** 2 / wanted).sum()), len(wanted) - 1)
