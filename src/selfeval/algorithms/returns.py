"""What a token is worth: discounted returns and generalised advantages, over rows with padding and holes.

Shapes: B batch, T time (position of a token in its row).
A mask says what is KEPT: True = this token is part of the episode. A reward at t is paid for token t; a value at t is
the expected return *before* token t is drawn. Padding may sit left, right or inside the row and may hold anything.
"""

from __future__ import annotations

import torch
from torch import Tensor

from selfeval.algorithms.masked import check_same_shape, zero_padding

__all__ = ["discounted_returns", "gae"]


def gae(rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, *, gamma: float, lam: float) -> Tensor:
    """Estimate the advantage of every token by generalised advantage estimation.

    δ_t = r_t + γ V_{t'} − V_t,   A_t = δ_t + γ λ A_{t'}

    t' is the *next token whose mask is True*: holes (tool output, masked turns) are skipped and cost no discount. After
    the last token of a row V and A are 0: the episode ends there. The return that a critic learns is A + V. Nothing is
    whitened here.

    Schulman et al. 2016, eq. 11 to 16 (https://arxiv.org/abs/1506.02438).

    Args:
        rewards_BT: [B, T], reward for token t, any range.
        values_BT: [B, T], critic's value before token t, in units of reward.
        mask_BT: [B, T], True = token of the episode.
        gamma: discount per token, in [0, 1]; 1 for short replies with a reward at the end.
        lam: λ in [0, 1]; 0 = one-step TD error (biased, calm), 1 = Monte Carlo minus value (unbiased, noisy).

    Returns:
        Advantages [B, T], in units of reward, 0 where the mask is False.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> rewards, values = torch.tensor([[0.0, 9.0, 1.0]]), torch.tensor([[0.5, 9.0, 0.25]])
        >>> gae(rewards, values, torch.tensor([[True, False, True]]), gamma=1.0, lam=1.0).tolist()
        [[0.5, 0.0, 0.75]]
    """
    check_same_shape(rewards=rewards_BT, values=values_BT, mask=mask_BT)
    keep_BT = mask_BT.bool()
    rewards_BT, values_BT = zero_padding(rewards_BT, keep_BT), zero_padding(values_BT, keep_BT)
    next_value_B = next_advantage_B = values_BT.new_zeros(len(values_BT))
    columns: list[Tensor] = []
    for reward_B, value_B, keep_B in _backwards(rewards_BT, values_BT, keep_BT):
        advantage_B = reward_B + gamma * next_value_B - value_B + gamma * lam * next_advantage_B
        next_advantage_B = torch.where(keep_B, advantage_B, next_advantage_B)
        next_value_B = torch.where(keep_B, value_B, next_value_B)
        columns.append(next_advantage_B)
    return _in_order(columns, like_BT=rewards_BT, keep_BT=keep_BT)


def discounted_returns(rewards_BT: Tensor, mask_BT: Tensor, *, gamma: float) -> Tensor:
    """Sum the rewards from each token to the end of its row: G_t = r_t + γ G_{t'}.

    t' is the next token whose mask is True, as in `gae`; after the last token G is 0. Sutton and Barto 2018, eq. 3.9
    (http://incompleteideas.net/book/the-book-2nd.html).

    Args:
        rewards_BT: [B, T], reward for token t, any range.
        mask_BT: [B, T], True = token of the episode.
        gamma: discount per token, in [0, 1].

    Returns:
        Returns [B, T], in units of reward, 0 where the mask is False.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> discounted_returns(torch.tensor([[0.0, 0.0, 8.0]]), torch.ones(1, 3), gamma=0.5).tolist()
        [[2.0, 4.0, 8.0]]
    """
    # With V = 0 and λ = 1 the recursion of the advantage is the recursion of the return.
    return gae(rewards_BT, torch.zeros_like(rewards_BT), mask_BT, gamma=gamma, lam=1.0)


def _backwards(*tensors_BT: Tensor) -> list[tuple[Tensor, ...]]:
    return list(zip(*(tensor_BT.unbind(-1) for tensor_BT in tensors_BT), strict=True))[::-1]


def _in_order(columns: list[Tensor], *, like_BT: Tensor, keep_BT: Tensor) -> Tensor:
    return zero_padding(torch.stack(columns[::-1], dim=-1), keep_BT) if columns else like_BT
