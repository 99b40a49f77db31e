"""Adding up the gradients of micro-batches, so that one that fails in the middle leaves no trace."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from selfeval.errors import RoleError

__all__ = ["add_gradients"]


def add_gradients(loss: Tensor, parameters: Iterable[nn.Parameter]) -> None:
    """Adds the gradient of `loss` to the parameters' `.grad`, all of it or nothing.

    `loss.backward()` writes as it goes: out of memory halfway, it leaves the gradients of the later layers, and the retried
    micro-batch would count twice there. Here they are complete before the first is added; that takes the memory of one more
    set of gradients, which are those of an adapter.

    Args:
        loss: a scalar.
        parameters: those that are trained; frozen ones among them are passed over.

    Raises:
        RoleError: the loss depends on none of them.
    """
    trained = [p for p in parameters if p.requires_grad]
    found = torch.autograd.grad(loss, trained, allow_unused=True)
    if all(gradient is None for gradient in found):
        raise RoleError("the loss depends on none of the weights that are trained; another role was acting when it was made")
    # A first gradient may be a view of something shared; it is copied before anything is written.
    ready = [g.clone() if g is not None and p.grad is None else g for p, g in zip(trained, found, strict=True)]
    for parameter, gradient in zip(trained, ready, strict=True):
        if gradient is None:
            continue
        if parameter.grad is None:
            parameter.grad = gradient
        else:
            parameter.grad.add_(gradient)
