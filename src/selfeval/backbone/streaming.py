"""Base weights that are only there while a pass needs them (streamed from RAM or from the model's files).

accelerate's hooks bring a module's weights in before its forward and drop them after it; in between, its parameters are on
the meta device and hold nothing. Three things follow from that, and are solved here:

- PEFT creates an adapter on its base weight's device, which would be meta: `stand_in_weights`.
- Autograd keeps every weight of the forward until the backward, so the whole model would pile up in training. A
  streamed layer is therefore computed again in the backward (Chen et al. 2016, https://arxiv.org/abs/1604.06174), and the
  weights of one layer are held at a time: `recompute.py`.
- Code that reads or counts the base's weights must look up their location: `held_weights`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.hooks import AlignDevicesHook
from accelerate.utils import OffloadedWeightsLoader
from torch import Tensor, nn

__all__ = ["held_weights", "stand_in_weights", "weight_bytes"]


def _streamed_modules(model: nn.Module) -> Iterator[tuple[nn.Module, AlignDevicesHook]]:
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        # Several hooks of a module are chained in a SequentialHook.
        for each in getattr(hook, "hooks", (hook,)):
            if isinstance(each, AlignDevicesHook) and each.offload:
                yield module, each


@contextmanager
def stand_in_weights(model: nn.Module) -> Iterator[None]:
    """Inside the block, streamed weights are one number seen in their shape (no memory), on the device that computes them.

    Create adapters inside the block as real tensors on the device that computes their layer.
    """
    absent = []
    for module, hook in _streamed_modules(model):
        for name, parameter in module.named_parameters(recurse=False):
            absent.append((module, name, parameter))
            number = torch.zeros((), dtype=parameter.dtype, device=hook.execution_device)
            module._parameters[name] = nn.Parameter(number.expand(parameter.shape), requires_grad=False)
    try:
        yield
    finally:
        for module, name, parameter in absent:
            module._parameters[name] = parameter


def _kept(model: nn.Module) -> dict[int, tuple[OffloadedWeightsLoader, str]]:
    """Return the location of each offloaded weight, by the id of its parameter."""
    found = {}
    for module, hook in _streamed_modules(model):
        for name, parameter in module.named_parameters(recurse=False):
            mapping = hook.weights_map
            found[id(parameter)] = (mapping.dataset, mapping.prefix + name)
    return found


def held_weights(model: nn.Module) -> list[Tensor]:
    """Return the base's tensors in memory, including those offloaded to RAM but not those on disk."""
    kept = _kept(model)
    held: list[Tensor] = []
    for parameter in model.parameters():
        if parameter.device.type != "meta":
            held.append(parameter)
        elif id(parameter) in kept and kept[id(parameter)][1] in kept[id(parameter)][0].state_dict:
            # The loader's state dict holds the weights that were offloaded to RAM; others are read from files.
            loader, name = kept[id(parameter)]
            held.append(loader.state_dict[name])
    return held


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters on all devices and on disk; shared storage counts once."""
    there = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters() if p.device.type != "meta"
    }
    absent = sum(p.numel() * p.element_size() for p in model.parameters() if p.device.type == "meta")
    return sum(there.values()) + absent
