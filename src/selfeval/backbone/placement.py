"""Assign model parts to devices, based on free memory, before anything is loaded.

Decoder layers are never split and stay in order. Everything else (embeddings, final norm, output layer) is placed on the
*main* device together with the batches and the roles' heads, so hidden states return there once per pass and logits are
never transferred. Layers that do not fit on the compute devices are *streamed*: they stay in RAM or in the model's files and
are copied to the main device only while a pass needs them (see `streaming`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from selfeval.backbone.sizes import weight_sizes
from selfeval.config import PlacementConfig
from selfeval.errors import ModelError
from selfeval.texts import format_bytes

__all__ = ["DISK", "ENDLESS", "DeviceMap", "free_memory", "meta_model", "plan_placement", "usable_memory"]

DISK = "disk"
"""Last device in the order: the model's own files."""

ENDLESS = 1 << 62
"""Size that stands for unlimited memory."""
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class DeviceMap:
    """Device of each part of a model.

    Attributes:
        main: device of batches, embeddings, final norm, output layer and heads; streamed layers are also computed there.
        fixed: names of all modules and direct parameters other than the decoder layers.
        layers: names of the decoder layers, in order.
        devices: the device of each layer.
        bytes: weight bytes per device.
    """

    main: str
    fixed: tuple[str, ...]
    layers: tuple[str, ...]
    devices: tuple[str, ...]
    bytes: Mapping[str, int]

    @property
    def is_whole(self) -> bool:
        """Whether the whole model is on the main device."""
        return all(device == self.main for device in self.devices)

    @property
    def streamed(self) -> tuple[str, ...]:
        """Layers on devices that do not compute: disk, or RAM if the main device is a GPU."""
        kept = ("cpu", DISK) if self.main != "cpu" else (DISK,)
        return tuple(name for name, device in zip(self.layers, self.devices, strict=True) if device in kept)

    def for_transformers(self) -> dict[str, int | str]:
        """Return the `device_map` for `from_pretrained`, with GPUs as integers (the lowest becomes the main one)."""
        pairs = [*((name, self.main) for name in self.fixed), *zip(self.layers, self.devices, strict=True)]
        return {name: int(device.removeprefix("cuda:")) if device.startswith("cuda:") else device for name, device in pairs}

    def spans(self) -> list[tuple[str, str]]:
        """Run of layers and their device, in order: `[("0-11", "cuda:0"), ("12-27", "cpu")]`."""
        found = []
        for device, run in groupby(enumerate(self.devices), key=lambda pair: pair[1]):
            numbers = [number for number, _ in run]
            found.append((f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else str(numbers[0]), device))
        return found

    def sentence(self) -> str:
        """Describe the plan in a sentence for the user."""
        parts = [f"{'layers' if '-' in span else 'layer'} {span} on {device}" for span, device in self.spans()]
        text = f"{', '.join(parts)}; embeddings, output layer and heads on {self.main}"
        return f"{text}; {self._streaming()}" if self.streamed else text

    def _streaming(self) -> str:
        count = len(self.streamed)
        return f"{count} {'layer is' if count == 1 else 'layers are'} moved to {self.main} for each forward pass, which is slow"

    def as_json(self) -> dict[str, Any]:
        """Return the plan as stored in run.json."""
        return {"main": self.main, "layers": [list(pair) for pair in self.spans()], "bytes": dict(self.bytes)}


# -- memory -------------------------------------------------------------------------------------------------------------


def free_memory(device: torch.device) -> dict[str, int]:
    """Return the free bytes of every device that a model on `device` may use, in order of preference: GPUs, cpu, disk.

    A CUDA device without an index means all GPUs.
    """
    cards: Iterable[int] = ()
    if device.type == "cuda":
        cards = range(torch.cuda.device_count()) if device.index is None else (device.index,)
    return {**{f"cuda:{card}": _free_on_card(card) for card in cards}, "cpu": _free_ram(), DISK: ENDLESS}


def _free_on_card(card: int) -> int:
    free: int = torch.cuda.mem_get_info(card)[0]
    return (
        free + torch.cuda.memory_reserved(card) - torch.cuda.memory_allocated(card)
    )  # add memory that torch caches but does not use


def _free_ram() -> int:
    """Return the RAM available without swapping, within the memory limit of the container."""
    free = int(psutil.virtual_memory().available)
    # cgroup v2, which counts the reclaimable page cache as used.
    limit, used = _number(_CGROUP / "memory.max"), _number(_CGROUP / "memory.current")
    return free if limit is None or used is None else max(0, min(free, limit - used + _file_cache()))


def _number(path: Path) -> int | None:
    text = path.read_text().strip() if path.is_file() else ""
    return int(text) if text.isdigit() else None


def _file_cache() -> int:
    """Return the page cache that the container can reclaim."""
    path = _CGROUP / "memory.stat"
    found = re.search(r"^inactive_file (\d+)$", path.read_text(), re.MULTILINE) if path.is_file() else None
    return int(found[1]) if found else 0


def usable_memory(free: Mapping[str, int], config: PlacementConfig) -> dict[str, int]:
    """Return the bytes available for weights: free memory minus the reserve, limited by `max_memory`.

    Raises:
        ModelError: `max_memory` names a device that does not exist on this machine.
    """
    unknown = sorted(set(config.max_memory) - set(free))
    if unknown:
        raise ModelError(f"backbone.placement.max_memory names {', '.join(unknown)}; the devices here are {', '.join(free)}")
    kept = {device: size if device == DISK else int(size * (1 - config.reserve)) for device, size in free.items()}
    return {device: min(size, int(config.max_memory.get(device, size))) for device, size in kept.items()}


# -- the plan -----------------------------------------------------------------------------------------------------------


def meta_model(config: Any, *, trust_remote_code: bool = False) -> nn.Module:
    """Build the model of a config on the meta device, without weights."""
    with torch.device("meta"):
        made: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return made


@dataclass(frozen=True)
class _Parts:
    fixed: tuple[str, ...]
    fixed_bytes: int
    layers: tuple[str, ...]
    layer_bytes: tuple[int, ...]

    @property
    def largest(self) -> int:
        return max(self.layer_bytes, default=0)

    @property
    def total(self) -> int:
        return self.fixed_bytes + sum(self.layer_bytes)


def plan_placement(model: nn.Module, memory: Mapping[str, int], precision: str) -> DeviceMap:
    """Place the model on the GPU with the most memory if it fits there as a whole, else spread it over the devices in order.

    The main device is the first that can hold all non-layer parts plus the largest layer; earlier devices are not used. The
    CPU becomes the main device only if no GPU qualifies; otherwise it only stores layers that a GPU computes.

    Args:
        model: on the meta device, or any other.
        memory: usable bytes by device (`cuda:N`, `cpu`, `disk`), in order of preference.
        precision: precision of the weights: fp32, bf16, fp16, int8 or nf4 (see `sizes`).

    Raises:
        ModelError: the model does not fit.
    """
    parts = _parts(model, precision)
    cards = [device for device, size in memory.items() if device.startswith("cuda:") and size >= parts.total]
    if cards:
        roomiest = max(cards, key=lambda card: memory[card])
        return _device_map(parts, roomiest, [roomiest] * len(parts.layers))
    for main in memory:
        if main != DISK and memory[main] >= parts.fixed_bytes + parts.largest:
            devices = _spread(parts, memory, main)
            if devices is not None:
                return _device_map(parts, main, devices)
    raise ModelError(_too_small(parts, memory))


def _spread(parts: _Parts, memory: Mapping[str, int], main: str) -> list[str] | None:
    """Assign each layer to a device from `main` onwards; if layers are streamed, reserve space for one of them on `main`."""
    order = list(memory)[list(memory).index(main) :]
    # First without streaming. Only if that fails, reserve room on the main device for a streamed layer.
    room = {**memory, main: memory[main] - parts.fixed_bytes}
    computing = [device for device in order if device == main or device.startswith("cuda:")]
    found = _fill(parts.layer_bytes, [(device, room[device]) for device in computing])
    if found is not None:
        return found
    room[main] -= parts.largest
    return _fill(parts.layer_bytes, [(device, room[device]) for device in order])


def _fill(sizes: Sequence[int], room: Sequence[tuple[str, int]]) -> list[str] | None:
    """Fill devices with layers in order, moving on for good once the next layer does not fit; None if they run out."""
    found, devices = [], iter(room)
    device, left = next(devices)
    for size in sizes:
        while size > left:
            following = next(devices, None)
            if following is None:
                return None
            device, left = following
        found.append(device)
        left -= size
    return found


def _device_map(parts: _Parts, main: str, devices: Sequence[str]) -> DeviceMap:
    used = {main: parts.fixed_bytes}
    for device, size in zip(devices, parts.layer_bytes, strict=True):
        used[device] = used.get(device, 0) + size
    return DeviceMap(main, parts.fixed, parts.layers, tuple(devices), used)


def _too_small(parts: _Parts, memory: Mapping[str, int]) -> str:
    here = ", ".join(f"{device} {format_bytes(size)}" for device, size in memory.items() if size < ENDLESS)
    least, most = parts.fixed_bytes + parts.largest, max((s for d, s in memory.items() if d != DISK), default=0)
    if most < least:
        what = "embeddings, output layer and the largest layer" if parts.layers else "the model, which has no list of layers"
        need = f"one device must hold {format_bytes(least)} ({what}), {format_bytes(least - most)} more than any device has"
    else:
        need = f"all devices together lack {format_bytes(parts.total + parts.largest - sum(memory.values()))}"
    return (
        f"this model of {format_bytes(parts.total)} does not fit: {need}; usable: {here}. Free memory, raise "
        "backbone.placement.max_memory, lower backbone.placement.reserve, or use a smaller model or precision"
    )


# -- parts of a model ---------------------------------------------------------------------------------------------------


def _parts(model: nn.Module, precision: str) -> _Parts:
    path, sizes = _layers_path(model), weight_sizes(model, precision)
    # Without a list of layers the model can only be placed as a whole.
    if path is None:
        return _Parts(tuple(_children(model, "")), sizes.total, (), ())
    layers = tuple(f"{path}.{name}" for name, _ in model.get_submodule(path).named_children())
    held = tuple(sizes.within(layer) for layer in layers)
    return _Parts(tuple(_beside(model, path)), sizes.total - sum(held), layers, held)


def _layers_path(model: nn.Module) -> str | None:
    """Return the name of the list of decoder layers: the `ModuleList` with the most weights."""
    lists = {n: sum(p.numel() for p in m.parameters()) for n, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    return max(lists, key=lambda name: lists[name]) if lists else None


def _beside(model: nn.Module, path: str) -> Iterator[str]:
    """Yield the names of all modules and parameters that do not contain `path`."""
    steps = path.split(".")
    # On the way down to the list of layers, everything but the next step.
    for depth, step in enumerate(steps):
        parent = ".".join(steps[:depth])
        yield from (name for name in _children(model.get_submodule(parent), parent) if name != ".".join([*steps[:depth], step]))


def _children(module: nn.Module, name: str) -> Iterator[str]:
    prefix = f"{name}." if name else ""
    loose = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    yield from (prefix + child for child, _ in [*module.named_children(), *loose])
