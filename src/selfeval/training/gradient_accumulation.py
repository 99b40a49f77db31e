"""Gradient accumulation over micro-batches and processes; a micro-batch that fails leaves the gradients unchanged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from selfeval.backbone.loss_scale import LossScale, name_of, scale_of
from selfeval.backbone.process_group import ProcessGroup, sum_in_place
from selfeval.errors import NotFiniteError, RoleError

__all__ = ["add_gradients", "clip_gradients", "sum_gradients"]

Gradients = Sequence[Tensor | None]


def add_gradients(loss: Tensor, parameters: Iterable[nn.Parameter]) -> None:
    """Add the gradient of `loss` to the parameters' `.grad`, atomically.

    `loss.backward()` accumulates layer by layer: if it runs out of memory halfway, the later layers already hold the gradient
    and the retried micro-batch is counted twice there. Here all gradients are computed before the first is added. The cost is
    the memory of a second set of gradients, which is small for an adapter.

    If the base is in fp16 the loss is scaled (`LossScale`): gradients that overflow are recomputed at half the scale, and the
    unscaled gradient is added.

    Args:
        loss: a scalar.
        parameters: trained parameters; frozen ones are skipped.

    Raises:
        RoleError: the loss depends on none of the parameters.
        NotFiniteError: a gradient is NaN or infinite although the loss is finite; the message names the first such parameter.
            A loss that is not finite does not raise here: the caller logs it, and `clip_gradients` raises.
    """
    trained = [p for p in parameters if p.requires_grad]
    scale = scale_of(trained)
    found, factor = _plain(loss, trained) if scale is None else _scaled(loss, trained, scale)
    if all(gradient is None for gradient in found):
        raise RoleError("the loss does not depend on any trained weight; another role was active when it was computed")
    # autograd.grad may return a view of shared memory, so unscale the first gradient out of place before it becomes `.grad`.
    ready = [g * factor if g is not None and p.grad is None else g for p, g in zip(trained, found, strict=True)]
    for parameter, gradient in zip(trained, ready, strict=True):
        if gradient is None:
            continue
        if parameter.grad is None:
            parameter.grad = gradient
        else:
            parameter.grad.add_(gradient, alpha=factor)


def clip_gradients(parameters: Mapping[str, nn.Parameter], largest: float | None) -> float:
    """Clip the total norm of the gradients to at most `largest` (None: no limit).

    Returns:
        The norm before clipping.

    Raises:
        NotFiniteError: the norm is NaN or infinite; the message names the first parameter with such a gradient. Nothing is
            scaled, because one bad number would spread to all gradients.
    """
    gradients = [p.grad for p in parameters.values()]
    norm = torch.nn.utils.get_total_norm([g for g in gradients if g is not None])
    if not bool(torch.isfinite(norm)):
        raise _not_finite(list(parameters.values()), gradients)
    if largest is not None:
        torch.nn.utils.clip_grads_with_norm_(list(parameters.values()), largest, norm)
    return float(norm)


def sum_gradients(parameters: Iterable[nn.Parameter], processes: ProcessGroup) -> None:
    """Replace the gradients of this process by the sums over all processes of the training.

    Every process has divided its losses by the size of the whole batch, so the sum is the gradient of one process that has read
    all micro-batches. A message has 4 bytes per trained weight.

    Args:
        parameters: trained parameters, in the same order in all processes; frozen ones are skipped.
        processes: the processes.
    """
    if processes.size == 1:
        return
    trained = [p for p in parameters if p.requires_grad]
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    # A weight without a gradient in any process, such as an expert that no token reached, must stay without: AdamW skips it.
    counts = torch.tensor([float(p.grad is not None) for p in trained], device=trained[0].device)
    sum_in_place(processes, [*found, counts])
    for parameter, gradient, count in zip(trained, found, counts.tolist(), strict=True):
        parameter.grad = gradient if count else None


def _plain(loss: Tensor, trained: Sequence[nn.Parameter]) -> tuple[Gradients, float]:
    found = torch.autograd.grad(loss, trained, allow_unused=True)
    # A loss that is not finite is passed on: the caller logs it, and `clip_gradients` raises.
    if _are_finite(found) or not _are_finite([loss]):
        return found, 1.0
    raise _not_finite(trained, found)


def _scaled(loss: Tensor, trained: Sequence[nn.Parameter], scale: LossScale) -> tuple[Gradients, float]:
    """Halve the loss scale until the gradients are finite; return them and the factor that undoes the scale."""
    while True:
        # The graph is retained for another attempt; it is freed with the loss, at the end of the micro-batch.
        found = torch.autograd.grad(loss * scale.value, trained, allow_unused=True, retain_graph=True)
        factor = 1.0 / scale.value
        if _are_finite(found):
            scale.went_well()  # may raise the scale, so `factor` is computed before
            return found, factor
        if not _are_finite([loss]):
            return found, 1.0
        if not scale.halve():
            raise _not_finite(trained, found, remedy="; the range of fp16 is too small, use backbone.precision = bf16 or fp32")


def _are_finite(tensors: Gradients) -> bool:
    """Return whether all numbers are finite, with one device synchronisation; tensors of the planner count as finite."""
    # All checks are queued before the first is read back. They may be on several devices if the base is split.
    checks = [t.isfinite().all() for t in tensors if t is not None and not t.is_meta]
    return not checks or bool(torch.stack([check.to(checks[0].device) for check in checks]).all())


def _not_finite(parameters: Sequence[nn.Parameter], gradients: Gradients, remedy: str = "") -> NotFiniteError:
    wrong = [i for i, gradient in enumerate(gradients) if not _are_finite([gradient])]
    if not wrong:
        return NotFiniteError("the norm of the gradient is infinite, although all its entries are finite")
    first = parameters[wrong[0]]
    name = name_of(first) or f"parameter {wrong[0]} of shape {tuple(first.shape)}"
    return NotFiniteError(f"the gradient of {name} is NaN or infinite ({len(wrong)} of {len(gradients)} parameters){remedy}")
