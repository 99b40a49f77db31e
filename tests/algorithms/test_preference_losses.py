from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from golden_numbers import golden
from selfeval.algorithms.preference_losses import (
    bradley_terry_loss,
    centering_penalty,
    cpo_loss,
    dpo_loss,
    dpo_margin,
    hinge_loss,
    implicit_reward,
    ipo_loss,
    kto_baseline,
    kto_loss,
    orpo_loss,
    preference_accuracy,
    robust_dpo_loss,
    simpo_loss,
)

NAMES = ["bradley_terry", "bradley_terry_f32", "bradley_terry_saturated"]
# The inputs of an *_f32 entry are exact in float32; its expected numbers are those of float64.
DPO = [
    ("dpo", torch.float64),
    ("dpo_saturated", torch.float64),
    ("dpo_f32", torch.float64),
    ("dpo_f32", torch.float32),
]
KTO = [("kto", torch.float64), ("kto_weights_f32", torch.float64), ("kto_weights_f32", torch.float32)]
ODDS = [("orpo_simpo", torch.float64), ("orpo_simpo_f32", torch.float64), ("orpo_simpo_f32", torch.float32)]


def f64(numbers: object) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def close(actual: Tensor, expected: object) -> None:
    if actual.dtype == torch.float32:
        torch.testing.assert_close(actual.double(), f64(expected), rtol=1e-5, atol=1e-6)
    else:
        torch.testing.assert_close(actual, f64(expected), rtol=1e-9, atol=1e-12)


def entry_of(name: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    entry = golden("7_preference")[name]
    inputs = {key: torch.tensor(numbers, dtype=dtype) for key, numbers in entry["inputs"].items()}
    return inputs, entry["params"], entry["expected"]


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
    with pytest.raises(ValueError, match="probabilities"):
        bradley_terry_loss(f64([0.0]), f64([0.0]), f64([label]))


def test_shapes_that_would_broadcast_are_refused() -> None:
    with pytest.raises(ValueError, match=r"label \[2, 1\]"):
        bradley_terry_loss(torch.zeros(2), torch.zeros(2), torch.ones(2, 1))
    with pytest.raises(ValueError, match="the same shape"):
        preference_accuracy(torch.zeros(2), torch.zeros(2, 1))


@pytest.mark.parametrize(("name", "dtype"), DPO)
def test_the_dpo_family_matches_golden(name: str, dtype: torch.dtype) -> None:
    inputs, params, expected = entry_of(name, dtype)
    keys = ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected")
    beta, eps = params["beta"], params["label_smoothing"]
    margin_N = dpo_margin(*(inputs[key] for key in keys))
    ones_N = torch.ones_like(margin_N)
    close(margin_N, expected["logits"])
    close(dpo_loss(margin_N, ones_N, beta=beta), expected["sigmoid"])
    close(dpo_loss(margin_N, (1 - eps) * ones_N, beta=beta), expected["cdpo"])
    close(robust_dpo_loss(margin_N, beta=beta, flip_rate=eps), expected["robust"])
    close(ipo_loss(margin_N, beta=beta), expected["ipo_sum"])
    close(hinge_loss(margin_N, beta=beta), expected["hinge"])
    close(implicit_reward(inputs["policy_chosen"], inputs["ref_chosen"], beta=beta), expected["reward_chosen"])
    close(implicit_reward(inputs["policy_rejected"], inputs["ref_rejected"], beta=beta), expected["reward_rejected"])
    lengths = {"chosen": inputs["chosen_len"], "rejected": inputs["rejected_len"]}
    means_N = dpo_margin(*(inputs[key] / lengths[key.split("_")[1]] for key in keys))
    close(ipo_loss(means_N, beta=beta), expected["ipo_length_normalised"])


@pytest.mark.parametrize(("name", "dtype"), DPO)
def test_gradients_of_smoothed_dpo_match_golden(name: str, dtype: torch.dtype) -> None:
    inputs, params, expected = entry_of(name, dtype)
    chosen_N, rejected_N = inputs["policy_chosen"].requires_grad_(), inputs["policy_rejected"].requires_grad_()
    margin_N = dpo_margin(chosen_N, rejected_N, inputs["ref_chosen"], inputs["ref_rejected"])
    label_N = torch.full_like(margin_N, 1 - params["label_smoothing"])
    gradients = torch.autograd.grad(dpo_loss(margin_N, label_N, beta=params["beta"]).mean(), (chosen_N, rejected_N))
    close(gradients[0], expected["grad_policy_chosen_cdpo_mean"])
    close(gradients[1], expected["grad_policy_rejected_cdpo_mean"])


def test_each_pair_has_its_own_label() -> None:
    # ∂l/∂h = β (σ(βh) − y) is 0 at h = log(y / (1 − y)) / β: each label has its own optimum, and ½ has it at 0.
    label_N = f64([0.9, 0.5, 0.2])
    margin_N = (torch.log(label_N / (1 - label_N)) / 0.1).requires_grad_()
    (gradient_N,) = torch.autograd.grad(dpo_loss(margin_N, label_N, beta=0.1).sum(), margin_N)
    close(gradient_N, [0.0, 0.0, 0.0])
    with pytest.raises(ValueError, match="probabilities"):
        dpo_loss(f64([0.0]), f64([1.5]), beta=0.1)


def test_the_robust_loss_is_unbiased_under_flips() -> None:
    # A label is wrong with probability 0.2, and a wrong label turns h round: the mean is the loss on clean labels.
    margin_N = f64([-3.0, 0.5, 2.0])
    flipped_N = 0.8 * robust_dpo_loss(margin_N, beta=0.7, flip_rate=0.2)
    flipped_N = flipped_N + 0.2 * robust_dpo_loss(-margin_N, beta=0.7, flip_rate=0.2)
    close(flipped_N, dpo_loss(margin_N, torch.ones_like(margin_N), beta=0.7).tolist())


@pytest.mark.parametrize(("name", "dtype"), KTO)
def test_kto_matches_golden(name: str, dtype: torch.dtype) -> None:
    inputs, params, expected = entry_of(name, dtype)
    policy_N, mismatched_N = inputs["policy"].requires_grad_(), inputs["kl_policy"].requires_grad_()
    baseline = kto_baseline(mismatched_N, inputs["kl_ref"])
    close(baseline, expected["kl"])
    loss_N = kto_loss(
        policy_N,
        inputs["ref"],
        inputs["label"],
        baseline,
        beta=params["beta"],
        desirable_weight=params["desirable_weight"],
        undesirable_weight=params["undesirable_weight"],
    )
    close(loss_N.detach(), expected["losses"])
    gradient_N, through_baseline_N = torch.autograd.grad(loss_N.mean(), (policy_N, mismatched_N), allow_unused=True)
    close(gradient_N, expected["grad_policy"])
    assert through_baseline_N is None


def test_the_reference_point_of_kto_is_never_negative() -> None:
    # mean(−3, 1) = −1 estimates a KL, which cannot be negative.
    close(kto_baseline(f64([-3.0, 1.0]), f64([0.0, 0.0])), 0.0)
    # The default weights are 1: σ(0) = ½ at ρ = z0, good or bad.
    close(kto_loss(f64([2.0, 2.0]), f64([0.0, 0.0]), torch.tensor([True, False]), f64(2.0), beta=0.1), [0.5, 0.5])


@pytest.mark.parametrize(("name", "dtype"), ODDS)
def test_losses_without_a_reference_match_golden(name: str, dtype: torch.dtype) -> None:
    inputs, params, expected = entry_of(name, dtype)
    chosen_N, rejected_N, nll_N = inputs["avg_logp_chosen"], inputs["avg_logp_rejected"], inputs["nll_chosen"]
    ones_N, none_N, beta = torch.ones_like(nll_N), torch.zeros_like(nll_N), params["beta"]
    close(orpo_loss(chosen_N, rejected_N, none_N, beta=1.0), expected["orpo_or_loss"])
    close(orpo_loss(chosen_N, rejected_N, nll_N, beta=beta).mean(), expected["orpo_loss"])
    close(simpo_loss(chosen_N, rejected_N, ones_N, beta=beta, gamma=params["gamma"]), expected["simpo"])
    smooth_N = (1 - params["label_smoothing"]) * ones_N
    close(simpo_loss(chosen_N, rejected_N, smooth_N, beta=beta, gamma=params["gamma"]), expected["simpo_smoothed"])
    close(cpo_loss(chosen_N, rejected_N, ones_N, none_N, beta=beta), expected["cpo_sigmoid"])
    close(
        cpo_loss(chosen_N, rejected_N, ones_N, nll_N, beta=beta),
        [a + b for a, b in zip(expected["cpo_sigmoid"], golden("7_preference")[name]["inputs"]["nll_chosen"], strict=True)],
    )


def test_odds_of_almost_certain_and_almost_impossible_replies() -> None:
    # x = −1e-12: 1 − e^x = 1e-12, log odds = 12 ln 10 (the direct 1 − e^x has 4 right digits only). x = −1000: log odds = x.
    chosen_N = f64([-1e-12, -1000.0]).requires_grad_()
    loss_N = orpo_loss(chosen_N, f64([-1000.0, -1e-12]), torch.zeros(2, dtype=torch.float64), beta=1.0)
    close(loss_N[1], 1000 + 12 * math.log(10))
    gradients = [torch.autograd.grad(loss, chosen_N, retain_graph=True)[0].isfinite().all() for loss in loss_N]
    assert all(gradients)
    with pytest.raises(ValueError, match=r"below 0 .* got 0.0 for rejected"):
        orpo_loss(f64([-1.0]), f64([0.0]), f64([0.0]), beta=1.0)


@pytest.mark.parametrize("beta", [0.0, -0.1, math.nan])
def test_a_beta_that_is_not_positive_is_refused(beta: float) -> None:
    one_N = f64([-1.0])
    for loss in (
        lambda: dpo_loss(one_N, -one_N, beta=beta),
        lambda: robust_dpo_loss(one_N, beta=beta, flip_rate=0.1),
        lambda: ipo_loss(one_N, beta=beta),
        lambda: hinge_loss(one_N, beta=beta),
        lambda: kto_loss(one_N, one_N, -one_N, f64(0.0), beta=beta),
        lambda: simpo_loss(one_N, one_N, -one_N, beta=beta, gamma=0.5),
        lambda: cpo_loss(one_N, one_N, -one_N, one_N, beta=beta),
        lambda: orpo_loss(one_N, one_N, one_N, beta=beta),
    ):
        with pytest.raises(ValueError, match="beta must be > 0"):
            loss()
    with pytest.raises(ValueError, match=r"flip_rate must be in \[0, 0.5\), got 0.5"):
        robust_dpo_loss(one_N, beta=0.1, flip_rate=0.5)


def test_pairs_that_would_broadcast_are_refused() -> None:
    two_N, column = f64([-1.0, -2.0]), f64([[-1.0], [-2.0]])
    for loss in (
        lambda: dpo_margin(two_N, two_N, two_N, column),
        lambda: implicit_reward(two_N, column, beta=0.1),
        lambda: dpo_loss(two_N, column.abs() / 2, beta=0.1),
        lambda: kto_baseline(two_N, column),
        lambda: kto_loss(two_N, two_N, column, f64(0.0), beta=0.1),
        lambda: simpo_loss(two_N, two_N, column.abs() / 2, beta=0.1, gamma=0.5),
        lambda: cpo_loss(two_N, two_N, two_N.abs() / 2, column, beta=0.1),
        lambda: orpo_loss(two_N, two_N, column, beta=0.1),
    ):
        with pytest.raises(ValueError, match="the same shape"):
            loss()


def test_centering_leaves_the_difference_to_the_labels() -> None:
    # y = 0.9, weight w = 0.01, scores c and r with d = c - r and s = c + r:
    #   l = −[0.9 log σ(d) + 0.1 log σ(−d)] + w s²
    # ∂l/∂s = 2 w s = 0 gives s = 0; ∂l/∂d = σ(d) − 0.9 = 0 gives d = log(0.9 / 0.1) = 2.1972.
    # With w (c² + r²) = w (s² + d²) / 2 the second condition would be σ(d) + w d = 0.9 instead, so d is pulled towards 0
    # (with half of that, the former implementation, σ(d) + w d / 2 = 0.9 gives d = 2.086).
    scores = torch.tensor([3.0, 2.0], dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.LBFGS([scores], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-15)

    def loss() -> Tensor:
        optimizer.zero_grad()
        chosen_N, rejected_N = scores[:1], scores[1:]
        loss_N = bradley_terry_loss(chosen_N, rejected_N, f64([0.9])) + 0.01 * centering_penalty(chosen_N, rejected_N)
        loss_N.sum().backward()
        return loss_N.sum()

    optimizer.step(loss)
    found = scores.detach()
    assert (found[0] - found[1]).item() == pytest.approx(math.log(9), abs=1e-6)
    assert (found[0] + found[1]).item() == pytest.approx(0.0, abs=1e-6)
    close(centering_penalty(f64([1.0, 2.0]), f64([0.5, -2.0])), [2.25, 0.0])


def test_a_margin_is_one_number_or_one_a_pair() -> None:
    # Δ = 1 − 0 − margin: −log σ(1) and −log σ(0).
    chosen_N, rejected_N, label_N = f64([1.0, 1.0]), f64([0.0, 0.0]), f64([1.0, 1.0])
    expected = [math.log(1 + math.exp(-1)), math.log(2)]
    close(bradley_terry_loss(chosen_N, rejected_N, label_N, margin=f64([0.0, 1.0])), expected)
    close(bradley_terry_loss(chosen_N, rejected_N, label_N, margin=torch.tensor(1.0)), [math.log(2)] * 2)
    with pytest.raises(ValueError, match=r"margin must be a scalar or have shape \[2\], got shape \[2, 1\]"):
        bradley_terry_loss(chosen_N, rejected_N, label_N, margin=f64([[0.0], [1.0]]))


def test_the_baseline_of_kto_is_one_number() -> None:
    with pytest.raises(ValueError, match=r"baseline must be a scalar .* got shape \[2, 1\]"):
        kto_loss(f64([1.0, 1.0]), f64([0.0, 0.0]), torch.tensor([True, False]), f64([[0.0], [0.0]]), beta=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(chosen=st.floats(-1e4, -1e-45), rejected=st.floats(-1e4, -1e-45), other=st.floats(-1e4, 1e4))
@settings(max_examples=200, deadline=None)
def test_every_loss_has_a_finite_gradient(dtype: torch.dtype, chosen: float, rejected: float, other: float) -> None:
    inputs = torch.tensor([[chosen], [rejected], [other]], dtype=dtype).requires_grad_()
    one, two, three = inputs
    least = torch.nextafter(torch.zeros((), dtype=dtype), torch.tensor(-1.0, dtype=dtype))
    label_N, good_N = torch.tensor([0.9], dtype=dtype), torch.tensor([True])
    losses = (
        bradley_terry_loss(one, three, label_N),
        dpo_loss(three, label_N, beta=5.0),
        robust_dpo_loss(three, beta=5.0, flip_rate=0.1),
        hinge_loss(three, beta=5.0),
        ipo_loss(three, beta=0.1),
        kto_loss(one, three, good_N, torch.zeros((), dtype=dtype), beta=5.0),
        simpo_loss(one, two, label_N, beta=2.0, gamma=1.0),
        cpo_loss(one, two, label_N, -one, beta=2.0),
        orpo_loss(torch.minimum(one, least), torch.minimum(two, least), -one, beta=0.1),
    )
    for loss_N in losses:
        (gradient,) = torch.autograd.grad(loss_N.sum(), inputs, retain_graph=True)
        assert gradient.isfinite().all()
