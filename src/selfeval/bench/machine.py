"""Describe the machine and the versions that a measurement belongs to."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from selfeval import __version__
from selfeval.backbone.threads import usable_cores

__all__ = ["describe_machine"]


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return processor, cores, threads, device and versions.

    Args:
        device: device of the model.
    """
    return {
        "processor": _processor(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "python": platform.python_version(),
        "selfeval": __version__,
        **{name: version(name) for name in ("torch", "transformers", "peft")},
    }


def _processor(path: Path = Path("/proc/cpuinfo")) -> str:
    """Return the model of the CPU; the architecture where the system does not name it."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names and names[0] else platform.processor() or platform.machine()
