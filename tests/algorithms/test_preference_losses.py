from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from golden_numbers import golden
from selfeval.algorithms.preference_losses import bradley_terry_loss, preference_accuracy

NAMES = ["bradley_terry", "bradley_terry_f32", "bradley_terry_saturated"]


def f64(numbers: object) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def close(actual: Tensor, expected: object) -> None:
    torch.testing.assert_close(actual, f64(expected), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_losses_gradients_and_accuracy_match_golden(name: str) -> None:
    entry = golden("6_reward_model")[name]
    expected = entry["expected"]
    chosen_N, rejected_N, soft_N, margin_N = (
        f64(entry["inputs"][key]) for key in ("chosen", "rejected", "soft_label", "margin")
    )
    hard_N = torch.ones_like(soft_N)
    close(bradley_terry_loss(chosen_N, rejected_N, hard_N), expected["loss_hard"])
    close(bradley_terry_loss(chosen_N, rejected_N, hard_N, margin=margin_N), expected["loss_margin"])
    close(bradley_terry_loss(chosen_N, rejected_N, soft_N, margin=margin_N), expected["loss_soft_margin"])
    loss_N = bradley_terry_loss(chosen_N.requires_grad_(), rejected_N.requires_grad_(), soft_N)
    close(loss_N, expected["loss_soft"])
    gradients = torch.autograd.grad(loss_N.mean(), (chosen_N, rejected_N))
    close(gradients[0], expected["grad_chosen_soft_mean"])
    close(gradients[1], expected["grad_rejected_soft_mean"])
    close(preference_accuracy(chosen_N, rejected_N), expected["accuracy"])


def test_a_number_as_margin_shifts_every_pair() -> None:
    # Δ − m = 2 − 2 = 0: loss ln 2 whatever the label.
    close(bradley_terry_loss(f64([3.0, 3.0]), f64([1.0, 1.0]), f64([1.0, 0.3]), margin=2.0), [math.log(2)] * 2)


def test_a_soft_label_has_its_optimum_at_its_log_odds() -> None:
    # ∂l/∂Δ = σ(Δ) − y is 0 at Δ = log(y / (1 − y)).
    chosen_N = f64([math.log(0.9 / 0.1)]).requires_grad_()
    (gradient_N,) = torch.autograd.grad(bradley_terry_loss(chosen_N, f64([0.0]), f64([0.9])).sum(), chosen_N)
    close(gradient_N, [0.0])


def test_a_tie_is_wrong_and_no_pair_is_undefined() -> None:
    close(preference_accuracy(f64([1.0, 2.0, 3.0, 0.0]), f64([1.0, 1.0, 4.0, -1.0])), 0.5)
    assert preference_accuracy(f64([]), f64([])).isnan()


@pytest.mark.parametrize("label", [-0.1, 1.1, math.nan])
def test_a_label_that_is_no_probability_is_refused(label: float) -> None:
    with pytest.raises(ValueError, match="probability"):
        bradley_terry_loss(f64([0.0]), f64([0.0]), f64([label]))


def test_shapes_that_would_broadcast_are_refused() -> None:
    with pytest.raises(ValueError, match=r"label \[2, 1\]"):
        bradley_terry_loss(torch.zeros(2), torch.zeros(2), torch.ones(2, 1))
    with pytest.raises(ValueError, match="one shape"):
        preference_accuracy(torch.zeros(2), torch.zeros(2, 1))
