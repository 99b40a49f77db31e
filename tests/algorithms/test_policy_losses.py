from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from golden_numbers import golden
from selfeval.algorithms.kl import k1, k2
from selfeval.algorithms.masked import aggregate, broadcast_to_tokens, masked_mean, zero_padding
from selfeval.algorithms.policy_losses import (
    approximate_kl,
    clip_fraction,
    dual_clip_fraction,
    grpo_loss,
    gspo_clip_fraction,
    gspo_loss,
    importance_ratio,
    overlong_penalty,
    policy_gradient_loss,
    ppo_clip_loss,
    ratio_outside_fraction,
    sequence_ratio,
    truncated_importance_weights,
)

ENTRIES = [
    ("4_ppo", "ppo_clip"),
    ("4_ppo", "ppo_f32"),
    ("4_ppo", "ppo_dual_clip"),
    ("4_ppo", "ppo_const_length"),
    ("4_ppo", "ppo_empty_row"),
    ("4_ppo", "ppo_extreme_ratio_clamp20"),
    ("4_ppo", "ppo_on_policy"),
    ("5_group", "dapo_clip_higher"),
    ("5_group", "dapo_clip_higher_dual"),
]
GSPO = ["gspo", "gspo_wide", "gspo_f32_empty_row"]


def f64(numbers: object) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def close(actual: Tensor, expected: object) -> None:
    torch.testing.assert_close(actual, f64(expected), rtol=1e-9, atol=1e-12)


def tensors(entry: dict[str, Any], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.tensor(entry["inputs"][key], dtype=dtype) for key in ("logp", "old_logp", "advantages", "mask")]


@pytest.mark.parametrize(("quantity", "name"), ENTRIES)
def test_loss_gradient_and_statistics_match_golden(quantity: str, name: str) -> None:
    entry = golden(quantity)[name]
    expected, params = entry["expected"], entry["params"]
    clips = {"clip_low": params["eps_low"], "clip_high": params["eps_high"], "log_ratio_clamp": params["log_ratio_clamp"]}
    logprobs_BT, old_BT, advantages_BT, mask_BT = tensors(entry)
    loss_BT = ppo_clip_loss(logprobs_BT.requires_grad_(), old_BT, advantages_BT, dual_clip=params["dual_clip"], **clips)
    close(loss_BT, expected["per_token_loss"])
    (gradient_BT,) = torch.autograd.grad(aggregate(loss_BT, mask_BT, "token_mean"), logprobs_BT)
    close(gradient_BT, expected["grad_logp_token_mean"])
    close(importance_ratio(logprobs_BT, old_BT, log_ratio_clamp=params["log_ratio_clamp"]), expected["ratio"])
    close(clip_fraction(logprobs_BT, old_BT, advantages_BT, mask_BT, **clips), expected["clipfrac"])
    close(ratio_outside_fraction(logprobs_BT, old_BT, mask_BT, **clips), expected["frac_ratio_outside"])
    if params["dual_clip"] is not None:
        bounded = dual_clip_fraction(logprobs_BT, old_BT, advantages_BT, mask_BT, dual_clip=params["dual_clip"], **clips)
        close(bounded, expected["clipfrac_dual"])


@pytest.mark.parametrize(("quantity", "name"), ENTRIES)
def test_approximate_kl_matches_golden(quantity: str, name: str) -> None:
    entry = golden(quantity)[name]
    logprobs_BT, old_BT, _, mask_BT = tensors(entry)
    clamp = entry["params"]["log_ratio_clamp"]
    close(approximate_kl(logprobs_BT, old_BT, mask_BT, log_ratio_clamp=clamp), entry["expected"]["approx_kl_k3"])
    # The other two estimators of the golden file are those of `kl`, with π_old as the policy that drew the tokens.
    bound = math.inf if clamp is None else clamp
    held_BT = old_BT + (logprobs_BT - old_BT).clamp(-bound, bound)
    for estimator in (k1, k2):
        expected = entry["expected"][f"approx_kl_{estimator.__name__}"]
        close(masked_mean(estimator(old_BT, held_BT), mask_BT), expected)


@pytest.mark.parametrize("name", GSPO)
def test_gspo_matches_golden(name: str) -> None:
    entry = golden("5_group")[name]
    expected, clips = entry["expected"], {"clip_low": entry["params"]["eps_low"], "clip_high": entry["params"]["eps_high"]}
    logprobs_BT, old_BT, advantages_B, mask_BT = tensors(entry)
    close(sequence_ratio(logprobs_BT, old_BT, mask_BT), expected["seq_ratio"])
    loss_B = gspo_loss(logprobs_BT.requires_grad_(), old_BT, advantages_B, mask_BT, **clips)
    close(loss_B, expected["per_seq_loss"])
    loss = aggregate(broadcast_to_tokens(loss_B, mask_BT), mask_BT, "sequence_mean_token_mean")
    close(loss, expected["loss"])
    close(torch.autograd.grad(loss, logprobs_BT)[0], expected["grad_logp"])
    for per, key in (("token", "clipfrac_token_weighted"), ("reply", "clipfrac_seq")):
        close(gspo_clip_fraction(logprobs_BT, old_BT, advantages_B, mask_BT, per=per, **clips), expected[key])


def test_gspo_in_float32_matches_golden() -> None:
    entry = golden("5_group")["gspo_f32_empty_row"]
    logprobs_BT, old_BT, advantages_B, mask_BT = tensors(entry, torch.float32)
    loss_B = gspo_loss(logprobs_BT, old_BT, advantages_B, mask_BT, clip_low=0.2, clip_high=0.28)
    torch.testing.assert_close(loss_B, torch.tensor(entry["expected"]["per_seq_loss"]), rtol=1e-5, atol=1e-6)


def test_grpo_loss_matches_golden() -> None:
    entry = golden("5_group")["grpo_loss_k3"]
    logprobs_BT, old_BT, advantages_B, mask_BT = tensors(entry)
    ref_BT, advantages_BT = f64(entry["inputs"]["ref_logp"]), advantages_B[:, None].expand_as(mask_BT)
    beta = entry["params"]["beta"]
    loss_BT = grpo_loss(logprobs_BT, old_BT, ref_BT, advantages_BT, clip_low=0.2, clip_high=0.2, beta=beta)
    close(loss_BT, entry["expected"]["per_token_loss"])
    close(aggregate(loss_BT, mask_BT, "token_mean"), entry["expected"]["loss"]["token_mean"])
    close(aggregate(loss_BT, mask_BT, "sequence_mean_token_mean"), entry["expected"]["loss"]["seq_mean_token_mean"])


def test_the_clamp_of_the_grpo_loss_holds_the_ratio_and_not_the_kl() -> None:
    # x = log 8 held at log 2, A = −1: loss 2, without gradient. d = log 4: k3 = ¼ − 1 + log 4, gradient 1 − ¼.
    logprobs_BT = f64([[0.0]]).requires_grad_()
    old_BT, ref_BT = f64([[-math.log(8)]]), f64([[-math.log(4)]])
    clips = {"clip_low": 0.2, "clip_high": 0.2, "log_ratio_clamp": math.log(2)}
    loss_BT = grpo_loss(logprobs_BT, old_BT, ref_BT, f64([[-1.0]]), beta=2.0, **clips)
    close(loss_BT, [[2.0 + 2.0 * (math.log(4) - 0.75)]])
    close(torch.autograd.grad(loss_BT.sum(), logprobs_BT)[0], [[1.5]])


def test_overlong_penalty_matches_golden() -> None:
    entry = golden("5_group")["dapo_overlong_penalty"]
    lengths_B, params = f64(entry["inputs"]["lengths"]), entry["params"]
    penalty_B = overlong_penalty(lengths_B, max_length=params["max_len"], buffer=params["buffer"], factor=params["factor"])
    close(penalty_B, entry["expected"]["penalty"])
    # Half way through the buffer, at half the price of 3; whole numbers are lengths too.
    integers_B = overlong_penalty(torch.tensor([90]), max_length=100, buffer=20, factor=3.0)
    torch.testing.assert_close(integers_B, torch.tensor([-1.5]))


def test_loss_in_float32_matches_golden() -> None:
    entry = golden("4_ppo")["ppo_f32"]
    logprobs_BT, old_BT, advantages_BT, _ = tensors(entry, torch.float32)
    loss_BT = ppo_clip_loss(logprobs_BT, old_BT, advantages_BT, clip_low=0.2, clip_high=0.2)
    torch.testing.assert_close(loss_BT, torch.tensor(entry["expected"]["per_token_loss"]), rtol=1e-5, atol=1e-6)


def test_the_plain_policy_gradient_is_that_of_the_clipped_loss_on_policy() -> None:
    logprobs_BT, advantages_BT = f64([[-1.0, -0.5, -2.0]]).requires_grad_(), f64([[2.0, -3.0, 0.0]])
    plain_BT = policy_gradient_loss(logprobs_BT, advantages_BT)
    close(plain_BT, [[2.0, -1.5, 0.0]])
    clipped_BT = ppo_clip_loss(logprobs_BT, logprobs_BT.detach(), advantages_BT, clip_low=0.2, clip_high=0.2)
    for loss_BT in (plain_BT, clipped_BT):
        close(torch.autograd.grad(loss_BT.sum(), logprobs_BT)[0], [[-2.0, 3.0, 0.0]])


def test_the_policy_gradient_is_the_gradient_of_the_expected_reward() -> None:
    """E_a[∇ loss(a)] = −∇ E_a[R(a)], by enumerating every token instead of drawing some."""
    logits_V, rewards_V = f64([0.2, -1.0, 0.7, 0.0]).requires_grad_(), f64([1.0, -2.0, 0.25, 3.0])
    logprobs_V = logits_V.log_softmax(-1)
    p_V = logprobs_V.exp()
    (exact_V,) = torch.autograd.grad(-(p_V * rewards_V).sum(), logits_V, retain_graph=True)
    loss_V = policy_gradient_loss(logprobs_V[None], rewards_V[None])[0]
    close(torch.autograd.grad((p_V.detach() * loss_V).sum(), logits_V)[0], exact_V.tolist())


def test_the_dual_clip_bounds_only_what_is_bad_and_became_likely() -> None:
    # Ratios 4, 4, 2 and ½, advantages −1, +1, −1, −1, range [¾, 5/4], c = 3. Only the first passes 3: its loss 4 becomes
    # 3, without gradient. A good token is clipped as ever (−5/4); 2 is under the bound; ½ is clipped at ¾.
    logprobs_BT = f64([[4.0, 4.0, 2.0, 0.5]]).log().requires_grad_()
    old_BT, advantages_BT, all_BT = torch.zeros_like(logprobs_BT), f64([[-1.0, 1.0, -1.0, -1.0]]), torch.ones(1, 4)
    clips = {"clip_low": 0.25, "clip_high": 0.25, "dual_clip": 3.0}
    loss_BT = ppo_clip_loss(logprobs_BT, old_BT, advantages_BT, **clips)
    close(loss_BT, [[3.0, -1.25, 2.0, 0.75]])
    close(torch.autograd.grad(loss_BT.sum(), logprobs_BT)[0], [[0.0, 0.0, 2.0, 0.0]])
    close(dual_clip_fraction(logprobs_BT, old_BT, advantages_BT, all_BT, **clips), 0.25)
    # Every ratio is outside the range; the clip acts on the second and the last.
    outside = {"clip_low": 0.25, "clip_high": 0.25}
    close(ratio_outside_fraction(logprobs_BT, old_BT, all_BT, **outside), 1.0)
    close(clip_fraction(logprobs_BT, old_BT, advantages_BT, all_BT, **outside), 0.5)


def test_a_ratio_that_overflows_poisons_nothing() -> None:
    # exp(1000) is infinite, and 0 · inf is NaN: a token without advantage would poison the batch. Second token: −A r = 2 e.
    logprobs_BT, old_BT = f64([[0.0, 0.0]]).requires_grad_(), f64([[-1000.0, -1.0]])
    advantages_BT, clips = f64([[0.0, -2.0]]), {"clip_low": 0.2, "clip_high": 0.2}
    for clamp in (None, 20.0):
        loss_BT = ppo_clip_loss(logprobs_BT, old_BT, advantages_BT, log_ratio_clamp=clamp, **clips)
        close(loss_BT, [[0.0, 2 * math.e]])
        close(torch.autograd.grad(loss_BT.sum(), logprobs_BT)[0], [[0.0, 2 * math.e]])
    assert approximate_kl(logprobs_BT, old_BT, torch.ones(1, 2)).isinf()
    kl = approximate_kl(logprobs_BT, old_BT, torch.ones(1, 2), log_ratio_clamp=20.0)
    close(kl, ((math.exp(20) - 21) + (math.e - 2)) / 2)


def test_float32_overflows_at_a_log_ratio_of_89_without_a_nan() -> None:
    # exp(89) = 4.5e38 is above the largest float32, 3.4e38. A = 1: the clip holds the loss at −1.2 and the gradient at 0.
    logprobs_BT, old_BT = torch.zeros(1, 2).requires_grad_(), torch.tensor([[-89.0, 0.0]])
    clips = {"clip_low": 0.2, "clip_high": 0.2}
    loss_BT = ppo_clip_loss(logprobs_BT, old_BT, torch.ones(1, 2), **clips)
    torch.testing.assert_close(loss_BT, torch.tensor([[-1.2, -1.0]]))
    assert torch.autograd.grad(loss_BT.sum(), logprobs_BT)[0].tolist() == [[0.0, -1.0]]
    # The ratio of the whole reply, alike; the second row is an ordinary one with s = 1: −A s / n per token.
    rows_BT, old_BT = torch.zeros(2, 2).requires_grad_(), torch.tensor([[-89.0, -89.0], [0.0, 0.0]])
    loss_B = gspo_loss(rows_BT, old_BT, torch.ones(2), torch.ones(2, 2), **clips)
    torch.testing.assert_close(loss_B, torch.tensor([-1.2, -1.0]))
    assert torch.autograd.grad(loss_B.sum(), rows_BT)[0].tolist() == [[0.0, 0.0], [-0.5, -0.5]]
    # k3 overflows in the other direction, and a weight of 0 must leave nothing of it.
    ref_BT = torch.tensor([[89.0, 0.0]])
    loss_BT = grpo_loss(logprobs_BT, torch.zeros(1, 2), ref_BT, torch.ones(1, 2), beta=0.0, **clips)
    assert loss_BT.tolist() == [[-1.0, -1.0]]
    assert torch.autograd.grad(loss_BT.sum(), logprobs_BT)[0].tolist() == [[-1.0, -1.0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@given(log_ratio=st.floats(-2000, 2000), advantage=st.floats(-5, 5))
@settings(max_examples=100, deadline=None)
def test_value_and_gradient_of_every_ratio_are_finite(dtype: torch.dtype, log_ratio: float, advantage: float) -> None:
    logprobs_BT = torch.zeros(1, 1, dtype=dtype).requires_grad_()
    old_BT, advantages_BT = torch.tensor([[-log_ratio]], dtype=dtype), torch.tensor([[advantage]], dtype=dtype)
    clips = {"clip_low": 0.2, "clip_high": 0.2}
    losses = (
        ppo_clip_loss(logprobs_BT, old_BT, advantages_BT, **clips),
        ppo_clip_loss(logprobs_BT, old_BT, advantages_BT, dual_clip=3.0, **clips),
        grpo_loss(logprobs_BT, logprobs_BT.detach(), old_BT, advantages_BT, beta=0.04, **clips),
        gspo_loss(logprobs_BT, old_BT, advantages_BT[:, 0], torch.ones(1, 1), **clips),
    )
    for loss in losses:
        assert loss.isfinite().all()
        assert torch.autograd.grad(loss.sum(), logprobs_BT)[0].isfinite().all()


def test_gspo_keeps_or_drops_a_reply_as_a_whole() -> None:
    # Log-ratios (log 4, 0), kept alone: s = 2, above 3/2. A = 1: loss −3/2, no gradient, though the second token has
    # ratio 1. A = −1: loss 2, and each token gets −A s / 2 = 1. The third row has no tokens: s = 1, loss −A.
    logprobs_BT = f64([[math.log(4), 0.0, 9.0], [math.log(4), 0.0, 9.0], [9.0, 9.0, 9.0]]).requires_grad_()
    mask_BT = torch.tensor([[True, True, False], [True, True, False], [False, False, False]])
    old_BT, advantages_B, clips = torch.zeros_like(logprobs_BT), f64([1.0, -1.0, 5.0]), {"clip_low": 0.5, "clip_high": 0.5}
    loss_B = gspo_loss(logprobs_BT, old_BT, advantages_B, mask_BT, **clips)
    close(loss_B, [-1.5, 2.0, -5.0])
    close(torch.autograd.grad(loss_B.sum(), logprobs_BT)[0], [[0.0] * 3, [1.0, 1.0, 0.0], [0.0] * 3])
    for per in ("token", "reply"):
        close(gspo_clip_fraction(logprobs_BT, old_BT, advantages_B, mask_BT, per=per, **clips), 0.5)


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


@pytest.mark.parametrize("garbage", [1e30, math.inf, math.nan])
def test_padding_does_not_leak_into_gspo_and_statistics(garbage: float) -> None:
    mask_BT = torch.tensor([[True, False], [True, True]])
    logprobs_BT = torch.where(mask_BT, f64([[-1.0, 0.0], [-1.0, -2.0]]), garbage).requires_grad_()
    old_BT = torch.where(mask_BT, f64([[-1.0, 0.0], [-2.0, -1.0]]), -garbage)
    advantages_BT = torch.where(mask_BT, f64(-1.0), garbage)
    clips = {"clip_low": 0.2, "clip_high": 0.2}
    loss_B = gspo_loss(logprobs_BT, old_BT, f64([1.0, -3.0]), mask_BT, **clips)
    close(loss_B, [-1.0, 3.0])  # s = 1 in both rows: x = 0, and x = (1, −1)
    close(torch.autograd.grad(loss_B.sum(), logprobs_BT)[0], [[-1.0, 0.0], [1.5, 1.5]])
    # Ratios 1, e, 1/e with A = −1: two outside, one clipped (1/e), one above the dual clip of 2 (e).
    close(ratio_outside_fraction(logprobs_BT, old_BT, mask_BT, **clips), 2 / 3)
    close(clip_fraction(logprobs_BT, old_BT, advantages_BT, mask_BT, **clips), 1 / 3)
    close(dual_clip_fraction(logprobs_BT, old_BT, advantages_BT, mask_BT, dual_clip=2.0, **clips), 1 / 3)


def test_a_batch_without_tokens_has_no_share() -> None:
    x_BT, none_BT, clips = f64([[1.0, 2.0]]), torch.zeros(1, 2, dtype=torch.bool), {"clip_low": 0.2, "clip_high": 0.2}
    assert ratio_outside_fraction(x_BT, x_BT, none_BT, **clips).isnan()
    assert dual_clip_fraction(x_BT, x_BT, x_BT, none_BT, dual_clip=2.0, **clips).isnan()
    for per in ("token", "reply"):
        assert gspo_clip_fraction(x_BT, x_BT, f64([1.0]), none_BT, per=per, **clips).isnan()


@settings(max_examples=100, deadline=None)
@given(log_ratio=st.floats(-3, 3), advantage=st.floats(-2, 2), low=st.floats(0.01, 0.9), high=st.floats(0.01, 2))
def test_the_clipped_loss_is_pessimistic_and_its_gradient_stops_at_the_range(
    log_ratio: float, advantage: float, low: float, high: float
) -> None:
    logprobs_BT, old_BT = f64([[log_ratio]]).requires_grad_(), f64([[0.0]])
    ratio, edges = math.exp(log_ratio), (1 - low, 1 + high)
    loss_BT = ppo_clip_loss(logprobs_BT, old_BT, f64([[advantage]]), clip_low=low, clip_high=high)
    assert loss_BT.item() >= -advantage * ratio - 1e-12
    (gradient_BT,) = torch.autograd.grad(loss_BT.sum(), logprobs_BT)
    if any(math.isclose(ratio, edge, rel_tol=1e-9) for edge in edges):
        return  # on the edge itself the gradient is any between the two
    passed = ratio > edges[1] if advantage > 0 else ratio < edges[0]
    close(gradient_BT, [[0.0 if passed else -advantage * ratio]])


def test_shapes_that_would_broadcast_are_refused() -> None:
    row_BT = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"advantages \[2, 1\]"):
        ppo_clip_loss(row_BT, row_BT, torch.zeros(2, 1), clip_low=0.2, clip_high=0.2)
    with pytest.raises(ValueError, match="the same shape"):
        clip_fraction(row_BT, row_BT, row_BT, torch.ones(3), clip_low=0.2, clip_high=0.2)
    with pytest.raises(ValueError, match="the same shape"):
        approximate_kl(row_BT, row_BT, torch.ones(3))
    with pytest.raises(ValueError, match=r"advantages \[2, 3\], rows \[2\]"):
        gspo_loss(row_BT, row_BT, row_BT, row_BT, clip_low=0.2, clip_high=0.2)
    with pytest.raises(ValueError, match="the same shape"):
        policy_gradient_loss(row_BT, torch.zeros(2, 1))
    with pytest.raises(ValueError, match="the same shape"):
        sequence_ratio(row_BT, row_BT, torch.ones(3))
    with pytest.raises(ValueError, match="the same shape"):
        grpo_loss(row_BT, row_BT, torch.zeros(2, 1), row_BT, clip_low=0.2, clip_high=0.2, beta=0.1)


def test_wrong_numbers_are_refused() -> None:
    x_BT, clips = torch.zeros(1, 2), {"clip_low": 0.2, "clip_high": 0.2}
    for dual_clip in (1.0, math.nan):
        with pytest.raises(ValueError, match="dual_clip must be > 1"):
            ppo_clip_loss(x_BT, x_BT, x_BT, dual_clip=dual_clip, **clips)
        with pytest.raises(ValueError, match="dual_clip must be > 1"):
            dual_clip_fraction(x_BT, x_BT, x_BT, x_BT, dual_clip=dual_clip, **clips)
    with pytest.raises(ValueError, match="log_ratio_clamp must be > 0 nats, got 0"):
        importance_ratio(x_BT, x_BT, log_ratio_clamp=0.0)
    with pytest.raises(ValueError, match="'reply' or 'token', got 'row'"):
        gspo_clip_fraction(x_BT, x_BT, x_BT[0, :1], x_BT, per="row", **clips)  # type: ignore[arg-type]
    for buffer in (0, 101):
        with pytest.raises(ValueError, match="buffer must be in"):
            overlong_penalty(x_BT[0], max_length=100, buffer=buffer)


# -- truncated importance weights ---------------------------------------------------------------------------------------


def test_truncated_weights_are_the_ratio_of_probabilities_up_to_the_limit() -> None:
    trained = f64([[0.5, 0.2, 0.9, 0.3]]).log()
    sampled = f64([[0.25, 0.4, 0.3, 0.3]]).log()
    # 0.5 / 0.25 = 2, 0.2 / 0.4 = 0.5, 0.9 / 0.3 = 3, 0.3 / 0.3 = 1.
    close(truncated_importance_weights(trained, sampled, limit=2.5), [[2.0, 0.5, 2.5, 1.0]])
    close(truncated_importance_weights(trained, sampled, limit=1.0), [[1.0, 0.5, 1.0, 1.0]])


def test_weighted_samples_of_another_policy_have_the_expectation_of_this_one() -> None:
    """The sum over all tokens of mu w f is that of pi f where no ratio is truncated, and of min(pi, C mu) f elsewhere."""
    policy, behaviour, reward = f64([0.6, 0.3, 0.1]), f64([0.2, 0.5, 0.3]), f64([1.0, -2.0, 4.0])
    loose = truncated_importance_weights(policy.log(), behaviour.log(), limit=3.5)  # the largest ratio is 3
    close((behaviour * loose * reward).sum(), 0.6 - 0.6 + 0.4)
    tight = truncated_importance_weights(policy.log(), behaviour.log(), limit=2.0)
    # Only the first ratio is above 2: 2 x 0.2 = 0.4 takes the place of 0.6.
    close((behaviour * tight * reward).sum(), 0.4 - 0.6 + 0.4)


def test_a_huge_ratio_is_truncated_instead_of_infinite() -> None:
    found = truncated_importance_weights(torch.tensor([[0.0, -200.0]]), torch.tensor([[-200.0, 0.0]]), limit=2.0)
    assert found.tolist() == [[2.0, pytest.approx(0.0, abs=1e-30)]]


@pytest.mark.parametrize("limit", [0.0, -1.0])
def test_the_limit_of_truncated_weights_is_positive(limit: float) -> None:
    with pytest.raises(ValueError, match="must be greater than 0"):
        truncated_importance_weights(torch.zeros(1, 2), torch.zeros(1, 2), limit=limit)
    with pytest.raises(ValueError, match="same shape"):
        truncated_importance_weights(torch.zeros(1, 2), torch.zeros(2, 1), limit=2.0)
