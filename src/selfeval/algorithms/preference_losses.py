"""Learning a scalar score from pairs of replies.

Shapes: N pairs. A score is unbounded; only differences of scores of replies to one question mean something.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from selfeval.algorithms.masked import check_same_shape

__all__ = ["bradley_terry_loss", "preference_accuracy"]


def bradley_terry_loss(chosen_N: Tensor, rejected_N: Tensor, label_N: Tensor, *, margin: float | Tensor = 0.0) -> Tensor:
    """Compute the cross-entropy of the Bradley-Terry model per pair, with soft labels.

    Δ = r_chosen − r_rejected − margin,   l = −[y log σ(Δ) + (1 − y) log σ(−Δ)]

    y = 1 is the usual loss −log σ(Δ); y = 0.9 says that the judge was 90 % sure, and the optimum is Δ = log(y / (1 −
    y)) instead of infinity. Bradley and Terry 1952 (https://doi.org/10.2307/2334029); as a reward model: Ouyang et al.
    2022, eq. 1 (https://arxiv.org/abs/2203.02155); margin: Touvron et al. 2023, eq. 2
    (https://arxiv.org/abs/2307.09288).

    Args:
        chosen_N: [N], score of the reply that is called chosen.
        rejected_N: [N], score of the other reply.
        label_N: [N], probability in [0, 1] that chosen is the better one.
        margin: by how much chosen should lead, in units of score; a number or [N].

    Returns:
        Loss [N] in nats, >= 0; its mean is the usual loss.

    Raises:
        ValueError: the shapes differ, or a label is outside [0, 1] or NaN.

    Example:
        >>> import torch
        >>> bradley_terry_loss(torch.zeros(1), torch.zeros(1), torch.ones(1))
        tensor([0.6931])
    """
    check_same_shape(chosen=chosen_N, rejected=rejected_N, label=label_N)
    if not bool(((label_N >= 0) & (label_N <= 1)).all()):
        raise ValueError(f"a label is a probability in [0, 1], got {label_N.tolist()}")
    delta_N = chosen_N - rejected_N - margin
    return -label_N * functional.logsigmoid(delta_N) - (1 - label_N) * functional.logsigmoid(-delta_N)


def preference_accuracy(chosen_N: Tensor, rejected_N: Tensor) -> Tensor:
    """Measure the share of pairs whose chosen reply has the strictly higher score. A tie counts as wrong.

    Lambert et al. 2024, section 4 (https://arxiv.org/abs/2403.13787) score reward models so. An evaluator that gives
    every reply the same score is right on no pair, not on half of them.

    Args:
        chosen_N: [N], score of the better reply.
        rejected_N: [N], score of the other reply.

    Returns:
        Scalar in [0, 1]; NaN when there is no pair.

    Raises:
        ValueError: the shapes differ.
    """
    check_same_shape(chosen=chosen_N, rejected=rejected_N)
    return (chosen_N > rejected_N).to(chosen_N.dtype).mean()
