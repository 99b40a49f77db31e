"""Scores of the steps of replies: the loss of a step evaluator, and what a reply or a step is worth by its scores.

Shapes: S steps. The score of a step is a logit: σ(score) is the probability that the reply is right so far.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from selfeval.algorithms.masked import check_same_shape

__all__ = ["combined_score", "step_loss", "step_progress"]


def step_loss(logits_S: Tensor, labels_S: Tensor) -> Tensor:
    """Compute the cross-entropy of step scores with soft labels, per step.

    l = −[y log σ(s) + (1 − y) log σ(−s)]

    Lightman et al. 2023 (https://arxiv.org/abs/2305.20050), with labels of people; Wang et al. 2024, eq. 2
    (https://arxiv.org/abs/2312.08935), with hard or soft labels from completions. The optimum of a soft label is
    s = log(y / (1 − y)).

    Args:
        logits_S: [S], score of each step.
        labels_S: [S], label in [0, 1].

    Returns:
        [S], nats.

    Example:
        >>> step_loss(torch.zeros(2), torch.tensor([0.25, 1.0]))
        tensor([0.6931, 0.6931])
    """
    check_same_shape(logits=logits_S, labels=labels_S)
    return functional.binary_cross_entropy_with_logits(logits_S, labels_S, reduction="none")


def combined_score(logits_S: Tensor, how: Literal["min", "product", "last"]) -> Tensor:
    """Compute the score of a reply from those of its steps, as a log-probability.

    min: min_i log σ(s_i)      product: Σ_i log σ(s_i)      last: log σ(s_n)

    `product` is the probability that every step is right if the steps were independent (Lightman et al. 2023, section 2.6,
    https://arxiv.org/abs/2305.20050), and favours replies with few steps. `min` does not (Wang et al. 2024, section 3.4,
    https://arxiv.org/abs/2312.08935). `last` reads the step with the final answer, as an outcome evaluator does.

    Args:
        logits_S: [S], score of each step, S at least 1.
        how: `min`, `product` or `last`.

    Returns:
        Scalar in nats, at most 0.

    Example:
        >>> [round(float(combined_score(torch.tensor([0.0, 2.0]), how).exp()), 3) for how in ("min", "product", "last")]
        [0.5, 0.44, 0.881]
    """
    logprobs_S = functional.logsigmoid(logits_S)
    if how == "min":
        return logprobs_S.min()
    return logprobs_S.sum() if how == "product" else logprobs_S[-1]


def step_progress(logits_S: Tensor) -> Tensor:
    """Compute how much each step changes the probability that the reply is right.

    r_i = σ(s_i) − σ(s_{i−1}),   σ(s_0) = 1/2

    Setlur et al. 2024, section 3 (https://arxiv.org/abs/2410.08146): a dense reward is the progress of a step, not its score,
    which would pay for every further step. The sum is σ(s_n) − 1/2, whatever the number of steps.

    Args:
        logits_S: [S], score of each step.

    Returns:
        [S], in [−1, 1].

    Example:
        >>> step_progress(torch.tensor([0.0, 40.0, 0.0]))
        tensor([ 0.0000,  0.5000, -0.5000])
    """
    values_S = torch.sigmoid(logits_S)
    return values_S - torch.cat([torch.full_like(values_S[:1], 0.5), values_S[:-1]])
