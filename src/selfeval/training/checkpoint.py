"""Bit-exact checkpoints: role weights, heads, optimizer states and the state of the training loop.

Tensors are written to safetensors and numbers to JSON; nothing is pickled. A checkpoint is a folder that is written atomically
and records the hash of each of its files. The newest two are kept: if the newest is damaged, training resumes from the other.

Of several processes that train together, process 0 alone reads and writes files. A checkpoint does not depend on their number.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import AdamW

from selfeval.backbone.process_group import by_first, gather_outcomes
from selfeval.backbone.roles import Backbone
from selfeval.backbone.tensor_files import check_shapes, read_tensors
from selfeval.errors import LostWorkError, ProcessGroupError, RunFolderError
from selfeval.links import stays_inside
from selfeval.store import file_hash, read_object, read_sealed, write_json, write_sealed, writing

__all__ = ["Checkpoints", "role_optimizer"]

_TENSOR = "in state.safetensors"
"""Key of the placeholder that replaces a tensor in state.json."""

_MANIFEST = "manifest.json"


def role_optimizer(parameters: Mapping[str, nn.Parameter], learning_rate: float) -> AdamW:
    """Create the AdamW optimizer of a role's weights, without weight decay."""
    return AdamW(list(parameters.values()), lr=learning_rate, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)


class Checkpoints:
    """Checkpoint manager of one training run; keeps the newest two folders `step-N`.

    Args:
        folder: where the checkpoints are stored.
        backbone: the model that has the roles.
        roles: names of the roles to save.
        optimizers: optimizer of each trained role.
        metrics: Optional. Files that the training appends to. Each checkpoint has a copy of them, which `restore` puts back.
        written: Optional. Returns the files that the training has written up to a step. Their hashes are stored in the
            checkpoint and verified by `restore`.
        check: Optional. Called before anything is written; it raises if this process may not write. Default: it may.
    """

    def __init__(
        self,
        folder: Path,
        backbone: Backbone,
        roles: Sequence[str],
        optimizers: Mapping[str, AdamW],
        *,
        metrics: Sequence[Path] = (),
        written: Callable[[int], Sequence[Path]] = lambda step: (),
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder, self.backbone, self.roles, self.optimizers = folder, backbone, roles, optimizers
        self._metrics, self._written, self._check = metrics, written, check
        self._last: Path | None = None
        """The checkpoint that was saved or restored last; the next `save` keeps it, or else the newest."""

    def beside(self, name: str) -> Checkpoints:
        """Return a manager of the same roles for the subfolder `name`, without metrics and written files.

        `restore` of that manager restores weights, optimizers and state only. The caller decides about the training's files:
        a recorder that is informed with `rolled_back` removes the metrics of later iterations and keeps their samples.
        """
        return Checkpoints(self.folder / name, self.backbone, self.roles, self.optimizers, check=self._check)

    @property
    def _name(self) -> str:
        """Name of the folder in the run: processes that are at other trainings must notice it."""
        return "/".join(self.folder.parts[-2:])

    def _saved(self) -> list[tuple[int, int, Path]]:
        """Return (step, number of earlier saves of that step, folder) of each checkpoint, oldest first."""
        found = []
        for path in self.folder.glob("step-*"):
            step, _, times = path.name.removeprefix("step-").partition(".")
            if step.isdecimal() and (times or "0").isdecimal():
                found.append((int(step), int(times or 0), path))
        return sorted(found)

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Write a checkpoint, then remove all others except the previous one.

        If the step was saved before (the training rolled back), the old checkpoint is kept until the new one is complete.

        Args:
            step: number of the step.
            state: state of the loop: JSON values, with tensors at any depth.

        Raises:
            ProcessGroupError: the processes of the training have different weights.
        """
        tensors = {
            # safetensors raises an error for a tensor that is not contiguous.
            f"role/{r}/{n}": p.detach().cpu().contiguous()
            for r in self.roles
            for n, p in self.backbone.roles.parameters(r).items()
        }
        for role, optimizer in self.optimizers.items():
            tensors.update({f"optimizer/{role}/{name}": value for name, value in self._optimizer_tensors(role, optimizer)})
        processes = self.backbone.budget.processes
        if processes.size > 1:
            digests = gather_outcomes(processes, f"hash of step {step} in {self._name}", _digest(tensors), None)
            _refuse_different(digests, step)
        by_first(processes, f"checkpoint of step {step} in {self._name}", lambda: self._write(step, state, tensors))

    def _write(self, step: int, state: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
        self._check()
        others = self._saved()
        before = [times for number, times, _ in others if number == step]
        numbers = _without_tensors(state, "state", tensors)
        # A step that was saved before gets a new folder: replacing the old one would leave neither, if killed in between.
        target = self.folder / (f"step-{step:06d}.{max(before) + 1}" if before else f"step-{step:06d}")
        with writing(target) as temporary:
            temporary.mkdir(parents=True)
            save_file(tensors, temporary / "state.safetensors")
            write_json(temporary / "state.json", {"step": step, **numbers})
            self._copy_metrics(temporary / "metrics")
            # Last, because it hashes all other files of the folder.
            write_sealed(temporary / _MANIFEST, self._manifest(temporary, step))
            self._check()  # again, as a large checkpoint takes long to write
        # Only once the new folder is complete. A kill in this loop leaves one checkpoint too many, perhaps damaged; `restore`
        # starts with the newest, and the next save removes the rest.
        previous = self._last or (others[-1][2] if others else None)
        for _, _, path in others:
            if path != previous:
                shutil.rmtree(path)
        self._last = target

    def _copy_metrics(self, folder: Path) -> None:
        for path in self._metrics:
            if path.is_file():
                folder.mkdir(exist_ok=True)
                shutil.copyfile(path, folder / path.name)

    def _manifest(self, folder: Path, step: int) -> dict[str, Any]:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {
            "files": {str(path.relative_to(folder)): file_hash(path) for path in files},
            "written": {path.name: file_hash(path) for path in self._written(step)},
        }

    def _optimizer_tensors(self, role: str, optimizer: AdamW) -> list[tuple[str, Tensor]]:
        found = []
        for name, parameter in self.backbone.roles.parameters(role).items():
            for key, value in optimizer.state.get(parameter, {}).items():
                found.append((f"{name}/{key}", torch.as_tensor(value).detach().cpu().contiguous()))
        return found

    def restore(self, step: int | None = None) -> dict[str, Any] | None:
        """Restore roles, optimizers and metrics from the newest checkpoint.

        If it is damaged, fall back to the previous one and report it.

        Args:
            step: Optional. Step whose checkpoint is preferred to newer ones. Default: the newest.

        Returns:
            The saved state of the loop, or None if there is no checkpoint.

        Raises:
            LostWorkError: all checkpoints are damaged, or a file that the training wrote is missing or has changed.
        """
        processes = self.backbone.budget.processes
        found = by_first(processes, f"reading the last checkpoint in {self._name}", lambda: self._read_newest(step))
        if found is None:
            return None
        values, tensors = found
        self._apply(tensors)
        if processes.rank == 0:
            assert self._last is not None
            self._restore_metrics(self._last / "metrics")
        return values

    def _read_newest(self, step: int | None) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """Return the state and the tensors of the newest intact checkpoint, or None if there is none; see `restore`."""
        # The sort is stable, so the checkpoints of that step come last, and the others keep their order.
        saved = [path for _, _, path in sorted(self._saved(), key=lambda found: found[0] == step)]
        faults: list[str] = []
        for path in reversed(saved):
            fault = _fault_of(path)
            if fault is None:
                self._say_passed_over(faults, path)
                # The next save keeps this one and removes the newer, damaged ones.
                self._last = path
                return self._read(path)
            faults.append(fault)
        if faults:
            raise LostWorkError(
                f"no checkpoint in {self.folder} can be used: {'; '.join(faults)}. Restore one from a backup, or retrain the "
                f"stage: remove {self.folder}, or rerun the same command with --restart"
            )
        return None

    def _say_passed_over(self, faults: Sequence[str], taken: Path) -> None:
        notify = self.backbone.budget.notify
        if faults and notify is not None:
            notify(f"{'; '.join(faults)}; resuming from the previous checkpoint, {taken.name}")

    def _read(self, path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the state of a verified checkpoint and its tensors, which fit the model."""
        # Before the first weight changes: an error must leave the model as it was.
        remedy = f"remove {path}, or rerun the same command with --restart"
        state = read_object(path / "state.json", "step", remedy=remedy)
        self._check_written(_hashes_of(path)["written"], state["step"])
        tensors = read_tensors(path / "state.safetensors", remedy)
        check_shapes(self._expected(tensors), tensors, path / "state.safetensors", remedy)
        try:
            values = dict(_with_tensors(state, tensors))
        except (KeyError, TypeError) as error:
            raise RunFolderError(f"{path / 'state.json'} names a tensor that is not in the checkpoint; {remedy}") from error
        return values, tensors

    def _apply(self, tensors: Mapping[str, Tensor]) -> None:
        """Put weights and moments of a checkpoint into roles and optimizers."""
        for optimizer in self.optimizers.values():
            optimizer.state.clear()  # a checkpoint from before the first step has no moments to overwrite the current ones
            optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for role in self.roles:
                for name, parameter in self.backbone.roles.parameters(role).items():
                    # In place: optimizers and adapters refer to these Parameter objects.
                    parameter.copy_(tensors[f"role/{role}/{name}"])
        for role, optimizer in self.optimizers.items():
            self._restore_optimizer(role, optimizer, tensors)

    def _expected(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a tensor of the expected shape for each weight, and for each optimizer moment in `tensors`."""
        weights = {role: self.backbone.roles.parameters(role) for role in {*self.roles, *self.optimizers}}
        found: dict[str, Tensor] = {f"role/{role}/{name}": p for role in self.roles for name, p in weights[role].items()}
        for role in self.optimizers:
            moments = {f"optimizer/{role}/{n}/{k}": p for n, p in weights[role].items() for k in ("exp_avg", "exp_avg_sq")}
            found.update({name: p for name, p in moments.items() if name in tensors})
        return found

    def _check_written(self, hashes: Mapping[str, str], step: int) -> None:
        for path in self._written(step):
            if not path.is_file() or file_hash(path) != hashes.get(path.name):
                problem = "does not match its recorded hash" if path.is_file() else "is missing"
                raise LostWorkError(
                    f"{path}, which this training wrote before it stopped, {problem}. Restore it from a backup, or "
                    "retrain the stage: rerun the same command with --restart"
                )

    def _restore_optimizer(self, role: str, optimizer: AdamW, tensors: Mapping[str, Tensor]) -> None:
        for name, parameter in self.backbone.roles.parameters(role).items():
            prefix = f"optimizer/{role}/{name}/"
            state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            if state:
                # AdamW, unless fused or capturable, has its step counter on the CPU; on a GPU, each step would wait for it.
                optimizer.state[parameter] = {k: v if k == "step" else v.to(parameter.device) for k, v in state.items()}

    def _restore_metrics(self, copies: Path) -> None:
        self._check()
        for path in self._metrics:
            copy = copies / path.name
            if copy.is_file():
                with writing(path) as temporary:
                    shutil.copyfile(copy, temporary)
            else:
                # The checkpoint is older than the first line of this file, so the repeated steps would log their lines twice.
                path.unlink(missing_ok=True)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """Return a hash of tensors on the CPU."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(name.encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _refuse_different(digests: Sequence[str], step: int) -> None:
    """Refuse to save the weights of process 0 if those of another process differ.

    Raises:
        ProcessGroupError: they differ.
    """
    others = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if others:
        raise ProcessGroupError(
            f"after step {step} the weights of process {', '.join(map(str, others))} differ from those of process 0 "
            f"({len(digests)} processes), so they no longer train one model; nothing was saved. Use the same hardware, "
            "versions and number of CPU threads for all of them, and repeat the command to resume from the last checkpoint"
        )


def _fault_of(path: Path) -> str | None:
    """Describe the damage of a checkpoint, or return None if all files are present with matching hashes."""
    try:
        files = _hashes_of(path)["files"]
        for name, written in files.items():
            if not (path / name).is_file():
                return f"checkpoint {path.name} is damaged ({name} is missing)"
            if file_hash(path / name) != written:
                return f"checkpoint {path.name} is damaged ({name} does not match its recorded hash)"
    except (OSError, TypeError, RunFolderError):
        return f"checkpoint {path.name} is damaged (its {_MANIFEST} is damaged)"
    return None if {"state.json", "state.safetensors"} <= files.keys() else f"checkpoint {path.name} is damaged"


def _hashes_of(path: Path) -> dict[str, dict[str, str]]:
    """Return the sections `files` and `written` of a checkpoint's manifest, each mapping names to hashes.

    Raises:
        RunFolderError: the manifest is missing or damaged.
        TypeError: a section is not a mapping of names to hashes.
    """
    manifest = read_sealed(path / _MANIFEST, "files", "written", remedy="the previous checkpoint is used")
    found = {key: manifest[key] for key in ("files", "written")}
    for hashes in found.values():
        if not isinstance(hashes, dict) or not all(isinstance(written, str) for written in hashes.values()):
            raise TypeError(f"{path / _MANIFEST} contains values that are not hashes")
        if not all(stays_inside(name) for name in hashes):
            raise TypeError(f"{path / _MANIFEST} contains names that are not files of the checkpoint")
    return found


def _without_tensors(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Return the value with each tensor replaced by a placeholder, and collect the tensors under their paths in the tree."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().contiguous()
        return {_TENSOR: name}
    if isinstance(value, Mapping):
        return {key: _without_tensors(part, f"{name}/{key}", tensors) for key, part in value.items()}
    return value


def _with_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        # Only a placeholder has this key and no other.
        if value.keys() == {_TENSOR}:
            return tensors[value[_TENSOR]]
        return {key: _with_tensors(part, tensors) for key, part in value.items()}
    return value
