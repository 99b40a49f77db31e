"""Combine the scores of several evaluators and measure their disagreement.

Shapes: K members, N replies. Scores of different members must be in one unit (whitened, or of one training) before they
are compared. A policy finds the replies that one evaluator overrates; on those the members disagree.
"""

from __future__ import annotations

import torch
from torch import Tensor

from selfeval.algorithms.masked import check_scalar

__all__ = ["disagreement", "ensemble_mean", "uncertainty_weighted", "worst_case"]


def ensemble_mean(scores_KN: Tensor) -> Tensor:
    """Average the members: (1/K) Σ_k r_k. Coste et al. 2023, mean optimisation (https://arxiv.org/abs/2310.02743).

    Args:
        scores_KN: [K, N], score of each reply by each member.

    Returns:
        [N], in units of score.

    Raises:
        ValueError: the scores are not [K, N] with at least one member.

    Example:
        >>> import torch
        >>> ensemble_mean(torch.tensor([[1.0, 0.0], [3.0, 0.0]])).tolist()
        [2.0, 0.0]
    """
    _check_members(scores_KN)
    return scores_KN.mean(0)


def worst_case(scores_KN: Tensor) -> Tensor:
    """Take the lowest member: min_k r_k (WCO). Coste et al. 2023, worst-case optimisation (https://arxiv.org/abs/2310.02743).

    A reply must please every member. Nothing to tune; one bad member spoils it.

    Args:
        scores_KN: [K, N], score of each reply by each member.

    Returns:
        [N], in units of score.

    Raises:
        ValueError: the scores are not [K, N] with at least one member.
    """
    _check_members(scores_KN)
    return scores_KN.amin(0)


def uncertainty_weighted(scores_KN: Tensor, *, weight: float) -> Tensor:
    """Take the mean less a penalty for disagreement: mean − λ (1/K) Σ_k (r_k − mean)² (UWO).

    The variance is that of the population (1/K), as in the paper; its public code uses 1/K in one place and 1/(K − 1) in
    another. Coste et al. 2023, uncertainty-weighted optimisation (https://arxiv.org/abs/2310.02743).

    Args:
        scores_KN: [K, N], score of each reply by each member.
        weight: λ in 1 per unit of score, >= 0; 0 = the mean. 0.1 to 0.5 is usual for whitened scores.

    Returns:
        [N], in units of score.

    Raises:
        ValueError: the scores are not [K, N] with at least one member, or the weight is negative.
    """
    check_scalar(weight=weight)
    _check_members(scores_KN)
    if not weight >= 0:
        raise ValueError(f"weight must be >= 0, got {weight}: a negative one rewards disagreement")
    return scores_KN.mean(0) - weight * _centred(scores_KN).square().mean(0)


def disagreement(scores_KN: Tensor) -> Tensor:
    """Measure how far the members are apart: the standard deviation √((1/K) Σ_k (r_k − mean)²).

    Lakshminarayanan et al. 2017, section 2.4 (https://arxiv.org/abs/1612.01474) for the spread of an ensemble as its
    uncertainty.

    Args:
        scores_KN: [K, N], score of each reply by each member.

    Returns:
        [N], >= 0, in units of score; 0 for one member, which cannot disagree.

    Raises:
        ValueError: the scores are not [K, N] with at least one member.
    """
    _check_members(scores_KN)
    return _centred(scores_KN).square().mean(0).sqrt()


def _centred(scores_KN: Tensor) -> Tensor:
    """Scores less their mean over members, exactly 0 where all members agree: a mean of equal floats is often off by a bit."""
    agree_N = (scores_KN == scores_KN[:1]).all(0)
    return torch.where(agree_N, torch.zeros_like(scores_KN), scores_KN - scores_KN.mean(0))


def _check_members(scores_KN: Tensor) -> None:
    if scores_KN.dim() != 2 or not len(scores_KN):
        raise ValueError(f"scores must be [members, replies] with at least one member, got {list(scores_KN.shape)}")
