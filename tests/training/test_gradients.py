from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny_models
from selfeval.errors import RoleError
from selfeval.training.gradients import add_gradients


class FailsBackward(torch.autograd.Function):
    """Passes its input through, and has no memory to send the gradient back."""

    @staticmethod
    def forward(context: Any, inputs: Tensor) -> Tensor:
        return inputs.clone()

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")


def two_layers() -> tuple[nn.Linear, nn.Linear]:
    torch.manual_seed(0)
    return nn.Linear(3, 4), nn.Linear(4, 1)


def loss_of(first: nn.Linear, second: nn.Linear, inputs: Tensor, *, fails: bool = False) -> Tensor:
    hidden = torch.tanh(first(inputs))
    found: Tensor = second(FailsBackward.apply(hidden) if fails else hidden).square().sum()  # type: ignore[no-untyped-call]
    return found


def test_they_equal_those_of_backward_and_add_up() -> None:
    first, second = two_layers()
    parameters = [*first.parameters(), *second.parameters()]
    inputs = torch.randn(6, 3)
    loss_of(first, second, inputs).backward()
    expected = [p.grad.clone() for p in parameters if p.grad is not None]
    for parameter in parameters:
        parameter.grad = None
    for part in inputs.split(2):
        add_gradients(loss_of(first, second, part), parameters)
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=1e-6)


def test_a_backward_that_fails_in_the_middle_leaves_no_trace() -> None:
    first, second = two_layers()
    parameters = [*first.parameters(), *second.parameters()]
    add_gradients(loss_of(first, second, torch.randn(2, 3)), parameters)
    before = [p.grad.clone() for p in parameters if p.grad is not None]
    inputs = torch.randn(2, 3)
    with pytest.raises(torch.OutOfMemoryError):
        add_gradients(loss_of(first, second, inputs, fails=True), parameters)
    assert all(torch.equal(p.grad, g) for p, g in zip(parameters, before, strict=True) if p.grad is not None)
    # torch's own backward does leave one: the second layer comes before the failure.
    with pytest.raises(torch.OutOfMemoryError):
        loss_of(first, second, inputs, fails=True).backward()
    assert second.weight.grad is not None
    assert not torch.equal(second.weight.grad, before[2])


def test_what_is_frozen_or_unused_gets_none() -> None:
    first, second = two_layers()
    first.weight.requires_grad_(False)
    unused = nn.Parameter(torch.ones(2))
    add_gradients(loss_of(first, second, torch.randn(2, 3)), [*first.parameters(), *second.parameters(), unused])
    assert first.weight.grad is None
    assert unused.grad is None
    assert first.bias.grad is not None


def test_the_first_gradient_is_a_tensor_of_its_own() -> None:
    bias, shift = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    for _ in range(2):  # the gradient of a sum is one number, seen three times, and the same for both
        add_gradients((bias + shift).sum(), [bias, shift])
    assert bias.grad is not None
    assert shift.grad is not None
    assert bias.grad.tolist() == shift.grad.tolist() == [2.0, 2.0, 2.0]


def test_a_loss_of_another_role_is_refused() -> None:
    """No parameter takes part: the step would be none at all, and nothing would say so."""
    backbone = tiny_models.backbone()
    backbone.add_role("policy")
    backbone.add_role("critic")
    ids = torch.tensor([[5, 6, 7]])
    with backbone.acting_as("critic"):
        loss = backbone.hidden(ids, torch.ones_like(ids)).sum()
    with pytest.raises(RoleError, match="another role"):
        add_gradients(loss, backbone.parameters("policy").values())
