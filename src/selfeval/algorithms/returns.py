"""Token-level returns and advantages, for rows with padding and gaps, and for segments with several episodes.

Shapes: B batch, T time (position of a token in its row).
A mask marks the tokens to KEEP: True = this token is part of the episode. The reward at t is that of token t; the value at t is
the expected return *before* token t is sampled. Padding may be left, right or inside the row and may have any value.

In all formulas t' is the *next token whose mask is True*: gaps (tool output, masked turns) are skipped without a discount. The
value after the last token of a row is `bootstrap_B` (None is 0: the episode ends there), and γ_t = γ (1 − done_t), so nothing
after a token with done = 1 affects it. A done on a token whose mask is False counts for the kept token before it, so a masked
end-of-sequence token still ends the episode. Rows of text need neither `bootstrap_B` nor dones; segments of a control task,
which have several episodes and stop in the middle of one, need both. An episode *truncated* at t (by a time limit) is done too,
and γ V(state at truncation) must be added to its reward.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from selfeval.algorithms.masked import at_least_float32, check_same_shape, check_scalar, limit_exponent, zero_padding

__all__ = ["VTrace", "discounted_returns", "gae", "n_step_returns", "td_lambda_returns", "vtrace"]


def gae(
    rewards_BT: Tensor,
    values_BT: Tensor,
    mask_BT: Tensor,
    *,
    gamma: float,
    lam: float,
    dones_BT: Tensor | None = None,
    bootstrap_B: Tensor | None = None,
) -> Tensor:
    """Compute generalised advantage estimates (GAE) of all tokens.

    δ_t = r_t + γ_t V_{t'} − V_t,   A_t = δ_t + γ_t λ A_{t'},   γ_t = γ (1 − done_t)

    t' is the *next token whose mask is True*: gaps (tool output, masked turns) are skipped without a discount. After the last
    token of a row A is 0 and V is the bootstrap value, 0 by default (the episode ends there). The target of the critic is A + V
    (`td_lambda_returns`). Advantages are not whitened.

    Schulman et al. 2016, eq. 11 to 16 (https://arxiv.org/abs/1506.02438).

    Args:
        rewards_BT: [B, T], reward for token t, any range.
        values_BT: [B, T], critic's value before token t, in units of reward.
        mask_BT: [B, T], True = token of the episode.
        gamma: discount per token, in [0, 1]; 1 for short replies with a reward at the end.
        lam: λ in [0, 1]; 0 is the one-step TD error (biased, low variance), 1 is Monte Carlo minus value (unbiased, high
            variance).
        dones_BT: Optional. [B, T], True = the episode ends with token t, kept by the mask or not; False in padding. Default: no
            episode ends inside a row.
        bootstrap_B: Optional. [B], V after the last token of the row, in units of reward. Default: 0.

    Returns:
        Advantages [B, T], in units of reward, 0 where the mask is False.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> rewards, values = torch.tensor([[0.0, 9.0, 1.0]]), torch.tensor([[0.5, 9.0, 0.25]])
        >>> gae(rewards, values, torch.tensor([[True, False, True]]), gamma=1.0, lam=1.0).tolist()
        [[0.5, 0.0, 0.75]]
    """
    check_scalar(gamma=gamma, lam=lam)
    rows = _Rows.of(rewards_BT, values_BT, mask_BT, gamma, dones_BT, bootstrap_B)
    next_value_B, next_advantage_B = rows.bootstrap_B, torch.zeros_like(rows.bootstrap_B)
    columns: list[Tensor] = []
    for reward_B, value_B, discount_B, keep_B in rows.backwards():
        advantage_B = reward_B + discount_B * next_value_B - value_B + discount_B * lam * next_advantage_B
        # At a masked token both carried tensors stay those of the next kept token, so a gap is skipped without a discount.
        next_advantage_B = torch.where(keep_B, advantage_B, next_advantage_B)
        next_value_B = torch.where(keep_B, value_B, next_value_B)
        columns.append(next_advantage_B)
    return rows.in_order(columns)


def td_lambda_returns(
    rewards_BT: Tensor,
    values_BT: Tensor,
    mask_BT: Tensor,
    *,
    gamma: float,
    lam: float,
    dones_BT: Tensor | None = None,
    bootstrap_B: Tensor | None = None,
) -> Tensor:
    """Compute λ-returns, the mixture of n-step returns that is the target of a critic.

    G_t = r_t + γ_t [(1 − λ) V_{t'} + λ G_{t'}],   γ_t = γ (1 − done_t)

    After the last token both V and G are the bootstrap value. G − V is `gae`. Sutton and Barto 2018, section 12.8
    (http://incompleteideas.net/book/the-book-2nd.html).

    Args:
        rewards_BT: [B, T], as in `gae`.
        values_BT: [B, T], as in `gae`.
        mask_BT: [B, T], as in `gae`.
        gamma: as in `gae`.
        lam: λ in [0, 1]; 0 = one-step target r + γ V, 1 = `discounted_returns`.
        dones_BT: as in `gae`.
        bootstrap_B: as in `gae`.

    Returns:
        Returns [B, T], in units of reward, 0 where the mask is False.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> rewards, values = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.25]])
        >>> td_lambda_returns(rewards, values, torch.ones(1, 2), gamma=1.0, lam=0.5).tolist()
        [[0.625, 1.0]]
    """
    check_scalar(gamma=gamma, lam=lam)
    rows = _Rows.of(rewards_BT, values_BT, mask_BT, gamma, dones_BT, bootstrap_B)
    next_value_B = next_return_B = rows.bootstrap_B
    columns: list[Tensor] = []
    for reward_B, value_B, discount_B, keep_B in rows.backwards():
        return_B = reward_B + discount_B * ((1 - lam) * next_value_B + lam * next_return_B)
        next_return_B = torch.where(keep_B, return_B, next_return_B)
        next_value_B = torch.where(keep_B, value_B, next_value_B)
        columns.append(next_return_B)
    return rows.in_order(columns)


def n_step_returns(
    rewards_BT: Tensor,
    values_BT: Tensor,
    mask_BT: Tensor,
    *,
    gamma: float,
    n: int,
    dones_BT: Tensor | None = None,
    bootstrap_B: Tensor | None = None,
) -> Tensor:
    """Compute n-step returns: the next n rewards, then the value of the critic.

    G_t^(n) = r_t + γ_t G_{t'}^(n−1),   G_t^(0) = V_t,   γ_t = γ (1 − done_t)

    Near the end of a row fewer than n rewards are left, followed by the bootstrap value. Sutton and Barto 2018, eq. 7.1
    (http://incompleteideas.net/book/the-book-2nd.html).

    Args:
        rewards_BT: [B, T], as in `gae`.
        values_BT: [B, T], as in `gae`.
        mask_BT: [B, T], as in `gae`.
        gamma: as in `gae`.
        n: rewards to sum, >= 1; 1 = one-step target, T or more = `discounted_returns`.
        dones_BT: as in `gae`.
        bootstrap_B: as in `gae`.

    Returns:
        Returns [B, T], in units of reward, 0 where the mask is False.

    Raises:
        ValueError: the shapes differ, or n < 1.

    Example:
        >>> rewards, values = torch.tensor([[1.0, 1.0, 1.0]]), torch.tensor([[7.0, 7.0, 7.0]])
        >>> n_step_returns(rewards, values, torch.ones(1, 3), gamma=1.0, n=2).tolist()
        [[9.0, 2.0, 1.0]]
    """
    check_scalar(gamma=gamma)
    if n < 1:
        raise ValueError(f"n must be at least 1 step, got {n}")
    rows = _Rows.of(rewards_BT, values_BT, mask_BT, gamma, dones_BT, bootstrap_B)
    next_nB = rows.bootstrap_B.expand(n, -1)  # of the next token: its returns of 0, 1, ... n − 1 steps
    columns: list[Tensor] = []
    for reward_B, value_B, discount_B, keep_B in rows.backwards():
        returns_nB = reward_B + discount_B * next_nB  # 1, 2, ... n steps
        # For the token before, these are the returns of 0, 1, ... n − 1 steps: the value, then all but the longest.
        next_nB = torch.where(keep_B, torch.cat([value_B[None], returns_nB[:-1]]), next_nB)
        columns.append(returns_nB[-1])
    return rows.in_order(columns)


class VTrace(NamedTuple):
    """Results of `vtrace`.

    Attributes:
        targets_BT: [B, T], vs_t, targets of the critic, in units of reward.
        advantages_BT: [B, T], advantages of the policy, min(ρ̄_pg, ρ_t) (q_t − V_t). They include the importance ratio, so the
            loss must not.
        q_BT: [B, T], q_t, the V-trace estimate of the return of token t.
    """

    targets_BT: Tensor
    advantages_BT: Tensor
    q_BT: Tensor


def vtrace(
    log_ratios_BT: Tensor,
    rewards_BT: Tensor,
    values_BT: Tensor,
    mask_BT: Tensor,
    *,
    gamma: float,
    lam: float = 1.0,
    clip_rho: float = 1.0,
    clip_pg_rho: float = 1.0,
    clip_c: float = 1.0,
    dones_BT: Tensor | None = None,
    bootstrap_B: Tensor | None = None,
) -> VTrace:
    """Compute V-trace targets and advantages for tokens sampled by another (older) policy.

    ρ_t = exp(log π_t − log μ_t),   c_t = λ min(c̄, ρ_t),   γ_t = γ (1 − done_t)
    vs_t = V_t + e_t,   e_t = min(ρ̄, ρ_t) (r_t + γ_t V_{t'} − V_t) + γ_t c_t e_{t'}
    q_t = r_t + γ_t [λ vs_{t'} + (1 − λ) V_{t'}],   A_t = min(ρ̄_pg, ρ_t) (q_t − V_t)

    After the last token V and vs are the bootstrap value and e is 0. On-policy (ρ = 1 <= the clips) vs is the λ-return. ρ̄
    determines the policy whose values are the fixed point (infinite: π; small: close to μ), c̄ only the speed of convergence.
    Espeholt et al. 2018, eq. 1 and section 4.2 (https://arxiv.org/abs/1802.01561); λ: their remark 2. The λ in q is 1 in the
    paper; here it is as in rlax.

    Args:
        log_ratios_BT: [B, T], log π − log μ of the sampled token, μ being the policy that sampled it; no gradient.
        rewards_BT: [B, T], as in `gae`.
        values_BT: [B, T], as in `gae`; no gradient.
        mask_BT: [B, T], as in `gae`.
        gamma: as in `gae`.
        lam: λ in [0, 1]; 1 is the paper's.
        clip_rho: ρ̄ > 0, maximum weight of a TD error.
        clip_pg_rho: ρ̄_pg > 0, maximum weight of an advantage.
        clip_c: c̄ in (0, ρ̄], maximum weight of later errors.
        dones_BT: as in `gae`.
        bootstrap_B: as in `gae`.

    Returns:
        `VTrace` of three [B, T], 0 where the mask is False.

    Raises:
        ValueError: the shapes differ.
    """
    check_scalar(gamma=gamma, lam=lam, clip_rho=clip_rho, clip_pg_rho=clip_pg_rho, clip_c=clip_c)
    check_same_shape(log_ratios=log_ratios_BT, rewards=rewards_BT)
    rows = _Rows.of(rewards_BT, values_BT, mask_BT, gamma, dones_BT, bootstrap_B)
    # Limit the exponent even though clips follow: they may be infinite, and inf · 0 in the products below would be NaN.
    rho_BT = limit_exponent(zero_padding(log_ratios_BT, rows.keep_BT).to(rows.values_BT.dtype)).exp()
    next_value_B, next_error_B = rows.bootstrap_B, torch.zeros_like(rows.bootstrap_B)
    errors: list[Tensor] = []
    q: list[Tensor] = []
    for reward_B, value_B, discount_B, keep_B, rho_B in rows.backwards(rho_BT):
        # λ vs' + (1 − λ) V' = V' + λ e'
        q.append(reward_B + discount_B * (next_value_B + lam * next_error_B))
        delta_B = rho_B.clamp(max=clip_rho) * (reward_B + discount_B * next_value_B - value_B)
        error_B = delta_B + discount_B * lam * rho_B.clamp(max=clip_c) * next_error_B
        next_error_B = torch.where(keep_B, error_B, next_error_B)
        next_value_B = torch.where(keep_B, value_B, next_value_B)
        errors.append(next_error_B)
    q_BT, errors_BT = rows.in_order(q, rows.values_BT.dtype), rows.in_order(errors, rows.values_BT.dtype)
    advantages_BT = rho_BT.clamp(max=clip_pg_rho) * (q_BT - rows.values_BT)
    return VTrace(*(x_BT.to(rows.dtype) for x_BT in (rows.values_BT + errors_BT, advantages_BT, q_BT)))


def discounted_returns(
    rewards_BT: Tensor,
    mask_BT: Tensor,
    *,
    gamma: float,
    dones_BT: Tensor | None = None,
    bootstrap_B: Tensor | None = None,
) -> Tensor:
    """Compute Monte Carlo returns, the discounted rewards from each token to the end of its row: G_t = r_t + γ_t G_{t'}.

    t' is the next token whose mask is True, as in `gae`; after the last token G is the bootstrap value, 0 by default.
    Sutton and Barto 2018, eq. 3.9 (http://incompleteideas.net/book/the-book-2nd.html).

    Args:
        rewards_BT: [B, T], reward for token t, any range.
        mask_BT: [B, T], True = token of the episode.
        gamma: discount per token, in [0, 1].
        dones_BT: as in `gae`.
        bootstrap_B: as in `gae`.

    Returns:
        Returns [B, T], in units of reward, 0 where the mask is False.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> discounted_returns(torch.tensor([[0.0, 0.0, 8.0]]), torch.ones(1, 3), gamma=0.5).tolist()
        [[2.0, 4.0, 8.0]]
    """
    check_scalar(gamma=gamma)
    # With λ = 1 the values cancel.
    nothing_BT = torch.zeros_like(rewards_BT)
    return td_lambda_returns(rewards_BT, nothing_BT, mask_BT, gamma=gamma, lam=1.0, dones_BT=dones_BT, bootstrap_B=bootstrap_B)


class _Rows(NamedTuple):
    """Validated inputs without padding, to iterate from the last token to the first."""

    rewards_BT: Tensor
    values_BT: Tensor
    discounts_BT: Tensor
    keep_BT: Tensor
    bootstrap_B: Tensor
    dtype: torch.dtype  # of the result; the tensors here are at least float32

    @classmethod
    def of(
        cls,
        rewards_BT: Tensor,
        values_BT: Tensor,
        mask_BT: Tensor,
        gamma: float,
        dones_BT: Tensor | None,
        bootstrap_B: Tensor | None,
    ) -> _Rows:
        check_same_shape(rewards=rewards_BT, values=values_BT, mask=mask_BT)
        keep_BT = mask_BT.bool()
        dones_BT = torch.zeros_like(keep_BT) if dones_BT is None else dones_BT
        bootstrap_B = values_BT.new_zeros(len(values_BT)) if bootstrap_B is None else bootstrap_B
        check_same_shape(dones=dones_BT, mask=mask_BT)
        check_same_shape(bootstrap=bootstrap_B, rows=keep_BT.any(-1))
        # At least float32: 0.99 is 0.98828 in bfloat16, so the discount after 100 tokens would be 0.31 instead of 0.37.
        given = torch.promote_types(rewards_BT.dtype, values_BT.dtype)
        dtype = at_least_float32(given)
        rewards_BT, values_BT = (zero_padding(x_BT, keep_BT).to(dtype) for x_BT in (rewards_BT, values_BT))
        discounts_BT = gamma * (~_ends(dones_BT.bool(), keep_BT)).to(dtype)
        result = given if given.is_floating_point else dtype
        return cls(rewards_BT, values_BT, discounts_BT, keep_BT, bootstrap_B.to(dtype), result)

    def backwards(self, *more_BT: Tensor) -> Iterator[tuple[Tensor, ...]]:
        tensors_BT = (self.rewards_BT, self.values_BT, self.discounts_BT, self.keep_BT, *more_BT)
        columns: list[tuple[Tensor, ...]] = list(zip(*(tensor_BT.unbind(-1) for tensor_BT in tensors_BT), strict=True))
        return reversed(columns)

    def in_order(self, columns: list[Tensor], dtype: torch.dtype | None = None) -> Tensor:
        # Rows of length 0 have no columns, and torch.stack refuses an empty list.
        stacked_BT = zero_padding(torch.stack(columns[::-1], dim=-1), self.keep_BT) if columns else self.rewards_BT
        return stacked_BT.to(dtype or self.dtype)


def _ends(dones_BT: Tensor, keep_BT: Tensor) -> Tensor:
    """Return whether the episode ends with each kept token, or with a masked one between it and the next kept token."""
    # Usual case: every done is on a kept token.
    if bool((dones_BT <= keep_BT).all()):
        return dones_BT
    columns: list[Tensor] = []
    # pending: there is an end at or after this position that no kept token has taken over yet.
    pending_B = torch.zeros_like(dones_BT[:, 0])
    for done_B, keep_B in reversed(list(zip(dones_BT.unbind(-1), keep_BT.unbind(-1), strict=True))):
        pending_B = pending_B | done_B
        columns.append(pending_B)
        pending_B = pending_B & ~keep_B
    return torch.stack(columns[::-1], dim=-1)
