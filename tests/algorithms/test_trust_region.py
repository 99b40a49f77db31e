from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from golden_numbers import golden
from selfeval.algorithms.kl import categorical_kl
from selfeval.algorithms.trust_region import (
    backtracking_line_search,
    conjugate_gradient,
    conjugate_gradient_steps,
    fisher_vector_product,
    flatten,
    natural_gradient_step,
    unflatten,
)


def f64(numbers: object) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def close(actual: Tensor, expected: object, *, rtol: float = 1e-9, atol: float = 1e-12) -> None:
    torch.testing.assert_close(actual, f64(expected), rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", ["cg_n6", "cg_n4_identityish"])
def test_every_iterate_and_the_step_match_golden(name: str) -> None:
    entry = golden("9_trpo")[name]
    fisher_NN, gradient_N, expected = f64(entry["inputs"]["fisher"]), f64(entry["inputs"]["grad"]), entry["expected"]
    steps = [step for step, _ in zip(conjugate_gradient_steps(fisher_NN.mv, gradient_N), expected["iterates"], strict=False)]
    assert len(steps) == len(gradient_N)
    for step, iterate, residual in zip(steps, expected["iterates"], expected["residual_norms"], strict=True):
        close(step.solution_N, iterate)
        # The golden file writes residuals below 1e-9 as 0.
        assert step.relative_residual * gradient_N.norm().item() == pytest.approx(residual, rel=1e-9, abs=1e-9)
    natural = natural_gradient_step(fisher_NN.mv, gradient_N, kl_bound=entry["params"]["delta"])
    close(natural.direction_N, expected["solution"])
    close(natural.step_N, expected["step"])
    assert natural.curvature == pytest.approx(expected["quad"], rel=1e-9)
    assert natural.relative_residual <= 1e-10


@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_an_ill_conditioned_system_is_solved_at_any_scale(scale: float) -> None:
    # 9 eigenvalues 1 ... 1e-3: done after 9 steps but for rounding, which a few more mend. pᵀF p is about 1e-12 at the small
    # scale: a constant 1e-8 in the denominator would leave x at almost 0.
    values_N = torch.logspace(0, -3, 9, dtype=torch.float64)
    solution_N = scale * torch.arange(1.0, 10.0, dtype=torch.float64)
    step = conjugate_gradient(lambda v: values_N * v, values_N * solution_N, iterations=20)
    close(step.solution_N, solution_N.tolist(), rtol=1e-8)
    assert step.relative_residual <= 1e-10


def test_it_stops_at_the_tolerance_and_at_the_iterations() -> None:
    products = []

    def product(v: Tensor) -> Tensor:
        products.append(v)
        return f64([1.0, 2.0, 3.0, 4.0]) * v

    b_N = f64([1.0, 1.0, 1.0, 1.0])
    residuals = [step.relative_residual for step in conjugate_gradient_steps(product, b_N) if step.relative_residual > 1e-9]
    assert len(residuals) == 3
    products.clear()
    assert conjugate_gradient(product, b_N, iterations=10, tolerance=residuals[1] * 1.01).relative_residual == residuals[1]
    assert len(products) == 2
    products.clear()
    assert conjugate_gradient(product, b_N, iterations=1).relative_residual == residuals[0]
    assert len(products) == 1


def softmax_policy() -> tuple[dict[str, Tensor], dict[str, float], dict[str, object]]:
    entry = golden("9_trpo")["softmax_policy"]
    return {key: f64(numbers) for key, numbers in entry["inputs"].items()}, entry["params"], entry["expected"]


def test_a_whole_step_of_a_softmax_policy_matches_golden() -> None:
    inputs, params, expected = softmax_policy()
    logits_SA, old_SA, weight_S = inputs["logits"].clone().requires_grad_(), inputs["logits"], inputs["state_weights"]

    def gain(new_SA: Tensor) -> Tensor:
        return (weight_S[:, None] * new_SA.softmax(-1) * inputs["advantages"]).sum()

    def kl(new_SA: Tensor) -> Tensor:
        return (weight_S * categorical_kl(old_SA, new_SA)).sum()

    def product(v: Tensor, damping: float = params["damping"]) -> Tensor:
        return fisher_vector_product(lambda: kl(logits_SA), [logits_SA], v, damping=damping)

    gradient_N = flatten(torch.autograd.grad(gain(logits_SA), [logits_SA]))
    close(gradient_N, expected["grad"])
    close(torch.stack([product(row, damping=0.0) for row in torch.eye(12, dtype=torch.float64)]), expected["fisher"])
    natural = natural_gradient_step(product, gradient_N, kl_bound=params["delta"], iterations=12)
    close(natural.direction_N, expected["fisher_damped_solution"])
    close(natural.step_N, expected["full_step"])
    assert natural.curvature == pytest.approx(expected["quad"], rel=1e-9)

    def evaluate(fraction: float) -> tuple[float, float]:
        (step_SA,) = unflatten(fraction * natural.step_N, [old_SA])
        return kl(old_SA + step_SA).item(), (gain(old_SA + step_SA) - gain(old_SA)).item()

    search = backtracking_line_search(
        evaluate, kl_bound=params["delta"], shrink=params["backtrack"], max_trials=params["max_backtracks"]
    )
    assert len(search.trials) - 1 == expected["accepted_index"]
    assert search.trials[-1].kl == pytest.approx(expected["kl_at_accept"], rel=1e-9)
    close(old_SA + search.fraction * natural.step_N.view_as(old_SA), expected["new_logits"])
    # A bound of nothing rejects every try, and shows all rows of the golden table.
    refused = backtracking_line_search(
        evaluate, kl_bound=1e-12, shrink=params["backtrack"], max_trials=params["max_backtracks"]
    )
    assert refused.fraction == 0
    close(f64(refused.trials), expected["line_search"])


def test_without_damping_the_natural_gradient_of_a_softmax_is_its_advantage() -> None:
    # F (A − mean) = g for every state, and conjugate gradient stays in the range of the singular F: pinv(F) g.
    inputs, _, expected = softmax_policy()
    logits_SA, weight_S = inputs["logits"].clone().requires_grad_(), inputs["state_weights"]

    def product(v: Tensor) -> Tensor:
        return fisher_vector_product(
            lambda: (weight_S * categorical_kl(inputs["logits"], logits_SA)).sum(), [logits_SA], v, damping=0.0
        )

    step = conjugate_gradient(product, f64(expected["grad"]), iterations=12, tolerance=1e-12)
    close(step.solution_N, expected["natural_gradient_pinv"])


def test_the_product_through_a_network_is_that_of_its_jacobians() -> None:
    """F = Σ_s Jᵀ (diag π − π πᵀ) J, by forward differences of nothing: the Jacobian is taken row by row."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    states_S3 = torch.randn(6, 3, dtype=torch.float64)
    parameters = list(network.parameters())
    logits_SA = network(states_S3)
    p_SA, old_SA = logits_SA.softmax(-1).detach(), logits_SA.detach()
    fisher_NN = torch.zeros(44, 44, dtype=torch.float64)
    for logits_A, p_A in zip(logits_SA, p_SA, strict=True):
        jacobian_AN = torch.stack([flatten(torch.autograd.grad(z, parameters, retain_graph=True)) for z in logits_A])
        fisher_NN += jacobian_AN.T @ (p_A.diag() - p_A[:, None] * p_A) @ jacobian_AN
    vector_N = torch.randn(44, dtype=torch.float64)
    with torch.no_grad():  # an optimizer's step runs so; the product needs its own graph
        actual_N = fisher_vector_product(
            lambda: categorical_kl(old_SA, network(states_S3)).sum(), parameters, vector_N, damping=0.25
        )
    assert not actual_N.requires_grad
    close(actual_N, (fisher_NN @ vector_N + 0.25 * vector_N).tolist())


@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_half_solved_steps_keep_the_bound_without_another_product(iterations: int) -> None:
    # ½ sᵀF s = δ for whatever direction so few iterations reached.
    values_N, products = f64([1.0, 2.0, 30.0, 400.0]), []

    def product(v: Tensor) -> Tensor:
        products.append(v)
        return values_N * v

    natural = natural_gradient_step(product, torch.ones(4, dtype=torch.float64), kl_bound=0.02, iterations=iterations)
    assert natural.relative_residual > 0.1
    assert (natural.step_N @ (values_N * natural.step_N)).item() / 2 == pytest.approx(0.02, rel=1e-9)
    assert len(products) == iterations


def test_no_gradient_is_no_step() -> None:
    natural = natural_gradient_step(lambda v: v, torch.zeros(3), kl_bound=0.01)
    assert natural.step_N.tolist() == [0.0, 0.0, 0.0]
    assert natural.curvature == 0


def test_the_line_search_takes_the_first_try_that_is_close_and_not_worse() -> None:
    gains = {1.0: 1.0, 0.5: -1e-9, 0.25: math.nan, 0.125: 0.0, 0.0625: 5.0}
    search = backtracking_line_search(lambda f: (f, gains[f]), kl_bound=0.6, shrink=0.5, max_trials=5)
    # 1: too far. ½: worse. ¼: not a number. ⅛: no gain, but no loss.
    assert search.fraction == 0.125
    assert [trial.fraction for trial in search.trials] == [1.0, 0.5, 0.25, 0.125]
    assert backtracking_line_search(lambda _: (math.nan, 1.0), kl_bound=1.0, max_trials=3).fraction == 0


def test_flat_vectors_go_back_to_their_shapes() -> None:
    tensors = [torch.arange(6.0).view(2, 3), torch.tensor(7.0), torch.arange(2.0)]
    assert flatten(tensors).tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 7.0, 0.0, 1.0]
    for back, tensor in zip(unflatten(flatten(tensors), tensors), tensors, strict=True):
        assert torch.equal(back, tensor)
    with pytest.raises(ValueError, match=r"must have 9 entries, got \[8\]"):
        unflatten(torch.zeros(8), tensors)


def test_what_is_not_positive_definite_is_refused() -> None:
    for product in (lambda v: -v, lambda v: 0 * v, lambda v: math.nan * v):
        with pytest.raises(ValueError, match="damping"):
            conjugate_gradient(product, torch.ones(2), iterations=3)
    with pytest.raises(ValueError, match="finite, got 1 non-finite entries"):
        natural_gradient_step(lambda v: v, torch.tensor([1.0, math.inf]), kl_bound=0.01)


def test_a_kl_to_another_policy_is_refused() -> None:
    logits_A = torch.tensor([0.0, 1.0], requires_grad=True)
    with pytest.raises(ValueError, match="at the current parameters"):
        fisher_vector_product(lambda: categorical_kl(torch.zeros(2), logits_A), [logits_A], torch.ones(2))
    with pytest.raises(ValueError, match="at the current parameters"):
        fisher_vector_product(lambda: categorical_kl(logits_A[None].detach(), logits_A[None]), [logits_A], torch.ones(2))
    with pytest.raises(ValueError, match=r"one entry per parameter, \[2\], got \[3\]"):
        fisher_vector_product(lambda: categorical_kl(logits_A.detach(), logits_A), [logits_A], torch.ones(3))


def test_arguments_outside_their_range_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        conjugate_gradient(lambda v: v, torch.ones(2), iterations=0)
    with pytest.raises(ValueError, match=r"kl_bound must be > 0, got 0.0"):
        natural_gradient_step(lambda v: v, torch.ones(2), kl_bound=0.0)
    for wrong in ({"kl_bound": 0.0}, {"kl_bound": 1.0, "shrink": 1.0}, {"kl_bound": 1.0, "max_trials": 0}):
        with pytest.raises(ValueError, match="kl_bound must be > 0, shrink in"):
            backtracking_line_search(lambda f: (f, f), **wrong)
