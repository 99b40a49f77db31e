"""Losses that move a policy, and the two numbers that say whether the step was too long.

Shapes: B batch, T time. A mask says what is KEPT: True = this token counts.
A loss is returned per token; `masked.aggregate` reduces it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from selfeval.algorithms.kl import k3
from selfeval.algorithms.masked import check_same_shape, masked_mean, zero_padding

__all__ = ["approximate_kl", "clip_fraction", "ppo_clip_loss"]


def ppo_clip_loss(
    logprobs_BT: Tensor, old_logprobs_BT: Tensor, advantages_BT: Tensor, *, clip_low: float, clip_high: float
) -> Tensor:
    """Compute the clipped surrogate loss of PPO per token.

    l_t = max(−A_t r_t, −A_t clip(r_t, 1 − clip_low, 1 + clip_high)),   r_t = exp(log π_t − log π_old,t)

    The gradient is 0 where the ratio has already left the range in the direction that the advantage asks for. Schulman
    et al. 2017, eq. 7 (https://arxiv.org/abs/1707.06347); two bounds: DAPO, section 3.1
    (https://arxiv.org/abs/2503.14476).

    Args:
        logprobs_BT: [B, T], log π of the drawn token under the policy that is being trained, <= 0. Zero non-finite
            padding first (`zero_padding`): the loss is not masked here, and exp of garbage poisons the gradient.
        old_logprobs_BT: [B, T], the same under the policy that drew it; no gradient.
        advantages_BT: [B, T], how much better than expected, any range; no gradient.
        clip_low: lower half-width of the trusted range, in (0, 1); 0.2 is usual.
        clip_high: upper half-width, > 0; 0.2 is usual, 0.28 in DAPO.

    Returns:
        Loss [B, T], to be minimised, not masked.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> logprobs, old_logprobs = torch.tensor([[0.5, 0.375]]).log(), torch.tensor([[0.25, 0.5]]).log()
        >>> ppo_clip_loss(logprobs, old_logprobs, torch.ones(1, 2), clip_low=0.25, clip_high=0.25)
        tensor([[-1.2500, -0.7500]])
    """
    unclipped_BT, clipped_BT = _surrogates(logprobs_BT, old_logprobs_BT, advantages_BT, clip_low, clip_high)
    return torch.maximum(unclipped_BT, clipped_BT)


def clip_fraction(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> Tensor:
    """Measure the share of tokens on which the clip acts, i.e. on which the clipped loss is strictly the larger one.

    This is smaller than the share of ratios outside the range: a ratio that left it *against* its advantage is not
    clipped. Schulman et al. 2017, eq. 7 (https://arxiv.org/abs/1707.06347).

    Args:
        logprobs_BT: [B, T], as in `ppo_clip_loss`; garbage where the mask is False.
        old_logprobs_BT: [B, T], as in `ppo_clip_loss`.
        advantages_BT: [B, T], as in `ppo_clip_loss`.
        mask_BT: [B, T], True = token counts.
        clip_low: as in `ppo_clip_loss`.
        clip_high: as in `ppo_clip_loss`.

    Returns:
        Scalar in [0, 1]; NaN when no token counts.

    Raises:
        ValueError: the shapes differ.
    """
    unclipped_BT, clipped_BT = _surrogates(logprobs_BT, old_logprobs_BT, advantages_BT, clip_low, clip_high)
    return masked_mean((clipped_BT > unclipped_BT).to(logprobs_BT.dtype), mask_BT)


def approximate_kl(logprobs_BT: Tensor, old_logprobs_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Estimate KL(π_old‖π), how far this update has moved, from tokens drawn by π_old.

    mean of exp(x) − 1 − x,   x = log π − log π_old

    This is k3 (unbiased, >= 0) with π_old in the place of the sampler. 0 at the first minibatch, or the log-probs of
    the rollout and of the update disagree. Schulman 2020 (http://joschu.net/blog/kl-approx.html).

    Args:
        logprobs_BT: [B, T], log π of the drawn token, garbage where the mask is False.
        old_logprobs_BT: [B, T], log π_old of the same token.
        mask_BT: [B, T], True = token counts.

    Returns:
        Scalar in nats per token, >= 0; NaN when no token counts.

    Raises:
        ValueError: the shapes differ.
    """
    return masked_mean(k3(zero_padding(old_logprobs_BT, mask_BT), zero_padding(logprobs_BT, mask_BT)), mask_BT)


def _surrogates(
    logprobs_BT: Tensor, old_logprobs_BT: Tensor, advantages_BT: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    check_same_shape(logprobs=logprobs_BT, old_logprobs=old_logprobs_BT, advantages=advantages_BT)
    ratio_BT = torch.exp(logprobs_BT - old_logprobs_BT)
    return -advantages_BT * ratio_BT, -advantages_BT * ratio_BT.clamp(1 - clip_low, 1 + clip_high)
