from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from golden_numbers import golden
from selfeval.algorithms.masked import aggregate, zero_padding
from selfeval.algorithms.policy_losses import approximate_kl, clip_fraction, ppo_clip_loss

ENTRIES = [
    ("4_ppo", "ppo_clip"),
    ("4_ppo", "ppo_f32"),
    ("4_ppo", "ppo_const_length"),
    ("4_ppo", "ppo_empty_row"),
    ("4_ppo", "ppo_on_policy"),
    ("5_group", "dapo_clip_higher"),
]


def f64(numbers: object) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def close(actual: Tensor, expected: object) -> None:
    torch.testing.assert_close(actual, f64(expected), rtol=1e-9, atol=1e-12)


def tensors(entry: dict[str, Any], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.tensor(entry["inputs"][key], dtype=dtype) for key in ("logp", "old_logp", "advantages", "mask")]


@pytest.mark.parametrize(("quantity", "name"), ENTRIES)
def test_loss_gradient_and_statistics_match_golden(quantity: str, name: str) -> None:
    entry = golden(quantity)[name]
    expected, clips = (
        entry["expected"],
        {"clip_low": entry["params"]["eps_low"], "clip_high": entry["params"]["eps_high"]},
    )
    logprobs_BT, old_BT, advantages_BT, mask_BT = tensors(entry)
    loss_BT = ppo_clip_loss(logprobs_BT.requires_grad_(), old_BT, advantages_BT, **clips)
    close(loss_BT, expected["per_token_loss"])
    (gradient_BT,) = torch.autograd.grad(aggregate(loss_BT, mask_BT, "token_mean"), logprobs_BT)
    close(gradient_BT, expected["grad_logp_token_mean"])
    close(clip_fraction(logprobs_BT, old_BT, advantages_BT, mask_BT, **clips), expected["clipfrac"])
    close(approximate_kl(logprobs_BT, old_BT, mask_BT), expected["approx_kl_k3"])


@pytest.mark.parametrize("name", ["ppo_dual_clip", "dapo_clip_higher_dual"])
def test_what_does_not_depend_on_the_dual_clip_matches_golden(name: str) -> None:
    entry = golden("4_ppo" if name.startswith("ppo") else "5_group")[name]
    logprobs_BT, old_BT, advantages_BT, mask_BT = tensors(entry)
    clips = {"clip_low": entry["params"]["eps_low"], "clip_high": entry["params"]["eps_high"]}
    close(clip_fraction(logprobs_BT, old_BT, advantages_BT, mask_BT, **clips), entry["expected"]["clipfrac"])
    close(approximate_kl(logprobs_BT, old_BT, mask_BT), entry["expected"]["approx_kl_k3"])
    # The dual clip only bounds the loss of tokens with A < 0, by −cA: bounded afterwards, ours is the golden one.
    loss_BT = ppo_clip_loss(logprobs_BT, old_BT, advantages_BT, **clips)
    bounded_BT = torch.minimum(loss_BT, -entry["params"]["dual_clip"] * advantages_BT)
    close(torch.where(advantages_BT < 0, bounded_BT, loss_BT), entry["expected"]["per_token_loss"])


def test_loss_in_float32_matches_golden() -> None:
    entry = golden("4_ppo")["ppo_f32"]
    logprobs_BT, old_BT, advantages_BT, _ = tensors(entry, torch.float32)
    loss_BT = ppo_clip_loss(logprobs_BT, old_BT, advantages_BT, clip_low=0.2, clip_high=0.2)
    torch.testing.assert_close(loss_BT, torch.tensor(entry["expected"]["per_token_loss"]), rtol=1e-5, atol=1e-6)


def test_the_four_corners() -> None:
    # Ratios 2 and 1/2, advantages ±1, range [3/4, 5/4]. The clip acts where the ratio went the way of the advantage:
    # r=2, A=+1: −1.25 clipped. r=2, A=−1: 2, not clipped. r=½, A=+1: −½, not clipped. r=½, A=−1: ¾ clipped.
    logprobs_BT = f64([[2.0, 2.0, 0.5, 0.5]]).log().requires_grad_()
    old_BT, advantages_BT = torch.zeros_like(logprobs_BT), f64([[1.0, -1.0, 1.0, -1.0]])
    loss_BT = ppo_clip_loss(logprobs_BT, old_BT, advantages_BT, clip_low=0.25, clip_high=0.25)
    close(loss_BT, [[-1.25, 2.0, -0.5, 0.75]])
    close(torch.autograd.grad(loss_BT.sum(), logprobs_BT)[0], [[0.0, 2.0, -0.5, 0.0]])
    everything_BT = torch.ones_like(logprobs_BT)
    close(clip_fraction(logprobs_BT, old_BT, advantages_BT, everything_BT, clip_low=0.25, clip_high=0.25), 0.5)


@pytest.mark.parametrize("garbage", [1e30, math.inf, math.nan])
def test_padding_leaks_neither_into_values_nor_into_gradients(garbage: float) -> None:
    mask_BT = torch.tensor([[True, False], [False, True]])
    logprobs_BT = torch.where(mask_BT, f64(-1.0), garbage).requires_grad_()
    old_BT = torch.where(mask_BT, f64(-1.0), -garbage)
    advantages_BT = torch.where(mask_BT, f64(3.0), garbage)
    clips = {"clip_low": 0.2, "clip_high": 0.2}
    kept = [zero_padding(x_BT, mask_BT) for x_BT in (logprobs_BT, old_BT, advantages_BT)]
    loss = aggregate(ppo_clip_loss(kept[0], kept[1], kept[2], **clips), mask_BT, "token_mean")
    close(loss, -3.0)
    close(torch.autograd.grad(loss, logprobs_BT)[0], [[-1.5, 0.0], [0.0, -1.5]])
    close(clip_fraction(logprobs_BT, old_BT, advantages_BT, mask_BT, **clips), 0.0)
    kl = approximate_kl(logprobs_BT, old_BT, mask_BT)
    close(kl, 0.0)
    close(torch.autograd.grad(kl, logprobs_BT)[0], [[0.0, 0.0], [0.0, 0.0]])


def test_shapes_that_would_broadcast_are_refused() -> None:
    row_BT = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"advantages \[2, 1\]"):
        ppo_clip_loss(row_BT, row_BT, torch.zeros(2, 1), clip_low=0.2, clip_high=0.2)
    with pytest.raises(ValueError, match="one shape"):
        clip_fraction(row_BT, row_BT, row_BT, torch.ones(3), clip_low=0.2, clip_high=0.2)
    with pytest.raises(ValueError, match="one shape"):
        approximate_kl(row_BT, row_BT, torch.ones(3))
