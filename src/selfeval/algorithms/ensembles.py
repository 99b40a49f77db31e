"""Combine the scores of several evaluators and measure their disagreement.

Shapes: K members, N replies. The scores of all members must have a common unit (whitened, or from one training run). A policy
exploits replies that one evaluator overrates; on those the members disagree.
"""

from __future__ import annotations

import torch
from torch import Tensor

from selfeval.algorithms.masked import check_scalar

__all__ = ["disagreement", "ensemble_mean", "uncertainty_weighted", "worst_case"]


def ensemble_mean(scores_KN: Tensor) -> Tensor:
    """Return the mean over members, (1/K) Σ_k r_k. Coste et al. 2023, mean optimisation (https://arxiv.org/abs/2310.02743).

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
    """Return the minimum over members, min_k r_k (WCO). Coste et al. 2023, worst-case optimisation (https://arxiv.org/abs/2310.02743).

    A high score needs the agreement of all members. There is nothing to tune, but a single bad member spoils the scores.

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
    """Return the mean minus a penalty for disagreement: mean − λ (1/K) Σ_k (r_k − mean)² (UWO).

    The variance is the population variance (1/K), as in the paper; its public code uses 1/K in one place and 1/(K − 1) in
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
        raise ValueError(f"weight must be >= 0, got {weight}: a negative weight rewards disagreement")
    return scores_KN.mean(0) - weight * _centred(scores_KN).square().mean(0)


def disagreement(scores_KN: Tensor) -> Tensor:
    """Return the disagreement of the members, their standard deviation √((1/K) Σ_k (r_k − mean)²).

    The spread of an ensemble as its uncertainty: Lakshminarayanan et al. 2017, section 2.4 (https://arxiv.org/abs/1612.01474).

    Args:
        scores_KN: [K, N], score of each reply by each member.

    Returns:
        [N], >= 0, in units of score; 0 for a single member.

    Raises:
        ValueError: the scores are not [K, N] with at least one member.
    """
    _check_members(scores_KN)
    return _centred(scores_KN).square().mean(0).sqrt()


def _centred(scores_KN: Tensor) -> Tensor:
    """Subtract the mean over members, with exactly 0 if all members agree: the mean of equal floats is often off by a bit."""
    agree_N = (scores_KN == scores_KN[:1]).all(0)
    return torch.where(agree_N, torch.zeros_like(scores_KN), scores_KN - scores_KN.mean(0))


def _check_members(scores_KN: Tensor) -> None:
    if scores_KN.dim() != 2 or not len(scores_KN):
        raise ValueError(f"scores must be [members, replies] with at least one member, got {list(scores_KN.shape)}")
