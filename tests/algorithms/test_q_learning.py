from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from golden_numbers import golden
from selfeval.algorithms.kl import categorical_entropy, categorical_kl
from selfeval.algorithms.mdp import solve_soft_token_mdp, token_mdp
from selfeval.algorithms.q_learning import (
    conservative_loss,
    double_dqn_target,
    dqn_target,
    expectile_loss,
    guided_logprobs,
    huber_loss,
    ilql_value_loss,
    kl_soft_q_target,
    kl_soft_value,
    sac_actor_loss,
    sac_state_value,
    sac_target,
    sac_temperature_loss,
    soft_q_target,
    soft_value,
    td_error,
    td_target,
    twin_critic_loss,
)

# The inputs of an *_f32 entry are exact in float32; its expected numbers are those of float64.
DQN = [("dqn", torch.float64), ("dqn_f32", torch.float64), ("dqn_f32", torch.float32)]
SAC = [("sac_discrete", torch.float64), ("sac_discrete_f32", torch.float64), ("sac_discrete_f32", torch.float32)]
INTEGERS = ("actions", "dones", "mask", "nonterminal")


def f64(numbers: object) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def close(actual: Tensor, expected: object) -> None:
    if actual.dtype == torch.float32:
        torch.testing.assert_close(actual.double(), f64(expected), rtol=1e-5, atol=1e-6)
    else:
        torch.testing.assert_close(actual, f64(expected), rtol=1e-9, atol=1e-12)


def entry_of(name: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    entry = golden("10_q_learning")[name]
    inputs = {
        key: torch.tensor(numbers, dtype=torch.int64 if key in INTEGERS else dtype) for key, numbers in entry["inputs"].items()
    }
    return inputs, entry["params"], entry["expected"]


@pytest.mark.parametrize(("name", "dtype"), DQN)
def test_targets_errors_and_huber_match_golden(name: str, dtype: torch.dtype) -> None:
    inputs, params, expected = entry_of(name, dtype)
    rewards, dones, gamma, beta = inputs["rewards"], inputs["dones"], params["gamma"], params["beta"]
    next_BA, ref_BA = inputs["q_target_next"], inputs["ref_logits_next"].log_softmax(-1)
    target_B = dqn_target(rewards, dones, next_BA, gamma=gamma)
    double_B = double_dqn_target(rewards, dones, inputs["q_online_next"], next_BA, gamma=gamma)
    close(target_B, expected["dqn_target"])
    close(double_B, expected["double_dqn_target"])
    close(soft_q_target(rewards, dones, next_BA, beta=beta, gamma=gamma), expected["soft_q_target"])
    close(kl_soft_q_target(rewards, dones, next_BA, ref_BA, beta=beta, gamma=gamma), expected["kl_soft_q_target"])
    # For β → ∞ the last one becomes the mean under π_ref, the target of expected SARSA.
    close(td_target(rewards, dones, (ref_BA.exp() * next_BA).sum(-1), gamma=gamma), expected["expected_sarsa_target"])
    errors_B = td_error(inputs["q_online"], inputs["actions"], target_B)
    close(errors_B, expected["td_error"])
    close(td_error(inputs["q_online"], inputs["actions"], double_B), expected["td_error_double"])
    close(errors_B.square().mean(), expected["mse"])
    close(huber_loss(errors_B), expected["huber"])
    close(huber_loss(errors_B).mean(), expected["huber_mean"])


def test_a_tie_of_double_q_goes_to_the_lowest_action() -> None:
    target = double_dqn_target(f64([0.0]), torch.tensor([0]), f64([[2.0, 7.0, 7.0]]), f64([[1.0, 5.0, 9.0]]), gamma=1.0)
    close(target, [5.0])


def test_nothing_after_the_end_gets_into_a_target_and_no_gradient_through_it() -> None:
    next_BA = f64([[1.0, 2.0], [math.nan, math.inf]]).requires_grad_()
    rewards = f64([1.0, 3.0])
    for target in (
        dqn_target(rewards, torch.tensor([False, True]), next_BA, gamma=0.5),
        double_dqn_target(rewards, torch.tensor([0, 1]), next_BA, next_BA, gamma=0.5),
    ):
        close(target, [2.0, 3.0])
        assert not target.requires_grad
    soft = soft_q_target(rewards, torch.tensor([0, 1]), next_BA, beta=1.0, gamma=0.5)
    close(soft, [1 + 0.5 * math.log(math.e + math.e**2), 3.0])
    assert not soft.requires_grad


@pytest.mark.parametrize("beta", [1e-3, 0.1, 1e4])
def test_soft_values_lie_between_their_limits(beta: float) -> None:
    q_A, ref_A = f64([1.0, 3.0, 2.0]), f64([0.5, 0.25, 0.25]).log()
    mean, most = 2.0 - 0.25, 3.0
    value = kl_soft_value(q_A, ref_A, beta=beta).item()
    assert mean <= value <= most
    if beta == 1e4:
        # V = mean + Var / (2β) + ...: the variance under π_ref is 11/16.
        assert value == pytest.approx(mean + 11 / 16 / 2e4, abs=1e-8)
    if beta == 1e-3:
        assert value == pytest.approx(most + beta * math.log(0.25), abs=1e-9)
    # A uniform reference differs from entropy by the constant β log A.
    uniform_A = torch.full((3,), -math.log(3), dtype=torch.float64)
    difference = soft_value(q_A, beta=beta) - kl_soft_value(q_A, uniform_A, beta=beta)
    assert difference.item() == pytest.approx(beta * math.log(3), rel=1e-9)


def test_the_kl_soft_fixed_point_is_the_optimum_of_the_token_mdp() -> None:
    generator = torch.Generator().manual_seed(5)
    mdp = token_mdp(3, 3, torch.randn(27, generator=generator, dtype=torch.float64))
    ref_PV = torch.randn(13, 3, generator=generator, dtype=torch.float64).log_softmax(-1)
    successor_PV = torch.tensor(
        [[mdp.prefixes.index((*p, v)) if len(p) < 2 else 0 for v in range(3)] for p in mdp.prefixes], dtype=torch.int64
    )
    q_PV = torch.zeros(13, 3, dtype=torch.float64)
    for _ in range(mdp.horizon):
        q_PV = kl_soft_q_target(mdp.rewards_PV, mdp.terminal_PV, q_PV[successor_PV], ref_PV[successor_PV], beta=0.4, gamma=1.0)
    optimum = solve_soft_token_mdp(mdp, ref_PV, beta=0.4)
    close(q_PV, optimum.q_PV.tolist())
    close(guided_logprobs(ref_PV, q_PV, beta=0.4), optimum.logprobs_PV.tolist())


def test_guidance_ignores_what_is_the_same_for_all_actions_and_keeps_what_is_forbidden() -> None:
    # π_ref e^{q/β} at β = ½: ¼ e² : ¾ e⁰ : 0.
    ref_A, q_A = f64([0.25, 0.75, 0.0]).log(), f64([1.0, 0.0, 50.0])
    odds = 0.25 * math.e**2 / 0.75
    expected = [odds / (1 + odds), 1 / (1 + odds), 0.0]
    close(guided_logprobs(ref_A, q_A, beta=0.5).exp(), expected)
    close(guided_logprobs(ref_A, q_A - 1234.5, beta=0.5).exp(), expected)


@pytest.mark.parametrize("delta", [0.5, 2.0])
def test_huber_has_the_clipped_error_as_its_gradient(delta: float) -> None:
    errors = f64([-3.0, -0.25, 0.0, 1.0, 5.0]).requires_grad_()
    loss = huber_loss(errors, delta=delta)
    (gradient,) = torch.autograd.grad(loss.sum(), errors)
    close(gradient, [max(-delta, min(u, delta)) for u in errors.tolist()])
    close(loss[1], 0.25**2 / 2)
    close(loss[4], delta * (5 - delta / 2))


@pytest.mark.parametrize(("name", "dtype"), SAC)
def test_sac_matches_golden(name: str, dtype: torch.dtype) -> None:
    inputs, params, expected = entry_of(name, dtype)
    alpha, actions = params["alpha"], inputs["actions"]
    q1_BA, q2_BA, logits_BA = (inputs[key].requires_grad_() for key in ("q1", "q2", "logits"))
    target_B = sac_target(
        inputs["rewards"],
        inputs["dones"],
        inputs["q1_target_next"],
        inputs["q2_target_next"],
        inputs["logits_next"].log_softmax(-1),
        alpha=alpha,
        gamma=params["gamma"],
    )
    close(target_B, expected["target"])
    close(td_error(q1_BA, actions, target_B).square().mean(), expected["critic1_mse"])
    close(td_error(q2_BA, actions, target_B).square().mean(), expected["critic2_mse"])
    close(twin_critic_loss(q1_BA, q2_BA, actions, target_B).mean(), expected["critic_loss_sum"])
    loss_B = sac_actor_loss(q1_BA, q2_BA, logits_BA.log_softmax(-1), alpha=torch.tensor(alpha, dtype=dtype))
    close(loss_B, expected["actor_per_state"])
    close(loss_B.mean(), expected["actor_loss"])
    gradient_BA, *through_critics = torch.autograd.grad(loss_B.mean(), (logits_BA, q1_BA, q2_BA), allow_unused=True)
    close(gradient_BA, expected["grad_actor_logits"])
    assert through_critics == [None, None]
    log_alpha = torch.tensor(math.log(alpha), dtype=dtype).requires_grad_()
    entropy_B = categorical_entropy(logits_BA)
    close(entropy_B, expected["entropy"])
    loss = sac_temperature_loss(log_alpha, entropy_B, target_entropy=params["target_entropy"]).mean()
    close(loss, expected["alpha_loss_log_param"])
    to_alpha, to_policy = torch.autograd.grad(loss, (log_alpha, logits_BA), allow_unused=True)
    # The other parametrisation, α (H − H̄), has the same sign and α times the size.
    close(alpha * to_alpha, expected["alpha_loss_exp_param"])
    assert to_policy is None


def test_sac_against_a_reference_pays_its_kl() -> None:
    generator = torch.Generator().manual_seed(6)
    q1, q2, logits, ref = torch.randn(4, 5, 3, generator=generator, dtype=torch.float64)
    policy, reference = logits.log_softmax(-1), ref.log_softmax(-1)
    value = sac_state_value(q1, q2, policy, alpha=0.3, ref_logprobs_A=reference)
    close(value, ((policy.exp() * torch.minimum(q1, q2)).sum(-1) - 0.3 * categorical_kl(logits, ref)).tolist())
    # The policy that is best for one critic has the KL-soft value, and the actor's gradient is 0 there.
    best = guided_logprobs(reference, q1, beta=0.3).requires_grad_()
    close(sac_state_value(q1, q1, best, alpha=0.3, ref_logprobs_A=reference), kl_soft_value(q1, reference, beta=0.3).tolist())
    loss = sac_actor_loss(q1, q1, best.log_softmax(-1), alpha=0.3, ref_logprobs_A=reference)
    close(torch.autograd.grad(loss.sum(), best)[0], [[0.0] * 3] * 5)
    rewards, ended = f64([1.0] * 5), torch.tensor([0, 0, 0, 0, 1])
    target = sac_target(rewards, ended, q1, q2, policy, alpha=0.3, gamma=0.9, ref_logprobs_next_A=reference)
    close(target, [*(1 + 0.9 * value[:4]).tolist(), 1.0])


def test_an_action_that_is_never_taken_adds_nothing() -> None:
    # π = (½, ½, 0): V = ½ (1 + 3) + α ln 2, and a finite gradient.
    logits = f64([0.0, 0.0, -math.inf]).requires_grad_()
    q_A = f64([1.0, 3.0, 9.0])
    value = sac_state_value(q_A, q_A, logits.log_softmax(-1), alpha=0.5)
    close(value, 2 + 0.5 * math.log(2))
    # ∂V/∂z_a = π_a (q_a − 2): the first two are equally likely, where the entropy is stationary.
    close(torch.autograd.grad(value, logits)[0], [-0.5, 0.5, 0.0])


@pytest.mark.parametrize("expectile", ["0.5", "0.7", "0.9", "0.99"])
def test_expectiles_match_golden(expectile: str) -> None:
    entry = golden("10_q_learning")["expectile_loss"]
    u, expected = f64(entry["inputs"]["u"]).requires_grad_(), entry["expected"]
    loss = expectile_loss(u, expectile=float(expectile))
    close(loss, expected[expectile]["loss"])
    close(torch.autograd.grad(loss.sum(), u)[0], expected[expectile]["grad"])
    # The expectile of the sample is where the gradient of the mean loss is 0.
    point = f64(expected["expectile_of_sample"][expectile]).requires_grad_()
    (slope,) = torch.autograd.grad(expectile_loss(u.detach() - point, expectile=float(expectile)).mean(), point)
    close(slope, 0.0)


def test_ilql_matches_golden() -> None:
    inputs, params, expected = entry_of("ilql_expectile", torch.float64)
    keep_BT, actions, values = inputs["mask"].bool(), inputs["actions"], inputs["values"].requires_grad_()
    q1, q2 = inputs["q1"], inputs["q2"]
    target = td_target(inputs["rewards"], 1 - inputs["nonterminal"][:, 1:], values[:, 1:], gamma=params["gamma"])
    close(twin_critic_loss(q1, q2, actions, target)[keep_BT].mean(), expected["loss_q"])
    target_q1, target_q2 = inputs["q1_target"].requires_grad_(), inputs["q2_target"]
    loss = ilql_value_loss(values[:, :-1], target_q1, target_q2, actions, expectile=params["tau"])
    close(loss[keep_BT], expected["per_token_v_loss"])
    close(loss[keep_BT].mean(), expected["loss_v"])
    assert torch.autograd.grad(loss.sum(), (values, target_q1), allow_unused=True)[1] is None
    close(conservative_loss(q1, q2, actions)[keep_BT].mean(), expected["loss_cql"])


def test_shapes_that_would_broadcast_are_refused() -> None:
    two, column, q_BA = torch.zeros(2), torch.zeros(2, 1), torch.zeros(2, 3)
    actions = torch.zeros(2, dtype=torch.long)
    wrong = torch.zeros(3, dtype=torch.long)
    for function in (
        lambda: td_target(two, two, column, gamma=1.0),
        lambda: dqn_target(two, column, q_BA, gamma=1.0),
        lambda: double_dqn_target(two, two, q_BA, two, gamma=1.0),
        lambda: kl_soft_value(q_BA, torch.zeros(3), beta=1.0),
        lambda: guided_logprobs(torch.zeros(3), q_BA, beta=1.0),
        lambda: td_error(q_BA, actions, column),
        lambda: twin_critic_loss(q_BA, q_BA[:1], actions, two),
        lambda: sac_state_value(q_BA, q_BA, torch.zeros(3), alpha=0.1),
        lambda: sac_state_value(q_BA, q_BA, q_BA, alpha=0.1, ref_logprobs_A=torch.zeros(3)),
        lambda: ilql_value_loss(column, q_BA, q_BA, actions, expectile=0.7),
        lambda: conservative_loss(q_BA, q_BA, wrong),
    ):
        with pytest.raises(ValueError, match="the same shape"):
            function()


def test_numbers_outside_their_range_are_refused() -> None:
    q_BA = torch.zeros(2, 3)
    for function in (
        lambda: soft_value(q_BA, beta=0.0),
        lambda: kl_soft_value(q_BA, q_BA, beta=-1.0),
        lambda: guided_logprobs(q_BA, q_BA, beta=0.0),
    ):
        with pytest.raises(ValueError, match="beta must be > 0"):
            function()
    with pytest.raises(ValueError, match=r"delta must be > 0, got 0.0"):
        huber_loss(q_BA, delta=0.0)
    for expectile in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match=r"expectile must be in \(0, 1\)"):
            expectile_loss(q_BA, expectile=expectile)


def test_the_log_temperature_is_one_number() -> None:
    with pytest.raises(ValueError, match=r"log_alpha must be a scalar .* got shape \[3, 1\]"):
        sac_temperature_loss(torch.zeros(3, 1), torch.zeros(3), target_entropy=0.5)


def test_a_forbidden_action_gives_the_temperature_no_nan() -> None:
    # π = (½, ½, 0): V = ½ 1 + ½ 3 − α (−log 2), so ∂V/∂α = log 2, independent of log 0.
    alpha = torch.tensor(0.5, dtype=torch.float64).requires_grad_()
    logprobs_A = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64).log()
    q_A = torch.tensor([1.0, 3.0, 7.0], dtype=torch.float64)
    value = sac_state_value(q_A, q_A, logprobs_A, alpha=alpha)
    assert value.item() == pytest.approx(2 + 0.5 * math.log(2))
    assert torch.autograd.grad(value, alpha)[0].item() == pytest.approx(math.log(2))


def test_the_expectile_is_rounded_once() -> None:
    # The product of the exact τ (or 1 − τ) and u², rounded to bfloat16 once.
    errors = torch.tensor([16.0, -1024.0], dtype=torch.bfloat16)
    expected = torch.tensor([0.7 * 256, 0.3 * 2**20]).to(torch.bfloat16)
    assert expectile_loss(errors, expectile=0.7).tolist() == expected.tolist()
