from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from golden_numbers import golden
from selfeval.algorithms.mdp import (
    FiniteMDP,
    TokenMDP,
    evaluate_policy,
    evaluate_soft_policy,
    evaluate_token_policy,
    expected_return,
    occupancy,
    policy_gradient,
    policy_iteration,
    prefix_rows,
    reach_probabilities,
    regularised_return,
    sequence_kl,
    soft_policy_iteration,
    soft_value_iteration,
    solve_soft_token_mdp,
    solve_token_mdp,
    token_mdp,
    token_rewards,
    value_iteration,
)

FINITE = ["mdp_12x4", "mdp_absorbing"]
TOKEN = ["token_mdp_v4_h4", "token_mdp_eos_v3"]
BETAS = ["0.05", "0.5", "5.0"]


def f64(numbers: object) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def close(actual: Tensor, expected: object, *, atol: float = 1e-12) -> None:
    torch.testing.assert_close(actual, f64(expected), rtol=1e-9, atol=atol)


def finite(name: str) -> tuple[FiniteMDP, dict[str, Tensor], dict[str, Any]]:
    entry = golden("11_mdp")[name]
    inputs = {key: f64(numbers) for key, numbers in entry["inputs"].items()}
    mdp = FiniteMDP(inputs["P"], inputs["R"], inputs["start"], entry["params"]["gamma"])
    return mdp, inputs, entry["expected"]


def token(name: str) -> tuple[TokenMDP, dict[str, Any], dict[str, Any]]:
    entry = golden("11_mdp")[name]
    params = entry["params"]
    mdp = token_mdp(params["vocab"], params["horizon"], f64(entry["inputs"]["rewards"]), eos=params["eos"])
    return mdp, entry["inputs"], entry["expected"]


def one_state(rewards_A: list[float], gamma: float) -> FiniteMDP:
    """Every action pays and leads back: the values have a closed form."""
    return FiniteMDP(f64([[[1.0]] * len(rewards_A)]), f64([rewards_A]), f64([1.0]), gamma)


# -- finite -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solve", [value_iteration, policy_iteration])
@pytest.mark.parametrize("name", FINITE)
def test_the_optimum_matches_golden(name: str, solve: Any) -> None:
    mdp, _, expected = finite(name)
    solution = solve(mdp)
    # The two differ by at most the requested tolerance, 1e-10.
    close(solution.values_S, expected["V_star"], atol=1e-10)
    close(solution.q_SA, expected["Q_star"], atol=1e-10)
    assert solution.policy_SA.argmax(-1).tolist() == expected["pi_star"]
    close(solution.policy_SA.sum(-1), [1.0] * len(expected["pi_star"]))


@pytest.mark.parametrize("solve", [soft_value_iteration, soft_policy_iteration])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("name", FINITE)
def test_the_regularised_optimum_matches_golden(name: str, beta: str, solve: Any) -> None:
    mdp, inputs, expected = finite(name)
    solution = solve(mdp, inputs["ref_policy"], beta=float(beta))
    close(solution.values_S, expected["soft"][beta]["V"], atol=1e-10)
    close(solution.q_SA, expected["soft"][beta]["Q"], atol=1e-10)
    close(solution.policy_SA, expected["soft"][beta]["policy"], atol=1e-10)
    # Evaluating the returned policy separately yields the returned values.
    again = evaluate_soft_policy(mdp, solution.policy_SA, inputs["ref_policy"], beta=float(beta))
    close(again.values_S, expected["soft"][beta]["V"], atol=1e-10)


@pytest.mark.parametrize("name", FINITE)
def test_evaluation_occupancy_and_gradient_match_golden(name: str) -> None:
    mdp, inputs, expected = finite(name)
    values_S, q_SA, policy_SA = evaluate_policy(mdp, inputs["policy_logits"].softmax(-1))
    close(values_S, expected["eval"]["V"])
    close(q_SA, expected["eval"]["Q"])
    close(q_SA - values_S[:, None], expected["eval"]["A"])
    close(occupancy(mdp, policy_SA), expected["eval"]["occupancy_unnormalised"])
    close(mdp.start_S @ values_S, expected["eval"]["J"])
    close(policy_gradient(mdp, policy_SA), expected["eval"]["grad_J"])


@pytest.mark.parametrize("tolerance", [1.0, 1e-3])
def test_value_iteration_stops_within_its_bound(tolerance: float) -> None:
    # V* = 1 / (1 − 0.99) = 100. All states change alike, so a stopping rule on the span would end at V = 1, off by 99.
    error = abs(value_iteration(one_state([1.0, 0.5], 0.99), tolerance=tolerance).values_S.item() - 100)
    # It does not run longer than needed: one sweep earlier, the error was still above the bound.
    assert 0.98 * tolerance < error <= tolerance


def test_soft_values_of_one_state_have_their_closed_form() -> None:
    # V = β log Σ π_ref exp((R + γ V) / β) = γ V + β log(¾ e^{1/β} + ¼ e^{2/β}), so V = β log(...) / (1 − γ).
    mdp, ref_SA, beta = one_state([1.0, 2.0], 0.5), f64([[0.75, 0.25]]), 0.5
    log_mean = beta * math.log(0.75 * math.exp(2.0) + 0.25 * math.exp(4.0))
    for solve in (soft_value_iteration, soft_policy_iteration):
        solution = solve(mdp, ref_SA, beta=beta)
        close(solution.values_S, [2 * log_mean], atol=1e-10)
        odds = 0.25 * math.exp(4.0) / (0.75 * math.exp(2.0))
        close(solution.policy_SA, [[1 / (1 + odds), odds / (1 + odds)]], atol=1e-10)


@pytest.mark.parametrize("solve", [soft_value_iteration, soft_policy_iteration])
@pytest.mark.parametrize("surplus", [1e-9, -1e-9, 9e-6])
def test_a_reference_whose_sum_is_rounded_has_the_same_optimum(solve: Any, surplus: float) -> None:
    # Probabilities computed in fp32 sum to 1 up to 1e-6. Without renormalisation, β log of the sum would be a reward in
    # every step: policy iteration would count it as a gain in every round and never end.
    mdp, beta = one_state([1.0, 2.0], 0.5), 0.5
    log_mean = beta * math.log(0.75 * math.exp(2.0) + 0.25 * math.exp(4.0))
    solution = solve(mdp, f64([[0.75, 0.25]]) * (1 + surplus), beta=beta)
    close(solution.values_S, [2 * log_mean], atol=1e-10)


def test_a_forbidden_action_is_never_taken() -> None:
    # The second action would be better, but π_ref never takes it: V = 1 + γ V = 2, at no KL.
    mdp, ref_SA = one_state([1.0, 9.0], 0.5), f64([[1.0, 0.0]])
    for solve in (soft_value_iteration, soft_policy_iteration):
        solution = solve(mdp, ref_SA, beta=0.5)
        close(solution.values_S, [2.0], atol=1e-10)
        close(solution.policy_SA, [[1.0, 0.0]])
    with pytest.raises(ValueError, match=r"probability 0 under the reference in states \[0\]"):
        evaluate_soft_policy(mdp, f64([[0.5, 0.5]]), ref_SA, beta=0.5)


def test_policy_iteration_ends_where_all_actions_are_equal() -> None:
    # Equal up to rounding: 0.1 + 0.2 and 0.3 differ in the last bit. V = 0.3 / (1 − 0.9) = 3.
    close(policy_iteration(one_state([0.3, 0.1 + 0.2, 0.3], 0.9)).values_S, [3.0], atol=1e-10)


def test_policy_iteration_improves_a_policy_that_looks_best_at_first_sight() -> None:
    # State 0: action 0 pays 1 and stays, action 1 pays 0 and leads to state 1, which pays 3 for ever. γ = 0.9:
    # staying is worth 10, leaving 0.9 · 30 = 27.
    to = f64([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, 1.0]]])
    mdp = FiniteMDP(to, f64([[1.0, 0.0], [3.0, 3.0]]), f64([1.0, 0.0]), 0.9)
    solution = policy_iteration(mdp)
    close(solution.values_S, [27.0, 30.0], atol=1e-10)
    assert solution.policy_SA[0].tolist() == [0.0, 1.0]


def test_a_tolerance_below_rounding_is_refused() -> None:
    mdp = one_state([1.0], 0.99)
    for solve in (value_iteration, policy_iteration):
        with pytest.raises(ValueError, match="got 1e-16"):
            solve(mdp, tolerance=1e-16)
    with pytest.raises(ValueError, match="got 0"):
        soft_policy_iteration(mdp, f64([[1.0]]), beta=1.0, tolerance=0.0)
    single = FiniteMDP(mdp.transitions_SAS.float(), mdp.rewards_SA.float(), mdp.start_S.float(), 0.99)
    with pytest.raises(ValueError, match="values up to 100"):
        value_iteration(single)


def test_values_of_200_are_found_without_a_tolerance() -> None:
    # V* = 2 / (1 − 0.99) = 200: 1e-10 is below the 1.4e-10 that float64 resolves here, and was refused as a default.
    mdp = one_state([2.0, 1.0], 0.99)
    for solve in (value_iteration, policy_iteration):
        close(solve(mdp).values_S, [200.0])
    # The bound on the error is the resolution, 32 · 2.2e-16 · 2e3 / 1e-3 = 1.4e-8 for V* = 2 / (1 − 0.999) = 2000.
    close(value_iteration(one_state([2.0, 1.0], 0.999)).values_S, [2000.0], atol=1.4e-8)


@pytest.mark.parametrize("beta", [1e-3, 1.0, 1e3, 1e5, 1e8])
def test_soft_iterations_end_whatever_beta(beta: float) -> None:
    # V = β log Σ π_ref exp((R + γ V) / β), so V = β log(½ + ½ e^{1/β}) / (1 − γ), which is 5 + 10/(8β) for a large β.
    mdp, ref_SA = one_state([0.0, 1.0], 0.9), f64([[0.5, 0.5]])
    log_mean = beta * math.log1p(math.expm1(1 / beta) / 2) if beta > 0.01 else 1 + beta * math.log(0.5)
    for solve in (soft_value_iteration, soft_policy_iteration):
        # β log π is rounded before it is multiplied by β: 32 · 2.2e-16 · β / (1 − γ), over another 1 − γ in the values.
        close(solve(mdp, ref_SA, beta=beta).values_S, [10 * log_mean], atol=1e-10 + 7.2e-13 * beta)
    # Probabilities that sum to 1 up to rounding alone: β log of that sum is no reward.
    third_SA = f64([[1 / 3, 2 / 3]])
    assert soft_policy_iteration(mdp, third_SA, beta=beta).values_S.isfinite().all()


@given(
    rewards=st.lists(st.floats(-3, 3), min_size=4, max_size=4),
    moves=st.lists(st.floats(0.01, 1), min_size=8, max_size=8),
    gamma=st.sampled_from([0.0, 0.5, 0.9, 0.98]),
    log_beta=st.floats(-3, 6),
)
@settings(max_examples=30, deadline=None)
def test_both_soft_iterations_end_at_the_same_values(
    rewards: list[float], moves: list[float], gamma: float, log_beta: float
) -> None:
    transitions_SAS = f64(moves).view(2, 2, 2)
    mdp = FiniteMDP(transitions_SAS / transitions_SAS.sum(-1, keepdim=True), f64(rewards).view(2, 2), f64([0.5, 0.5]), gamma)
    ref_SA, beta = f64([[0.25, 0.75], [0.9, 0.1]]), 10.0**log_beta
    found = [solve(mdp, ref_SA, beta=beta).values_S for solve in (soft_value_iteration, soft_policy_iteration)]
    bound = 2e-10 + 64 * 2.3e-16 * (3 / (1 - gamma) + beta) / (1 - gamma)
    close(found[0], found[1].tolist(), atol=bound)


def test_a_finite_mdp_that_is_none_is_refused() -> None:
    mdp = one_state([1.0, 2.0], 0.5)
    with pytest.raises(ValueError, match=r"gamma must be in \[0, 1\), got 1.0"):
        FiniteMDP(mdp.transitions_SAS, mdp.rewards_SA, mdp.start_S, 1.0)
    with pytest.raises(ValueError, match=r"transitions must be probabilities .* off by up to 1"):
        FiniteMDP(2 * mdp.transitions_SAS, mdp.rewards_SA, mdp.start_S, 0.5)
    with pytest.raises(ValueError, match="start must be probabilities"):
        FiniteMDP(mdp.transitions_SAS, mdp.rewards_SA, f64([0.5]), 0.5)
    with pytest.raises(ValueError, match="the same shape"):
        FiniteMDP(mdp.transitions_SAS, f64([[1.0]]), mdp.start_S, 0.5)
    with pytest.raises(ValueError, match="policy must be probabilities"):
        evaluate_policy(mdp, f64([[1.5, -0.5]]))
    with pytest.raises(ValueError, match=r"beta must be > 0, got 0.0"):
        soft_value_iteration(mdp, f64([[0.5, 0.5]]), beta=0.0)


# -- tokens -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOKEN)
def test_states_and_sequences_come_in_the_golden_order(name: str) -> None:
    mdp, inputs, _ = token(name)
    assert [list(prefix) for prefix in mdp.prefixes] == inputs["prefixes"]
    assert [list(sequence) for sequence in mdp.terminal_sequences] == inputs["terminal_sequences"]
    close(mdp.rewards_PV[mdp.terminal_PV], inputs["rewards"])


@pytest.mark.parametrize("name", TOKEN)
def test_the_best_return_matches_golden(name: str) -> None:
    mdp, inputs, expected = token(name)
    solution = solve_token_mdp(mdp)
    close(solution.values_P, expected["V_star"])
    close(solution.q_PV, expected["Q_star"])
    assert solution.values_P[0] == max(inputs["rewards"])
    close(expected_return(mdp, solution.logprobs_PV), max(inputs["rewards"]))


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("name", TOKEN)
def test_the_regularised_optimum_over_tokens_matches_golden(name: str, beta: str) -> None:
    mdp, inputs, expected = token(name)
    ref_PV, soft = f64(inputs["ref_logits"]).log_softmax(-1), expected["soft"][beta]
    solution = solve_soft_token_mdp(mdp, ref_PV, beta=float(beta))
    close(solution.values_P, soft["V"])
    close(solution.q_PV, soft["Q"])
    close(solution.logprobs_PV.exp(), soft["policy"])
    close(solution.values_P[0] / float(beta), soft["log_Z"])
    close(expected_return(mdp, solution.logprobs_PV), soft["expected_reward"])
    close(sequence_kl(mdp, solution.logprobs_PV, ref_PV), soft["kl_seq"])
    # The objective of the optimal policy is the optimal value.
    close(regularised_return(mdp, solution.logprobs_PV, ref_PV, beta=float(beta)), soft["V"][0])


@pytest.mark.parametrize("name", TOKEN)
def test_any_policy_and_its_gradients_match_golden(name: str) -> None:
    mdp, inputs, expected = token(name)
    beta = golden("11_mdp")[name]["params"]["beta_grad"]
    logits_PV, ref_PV = f64(inputs["policy_logits"]).requires_grad_(), f64(inputs["ref_logits"]).log_softmax(-1)
    logprobs_PV = logits_PV.log_softmax(-1)
    solution = evaluate_token_policy(mdp, logprobs_PV)
    close(solution.values_P.detach(), expected["eval"]["V"])
    close(solution.q_PV.detach(), expected["eval"]["Q"])
    close(reach_probabilities(mdp, logprobs_PV).detach(), expected["eval"]["reach"])
    for value, figure, gradient in (
        (expected_return(mdp, logprobs_PV), "J", "grad_J"),
        (sequence_kl(mdp, logprobs_PV, ref_PV), "kl_seq", "grad_kl"),
        (regularised_return(mdp, logprobs_PV, ref_PV, beta=beta), "objective", "grad_objective"),
    ):
        close(value.detach(), expected["eval"][figure])
        close(torch.autograd.grad(value, logits_PV, retain_graph=True)[0], expected["eval"][gradient])


def dense_mdp() -> tuple[TokenMDP, Tensor, dict[tuple[int, ...], float]]:
    """EOS in the middle of the vocabulary, rewards at the end and at every token, and each sequence's return by hand."""
    generator = torch.Generator().manual_seed(3)
    empty = token_mdp(3, 3, torch.zeros(1 + 2 + 4 * 3, dtype=torch.float64), eos=1)
    terminal_N = torch.randn(15, generator=generator, dtype=torch.float64)
    dense_PV = torch.randn(7, 3, generator=generator, dtype=torch.float64)
    mdp = token_mdp(3, 3, terminal_N, eos=1, dense_PV=dense_PV)
    returns = {}
    for sequence, terminal in zip(empty.terminal_sequences, terminal_N.tolist(), strict=True):
        steps = [(sequence[:t], token) for t, token in enumerate(sequence)]
        returns[sequence] = terminal + sum(dense_PV[empty.prefixes.index(p), v].item() for p, v in steps)
    return mdp, torch.randn(2, 7, 3, generator=generator, dtype=torch.float64).log_softmax(-1), returns


def test_dense_rewards_agree_with_listing_all_sequences() -> None:
    mdp, (policy_PV, ref_PV), returns = dense_mdp()
    assert len(returns) == 15
    assert all(sequence[-1] == 1 or len(sequence) == 3 for sequence in returns)
    rows = {prefix: row for row, prefix in enumerate(mdp.prefixes)}

    def logprob(table_PV: Tensor, sequence: tuple[int, ...]) -> float:
        return sum(table_PV[rows[sequence[:t]], token].item() for t, token in enumerate(sequence))

    p = {sequence: math.exp(logprob(policy_PV, sequence)) for sequence in returns}
    ref = {sequence: math.exp(logprob(ref_PV, sequence)) for sequence in returns}
    assert math.fsum(p.values()) == pytest.approx(1)
    close(expected_return(mdp, policy_PV), math.fsum(p[y] * returns[y] for y in returns))
    close(sequence_kl(mdp, policy_PV, ref_PV), math.fsum(p[y] * math.log(p[y] / ref[y]) for y in returns))
    close(reach_probabilities(mdp, policy_PV).sum(), math.fsum(p[y] * len(y) for y in returns))
    close(solve_token_mdp(mdp).values_P[0], max(returns.values()))
    soft = solve_soft_token_mdp(mdp, ref_PV, beta=0.7)
    partition = math.fsum(ref[y] * math.exp(returns[y] / 0.7) for y in returns)
    close(soft.values_P[0], 0.7 * math.log(partition))
    for y in returns:
        assert math.exp(logprob(soft.logprobs_PV, y)) == pytest.approx(ref[y] * math.exp(returns[y] / 0.7) / partition)


def test_drawn_tokens_find_their_states_and_rewards() -> None:
    mdp, _, returns = dense_mdp()
    for padding in (0, 1, 2, -100):
        tokens_BT = torch.tensor([[*y, *[padding] * (3 - len(y))] for y in returns])
        rows_BT, rewards_BT = prefix_rows(mdp, tokens_BT), token_rewards(mdp, tokens_BT)
        for y, rows, rewards in zip(returns, rows_BT.tolist(), rewards_BT, strict=True):
            assert [mdp.prefixes[row] for row in rows[: len(y)]] == [y[:t] for t in range(len(y))]
            assert rows[len(y) :] == [-1] * (3 - len(y))
            assert rewards[len(y) :].tolist() == [0.0] * (3 - len(y))
            close(rewards.sum(), returns[y])


def test_what_is_never_reached_costs_nothing() -> None:
    # After token 0 the policy does what the reference forbids, but it never draws token 0. KL = 1 · ln(1 / ½).
    mdp = token_mdp(2, 2, f64([1.0, 2.0, 3.0, 4.0]))
    inf = math.inf
    policy_PV = f64([[-inf, 0.0], [0.0, -inf], [-inf, 0.0]])
    ref_PV = f64([[math.log(0.5)] * 2, [-inf, 0.0], [-inf, 0.0]])
    close(sequence_kl(mdp, policy_PV, ref_PV), math.log(2))
    close(expected_return(mdp, policy_PV), 4.0)
    close(regularised_return(mdp, policy_PV, ref_PV, beta=2.0), 4.0 - 2 * math.log(2))
    soft = solve_soft_token_mdp(mdp, ref_PV, beta=1.0)
    # Allowed: (0, 1) and (1, 1), a half each, which pay 2 and 4.
    close(soft.values_P[0], math.log(0.5 * math.exp(2) + 0.5 * math.exp(4)))
    assert soft.logprobs_PV[1].tolist() == [-inf, 0.0]
    # β = 0 asks for the plain return, though the KL is infinite.
    always_0_PV = f64([[0.0, -inf], [0.0, -inf], [0.0, -inf]])
    assert sequence_kl(mdp, always_0_PV, ref_PV) == inf
    close(regularised_return(mdp, always_0_PV, ref_PV, beta=0.0), 1.0)


def test_no_policy_beats_the_regularised_optimum() -> None:
    mdp, (policy_PV, ref_PV), _ = dense_mdp()
    best = solve_soft_token_mdp(mdp, ref_PV, beta=0.3).values_P[0]
    # J(π) = V* − β KL(π‖π*), so a policy falls short by exactly its KL to the optimum.
    optimum_PV = solve_soft_token_mdp(mdp, ref_PV, beta=0.3).logprobs_PV
    gap = 0.3 * sequence_kl(mdp, policy_PV, optimum_PV)
    assert gap > 0.01
    close(regularised_return(mdp, policy_PV, ref_PV, beta=0.3), (best - gap).item())


def test_log_probs_of_a_model_in_float32_are_read_in_float64() -> None:
    mdp, (policy_PV, _), _ = dense_mdp()
    value = expected_return(mdp, policy_PV.float())
    # Their own rounding remains, but exp and the sums add none: the same bits as when they are widened first.
    assert value == expected_return(mdp, policy_PV.float().double())
    torch.testing.assert_close(value, expected_return(mdp, policy_PV), rtol=1e-6, atol=1e-6)


def test_a_token_mdp_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"each of the 4 complete sequences, got shape \[3\]"):
        token_mdp(2, 2, torch.zeros(3))
    with pytest.raises(ValueError, match=r"\[prefixes, vocabulary\] = \[3, 2\], got \[3, 3\]"):
        TokenMDP(2, 2, torch.zeros(3, 3))
    with pytest.raises(ValueError, match=r"eos must be in \[0, 2\).* got 2"):
        token_mdp(2, 2, torch.zeros(4), eos=2)
    with pytest.raises(ValueError, match="at least 1, got 2 and 0"):
        token_mdp(2, 0, torch.zeros(0))
    with pytest.raises(ValueError, match=r"dense \[2, 2\]"):
        token_mdp(2, 2, torch.zeros(4), dense_PV=torch.zeros(2, 2))


def test_policies_and_tokens_that_do_not_fit_are_refused() -> None:
    mdp, (policy_PV, ref_PV), _ = dense_mdp()
    with pytest.raises(ValueError, match="sums to 3: take log_softmax"):
        expected_return(mdp, torch.zeros(7, 3))
    with pytest.raises(ValueError, match="the same shape"):
        expected_return(mdp, policy_PV[:6])
    with pytest.raises(ValueError, match="log_softmax"):
        sequence_kl(mdp, policy_PV, torch.full((7, 3), math.nan))
    with pytest.raises(ValueError, match="beta must be > 0"):
        solve_soft_token_mdp(mdp, ref_PV, beta=0.0)
    with pytest.raises(ValueError, match="beta must be >= 0"):
        regularised_return(mdp, policy_PV, ref_PV, beta=-1.0)
    with pytest.raises(ValueError, match="at most 3 tokens, got 4"):
        prefix_rows(mdp, torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"in \[0, 3\), got \[0, 1, 3\]"):
        prefix_rows(mdp, torch.tensor([[0, 3, 1]]))
