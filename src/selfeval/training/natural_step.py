"""A natural-gradient step of the policy's adapter on one batch of replies, within a KL bound in nats per token.

The algebra is in algorithms/trust_region.py. This module computes its three inputs, each summed over micro-batches under the
backbone's memory budget: the gradient of the surrogate, Fisher-vector products, and, for the line search, the exact KL and the
surrogate of a partial step. All are means over reply tokens:

    surrogate  L(w)  = mean of A_t pi_w(a_t) / pi_old(a_t)  (+ an entropy bonus)
    KL(w)            = mean of KL(pi_old(. | s_t) || pi_w(. | s_t)), exact over the vocabulary, s_t the prefixes of the replies

Shapes: B replies, R reply tokens, N adapter weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from selfeval.algorithms.masked import aggregation_weights, masked_sum
from selfeval.algorithms.policy_losses import importance_ratio
from selfeval.algorithms.trust_region import (
    LineSearch,
    NaturalStep,
    Product,
    backtracking_line_search,
    fisher_vector_product,
    flatten,
    natural_gradient_step,
    unflatten,
)
from selfeval.backbone.budget import Phase
from selfeval.backbone.curvature import self_kl
from selfeval.backbone.logprobs import token_logprobs
from selfeval.backbone.process_group import sum_in_place
from selfeval.backbone.sequences import Sequences, reply_hidden
from selfeval.errors import ModelError, NotFiniteError
from selfeval.training.context import POLICY, LearnerContext
from selfeval.training.experience import Experience, present, rows_of
from selfeval.training.gradient_accumulation import sum_gradients
from selfeval.training.policy_updates import policy_gradients

__all__ = [
    "FISHER_REPLIES",
    "fisher_product",
    "microbatch_fisher_product",
    "microbatch_outcome",
    "natural_step",
    "step_outcome",
    "surrogate_loss",
]

_DAMPING = 1.0
"""Added to the diagonal of the Fisher matrix, relative to its curvature along the gradient, which adapts it to any scale."""
_ITERATIONS, _TOLERANCE = 5, 1e-3
"""Iterations and relative residual at which conjugate gradient stops."""
_ASYMMETRY = 0.03
"""Relative difference of two equal numbers that 16-bit rounding can explain."""
_ONCE = (
    'a layer of this base does not support second derivatives ({why}); set backbone.context.attention = "eager", '
    'backbone.precision = "bf16" or "fp32", or another policy.learner than trpo'
)
FISHER_REPLIES = 32
"""Replies used for the Fisher matrix; gradient and line search use all of them (Schulman et al. 2015, appendix C.1)."""


class Outcome(NamedTuple):
    """Outcome of a step: KL in nats per token, and gain of the surrogate."""

    kl: float
    gain: float


def natural_step(
    context: LearnerContext, batch: Experience, *, kl_bound: float, entropy_bonus: float = 0.0
) -> dict[str, float]:
    """Step the policy along its natural gradient, by at most `kl_bound` nats per token.

    Args:
        context: shared context of policy learning.
        batch: replies of the current policy, with advantages.
        kl_bound: bound on the mean exact KL per token, > 0.
        entropy_bonus: weight of the entropy in the surrogate. Default: 0.

    Returns:
        Metrics of the step, and of the policy before it.

    Raises:
        NotFiniteError: the gradient or a Fisher-vector product is NaN or infinite; the policy is unchanged.
        ModelError: a layer of the base cannot be differentiated twice.
    """
    parameters = list(context.backbone.roles.parameters(POLICY).values())
    weights_BR = aggregation_weights(batch.mask, "token_mean")
    values = policy_gradients(context, batch, weights_BR, surrogate_loss, entropy_bonus=entropy_bonus)
    sum_gradients(parameters, context.backbone.budget.processes)
    gradient_N = _taken(parameters)
    if not bool(gradient_N.isfinite().all()):
        raise NotFiniteError("the surrogate's gradient")
    # The Fisher matrix only shapes the direction; gradient and line search, which bound the step, use all replies.
    few = batch.rows(torch.arange(min(FISHER_REPLIES, len(batch.scores_B)), device=batch.mask.device)).policy_batch
    # Solve (F + damping) x = g, then scale x to the KL bound (Schulman et al. 2015, appendix C).
    step = _solved(lambda v_N: fisher_product(context, few, v_N), gradient_N, kl_bound)
    start_N = flatten([p.detach() for p in parameters])
    search = _search(context, batch, start_N, step.step_N, kl_bound, entropy_bonus)
    taken = search.trials[-1] if search.fraction else None
    return {
        "entropy": values["entropy"],
        "first_ratio": values["ratio_gap"],
        "grad_norm": float(gradient_N.norm()),
        "step_kl": taken.kl if taken else 0.0,
        "step_kl_bound": kl_bound,
        "step_fraction": search.fraction,
        "surrogate_gain": taken.gain if taken else 0.0,
        "cg_residual": step.relative_residual,
    }


def surrogate_loss(logprobs_BR: Tensor, rows: Experience) -> Tensor:
    """Compute the loss of each token, -A pi / pi_old."""
    return -importance_ratio(logprobs_BR, rows.logprobs) * present(rows.advantages)


def _taken(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Return the accumulated gradients as the ascent direction of the surrogate, and clear them."""
    found_N = flatten([torch.zeros_like(p) if p.grad is None else -p.grad for p in parameters])
    for parameter in parameters:
        parameter.grad = None
    return found_N


def _solved(product: Product, gradient_N: Tensor, kl_bound: float) -> NaturalStep:
    """Solve for the natural step. Damping, relative to the curvature along the gradient, affects its direction only.

    Damping regularises directions about which a few replies carry no information. The length is computed with the undamped
    curvature: the damping term is not part of the KL, and including it would leave the step far below the bound.
    """
    damping = torch.ones(()) if not bool(gradient_N.any()) else _DAMPING * _curvature(product, gradient_N)

    def damped(v_N: Tensor) -> Tensor:
        return product(v_N) + damping * v_N

    try:
        step = natural_gradient_step(damped, gradient_N, kl_bound=kl_bound, iterations=_ITERATIONS, tolerance=_TOLERANCE)
    except ValueError as error:
        raise NotFiniteError(f"the natural gradient: {error}") from error
    undamped = step.curvature - float(damping * (step.direction_N @ step.direction_N))
    return step._replace(step_N=step.step_N * (step.curvature / undamped) ** 0.5) if undamped > 0 else step


def _curvature(product: Product, gradient_N: Tensor) -> float:
    """Return g^T F g / g^T g, after checking that the base returns correct Fisher-vector products.

    Autograd raises no error for a layer whose backward is not differentiable: it silently drops the second derivative of the
    layers below, on one side only. Then (F g)^T (F g) and g^T F (F g), equal for a symmetric F, differ or vanish.

    Raises:
        ModelError: the two numbers differ, or one of them is not positive.
        NotFiniteError: a product is NaN or infinite.
    """
    along_N = product(gradient_N)
    one, other = float(along_N @ along_N), float(gradient_N @ product(along_N))
    if not math.isfinite(one + other):
        raise NotFiniteError("a product with the Fisher matrix")
    if not min(one, other) > 0 or abs(one - other) > _ASYMMETRY * max(one, other):
        why = f"products with its Fisher matrix are not symmetric: {one:.4g} and {other:.4g}"
        raise ModelError(_ONCE.format(why=why))
    return float(gradient_N @ along_N) / float(gradient_N @ gradient_N)


def microbatch_fisher_product(context: LearnerContext, rows: Sequences, direction_N: Tensor) -> Tensor:
    """Multiply the Fisher matrix, summed over the reply tokens of a micro-batch, by a vector of adapter weights.

    The policy must be acting.

    Raises:
        ModelError: a layer of the base cannot be differentiated twice.
    """
    backbone, parameters = context.backbone, list(context.backbone.roles.parameters(POLICY).values())

    def kl() -> Tensor:
        hidden_BRD = reply_hidden(backbone, rows)
        kl_N = self_kl(backbone, hidden_BRD, rows.mask_BR, temperature=context.config.temperature)
        # The empty sums connect every parameter to the graph: an expert that received no token would be missing from it.
        return kl_N.sum() + sum(p.view(-1)[:0].sum() for p in parameters)

    with _twice_differentiable():
        return fisher_vector_product(kl, parameters, direction_N)


def fisher_product(context: LearnerContext, batch: Sequences, vector_N: Tensor) -> Tensor:
    """Multiply the policy's Fisher matrix (mean over the reply tokens of a batch) by a vector of adapter weights.

    The vector is normalised to length 1 and the products are summed before the division by the number of tokens, because a
    base in 16 bits would round tiny products to 0.

    Args:
        context: shared context of policy learning.
        batch: replies.
        vector_N: the vector.

    Raises:
        ModelError: a layer of the base cannot be differentiated twice.
    """
    backbone, length = context.backbone, float(vector_N.norm())
    if length == 0.0:
        return torch.zeros_like(vector_N)

    total_N, grouped = torch.zeros_like(vector_N), batch.prompt_numbers(backbone)

    def of_group(group: list[int]) -> None:
        rows = rows_of(batch, torch.tensor(group, device=batch.mask_BR.device))
        # A product is a sum over tokens, so those of the micro-batches add up; the mean is taken at the end.
        total_N.add_(microbatch_fisher_product(context, rows, vector_N / length))

    with backbone.acting_as(POLICY):
        groups = backbone.budget.in_groups(Phase.CURVATURE, batch.sizes, context.batch_tokens, of_group, grouped)
        for _ in groups:
            pass
    sum_in_place(backbone.budget.processes, [total_N])
    return total_N * (length / int(batch.mask_BR.sum()))


@contextmanager
def _twice_differentiable() -> Iterator[None]:
    """Use the math backend of attention, because fused kernels have no second derivative."""
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    except RuntimeError as error:
        if "derivative" not in str(error) and "twice" not in str(error):
            raise
        raise ModelError(_ONCE.format(why=error)) from error


def _search(
    context: LearnerContext, batch: Experience, start_N: Tensor, step_N: Tensor, kl_bound: float, entropy_bonus: float
) -> LineSearch:
    """Backtrack along the step until the KL bound holds and the surrogate improves.

    The policy is left at the accepted fraction of the step, or at its start if no fraction is accepted.
    """
    parameters, fraction = list(context.backbone.roles.parameters(POLICY).values()), 0.0
    if not bool(step_N.any()):
        return LineSearch(0.0, [])
    try:
        search = backtracking_line_search(
            lambda share: step_outcome(context, batch, start_N, start_N + share * step_N, entropy_bonus=entropy_bonus),
            kl_bound=kl_bound,
        )
        fraction = search.fraction
    finally:
        # Also after an error, because each trial leaves its weights in the policy.
        _put(parameters, start_N + fraction * step_N if fraction else start_N)
    return search


def microbatch_outcome(
    context: LearnerContext,
    rows: Experience,
    weights_BR: Tensor,
    start_N: Tensor,
    end_N: Tensor,
    *,
    entropy_bonus: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Compute a micro-batch's weighted sums of the exact KL and of the surrogate's gain, scalars, as in `step_outcome`.

    The policy must be acting, without gradient.
    """
    backbone, temperature = context.backbone, context.config.temperature
    parameters = list(backbone.roles.parameters(POLICY).values())
    # Hidden states of both policies, because the exact KL is a sum over the vocabulary.
    _put(parameters, start_N)
    old_BRD = reply_hidden(backbone, rows.policy_batch)
    _put(parameters, end_N)
    new_BRD = reply_hidden(backbone, rows.policy_batch)
    asked = {"temperature": temperature, "entropy": bool(entropy_bonus)}
    targets = rows.policy_batch.reply_BR, rows.mask
    old = token_logprobs(backbone, old_BRD, *targets, other_BRD=new_BRD, **asked)  # type: ignore[arg-type]
    new = token_logprobs(backbone, new_BRD, *targets, **asked)  # type: ignore[arg-type]
    # expm1: the ratio of a small step is so close to 1 that subtracting 1 afterwards would cancel its digits.
    gain_BR = rows.weighted(torch.expm1(new.logprobs - old.logprobs) * present(rows.advantages))
    if old.entropy is not None and new.entropy is not None:
        gain_BR = gain_BR + entropy_bonus * (new.entropy - old.entropy)
    return masked_sum(present(old.kl) * weights_BR, rows.mask), masked_sum(gain_BR * weights_BR, rows.mask)


@torch.no_grad()
def step_outcome(
    context: LearnerContext, batch: Experience, start_N: Tensor, end_N: Tensor, *, entropy_bonus: float = 0.0
) -> Outcome:
    """Compute the exact KL per token between the policies with weights `start_N` and `end_N`, and the gain of the surrogate.

    The policy's weights are overwritten; the caller must restore them.
    """
    backbone, weights_BR = context.backbone, aggregation_weights(batch.mask, "token_mean")

    def of_group(group: list[int]) -> tuple[float, float]:
        index = torch.tensor(group, device=batch.mask.device)
        found = microbatch_outcome(context, batch.rows(index), weights_BR[index], start_N, end_N, entropy_bonus=entropy_bonus)
        return float(found[0]), float(found[1])

    kl = gain = 0.0
    with backbone.acting_as(POLICY):
        rows = batch.policy_batch
        groups = backbone.budget.in_groups(
            Phase.SCORE, rows.sizes, context.batch_tokens, of_group, rows.prompt_numbers(backbone)
        )
        for _, found in groups:
            kl, gain = kl + found[0], gain + found[1]
    return Outcome(kl, gain)


@torch.no_grad()
def _put(parameters: Sequence[nn.Parameter], weights_N: Tensor) -> None:
    for parameter, part in zip(parameters, unflatten(weights_N, parameters), strict=True):
        parameter.copy_(part)
