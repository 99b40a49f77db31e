"""The second derivative of the KL of next-token distributions to themselves, without ever holding their logits.

With z = y / T the logits over the temperature, p = softmax(z) and J = dz / dh the head's Jacobian at the hidden state h,
KL(p || p') has at p' = p the value 0, the gradient 0, and the second derivative

    J^T (diag p - p p^T) J

which is the Fisher matrix of the distribution in h. `self_kl` is 0 with that second derivative: differentiated twice through
the layers below, it gives products with the Fisher matrix of the policy's weights (algorithms/trust_region.py). Plain autograd
over exact KL would keep some ten numbers per token and vocabulary entry for its second pass; here a chunk of rows is all
that lives at once.

Shapes: B sequences, R reply tokens, N tokens that count, C tokens of a chunk, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from selfeval.backbone.logprobs import HasOutputHead, slices
from selfeval.backbone.output_head import OutputHead

__all__ = ["self_kl"]

_BYTES = {"cpu": 16 << 20}
_OTHER_BYTES = 64 << 20
"""Memory for a chunk's logits and their temporary copies, as in logprobs.py."""
_COPIES = 5
"""Numbers per logit that live at once."""


class _Job(NamedTuple):
    head: OutputHead
    temperature: float


def self_kl(backbone: HasOutputHead, hidden_BRD: Tensor, mask_BR: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Give the KL of next-token distributions to themselves: 0, with gradient 0 and the second derivative of the exact KL.

    Args:
        backbone: whose output layer is used.
        hidden_BRD: [B, R, D], states that predict each token; differentiable.
        mask_BR: [B, R], True at the tokens that count.
        temperature: t of the distributions, > 0.

    Returns:
        [N], zeros in nats, one per token that counts.

    Raises:
        ValueError: the temperature is not above 0.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    found: Tensor = _SelfKL.apply(hidden_BRD[mask_BR], _Job(backbone.output_head, temperature))  # type: ignore[no-untyped-call]
    return found


class _SelfKL(torch.autograd.Function):
    """Zeros, whose gradient is `_Gradient`."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, job: _Job) -> Tensor:
        ctx.save_for_backward(hidden_ND)
        ctx.job = job
        return hidden_ND.new_zeros(len(hidden_ND), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, above_N: Tensor) -> tuple[Tensor, None]:
        (hidden_ND,) = ctx.saved_tensors
        gradient_ND: Tensor = _Gradient.apply(hidden_ND, above_N, ctx.job)  # type: ignore[no-untyped-call]
        return gradient_ND, None


class _Gradient(torch.autograd.Function):
    """Zeros `[N, D]`, whose derivative in the hidden states is the curvature."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, above_N: Tensor, job: _Job) -> Tensor:
        ctx.save_for_backward(hidden_ND, above_N)
        ctx.job = job
        return torch.zeros_like(hidden_ND)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, direction_ND: Tensor) -> tuple[Tensor, None, None]:
        hidden_ND, above_N = ctx.saved_tensors
        found_ND, rows = torch.empty_like(hidden_ND), _rows(ctx.job.head, hidden_ND)
        for part in slices(len(hidden_ND), rows, on_shapes=hidden_ND.is_meta):
            found_ND[part] = _times_curvature(ctx.job, hidden_ND[part], direction_ND[part]) * above_N[part, None]
        return found_ND, None, None


def _rows(head: OutputHead, hidden_ND: Tensor) -> int:
    budget = _BYTES.get(head.device or hidden_ND.device.type, _OTHER_BYTES)
    return max(1, budget // (4 * _COPIES * head.vocabulary))


def _times_curvature(job: _Job, hidden_CD: Tensor, direction_CD: Tensor) -> Tensor:
    """J^T (diag p - p p^T) J d, one row at a time."""
    head, columns = job.head, slice(0, job.head.vocabulary)
    raw_CV, pull = head.part(hidden_CD, columns, pull=True)
    logits_CV = head.finish_(raw_CV)
    slope_CV = head.slope(logits_CV)
    p_CV = torch.softmax(logits_CV / job.temperature, -1)
    # With s the slopes of the cap: d -> s W d, then diag(p) - p p^T, then back through W^T s.
    moved_CV = _linear(head, direction_CD, columns)
    if slope_CV is not None:
        moved_CV = moved_CV.mul_(slope_CV)
    moved_CV = moved_CV.sub_((p_CV * moved_CV).sum(-1, keepdim=True)).mul_(p_CV)
    if slope_CV is not None:
        moved_CV = moved_CV.mul_(slope_CV)
    # The scale and 1 / T are factors of J, which occurs twice.
    return pull(moved_CV).mul((head.scale / job.temperature) ** 2)


def _linear(head: OutputHead, direction_CD: Tensor, columns: slice) -> Tensor:
    """The head's weights times a direction: its outputs without its bias, fp32."""
    # The head may be any module: subtracting its output for 0 removes a bias without access to it.
    nothing_1D = torch.zeros_like(direction_CD[:1])
    outputs = [head.part(x, columns, pull=False)[0].float() for x in (direction_CD, nothing_1D)]
    return outputs[0] - outputs[1]
