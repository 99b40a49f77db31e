"""Losses of a critic, and its explained variance.

Shapes: B batch, T time, N kept tokens. A mask marks the tokens to KEEP: True = this token counts.
A loss is returned per token; `masked.aggregate` reduces it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from selfeval.algorithms.masked import check_same_shape, check_scalar, masked_mean

__all__ = ["clipped_value_loss", "explained_variance", "value_clip_fraction"]


def clipped_value_loss(values_BT: Tensor, old_values_BT: Tensor, returns_BT: Tensor, *, clip: float | None) -> Tensor:
    """Compute the clipped squared error of the critic per token.

    l_t = ½ max((V_t − R_t)², (clip(V_t, V_old,t − c, V_old,t + c) − R_t)²);   c = None: l_t = ½ (V_t − R_t)²

    The factor ½ is included. Engstrom et al. 2020, section 3 (https://arxiv.org/abs/2005.12729) describe the clip. It often
    does not help; pass None to disable it.

    Args:
        values_BT: [B, T], critic's value before token t, in units of reward. Zero non-finite padding first
            (`zero_padding`).
        old_values_BT: [B, T], the values when the rollout was scored; no gradient.
        returns_BT: [B, T], the target, A + V_old; no gradient.
        clip: c, half-width of the clip range in units of reward, > 0; None for no clip.

    Returns:
        Loss [B, T], >= 0, not masked. Its gradient is 0 if the value is outside the range and the clipped error is larger.

    Raises:
        ValueError: the shapes differ.
    """
    check_scalar(clip=clip)
    plain_BT, near_BT = _squared_errors(values_BT, old_values_BT, returns_BT, clip)
    return torch.maximum(plain_BT, near_BT) / 2


def value_clip_fraction(
    values_BT: Tensor, old_values_BT: Tensor, returns_BT: Tensor, mask_BT: Tensor, *, clip: float
) -> Tensor:
    """Measure the share of tokens on which the value clip acts, i.e. on which the clipped error is strictly the larger.

    These tokens give the critic no gradient. Engstrom et al. 2020, section 3 (https://arxiv.org/abs/2005.12729).

    Args:
        values_BT: [B, T], as in `clipped_value_loss`; garbage where the mask is False.
        old_values_BT: [B, T], as in `clipped_value_loss`.
        returns_BT: [B, T], as in `clipped_value_loss`.
        mask_BT: [B, T], True = token counts.
        clip: as in `clipped_value_loss`, > 0.

    Returns:
        Scalar in [0, 1]; NaN if no token counts.

    Raises:
        ValueError: the shapes differ.
    """
    check_scalar(clip=clip)
    plain_BT, near_BT = _squared_errors(values_BT, old_values_BT, returns_BT, clip)
    return masked_mean((near_BT > plain_BT).to(values_BT.dtype), mask_BT)


def explained_variance(values_BT: Tensor, returns_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Compute the share of the variance of the returns that the critic predicts: 1 − Var(R − V) / Var(R).

    1 is perfect, 0 is no better than a constant, and below 0 is worse than a constant. A constant offset of V has no effect.
    Kvålseth 1985 (https://doi.org/10.1080/00031305.1985.10479448) compares the definitions.

    Args:
        values_BT: [B, T], critic's value before token t, garbage where the mask is False.
        returns_BT: [B, T], the observed return.
        mask_BT: [B, T], True = token counts.

    Returns:
        Scalar, <= 1; NaN if the returns do not vary, or if no token counts.

    Raises:
        ValueError: the shapes differ.
    """
    check_same_shape(values=values_BT, returns=returns_BT, mask=mask_BT)
    keep_BT = mask_BT.bool()
    returns_N, residuals_N = returns_BT[keep_BT], (returns_BT - values_BT)[keep_BT]
    # Compare for equality: the computed variance of a constant is often 1e-34 instead of 0, and dividing by it would yield a
    # plausible number.
    if not bool((returns_N != returns_N[:1]).any()):
        return returns_N.new_full((), torch.nan)
    return 1 - residuals_N.var(correction=0) / returns_N.var(correction=0)


def _squared_errors(values_BT: Tensor, old_values_BT: Tensor, returns_BT: Tensor, clip: float | None) -> tuple[Tensor, Tensor]:
    check_same_shape(values=values_BT, old_values=old_values_BT, returns=returns_BT)
    plain_BT = (values_BT - returns_BT).square()
    if clip is None:
        return plain_BT, plain_BT
    near_BT = old_values_BT + (values_BT - old_values_BT).clamp(-clip, clip)
    return plain_BT, (near_BT - returns_BT).square()
