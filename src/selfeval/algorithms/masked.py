"""Masked sums, means and whitening.

Shapes: B batch, T time (position of a token in its row).
A mask marks the tokens to KEEP: True = this token counts. Numbers 0 and 1 are converted to False and True.

Padding may have any value, including inf and NaN. It is removed by selection (`torch.where`), never by multiplication, because
0 * inf is NaN in the forward and in the backward pass.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

__all__ = [
    "Aggregation",
    "aggregate",
    "aggregation_weights",
    "at_least_float32",
    "broadcast_to_tokens",
    "check_same_shape",
    "check_scalar",
    "check_scalar_or_shape",
    "limit_exponent",
    "masked_mean",
    "masked_sum",
    "whiten",
    "zero_padding",
]

Aggregation = Literal[
    "token_mean",
    "token_sum",
    "sequence_mean_token_mean",
    "sequence_mean_token_mean_all_rows",
    "sequence_mean_token_sum",
    "sequence_mean_token_sum_norm",
    "constant_length",
]

_WITH_NORM_LENGTH = ("sequence_mean_token_sum_norm", "constant_length")


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype for sums and discounts: float32 for half precision, otherwise the dtype itself.

    Example:
        >>> at_least_float32(torch.bfloat16), at_least_float32(torch.float64)
        (torch.float32, torch.float64)
    """
    return torch.promote_types(dtype, torch.float32)


def check_same_shape(**tensors: Tensor) -> None:
    """Raise an error for tensors that would broadcast against each other.

    A [B, 1] tensor that broadcasts against a [B, T] one yields a plausible loss with a wrong gradient.

    Args:
        tensors: tensors by their names in the error message.

    Raises:
        ValueError: the shapes are not all equal; the message lists them.
    """
    if len({tuple(tensor.shape) for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"these tensors must have the same shape, got {shapes}")


def check_scalar(**numbers: float | Tensor | None) -> None:
    """Raise an error for tensors that are not scalars: [N, 1] against [N] would broadcast to [N, N].

    Args:
        numbers: numbers or tensors by their names in the error message; None is accepted.

    Raises:
        ValueError: one of them is not a scalar; the message names its shape.
    """
    for name, number in numbers.items():
        if isinstance(number, Tensor) and number.dim():
            raise ValueError(f"{name} must be a scalar (a float or a tensor of shape []), got shape {list(number.shape)}")


def check_scalar_or_shape(like: Tensor, **numbers: float | Tensor) -> None:
    """Raise an error for tensors that are neither scalars nor of the shape of `like`.

    Args:
        like: the tensor with the expected shape.
        numbers: numbers or tensors by their names in the error message.

    Raises:
        ValueError: one of them has another shape; the message names both.
    """
    for name, number in numbers.items():
        if isinstance(number, Tensor) and number.dim() and number.shape != like.shape:
            raise ValueError(f"{name} must be a scalar or have shape {list(like.shape)}, got shape {list(number.shape)}")


def limit_exponent(x: Tensor) -> Tensor:
    """Clamp x such that exp(x), and 20 times it, is finite; the gradient is 0 above the limit.

    y = min(x, log(largest number of the type) − 3):  85.7 in float32 and bfloat16, 8.1 in float16, 707 in float64

    exp of 89 is inf in float32. If a clip discards such a ratio, the value of the loss is right, but the backward pass
    multiplies a gradient of 0 by inf: a single token makes the gradient of the whole batch NaN.

    Args:
        x: any shape, any range.

    Returns:
        The shape of x, equal to x up to the limit.

    Example:
        >>> limit_exponent(torch.tensor([-200.0, 20.0, 89.0])).tolist()
        [-200.0, 20.0, 85.72283935546875]
    """
    return x.clamp(max=math.log(torch.finfo(x.dtype).max) - 3)


def zero_padding(x_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Replace masked-out values by 0, in the value and in the gradient.

    y_t = x_t if mask_t else 0

    Use it *before* a non-linear function (exp, square) of a tensor whose padding may not be finite: selecting afterwards fixes
    the value, but the backward pass still multiplies 0 by inf.

    Args:
        x_BT: [B, T], any range, garbage where the mask is False.
        mask_BT: [B, T], True = token counts.

    Returns:
        [B, T], 0 where the mask is False.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> zero_padding(torch.tensor([1.0, float("nan")]), torch.tensor([True, False])).tolist()
        [1.0, 0.0]
    """
    check_same_shape(x=x_BT, mask=mask_BT)
    return torch.where(mask_BT.bool(), x_BT, torch.zeros_like(x_BT))


def broadcast_to_tokens(x_B: Tensor, mask_BT: Tensor) -> Tensor:
    """Broadcast one number per row, such as an advantage, to the tokens of the row: y_t = x if mask_t else 0.

    Args:
        x_B: [B], one number per row, any range.
        mask_BT: [B, T], True = token counts.

    Returns:
        [B, T], 0 where the mask is False. The gradient of a row is the sum over its tokens.

    Raises:
        ValueError: x is not one number per row.

    Example:
        >>> broadcast_to_tokens(torch.tensor([3.0]), torch.tensor([[True, True, False]])).tolist()
        [[3.0, 3.0, 0.0]]
    """
    # any(-1) stands for the expected shape [B]; its values are not used.
    check_same_shape(x=x_B, rows=mask_BT.any(-1))
    return zero_padding(x_B[:, None].expand(mask_BT.shape), mask_BT)


def masked_sum(x_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Compute the sum over unmasked tokens, Σ m x.

    Args:
        x_BT: [B, T], any range, garbage where the mask is False.
        mask_BT: [B, T], True = token counts.

    Returns:
        Scalar; 0 if no token counts.

    Raises:
        ValueError: the shapes differ.
    """
    return zero_padding(x_BT, mask_BT).sum()


def masked_mean(x_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Compute the mean over unmasked tokens, Σ m x / Σ m.

    The denominator is exact (no 1e-8 added), so the mean of a constant is that constant up to the rounding of the sum.

    Args:
        x_BT: [B, T], any range, garbage where the mask is False.
        mask_BT: [B, T], True = token counts.

    Returns:
        Scalar; NaN with a gradient of 0 if no token counts.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> masked_mean(torch.tensor([[1.0, 3.0, float("inf")]]), torch.tensor([[True, True, False]])).item()
        2.0
    """
    # Counted in a wider dtype: in bfloat16 a count above 256 would be rounded to 3 digits.
    exact_BT = x_BT.to(at_least_float32(x_BT.dtype))
    return (masked_sum(exact_BT, mask_BT) / mask_BT.bool().sum()).to(x_BT.dtype)


def whiten(
    x_BT: Tensor, mask_BT: Tensor, *, shift_mean: bool = True, correction: Literal[0, 1] = 1, eps: float = 1e-8
) -> Tensor:
    """Scale unmasked tokens to variance 1 and, by default, shift them to mean 0.

    y = (x − μ) / √(var + eps),   n = Σ m, μ = Σ m x / n, var = Σ m (x − μ)² / (n − correction);   not shifted: y + μ

    Mean and variance are those of the whole batch. Equal tokens become exactly 0 (or exactly the mean if it is added back): the
    mean of equal floats often differs from that float, and its rounding error divided by √eps would look like an advantage. The
    variance is unbiased by default, as in most public code; Huang et al. 2024, section 4 (https://arxiv.org/abs/2403.17031)
    list it among the details that matter in PPO. Use `shift_mean=False` for rewards, whose sign has a meaning.

    Args:
        x_BT: [B, T], any range, garbage where the mask is False.
        mask_BT: [B, T], True = token counts.
        shift_mean: whether the result has mean 0; if False, the mean is added back after scaling. Default: True.
        correction: 1 divides by n − 1 (unbiased), 0 by n (the population variance).
        eps: added to the variance, >= 0; keeps a constant batch at 0 instead of 0/0.

    Returns:
        [B, T], 0 where the mask is False.

    Raises:
        ValueError: the shapes differ, or fewer than two tokens count (their variance is undefined).
    """
    check_scalar(eps=eps)
    count = int(mask_BT.bool().sum())
    if count < 2:
        raise ValueError(f"whitening needs at least 2 tokens, got a mask that keeps {count}: the variance is undefined")
    exact_BT = zero_padding(x_BT, mask_BT).to(at_least_float32(x_BT.dtype))
    mean = masked_mean(exact_BT, mask_BT)
    # A second pass removes the rounding error of the first mean.
    rest = _mean_of_offsets(exact_BT - mean, mask_BT)
    # Padding was 0 and is −mean now: zero it again, because the variance sums over all positions.
    centred_BT = zero_padding(exact_BT - mean - rest, mask_BT)
    white_BT = centred_BT * torch.rsqrt(centred_BT.square().sum() / (count - correction) + eps)
    return (white_BT if shift_mean else zero_padding(white_BT + mean + rest, mask_BT)).to(x_BT.dtype)


def _mean_of_offsets(offsets_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Compute a mean that is exact if all offsets are equal, which the sum of floats does not guarantee."""
    kept_N = offsets_BT[mask_BT.bool()]
    return kept_N[0] if bool((kept_N == kept_N[0]).all()) else kept_N.mean()


def aggregate(loss_BT: Tensor, mask_BT: Tensor, mode: Aggregation, *, norm_length: int | None = None) -> Tensor:
    """Reduce token losses to the scalar to minimise.

    token_mean                         Σ m l / Σ m: all tokens have equal weight, so long rows have more
    token_sum                          Σ m l: for callers with a different divisor
    sequence_mean_token_mean           mean over non-empty rows of the mean of the row: all rows have equal weight
    sequence_mean_token_mean_all_rows  the same, but an empty row counts as a row with loss 0
    sequence_mean_token_sum            mean over non-empty rows of the sum of the row: the plain policy gradient
    sequence_mean_token_sum_norm       the former / L
    constant_length                    Σ m l / (B L): empty rows count, and the weight of a token does not depend on lengths

    The first is DAPO's (https://arxiv.org/abs/2503.14476, section 3.3), sequence_mean_token_mean GRPO's
    (https://arxiv.org/abs/2402.03300, eq. 3), the last Dr. GRPO's (https://arxiv.org/abs/2503.20783, section 3.2).

    The mean of the means of two micro-batches is not the mean of the batch. To split a batch, take the weights of the
    whole from `aggregation_weights` and add up Σ w l of the parts.

    Args:
        loss_BT: [B, T], loss per token, garbage where the mask is False.
        mask_BT: [B, T], True = token counts.
        mode: one of the seven above.
        norm_length: L in tokens, > 0. Required by the two modes that divide by L, and an error for the others.

    Returns:
        Scalar; 0 with a gradient of 0 if no token counts.

    Raises:
        ValueError: the shapes differ, the mode is unknown, or norm_length is missing, not positive or unused.
    """
    check_same_shape(loss=loss_BT, mask=mask_BT)
    dtype = at_least_float32(loss_BT.dtype)
    weights_BT = aggregation_weights(mask_BT, mode, norm_length=norm_length, dtype=dtype)
    return (zero_padding(loss_BT, mask_BT) * weights_BT).sum().to(loss_BT.dtype)


def aggregation_weights(
    mask_BT: Tensor, mode: Aggregation, *, norm_length: int | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Compute the weight of each token in the aggregated loss: aggregate(l) = Σ w l.

    All modes are linear in the loss, with weights that depend on the mask alone. So a batch can be split: compute the weights
    of the whole batch and pass each micro-batch its rows; the sum over micro-batches has the loss and gradient of the batch.

    Args:
        mask_BT: [B, T] of the whole batch, True = token counts.
        mode: as in `aggregate`.
        norm_length: as in `aggregate`.
        dtype: type of the weights, that of the loss or wider: 1/3 in bfloat16 is off by 0.2%.

    Returns:
        [B, T], >= 0, 0 where the mask is False.

    Raises:
        ValueError: the mode is unknown, or norm_length is missing, not positive or has no use.

    Example:
        >>> aggregation_weights(torch.tensor([[True, True], [True, False]]), "sequence_mean_token_mean").tolist()
        [[0.25, 0.25], [0.5, 0.0]]
    """
    if mode not in get_args(Aggregation):
        raise ValueError(f"mode must be one of {', '.join(get_args(Aggregation))}, got {mode!r}")
    if (mode in _WITH_NORM_LENGTH) != (norm_length is not None):
        raise ValueError(
            f"norm_length is required for {' and '.join(_WITH_NORM_LENGTH)} and not allowed otherwise, got {norm_length} for "
            f"mode {mode!r}"
        )
    if norm_length is not None and norm_length <= 0:
        raise ValueError(f"norm_length must be > 0 tokens, got {norm_length}")
    lengths_B = mask_BT.bool().sum(-1)
    return broadcast_to_tokens(1 / _divisors(lengths_B, mode, norm_length or 1).to(dtype), mask_BT)


def _divisors(lengths_B: Tensor, mode: Aggregation, norm_length: int) -> Tensor:
    """Return the divisor of each row's token losses; at least 1, so an empty batch has loss 0."""
    filled_rows = (lengths_B > 0).sum().clamp(min=1)
    divisors: dict[Aggregation, Tensor | int] = {
        "token_mean": lengths_B.sum().clamp(min=1),
        "token_sum": 1,
        "sequence_mean_token_mean": filled_rows * lengths_B.clamp(min=1),
        "sequence_mean_token_mean_all_rows": len(lengths_B) * lengths_B.clamp(min=1),
        "sequence_mean_token_sum": filled_rows,
        "sequence_mean_token_sum_norm": filled_rows * norm_length,
        "constant_length": len(lengths_B) * norm_length,
    }
    # Some divisors are scalars: expand them to one per row.
    return torch.ones_like(lengths_B) * divisors[mode]
