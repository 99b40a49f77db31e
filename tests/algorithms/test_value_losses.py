from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from golden_numbers import golden
from selfeval.algorithms.masked import aggregate, zero_padding
from selfeval.algorithms.value_losses import clipped_value_loss, explained_variance, value_clip_fraction


def f64(numbers: object) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def close(actual: Tensor, expected: object) -> None:
    torch.testing.assert_close(actual, f64(expected), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["value_clip", "value_noclip", "value_f32"])
def test_loss_and_gradient_match_golden(name: str) -> None:
    entry = golden("4_ppo")[name]
    values_BT, old_BT, returns_BT, mask_BT = (f64(entry["inputs"][key]) for key in ("values", "old_values", "returns", "mask"))
    clip = entry["params"]["cliprange_value"]
    loss_BT = clipped_value_loss(values_BT.requires_grad_(), old_BT, returns_BT, clip=clip)
    close(loss_BT, entry["expected"]["per_token_loss"])
    loss = aggregate(loss_BT, mask_BT, "token_mean")
    close(loss, entry["expected"]["loss"]["token_mean"])
    close(torch.autograd.grad(loss, values_BT)[0], entry["expected"]["grad_values_token_mean"])
    if clip is None:
        assert entry["expected"]["clipfrac"] == 0
    else:
        close(value_clip_fraction(values_BT, old_BT, returns_BT, mask_BT, clip=clip), entry["expected"]["clipfrac"])


def test_loss_in_float32_matches_golden() -> None:
    entry = golden("4_ppo")["value_f32"]
    values_BT, old_BT, returns_BT = (torch.tensor(entry["inputs"][key]) for key in ("values", "old_values", "returns"))
    loss_BT = clipped_value_loss(values_BT, old_BT, returns_BT, clip=entry["params"]["cliprange_value"])
    torch.testing.assert_close(loss_BT, torch.tensor(entry["expected"]["per_token_loss"]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("garbage", [1e30, math.inf, math.nan])
def test_the_value_clip_acts_where_the_critic_went_too_far_towards_its_target(garbage: float) -> None:
    # Old value 0, clip 1, target 3. V = 2 is held at 1: error 4 > 1, it acts. V = −2 is held at −1: 16 < 25, it does not
    # (the critic went the wrong way and is let back). V = ½ is inside.
    mask_BT = torch.tensor([[True, True, True, False]])
    values_BT, returns_BT = f64([[2.0, -2.0, 0.5, garbage]]), f64([[3.0, 3.0, 3.0, -garbage]])
    old_BT = torch.zeros_like(values_BT)
    close(value_clip_fraction(values_BT, old_BT, returns_BT, mask_BT, clip=1.0), 1 / 3)
    close(clipped_value_loss(values_BT, old_BT, returns_BT, clip=1.0)[mask_BT], [2.0, 12.5, 3.125])
    assert value_clip_fraction(values_BT, old_BT, returns_BT, torch.zeros_like(mask_BT), clip=1.0).isnan()


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("garbage", [1e30, math.inf, math.nan])
def test_zeroed_padding_leaks_neither_into_values_nor_into_gradients(garbage: float, clip: float | None) -> None:
    mask_BT = torch.tensor([[True, False]])
    values_BT = f64([[1.0, garbage]]).requires_grad_()
    kept = [zero_padding(x_BT, mask_BT) for x_BT in (values_BT, f64([[1.0, garbage]]), f64([[3.0, -garbage]]))]
    loss = aggregate(clipped_value_loss(*kept, clip=clip), mask_BT, "token_mean")
    close(loss, 2.0)  # ½ (1 − 3)², and V has not left V_old
    close(torch.autograd.grad(loss, values_BT)[0], [[-2.0, 0.0]])


@pytest.mark.parametrize("garbage", [0.0, 1e30, math.inf, math.nan])
def test_explained_variance(garbage: float) -> None:
    mask_BT = torch.tensor([[True, True, False], [True, True, False]])
    returns_BT = f64([[0.0, 2.0, garbage], [4.0, 6.0, garbage]])  # variance (9 + 1 + 1 + 9) / 4 = 5
    values_BT = f64([[1.0, 1.0, -garbage], [5.0, 5.0, -garbage]])  # residuals −1, 1, −1, 1: variance 1
    close(explained_variance(values_BT, returns_BT, mask_BT), 1 - 1 / 5)
    close(explained_variance(returns_BT, returns_BT, mask_BT), 1.0)
    close(explained_variance(zero_padding(returns_BT, mask_BT) + 7, returns_BT, mask_BT), 1.0)  # an offset costs nothing
    close(explained_variance(torch.zeros_like(returns_BT), returns_BT, mask_BT), 0.0)
    close(explained_variance(-returns_BT, returns_BT, mask_BT), -3.0)  # residual 2R: 1 − 4


def test_constant_returns_leave_nothing_to_explain() -> None:
    # 0.1 + 0.1 + 0.1 is not 3 · 0.1 in floating point: a variance test against 0 would let this through.
    constant_BT = f64([[0.1, 0.1, 0.1]])
    assert explained_variance(f64([[0.0, 1.0, 2.0]]), constant_BT, torch.ones(1, 3)).isnan()
    assert explained_variance(constant_BT, constant_BT, torch.zeros(1, 3)).isnan()


def test_shapes_that_would_broadcast_are_refused() -> None:
    with pytest.raises(ValueError, match=r"returns \[2, 1\]"):
        clipped_value_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 1), clip=None)
    with pytest.raises(ValueError, match="the same shape"):
        explained_variance(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(3))
    with pytest.raises(ValueError, match="the same shape"):
        value_clip_fraction(torch.zeros(2, 3), torch.zeros(2, 1), torch.zeros(2, 3), torch.ones(2, 3), clip=1.0)
