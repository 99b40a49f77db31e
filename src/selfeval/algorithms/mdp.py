"""Markov decision processes that are small enough for exact solutions, as oracles in the tests of learners.

Shapes: S states, A actions, P prefixes, V vocabulary, N sequences, B batch, T time. Rewards carry the precision: use
float64. All logarithms are natural.

There are two kinds. A `FiniteMDP` is a table of transitions with a discount below 1, solved by iteration. A `TokenMDP` is the
MDP of a language model: states are prefixes of tokens, actions are next tokens, transitions are deterministic, and all
sequences end, so a single sweep from the longest prefixes to the empty one is exact with a discount of 1.

The Bellman equations, with V the value of a state and Q that of an action in a state, and s' the next state:

    of a policy π          V(s) = Σ_a π(a|s) Q(s, a)                          Q(s, a) = R(s, a) + γ Σ_s' P(s'|s, a) V(s')
    of the best policy     V(s) = max_a Q(s, a)                               Q likewise
    KL-regularised ("soft")
      of a policy π        V(s) = Σ_a π(a|s) (Q(s, a) − β log π(a|s)/π_ref(a|s))
      of the best policy   V(s) = β log Σ_a π_ref(a|s) exp(Q(s, a) / β),      π*(a|s) = π_ref(a|s) exp((Q(s, a) − V(s)) / β)

The soft equations are those of the RLHF objective, the return minus β times KL(π‖π_ref). Bellman 1957; Geist et al. 2019,
section 3 (https://arxiv.org/abs/1901.11275) for regularised ones; Rafailov et al. 2024, section 3
(https://arxiv.org/abs/2404.12358) for the token MDP.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from selfeval.algorithms.kl import categorical_kl
from selfeval.algorithms.masked import check_same_shape, check_scalar

__all__ = [
    "FiniteMDP",
    "Solution",
    "TokenMDP",
    "TokenSolution",
    "bellman_q",
    "evaluate_policy",
    "evaluate_soft_policy",
    "evaluate_token_policy",
    "expected_return",
    "occupancy",
    "policy_gradient",
    "policy_iteration",
    "prefix_rows",
    "reach_probabilities",
    "regularised_return",
    "sequence_kl",
    "soft_policy_iteration",
    "soft_value_iteration",
    "solve_soft_token_mdp",
    "solve_token_mdp",
    "token_mdp",
    "token_rewards",
    "value_iteration",
]

_FINEST, _COARSEST = 1e-10, 1e-6
"""Default tolerance, and the relative resolution above which the precision is too low for any default."""

_MOST_ROUNDS = 10_000
"""Limit on rounds: policy iteration takes some tens of them, so reaching the limit is a bug, not a large problem."""


@dataclass(frozen=True, eq=False)
class FiniteMDP:
    """A finite MDP: its transitions, rewards, discount and initial state distribution.

    In an absorbing state all actions lead back to the state, with reward 0.

    Args:
        transitions_SAS: [S, A, S], P(s'|s, a); each row over s' sums to 1.
        rewards_SA: [S, A], expected reward of action a in state s.
        start_S: [S], probability that s is the initial state.
        gamma: discount per step, in [0, 1).

    Raises:
        ValueError: a shape does not fit, a row is not a distribution, or gamma is outside [0, 1).
    """

    transitions_SAS: Tensor
    rewards_SA: Tensor
    start_S: Tensor
    gamma: float

    def __post_init__(self) -> None:
        check_same_shape(transitions=self.transitions_SAS[..., 0], rewards=self.rewards_SA)
        check_same_shape(start=self.start_S, states=self.rewards_SA[:, 0], next_states=self.transitions_SAS[0, 0])
        _check_distributions("transitions", self.transitions_SAS)
        _check_distributions("start", self.start_S)
        if not 0 <= self.gamma < 1:
            raise ValueError(f"gamma must be in [0, 1), got {self.gamma}: without a discount the values may not be finite")


class Solution(NamedTuple):
    """State values, action values and the corresponding policy (probabilities)."""

    values_S: Tensor
    q_SA: Tensor
    policy_SA: Tensor


def bellman_q(mdp: FiniteMDP, values_S: Tensor) -> Tensor:
    """Compute a one-step lookahead: Q(s, a) = R(s, a) + γ Σ_s' P(s'|s, a) V(s').

    Sutton and Barto 2018, eq. 4.6 (http://incompleteideas.net/book/the-book-2nd.html).

    Args:
        mdp: the MDP.
        values_S: [S], value of each next state, in units of reward.

    Returns:
        [S, A], in units of reward.

    Raises:
        ValueError: the values are not one per state.
    """
    check_same_shape(values=values_S, states=mdp.rewards_SA[:, 0])
    return mdp.rewards_SA + mdp.gamma * mdp.transitions_SAS @ values_S


def evaluate_policy(mdp: FiniteMDP, policy_SA: Tensor) -> Solution:
    """Compute the values of a policy as the solution of a linear system.

    (I − γ P_π) V = R_π,   P_π(s, s') = Σ_a π(a|s) P(s'|s, a),   R_π(s) = Σ_a π(a|s) R(s, a)

    The expected return from the start is `mdp.start_S @ values_S`, the advantages are `q_SA − values_S[:, None]`.
    Puterman 1994, theorem 6.1.1 (https://doi.org/10.1002/9780470316887).

    Args:
        mdp: the MDP.
        policy_SA: [S, A], π(a|s).

    Returns:
        Values, Q, and the policy as it was given.

    Raises:
        ValueError: the shapes differ, or a row is not a distribution.
    """
    _check_policy(mdp, policy_SA)
    values_S = _solve_values(mdp, policy_SA, (policy_SA * mdp.rewards_SA).sum(-1))
    return Solution(values_S, bellman_q(mdp, values_S), policy_SA)


def evaluate_soft_policy(mdp: FiniteMDP, policy_SA: Tensor, ref_policy_SA: Tensor, *, beta: float) -> Solution:
    """Compute the KL-regularised values of a policy as the solution of a linear system.

    (I − γ P_π) V = R_π − β KL(π(·|s)‖π_ref(·|s)),   Q(s, a) = R(s, a) + γ Σ_s' P(s'|s, a) V(s')

    V(s) is E Σ_t γ^t (r_t − β log π(a_t|s_t)/π_ref(a_t|s_t)) from s on. Q does not include the penalty of its first action.
    Geist et al. 2019, section 3.1 (https://arxiv.org/abs/1901.11275).

    Args:
        mdp: the MDP.
        policy_SA: [S, A], π(a|s).
        ref_policy_SA: [S, A], π_ref(a|s); positive wherever the policy is.
        beta: β, weight of the KL in reward per nat, > 0.

    Returns:
        Regularised values, Q, and the policy as it was given.

    Raises:
        ValueError: the shapes differ, a row is not a distribution, the policy takes an action with probability 0 under the
            reference (its values are −inf), or beta is not positive.
    """
    check_scalar(beta=beta)
    _check_beta(beta)
    _check_policy(mdp, policy_SA)
    _check_policy(mdp, ref_policy_SA)
    # Log-probabilities are valid logits, and log 0 = −inf is the logit of an action that is never taken.
    kl_S = categorical_kl(policy_SA.log(), ref_policy_SA.log())
    if not bool(kl_S.isfinite().all()):
        raise ValueError(
            "the policy takes actions that have probability 0 under the reference in states "
            f"{(~kl_S.isfinite()).nonzero()[:, 0].tolist()}"
        )
    values_S = _solve_values(mdp, policy_SA, (policy_SA * mdp.rewards_SA).sum(-1) - beta * kl_S)
    return Solution(values_S, bellman_q(mdp, values_S), policy_SA)


def value_iteration(mdp: FiniteMDP, *, tolerance: float | None = None) -> Solution:
    """Compute the optimal values by value iteration.

    V ← max_a Q(s, a),   Q(s, a) = R(s, a) + γ Σ_s' P(s'|s, a) V(s')

    The update is a contraction: after a step that changes V by at most Δ in any state, V is within γ Δ / (1 − γ) of V*. It
    stops once this bound is below the tolerance. (Stopping on the *span* of the step, as in some public code, yields the right
    policy but leaves V off by a constant.) Puterman 1994, theorem 6.3.1 (https://doi.org/10.1002/9780470316887).

    Args:
        mdp: the MDP.
        tolerance: Optional. Maximum error of any value, in units of reward. Default: 1e-10, or the resolution of the precision
            if that is coarser: 7e-15 of the largest value (plus β) over 1 − γ in float64.

    Returns:
        Optimal values within the tolerance, Q, and the greedy policy (the lowest action among equals).

    Raises:
        ValueError: the precision of the rewards cannot resolve the tolerance, or, by default, 1e-6 of the values.
        ArithmeticError: the iteration does not converge.
    """
    check_scalar(tolerance=tolerance)
    values_S = _iterate(mdp, lambda q_SA: q_SA.amax(-1), tolerance)
    q_SA = bellman_q(mdp, values_S)
    return Solution(values_S, q_SA, _greedy(q_SA))


def policy_iteration(mdp: FiniteMDP, *, tolerance: float | None = None) -> Solution:
    """Compute the optimal values by policy iteration, alternating exact evaluation and greedy improvement.

    π ← argmax_a Q^π(s, a)

    An action is changed only if the gain exceeds (1 − γ) times the tolerance; otherwise ties that rounding breaks differently
    in each round would cycle. If no state gains more, V^π is within the tolerance of V*, because
    V* − V^π <= max_s (max_a Q^π − V^π) / (1 − γ). Howard 1960; Puterman 1994, section 6.4 (https://doi.org/10.1002/9780470316887).

    Args:
        mdp: the MDP.
        tolerance: Optional. Maximum error of any value, in units of reward. Default: 1e-10, or the resolution of the precision
            if that is coarser: 7e-15 of the largest value (plus β) over 1 − γ in float64.

    Returns:
        Values and Q of the policy that was found, and that policy (deterministic).

    Raises:
        ValueError: the precision of the rewards cannot resolve the tolerance, or, by default, 1e-6 of the values.
        ArithmeticError: the iteration does not converge.
    """
    check_scalar(tolerance=tolerance)
    least_gain = (1 - mdp.gamma) * _tolerance(mdp, tolerance)
    solution = evaluate_policy(mdp, _greedy(mdp.rewards_SA))
    for _ in range(_MOST_ROUNDS):
        gains_S = solution.q_SA.amax(-1) - solution.values_S
        if bool(gains_S.max() <= least_gain):
            return solution
        improved_SA = torch.where((gains_S > least_gain)[:, None], _greedy(solution.q_SA), solution.policy_SA)
        solution = evaluate_policy(mdp, improved_SA)
    raise _not_converged("policy iteration", _MOST_ROUNDS)


def soft_value_iteration(mdp: FiniteMDP, ref_policy_SA: Tensor, *, beta: float, tolerance: float | None = None) -> Solution:
    """Compute the optimum of E Σ_t γ^t (r_t − β log π/π_ref) by soft value iteration.

    V ← β log Σ_a π_ref(a|s) exp(Q(s, a) / β),   Q(s, a) = R(s, a) + γ Σ_s' P(s'|s, a) V(s')

    This is a contraction like `value_iteration`, with the same error bound. β → 0 yields the unregularised optimum, β → ∞ the
    values of the reference. Geist et al. 2019, section 3 (https://arxiv.org/abs/1901.11275); with a uniform reference, soft
    Q-iteration: Haarnoja et al. 2017, theorem 3 (https://arxiv.org/abs/1702.08165).

    Args:
        mdp: the MDP.
        ref_policy_SA: [S, A], π_ref(a|s); 0 forbids an action.
        beta: β, weight of the KL in reward per nat, > 0.
        tolerance: Optional. Maximum error of any value, in units of reward. Default: 1e-10, or the resolution of the precision
            if that is coarser: 7e-15 of the largest value (plus β) over 1 − γ in float64.

    Returns:
        Optimal regularised values within the tolerance, Q, and the policy π_ref exp((Q − V) / β).

    Raises:
        ValueError: the shapes differ, a row is not a distribution, beta is not positive, or the precision of the
            rewards cannot resolve the tolerance, or without one not 1e-6 of the values.
        ArithmeticError: the iteration does not converge.
    """
    check_scalar(beta=beta, tolerance=tolerance)
    _check_beta(beta)
    _check_policy(mdp, ref_policy_SA)
    # log 0 = −inf forbids an action; log_softmax removes the rounding error of the reference's sum.
    log_ref_SA = ref_policy_SA.log().log_softmax(-1)
    values_S = _iterate(mdp, lambda q_SA: beta * torch.logsumexp(log_ref_SA + q_SA / beta, -1), tolerance, beta)
    q_SA = bellman_q(mdp, values_S)
    return Solution(values_S, q_SA, torch.softmax(log_ref_SA + q_SA / beta, -1))


def soft_policy_iteration(mdp: FiniteMDP, ref_policy_SA: Tensor, *, beta: float, tolerance: float | None = None) -> Solution:
    """Compute the optimum of E Σ_t γ^t (r_t − β log π/π_ref) by soft policy iteration.

    π ← π_ref(a|s) exp(Q^π(s, a) / β) / Σ_b π_ref(b|s) exp(Q^π(s, b) / β)

    This is Newton's method on the soft Bellman equation, so it takes few rounds. It stops after a round whose backup gains less
    than (1 − γ) times the tolerance in all states, which bounds the error by the tolerance. Haarnoja et al. 2018, theorem 1
    (https://arxiv.org/abs/1801.01290); Geist et al. 2019, section 4 (https://arxiv.org/abs/1901.11275).

    Args:
        mdp: the MDP.
        ref_policy_SA: [S, A], π_ref(a|s); 0 forbids an action.
        beta: β, weight of the KL in reward per nat, > 0.
        tolerance: Optional. Maximum error of any value, in units of reward. Default: 1e-10, or the resolution of the precision
            if that is coarser: 7e-15 of the largest value (plus β) over 1 − γ in float64.

    Returns:
        Regularised values and Q of the policy that was found, and that policy.

    Raises:
        ValueError: the shapes differ, a row is not a distribution, beta is not positive, or the precision of the
            rewards cannot resolve the tolerance, or without one not 1e-6 of the values.
        ArithmeticError: the iteration does not converge.
    """
    check_scalar(beta=beta, tolerance=tolerance)
    _check_beta(beta)
    least_gain = (1 - mdp.gamma) * _tolerance(mdp, tolerance, beta)
    # Normalise the reference exactly: otherwise beta times the log of a sum that is not exactly 1 would be a gain in every
    # round, and the iteration would not stop.
    log_ref_SA = ref_policy_SA.log().log_softmax(-1)
    solution = evaluate_soft_policy(mdp, ref_policy_SA, ref_policy_SA, beta=beta)
    for _ in range(_MOST_ROUNDS):
        scores_SA = log_ref_SA + solution.q_SA / beta
        gain = (beta * scores_SA.logsumexp(-1) - solution.values_S).max()
        # Evaluate the improved policy in the last round too: it is at least as good as the one before.
        solution = evaluate_soft_policy(mdp, scores_SA.softmax(-1), ref_policy_SA, beta=beta)
        if bool(gain <= least_gain):
            return solution
    raise _not_converged("soft policy iteration", _MOST_ROUNDS)


def occupancy(mdp: FiniteMDP, policy_SA: Tensor) -> Tensor:
    """Compute the discounted state occupancy of a policy, not normalised.

    d(s) = Σ_t γ^t P(s_t = s),   (I − γ P_πᵀ) d = start

    Puterman 1994, section 6.9 (https://doi.org/10.1002/9780470316887).

    Args:
        mdp: the MDP.
        policy_SA: [S, A], π(a|s).

    Returns:
        [S], >= 0; sums to 1 / (1 − γ).

    Raises:
        ValueError: the shapes differ, or a row is not a distribution.
    """
    _check_policy(mdp, policy_SA)
    # Transposed: values flow backward along the transitions, visits flow forward.
    visits_S: Tensor = torch.linalg.solve(_flow(mdp, policy_SA).mT, mdp.start_S)
    return visits_S


def policy_gradient(mdp: FiniteMDP, policy_SA: Tensor) -> Tensor:
    """Compute the exact gradient of the expected return with respect to the logits of a tabular softmax policy.

    J = Σ_s start(s) V(s),   ∂J/∂z(s, a) = d(s) π(a|s) (Q(s, a) − V(s))

    Sutton et al. 2000, theorem 1 (https://papers.nips.cc/paper/1713), with the derivative of the softmax.

    Args:
        mdp: the MDP.
        policy_SA: [S, A], π(a|s) = softmax of the logits.

    Returns:
        [S, A], in units of reward; each row sums to 0.

    Raises:
        ValueError: the shapes differ, or a row is not a distribution.
    """
    values_S, q_SA, _ = evaluate_policy(mdp, policy_SA)
    return occupancy(mdp, policy_SA)[:, None] * policy_SA * (q_SA - values_S[:, None])


@dataclass(frozen=True, eq=False)
class TokenMDP:
    """A token MDP: all prefixes over a vocabulary up to a horizon, and the reward of each next token.

    A sequence ends at its `horizon`-th token, or earlier with `eos`. The rows of [P, V] tables are ordered like `prefixes`: by
    length, then lexicographically. The reward of a whole sequence is that of its last token.

    Args:
        vocabulary: V, number of tokens, >= 2 with an `eos`, >= 1 without.
        horizon: number of tokens of the longest sequences, >= 1.
        rewards_PV: [P, V], reward for drawing token v after prefix p.
        eos: the token that ends a sequence, in [0, V); None if only the horizon does.

    Raises:
        ValueError: a number is outside its range, or the rewards do not have one row per prefix and one column per token.
    """

    vocabulary: int
    horizon: int
    rewards_PV: Tensor
    eos: int | None = None

    def __post_init__(self) -> None:
        _check_token_sizes(self.vocabulary, self.horizon, self.eos)
        wanted = (_prefix_count(self.vocabulary, self.horizon, self.eos), self.vocabulary)
        if tuple(self.rewards_PV.shape) != wanted:
            raise ValueError(f"rewards must be [prefixes, vocabulary] = {list(wanted)}, got {list(self.rewards_PV.shape)}")

    @property
    def continuing(self) -> list[int]:
        """Tokens that do not end a sequence by themselves, ascending."""
        return [token for token in range(self.vocabulary) if token != self.eos]

    @property
    def prefixes(self) -> list[tuple[int, ...]]:
        """The states in which a token is sampled, starting with the empty prefix."""
        lengths = range(self.horizon)
        return [prefix for length in lengths for prefix in itertools.product(self.continuing, repeat=length)]

    @property
    def terminal_PV(self) -> Tensor:
        """[P, V], True = this token ends the sequence. The True entries, row by row, correspond to `terminal_sequences`."""
        terminal_PV = torch.zeros_like(self.rewards_PV, dtype=torch.bool)
        terminal_PV[_levels(self)[-1]] = True
        if self.eos is not None:
            terminal_PV[:, self.eos] = True
        return terminal_PV

    @property
    def terminal_sequences(self) -> list[tuple[int, ...]]:
        """All whole sequences, by length, then lexicographic."""
        prefixes = self.prefixes
        return [(*prefixes[row], token) for row, token in self.terminal_PV.nonzero().tolist()]


class TokenSolution(NamedTuple):
    """Values and policy of a token MDP. `values_P[0]` is the value of the empty prefix, the return of whole sequences."""

    values_P: Tensor
    q_PV: Tensor
    logprobs_PV: Tensor


def token_mdp(
    vocabulary: int, horizon: int, terminal_rewards_N: Tensor, *, eos: int | None = None, dense_PV: Tensor | None = None
) -> TokenMDP:
    """Build a token MDP from a reward per whole sequence, and optionally one per token.

    R(p, v) = dense(p, v) + [p v is whole] · terminal(p v)

    Args:
        vocabulary: V, number of tokens.
        horizon: number of tokens of the longest sequences, >= 1.
        terminal_rewards_N: [N], reward of each whole sequence, in the order of `TokenMDP.terminal_sequences`.
        eos: the token that ends a sequence, in [0, V); None if only the horizon does.
        dense_PV: [P, V], reward of each token, in the order of `TokenMDP.prefixes`; None = rewards only at the end.

    Returns:
        The MDP.

    Raises:
        ValueError: a number is outside its range, or a tensor has another size.

    Example:
        >>> mdp = token_mdp(2, 2, torch.tensor([1.0, 2.0, 3.0, 4.0]))
        >>> mdp.prefixes, mdp.terminal_sequences
        ([(), (0,), (1,)], [(0, 0), (0, 1), (1, 0), (1, 1)])
        >>> mdp.rewards_PV.tolist()
        [[0.0, 0.0], [1.0, 2.0], [3.0, 4.0]]
    """
    _check_token_sizes(vocabulary, horizon, eos)
    empty_PV = terminal_rewards_N.new_zeros(_prefix_count(vocabulary, horizon, eos), vocabulary)
    terminal_PV = TokenMDP(vocabulary, horizon, empty_PV, eos).terminal_PV
    if terminal_rewards_N.shape != (int(terminal_PV.sum()),):
        raise ValueError(
            f"expected one reward for each of the {int(terminal_PV.sum())} complete sequences, got shape "
            f"{list(terminal_rewards_N.shape)}"
        )
    rewards_PV = empty_PV.masked_scatter(terminal_PV, terminal_rewards_N)
    if dense_PV is not None:
        check_same_shape(dense=dense_PV, prefixes_by_vocabulary=rewards_PV)
        rewards_PV = rewards_PV + dense_PV
    return TokenMDP(vocabulary, horizon, rewards_PV, eos)


def prefix_rows(mdp: TokenMDP, tokens_BT: Tensor) -> Tensor:
    """Return the row of the prefix before each token, the state in which the token was sampled.

    Args:
        mdp: the token MDP.
        tokens_BT: [B, T] int, sampled tokens from the start of a sequence, T <= horizon; any number after the end.

    Returns:
        [B, T] int, row of tokens[:t] in `TokenMDP.prefixes`; −1 after the end of the sequence.

    Raises:
        ValueError: the tokens are not [B, T], T is above the horizon, or a token before the end is outside the vocabulary.

    Example:
        >>> prefix_rows(token_mdp(2, 2, torch.zeros(4)), torch.tensor([[0, 1], [1, 1]])).tolist()
        [[0, 1], [0, 2]]
    """
    if tokens_BT.dim() != 2:
        raise ValueError(f"tokens must be [rows, tokens], got shape {list(tokens_BT.shape)}")
    if tokens_BT.shape[-1] > mdp.horizon:
        raise ValueError(f"sequences have at most {mdp.horizon} tokens, got {tokens_BT.shape[-1]}")
    ended_BT = torch.zeros_like(tokens_BT) if mdp.eos is None else (tokens_BT == mdp.eos).cumsum(-1)
    # Shift by one token, because the end token itself still belongs to the sequence.
    alive_BT = functional.pad(ended_BT, (1, 0))[:, :-1] == 0
    if not bool(((tokens_BT >= 0) & (tokens_BT < mdp.vocabulary))[alive_BT].all()):
        raise ValueError(f"tokens must be in [0, {mdp.vocabulary}), got {tokens_BT[alive_BT].unique().tolist()}")
    # A prefix is a number whose digits are the ranks of its tokens among the continuing ones.
    ranks_BT = tokens_BT if mdp.eos is None else tokens_BT - (tokens_BT > mdp.eos).to(tokens_BT.dtype)
    levels, digits = _levels(mdp), len(mdp.continuing)
    number_B, rows = torch.zeros_like(tokens_BT[:, 0]), []
    for t in range(tokens_BT.shape[-1]):
        rows.append(levels[t].start + number_B)
        number_B = number_B * digits + ranks_BT[:, t]
    # After the end of a sequence the digits are garbage, and so are the rows computed from them.
    return torch.where(alive_BT, torch.stack(rows, -1), -1)


def token_rewards(mdp: TokenMDP, tokens_BT: Tensor) -> Tensor:
    """Return the reward of each sampled token. The sum of a row is the return of its sequence.

    Args:
        mdp: the token MDP.
        tokens_BT: [B, T] int, sampled tokens from the start of a sequence, T <= horizon; any number after the end.

    Returns:
        [B, T], reward of each token; 0 after the end of the sequence.

    Raises:
        ValueError: the tokens are not [B, T], T is above the horizon, or a token before the end is outside the vocabulary.
    """
    rows_BT = prefix_rows(mdp, tokens_BT)
    alive_BT = rows_BT >= 0
    # Positions after the end need some valid index; the reward found there is dropped in the next line.
    paid_BT = mdp.rewards_PV[rows_BT.clamp(min=0), torch.where(alive_BT, tokens_BT, 0)]
    return torch.where(alive_BT, paid_BT, torch.zeros_like(paid_BT))


def solve_token_mdp(mdp: TokenMDP) -> TokenSolution:
    """Compute the optimal return and an optimal policy by one backward sweep.

    V(p) = max_v Q(p, v),   Q(p, v) = R(p, v) + V(pv)   (V = 0 after the end)

    Bellman 1957, chapter III.

    Args:
        mdp: the token MDP.

    Returns:
        Optimal values, Q, and the deterministic policy (log-probs 0 and −inf; the lowest token among equals).
    """
    values_P, q_PV = _sweep(mdp, lambda q, _: q.amax(-1))
    best_PV = functional.one_hot(q_PV.argmax(-1), mdp.vocabulary)
    return TokenSolution(values_P, q_PV, best_PV.to(q_PV.dtype).log())


def solve_soft_token_mdp(mdp: TokenMDP, ref_logprobs_PV: Tensor, *, beta: float) -> TokenSolution:
    """Compute the optimum of E[return] − β KL(π‖π_ref) over whole sequences by one backward sweep.

    V(p) = β log Σ_v π_ref(v|p) exp(Q(p, v) / β),   Q(p, v) = R(p, v) + V(pv),   π*(v|p) = π_ref(v|p) exp((Q − V) / β)

    V of the empty prefix is the optimal regularised return, and V / β is log Z of the tilted distribution
    π*(y) = π_ref(y) exp(R(y) / β) / Z. Rafailov et al. 2023, eq. 4 and 5 (https://arxiv.org/abs/2305.18290); per token:
    Rafailov et al. 2024, section 3 (https://arxiv.org/abs/2404.12358).

    Args:
        mdp: the token MDP.
        ref_logprobs_PV: [P, V], log π_ref, normalised over tokens; −inf forbids a token.
        beta: β, weight of the KL in reward per nat, > 0.

    Returns:
        Optimal regularised values, Q, and the optimal policy.

    Raises:
        ValueError: the shapes differ, a row is not normalised, or beta is not positive.
    """
    check_scalar(beta=beta)
    _check_beta(beta)
    ref_PV = _checked_logprobs(mdp, ref_logprobs_PV)
    values_P, q_PV = _sweep(mdp, lambda q, level: beta * torch.logsumexp(ref_PV[level] + q / beta, -1))
    return TokenSolution(values_P, q_PV, ref_PV + (q_PV - values_P[:, None]) / beta)


def evaluate_token_policy(mdp: TokenMDP, logprobs_PV: Tensor) -> TokenSolution:
    """Compute the return of a policy from each prefix by one backward sweep.

    V(p) = Σ_v π(v|p) Q(p, v),   Q(p, v) = R(p, v) + V(pv)

    Differentiable: the gradient of `values_P[0]` with respect to the log-probs is the exact policy gradient (through a
    softmax: reach(p) π(v|p) (Q(p, v) − V(p)) at the logits). Sutton and Barto 2018, eq. 4.4 and 13.5
    (http://incompleteideas.net/book/the-book-2nd.html).

    Args:
        mdp: the token MDP.
        logprobs_PV: [P, V], log π, normalised over tokens; −inf for a token that is never sampled.

    Returns:
        Values, Q, and the policy as it was given.

    Raises:
        ValueError: the shapes differ, or a row is not normalised.
    """
    policy_PV = _checked_logprobs(mdp, logprobs_PV)
    probabilities_PV = policy_PV.exp()
    values_P, q_PV = _sweep(mdp, lambda q, level: (probabilities_PV[level] * q).sum(-1))
    return TokenSolution(values_P, q_PV, policy_PV)


def expected_return(mdp: TokenMDP, logprobs_PV: Tensor) -> Tensor:
    """Compute E[R], the exact mean return of whole sequences sampled from a policy.

    E[R] = Σ_y π(y) R(y) = V(empty prefix)

    Args:
        mdp: the token MDP.
        logprobs_PV: [P, V], log π, normalised over tokens.

    Returns:
        Scalar, in units of reward; differentiable.

    Raises:
        ValueError: the shapes differ, or a row is not normalised.
    """
    return evaluate_token_policy(mdp, logprobs_PV).values_P[0]


def reach_probabilities(mdp: TokenMDP, logprobs_PV: Tensor) -> Tensor:
    """Compute the probability that a sequence sampled from a policy passes through each prefix.

    reach(empty) = 1,   reach(pv) = reach(p) π(v|p)

    Args:
        mdp: the token MDP.
        logprobs_PV: [P, V], log π, normalised over tokens.

    Returns:
        [P] in [0, 1]; sums to the mean length of a sequence in tokens. Differentiable.

    Raises:
        ValueError: the shapes differ, or a row is not normalised.
    """
    probabilities_PV = _checked_logprobs(mdp, logprobs_PV).exp()[:, mdp.continuing]
    reached = [probabilities_PV.new_ones(1)]
    for level in _levels(mdp)[:-1]:
        # Parents in order, and the children of each by token: the order of the next level.
        reached.append((reached[-1][:, None] * probabilities_PV[level]).flatten())
    return torch.cat(reached)


def sequence_kl(mdp: TokenMDP, logprobs_PV: Tensor, ref_logprobs_PV: Tensor) -> Tensor:
    """Compute KL(π‖π_ref) over whole sequences exactly, by the chain rule.

    KL = Σ_y π(y) log π(y)/π_ref(y) = Σ_p reach(p) KL(π(·|p)‖π_ref(·|p))

    Cover and Thomas 2006, theorem 2.5.3 (https://doi.org/10.1002/047174882X).

    Args:
        mdp: the token MDP.
        logprobs_PV: [P, V], log π, normalised over tokens.
        ref_logprobs_PV: [P, V], log π_ref, normalised over tokens.

    Returns:
        Scalar in nats per sequence, >= 0; inf if π reaches a sequence with probability 0 under π_ref. Differentiable.

    Raises:
        ValueError: the shapes differ, or a row is not normalised.
    """
    policy_PV, ref_PV = _checked_logprobs(mdp, logprobs_PV), _checked_logprobs(mdp, ref_logprobs_PV)
    reach_P = reach_probabilities(mdp, policy_PV)
    kl_P = categorical_kl(policy_PV, ref_PV)
    # Unreachable states contribute nothing, even if their KL is infinite.
    return (reach_P * torch.where(reach_P > 0, kl_P, torch.zeros_like(kl_P))).sum()


def regularised_return(mdp: TokenMDP, logprobs_PV: Tensor, ref_logprobs_PV: Tensor, *, beta: float) -> Tensor:
    """Compute the exact RLHF objective of a policy: E[R] − β KL(π‖π_ref) over whole sequences.

    Its maximum is `solve_soft_token_mdp(...).values_P[0]`. Ziegler et al. 2019, eq. 2
    (https://arxiv.org/abs/1909.08593).

    Args:
        mdp: the token MDP.
        logprobs_PV: [P, V], log π, normalised over tokens.
        ref_logprobs_PV: [P, V], log π_ref, normalised over tokens.
        beta: β, weight of the KL in reward per nat, >= 0; 0 = the plain return, whatever the KL.

    Returns:
        Scalar, in units of reward; differentiable.

    Raises:
        ValueError: the shapes differ, a row is not normalised, or beta is negative.
    """
    check_scalar(beta=beta)
    if not beta >= 0:
        raise ValueError(f"beta must be >= 0, got {beta}")
    reward = expected_return(mdp, logprobs_PV)
    # Without a penalty the KL must not be multiplied: it may be infinite, and 0 · inf is NaN.
    return reward - beta * sequence_kl(mdp, logprobs_PV, ref_logprobs_PV) if beta else reward


def _sweep(mdp: TokenMDP, backup: Callable[[Tensor, slice], Tensor]) -> tuple[Tensor, Tensor]:
    """Compute V and Q from the longest prefixes to the empty one; `backup` maps the Q of the rows of a level to their V."""
    values: list[Tensor] = []
    qs: list[Tensor] = []
    columns = torch.tensor(mdp.continuing, device=mdp.rewards_PV.device)
    for level in reversed(_levels(mdp)):
        q = mdp.rewards_PV[level]
        if values:
            # values[0] belongs to the next level: a row of children per prefix, in order. The end token has no child, so V = 0.
            q = q.index_add(1, columns, values[0].view(len(q), -1))
        qs.insert(0, q)
        values.insert(0, backup(q, level))
    return torch.cat(values), torch.cat(qs)


def _levels(mdp: TokenMDP) -> list[slice]:
    """Return the rows of the prefixes of each length. The children of a level are the next level, in the same order."""
    counts = [len(mdp.continuing) ** length for length in range(mdp.horizon)]
    ends = list(itertools.accumulate(counts))
    return [slice(end - count, end) for count, end in zip(counts, ends, strict=True)]


def _prefix_count(vocabulary: int, horizon: int, eos: int | None) -> int:
    continuing = vocabulary if eos is None else vocabulary - 1
    return sum(continuing**length for length in range(horizon))


def _check_token_sizes(vocabulary: int, horizon: int, eos: int | None) -> None:
    if vocabulary < 1 or horizon < 1:
        raise ValueError(f"vocabulary and horizon must be at least 1, got {vocabulary} and {horizon}")
    if eos is not None and not (0 <= eos < vocabulary and vocabulary >= 2):
        raise ValueError(f"eos must be in [0, {vocabulary}) and not the only token, got {eos}")


def _checked_logprobs(mdp: TokenMDP, logprobs_PV: Tensor) -> Tensor:
    check_same_shape(logprobs=logprobs_PV, rewards=mdp.rewards_PV)
    mass_P = logprobs_PV.detach().logsumexp(-1)
    # Wide enough for log-probs in half precision, but far below the error of logits passed instead of log-probs.
    if not bool((mass_P.abs() < 1e-2).all()):
        worst = mass_P[mass_P.abs().argmax()].exp().item()
        raise ValueError(
            f"each row must be log-probs that sum to 1, got a row that sums to {worst:.6g}: take log_softmax first"
        )
    return logprobs_PV.to(mdp.rewards_PV.dtype)


def _check_beta(beta: float) -> None:
    if not beta > 0:
        raise ValueError(f"beta must be > 0, got {beta}: without a KL penalty, solve the plain MDP")


def _iterate(mdp: FiniteMDP, backup: Callable[[Tensor], Tensor], tolerance: float | None, beta: float = 0.0) -> Tensor:
    """Compute the fixed point of a γ-contraction, within the tolerance in the sup norm."""
    least_change = (1 - mdp.gamma) * _tolerance(mdp, tolerance, beta)
    values_S = torch.zeros_like(mdp.rewards_SA[:, 0])
    # Each step is at most γ times the previous one, which bounds the number of steps to the precision of any float. The
    # limit is twice that number, to allow for rounding.
    most = _MOST_ROUNDS + math.ceil(2 * 750 / -math.log(mdp.gamma)) if mdp.gamma else _MOST_ROUNDS
    for _ in range(most):
        before_S, values_S = values_S, backup(bellman_q(mdp, values_S))
        if bool(mdp.gamma * (values_S - before_S).abs().max() <= least_change):
            return values_S
    raise _not_converged("value iteration", most)


def _tolerance(mdp: FiniteMDP, tolerance: float | None, beta: float = 0.0) -> float:
    """Return the tolerance of an iteration. Below the resolution, rounding would keep the values changing for ever.

    With KL weight beta, values are beta times a sum of logarithms of about 1, which is rounded before the multiplication.
    """
    # No value exceeds max |R| / (1 − γ). 32 eps of that allow for the rounding of a backup, which 1 / (1 − γ) amplifies.
    scale = mdp.rewards_SA.abs().max().item() / (1 - mdp.gamma) + beta
    least = 32 * torch.finfo(mdp.rewards_SA.dtype).eps * scale / (1 - mdp.gamma)
    if tolerance is None and least <= _COARSEST * scale:
        return max(_FINEST, least)
    if tolerance is None or not tolerance >= least:
        given = _FINEST if tolerance is None else tolerance
        raise ValueError(
            f"the tolerance must be >= {least:.1g} for values up to {scale:.3g} in {mdp.rewards_SA.dtype} with gamma "
            f"{mdp.gamma}, got {given}: use rewards in float64, or a larger tolerance"
        )
    return tolerance


def _not_converged(method: str, rounds: int) -> ArithmeticError:
    return ArithmeticError(f"{method} did not converge after {rounds:,} iterations: look for non-finite rewards")


def _greedy(q_SA: Tensor) -> Tensor:
    return functional.one_hot(q_SA.argmax(-1), q_SA.shape[-1]).to(q_SA.dtype)


def _flow(mdp: FiniteMDP, policy_SA: Tensor) -> Tensor:
    """Return I − γ P_π."""
    moves_SS = torch.einsum("sa,san->sn", policy_SA, mdp.transitions_SAS)
    return torch.eye(len(moves_SS), dtype=moves_SS.dtype, device=moves_SS.device) - mdp.gamma * moves_SS


def _solve_values(mdp: FiniteMDP, policy_SA: Tensor, rewards_S: Tensor) -> Tensor:
    solved_S: Tensor = torch.linalg.solve(_flow(mdp, policy_SA), rewards_S)
    return solved_S


def _check_policy(mdp: FiniteMDP, policy_SA: Tensor) -> None:
    check_same_shape(policy=policy_SA, rewards=mdp.rewards_SA)
    _check_distributions("policy", policy_SA)


def _check_distributions(name: str, probabilities: Tensor) -> None:
    """Raise an error unless the last axis has distributions."""
    error = (probabilities.sum(-1) - 1).abs().max().item()
    if not (error < 1e-5 and bool((probabilities >= 0).all())):
        raise ValueError(f"{name} must be probabilities that sum to 1, got sums off by up to {error:.3g}")
