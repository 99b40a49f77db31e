"""The devices that a plan is made for, and the memory that a process takes there before it loads a model."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from selfeval.backbone.load import memory_within
from selfeval.backbone.meters import resident_bytes
from selfeval.backbone.placement import DISK, ENDLESS, free_memory
from selfeval.config import BackboneConfig
from selfeval.errors import ConfigError

__all__ = ["Machine"]


@dataclass(frozen=True)
class Machine:
    """The devices to plan for: those of this machine, or those named by the user.

    Attributes:
        memory: free bytes by device, in the order of use: cards, cpu, disk.
        limit: maximum bytes per device, if less than the free bytes.
        runtime: bytes of RAM used by the process itself: Python, torch and the other libraries.
    """

    memory: Mapping[str, int]
    limit: int | None = None
    runtime: int = 0

    @classmethod
    def of(cls, config: BackboneConfig, named: Mapping[str, int] | None = None) -> Machine:
        """Return the machine that a backbone runs on.

        Args:
            config: its `device` and `memory_budget` are used.
            named: Optional. Free bytes of the devices to plan for. Default: the devices of this machine.

        Raises:
            ConfigError: `backbone.device = cuda` with named devices, none of which is a card.
        """
        runtime = _runtime_bytes()
        if named:
            cards = {name: size for name, size in sorted(named.items()) if name.startswith("cuda:")}
            if config.device == "cuda" and not cards:
                raise ConfigError(
                    f"backbone.device = cuda, but the devices named are {', '.join(named)}; name a card too: cuda:0=24GiB"
                )
            beside = {"cpu": named.get("cpu", 0), DISK: named.get(DISK, ENDLESS)}
            return cls((cards if config.device != "cpu" else {}) | beside, config.memory_budget, runtime)
        # If the configuration asks for a GPU that this machine lacks, plan for one without a known limit. It comes first,
        # because the devices are in the order of use.
        wants_card = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
        here = free_memory(torch.device("cuda" if wants_card and torch.cuda.is_available() else "cpu"))
        pretended = {"cuda:0": ENDLESS} if wants_card and not torch.cuda.is_available() else {}
        return cls(pretended | here, config.memory_budget, runtime)

    @property
    def kind(self) -> str:
        """Device type that computes: cuda or cpu."""
        return "cuda" if any(name.startswith("cuda:") for name in self.memory) else "cpu"

    @property
    def weights(self) -> dict[str, int]:
        """Free bytes as seen when loading."""
        return memory_within(self.memory, self.limit)

    def budget(self, device: str) -> int | None:
        """Return the total bytes that a run may use on a device.

        In RAM this includes the process itself, which the free bytes do not.
        """
        free = self.memory[device] + (self.runtime if device == "cpu" else 0)
        found = free if self.limit is None or device == DISK else min(free, self.limit)
        return None if found >= ENDLESS else found


def _runtime_bytes() -> int:
    """Measure the memory of this process after importing a run's libraries and triggering their lazy initialisation."""
    importlib.import_module("selfeval.stages.pipeline")
    # One forward and backward pass and one optimizer step, so the memory that torch takes at their first use is included.
    weight = torch.zeros(64, 64, requires_grad=True)
    query, key, value = (torch.zeros(1, 2, 8, 16, requires_grad=True) for _ in range(3))
    torch.nn.functional.scaled_dot_product_attention(query, key, value).sum().backward()
    torch.log_softmax(torch.zeros(64, 64) @ weight, dim=-1).sum().backward()
    torch.optim.AdamW([weight]).step()
    return resident_bytes()
