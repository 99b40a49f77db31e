"""Which adapters a pass reads: found by one short pass and its gradients, whatever the family does inside.

Some layers have their weight read without being called (state-space mixers and their fused kernels), and some are called for
nothing that reaches the hidden states. An adapter there would be saved, merged, and never used.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

__all__ = ["unread_layers"]

_TOKENS = 8


def unread_layers(backbone: Any, parameters: Mapping[str, nn.Parameter]) -> tuple[str, ...]:
    """Names of layers (`mixer.dt_proj`, layer numbers left out) whose adapters no pass reads.

    Layers of one name in all decoder layers and experts count together: a token does not come to every expert.

    Args:
        backbone: inside a block of the role whose adapters these are.
        parameters: of its adapters, by name.
    """
    rows = int(backbone.model.get_input_embeddings().weight.shape[0])
    ids = torch.tensor([[i % rows for i in range(_TOKENS)]], device=backbone.loaded.device)
    wanted = {name: parameter.requires_grad for name, parameter in parameters.items()}
    try:
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        backbone.hidden(ids, torch.ones_like(ids)).float().square().mean().backward()
        # A gradient of zero counts: B is zero at first, which makes that of A zero, but only an unread adapter has none.
        read = {_kind(name) for name, parameter in parameters.items() if parameter.grad is not None}
    finally:
        for name, parameter in parameters.items():
            parameter.grad = None
            parameter.requires_grad_(wanted[name])
    return tuple(sorted({_kind(name) for name in parameters} - read))


def _kind(name: str) -> str:
    """The path of an adapter's layer behind the last number in it: alike for all layers of the decoder."""
    layer = name.split(".lora_")[0].replace(".base_layer", "")
    return re.split(r"\.\d+\.", layer)[-1]
