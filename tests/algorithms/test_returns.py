from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from golden_numbers import golden
from selfeval.algorithms.masked import whiten
from selfeval.algorithms.returns import discounted_returns, gae

GAE = [
    "gae_right_pad",
    "gae_f32",
    "gae_gamma1_lam1",
    "gae_lam0",
    "gae_gamma0",
    "gae_left_pad",
    "gae_empty_row",
    "gae_holes_skip",
]
RETURNS = [
    "discounted_returns",
    "discounted_returns_f32",
    "monte_carlo_gamma1",
    "terminal_reward_only",
    "discounted_returns_holes_skip",
]


def f64(numbers: object) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def close(actual: Tensor, expected: object) -> None:
    torch.testing.assert_close(actual, f64(expected), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", GAE)
def test_gae_matches_golden(name: str) -> None:
    entry = golden("1_returns_gae")[name]
    rewards_BT, values_BT, mask_BT = (f64(entry["inputs"][key]) for key in ("rewards", "values", "mask"))
    advantages_BT = gae(rewards_BT, values_BT, mask_BT.bool(), gamma=entry["params"]["gamma"], lam=entry["params"]["lam"])
    close(advantages_BT, entry["expected"]["advantages"])
    close(torch.where(mask_BT.bool(), advantages_BT + values_BT, 0), entry["expected"]["returns"])
    close(whiten(advantages_BT, mask_BT), entry["expected"]["advantages_whitened"])


def test_gae_in_float32_matches_golden() -> None:
    entry = golden("1_returns_gae")["gae_f32"]
    inputs = (torch.tensor(entry["inputs"][key]) for key in ("rewards", "values", "mask"))
    advantages_BT = gae(*inputs, gamma=entry["params"]["gamma"], lam=entry["params"]["lam"])
    torch.testing.assert_close(advantages_BT, torch.tensor(entry["expected"]["advantages"]), rtol=1e-5, atol=1e-6)


def test_holes_are_skipped_not_zero_filled() -> None:
    # The golden file holds the other convention too (masked steps cost γλ); ours must differ from it.
    entry = golden("1_returns_gae")["gae_holes_zero_fill"]
    inputs = (f64(entry["inputs"][key]) for key in ("rewards", "values", "mask"))
    advantages_BT = gae(*inputs, gamma=entry["params"]["gamma"], lam=entry["params"]["lam"])
    assert (advantages_BT - f64(entry["expected"]["advantages"])).abs().max() > 1e-3


@pytest.mark.parametrize("name", RETURNS)
def test_discounted_returns_match_golden(name: str) -> None:
    entry = golden("1_returns_gae")[name]
    returns_BT = discounted_returns(
        f64(entry["inputs"]["rewards"]), f64(entry["inputs"]["mask"]), gamma=entry["params"]["gamma"]
    )
    close(returns_BT, entry["expected"]["returns"])


def slow_gae(rewards: list[float], values: list[float], mask: list[bool], gamma: float, lam: float) -> list[float]:
    """The sum of the paper (eq. 16), token by token: A_t = Σ_l (γλ)^l δ_{t+l}, over the kept tokens alone."""
    kept = [t for t, keep in enumerate(mask) if keep]
    value_after = [values[t] for t in kept[1:]] + [0.0]
    deltas = [rewards[t] + gamma * after - values[t] for t, after in zip(kept, value_after, strict=False)]
    out = [0.0] * len(mask)
    for i, t in enumerate(kept):
        out[t] = math.fsum((gamma * lam) ** (j - i) * deltas[j] for j in range(i, len(kept)))
    return out


def test_gae_matches_the_sum_of_the_paper_for_any_mask() -> None:
    generator = torch.Generator().manual_seed(0)
    rewards_BT, values_BT = (torch.randn(40, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    mask_BT = torch.rand(40, 7, generator=generator) < 0.6
    rows = zip(rewards_BT.tolist(), values_BT.tolist(), mask_BT.tolist(), strict=True)
    expected = [slow_gae(rewards, values, mask, 0.9, 0.8) for rewards, values, mask in rows]
    close(gae(rewards_BT, values_BT, mask_BT, gamma=0.9, lam=0.8), expected)


@pytest.mark.parametrize("garbage", [1e30, math.inf, math.nan])
def test_padding_leaks_neither_into_values_nor_into_gradients(garbage: float) -> None:
    mask_BT = torch.tensor([[False, True, False, True, False]])
    rewards_BT = f64([[garbage, 1.0, garbage, 2.0, garbage]]).requires_grad_()
    values_BT = f64([[garbage, 0.5, garbage, 0.25, garbage]]).requires_grad_()
    advantages_BT = gae(rewards_BT, values_BT, mask_BT, gamma=0.5, lam=0.5)
    # Second token: δ = 2 − 0.25 = 1.75. First: δ = 1 + 0.5·0.25 − 0.5 = 0.625, A = 0.625 + 0.25·1.75 = 1.0625.
    close(advantages_BT, [[0.0, 1.0625, 0.0, 1.75, 0.0]])
    reward_gradient, value_gradient = torch.autograd.grad(advantages_BT.sum(), (rewards_BT, values_BT))
    # r_2 enters A_2 once and A_1 with γλ; V_2 enters A_2 with −1 and A_1 with γ − γλ.
    close(reward_gradient, [[0.0, 1.0, 0.0, 1.25, 0.0]])
    close(value_gradient, [[0.0, -1.0, 0.0, -0.75, 0.0]])
    close(discounted_returns(rewards_BT, mask_BT, gamma=0.5), [[0.0, 2.0, 0.0, 2.0, 0.0]])


def test_rows_of_no_tokens_give_no_tokens() -> None:
    nothing_BT = torch.zeros(2, 0)
    assert gae(nothing_BT, nothing_BT, nothing_BT, gamma=1.0, lam=1.0).shape == (2, 0)


def test_shapes_that_would_broadcast_are_refused() -> None:
    with pytest.raises(ValueError, match="one shape"):
        gae(torch.zeros(2, 3), torch.zeros(2, 4), torch.ones(2, 3), gamma=1.0, lam=1.0)
    with pytest.raises(ValueError, match="one shape"):
        discounted_returns(torch.zeros(2, 3), torch.ones(3), gamma=1.0)
