"""Checkpoints that resume bit for bit: role weights, heads, optimizer states, and the numbers a loop carries along.

Tensors go to safetensors and numbers to JSON; nothing is pickled. A checkpoint is a folder that appears whole or not at
all; the one before it is removed only then.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import AdamW

from selfeval.backbone.roles import Backbone
from selfeval.store import read_json, write_json, writing

__all__ = ["Checkpoints", "role_optimizer"]


def role_optimizer(parameters: Mapping[str, nn.Parameter], learning_rate: float) -> AdamW:
    """AdamW without decay over a role's weights."""
    return AdamW(list(parameters.values()), lr=learning_rate, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)


class Checkpoints:
    """The checkpoints of one stage: folders `step-N` of which the newest counts.

    Args:
        folder: where they lie.
        backbone: holds the roles.
        roles: which roles are saved.
        optimizers: by role.
    """

    def __init__(self, folder: Path, backbone: Backbone, roles: Sequence[str], optimizers: Mapping[str, AdamW]) -> None:
        self.folder, self.backbone, self.roles, self.optimizers = folder, backbone, roles, optimizers

    def beside(self, name: str) -> Checkpoints:
        """Further checkpoints of the same roles, in a folder within this one's."""
        return Checkpoints(self.folder / name, self.backbone, self.roles, self.optimizers)

    def _saved(self) -> list[tuple[int, int, Path]]:
        """Step, how often that step was saved before, and folder; the newest is the last."""
        found = []
        for path in self.folder.glob("step-*"):
            step, _, times = path.name.removeprefix("step-").partition(".")
            found.append((int(step), int(times or 0), path))
        return sorted(found)

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Writes a checkpoint for `step`, then removes the others.

        One of the same step (the loop went back to it) stays until the new one is there, so that there always is one.
        """
        others = self._saved()
        before = [times for number, times, _ in others if number == step]
        tensors = {
            f"role/{r}/{n}": p.detach().cpu().contiguous() for r in self.roles for n, p in self.backbone.parameters(r).items()
        }
        for role, optimizer in self.optimizers.items():
            tensors.update({f"optimizer/{role}/{name}": value for name, value in self._optimizer_tensors(role, optimizer)})
        name = f"step-{step:06d}.{max(before) + 1}" if before else f"step-{step:06d}"
        with writing(self.folder / name) as temporary:
            temporary.mkdir(parents=True)
            save_file(tensors, temporary / "state.safetensors")
            write_json(temporary / "state.json", {"step": step, **state})
        for _, _, path in others:
            shutil.rmtree(path)

    def _optimizer_tensors(self, role: str, optimizer: AdamW) -> list[tuple[str, Tensor]]:
        found = []
        for name, parameter in self.backbone.parameters(role).items():
            for key, value in optimizer.state.get(parameter, {}).items():
                found.append((f"{name}/{key}", torch.as_tensor(value).detach().cpu().contiguous()))
        return found

    def restore(self) -> dict[str, Any] | None:
        """Puts the newest checkpoint back into roles and optimizers and returns its numbers, or None if there is none."""
        saved = self._saved()
        if not saved:
            return None
        path = saved[-1][-1]
        tensors = load_file(path / "state.safetensors")
        for optimizer in self.optimizers.values():
            optimizer.state.clear()  # going back before the first step leaves none
            optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for role in self.roles:
                for name, parameter in self.backbone.parameters(role).items():
                    parameter.copy_(tensors[f"role/{role}/{name}"])
        for role, optimizer in self.optimizers.items():
            for name, parameter in self.backbone.parameters(role).items():
                prefix = f"optimizer/{role}/{name}/"
                state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
                if state:
                    optimizer.state[parameter] = {k: v if k == "step" else v.to(parameter.device) for k, v in state.items()}
        return dict(read_json(path / "state.json"))
