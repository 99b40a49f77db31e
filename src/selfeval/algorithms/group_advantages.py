"""Critic-free advantages: the reward of a reply relative to other replies to the same question, or to the batch.

Shapes: B batch, T time, G groups. A mask marks the tokens to KEEP: True = this token counts.

A group is the replies to one question. Its id may be any integer, its rows may be anywhere in the batch, and groups may differ
in size. The advantage is that of the whole reply; `masked.broadcast_to_tokens` assigns it to all its tokens.

A group without information has an advantage of 0: a single reply, which cannot be compared, or replies with equal rewards. The
floating-point mean of equal numbers often differs from that number, and the rounding error, divided by a tiny standard
deviation, would look like a real advantage.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from selfeval.algorithms.masked import (
    at_least_float32,
    broadcast_to_tokens,
    check_same_shape,
    check_scalar,
    whiten,
    zero_padding,
)
from selfeval.algorithms.returns import discounted_returns

__all__ = [
    "batch_std_advantages",
    "grpo_advantages",
    "mean_only_advantages",
    "reinforce_pp_advantages",
    "reinforce_pp_baseline_advantages",
    "remax_advantages",
    "rloo_advantages",
]


def grpo_advantages(
    rewards_B: Tensor,
    groups_B: Tensor,
    *,
    correction: Literal[0, 1] = 1,
    eps: float = 1e-6,
    noise_B: Tensor | None = None,
) -> Tensor:
    """Compute the advantages of GRPO: rewards whitened within their group.

    A_i = (R_i − mean) / (std + eps),   std = √(Σ (R − mean)² / (n − correction)),   n = replies in the group

    Division by the standard deviation upweights questions that are nearly always (or never) solved. Dr. GRPO considers this a
    bias, see `mean_only_advantages`. Shao et al. 2024, section 4.1.2 (https://arxiv.org/abs/2402.03300).

    Args:
        rewards_B: [B], reward of the whole reply, any range.
        groups_B: [B], integer id of the question that it answers.
        correction: 1 divides by n − 1 (public code), 0 by n.
        eps: added to the standard deviation, in units of reward, >= 0; public code uses 1e-9 to 1e-4.
        noise_B: Optional. [B], rounding error of each reward, >= 0. Rewards of a group that differ by at most twice its largest
            rounding error count as equal; otherwise the division would turn rounding errors into advantages of order 1.

    Returns:
        Advantages [B], without unit; 0 in groups of one and in groups of equal rewards.

    Raises:
        ValueError: the shapes differ, or the ids are not integers.

    Example:
        >>> grpo_advantages(torch.tensor([1.0, 0.0, 5.0]), torch.tensor([7, 7, 2]), correction=0, eps=0.0).tolist()
        [1.0, -1.0, 0.0]
    """
    check_scalar(eps=eps)
    groups = _grouped(rewards_B, groups_B, noise_B)
    # The clamp concerns groups of one with correction 1: their centred reward is 0, and 0 / 1 is 0 where 0 / 0 is NaN.
    variance_B = _group_sums(groups.centred_B.square(), groups.rows_B) / (groups.sizes_B - correction).clamp(min=1)
    return _divided(groups.centred_B, variance_B.sqrt() + eps).to(rewards_B.dtype)


def mean_only_advantages(rewards_B: Tensor, groups_B: Tensor) -> Tensor:
    """Compute the advantages of Dr. GRPO: rewards minus the mean of their group, A_i = R_i − mean.

    Liu et al. 2025, section 3.2 (https://arxiv.org/abs/2503.20783). R_i counts in its baseline, which scales the gradient
    by (n − 1) / n; `rloo_advantages` is the same without this factor.

    Args:
        rewards_B: [B], reward of the whole reply, any range.
        groups_B: [B], integer id of the question that it answers.

    Returns:
        Advantages [B], in units of reward; 0 in groups of one and in groups of equal rewards.

    Raises:
        ValueError: the shapes differ, or the ids are not integers.
    """
    return _grouped(rewards_B, groups_B).centred_B.to(rewards_B.dtype)


def rloo_advantages(rewards_B: Tensor, groups_B: Tensor) -> Tensor:
    """Compute the advantages of REINFORCE leave-one-out: the reward minus the mean of the *other* replies of the group.

    A_i = R_i − 1/(n − 1) Σ_{j≠i} R_j = n / (n − 1) (R_i − mean)

    The baseline does not depend on the reply, so the gradient is unbiased. Kool et al. 2019
    (https://openreview.net/forum?id=r1lgTGL5DE); for language models: Ahmadian et al. 2024
    (https://arxiv.org/abs/2402.14740).

    Args:
        rewards_B: [B], reward of the whole reply, any range.
        groups_B: [B], integer id of the question that it answers.

    Returns:
        Advantages [B], in units of reward; 0 in groups of one and in groups of equal rewards.

    Raises:
        ValueError: the shapes differ, or the ids are not integers.

    Example:
        >>> rloo_advantages(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([0, 0, 0])).tolist()
        [1.5, -1.5, 0.0]
    """
    groups = _grouped(rewards_B, groups_B)
    return (groups.centred_B * groups.sizes_B / (groups.sizes_B - 1).clamp(min=1)).to(rewards_B.dtype)


def batch_std_advantages(rewards_B: Tensor, groups_B: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Compute advantages with the mean of the group and the scale of the batch.

    A_i = (R_i − mean of the group) / (std of all rewards of the batch, n − 1, + eps)

    The size of a step does not depend on the unit of the reward, and questions with little spread are not upweighted. Liu et
    al. 2025, Lite PPO (https://arxiv.org/abs/2508.08221).

    Args:
        rewards_B: [B], reward of the whole reply, any range.
        groups_B: [B], integer id of the question that it answers.
        eps: added to the deviation, in units of reward, >= 0.

    Returns:
        Advantages [B], without unit; 0 in groups of one and in groups of equal rewards, also when that is the batch.

    Raises:
        ValueError: the shapes differ, or the ids are not integers.
    """
    check_scalar(eps=eps)
    centred_B = _grouped(rewards_B, groups_B).centred_B
    # Not Tensor.std: it warns and returns NaN for a batch of one, where the answer is 0.
    exact_B = rewards_B.to(centred_B.dtype)
    squares = (exact_B - exact_B.mean()).square().sum()
    return _divided(centred_B, (squares / max(len(rewards_B) - 1, 1)).sqrt() + eps).to(rewards_B.dtype)


def remax_advantages(rewards_BT: Tensor, mask_BT: Tensor, baselines_B: Tensor) -> Tensor:
    """Compute the advantages of ReMax: the reward-to-go minus the reward of the greedy reply.

    A_t = Σ_{k≥t} r_k − b,   b = reward of the greedy reply to the same question

    The baseline needs one additional reply per question, but no group. Li et al. 2024, algorithm 1
    (https://arxiv.org/abs/2310.10505).

    Args:
        rewards_BT: [B, T], reward for token t, garbage where the mask is False.
        mask_BT: [B, T], True = token of the reply.
        baselines_B: [B], b, in units of reward.

    Returns:
        Advantages [B, T], in units of reward, 0 where the mask is False.

    Raises:
        ValueError: the shapes differ, or baselines are not one per row.
    """
    return discounted_returns(rewards_BT, mask_BT, gamma=1.0) - broadcast_to_tokens(baselines_B, mask_BT)


def reinforce_pp_advantages(
    rewards_BT: Tensor, mask_BT: Tensor, *, gamma: float, correction: Literal[0, 1] = 1, eps: float = 1e-8
) -> Tensor:
    """Compute the advantages of REINFORCE++: returns of the tokens, whitened over the whole batch.

    A_t = (G_t − μ) / √(var + eps),   G_t = r_t + γ G_{t'}

    The batch is the baseline, so one reply per question is enough. Long replies have a larger weight in μ, which is a mean over
    tokens. Hu et al. 2025 (https://arxiv.org/abs/2501.03262).

    Args:
        rewards_BT: [B, T], reward for token t, KL penalty included (`kl_shaped_rewards`); garbage where the mask is
            False.
        mask_BT: [B, T], True = token of the reply.
        gamma: discount per token, in [0, 1]; 1 in the paper.
        correction: as in `whiten`.
        eps: as in `whiten`.

    Returns:
        Advantages [B, T], without unit, 0 where the mask is False.

    Raises:
        ValueError: the shapes differ, or fewer than two tokens count.
    """
    check_scalar(gamma=gamma, eps=eps)
    return whiten(discounted_returns(rewards_BT, mask_BT, gamma=gamma), mask_BT, correction=correction, eps=eps)


def reinforce_pp_baseline_advantages(
    rewards_B: Tensor, groups_B: Tensor, mask_BT: Tensor, *, correction: Literal[0, 1] = 1, eps: float = 1e-8
) -> Tensor:
    """Compute the advantages of REINFORCE++ with a baseline: rewards minus the group mean, whitened over the whole batch.

    A_t = (a_i − μ) / √(var + eps),   a_i = R_i − mean of the group, at every token of reply i

    Hu et al. 2025 (https://arxiv.org/abs/2501.03262). Whitening is over tokens: if replies differ in length μ is not 0, and the
    replies of a group without information all get −μ / √var.

    Args:
        rewards_B: [B], reward of the whole reply, any range.
        groups_B: [B], integer id of the question that it answers.
        mask_BT: [B, T], True = token of the reply.
        correction: as in `whiten`.
        eps: as in `whiten`.

    Returns:
        Advantages [B, T], without unit, 0 where the mask is False.

    Raises:
        ValueError: the shapes differ, the ids are not integers, or fewer than two tokens count.
    """
    check_scalar(eps=eps)
    centred_B = mean_only_advantages(rewards_B, groups_B)
    return whiten(broadcast_to_tokens(centred_B, mask_BT), mask_BT, correction=correction, eps=eps)


class _Groups(NamedTuple):
    rows_B: Tensor  # index of the row's group in 0 .. G − 1
    sizes_B: Tensor  # replies in the row's group
    centred_B: Tensor  # reward minus the mean of the row's group, exactly 0 if all rewards of the group are equal


def _grouped(rewards_B: Tensor, groups_B: Tensor, noise_B: Tensor | None = None) -> _Groups:
    check_same_shape(rewards=rewards_B, groups=groups_B, **({} if noise_B is None else {"noise": noise_B}))
    rewards_B = rewards_B.to(at_least_float32(rewards_B.dtype))
    if groups_B.is_floating_point() or groups_B.dim() != 1:
        raise ValueError(f"groups must be integer ids [B], got {groups_B.dtype} {list(groups_B.shape)}")
    # Renumber the ids to 0 .. G − 1, so they can index the buffers of the group sums.
    _, rows_B, sizes_G = groups_B.unique(return_inverse=True, return_counts=True)
    sizes_B = sizes_G[rows_B]
    centred_B = rewards_B - _group_sums(rewards_B, rows_B) / sizes_B
    # Compare the extremes, because rounding may leave the centred values of equal rewards slightly off 0.
    low_B, high_B = _group_extremes(rewards_B, rows_B, "amin"), _group_extremes(rewards_B, rows_B, "amax")
    differ_B = low_B != high_B
    if noise_B is not None:
        differ_B &= ~(high_B - low_B <= 2.0 * _group_extremes(noise_B.to(rewards_B), rows_B, "amax"))  # NaN differs
    return _Groups(rows_B, sizes_B, zero_padding(centred_B, differ_B))


def _group_sums(x_B: Tensor, rows_B: Tensor) -> Tensor:
    # B entries are enough, because there are at most B groups; the surplus is never read.
    return x_B.new_zeros(len(x_B)).index_add(0, rows_B, x_B)[rows_B]


def _group_extremes(x_B: Tensor, rows_B: Tensor, which: Literal["amin", "amax"]) -> Tensor:
    # include_self=False: the zeros of the buffer are not rewards.
    return x_B.new_zeros(len(x_B)).scatter_reduce(0, rows_B, x_B, which, include_self=False)[rows_B]


def _divided(centred_B: Tensor, scale_B: Tensor) -> Tensor:
    # 0 / 0 (eps = 0, equal rewards) must be 0, not NaN.
    return torch.where(centred_B != 0, centred_B / scale_B, torch.zeros_like(centred_B))
