from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny_models
from selfeval.backbone.logprobs import token_logprobs
from selfeval.backbone.roles import Backbone
from selfeval.backbone.sequences import pad_sequences, reply_hidden
from selfeval.errors import NotFiniteError, RoleError
from selfeval.training.gradient_accumulation import add_gradients, clip_gradients
from token_prompts import as_prompts


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
    backbone.roles.add("policy")
    backbone.roles.add("critic")
    ids = torch.tensor([[5, 6, 7]])
    with backbone.acting_as("critic"):
        loss = backbone.hidden(ids, torch.ones_like(ids)).sum()
    with pytest.raises(RoleError, match="another role"):
        add_gradients(loss, backbone.roles.parameters("policy").values())


# -- gradients that are not finite --------------------------------------------------------------------------------------


def test_a_gradient_that_is_not_finite_is_named_and_nothing_is_added() -> None:
    first, second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.tensor([1.0, 0.0]))
    add_gradients(first.sum() + second.sum(), [first, second])
    # d sqrt(w) / dw is infinite at 0, and the loss is 2 nevertheless: 1 + sqrt(1) + sqrt(0).
    loss = first.mean() + second.sqrt().sum()
    with pytest.raises(NotFiniteError, match=r"parameter 1 of shape \(2,\) is NaN or infinite \(1 of 2"):
        add_gradients(loss, [first, second])
    assert first.grad is not None
    assert second.grad is not None
    assert first.grad.tolist() == [1.0] * 3
    assert second.grad.tolist() == [1.0] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weight_of_a_role_is_named_as_the_role_files_name_it(dtype: torch.dtype) -> None:
    backbone = small(dtype)
    name = "model.layers.1.mlp.down_proj.lora_B.policy.weight"
    weights = {key: backbone.roles.parameters("policy")[key] for key in (name, "head.weight")}
    with torch.no_grad():
        weights[name].zero_()  # the square root of which has no derivative
    with pytest.raises(NotFiniteError, match=rf"the gradient of {re.escape(name)} is NaN or infinite \(1 of 2 parameters\)$"):
        add_gradients(weights["head.weight"].sum() + weights[name].sqrt().sum(), weights.values())
    with torch.no_grad():
        weights["head.weight"].zero_()
    with pytest.raises(NotFiniteError, match=r"the gradient of policy\.head\.weight is NaN or infinite \(1 of 1"):
        add_gradients(weights["head.weight"].sqrt().sum(), [weights["head.weight"]])
    assert all(p.grad is None for p in backbone.roles.parameters("policy").values())


def test_a_norm_that_is_not_finite_is_an_error() -> None:
    first = nn.Parameter(torch.zeros(2))
    first.grad = torch.tensor([3.0, 4.0])
    assert clip_gradients({"first": first}, 1.0) == pytest.approx(5.0)
    torch.testing.assert_close(first.grad, torch.tensor([0.6, 0.8]))
    first.grad = torch.tensor([3e38, 3e38])  # each is finite; the norm, 4.2e38, is not
    with pytest.raises(NotFiniteError, match="the norm of the gradient is infinite, although all"):
        clip_gradients({"first": first}, 1.0)
    first.grad = torch.tensor([1.0, torch.nan])
    with pytest.raises(NotFiniteError, match=r"the gradient of parameter 0 of shape \(2,\) is NaN"):
        clip_gradients({"first": first}, 1.0)


# -- a base in fp16 -----------------------------------------------------------------------------------------------------

PROMPTS, REPLIES = [(5, 9), (4,), (6, 7, 8)], [(2, 17, 30, 1), (8, 1), (9, 3, 12, 21, 2, 1)]


def small(dtype: torch.dtype, weights: torch.dtype | None = None) -> Backbone:
    """A backbone whose weights were rounded to `weights`, in `dtype`; with a trained policy."""
    backbone = tiny_models.backbone(dtype=weights or dtype)
    if weights is not None:
        backbone.model.to(dtype)
    backbone.roles.add("policy", head=True)
    tiny_models.scramble(backbone, "policy")
    return backbone


def mean_loss(backbone: Backbone, tokens: int = 12) -> Tensor:
    """Minus the log-probs of a micro-batch, over the tokens of its whole batch."""
    batch = pad_sequences(backbone, as_prompts(PROMPTS), REPLIES)
    found = token_logprobs(backbone, reply_hidden(backbone, batch), batch.reply_BR, batch.mask_BR)
    return -found.logprobs.sum() / tokens


def gradient(backbone: Backbone, tokens: int, *, scaled: bool = True) -> Tensor:
    """All gradients of the policy's adapter, as one vector; times `tokens`, to compare batches."""
    adapter = [p for n, p in backbone.roles.parameters("policy").items() if "lora_" in n]
    with backbone.acting_as("policy"):
        loss = mean_loss(backbone, tokens)
        if scaled:
            add_gradients(loss, adapter)
        else:
            loss.backward()  # type: ignore[no-untyped-call]
    found = torch.cat([p.grad.flatten() for p in adapter if p.grad is not None])
    for parameter in adapter:
        parameter.grad = None
    return found * tokens


@pytest.mark.parametrize("tokens", [2**14, 2**18])
def test_small_gradients_survive_a_base_in_fp16(tokens: int) -> None:
    """Of a mean over 16 thousand and 262 thousand tokens: batches of 16 and 256 replies of 1024."""
    exact = gradient(small(torch.float32, weights=torch.float16), tokens)
    half = small(torch.float16)
    error = (gradient(half, tokens) - exact).norm() / exact.norm()
    without = (gradient(half, tokens, scaled=False) - exact).norm() / exact.norm()
    assert error < 0.01  # the rounding of fp16, 2**-11, through two layers
    assert without > {2**14: 1.5, 2**18: 15}[tokens] * error
    assert half.loss_scale is not None
    assert half.loss_scale.value == 2**16


def test_gradients_that_overflow_are_computed_again_at_a_smaller_scale() -> None:
    exact, half = small(torch.float32, weights=torch.float16), small(torch.float16)
    said: list[str] = []
    half.budget.notify = said.append
    expected = gradient(exact, 1)  # a sum over the tokens, as if the batch were a single token
    found = gradient(half, 1)
    assert half.loss_scale is not None
    scale = half.loss_scale.value
    assert 1 < scale < 2**16
    assert said[0] == "gradients overflowed fp16 at a loss scale of 65536; continuing with 32768"
    assert said[-1].endswith(f"continuing with {scale:.0f}")
    torch.testing.assert_close(found, expected, rtol=0, atol=0.01 * expected.abs().max().item())
    gradient(half, 1)
    assert half.loss_scale.value == scale  # found once
    assert len(said) == 16 - int(torch.tensor(scale).log2())


def test_micro_batches_at_different_scales_add_up() -> None:
    half = small(torch.float16)
    assert half.loss_scale is not None
    once = gradient(half, 2**10)
    adapter = [p for n, p in half.roles.parameters("policy").items() if "lora_" in n]
    for scale in (2.0**14, 2.0**10):
        half.loss_scale.load({"value": scale, "well": 199})  # doubles after this pass
        with half.acting_as("policy"):
            add_gradients(mean_loss(half, 2**10), adapter)
    found = torch.cat([p.grad.flatten() for p in adapter if p.grad is not None]) * 2**10
    torch.testing.assert_close(found, 2 * once, rtol=0, atol=2e-3 * once.abs().max().item())


def test_an_overflow_that_no_scale_can_mend_is_an_error_that_names_the_weight() -> None:
    half = small(torch.float16)
    with half.acting_as("policy"):
        loss = mean_loss(half, 1) * 1e7
        with pytest.raises(
            NotFiniteError, match=r"gradient of model\.layers\..* the range of fp16 is too small, .*bf16 or fp32"
        ):
            add_gradients(loss, half.roles.parameters("policy").values())
    assert all(p.grad is None for p in half.roles.parameters("policy").values())
    assert half.loss_scale is not None
    assert half.loss_scale.value == 1.0


def test_a_loss_that_is_not_finite_does_not_use_up_the_scale() -> None:
    half = small(torch.float16)
    policy = half.roles.parameters("policy")
    with half.acting_as("policy"):
        add_gradients(mean_loss(half) * torch.nan, policy.values())
    assert half.loss_scale is not None
    assert half.loss_scale.value == 2**16
    with pytest.raises(NotFiniteError, match=r"lora_A\.policy\.weight is NaN or infinite"):
        clip_gradients(policy, 1.0)


def test_layers_that_are_computed_again_can_be_tried_again() -> None:
    plain, again = small(torch.float16), small(torch.float16)
    again.recompute_layers()
    assert torch.equal(gradient(again, 1), gradient(plain, 1))
    assert again.loss_scale is not None
    assert again.loss_scale.value < 2**16  # it was tried again


def test_other_precisions_have_no_scale() -> None:
    assert small(torch.float32).loss_scale is None
    assert small(torch.bfloat16).loss_scale is None
