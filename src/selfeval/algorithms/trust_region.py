"""Trust-region step: scale the natural gradient so the policy changes by at most a chosen KL.

Shapes: N all parameters in one flat vector, K iterations.

    maximise gᵀs  subject to  ½ sᵀF s <= δ        has the solution        s = √(2δ / gᵀF⁻¹g) F⁻¹g

with g the gradient of the surrogate (ascent direction) and F the Fisher matrix, the second derivative of KL(π_old‖π) at π_old.
F is never materialised: `conjugate_gradient` needs only products F v, which `fisher_vector_product` computes by differentiating
twice. The quadratic is only an approximation of the KL, so `backtracking_line_search` checks the actual KL. Schulman et al.
2015 (https://arxiv.org/abs/1502.05477), appendix C.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "CgStep",
    "LineSearch",
    "NaturalStep",
    "Product",
    "Trial",
    "backtracking_line_search",
    "conjugate_gradient",
    "conjugate_gradient_steps",
    "fisher_vector_product",
    "flatten",
    "natural_gradient_step",
    "unflatten",
]

Product = Callable[[Tensor], Tensor]
"""v [N] -> F v [N]."""


class CgStep(NamedTuple):
    """State of conjugate gradient after a step: x, and |b − F x| / |b|."""

    solution_N: Tensor
    relative_residual: float


class NaturalStep(NamedTuple):
    """A step to add to the parameters, with diagnostics.

    step_N: [N]. direction_N: [N], the approximate solution x of F x = g. curvature: xᵀF x of that direction. relative_residual:
    residual of the linear system; 0 is an exact solution.
    """

    step_N: Tensor
    direction_N: Tensor
    curvature: float
    relative_residual: float


class Trial(NamedTuple):
    """A trial of a line search: the fraction of the full step, its KL in nats, its gain in units of the surrogate."""

    fraction: float
    kl: float
    gain: float


class LineSearch(NamedTuple):
    """All trials in order, and the fraction of the step to take: that of the last trial, or 0 if none was accepted."""

    fraction: float
    trials: list[Trial]


def conjugate_gradient_steps(product: Product, b_N: Tensor) -> Iterator[CgStep]:
    """Solve F x = b for a symmetric positive definite F by conjugate gradient from x = 0, step by step.

    α = rᵀr / pᵀF p,   x ← x + α p,   r ← r − α F p,   p ← r + (rᵀr / r_oldᵀr_old) p

    In exact arithmetic it converges in at most N steps, and earlier if F has few distinct eigenvalues. Nothing is added to the
    denominator pᵀF p: a constant 1e-8, as in some public code, ruins the solution of ill-conditioned systems. Hestenes and
    Stiefel 1952, section 3 (https://doi.org/10.6028/jres.049.044).

    Args:
        product: v [N] -> F v [N].
        b_N: [N], right-hand side.

    Yields:
        x and its relative residual after each step. Stops if the residual is exactly 0 (immediately for b = 0).

    Raises:
        ValueError: pᵀF p is not positive: F is not positive definite (raise the damping), or a product is not finite.
    """
    solution_N, residual_N, search_N = torch.zeros_like(b_N), b_N, b_N
    first = square = residual_N @ residual_N
    while square > 0:
        product_N = product(search_N)
        curvature = search_N @ product_N
        if not (curvature > 0 and curvature.isfinite()):
            raise ValueError(
                f"pᵀF p must be positive and finite, got {curvature.item():.3g}: raise the damping, or look for NaN"
            )
        rate = square / curvature
        solution_N, residual_N = solution_N + rate * search_N, residual_N - rate * product_N
        before, square = square, residual_N @ residual_N
        search_N = residual_N + square / before * search_N
        # The residual of the recursion; b − F x would take another product and differs only by rounding.
        yield CgStep(solution_N, math.sqrt((square / first).item()))


def conjugate_gradient(product: Product, b_N: Tensor, *, iterations: int, tolerance: float = 1e-10) -> CgStep:
    """Solve F x = b by `conjugate_gradient_steps`, with a limit on iterations and a tolerance.

    Args:
        product: v [N] -> F v [N], symmetric positive definite.
        b_N: [N], right-hand side.
        iterations: maximum number of products, >= 1; 10 is usual in TRPO.
        tolerance: stop as soon as |b − F x| / |b| is at most this, >= 0. Default: 1e-10.

    Returns:
        x [N] and its relative residual.

    Raises:
        ValueError: iterations < 1, or F is not positive definite, or not finite.

    Example:
        >>> conjugate_gradient(lambda v: 4 * v, torch.tensor([2.0, 8.0]), iterations=10)
        CgStep(solution_N=tensor([0.5000, 2.0000]), relative_residual=0.0)
    """
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    step = CgStep(torch.zeros_like(b_N), 0.0)
    # The range comes first: zip then stops before it asks the generator for one more product.
    for _, step in zip(range(iterations), conjugate_gradient_steps(product, b_N), strict=False):
        if step.relative_residual <= tolerance:
            break
    return step


def natural_gradient_step(
    product: Product, gradient_N: Tensor, *, kl_bound: float, iterations: int = 10, tolerance: float = 1e-10
) -> NaturalStep:
    """Compute the step along the natural gradient whose quadratic KL is exactly the bound.

    s = √(2δ / xᵀF x) x,   F x = g;   for an exact x this is √(2δ / gᵀF⁻¹g) F⁻¹g

    ½ sᵀF s = δ even if the system is not solved to convergence: the residual of conjugate gradient is orthogonal to x, so
    xᵀF x = xᵀg after any number of steps, without another product. Schulman et al. 2015, appendix C
    (https://arxiv.org/abs/1502.05477); the direction: Kakade 2001 (https://papers.nips.cc/paper/2073).

    Args:
        product: v [N] -> F v [N], damping included.
        gradient_N: [N], gradient of the objective to maximise.
        kl_bound: δ in nats, > 0; 0.01 is usual in control, in the unit (token, sequence) of the KL behind F.
        iterations: maximum number of products, >= 1.
        tolerance: relative residual at which the solver stops, >= 0.

    Returns:
        The step to *add* to the parameters, with diagnostics. For a gradient of 0 the step is 0.

    Raises:
        ValueError: kl_bound is not positive, the gradient is not finite, or F is not positive definite.
    """
    if not kl_bound > 0:
        raise ValueError(f"kl_bound must be > 0, got {kl_bound}")
    if not bool(gradient_N.isfinite().all()):
        raise ValueError(f"the gradient must be finite, got {int((~gradient_N.isfinite()).sum())} non-finite entries")
    direction_N, residual = conjugate_gradient(product, gradient_N, iterations=iterations, tolerance=tolerance)
    if not bool(direction_N.any()):
        return NaturalStep(direction_N, direction_N, 0.0, residual)
    curvature = (direction_N @ gradient_N).item()
    if not curvature > 0:
        raise ValueError(f"xᵀF x must be positive, got {curvature:.3g}: lost to rounding error; raise the damping")
    return NaturalStep(math.sqrt(2 * kl_bound / curvature) * direction_N, direction_N, curvature, residual)


def backtracking_line_search(
    evaluate: Callable[[float], tuple[float, float]], *, kl_bound: float, shrink: float = 0.8, max_trials: int = 10
) -> LineSearch:
    """Shorten a step until its actual KL is within the bound and the surrogate does not decrease.

    the first fraction in 1, shrink, shrink², ... with KL <= δ and gain >= 0

    A trial with a NaN as KL or gain is rejected. Schulman et al. 2015, appendix C (https://arxiv.org/abs/1502.05477).

    Args:
        evaluate: fraction of the full step -> (KL(π_old‖π_new) in nats, new surrogate minus old surrogate).
        kl_bound: δ in nats, > 0, in the unit of that KL.
        shrink: factor between trials, in (0, 1).
        max_trials: maximum number of trials, >= 1.

    Returns:
        The accepted fraction, or 0 if no trial was accepted (keep the old parameters), and all trials.

    Raises:
        ValueError: an argument is outside its range.

    Example:
        >>> backtracking_line_search(lambda f: (f * f, f), kl_bound=0.3, shrink=0.5).fraction
        0.5
    """
    if not (kl_bound > 0 and 0 < shrink < 1 and max_trials >= 1):
        raise ValueError(f"kl_bound must be > 0, shrink in (0, 1), max_trials >= 1, got {kl_bound}, {shrink} and {max_trials}")
    trials: list[Trial] = []
    fraction = 1.0
    for _ in range(max_trials):
        trials.append(Trial(fraction, *evaluate(fraction)))
        if trials[-1].kl <= kl_bound and trials[-1].gain >= 0:
            return LineSearch(fraction, trials)
        fraction *= shrink
    return LineSearch(0.0, trials)


def fisher_vector_product(
    kl: Callable[[], Tensor], parameters: Sequence[Tensor], vector_N: Tensor, *, damping: float = 0.0
) -> Tensor:
    """Multiply the damped Fisher matrix of a policy by a vector, without materialising the matrix.

    F v + damping · v = ∇((∇KL)ᵀ v) + damping · v

    The second derivative of KL(π_old‖π) is the Fisher matrix only at π = π_old; elsewhere it may have negative eigenvalues. The
    product takes two backward passes, so the forward pass must be twice differentiable (attention: the math kernel). The graph
    is freed, so the products of micro-batches can be summed with the memory of one. Pearlmutter 1994
    (https://doi.org/10.1162/neco.1994.6.1.147); Schulman et al. 2015, appendix C.1 (https://arxiv.org/abs/1502.05477).

    Args:
        kl: computes the scalar KL(π_old‖π) at the current parameters, with π_old detached and equal to π.
        parameters: the trained tensors, all of which the KL must use.
        vector_N: [N], in the order of `flatten(parameters)`.
        damping: added to the diagonal, >= 0; 0.1 is usual. F of a softmax is singular without it.

    Returns:
        [N], no gradient.

    Raises:
        ValueError: the KL is not a finite scalar close to 0, or the length of the vector is wrong.
    """
    with torch.enable_grad():
        value = kl()
        if value.dim() or not abs(value.item()) < 1e-3:
            raise ValueError(f"the KL must be a scalar that is 0 at the current parameters, got {value.tolist()}")
        # The first pass keeps its graph; the second one, through (∇KL)ᵀ v, frees it.
        gradient_N = flatten(torch.autograd.grad(value, parameters, create_graph=True))
        if gradient_N.shape != vector_N.shape:
            raise ValueError(
                f"the vector must have one entry per parameter, {list(gradient_N.shape)}, got {list(vector_N.shape)}"
            )
        # materialize_grads: zeros instead of None for parameters on which (∇KL)ᵀ v does not depend.
        products = torch.autograd.grad(gradient_N @ vector_N, parameters, materialize_grads=True)
    return flatten(products) + damping * vector_N


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenate tensors into a vector on the device of the first.

    Args:
        tensors: of any shapes, at least one.

    Returns:
        [N], N the sum of their sizes; differentiable.
    """
    return torch.cat([tensor.reshape(-1).to(tensors[0].device) for tensor in tensors])


def unflatten(vector_N: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Split a vector into tensors of given shapes: the inverse of `flatten`.

    Args:
        vector_N: [N].
        like: tensors whose shapes and devices the parts get, N numbers in all.

    Returns:
        The parts, in order.

    Raises:
        ValueError: the vector does not have N numbers.
    """
    sizes = [tensor.numel() for tensor in like]
    if vector_N.shape != (sum(sizes),):
        raise ValueError(f"the vector must have {sum(sizes)} entries, got {list(vector_N.shape)}")
    parts = vector_N.split(sizes)
    return [part.view(tensor.shape).to(tensor.device) for part, tensor in zip(parts, like, strict=True)]
