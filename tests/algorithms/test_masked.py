from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from golden_numbers import golden
from selfeval.algorithms.masked import (
    Aggregation,
    aggregate,
    aggregation_weights,
    broadcast_to_tokens,
    check_same_shape,
    check_scalar,
    check_scalar_or_shape,
    limit_exponent,
    masked_mean,
    masked_sum,
    whiten,
    zero_padding,
)

GARBAGE = [1e30, -1e30, math.inf, -math.inf, math.nan]
WHITEN = ["basic", "f32", "no_mask", "garbage_in_padding", "constant", "two_tokens"]
LOSSES = [
    *(("4_ppo", f"ppo_{name}") for name in ("clip", "f32", "dual_clip", "const_length", "empty_row", "on_policy")),
    ("4_ppo", "ppo_extreme_ratio_clamp20"),
    *(("4_ppo", f"value_{name}") for name in ("clip", "noclip", "f32")),
    ("5_group", "dapo_clip_higher"),
    ("5_group", "dapo_clip_higher_dual"),
    ("5_group", "grpo_loss_k3"),
]
MODES: dict[Aggregation, str] = {
    "token_mean": "token_mean",
    "token_sum": "token_sum",
    "sequence_mean_token_mean": "seq_mean_token_mean",
    "sequence_mean_token_mean_all_rows": "seq_mean_token_mean_all_rows",
    "sequence_mean_token_sum": "seq_mean_token_sum",
    "sequence_mean_token_sum_norm": "seq_mean_token_sum_norm",
    "constant_length": "const_length",
}


def length_of(mode: Aggregation, length: int) -> int | None:
    return length if mode in ("sequence_mean_token_sum_norm", "constant_length") else None


def f64(numbers: object) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def close(actual: Tensor, expected: object) -> None:
    torch.testing.assert_close(actual, f64(expected), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", WHITEN)
def test_mean_and_whitening_match_golden(name: str) -> None:
    entry = golden("3_whiten")[name]
    x_BT, mask_BT, expected = f64(entry["inputs"]["x"]), f64(entry["inputs"]["mask"]).bool(), entry["expected"]
    close(masked_mean(x_BT, mask_BT), expected["mean"])
    close(masked_sum(x_BT, mask_BT), expected["mean"] * expected["n"])
    close(whiten(x_BT, mask_BT, eps=entry["params"]["eps"]), expected["whiten"])
    close(whiten(x_BT, mask_BT, shift_mean=False), expected["whiten_keep_mean"])
    close(whiten(x_BT, mask_BT, correction=0), expected["whiten_biased"])
    close(whiten(x_BT, mask_BT, correction=0, shift_mean=False), expected["whiten_biased_keep_mean"])
    for row, mean in enumerate(expected["row_mean"]):
        close(masked_mean(x_BT[row], mask_BT[row]), mean)


def test_whitening_in_float32_matches_golden() -> None:
    entry = golden("3_whiten")["f32"]
    white_BT = whiten(torch.tensor(entry["inputs"]["x"]), torch.tensor(entry["inputs"]["mask"]))
    torch.testing.assert_close(white_BT, torch.tensor(entry["expected"]["whiten"]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("quantity", "name"), LOSSES)
def test_aggregate_matches_golden(quantity: str, name: str, mode: Aggregation) -> None:
    entry = golden(quantity)[name]
    assert set(MODES.values()) == set(entry["expected"]["loss"]), "the golden file has a mode that is not here"
    loss_BT, mask_BT = f64(entry["expected"]["per_token_loss"]), f64(entry["inputs"]["mask"])
    length = length_of(mode, entry["params"]["norm_length"])
    close(aggregate(loss_BT, mask_BT, mode, norm_length=length), entry["expected"]["loss"][MODES[mode]])
    weights_BT = aggregation_weights(mask_BT, mode, norm_length=length, dtype=torch.float64)
    close((weights_BT * loss_BT).sum(), entry["expected"]["loss"][MODES[mode]])


@pytest.mark.parametrize("garbage", GARBAGE)
def test_padding_leaks_neither_into_values_nor_into_gradients(garbage: float) -> None:
    mask_BT = torch.tensor([[True, True, False], [True, False, False]])
    clean_BT = f64([[1.0, 2.0, 0.0], [6.0, 0.0, 0.0]])
    dirty_BT = torch.where(mask_BT, clean_BT, garbage).requires_grad_()
    # Kept: 1, 2, 6. Token mean 9/3; row means 1.5 and 6; row sums 3 and 6; constant length 9 / (2 * 4).
    expected: dict[Aggregation, float] = {
        "token_mean": 3.0,
        "sequence_mean_token_mean": 3.75,
        "sequence_mean_token_sum": 4.5,
        "constant_length": 1.125,
        "token_sum": 9.0,
        "sequence_mean_token_mean_all_rows": 3.75,
        "sequence_mean_token_sum_norm": 1.125,
    }
    gradients = {
        "token_mean": [[1 / 3, 1 / 3, 0], [1 / 3, 0, 0]],
        "sequence_mean_token_mean": [[1 / 4, 1 / 4, 0], [1 / 2, 0, 0]],
        "sequence_mean_token_sum": [[1 / 2, 1 / 2, 0], [1 / 2, 0, 0]],
        "constant_length": [[1 / 8, 1 / 8, 0], [1 / 8, 0, 0]],
        "token_sum": [[1, 1, 0], [1, 0, 0]],
        "sequence_mean_token_mean_all_rows": [[1 / 4, 1 / 4, 0], [1 / 2, 0, 0]],
        "sequence_mean_token_sum_norm": [[1 / 8, 1 / 8, 0], [1 / 8, 0, 0]],
    }
    for mode, value in expected.items():
        loss = aggregate(dirty_BT, mask_BT, mode, norm_length=length_of(mode, 4))
        close(loss, value)
        close(torch.autograd.grad(loss, dirty_BT)[0], gradients[mode])
    for reduced in (masked_mean(dirty_BT, mask_BT), masked_sum(dirty_BT, mask_BT)):
        assert torch.autograd.grad(reduced, dirty_BT)[0][~mask_BT].eq(0).all()


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_of_dirty_padding_has_the_gradient_of_clean_padding(garbage: float, shift_mean: bool) -> None:
    mask_BT = torch.tensor([[True, False, True], [False, True, True]])
    clean_BT = f64([[1.0, 0.0, 2.0], [0.0, -3.0, 6.0]]).requires_grad_()
    dirty_BT = torch.where(mask_BT, clean_BT.detach(), garbage).requires_grad_()
    results = [whiten(x_BT, mask_BT, shift_mean=shift_mean) for x_BT in (clean_BT, dirty_BT)]
    torch.testing.assert_close(results[1], results[0])
    gradients = [torch.autograd.grad((r.pow(3)).sum(), x)[0] for r, x in zip(results, (clean_BT, dirty_BT), strict=True)]
    torch.testing.assert_close(gradients[1], gradients[0])
    assert gradients[0].abs().sum() > 0


def test_an_empty_row_counts_where_the_name_says_so() -> None:
    # Rows of 2, 0 and 1 tokens; L = 4. Three rows count in *_all_rows and constant_length, two elsewhere.
    mask_BT = torch.tensor([[True, True], [False, False], [True, False]])
    loss_BT = f64([[1.0, 2.0], [9.0, 9.0], [6.0, 9.0]])
    expected: dict[Aggregation, float] = {
        "token_mean": 3.0,
        "token_sum": 9.0,
        "sequence_mean_token_mean": (1.5 + 6) / 2,
        "sequence_mean_token_mean_all_rows": (1.5 + 6) / 3,
        "sequence_mean_token_sum": (3 + 6) / 2,
        "sequence_mean_token_sum_norm": (3 + 6) / 2 / 4,
        "constant_length": 9 / (3 * 4),
    }
    assert list(expected) == list(MODES)
    for mode, value in expected.items():
        close(aggregate(loss_BT, mask_BT, mode, norm_length=length_of(mode, 4)), value)


MASKS = st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=7)


@settings(max_examples=60, deadline=None)
@given(mask=MASKS, cuts=st.lists(st.integers(0, 7), max_size=3), seed=st.integers(0, 9))
def test_micro_batches_add_up_to_the_whole(mask: list[list[bool]], cuts: list[int], seed: int) -> None:
    """Split anywhere, value and gradient: the weights of the whole make every mode a plain sum."""
    mask_BT = torch.tensor(mask)
    loss_BT = torch.randn(mask_BT.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    dirty_BT = torch.where(mask_BT, loss_BT, math.nan).requires_grad_()
    edges = [0, *sorted(min(cut, len(mask)) for cut in cuts), len(mask)]
    parts = [slice(*edge) for edge in itertools.pairwise(edges)]
    for mode in MODES:
        whole = aggregate(dirty_BT, mask_BT, mode, norm_length=length_of(mode, 5))
        weights_BT = aggregation_weights(mask_BT, mode, norm_length=length_of(mode, 5), dtype=torch.float64)
        kept_BT = zero_padding(dirty_BT, mask_BT)
        total = torch.stack([(kept_BT[part] * weights_BT[part]).sum() for part in parts]).sum()
        close(total, whole.item())
        gradients = [torch.autograd.grad(loss, dirty_BT, retain_graph=True)[0] for loss in (whole, total)]
        close(gradients[1], gradients[0].tolist())


def test_weights_have_the_type_of_the_loss() -> None:
    mask_BT = torch.tensor([[True, True, True]])
    assert aggregate(torch.ones(1, 3), mask_BT, "token_mean").dtype == torch.float32
    # 1/3 to 53 bits, not to 24.
    weights_BT = aggregation_weights(mask_BT, "token_mean", dtype=torch.float64)
    assert weights_BT.tolist() == [[1 / 3] * 3]


def test_broadcast_to_tokens() -> None:
    x_B, mask_BT = f64([2.0, math.nan, 3.0]).requires_grad_(), torch.tensor([[1, 0], [0, 0], [1, 1]])
    tokens_BT = broadcast_to_tokens(x_B, mask_BT)
    close(tokens_BT, [[2.0, 0.0], [0.0, 0.0], [3.0, 3.0]])
    close(torch.autograd.grad(tokens_BT.sum(), x_B)[0], [1.0, 0.0, 2.0])


def test_zero_padding_before_exp_keeps_the_gradient_finite() -> None:
    mask_T = torch.tensor([True, False])
    x_T = f64([0.0, 1e30]).requires_grad_()
    (gradient_T,) = torch.autograd.grad(masked_sum(zero_padding(x_T, mask_T).exp(), mask_T), x_T)
    close(gradient_T, [1.0, 0.0])


def test_nothing_kept() -> None:
    x_BT, none_BT = f64([[1.0, math.nan]]).requires_grad_(), torch.zeros(1, 2, dtype=torch.bool)
    assert masked_mean(x_BT, none_BT).isnan()
    assert masked_sum(x_BT, none_BT) == 0
    for mode in MODES:
        loss = aggregate(x_BT, none_BT, mode, norm_length=length_of(mode, 4))
        assert loss == 0
        close(torch.autograd.grad(loss, x_BT)[0], [[0.0, 0.0]])


def test_whitening_one_token_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 tokens, got a mask that keeps 1"):
        whiten(f64([[1.0, 2.0]]), torch.tensor([[True, False]]))


def test_shapes_that_would_broadcast_are_refused() -> None:
    with pytest.raises(ValueError, match=r"x \[2, 3\], mask \[2, 1\]"):
        masked_mean(torch.zeros(2, 3), torch.ones(2, 1))
    with pytest.raises(ValueError, match=r"x \[2, 3\], rows \[2\]"):
        broadcast_to_tokens(torch.zeros(2, 3), torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"a \[1\], b \[2\]"):
        check_same_shape(a=torch.zeros(1), b=torch.zeros(2))


@pytest.mark.parametrize(
    ("mode", "length", "sentence"),
    [
        ("constant_length", None, "norm_length is required for"),
        ("constant_length", 0, "norm_length must be > 0 tokens, got 0"),
        ("sequence_mean_token_sum_norm", None, "norm_length is required for"),
        ("token_mean", 4, "norm_length is required for"),
        ("mean", None, "mode must be one of token_mean, .*, got 'mean'"),
        ("mean", 4, "mode must be one of"),
    ],
)
def test_wrong_modes_are_refused(mode: str, length: int | None, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        aggregate(torch.ones(1, 2), torch.ones(1, 2), mode, norm_length=length)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@given(constant=st.floats(-1e4, 1e4), count=st.integers(2, 300))
@settings(max_examples=50, deadline=None)
def test_whitening_a_constant_gives_zero(dtype: torch.dtype, constant: float, count: int) -> None:
    # The float32 mean of 100.1 is off by 1.5e-5 for many lengths: divided by the root of eps, 1e-4, that was 0.15.
    x_BT, mask_BT = torch.full((1, count), constant, dtype=dtype), torch.ones(1, count)
    assert whiten(x_BT, mask_BT).eq(0).all()
    assert whiten(x_BT, mask_BT, shift_mean=False).eq(x_BT).all()


def test_whitening_keeps_the_digits_of_a_small_spread_on_a_large_mean() -> None:
    # 1000 + k/1024, k = 0 .. 3 are float32 numbers. Mean 1000 + 1.5/1024, deviations (-1.5, -0.5, 0.5, 1.5)/1024, and
    # Σ (x - μ)² = 5/1024². With eps = 0 and n - 1 = 3: deviations over √(5/3).
    x_BT = 1000 + torch.arange(4.0)[None] / 1024
    expected_BT = torch.tensor([[-1.5, -0.5, 0.5, 1.5]]) / math.sqrt(5 / 3)
    torch.testing.assert_close(whiten(x_BT, torch.ones(1, 4), eps=0.0), expected_BT, rtol=1e-6, atol=0)
    # Repeated 1000 times the sum itself is rounded: Σ (x - μ)² = 1000 · 5/1024², n - 1 = 3999.
    many_BT = x_BT.repeat(1, 1000)
    white_BT = whiten(many_BT, torch.ones(1, 4000), eps=0.0)[:, :4]
    torch.testing.assert_close(white_BT, torch.tensor([[-1.5, -0.5, 0.5, 1.5]]) / math.sqrt(5000 / 3999), rtol=1e-5, atol=1e-5)


def test_half_precision_is_summed_in_float32() -> None:
    # 257 ones: bfloat16 holds no 257 (it is 256 or 258), and 1/3 is off by 0.2 % in it.
    ones_BT = torch.ones(1, 257, dtype=torch.bfloat16)
    assert masked_mean(ones_BT, torch.ones(1, 257)).item() == 1
    assert masked_mean(ones_BT, torch.ones(1, 257)).dtype == torch.bfloat16
    loss_BT = torch.full((1, 3), 3.0, dtype=torch.bfloat16)
    assert aggregate(loss_BT, torch.ones(1, 3), "token_mean").item() == 3
    assert aggregate(loss_BT, torch.ones(1, 3), "token_mean").dtype == torch.bfloat16


def test_one_number_or_one_a_row() -> None:
    row_N = torch.zeros(3)
    check_scalar(a=1.0, b=torch.tensor(2.0))
    check_scalar_or_shape(row_N, a=1.0, b=torch.tensor(2.0), c=row_N)
    with pytest.raises(ValueError, match=r"a must be a scalar .* got shape \[1\]"):
        check_scalar(a=torch.zeros(1))
    with pytest.raises(ValueError, match=r"c must be a scalar or have shape \[3\], got shape \[3, 1\]"):
        check_scalar_or_shape(row_N, c=row_N[:, None])


def test_exp_of_a_limited_exponent_is_finite() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        largest = limit_exponent(torch.tensor([-5.0, 1e4], dtype=dtype)).exp()
        assert (20 * largest).isfinite().all()
        assert largest[0].item() == pytest.approx(math.exp(-5), rel=0.01)
