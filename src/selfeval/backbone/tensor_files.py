"""Tensors of roles and checkpoints, read from files that may come from an untrusted folder.

A hash shows damage, but a forged folder has matching hashes. Every file, name and shape is therefore checked before a weight
is changed: `Tensor.copy_` would broadcast a tensor of another shape without an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from selfeval.errors import RunFolderError

__all__ = ["check_shapes", "copy_tensors", "read_tensors"]


def read_tensors(path: Path, remedy: str) -> dict[str, Tensor]:
    """Read a safetensors file.

    Args:
        path: path of the file.
        remedy: advice for the error message.

    Raises:
        RunFolderError: the file is not a safetensors file.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise RunFolderError(f"{path} is damaged (it is not a safetensors file: {error}); {remedy}") from error


def check_shapes(wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor], path: Path, remedy: str) -> None:
    """Check that a file has a tensor of the same shape for each wanted one.

    Args:
        wanted: tensors by their names in the file.
        tensors: content of the file.
        path: path of the file, for the error message.
        remedy: advice for the error message.

    Raises:
        RunFolderError: a tensor is missing or has another shape.
    """
    for name, tensor in wanted.items():
        if name not in tensors:
            raise RunFolderError(f"{path} is damaged (it has no tensor {name}); {remedy}")
        if tensors[name].shape != tensor.shape:
            shapes = f"{list(tensors[name].shape)}, expected {list(tensor.shape)}"
            raise RunFolderError(f"{path} is damaged (its tensor {name} has shape {shapes}); {remedy}")


def copy_tensors(target: Mapping[str, Tensor], tensors: Mapping[str, Tensor], path: Path, remedy: str) -> None:
    """Copy tensors of a file into existing ones; see `check_shapes`.

    Raises:
        RunFolderError: a tensor is missing or has another shape; nothing was copied.
    """
    check_shapes(target, tensors, path, remedy)
    with torch.no_grad():
        for name, tensor in target.items():
            tensor.copy_(tensors[name])
