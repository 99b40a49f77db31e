"""Locate the first layer whose output is NaN or infinite."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from selfeval.backbone.roles import Backbone
from selfeval.backbone.sequences import Sequences

__all__ = ["broken_layer"]


@torch.no_grad()
def broken_layer(backbone: Backbone, roles: Sequence[str], batch: Sequences) -> str | None:
    """Name the first layer with a NaN or infinite output, and the acting role: `layers.3.mlp of policy`.

    Args:
        backbone: the model that has the roles.
        roles: names of the roles, checked in this order.
        batch: input of the forward pass; a few rows are enough.

    Returns:
        None if all outputs of all roles are finite.
    """
    for role in roles:
        with backbone.acting_as(role), _noting(backbone.model) as broken:
            backbone.hidden(batch.ids_BT, batch.attention_BT)
        if broken:
            return f"{broken[0]} of {role}"
        # The pass does not apply the scalar head, and NaN in a weight that no token reaches does not show in an output.
        weights = [name for name, p in backbone.roles.parameters(role).items() if not bool(torch.isfinite(p).all())]
        if weights:
            return f"{weights[0]} of {role}"
    return None


@contextmanager
def _noting(model: nn.Module) -> Iterator[list[str]]:
    """Collect the names of modules with non-finite outputs, in order of completion, so the innermost comes first."""
    broken: list[str] = []

    def watch(name: str) -> Any:
        def look(module: nn.Module, arguments: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, Tensor) and first.is_floating_point() and not bool(torch.isfinite(first).all()):
                broken.append(name)

        return look

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        yield broken
    finally:
        for handle in handles:
            handle.remove()
