from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from golden_numbers import golden
from selfeval.algorithms.group_advantages import (
    batch_std_advantages,
    grpo_advantages,
    mean_only_advantages,
    reinforce_pp_advantages,
    reinforce_pp_baseline_advantages,
    remax_advantages,
    rloo_advantages,
)
from selfeval.algorithms.masked import broadcast_to_tokens, masked_mean, masked_sum
from selfeval.algorithms.returns import discounted_returns

GROUPS = ["group_adv", "group_adv_binary", "group_adv_zero_var", "group_adv_uneven_shuffled", "group_adv_f32"]
BATCHES = ["reinforce_pp_remax", "reinforce_pp_f32"]
Advantages = Callable[[Tensor, Tensor], Tensor]
# Every function of rewards and groups, by its name in the golden file.
KINDS: dict[str, Advantages] = {
    "grpo_std_unbiased": grpo_advantages,
    "grpo_std_biased": lambda rewards_B, groups_B: grpo_advantages(rewards_B, groups_B, correction=0),
    "grpo_std_unbiased_eps1e-9": lambda rewards_B, groups_B: grpo_advantages(rewards_B, groups_B, eps=1e-9),
    "grpo_std_unbiased_eps1e-4": lambda rewards_B, groups_B: grpo_advantages(rewards_B, groups_B, eps=1e-4),
    "mean_only": mean_only_advantages,
    "rloo": rloo_advantages,
    "batch_std": batch_std_advantages,
    "batch_std_eps1e-4": lambda rewards_B, groups_B: batch_std_advantages(rewards_B, groups_B, eps=1e-4),
}


def f64(numbers: object) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def close(actual: Tensor, expected: object) -> None:
    torch.testing.assert_close(actual, f64(expected), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", GROUPS)
def test_advantages_of_groups_match_golden(name: str, kind: str) -> None:
    entry = golden("5_group")[name]
    if kind not in entry["expected"]:
        assert (name, kind.partition("_eps")[1]) == ("group_adv_uneven_shuffled", "_eps")  # it has no second epsilon
        return
    rewards_B, groups_B = f64(entry["inputs"]["rewards"]), torch.tensor(entry["inputs"]["group"])
    close(KINDS[kind](rewards_B, groups_B), entry["expected"][kind])


@pytest.mark.parametrize("kind", KINDS)
def test_advantages_of_groups_in_float32_match_golden(kind: str) -> None:
    entry = golden("5_group")["group_adv_f32"]
    advantages_B = KINDS[kind](torch.tensor(entry["inputs"]["rewards"]), torch.tensor(entry["inputs"]["group"]))
    torch.testing.assert_close(advantages_B, torch.tensor(entry["expected"][kind]), rtol=1e-5, atol=1e-6)


def test_a_single_reply_gets_0_and_not_its_reward() -> None:
    # The golden file holds the other convention too: there the only reply of question 1 gets its reward.
    entry = golden("5_group")["group_adv_uneven_shuffled"]
    rewards_B, groups_B = f64(entry["inputs"]["rewards"]), torch.tensor(entry["inputs"]["group"])
    alone = entry["inputs"]["group"].index(1)
    for kind, advantages in KINDS.items():
        assert advantages(rewards_B, groups_B)[alone] == 0, kind
    for expected in entry["expected"]["verl_singleton_convention"].values():
        assert expected[alone] == pytest.approx(entry["inputs"]["rewards"][alone], rel=1e-5)


@pytest.mark.parametrize("name", BATCHES)
def test_advantages_of_batches_match_golden(name: str) -> None:
    entry = golden("5_group")[name]
    inputs, expected, gamma = entry["inputs"], entry["expected"], entry["params"]["gamma"]
    rewards_BT, mask_BT, groups_B = f64(inputs["token_rewards"]), f64(inputs["mask"]), torch.tensor(inputs["group"])
    close(discounted_returns(rewards_BT, mask_BT, gamma=gamma), expected["returns"])
    close(reinforce_pp_advantages(rewards_BT, mask_BT, gamma=gamma), expected["reinforce_pp"])
    biased_BT = reinforce_pp_advantages(rewards_BT, mask_BT, gamma=gamma, correction=0, eps=0.0)
    close(biased_BT, expected["reinforce_pp_biased"])
    close(remax_advantages(rewards_BT, mask_BT, f64(inputs["baseline"])), expected["remax"])
    rewards_B = f64([float(masked_sum(*row)) for row in zip(rewards_BT, mask_BT, strict=True)])
    close(reinforce_pp_baseline_advantages(rewards_B, groups_B, mask_BT), expected["reinforce_pp_baseline"])


def test_advantages_of_batches_in_float32_match_golden() -> None:
    entry = golden("5_group")["reinforce_pp_f32"]
    rewards_BT, mask_BT, baseline_B = (torch.tensor(entry["inputs"][key]) for key in ("token_rewards", "mask", "baseline"))
    actual = {
        "reinforce_pp": reinforce_pp_advantages(rewards_BT, mask_BT, gamma=entry["params"]["gamma"]),
        "remax": remax_advantages(rewards_BT, mask_BT, baseline_B),
    }
    for kind, advantages_BT in actual.items():
        torch.testing.assert_close(advantages_BT, torch.tensor(entry["expected"][kind]), rtol=1e-5, atol=1e-6)


def test_by_hand() -> None:
    # Question 8: rewards 1, 5, 3: mean 3, deviation 2 (n − 1) and √(8/3) (n). Question −4: one reply. All four rewards:
    # mean 4, squares 9 + 1 + 1 + 9 = 20, deviation √(20/3). Leave one out: 1 − 4, 5 − 2, 3 − 3.
    rewards_B, groups_B = f64([1.0, 7.0, 5.0, 3.0]), torch.tensor([8, -4, 8, 8])
    close(mean_only_advantages(rewards_B, groups_B), [-2.0, 0.0, 2.0, 0.0])
    close(rloo_advantages(rewards_B, groups_B), [-3.0, 0.0, 3.0, 0.0])
    close(grpo_advantages(rewards_B, groups_B, eps=0.0), [-1.0, 0.0, 1.0, 0.0])
    close(grpo_advantages(rewards_B, groups_B, eps=2.0), [-0.5, 0.0, 0.5, 0.0])
    root = math.sqrt(8 / 3)
    close(grpo_advantages(rewards_B, groups_B, correction=0, eps=0.0), [-2 / root, 0.0, 2 / root, 0.0])
    spread = math.sqrt(20 / 3)
    close(batch_std_advantages(rewards_B, groups_B, eps=0.0), [-2 / spread, 0.0, 2 / spread, 0.0])
    # Tokens: the replies of question 8 with 1, 2 and 1 tokens, that of question −4 with none: −2, 2, 2, 0. Mean 1/2,
    # squares 25/4 + 9/4 + 9/4 + 1/4 = 11, variance 11/3.
    mask_BT = torch.tensor([[True, False], [False, False], [True, True], [False, True]])
    scale = math.sqrt(11 / 3)
    white_BT = reinforce_pp_baseline_advantages(rewards_B, groups_B, mask_BT, eps=0.0)
    close(white_BT, [[-2.5 / scale, 0.0], [0.0, 0.0], [1.5 / scale, 1.5 / scale], [0.0, -0.5 / scale]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_equal_rewards_give_exactly_0(kind: str, dtype: torch.dtype) -> None:
    """Their mean is not always that reward in floating point, and a ratio of rounding errors looks like an advantage."""
    rewards_B, groups_B = torch.full((11,), 0.1, dtype=dtype), torch.tensor([0] * 10 + [1])
    total = sum(rewards_B[:9], start=rewards_B[9])  # one after the other
    assert total / 10 != rewards_B[0], "this reward does not show the danger"
    assert KINDS[kind](rewards_B, groups_B).tolist() == [0.0] * 11
    assert grpo_advantages(rewards_B, groups_B, eps=0.0).tolist() == [0.0] * 11
    assert batch_std_advantages(rewards_B[:1], groups_B[:1], eps=0.0).tolist() == [0.0]
    assert KINDS[kind](rewards_B[:0], groups_B[:0]).tolist() == []


def test_rewards_that_differ_by_their_rounding_alone_count_as_equal() -> None:
    # Group 0 spreads over 0.25 = 2 x 0.125: equal. Group 1 spreads over 1: mean 0.5, deviation 0.5, so -1 and 1.
    rewards_B, groups_B = f64([0.0, 0.25, 0.0, 1.0]), torch.tensor([0, 0, 1, 1])
    noise_B = f64([0.0, 0.125, 0.125, 0.125])
    close(grpo_advantages(rewards_B, groups_B, correction=0, eps=0.0, noise_B=noise_B), [0.0, 0.0, -1.0, 1.0])
    close(grpo_advantages(rewards_B, groups_B, correction=0, eps=0.0), [-1.0, 1.0, -1.0, 1.0])
    broken = f64([float("nan"), 0.0, 0.0, 1.0])
    assert grpo_advantages(broken, groups_B, noise_B=noise_B)[:2].isnan().all()
    with pytest.raises(ValueError, match="noise"):
        grpo_advantages(rewards_B, groups_B, noise_B=noise_B[:, None])


# -- properties -----------------------------------------------------------------------------------------------------------

REWARDS = st.floats(-4, 4).map(lambda reward: round(reward, 3))
ROWS = st.lists(st.tuples(REWARDS, st.integers(-2, 2)), min_size=1, max_size=12)
quick = settings(max_examples=60, deadline=None)


def split(rows: list[tuple[float, int]]) -> tuple[Tensor, Tensor]:
    return f64([reward for reward, _ in rows]), torch.tensor([group for _, group in rows])


def slow(rows: list[tuple[float, int]], worth: Callable[[float, list[float]], float]) -> list[float]:
    """One reply at a time, from the rewards of the others of its question."""
    out = []
    for i, (reward, group) in enumerate(rows):
        others = [other for j, (other, its_group) in enumerate(rows) if its_group == group and j != i]
        out.append(worth(reward, others) if others else 0.0)
    return out


def slow_grpo(reward: float, others: list[float]) -> float:
    every = [reward, *others]
    mean = math.fsum(every) / len(every)
    deviation = math.sqrt(math.fsum((r - mean) ** 2 for r in every) / (len(every) - 1))
    return (reward - mean) / (deviation + 1e-2)


@quick
@given(rows=ROWS)
def test_any_groups_match_a_loop_over_replies(rows: list[tuple[float, int]]) -> None:
    rewards_B, groups_B = split(rows)
    close(rloo_advantages(rewards_B, groups_B), slow(rows, lambda r, others: r - math.fsum(others) / len(others)))
    centred = slow(rows, lambda r, others: r - (r + math.fsum(others)) / (1 + len(others)))
    close(mean_only_advantages(rewards_B, groups_B), centred)
    close(grpo_advantages(rewards_B, groups_B, eps=1e-2), slow(rows, slow_grpo))


@quick
@given(rows=ROWS, data=st.data())
def test_neither_the_order_of_rows_nor_the_names_of_groups_matter(rows: list[tuple[float, int]], data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(rows))))
    names = dict(zip(range(-2, 3), data.draw(st.permutations([-7, 0, 3, 10**12, 11])), strict=True))
    rewards_B, groups_B = split(rows)
    moved_B, renamed_B = split([(rows[i][0], names[rows[i][1]]) for i in order])
    for kind, advantages in KINDS.items():
        expected_B = advantages(rewards_B, groups_B)[list(order)]
        torch.testing.assert_close(advantages(moved_B, renamed_B), expected_B, rtol=1e-9, atol=1e-9, msg=kind)


@quick
@given(rows=ROWS, other=st.lists(REWARDS, min_size=1, max_size=4))
def test_a_group_does_not_see_the_rest_of_the_batch(rows: list[tuple[float, int]], other: list[float]) -> None:
    rewards_B, groups_B = split(rows)
    more_B, more_groups_B = split([*rows, *((reward, 99) for reward in other)])
    for kind, advantages in KINDS.items():
        if kind.startswith("batch_std"):
            continue  # its scale is that of the batch
        alone_B, together_B = advantages(rewards_B, groups_B), advantages(more_B, more_groups_B)
        torch.testing.assert_close(together_B[: len(rows)], alone_B, rtol=1e-9, atol=1e-9, msg=kind)


@quick
@given(rows=ROWS)
def test_a_group_adds_up_to_0(rows: list[tuple[float, int]]) -> None:
    rewards_B, groups_B = split(rows)
    for kind, advantages in KINDS.items():
        advantages_B = advantages(rewards_B, groups_B)
        for group in groups_B.unique():
            assert float(advantages_B[groups_B == group].sum()) == pytest.approx(0.0, abs=1e-6), kind


@pytest.mark.parametrize("garbage", [1e30, math.inf, math.nan])
def test_padding_does_not_leak(garbage: float) -> None:
    mask_BT = torch.tensor([[True, False, True], [False, True, False]])
    clean_BT, baseline_B, groups_B = f64([[1.0, 0.0, 2.0], [0.0, 4.0, 0.0]]), f64([0.5, 1.0]), torch.tensor([0, 0])
    dirty_BT = torch.where(mask_BT, clean_BT, garbage)
    close(remax_advantages(dirty_BT, mask_BT, baseline_B), [[2.5, 0.0, 1.5], [0.0, 3.0, 0.0]])
    # Returns 3, 2, 4: mean 3, deviation 1.
    close(reinforce_pp_advantages(dirty_BT, mask_BT, gamma=1.0, eps=0.0), [[0.0, 0.0, -1.0], [0.0, 1.0, 0.0]])
    # A row without tokens may have any reward if it is alone in its group.
    none_BT = torch.cat([mask_BT, torch.zeros(1, 3, dtype=torch.bool)])
    rewards_B, lonely_B = f64([1.0, 3.0, garbage]), torch.tensor([0, 0, 1])
    white_BT = reinforce_pp_baseline_advantages(rewards_B, lonely_B, none_BT)
    torch.testing.assert_close(white_BT[:2], reinforce_pp_baseline_advantages(rewards_B[:2], groups_B, mask_BT))
    assert white_BT[2].eq(0).all()


def test_whitened_batches_have_mean_0() -> None:
    generator = torch.Generator().manual_seed(0)
    mask_BT = torch.rand(6, 5, generator=generator) < 0.6
    rewards_BT = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    groups_B = torch.tensor([0, 1, 0, 1, 2, 2])
    for white_BT in (
        reinforce_pp_advantages(rewards_BT, mask_BT, gamma=0.9),
        reinforce_pp_baseline_advantages(rewards_BT[:, 0], groups_B, mask_BT),
    ):
        close(masked_mean(white_BT, mask_BT), 0.0)
        assert float(masked_sum(white_BT.square(), mask_BT)) == pytest.approx(int(mask_BT.sum()) - 1, rel=1e-6)


def test_the_leave_one_out_gradient_is_unbiased_and_the_mean_shrinks_it() -> None:
    """E[Σ_i A_i ∇ log π(a_i)] / n over every draw of a group, against ∇ E[R]: RLOO equals it, the mean is (n − 1)/n of it."""
    logits_V, rewards_V = f64([0.3, -0.5, 1.1]).requires_grad_(), f64([1.0, -2.0, 0.5])
    logprobs_V = logits_V.log_softmax(-1)
    (exact_V,) = torch.autograd.grad((logprobs_V.exp() * rewards_V).sum(), logits_V, retain_graph=True)
    size = 3
    for advantages, share in ((rloo_advantages, 1.0), (mean_only_advantages, (size - 1) / size)):
        surrogate = torch.zeros(())
        for draw in torch.cartesian_prod(*[torch.arange(3)] * size):
            chance = logprobs_V[draw].sum().exp().detach()
            worth_B = advantages(rewards_V[draw], torch.zeros(size, dtype=torch.long))
            surrogate = surrogate + chance * (worth_B * logprobs_V[draw]).sum() / size
        (gradient_V,) = torch.autograd.grad(surrogate, logits_V, retain_graph=True)
        close(gradient_V, (share * exact_V).tolist())


def test_wrong_arguments_are_refused() -> None:
    wrong: list[tuple[Any, str]] = [
        (lambda: rloo_advantages(torch.zeros(3), torch.zeros(2, dtype=torch.long)), "the same shape"),
        (lambda: grpo_advantages(torch.zeros(2), torch.zeros(2)), "integer ids"),
        (lambda: mean_only_advantages(torch.zeros(2, 1), torch.zeros(2, 1, dtype=torch.long)), r"integer ids \[B\]"),
        (lambda: remax_advantages(torch.zeros(2, 3), torch.ones(2, 3), torch.zeros(3)), r"x \[3\], rows \[2\]"),
        (lambda: broadcast_to_tokens(torch.zeros(2, 1), torch.ones(2, 3)), "the same shape"),
    ]
    for call, sentence in wrong:
        with pytest.raises(ValueError, match=sentence):
            call()
