"""Policy losses, and diagnostics of the step size.

Shapes: B batch, T time. A mask marks the tokens to KEEP: True = this token counts.
A loss is returned per token (GSPO's per reply); `masked.aggregate` reduces it.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from selfeval.algorithms.kl import k3
from selfeval.algorithms.masked import (
    broadcast_to_tokens,
    check_same_shape,
    check_scalar,
    limit_exponent,
    masked_mean,
    zero_padding,
)

__all__ = [
    "approximate_kl",
    "clip_fraction",
    "dual_clip_fraction",
    "grpo_loss",
    "gspo_clip_fraction",
    "gspo_loss",
    "importance_ratio",
    "overlong_penalty",
    "policy_gradient_loss",
    "ppo_clip_loss",
    "ratio_outside_fraction",
    "sequence_ratio",
    "truncated_importance_weights",
]


def policy_gradient_loss(logprobs_BT: Tensor, advantages_BT: Tensor) -> Tensor:
    """Compute the REINFORCE loss per token, whose gradient is the plain policy gradient.

    l_t = −A_t log π_t

    It is correct only on-policy, for a single step per batch. Further steps on the same replies need `ppo_clip_loss`, which has
    the same gradient at ratio 1. Williams 1992, section 4 (https://doi.org/10.1007/BF00992696).

    Args:
        logprobs_BT: [B, T], log π of the sampled token, <= 0. Zero non-finite padding first (`zero_padding`).
        advantages_BT: [B, T], advantage of the token, any range; no gradient.

    Returns:
        Loss [B, T], to be minimised, not masked. Only its gradient is meaningful, not its value.

    Raises:
        ValueError: the shapes differ.
    """
    check_same_shape(logprobs=logprobs_BT, advantages=advantages_BT)
    return -advantages_BT * logprobs_BT


def importance_ratio(logprobs_BT: Tensor, old_logprobs_BT: Tensor, *, log_ratio_clamp: float | None = None) -> Tensor:
    """Compute the importance ratio of the sampled token: r_t = exp(x_t), x_t = log π_t − log π_old,t.

    With `log_ratio_clamp` = b, x is clamped to [−b, b], with a gradient of 0 outside. Otherwise x is clamped to the limit of
    `limit_exponent` (85.7 in float32), so exp cannot overflow. Schulman et al. 2017, section 2.2
    (https://arxiv.org/abs/1707.06347) call r the probability ratio. The clamp is not in the paper; public code uses b = 20.

    Args:
        logprobs_BT: [B, T], log π of the sampled token under the policy being trained, <= 0.
        old_logprobs_BT: [B, T], the same under the policy that sampled it; no gradient.
        log_ratio_clamp: Optional. b in nats, > 0. Default: no clamp.

    Returns:
        [B, T], >= 0, not masked.

    Raises:
        ValueError: the shapes differ, or the clamp is not positive.
    """
    check_scalar(log_ratio_clamp=log_ratio_clamp)
    return torch.exp(_log_ratio(logprobs_BT, old_logprobs_BT, log_ratio_clamp))


def truncated_importance_weights(logprobs_BT: Tensor, behaviour_logprobs_BT: Tensor, *, limit: float) -> Tensor:
    """Compute the truncated importance weight of the sampled token, for replies that another program sampled.

    w_t = min(π_t / μ_t, C),   π_t / μ_t = exp(log π_t − log μ_t)

    μ is the distribution that the token was drawn from, and π the same policy as the trainer computes it. The two differ if an
    inference engine has other kernels or another precision. Given the tokens before it, the loss of a token times w has the
    expectation of the loss under π, except where the ratio exceeds C; the bound keeps the variance finite. w is not the ratio
    of PPO, whose numerator is the policy during the update and whose denominator is π. Yao et al. 2025
    (https://fengyao.notion.site/off-policy-rl) call it truncated importance sampling; the truncation is that of ρ in Espeholt
    et al. 2018, IMPALA, section 4.1 (https://arxiv.org/abs/1802.01561).

    Args:
        logprobs_BT: [B, T], log π of the sampled token before the update, <= 0; no gradient.
        behaviour_logprobs_BT: [B, T], log μ of the same token, at the same temperature, <= 0; no gradient.
        limit: C, in units of the ratio, > 0; 2 is usual. With at least 1, two equal distributions have weights of 1.

    Returns:
        [B, T] in [0, C], not masked.

    Raises:
        ValueError: the shapes differ, or the limit is not positive.

    Example:
        >>> logprobs, behaviour = torch.tensor([[0.5, 0.25, 0.5]]).log(), torch.tensor([[0.5, 0.5, 0.125]]).log()
        >>> truncated_importance_weights(logprobs, behaviour, limit=2.0)
        tensor([[1.0000, 0.5000, 2.0000]])
    """
    check_scalar(limit=limit)
    if limit <= 0:
        raise ValueError(f"the limit must be greater than 0, got {limit}")
    return importance_ratio(logprobs_BT, behaviour_logprobs_BT).clamp(max=limit)


def ppo_clip_loss(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages_BT: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    log_ratio_clamp: float | None = None,
) -> Tensor:
    """Compute the clipped surrogate loss of PPO per token.

    l_t = max(−A_t r_t, −A_t clip(r_t, 1 − clip_low, 1 + clip_high)),   r_t = exp(log π_t − log π_old,t)
    with dual_clip = c, where A_t < 0:   l_t ← min(l_t, −c A_t)

    The gradient is 0 if the ratio has already left the range in the direction of the advantage. The only unbounded case is a
    bad token that became much likelier (A < 0, r large); the dual clip bounds its loss and sets its gradient to 0.
    Schulman et al. 2017, eq. 7 (https://arxiv.org/abs/1707.06347); two bounds, "clip-higher": DAPO,
    section 3.1 (https://arxiv.org/abs/2503.14476); dual clip: Ye et al. 2020, section "Dual-clip PPO"
    (https://arxiv.org/abs/1912.09729).

    Args:
        logprobs_BT: [B, T], log π of the sampled token under the policy being trained, <= 0. Zero non-finite padding first
            (`zero_padding`): the loss is not masked here, and exp of garbage would corrupt the gradient.
        old_logprobs_BT: [B, T], the same under the policy that sampled it; no gradient.
        advantages_BT: [B, T], advantage of the token, any range; no gradient.
        clip_low: lower half-width of the clip range, in (0, 1); 0.2 is usual.
        clip_high: upper half-width, > 0; 0.2 is usual, 0.28 in DAPO.
        dual_clip: Optional. c > 1, in units of the ratio; 3 is usual. Default: no dual clip.
        log_ratio_clamp: Optional. As in `importance_ratio`.

    Returns:
        Loss [B, T], to be minimised, not masked.

    Raises:
        ValueError: the shapes differ, dual_clip is not above 1, or the clamp is not positive.

    Example:
        >>> logprobs, old_logprobs = torch.tensor([[0.5, 0.375]]).log(), torch.tensor([[0.25, 0.5]]).log()
        >>> ppo_clip_loss(logprobs, old_logprobs, torch.ones(1, 2), clip_low=0.25, clip_high=0.25)
        tensor([[-1.2500, -0.7500]])
    """
    check_scalar(dual_clip=dual_clip, log_ratio_clamp=log_ratio_clamp)
    check_same_shape(logprobs=logprobs_BT, old_logprobs=old_logprobs_BT, advantages=advantages_BT)
    ratio_BT = importance_ratio(logprobs_BT, old_logprobs_BT, log_ratio_clamp=log_ratio_clamp)
    # Inside the clip range both are equal: torch.maximum passes each half of the gradient, which adds up to the whole.
    loss_BT = torch.maximum(*_surrogates(ratio_BT, advantages_BT, clip_low, clip_high))
    if dual_clip is None:
        return loss_BT
    return torch.where(advantages_BT < 0, torch.minimum(loss_BT, _bound(advantages_BT, dual_clip)), loss_BT)


def grpo_loss(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    ref_logprobs_BT: Tensor,
    advantages_BT: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    beta: float,
    log_ratio_clamp: float | None = None,
) -> Tensor:
    """Compute the loss of GRPO per token: the clipped surrogate plus β times the k3 estimate of the KL.

    l_t = ppo_clip_loss_t + β (exp(−d_t) − 1 + d_t),   d_t = log π_t − log π_ref,t

    As a loss, k3 pulls towards the reference by the gradient of KL(π_ref‖π), not of KL(π‖π_ref): the table in `kl`. For
    the latter add β k2 to `ppo_clip_loss` instead. Shao et al. 2024, eq. 3 and 4 (https://arxiv.org/abs/2402.03300).

    Args:
        logprobs_BT: [B, T], as in `ppo_clip_loss`.
        old_logprobs_BT: [B, T], as in `ppo_clip_loss`.
        ref_logprobs_BT: [B, T], log π_ref of the sampled token, at the same temperature; no gradient.
        advantages_BT: [B, T], the advantage of the reply at each of its tokens (`broadcast_to_tokens`); no gradient.
        clip_low: as in `ppo_clip_loss`.
        clip_high: as in `ppo_clip_loss`.
        beta: weight of the KL, in units of advantage per nat, >= 0; 0.04 in the paper.
        log_ratio_clamp: as in `importance_ratio`, for the ratio alone.

    Returns:
        Loss [B, T], to be minimised, not masked.

    Raises:
        ValueError: the shapes differ, or the clamp is not positive.
    """
    check_scalar(beta=beta, log_ratio_clamp=log_ratio_clamp)
    loss_BT = ppo_clip_loss(
        logprobs_BT,
        old_logprobs_BT,
        advantages_BT,
        clip_low=clip_low,
        clip_high=clip_high,
        log_ratio_clamp=log_ratio_clamp,
    )
    return loss_BT + beta * k3(logprobs_BT, ref_logprobs_BT)


def sequence_ratio(logprobs_BT: Tensor, old_logprobs_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Compute the length-normalised ratio of the whole reply, the geometric mean of its token ratios.

    s = exp(1/n Σ_t (log π_t − log π_old,t)) = (π(y) / π_old(y))^(1/n),   n = tokens of the reply

    Zheng et al. 2025, GSPO, eq. 7 (https://arxiv.org/abs/2507.18071).

    Args:
        logprobs_BT: [B, T], log π of the sampled token, garbage where the mask is False.
        old_logprobs_BT: [B, T], the same under the policy that sampled it; no gradient.
        mask_BT: [B, T], True = token of the reply.

    Returns:
        [B], > 0; 1 for a row without tokens.

    Raises:
        ValueError: the shapes differ.
    """
    check_same_shape(logprobs=logprobs_BT, old_logprobs=old_logprobs_BT, mask=mask_BT)
    x_BT = zero_padding(logprobs_BT, mask_BT) - zero_padding(old_logprobs_BT, mask_BT)
    # The clamp concerns rows without tokens: 0 / 1 = 0, so their ratio is 1.
    return torch.exp(limit_exponent(x_BT.sum(-1) / mask_BT.bool().sum(-1).clamp(min=1)))


def gspo_loss(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages_B: Tensor,
    mask_BT: Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> Tensor:
    """Compute the loss of GSPO per reply: PPO's clip around the ratio of the whole reply.

    l = max(−A s, −A clip(s, 1 − clip_low, 1 + clip_high)),   s = `sequence_ratio`

    A reply is clipped as a whole. s varies far less than the ratio of a single token, so the clip range is hundreds of times
    narrower than in PPO. Zheng et al. 2025, eq. 5 (https://arxiv.org/abs/2507.18071).

    Args:
        logprobs_BT: [B, T], log π of the sampled token, garbage where the mask is False.
        old_logprobs_BT: [B, T], the same under the policy that sampled it; no gradient.
        advantages_B: [B], the advantage of the reply, any range; no gradient.
        mask_BT: [B, T], True = token of the reply.
        clip_low: lower half-width of the trusted range, in (0, 1); 3e-4 in the paper.
        clip_high: upper half-width, > 0; 4e-4 in the paper.

    Returns:
        Loss [B], to be minimised. A row without tokens has −A, without gradient. `aggregate` with
        "sequence_mean_token_mean" over `broadcast_to_tokens` of it is the mean over the replies that have tokens.

    Raises:
        ValueError: the shapes differ, or advantages are not one per row.
    """
    ratio_B = sequence_ratio(logprobs_BT, old_logprobs_BT, mask_BT)
    check_same_shape(advantages=advantages_B, rows=ratio_B)
    return torch.maximum(*_surrogates(ratio_B, advantages_B, clip_low, clip_high))


def overlong_penalty(lengths_B: Tensor, *, max_length: int, buffer: int, factor: float = 1.0) -> Tensor:
    """Compute the soft overlong penalty of replies close to the token limit, to be added to their rewards.

    factor · clip((max_length − buffer − length) / buffer, −1, 0)

    A hard penalty at the limit punishes good reasoning that was truncated; a linear ramp provides a signal towards shorter
    replies. DAPO, eq. 13 (https://arxiv.org/abs/2503.14476).

    Args:
        lengths_B: [B], tokens per reply, >= 0.
        max_length: length with the full penalty, in tokens; usually the limit on new tokens.
        buffer: number of tokens over which the penalty increases, in [1, max_length].
        factor: full penalty in units of reward, >= 0. Default: 1.

    Returns:
        [B] in [−factor, 0]; of the default float dtype if the lengths are integers.

    Raises:
        ValueError: the buffer is outside [1, max_length].

    Example:
        >>> overlong_penalty(torch.tensor([80, 90, 100, 130]), max_length=100, buffer=20).tolist()
        [0.0, -0.5, -1.0, -1.0]
    """
    check_scalar(factor=factor)
    if not 1 <= buffer <= max_length:
        raise ValueError(f"the buffer must be in [1, max_length], got buffer {buffer} with max_length {max_length}")
    return factor * ((max_length - buffer - lengths_B) / buffer).clamp(-1, 0)


def clip_fraction(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    log_ratio_clamp: float | None = None,
) -> Tensor:
    """Measure the share of tokens on which the clip acts, i.e. on which the clipped loss is strictly the larger one.

    This is smaller than the share of ratios outside the range (`ratio_outside_fraction`): a ratio that left it *against* its
    advantage is not clipped. The dual clip is counted separately (`dual_clip_fraction`). Schulman et al. 2017, eq. 7
    (https://arxiv.org/abs/1707.06347).

    Args:
        logprobs_BT: [B, T], as in `ppo_clip_loss`; garbage where the mask is False.
        old_logprobs_BT: [B, T], as in `ppo_clip_loss`.
        advantages_BT: [B, T], as in `ppo_clip_loss`.
        mask_BT: [B, T], True = token counts.
        clip_low: as in `ppo_clip_loss`.
        clip_high: as in `ppo_clip_loss`.
        log_ratio_clamp: as in `ppo_clip_loss`.

    Returns:
        Scalar in [0, 1]; NaN if no token counts.

    Raises:
        ValueError: the shapes differ.
    """
    check_scalar(log_ratio_clamp=log_ratio_clamp)
    check_same_shape(logprobs=logprobs_BT, old_logprobs=old_logprobs_BT, advantages=advantages_BT)
    ratio_BT = importance_ratio(logprobs_BT, old_logprobs_BT, log_ratio_clamp=log_ratio_clamp)
    unclipped_BT, clipped_BT = _surrogates(ratio_BT, advantages_BT, clip_low, clip_high)
    return masked_mean((clipped_BT > unclipped_BT).to(logprobs_BT.dtype), mask_BT)


def dual_clip_fraction(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    log_ratio_clamp: float | None = None,
) -> Tensor:
    """Measure the share of tokens that the dual clip bounds: A < 0, and the clipped loss strictly above −c A.

    A non-zero share means that bad tokens became c times likelier within one update: the steps are too long, or the log-probs
    of the rollout are not those of the policy. Ye et al. 2020, section "Dual-clip PPO"
    (https://arxiv.org/abs/1912.09729).

    Args:
        logprobs_BT: [B, T], as in `ppo_clip_loss`; garbage where the mask is False.
        old_logprobs_BT: [B, T], as in `ppo_clip_loss`.
        advantages_BT: [B, T], as in `ppo_clip_loss`.
        mask_BT: [B, T], True = token counts.
        clip_low: as in `ppo_clip_loss`.
        clip_high: as in `ppo_clip_loss`.
        dual_clip: c > 1, as in `ppo_clip_loss`.
        log_ratio_clamp: as in `ppo_clip_loss`.

    Returns:
        Scalar in [0, 1]; NaN if no token counts.

    Raises:
        ValueError: the shapes differ, or dual_clip is not above 1.
    """
    check_scalar(dual_clip=dual_clip, log_ratio_clamp=log_ratio_clamp)
    loss_BT = ppo_clip_loss(
        logprobs_BT,
        old_logprobs_BT,
        advantages_BT,
        clip_low=clip_low,
        clip_high=clip_high,
        log_ratio_clamp=log_ratio_clamp,
    )
    bounded_BT = (advantages_BT < 0) & (loss_BT > _bound(advantages_BT, dual_clip))
    return masked_mean(bounded_BT.to(logprobs_BT.dtype), mask_BT)


def ratio_outside_fraction(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    mask_BT: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    log_ratio_clamp: float | None = None,
) -> Tensor:
    """Measure the share of tokens whose ratio is outside [1 − clip_low, 1 + clip_high], whatever their advantage.

    It measures how far the policy has moved, while `clip_fraction` measures how often the loss prevents further movement.
    Schulman et al. 2017,
    eq. 7 (https://arxiv.org/abs/1707.06347).

    Args:
        logprobs_BT: [B, T], as in `ppo_clip_loss`; garbage where the mask is False.
        old_logprobs_BT: [B, T], as in `ppo_clip_loss`.
        mask_BT: [B, T], True = token counts.
        clip_low: as in `ppo_clip_loss`.
        clip_high: as in `ppo_clip_loss`.
        log_ratio_clamp: as in `ppo_clip_loss`.

    Returns:
        Scalar in [0, 1]; NaN if no token counts.

    Raises:
        ValueError: the shapes differ.
    """
    check_scalar(clip_low=clip_low, clip_high=clip_high, log_ratio_clamp=log_ratio_clamp)
    ratio_BT = importance_ratio(logprobs_BT, old_logprobs_BT, log_ratio_clamp=log_ratio_clamp)
    outside_BT = (ratio_BT < 1 - clip_low) | (ratio_BT > 1 + clip_high)
    return masked_mean(outside_BT.to(logprobs_BT.dtype), mask_BT)


def gspo_clip_fraction(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages_B: Tensor,
    mask_BT: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    per: Literal["reply", "token"],
) -> Tensor:
    """Measure the share of replies clipped by GSPO, or the share of tokens in them.

    The paper reports tokens, and finds two orders of magnitude more of them clipped than by GRPO. Zheng et al. 2025,
    section 5.2 (https://arxiv.org/abs/2507.18071).

    Args:
        logprobs_BT: [B, T], as in `gspo_loss`.
        old_logprobs_BT: [B, T], as in `gspo_loss`.
        advantages_B: [B], as in `gspo_loss`.
        mask_BT: [B, T], True = token of the reply.
        clip_low: as in `gspo_loss`.
        clip_high: as in `gspo_loss`.
        per: "reply" counts non-empty replies; "token" counts tokens, so long replies have more weight.

    Returns:
        Scalar in [0, 1]; NaN if no token counts.

    Raises:
        ValueError: the shapes differ, advantages are not one per row, or `per` is neither of the two.
    """
    ratio_B = sequence_ratio(logprobs_BT, old_logprobs_BT, mask_BT)
    check_same_shape(advantages=advantages_B, rows=ratio_B)
    unclipped_B, clipped_B = _surrogates(ratio_B, advantages_B, clip_low, clip_high)
    acts_B = (clipped_B > unclipped_B).to(ratio_B.dtype)
    if per == "reply":
        return masked_mean(acts_B, mask_BT.bool().any(-1))
    if per == "token":
        return masked_mean(broadcast_to_tokens(acts_B, mask_BT), mask_BT)
    raise ValueError(f"per must be 'reply' or 'token', got {per!r}")


def approximate_kl(
    logprobs_BT: Tensor, old_logprobs_BT: Tensor, mask_BT: Tensor, *, log_ratio_clamp: float | None = None
) -> Tensor:
    """Estimate KL(π_old‖π), the size of this update, from tokens sampled by π_old.

    mean of exp(x) − 1 − x,   x = log π − log π_old

    This is k3 (unbiased, >= 0) with π_old as the sampler. It must be 0 at the first minibatch; otherwise the log-probs of
    rollout and update disagree. Schulman 2020 (http://joschu.net/blog/kl-approx.html).

    Args:
        logprobs_BT: [B, T], log π of the sampled token, garbage where the mask is False.
        old_logprobs_BT: [B, T], log π_old of the same token.
        mask_BT: [B, T], True = token counts.
        log_ratio_clamp: Optional. As in `importance_ratio`; the estimate is too small if the clamp is active.

    Returns:
        Scalar in nats per token, >= 0, inf where exp(x) overflows; NaN if no token counts.

    Raises:
        ValueError: the shapes differ, or the clamp is not positive.
    """
    check_scalar(log_ratio_clamp=log_ratio_clamp)
    check_same_shape(logprobs=logprobs_BT, old_logprobs=old_logprobs_BT)
    x_BT = zero_padding(logprobs_BT, mask_BT) - zero_padding(old_logprobs_BT, mask_BT)
    if log_ratio_clamp is not None:
        x_BT = _log_ratio(x_BT, torch.zeros_like(x_BT), log_ratio_clamp)
    # Unlike `k3`, this is a measurement without a gradient, so an overflowing ratio should be reported as inf.
    return masked_mean(torch.expm1(x_BT) - x_BT, mask_BT)


def _log_ratio(logprobs_BT: Tensor, old_logprobs_BT: Tensor, clamp: float | None) -> Tensor:
    check_same_shape(logprobs=logprobs_BT, old_logprobs=old_logprobs_BT)
    if clamp is None:
        return limit_exponent(logprobs_BT - old_logprobs_BT)
    if not clamp > 0:
        raise ValueError(f"log_ratio_clamp must be > 0 nats, got {clamp}: None disables it, 20 is a common value")
    return (logprobs_BT - old_logprobs_BT).clamp(-clamp, clamp)


def _surrogates(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> tuple[Tensor, Tensor]:
    return -advantages * ratio, -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)


def _bound(advantages_BT: Tensor, dual_clip: float) -> Tensor:
    if not dual_clip > 1:
        raise ValueError(f"dual_clip must be > 1 (a ratio), got {dual_clip}: None disables it, 3 is a common value")
    # For A < 0 this is the unclipped loss at the ratio c.
    return -dual_clip * advantages_BT
