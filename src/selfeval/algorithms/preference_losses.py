"""Preference losses for a scalar score, or for a policy directly.

Shapes: N pairs (or single replies). Scores are unbounded; only score differences between replies to the same question are
meaningful. The log-prob of a reply is either its SUM over tokens, log π(y|x), or its MEAN per token; each function states which
one it takes, and the two are not interchangeable.

| loss           | log-probs | reference | on h or on the difference d of the replies                   |
|----------------|-----------|-----------|--------------------------------------------------------------|
| `dpo_loss`     | sum       | yes       | cross-entropy of σ(βh) with the label                        |
| `robust_dpo_loss` | sum    | yes       | the same, unbiased for labels flipped at a known rate        |
| `hinge_loss`   | sum       | yes       | max(0, 1 − βh)                                               |
| `ipo_loss`     | sum, or mean | yes    | (h − 1/(2β))²                                                |
| `kto_loss`     | sum       | yes       | single replies, each good or bad                             |
| `cpo_loss`     | sum       | no        | −log σ(βd) + NLL of the chosen                               |
| `simpo_loss`   | mean      | no        | −log σ(βd − γ)                                               |
| `orpo_loss`    | mean      | no        | NLL of the chosen − β log σ(log-odds ratio)                  |

A loss is returned per pair; its mean is the usual loss.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from selfeval.algorithms.masked import check_same_shape, check_scalar, check_scalar_or_shape

__all__ = [
    "bradley_terry_loss",
    "centering_penalty",
    "cpo_loss",
    "dpo_loss",
    "dpo_margin",
    "hard_labels",
    "hinge_loss",
    "implicit_reward",
    "ipo_loss",
    "kto_baseline",
    "kto_loss",
    "orpo_loss",
    "preference_accuracy",
    "robust_dpo_loss",
    "simpo_loss",
]


def bradley_terry_loss(chosen_N: Tensor, rejected_N: Tensor, label_N: Tensor, *, margin: float | Tensor = 0.0) -> Tensor:
    """Compute the cross-entropy of the Bradley-Terry model per pair, with soft labels.

    Δ = r_chosen − r_rejected − margin,   l = −[y log σ(Δ) + (1 − y) log σ(−Δ)]

    y = 1 is the usual loss −log σ(Δ); y = 0.9 means that the judge was 90 % sure, and the optimum is Δ = log(y / (1 − y))
    instead of infinity. Bradley and Terry 1952 (https://doi.org/10.2307/2334029); as a reward model: Ouyang et al.
    2022, eq. 1 (https://arxiv.org/abs/2203.02155); margin: Touvron et al. 2023, eq. 2
    (https://arxiv.org/abs/2307.09288).

    Args:
        chosen_N: [N], score of the chosen reply.
        rejected_N: [N], score of the other reply.
        label_N: [N], probability in [0, 1] that the chosen reply is better.
        margin: target margin between chosen and rejected, in units of score; a number, a scalar tensor or [N]. Default: 0.

    Returns:
        Loss [N] in nats, >= 0; its mean is the usual loss.

    Raises:
        ValueError: the shapes differ, or a label is outside [0, 1] or NaN.

    Example:
        >>> import torch
        >>> bradley_terry_loss(torch.zeros(1), torch.zeros(1), torch.ones(1))
        tensor([0.6931])
    """
    check_same_shape(chosen=chosen_N, rejected=rejected_N, label=label_N)
    check_scalar_or_shape(chosen_N, margin=margin)
    if bool((~((label_N >= 0) & (label_N <= 1))).any()):  # a NaN is outside as well
        raise ValueError(f"labels must be probabilities in [0, 1], got {label_N.tolist()}")
    delta_N = chosen_N - rejected_N - margin
    # logsigmoid(−Δ) instead of log(1 − σ(Δ)), which is log 0 for a large Δ.
    return -label_N * functional.logsigmoid(delta_N) - (1 - label_N) * functional.logsigmoid(-delta_N)


def hard_labels(label_N: Tensor) -> Tensor:
    """Round labels to the reply that they prefer.

    y = 1 if y > 0.5, 0 if y < 0.5, and 0.5 if y = 0.5, which prefers neither

    Args:
        label_N: [N], probability in [0, 1] that the chosen reply is better.

    Returns:
        [N], each 0, 0.5 or 1.

    Example:
        >>> import torch
        >>> hard_labels(torch.tensor([0.2, 0.5, 0.9]))
        tensor([0.0000, 0.5000, 1.0000])
    """
    return ((label_N - 0.5).sign() + 1) / 2


def centering_penalty(chosen_N: Tensor, rejected_N: Tensor) -> Tensor:
    """Compute the penalty that centres the scores of a pair around zero: (r_chosen + r_rejected)².

    Preferences do not determine the level of the scores, which would drift. The penalty fixes the level without affecting the
    difference: it is 0 once both scores are shifted to a mean of 0. A sum of squares, r_chosen² + r_rejected², would also pull
    the two scores together. Eisenstein et al. 2023, section 2
    (https://arxiv.org/abs/2312.09244), with a weight of 0.01.

    Args:
        chosen_N: [N], score of the chosen reply.
        rejected_N: [N], score of the other reply.

    Returns:
        [N], in units of score², >= 0; to be weighted and added to `bradley_terry_loss`.

    Raises:
        ValueError: the shapes differ.
    """
    check_same_shape(chosen=chosen_N, rejected=rejected_N)
    return (chosen_N + rejected_N).square()


def preference_accuracy(chosen_N: Tensor, rejected_N: Tensor) -> Tensor:
    """Measure the share of pairs whose chosen reply has the strictly higher score; ties count as wrong.

    Lambert et al. 2024, section 4 (https://arxiv.org/abs/2403.13787) use this metric for reward models. An evaluator with equal
    scores for all replies has an accuracy of 0, not one half.

    Args:
        chosen_N: [N], score of the better reply.
        rejected_N: [N], score of the other reply.

    Returns:
        Scalar in [0, 1]; NaN when there is no pair.

    Raises:
        ValueError: the shapes differ.
    """
    check_same_shape(chosen=chosen_N, rejected=rejected_N)
    return (chosen_N > rejected_N).to(chosen_N.dtype).mean()


def dpo_margin(policy_chosen_N: Tensor, policy_rejected_N: Tensor, ref_chosen_N: Tensor, ref_rejected_N: Tensor) -> Tensor:
    """Compute the DPO margin: the log-ratio of chosen to rejected under the policy minus that under the reference.

    h = (log π(y_c) − log π(y_r)) − (log π_ref(y_c) − log π_ref(y_r))

    Rafailov et al. 2023, eq. 7 without β (https://arxiv.org/abs/2305.18290).

    Args:
        policy_chosen_N: [N], log π of the chosen reply, summed over its tokens; each divided by the tokens of its reply
            for the length-normalised IPO.
        policy_rejected_N: [N], the same of the rejected reply.
        ref_chosen_N: [N], log π_ref of the chosen reply, summed or divided likewise; no gradient.
        ref_rejected_N: [N], the same of the rejected reply.

    Returns:
        h [N] in nats (per token where they were divided), any sign.

    Raises:
        ValueError: the shapes differ.
    """
    check_same_shape(
        policy_chosen=policy_chosen_N, policy_rejected=policy_rejected_N, ref_chosen=ref_chosen_N, ref_rejected=ref_rejected_N
    )
    return (policy_chosen_N - policy_rejected_N) - (ref_chosen_N - ref_rejected_N)


def implicit_reward(policy_N: Tensor, ref_N: Tensor, *, beta: float) -> Tensor:
    """Compute the reward under which the policy would be optimal: r = β (log π(y) − log π_ref(y)), up to a constant.

    The constant depends on the question alone. Rafailov et al. 2023, eq. 5 (https://arxiv.org/abs/2305.18290).

    Args:
        policy_N: [N], log π of the reply, summed over its tokens.
        ref_N: [N], log π_ref of the same reply.
        beta: β in reward per nat, > 0.

    Returns:
        [N], in units of reward.

    Raises:
        ValueError: the shapes differ.
    """
    check_scalar(beta=beta)
    check_same_shape(policy=policy_N, ref=ref_N)
    return beta * (policy_N - ref_N)


def dpo_loss(margin_N: Tensor, label_N: Tensor, *, beta: float) -> Tensor:
    """Compute the loss of direct preference optimisation per pair, with soft labels.

    l = −[y log σ(βh) + (1 − y) log σ(−βh)]

    y = 1 is DPO, y = 1 − ε is cDPO (label smoothing ε). With the judge's probability as y, the optimum is
    h = log(y / (1 − y)) / β instead of infinity. Rafailov et al. 2023, eq. 7
    (https://arxiv.org/abs/2305.18290); Mitchell 2023 (https://ericmitchell.ai/cdpo.pdf).

    Args:
        margin_N: [N], h of `dpo_margin` from summed log-probs.
        label_N: [N], probability in [0, 1] that the chosen reply is better.
        beta: β in reward per nat, > 0; 0.1 is usual. Small = further from the reference.

    Returns:
        Loss [N] in nats, >= 0.

    Raises:
        ValueError: the shapes differ, a label is outside [0, 1] or NaN, or beta is not positive.

    Example:
        >>> dpo_loss(torch.zeros(1), torch.ones(1), beta=0.1)
        tensor([0.6931])
    """
    check_scalar(beta=beta)
    _check_beta(beta)
    # The Bradley-Terry loss depends only on the difference of its scores, which is βh here.
    return bradley_terry_loss(beta * margin_N, torch.zeros_like(margin_N), label_N)


def robust_dpo_loss(margin_N: Tensor, *, beta: float, flip_rate: float) -> Tensor:
    """Compute the DPO loss that is unbiased when each label was flipped with a known probability.

    l = [(1 − ε) (−log σ(βh)) − ε (−log σ(−βh))] / (1 − 2ε)

    Its mean over flips is the loss on clean labels, unlike that of cDPO. It may be negative, and decreases without bound as h
    grows. Chowdhury et al. 2024, section 3 (https://arxiv.org/abs/2403.00409).

    Args:
        margin_N: [N], h of `dpo_margin` from summed log-probs.
        beta: β in reward per nat, > 0.
        flip_rate: ε, probability that a label is wrong, in [0, 0.5).

    Returns:
        Loss [N] in nats, any sign.

    Raises:
        ValueError: beta is not positive, or flip_rate is outside [0, 0.5).
    """
    check_scalar(beta=beta, flip_rate=flip_rate)
    _check_beta(beta)
    if not 0 <= flip_rate < 0.5:
        raise ValueError(f"flip_rate must be in [0, 0.5), got {flip_rate}: at 0.5 the labels carry no information")
    right_N, wrong_N = -functional.logsigmoid(beta * margin_N), -functional.logsigmoid(-beta * margin_N)
    return ((1 - flip_rate) * right_N - flip_rate * wrong_N) / (1 - 2 * flip_rate)


def ipo_loss(margin_N: Tensor, *, beta: float) -> Tensor:
    """Compute the squared loss of identity preference optimisation: l = (h − 1 / (2β))².

    Its optimum is finite for every label, so it does not diverge on pairs that are always won. From summed
    log-probs it is the paper's; from means per token h is in nats per token, and β has another meaning. Azar et al. 2023,
    eq. 17 (https://arxiv.org/abs/2310.12036).

    Args:
        margin_N: [N], h of `dpo_margin`.
        beta: β, regularisation, > 0; the paper calls it τ.

    Returns:
        Loss [N] in nats², >= 0.

    Raises:
        ValueError: beta is not positive.
    """
    check_scalar(beta=beta)
    _check_beta(beta)
    return (margin_N - 1 / (2 * beta)).square()


def hinge_loss(margin_N: Tensor, *, beta: float) -> Tensor:
    """Compute the hinge loss of a preference: l = max(0, 1 − βh).

    Pairs with a margin of at least 1/β have no gradient. Zhao et al. 2023, section 2 (https://arxiv.org/abs/2305.10425), with
    the reference in the margin as in Liu et al. 2023 (https://arxiv.org/abs/2309.06657).

    Args:
        margin_N: [N], h of `dpo_margin` from summed log-probs.
        beta: β, > 0; 1/β is the target margin in nats.

    Returns:
        Loss [N], >= 0.

    Raises:
        ValueError: beta is not positive.
    """
    check_scalar(beta=beta)
    _check_beta(beta)
    return torch.relu(1 - beta * margin_N)


def kto_baseline(mismatched_policy_N: Tensor, mismatched_ref_N: Tensor) -> Tensor:
    """Estimate the reference point of KTO from replies paired with other questions: z0 = max(0, mean(log π − log π_ref)).

    It stands for KL(π‖π_ref), and never passes a gradient. Ethayarajh et al. 2024, section 4
    (https://arxiv.org/abs/2402.01306).

    Args:
        mismatched_policy_N: [N], log π(y_j|x_i) with j ≠ i, summed over tokens.
        mismatched_ref_N: [N], log π_ref of the same.

    Returns:
        Scalar in nats, >= 0, no gradient.

    Raises:
        ValueError: the shapes differ.
    """
    check_same_shape(mismatched_policy=mismatched_policy_N, mismatched_ref=mismatched_ref_N)
    return (mismatched_policy_N - mismatched_ref_N).detach().mean().clamp(min=0)


def kto_loss(
    policy_N: Tensor,
    ref_N: Tensor,
    desirable_N: Tensor,
    baseline: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Compute the loss of Kahneman-Tversky optimisation per reply: no pairs, each reply is good or bad.

    ρ = log π(y) − log π_ref(y);   good: l = w_d (1 − σ(β(ρ − z0)));   bad: l = w_u (1 − σ(β(z0 − ρ)))

    Ethayarajh et al. 2024, eq. 8 (https://arxiv.org/abs/2402.01306).

    Args:
        policy_N: [N], log π of the reply, summed over its tokens.
        ref_N: [N], log π_ref of the same reply; no gradient.
        desirable_N: [N], True = a good reply. Numbers 0 and 1 are read as False and True.
        baseline: z0, scalar of `kto_baseline`.
        beta: β in reward per nat, > 0; 0.1 is usual.
        desirable_weight: w_d, >= 0. The weights should balance the classes: w_d n_d / (w_u n_u) in [1, 4/3].
        undesirable_weight: w_u, >= 0.

    Returns:
        Loss [N] in [0, weight], in the order of the input.

    Raises:
        ValueError: the shapes differ, or beta is not positive.
    """
    check_scalar(beta=beta, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
    _check_beta(beta)
    check_same_shape(policy=policy_N, ref=ref_N, desirable=desirable_N)
    check_scalar(baseline=baseline)
    lead_N = beta * (policy_N - ref_N - baseline)
    # 1 − σ(x) = σ(−x), which does not lose digits if σ(x) is close to 1.
    gain_N, loss_N = desirable_weight * torch.sigmoid(-lead_N), undesirable_weight * torch.sigmoid(lead_N)
    return torch.where(desirable_N.bool(), gain_N, loss_N)


def simpo_loss(chosen_mean_N: Tensor, rejected_mean_N: Tensor, label_N: Tensor, *, beta: float, gamma: float) -> Tensor:
    """Compute the loss of simple preference optimisation per pair: no reference, mean log-probs, a target margin.

    Δ = β (c − r) − γ,   l = −[y log σ(Δ) + (1 − y) log σ(−Δ)]

    γ is a margin in units of reward, as in the paper; some public code takes γ/β. Meng et al. 2024, eq. 6
    (https://arxiv.org/abs/2405.14734) is y = 1.

    Args:
        chosen_mean_N: [N], log π of the chosen reply, mean per token, <= 0.
        rejected_mean_N: [N], the same of the rejected reply.
        label_N: [N], probability in [0, 1] that the chosen reply is better; 1 − ε for label smoothing.
        beta: β in reward per nat per token, > 0; 2 to 2.5 is usual.
        gamma: γ, target margin in units of reward, >= 0; 0.5 to 1.5 is usual.

    Returns:
        Loss [N] in nats, >= 0.

    Raises:
        ValueError: the shapes differ, a label is outside [0, 1] or NaN, or beta is not positive.
    """
    check_scalar(beta=beta)
    _check_beta(beta)
    return bradley_terry_loss(beta * chosen_mean_N, beta * rejected_mean_N, label_N, margin=gamma)


def cpo_loss(chosen_N: Tensor, rejected_N: Tensor, label_N: Tensor, nll_N: Tensor, *, beta: float) -> Tensor:
    """Compute the loss of contrastive preference optimisation per pair: DPO with a uniform reference, plus imitation.

    l = −[y log σ(βd) + (1 − y) log σ(−βd)] + NLL(chosen),   d = log π(y_c) − log π(y_r)

    Xu et al. 2024, section 3 (https://arxiv.org/abs/2401.08417) is y = 1.

    Args:
        chosen_N: [N], log π of the chosen reply, summed over its tokens.
        rejected_N: [N], the same of the rejected reply.
        label_N: [N], probability in [0, 1] that the chosen reply is better.
        nll_N: [N], imitation loss of the chosen reply, with any weight; −`chosen_N` in the paper.
        beta: β in reward per nat, > 0.

    Returns:
        Loss [N] in nats.

    Raises:
        ValueError: the shapes differ, a label is outside [0, 1] or NaN, or beta is not positive.
    """
    check_scalar(beta=beta)
    _check_beta(beta)
    check_same_shape(chosen=chosen_N, nll=nll_N)
    return bradley_terry_loss(beta * chosen_N, beta * rejected_N, label_N) + nll_N


def orpo_loss(chosen_mean_N: Tensor, rejected_mean_N: Tensor, nll_N: Tensor, *, beta: float) -> Tensor:
    """Compute the loss of odds-ratio preference optimisation per pair: imitation plus an odds-ratio term.

    l = NLL(chosen) − β log σ(log odds(c) − log odds(r)),   log odds(x) = x − log(1 − e^x)

    Hong et al. 2024, eq. 6 and 7 (https://arxiv.org/abs/2403.07691). The paper calls the weight λ.

    Args:
        chosen_mean_N: [N], log π of the chosen reply, mean per token, < 0.
        rejected_mean_N: [N], the same of the rejected reply.
        nll_N: [N], imitation loss of the chosen reply; −`chosen_mean_N` in the paper.
        beta: weight of the odds ratio, > 0; 0.1 is usual.

    Returns:
        Loss [N] in nats.

    Raises:
        ValueError: the shapes differ, beta is not positive, or a mean log-prob is not below 0, where the odds are infinite.
    """
    check_scalar(beta=beta)
    _check_beta(beta)
    check_same_shape(chosen_mean=chosen_mean_N, rejected_mean=rejected_mean_N, nll=nll_N)
    for name, mean_N in (("chosen", chosen_mean_N), ("rejected", rejected_mean_N)):
        # Negated to catch NaN as well.
        if bool((~(mean_N < 0)).any()):
            raise ValueError(f"mean log-probs must be below 0 (a probability below 1), got {mean_N.max().item()} for {name}")
    log_odds_ratio_N = _log_odds(chosen_mean_N) - _log_odds(rejected_mean_N)
    return nll_N - beta * functional.logsigmoid(log_odds_ratio_N)


def _log_odds(logprobs_N: Tensor) -> Tensor:
    # expm1 keeps the digits of 1 − e^x if x is close to 0. Above the largest denormal number the derivative, about 1/x, would
    # be infinite, and NaN once multiplied by a gradient of 0.
    below_N = logprobs_N.clamp(max=-torch.finfo(logprobs_N.dtype).tiny)
    return logprobs_N - torch.log(-torch.expm1(below_N))


def _check_beta(beta: float) -> None:
    if not beta > 0:
        raise ValueError(f"beta must be > 0, got {beta}")
