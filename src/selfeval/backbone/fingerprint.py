"""What tells one base from another, so that a role is never loaded on a base that it was not trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from selfeval.backbone.load import LoadedModel
from selfeval.store import fingerprint

__all__ = ["base_fingerprint"]


def base_fingerprint(loaded: LoadedModel) -> str:
    """Names, shapes and sums of some numbers of every weight, read from the files: the same in every precision and placement.

    A stretched context is another base: the same weights give other numbers on it.
    """
    weights = _of_files(loaded.files) if loaded.files else _of_memory(loaded.model)
    return fingerprint([*([["rope", str(loaded.stretch)]] if loaded.stretch else []), *sorted(weights)])


def _sum(sample: Tensor) -> str:
    """A sum that is the same whatever floating-point format the numbers were stored in."""
    return f"{sample.bfloat16().double().sum().item():.10e}"


def _of_files(files: Sequence[Path]) -> Iterator[list[Any]]:
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                shape = part.get_shape()
                rows = [part[i : i + 1].reshape(-1) for i in range(0, shape[0], max(1, shape[0] // 4))] if shape else []
                yield [name, shape, _sum(torch.cat(rows) if rows else file.get_tensor(name))]


def _of_memory(model: Any) -> Iterator[list[Any]]:
    """For a model that was made in memory."""
    for name, parameter in model.named_parameters():
        yield [name, list(parameter.shape), _sum(parameter.detach().reshape(-1)[:: max(1, parameter.numel() // 64)])]
