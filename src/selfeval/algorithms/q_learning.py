"""Q-learning: targets, errors and losses of the DQN family, discrete SAC and implicit Q-learning.

Shapes: ... any leading axes ([B] states, or [B, T] tokens), A actions (or the vocabulary V). Nothing here is reduced or
masked: losses are returned per state, and `masked.aggregate` reduces them. All logarithms are natural.

All targets are y = r + γ (1 − terminated) · (value of the next state), without gradient. They differ in that value:

| target                  | value of the next state                         | greedy for                         |
|-------------------------|-------------------------------------------------|------------------------------------|
| `dqn_target`            | max_a q̄                                         | the return; too high under noise   |
| `double_dqn_target`     | q̄ at the argmax of the online q                 | the return                         |
| `soft_q_target`         | β log Σ_a exp(q̄ / β)                            | return + β entropy                 |
| `kl_soft_q_target`      | β log Σ_a π_ref exp(q̄ / β)                      | return − β KL(π‖π_ref)             |
| `sac_target`            | Σ_a π (min(q̄1, q̄2) − α log π/π_ref)             | the same, for a separate policy    |

A state truncated by a limit is not terminated: the value of its next state counts.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from selfeval.algorithms.masked import check_same_shape, check_scalar

__all__ = [
    "conservative_loss",
    "double_dqn_target",
    "dqn_target",
    "expectile_loss",
    "guided_logprobs",
    "huber_loss",
    "ilql_value_loss",
    "kl_soft_q_target",
    "kl_soft_value",
    "sac_actor_loss",
    "sac_state_value",
    "sac_target",
    "sac_temperature_loss",
    "soft_q_target",
    "soft_value",
    "td_error",
    "td_target",
    "twin_critic_loss",
]


def td_target(rewards: Tensor, terminated: Tensor, next_values: Tensor, *, gamma: float) -> Tensor:
    """Compute the one-step target: y = r + γ (1 − terminated) V(s').

    Sutton and Barto 2018, eq. 6.5 (http://incompleteideas.net/book/the-book-2nd.html). With a separate network for V this is
    the target of Q in implicit Q-learning: Kostrikov et al. 2021, eq. 6 (https://arxiv.org/abs/2110.06169).

    Args:
        rewards: [...], reward of the action.
        terminated: [...], True = the action ended the episode. Numbers 0 and 1 are read as False and True.
        next_values: [...], value of the next state; any number, including NaN, if terminated.
        gamma: discount per step, in [0, 1].

    Returns:
        [...] in units of reward, no gradient.

    Raises:
        ValueError: the shapes differ.
    """
    check_scalar(gamma=gamma)
    check_same_shape(rewards=rewards, terminated=terminated, next_values=next_values)
    # Select instead of multiplying by (1 − terminated): the value of a terminal state may be NaN, and 0 · NaN is NaN.
    future = torch.where(terminated.bool(), torch.zeros_like(next_values), next_values)
    return (rewards + gamma * future).detach()


def dqn_target(rewards: Tensor, terminated: Tensor, target_q_next_A: Tensor, *, gamma: float) -> Tensor:
    """Compute the target of Q-learning with a target network: y = r + γ (1 − terminated) max_a q̄(s', a).

    Mnih et al. 2015, methods (https://doi.org/10.1038/nature14236).

    Args:
        rewards: [...], as in `td_target`.
        terminated: [...], as in `td_target`.
        target_q_next_A: [..., A], q̄ of the target network in the next state.
        gamma: discount per step, in [0, 1].

    Returns:
        [...] in units of reward, no gradient.

    Raises:
        ValueError: the shapes differ.
    """
    check_scalar(gamma=gamma)
    return td_target(rewards, terminated, target_q_next_A.amax(-1), gamma=gamma)


def double_dqn_target(
    rewards: Tensor, terminated: Tensor, online_q_next_A: Tensor, target_q_next_A: Tensor, *, gamma: float
) -> Tensor:
    """Compute the target of double Q-learning: the online network selects the action, the target network evaluates it.

    y = r + γ (1 − terminated) q̄(s', argmax_a q(s', a))

    The maximum of noisy values is biased upwards; two networks with different errors remove most of the bias. The lowest action
    wins a tie. van Hasselt et al. 2016, eq. 4 (https://arxiv.org/abs/1509.06461).

    Args:
        rewards: [...], as in `td_target`.
        terminated: [...], as in `td_target`.
        online_q_next_A: [..., A], q of the network that is being trained, in the next state.
        target_q_next_A: [..., A], q̄ of the target network in the next state.
        gamma: discount per step, in [0, 1].

    Returns:
        [...] in units of reward, no gradient.

    Raises:
        ValueError: the shapes differ.
    """
    check_scalar(gamma=gamma)
    check_same_shape(online_q_next=online_q_next_A, target_q_next=target_q_next_A)
    return td_target(rewards, terminated, _of_action(target_q_next_A, online_q_next_A.argmax(-1)), gamma=gamma)


def soft_value(q_A: Tensor, *, beta: float) -> Tensor:
    """Compute the value of a state whose policy maximises return plus β times entropy: V = β log Σ_a exp(q / β).

    It is above the maximum by at most β log A, and the maximum for β → 0. Haarnoja et al. 2017, theorem 1
    (https://arxiv.org/abs/1702.08165).

    Args:
        q_A: [..., A], value of each action.
        beta: β, weight of the entropy in reward per nat, > 0.

    Returns:
        [...] in units of reward.

    Raises:
        ValueError: beta is not positive.
    """
    check_scalar(beta=beta)
    _check_temperature("beta", beta)
    return beta * torch.logsumexp(q_A / beta, -1)


def kl_soft_value(q_A: Tensor, ref_logprobs_A: Tensor, *, beta: float) -> Tensor:
    """Compute the value of a state whose policy maximises return minus β KL(π‖π_ref): V = β log Σ_a π_ref exp(q / β).

    It is between the mean of q under π_ref (β → ∞) and the maximum of q where π_ref > 0 (β → 0). Schulman et al. 2017,
    section 2 (https://arxiv.org/abs/1704.06440).

    Args:
        q_A: [..., A], value of each action.
        ref_logprobs_A: [..., A], log π_ref, normalised; −inf forbids an action.
        beta: β, weight of the KL in reward per nat, > 0.

    Returns:
        [...] in units of reward.

    Raises:
        ValueError: the shapes differ, or beta is not positive.
    """
    check_scalar(beta=beta)
    _check_temperature("beta", beta)
    check_same_shape(q=q_A, ref_logprobs=ref_logprobs_A)
    return beta * torch.logsumexp(ref_logprobs_A + q_A / beta, -1)


def soft_q_target(rewards: Tensor, terminated: Tensor, target_q_next_A: Tensor, *, beta: float, gamma: float) -> Tensor:
    """Compute the target of soft Q-learning: y = r + γ (1 − terminated) β log Σ_a exp(q̄(s', a) / β).

    Haarnoja et al. 2017, theorem 2 (https://arxiv.org/abs/1702.08165).

    Args:
        rewards: [...], as in `td_target`.
        terminated: [...], as in `td_target`.
        target_q_next_A: [..., A], q̄ of the target network in the next state.
        beta: β, weight of the entropy in reward per nat, > 0.
        gamma: discount per step, in [0, 1].

    Returns:
        [...] in units of reward, no gradient.

    Raises:
        ValueError: the shapes differ, or beta is not positive.
    """
    check_scalar(beta=beta, gamma=gamma)
    return td_target(rewards, terminated, soft_value(target_q_next_A, beta=beta), gamma=gamma)


def kl_soft_q_target(
    rewards: Tensor, terminated: Tensor, target_q_next_A: Tensor, ref_logprobs_next_A: Tensor, *, beta: float, gamma: float
) -> Tensor:
    """Compute the target of KL-regularised Q-learning: y = r + γ (1 − terminated) β log Σ_a π_ref exp(q̄ / β).

    Its fixed point on a token MDP is the Q of `mdp.solve_soft_token_mdp`. Jaques et al. 2017, section 3
    (https://arxiv.org/abs/1611.02796); Schulman et al. 2017, section 2 (https://arxiv.org/abs/1704.06440).

    Args:
        rewards: [...], as in `td_target`, without a KL penalty.
        terminated: [...], as in `td_target`.
        target_q_next_A: [..., A], q̄ of the target network in the next state.
        ref_logprobs_next_A: [..., A], log π_ref in the next state, normalised.
        beta: β, weight of the KL in reward per nat, > 0.
        gamma: discount per step, in [0, 1].

    Returns:
        [...] in units of reward, no gradient.

    Raises:
        ValueError: the shapes differ, or beta is not positive.
    """
    check_scalar(beta=beta, gamma=gamma)
    return td_target(rewards, terminated, kl_soft_value(target_q_next_A, ref_logprobs_next_A, beta=beta), gamma=gamma)


def guided_logprobs(ref_logprobs_A: Tensor, q_A: Tensor, *, beta: float) -> Tensor:
    """Compute the value-guided policy: log π = log π_ref + (q − V) / β, normalised.

    Any number common to all actions cancels, so q may also be the advantage q − V: with strength 1/β this is the decoding of
    ILQL. Snell et al. 2022, section 4 (https://arxiv.org/abs/2206.11871).

    Args:
        ref_logprobs_A: [..., A], log π_ref.
        q_A: [..., A], value of each action, in units of reward.
        beta: β, weight of the KL in reward per nat, > 0. For small values the policy is greedy in q.

    Returns:
        [..., A], log-probs, normalised.

    Raises:
        ValueError: the shapes differ, or beta is not positive.
    """
    check_scalar(beta=beta)
    _check_temperature("beta", beta)
    check_same_shape(ref_logprobs=ref_logprobs_A, q=q_A)
    return torch.log_softmax(ref_logprobs_A + q_A / beta, -1)


def td_error(q_A: Tensor, actions: Tensor, target: Tensor) -> Tensor:
    """Compute the TD error of the action taken: δ = y − q(s, a).

    Sutton and Barto 2018, eq. 6.5 and 6.8 (http://incompleteideas.net/book/the-book-2nd.html).

    Args:
        q_A: [..., A], value of each action; the gradient goes here.
        actions: [...] int, action taken, in [0, A).
        target: [...], y, no gradient.

    Returns:
        [...] in units of reward, any sign.

    Raises:
        ValueError: the shapes differ.
    """
    check_same_shape(q_of_an_action=q_A[..., 0], actions=actions, target=target)
    return target - _of_action(q_A, actions)


def huber_loss(errors: Tensor, *, delta: float = 1.0) -> Tensor:
    """Compute the Huber loss, quadratic near 0 and linear beyond: u²/2 if |u| <= δ, else δ (|u| − δ/2).

    Its gradient is the error clipped to ±δ. Huber 1964 (https://doi.org/10.1214/aoms/1177703732); for Q-learning: Mnih et
    al. 2015, methods (https://doi.org/10.1038/nature14236).

    Args:
        errors: [...], u, any sign.
        delta: δ, start of the linear part, > 0. Default: 1.

    Returns:
        Loss [...], >= 0.

    Raises:
        ValueError: delta is not positive.
    """
    check_scalar(delta=delta)
    _check_temperature("delta", delta)
    return functional.huber_loss(errors, torch.zeros_like(errors), reduction="none", delta=delta)


def twin_critic_loss(q1_A: Tensor, q2_A: Tensor, actions: Tensor, target: Tensor) -> Tensor:
    """Compute the squared errors of two critics with a common target: l = (q1(s, a) − y)² + (q2(s, a) − y)².

    With `sac_target` it is the critic loss of SAC: Christodoulou 2019, section 3 (https://arxiv.org/abs/1910.07207), without
    the ½. With `td_target` of a value network it is the Q loss of ILQL: Snell et al. 2022, section 4
    (https://arxiv.org/abs/2206.11871).

    Args:
        q1_A: [..., A], values of the first critic.
        q2_A: [..., A], values of the second critic.
        actions: [...] int, action taken, in [0, A).
        target: [...], y, no gradient.

    Returns:
        Loss [...], >= 0.

    Raises:
        ValueError: the shapes differ.
    """
    return td_error(q1_A, actions, target).square() + td_error(q2_A, actions, target).square()


def sac_state_value(
    q1_A: Tensor, q2_A: Tensor, logprobs_A: Tensor, *, alpha: float | Tensor, ref_logprobs_A: Tensor | None = None
) -> Tensor:
    """Compute the regularised value of a state under a policy, with the minimum of two critics.

    V = Σ_a π(a) (min(q1, q2)(a) − α log π(a));   with a reference: − α log π(a)/π_ref(a)

    The sum over actions is exact; no actions are sampled. Christodoulou 2019, eq. 10 (https://arxiv.org/abs/1910.07207).

    Args:
        q1_A: [..., A], values of the first critic.
        q2_A: [..., A], values of the second critic.
        logprobs_A: [..., A], log π, normalised; −inf for an action that is never taken.
        alpha: α, weight of the entropy (or of the KL) in reward per nat, >= 0; a number or a scalar tensor.
        ref_logprobs_A: Optional. [..., A], log π_ref. Default: entropy instead of KL.

    Returns:
        [...] in units of reward.

    Raises:
        ValueError: the shapes differ, or alpha is not a scalar.
    """
    check_same_shape(q1=q1_A, q2=q2_A, logprobs=logprobs_A)
    check_scalar(alpha=alpha)
    costs_A = logprobs_A
    if ref_logprobs_A is not None:
        check_same_shape(logprobs=logprobs_A, ref_logprobs=ref_logprobs_A)
        costs_A = logprobs_A - ref_logprobs_A
    p_A = logprobs_A.exp()
    # Actions with probability 0 contribute 0: their product 0 * inf would be NaN, in the value and in the gradient of alpha.
    nothing_A = torch.zeros_like(p_A)
    gains_A = torch.where(p_A > 0, torch.minimum(q1_A, q2_A), nothing_A) - alpha * torch.where(p_A > 0, costs_A, nothing_A)
    return (p_A * gains_A).sum(-1)


def sac_target(
    rewards: Tensor,
    terminated: Tensor,
    q1_next_A: Tensor,
    q2_next_A: Tensor,
    logprobs_next_A: Tensor,
    *,
    alpha: float | Tensor,
    gamma: float,
    ref_logprobs_next_A: Tensor | None = None,
) -> Tensor:
    """Compute the target of SAC-discrete: y = r + γ (1 − terminated) V(s'), V of `sac_state_value`.

    Christodoulou 2019, eq. 10 (https://arxiv.org/abs/1910.07207).

    Args:
        rewards: [...], as in `td_target`.
        terminated: [...], as in `td_target`.
        q1_next_A: [..., A], first target critic in the next state.
        q2_next_A: [..., A], second target critic in the next state.
        logprobs_next_A: [..., A], log π of the current policy in the next state.
        alpha: α, as in `sac_state_value`.
        gamma: discount per step, in [0, 1].
        ref_logprobs_next_A: Optional. [..., A], log π_ref in the next state. Default: entropy instead of KL.

    Returns:
        [...] in units of reward, no gradient.

    Raises:
        ValueError: the shapes differ.
    """
    check_scalar(gamma=gamma)
    values = sac_state_value(q1_next_A, q2_next_A, logprobs_next_A, alpha=alpha, ref_logprobs_A=ref_logprobs_next_A)
    return td_target(rewards, terminated, values, gamma=gamma)


def sac_actor_loss(
    q1_A: Tensor, q2_A: Tensor, logprobs_A: Tensor, *, alpha: float | Tensor, ref_logprobs_A: Tensor | None = None
) -> Tensor:
    """Compute the loss of the policy in SAC-discrete per state: l = Σ_a π(a) (α log π(a) − min(q1, q2)(a)).

    This is a sum over actions, not a mean: a mean would divide the effective learning rate by the number of actions.
    Christodoulou 2019, eq. 12 (https://arxiv.org/abs/1910.07207).

    Args:
        q1_A: [..., A], values of the first critic; no gradient.
        q2_A: [..., A], values of the second; no gradient.
        logprobs_A: [..., A], log π, normalised; the gradient goes here.
        alpha: α, as in `sac_state_value`; no gradient.
        ref_logprobs_A: Optional. [..., A], log π_ref. Default: entropy instead of KL.

    Returns:
        Loss [...] in units of reward.

    Raises:
        ValueError: the shapes differ.
    """
    weight = alpha.detach() if isinstance(alpha, Tensor) else alpha
    return -sac_state_value(q1_A.detach(), q2_A.detach(), logprobs_A, alpha=weight, ref_logprobs_A=ref_logprobs_A)


def sac_temperature_loss(log_alpha: Tensor, entropies: Tensor, *, target_entropy: float) -> Tensor:
    """Compute the loss of the temperature that drives the entropy to its target: l = log α · (H − H̄).

    Its gradient with respect to log α is H − H̄, so α increases if the entropy is too low. The paper has α instead of log α,
    with steps proportional to α; both are in use. To regularise towards a reference, pass −KL as the entropy and −(target KL)
    as the target.
    Haarnoja et al. 2018, eq. 18 (https://arxiv.org/abs/1812.05905).

    Args:
        log_alpha: scalar, log α; the gradient goes here.
        entropies: [...], H of the policy in each state, in nats; no gradient.
        target_entropy: H̄ in nats, in (0, log A) for an entropy.

    Returns:
        Loss [...].

    Raises:
        ValueError: log_alpha is not a scalar.
    """
    check_scalar(target_entropy=target_entropy)
    check_scalar(log_alpha=log_alpha)
    return log_alpha * (entropies.detach() - target_entropy)


def expectile_loss(errors: Tensor, *, expectile: float) -> Tensor:
    """Compute the expectile loss, an asymmetric squared loss: l = |τ − 1(u < 0)| u², u = target − prediction.

    τ = 0.5 is half the squared error, with the mean as its optimum; for τ → 1 the optimum approaches the maximum, but only over
    values in the data. Newey and Powell 1987 (https://doi.org/10.2307/1911031); Kostrikov et al. 2021, section 4.1
    (https://arxiv.org/abs/2110.06169).

    Args:
        errors: [...], u, any sign.
        expectile: τ in (0, 1); 0.7 to 0.9 is usual.

    Returns:
        Loss [...], >= 0.

    Raises:
        ValueError: the expectile is outside (0, 1).
    """
    check_scalar(expectile=expectile)
    if not 0 < expectile < 1:
        raise ValueError(f"expectile must be in (0, 1), got {expectile}")
    # Multiply by Python numbers, so τ is not rounded to the dtype of the errors, as it would be in a tensor.
    squares = errors.square()
    return torch.where(errors < 0, (1 - expectile) * squares, expectile * squares)


def ilql_value_loss(values: Tensor, target_q1_A: Tensor, target_q2_A: Tensor, actions: Tensor, *, expectile: float) -> Tensor:
    """Compute the loss of the value network in implicit Q-learning: the expectile loss of min(q̄1, q̄2)(s, a) − V(s).

    V becomes an upper expectile over the actions in the data, so actions outside the data are never evaluated. Snell et al.
    2022, section 4 (https://arxiv.org/abs/2206.11871); Kostrikov et al. 2021, eq. 5 (https://arxiv.org/abs/2110.06169).

    Args:
        values: [...], V(s); the gradient goes here.
        target_q1_A: [..., A], first target critic; no gradient.
        target_q2_A: [..., A], second target critic; no gradient.
        actions: [...] int, action taken, in [0, A).
        expectile: τ in (0, 1); 0.7 is usual.

    Returns:
        Loss [...], >= 0.

    Raises:
        ValueError: the shapes differ, or the expectile is outside (0, 1).
    """
    check_scalar(expectile=expectile)
    check_same_shape(target_q1=target_q1_A, target_q2=target_q2_A)
    check_same_shape(values=values, actions=actions, target_q_of_an_action=target_q1_A[..., 0])
    lower = _of_action(torch.minimum(target_q1_A, target_q2_A), actions).detach()
    return expectile_loss(lower - values, expectile=expectile)


def conservative_loss(q1_A: Tensor, q2_A: Tensor, actions: Tensor) -> Tensor:
    """Compute the CQL penalty on values of actions outside the data: l = Σ_k (log Σ_b exp q_k(s, b) − q_k(s, a)).

    It is the cross-entropy of the values at the action taken, summed over both critics. Kumar et al. 2020, eq. 4
    (https://arxiv.org/abs/2006.04779); Snell et al. 2022, section 4 (https://arxiv.org/abs/2206.11871).

    Args:
        q1_A: [..., A], values of the first critic.
        q2_A: [..., A], values of the second critic.
        actions: [...] int, action taken, in [0, A).

    Returns:
        Loss [...], >= 0.

    Raises:
        ValueError: the shapes differ.
    """
    check_same_shape(q1=q1_A, q2=q2_A)
    check_same_shape(actions=actions, q_of_an_action=q1_A[..., 0])
    return sum((torch.logsumexp(q_A, -1) - _of_action(q_A, actions) for q_A in (q1_A, q2_A)), torch.zeros_like(q1_A[..., 0]))


def _of_action(q_A: Tensor, actions: Tensor) -> Tensor:
    return q_A.gather(-1, actions[..., None]).squeeze(-1)


def _check_temperature(name: str, number: float) -> None:
    if not number > 0:
        raise ValueError(f"{name} must be > 0, got {number}")
