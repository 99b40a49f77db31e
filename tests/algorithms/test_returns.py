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
from selfeval.algorithms.masked import whiten
from selfeval.algorithms.returns import discounted_returns, gae, n_step_returns, td_lambda_returns, vtrace

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
DONES = ["dones_bootstrap", "dones_f32"]
VTRACE = ["vtrace", "vtrace_lam_clip", "vtrace_f32"]


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


def segments(entry: dict[str, Any], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The inputs of a control task, as keyword arguments: nothing is masked, episodes end where dones is 1."""
    inputs = {key: torch.tensor(entry["inputs"][key], dtype=dtype) for key in ("rewards", "values", "dones", "bootstrap_value")}
    return {
        "rewards_BT": inputs["rewards"],
        "values_BT": inputs["values"],
        "mask_BT": torch.ones_like(inputs["rewards"]),
        "dones_BT": inputs["dones"],
        "bootstrap_B": inputs["bootstrap_value"],
    }


@pytest.mark.parametrize("name", DONES)
def test_segments_of_many_episodes_match_golden(name: str) -> None:
    entry = golden("1_returns_gae")[name]
    expected, given_ = entry["expected"], segments(entry)
    assert given_["dones_BT"].any(), "no episode ends inside"
    gamma, lam, n = (entry["params"][key] for key in ("gamma", "lam", "n"))
    errors_BT = gae(**given_, gamma=gamma, lam=lam)
    close(errors_BT, expected["gae"])
    close(errors_BT, expected["td_lambda_errors"])
    close(td_lambda_returns(**given_, gamma=gamma, lam=lam), expected["lambda_returns"])
    close(n_step_returns(**given_, gamma=gamma, n=n), expected["n_step_returns"])
    close(gae(**given_ | {"bootstrap_B": None}, gamma=gamma, lam=lam), expected["gae_bootstrap0"])
    del given_["values_BT"]
    close(discounted_returns(**given_, gamma=gamma), expected["discounted_returns_bootstrapped"])


def corrected(entry: dict[str, Any], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    params = {key: entry["params"][key] for key in ("gamma", "lam", "clip_rho", "clip_pg_rho", "clip_c")}
    return list(vtrace(torch.tensor(entry["inputs"]["log_rhos"], dtype=dtype), **segments(entry, dtype), **params))


@pytest.mark.parametrize("name", VTRACE)
def test_vtrace_matches_golden(name: str) -> None:
    entry = golden("1_returns_gae")[name]
    for actual_BT, key in zip(corrected(entry), ("vs", "pg_advantages", "q_estimate"), strict=True):
        close(actual_BT, entry["expected"][key])


def test_float32_matches_golden() -> None:
    entry = golden("1_returns_gae")["dones_f32"]
    given_, gamma, lam = segments(entry, torch.float32), entry["params"]["gamma"], entry["params"]["lam"]
    actual = {
        "gae": gae(**given_, gamma=gamma, lam=lam),
        "lambda_returns": td_lambda_returns(**given_, gamma=gamma, lam=lam),
        "n_step_returns": n_step_returns(**given_, gamma=gamma, n=entry["params"]["n"]),
    }
    expected = dict(entry["expected"])
    entry = golden("1_returns_gae")["vtrace_f32"]
    actual |= dict(zip(("vs", "pg_advantages", "q_estimate"), corrected(entry, torch.float32), strict=True))
    expected |= entry["expected"]
    for key, actual_BT in actual.items():
        torch.testing.assert_close(actual_BT, torch.tensor(expected[key]), rtol=1e-5, atol=1e-6)


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


# -- slow references and properties ---------------------------------------------------------------------------------------
# A row is a list of (reward, value, log-ratio, done, kept); every reference walks the kept tokens of one row alone.

NUMBERS = st.floats(-3, 3).map(lambda number: round(number, 3))
TOKEN = st.tuples(NUMBERS, NUMBERS, NUMBERS, st.booleans(), st.booleans())
ROW = st.lists(TOKEN, min_size=1, max_size=8)
GAMMA, LAM = 0.9, 0.7
CLIPS = {"clip_rho": 1.2, "clip_pg_rho": 1.1, "clip_c": 0.9}
quick = settings(max_examples=60, deadline=None)
Row = list[tuple[float, float, float, bool, bool]]


def kept_tokens(row: Row) -> Row:
    """The kept tokens; the episode ends with one also where a masked token before the next kept one says so."""
    places = [t for t, token in enumerate(row) if token[4]]
    ends = [any(token[3] for token in row[t:after]) for t, after in zip(places, [*places[1:], len(row)], strict=False)]
    return [(*row[t][:3], end, True) for t, end in zip(places, ends, strict=True)]


def slow_n_step(row: Row, bootstrap: float, n: int) -> list[float]:
    """γ^k r_{t+k} for k < n, then γ^n V: eq. 7.1, stopped by a done, and by the end of the row."""
    kept = kept_tokens(row)
    values = [token[1] for token in kept] + [bootstrap]
    out = []
    for start in range(len(kept)):
        total, discount, t = 0.0, 1.0, start
        while t < min(start + n, len(kept)):
            total, discount = total + discount * kept[t][0], discount * GAMMA * (not kept[t][3])
            t += 1
        out.append(total + discount * values[t])
    return out


def slow_lambda_returns(row: Row, bootstrap: float) -> list[float]:
    """(1 − λ) Σ_n λ^{n−1} G^(n), the rest of the weight on the longest: eq. 12.3, by n-step returns alone."""
    length = sum(token[4] for token in row)
    steps = {n: slow_n_step(row, bootstrap, n) for n in range(1, length + 1)}
    out = []
    for t in range(length):
        left = length - t
        mixed = math.fsum((1 - LAM) * LAM ** (n - 1) * steps[n][t] for n in range(1, left))
        out.append(mixed + LAM ** (left - 1) * steps[left][t])
    return out


def slow_vtrace_targets(row: Row, bootstrap: float) -> list[float]:
    """V_s + Σ_t (Π γ c) ρ_t δ_t: eq. 1 of the paper, one double loop."""
    kept = kept_tokens(row)
    values = [token[1] for token in kept] + [bootstrap]
    out = []
    for start in range(len(kept)):
        total, weight = values[start], 1.0
        for t in range(start, len(kept)):
            reward, value, log_ratio, done, _ = kept[t]
            discount = GAMMA * (not done)
            total += weight * min(CLIPS["clip_rho"], math.exp(log_ratio)) * (reward + discount * values[t + 1] - value)
            weight *= discount * LAM * min(CLIPS["clip_c"], math.exp(log_ratio))
        out.append(total)
    return out


def arguments(row: Row, bootstrap: float, garbage: float = 0.0) -> tuple[Tensor, dict[str, Any]]:
    """Log-ratios, and the keyword arguments that all functions share; garbage where a token is not kept."""
    *numbers, dones, mask = zip(*row, strict=True)
    dones, mask = torch.tensor([dones]), torch.tensor([mask])
    rewards, values, log_ratios = (torch.where(mask, f64([column]), garbage) for column in numbers)
    shared = {"rewards_BT": rewards, "values_BT": values, "mask_BT": mask, "dones_BT": dones, "bootstrap_B": f64([bootstrap])}
    return log_ratios, shared | {"gamma": GAMMA}


@quick
@given(row=ROW, bootstrap=NUMBERS, n=st.integers(1, 9))
@pytest.mark.parametrize("garbage", [0.0, 1e30, math.nan])
def test_any_row_matches_the_sums_of_the_books(garbage: float, row: Row, bootstrap: float, n: int) -> None:
    log_ratios_BT, shared = arguments(row, bootstrap, garbage)
    mask_BT, (targets_BT, advantages_BT, q_BT) = shared["mask_BT"], vtrace(log_ratios_BT, **shared, lam=LAM, **CLIPS)
    returns_BT = td_lambda_returns(**shared, lam=LAM)
    close(n_step_returns(**shared, n=n)[mask_BT], slow_n_step(row, bootstrap, n))
    close(returns_BT[mask_BT], slow_lambda_returns(row, bootstrap))
    close(gae(**shared, lam=LAM)[mask_BT], (returns_BT - shared["values_BT"])[mask_BT].tolist())
    close(targets_BT[mask_BT], slow_vtrace_targets(row, bootstrap))
    # The last kept token has nothing behind it but the bootstrap value.
    kept = kept_tokens(row)
    if kept:
        reward, value, log_ratio, done, _ = kept[-1]
        q = reward + GAMMA * (not done) * bootstrap
        close(q_BT[mask_BT][-1], q)
        close(advantages_BT[mask_BT][-1], min(CLIPS["clip_pg_rho"], math.exp(log_ratio)) * (q - value))
    for x_BT in (targets_BT, advantages_BT, q_BT, returns_BT, n_step_returns(**shared, n=n), gae(**shared, lam=LAM)):
        assert x_BT[~mask_BT].eq(0).all()


@quick
@given(row=ROW, bootstrap=NUMBERS)
def test_the_estimators_meet_where_the_books_say(row: Row, bootstrap: float) -> None:
    log_ratios_BT, shared = arguments(row, bootstrap)
    on_policy_BT, one_step_BT = torch.zeros_like(log_ratios_BT), n_step_returns(**shared, n=1)
    close(td_lambda_returns(**shared, lam=0.0), one_step_BT.tolist())
    monte_carlo_BT = n_step_returns(**shared, n=len(row))
    close(td_lambda_returns(**shared, lam=1.0), monte_carlo_BT.tolist())
    close(discounted_returns(**{key: x for key, x in shared.items() if key != "values_BT"}), monte_carlo_BT.tolist())
    # On policy V-trace is TD(λ): its targets are the λ-returns, and so is the advantage of λ = 1.
    close(vtrace(on_policy_BT, **shared, lam=LAM).targets_BT, td_lambda_returns(**shared, lam=LAM).tolist())
    close(vtrace(on_policy_BT, **shared).advantages_BT, gae(**shared, lam=1.0).tolist())


@quick
@given(before=ROW, after=ROW, bootstrap=NUMBERS)
def test_a_done_cuts_a_row_in_two(before: Row, after: Row, bootstrap: float) -> None:
    before = [(*token[:4], True) for token in before]
    before[-1] = (*before[-1][:3], True, True)
    whole_ratios_BT, whole = arguments(before + after, bootstrap)
    first_ratios_BT, first = arguments(before, 77.0)  # steps after a done must have no effect
    second_ratios_BT, second = arguments(after, bootstrap)
    functions: list[Callable[..., Tensor]] = [
        lambda _, shared: gae(**shared, lam=LAM),
        lambda _, shared: td_lambda_returns(**shared, lam=LAM),
        lambda _, shared: n_step_returns(**shared, n=3),
        lambda log_ratios, shared: torch.stack(vtrace(log_ratios, **shared, lam=LAM, **CLIPS)),
    ]
    for function in functions:
        parts = [function(first_ratios_BT, first), function(second_ratios_BT, second)]
        close(function(whole_ratios_BT, whole), torch.cat(parts, dim=-1).tolist())


def test_a_done_on_a_masked_token_ends_the_episode() -> None:
    # A masked end of text between two turns. With γ = 1 the first token gets 1, not 1 + 5; the third gets its own 5.
    rewards_BT, mask_BT = f64([[1.0, 7.0, 5.0, 7.0]]), torch.tensor([[True, False, True, False]])
    inside_BT = torch.tensor([[False, True, False, False]])
    close(discounted_returns(rewards_BT, mask_BT, gamma=1.0, dones_BT=inside_BT), [[1.0, 0.0, 5.0, 0.0]])
    close(discounted_returns(rewards_BT, mask_BT, gamma=1.0), [[6.0, 0.0, 5.0, 0.0]])
    # Behind the last kept token it keeps the bootstrap value out; before the first one it has no say.
    ends, bootstrap_B = {"last": [[False] * 3 + [True]], "first": [[True] + [False] * 3]}, f64([100.0])
    close(
        discounted_returns(rewards_BT, mask_BT, gamma=1.0, dones_BT=torch.tensor(ends["last"]), bootstrap_B=bootstrap_B),
        [[6.0, 0.0, 5.0, 0.0]],
    )
    later_BT = torch.tensor([[False, True, True, True]])
    first_BT = torch.tensor(ends["first"])
    close(discounted_returns(rewards_BT, later_BT, gamma=1.0, dones_BT=first_BT), [[0.0, 19.0, 12.0, 7.0]])


def test_bfloat16_discounts_by_the_gamma_that_was_given() -> None:
    # 0.99 is 0.98828 in bfloat16: after 99 steps 0.311 where 0.99^99 is 0.370. bfloat16 itself resolves 0.4 %.
    rewards_BT = torch.zeros(1, 100, dtype=torch.bfloat16)
    rewards_BT[0, -1] = 1.0
    returns_BT = discounted_returns(rewards_BT, torch.ones(1, 100), gamma=0.99)
    assert returns_BT.dtype == torch.bfloat16
    assert returns_BT[0, 0].item() == pytest.approx(0.99**99, rel=2**-8)
    advantages_BT = gae(rewards_BT, torch.zeros_like(rewards_BT), torch.ones(1, 100), gamma=0.99, lam=1.0)
    assert advantages_BT[0, 0].item() == pytest.approx(0.99**99, rel=2**-8)
    # Ones: (1 - 0.99^100) / 0.01 = 63.40, a sum of 100 terms that bfloat16 would stop resolving.
    sums_BT = discounted_returns(torch.ones_like(rewards_BT), torch.ones(1, 100), gamma=0.99)
    assert sums_BT[0, 0].item() == pytest.approx(63.397, rel=2**-8)


def test_vtrace_learns_the_policy_and_not_the_one_that_drew() -> None:
    """Two one-token replies with rewards 1 and 5, drawn by μ = (¾, ¼), π = (¼, ¾): unclipped, the mean target is π's.

    E_μ[V + ρ (r − V)] = V + ¼ (1 − V) + ¾ (5 − V) = 4, whatever V: here V = 2. The mean over μ alone would be 2.
    """
    log_ratios_BT, rewards_BT = f64([[1 / 3], [3.0]]).log(), f64([[1.0], [5.0]])
    values_BT, mask_BT = torch.full_like(rewards_BT, 2.0), torch.ones(2, 1)
    targets_BT = vtrace(log_ratios_BT, rewards_BT, values_BT, mask_BT, gamma=1.0, clip_rho=math.inf).targets_BT
    close(0.75 * targets_BT[0, 0] + 0.25 * targets_BT[1, 0], 4.0)


def test_rows_of_no_tokens_give_no_tokens() -> None:
    x_BT = torch.zeros(2, 0)
    assert gae(x_BT, x_BT, x_BT, gamma=1.0, lam=1.0).shape == (2, 0)
    assert td_lambda_returns(x_BT, x_BT, x_BT, gamma=1.0, lam=1.0).shape == (2, 0)
    assert n_step_returns(x_BT, x_BT, x_BT, gamma=1.0, n=2).shape == (2, 0)
    assert vtrace(x_BT, x_BT, x_BT, x_BT, gamma=1.0).q_BT.shape == (2, 0)


def test_shapes_that_would_broadcast_are_refused() -> None:
    with pytest.raises(ValueError, match="the same shape"):
        gae(torch.zeros(2, 3), torch.zeros(2, 4), torch.ones(2, 3), gamma=1.0, lam=1.0)
    with pytest.raises(ValueError, match="the same shape"):
        discounted_returns(torch.zeros(2, 3), torch.ones(3), gamma=1.0)
    x_BT = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"dones \[2, 1\], mask \[2, 3\]"):
        td_lambda_returns(x_BT, x_BT, x_BT, gamma=1.0, lam=1.0, dones_BT=torch.zeros(2, 1))
    with pytest.raises(ValueError, match=r"bootstrap \[\], rows \[2\]"):
        n_step_returns(x_BT, x_BT, x_BT, gamma=1.0, n=2, bootstrap_B=torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"log_ratios \[2, 1\]"):
        vtrace(torch.zeros(2, 1), x_BT, x_BT, x_BT, gamma=1.0)
    with pytest.raises(ValueError, match="n must be at least 1 step, got 0"):
        n_step_returns(x_BT, x_BT, x_BT, gamma=1.0, n=0)
