from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from golden_numbers import golden
from selfeval.algorithms.kl import categorical_entropy, categorical_kl, k1, k2, k3, kl_shaped_rewards
from selfeval.algorithms.masked import masked_mean

ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}


def f64(numbers: object) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def close(actual: Tensor, expected: object) -> None:
    torch.testing.assert_close(actual, f64(expected), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", ["token_kl", "token_kl_f32", "token_kl_large_gap"])
def test_token_estimators_match_golden(name: str, estimator: str) -> None:
    entry = golden("2_kl")[name]
    kl_BT = ESTIMATORS[estimator](f64(entry["inputs"]["logp"]), f64(entry["inputs"]["ref_logp"]))
    close(kl_BT, entry["expected"][estimator])
    close(masked_mean(kl_BT, f64(entry["inputs"]["mask"])), entry["expected"]["token_mean"][estimator])


def test_k3_keeps_its_digits_for_a_tiny_gap() -> None:
    # e^{−d} − 1 + d = d²/2 − d³/6 + ...: 5e-13 − 1.7e-19 at d = 1e-6, where exp(−d) − 1 is off by 1e-16.
    assert k3(f64([[-1.0]]), f64([[-1.0 - 1e-6]])).item() == pytest.approx(5e-13, rel=1e-5)


@pytest.mark.parametrize("name", ["categorical_kl", "categorical_kl_peaked", "categorical_kl_f32"])
def test_exact_divergences_match_golden(name: str) -> None:
    entry = golden("2_kl")[name]
    p, q = f64(entry["inputs"]["logits_p"]), f64(entry["inputs"]["logits_q"])
    close(categorical_kl(p, q), entry["expected"]["kl_pq"])
    close(categorical_kl(q, p), entry["expected"]["kl_qp"])
    close(categorical_entropy(p), entry["expected"]["entropy_p"])


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_expected_values_and_gradients_match_golden(estimator: str) -> None:
    """What the docstrings claim about values and losses, by enumerating all tokens instead of sampling them."""
    entry = golden("2_kl")["expected_gradients_V5"]
    logits_V, ref_logprobs_V = (
        f64(entry["inputs"]["logits"]).requires_grad_(),
        f64(entry["inputs"]["ref_logits"]).log_softmax(-1),
    )
    logprobs_V = logits_V.log_softmax(-1)
    p_V, kl_V = logprobs_V.exp(), ESTIMATORS[estimator](logprobs_V, ref_logprobs_V)
    close((p_V * kl_V).sum(), entry["expected"]["expected_value"][estimator])
    (as_loss_V,) = torch.autograd.grad((p_V.detach() * kl_V).sum(), logits_V, retain_graph=True)
    (in_reward_V,) = torch.autograd.grad((p_V * kl_V.detach()).sum(), logits_V, retain_graph=True)
    close(as_loss_V, entry["expected"]["grad_as_loss"][estimator])
    close(in_reward_V, entry["expected"]["grad_in_reward"][estimator])
    (exact_V,) = torch.autograd.grad(categorical_kl(logits_V, ref_logprobs_V), logits_V)
    close(exact_V, entry["expected"]["grad_kl_pq"])


def test_k2_is_the_loss_and_k3_descends_the_other_kl() -> None:
    expected = golden("2_kl")["expected_gradients_V5"]["expected"]
    close(f64(expected["grad_as_loss"]["k2"]), expected["grad_kl_pq"])
    close(f64(expected["grad_as_loss"]["k3"]), expected["grad_kl_qp"])
    close(f64(expected["grad_as_loss"]["k1"]), [0.0] * 5)


def test_forbidden_outcomes_add_nothing() -> None:
    # p = (1/2, 1/2, 0), q = (1/4, 3/4, 0): KL = ½ ln 2 + ½ ln(2/3) = ½ ln(4/3). Entropy of p: ln 2.
    p = f64([0.0, 0.0, -math.inf]).requires_grad_()
    q = f64([0.25, 0.75, 0.0]).log()
    close(categorical_kl(p, q), 0.5 * math.log(4 / 3))
    close(categorical_entropy(p), math.log(2))
    # ∇ = p (log(p/q) − KL): ½ (ln 2 − ½ ln(4/3)) = ¼ ln 3 for the first, its negative for the second.
    (gradient,) = torch.autograd.grad(categorical_kl(p, q), p)
    close(gradient, [0.25 * math.log(3), -0.25 * math.log(3), 0.0])
    (gradient,) = torch.autograd.grad(categorical_entropy(p), p)
    close(gradient, [0.0, 0.0, 0.0])
    assert categorical_kl(f64([0.0, 0.0]), f64([0.0, -math.inf])) == math.inf


def test_kl_shaped_rewards_match_golden() -> None:
    entry = golden("1_returns_gae")["kl_shaped_rewards"]
    scores_B, logprobs_BT, ref_BT, mask_BT = (f64(entry["inputs"][key]) for key in ("scores", "logp", "ref_logp", "mask"))
    rewards_BT = kl_shaped_rewards(scores_B, logprobs_BT, ref_BT, mask_BT, beta=entry["params"]["beta"])
    close(rewards_BT, entry["expected"]["token_rewards"])


@pytest.mark.parametrize("garbage", [1e30, math.inf, math.nan])
def test_shaped_rewards_sit_on_the_last_kept_token(garbage: float) -> None:
    mask_BT = torch.tensor([[True, False, True, False], [False, False, False, False], [False, False, False, True]])
    logprobs_BT = torch.where(mask_BT, f64(-1.0), garbage).requires_grad_()
    ref_BT = torch.where(mask_BT, f64(-3.0), garbage)
    rewards_BT = kl_shaped_rewards(f64([5.0, garbage, 7.0]), logprobs_BT, ref_BT, mask_BT, beta=0.5)
    # Every kept token pays 0.5 · (−1 + 3) = 1; the score of a row joins its last kept token; the empty row has none.
    close(rewards_BT, [[-1.0, 0.0, 4.0, 0.0], [0.0] * 4, [0.0, 0.0, 0.0, 6.0]])
    (gradient,) = torch.autograd.grad(rewards_BT.sum(), logprobs_BT)
    close(gradient, (-0.5 * mask_BT).tolist())


def test_shapes_that_would_broadcast_are_refused() -> None:
    row_BT = torch.zeros(2, 3)
    for estimator in ESTIMATORS.values():
        with pytest.raises(ValueError, match="one shape"):
            estimator(row_BT, torch.zeros(2, 1))
    with pytest.raises(ValueError, match="one shape"):
        categorical_kl(row_BT, torch.zeros(3))
    with pytest.raises(ValueError, match=r"scores \[3\], rows \[2\]"):
        kl_shaped_rewards(torch.zeros(3), row_BT, row_BT, row_BT, beta=0.1)
