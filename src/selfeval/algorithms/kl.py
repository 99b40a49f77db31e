"""Divergence of the policy from its reference: sampled estimators, exact divergences, and the penalty as a reward.

Shapes: B batch, T time, V vocabulary, ... any leading axes. All logarithms are natural, so a KL is in nats.
A mask marks the tokens to KEEP: True = this token counts.

For a token sampled from the policy let d = log π(a) − log π_ref(a). The right estimator depends on its use:

| estimator | its mean                | as a reward (no gradient through it) | as a loss (gradient through log π)  |
|-----------|-------------------------|--------------------------------------|-------------------------------------|
| k1 = d    | KL(π‖π_ref)             | descends KL(π‖π_ref): right          | mean gradient 0: nothing but noise  |
| k2 = d²/2 | only close to it        | another objective                    | descends KL(π‖π_ref): right         |
| k3        | KL(π‖π_ref), each >= 0  | another objective                    | descends KL(π_ref‖π): the other KL  |
| exact     | KL(π‖π_ref)             | (needs no sampling)                  | descends KL(π‖π_ref): right         |

"Exact" is `categorical_kl` over the whole vocabulary at every token.

So: log k3 (or k1), shape rewards with k1, and put k2 into a loss. Schulman 2020 (http://joschu.net/blog/kl-approx.html)
for the values, Tang and Munos 2025 (https://arxiv.org/abs/2506.09477) for the gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from selfeval.algorithms.masked import check_same_shape, check_scalar, limit_exponent, zero_padding

__all__ = [
    "categorical_cross_entropy",
    "categorical_entropy",
    "categorical_kl",
    "jensen_shannon",
    "k1",
    "k2",
    "k3",
    "kl_shaped_rewards",
    "total_variation",
]


def k1(logprobs_BT: Tensor, ref_logprobs_BT: Tensor) -> Tensor:
    """Estimate KL(π‖π_ref) per token by the log-ratio: k1 = log π(a) − log π_ref(a).

    As a value it is unbiased, noisy and of either sign; its sum over a row estimates the KL of whole replies. It is correct as
    part of the reward, but not as a loss, because its expected gradient is 0. Schulman 2020 (http://joschu.net/blog/kl-approx.html).

    Args:
        logprobs_BT: [B, T], log π of the token sampled from π, <= 0.
        ref_logprobs_BT: [B, T], log π_ref of the same token, <= 0.

    Returns:
        [B, T] in nats, not masked.

    Raises:
        ValueError: the shapes differ.
    """
    check_same_shape(logprobs=logprobs_BT, ref_logprobs=ref_logprobs_BT)
    return logprobs_BT - ref_logprobs_BT


def k2(logprobs_BT: Tensor, ref_logprobs_BT: Tensor) -> Tensor:
    """Estimate KL(π‖π_ref) per token by half the squared log-ratio: k2 = (log π(a) − log π_ref(a))² / 2.

    As a value it is biased, with low variance, and accurate only if the two are close. As a loss it is correct: its expected
    gradient is that of KL(π‖π_ref). Tang and Munos 2025 (https://arxiv.org/abs/2506.09477).

    Args:
        logprobs_BT: [B, T], log π of the token sampled from π, <= 0. Zero non-finite padding first (`zero_padding`).
        ref_logprobs_BT: [B, T], log π_ref of the same token, <= 0.

    Returns:
        [B, T] in nats, >= 0, not masked.

    Raises:
        ValueError: the shapes differ.
    """
    return k1(logprobs_BT, ref_logprobs_BT).square() / 2


def k3(logprobs_BT: Tensor, ref_logprobs_BT: Tensor) -> Tensor:
    """Estimate KL(π‖π_ref) per token by k3 = exp(−d) − 1 + d, d = log π(a) − log π_ref(a).

    As a value it is unbiased and never negative, but its variance, about Σ π_ref² / π, explodes if π is tiny at tokens that are
    likely under π_ref. As a loss its expected gradient is π − π_ref, that of the *other* KL(π_ref‖π); GRPO
    (https://arxiv.org/abs/2402.03300, eq. 4) uses it in this way. Schulman 2020 (http://joschu.net/blog/kl-approx.html).

    Args:
        logprobs_BT: [B, T], log π of the token sampled from π, <= 0. Zero non-finite padding first (`zero_padding`).
        ref_logprobs_BT: [B, T], log π_ref of the same token, <= 0.

    Returns:
        [B, T] in nats, >= 0, not masked. Finite: −d is held below the limit of `limit_exponent` (85.7 in float32), without
        gradient beyond.

    Raises:
        ValueError: the shapes differ.
    """
    # Value and gradient stay finite beyond the limit of exp, because a loss with beta = 0 must not become 0 * inf = NaN.
    minus_d_BT = limit_exponent(-k1(logprobs_BT, ref_logprobs_BT))
    # expm1 keeps the digits close to the reference: at d = 1e-4, exp(−d) − 1 + d is negative in float32.
    return torch.expm1(minus_d_BT) - minus_d_BT


def categorical_kl(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """Compute KL(p‖q) of two categorical distributions exactly: Σ_v p_v (log p_v − log q_v), p = softmax(logits_p).

    It is correct as a value and as a loss. Outcomes with probability 0 under p (logit −inf) add 0. Cover and Thomas 2006, eq.
    2.26 (https://doi.org/10.1002/047174882X).

    Args:
        logits_p: [..., V], unnormalised log-probabilities of p.
        logits_q: [..., V], unnormalised log-probabilities of q.

    Returns:
        [...] in nats, >= 0 up to rounding; inf where p allows what q forbids.

    Raises:
        ValueError: the shapes differ.
    """
    check_same_shape(logits_p=logits_p, logits_q=logits_q)
    return _kl_to(logits_p.log_softmax(-1), logits_q.log_softmax(-1))


def categorical_entropy(logits: Tensor) -> Tensor:
    """Compute the entropy of a categorical distribution: −Σ_v p_v log p_v, p = softmax(logits).

    Outcomes with probability 0 (logit −inf) add 0. Shannon 1948, section 6
    (https://doi.org/10.1002/j.1538-7305.1948.tb01338.x).

    Args:
        logits: [..., V], unnormalised log-probabilities.

    Returns:
        [...] in nats, in [0, log V].
    """
    logp = logits.log_softmax(-1)
    p = logp.exp()
    # Select before multiplying: 0 · log 0 = 0 · −inf would be NaN.
    return -(p * torch.where(p > 0, logp, torch.zeros_like(p))).sum(-1)


def categorical_cross_entropy(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """Compute the cross-entropy of q under p: −Σ_v p_v log q_v = entropy of p + KL(p‖q), p = softmax(logits_p).

    Outcomes with probability 0 under p (logit −inf) add 0. Cover and Thomas 2006, theorem 5.4.3
    (https://doi.org/10.1002/047174882X).

    Args:
        logits_p: [..., V], unnormalised log-probabilities of p.
        logits_q: [..., V], unnormalised log-probabilities of q.

    Returns:
        [...] in nats, >= the entropy of p; inf where p allows what q forbids.

    Raises:
        ValueError: the shapes differ.
    """
    check_same_shape(logits_p=logits_p, logits_q=logits_q)
    p = logits_p.softmax(-1)
    return -(p * torch.where(p > 0, logits_q.log_softmax(-1), torch.zeros_like(p))).sum(-1)


def jensen_shannon(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """Compute the Jensen-Shannon divergence: ½ KL(p‖m) + ½ KL(q‖m), m = (p + q) / 2, p = softmax(logits_p).

    A symmetric, bounded divergence that stays finite if the KL is infinite. Lin 1991, section IV
    (https://doi.org/10.1109/18.61115).

    Args:
        logits_p: [..., V], unnormalised log-probabilities of p.
        logits_q: [..., V], unnormalised log-probabilities of q.

    Returns:
        [...] in nats, in [0, log 2] up to rounding.

    Raises:
        ValueError: the shapes differ.
    """
    check_same_shape(logits_p=logits_p, logits_q=logits_q)
    p, q = logits_p.softmax(-1), logits_q.softmax(-1)
    m = (p + q) / 2
    # For outcomes with probability 0 under both, use log 1 instead of log 0, whose gradient is not finite.
    logm = torch.where(m > 0, m, torch.ones_like(m)).log()
    return (_kl_to(logits_p.log_softmax(-1), logm) + _kl_to(logits_q.log_softmax(-1), logm)) / 2


def total_variation(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """Compute the total variation distance: ½ Σ_v |p_v − q_v|, p = softmax(logits_p).

    It is the largest difference in the probability of any event, and at most √(KL / 2) (Pinsker). Levin and Peres
    2017, proposition 4.2 (https://doi.org/10.1090/mbk/107).

    Args:
        logits_p: [..., V], unnormalised log-probabilities of p.
        logits_q: [..., V], unnormalised log-probabilities of q.

    Returns:
        [...] in [0, 1].

    Raises:
        ValueError: the shapes differ.
    """
    check_same_shape(logits_p=logits_p, logits_q=logits_q)
    return (logits_p.softmax(-1) - logits_q.softmax(-1)).abs().sum(-1) / 2


def kl_shaped_rewards(
    scores_B: Tensor, logprobs_BT: Tensor, ref_logprobs_BT: Tensor, mask_BT: Tensor, *, beta: float
) -> Tensor:
    """Distribute the objective E[score] − β KL(π‖π_ref) over tokens as rewards.

    r_t = −β (log π_t − log π_ref,t) + score · [t is the last token of its row]

    The penalty is k1, the correct estimator in a reward. A row without tokens has rewards of 0, and its score is dropped.
    Ziegler et al. 2019, eq. 2 (https://arxiv.org/abs/1909.08593); Ouyang et al. 2022, eq. 2
    (https://arxiv.org/abs/2203.02155).

    Args:
        scores_B: [B], evaluator score of the whole reply, in any range.
        logprobs_BT: [B, T], log π of the sampled token, at the temperature it was drawn at; garbage where the mask is
            False.
        ref_logprobs_BT: [B, T], log π_ref of the same token, at the same temperature.
        mask_BT: [B, T], True = token of the reply, EOS included.
        beta: weight of the penalty in reward per nat, >= 0.

    Returns:
        Rewards [B, T], 0 where the mask is False.

    Raises:
        ValueError: the shapes of the three [B, T] tensors differ, or scores are not one per row.
    """
    check_scalar(beta=beta)
    check_same_shape(logprobs=logprobs_BT, ref_logprobs=ref_logprobs_BT, mask=mask_BT)
    check_same_shape(scores=scores_B, rows=mask_BT.any(-1))
    keep_BT = mask_BT.bool()
    # Kept tokens from t to the end of the row: 1 at the last kept token, and in a gap just before it.
    tokens_left_BT = keep_BT.flip(-1).cumsum(-1).flip(-1)
    last_BT = keep_BT & (tokens_left_BT == 1)
    penalty_BT = -beta * zero_padding(k1(logprobs_BT, ref_logprobs_BT), keep_BT)
    return penalty_BT + zero_padding(scores_B[:, None].expand_as(penalty_BT), last_BT)


def _kl_to(logp: Tensor, logq: Tensor) -> Tensor:
    p = logp.exp()
    # Where p is 0 the term is 0, even if q is 0 as well and the difference −inf − (−inf) is NaN.
    return (p * torch.where(p > 0, logp - logq, torch.zeros_like(p))).sum(-1)
