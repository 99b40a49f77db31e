"""Hashes of a model's files and weights, by which changed or other weights are noticed, be it one number of them.

A weight's hash is that of its bytes in the file, with its name, type and shape. So a fingerprint is the same on every device,
in every precision that the base is loaded in, and for the same tensors in one file or in several. Copies of a model that are
stored in different precisions (a bf16 and an fp32 folder) are different models: their numbers differ.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from selfeval.backbone.digests import tensor_digests
from selfeval.backbone.load import LoadedModel
from selfeval.backbone.snapshot import READ, model_folder
from selfeval.backbone.weights import weight_files
from selfeval.errors import ModelError
from selfeval.store import file_hash, fingerprint

__all__ = ["base_fingerprint", "model_identity"]


def base_fingerprint(loaded: LoadedModel) -> str:
    """Hash of every weight of a base; a role belongs to the base with this fingerprint.

    A stretched context is another base: the same weights give other numbers on it.
    """
    weights = _of_files(loaded.files) if loaded.files else _of_memory(loaded.model)
    return fingerprint([*([["rope", str(loaded.stretch)]] if loaded.stretch else []), *weights])


def model_identity(name: str) -> Any:
    """All that loading reads of a model: the hash of each weight and of each other file, of a hub id those in the cache.

    Every byte is read, once in a process: hashes are kept by path, size and time of the last change.

    Raises:
        ModelError: a hub id that is not in the cache (`ensure_snapshot` downloads it), or no such folder.
    """
    folder = model_folder(name)
    if folder is None:
        raise ModelError(
            f"model {name} is neither a local folder nor in the Hub cache; download it first, or pass another model"
        )
    paths = [*folder.iterdir(), *(folder / "additional_chat_templates").glob("*.jinja")]
    # Not the index, because the same weights in one file or in several are the same model.
    read = sorted(p for p in paths if p.suffix in READ and p.is_file() and not p.name.endswith(".safetensors.index.json"))
    return [[[p.relative_to(folder).as_posix(), file_hash(p)] for p in read], _weights_in(folder)]


def _weights_in(folder: Path) -> list[Any]:
    try:
        return _of_files(weight_files(str(folder)))
    except ModelError:  # not usable, as loading will say
        return [[path.name, file_hash(path)] for path in sorted(folder.glob("*.safetensors"))]


def _of_files(files: tuple[Path, ...]) -> list[Any]:
    return [[digest.name, digest.dtype, digest.shape, digest.hash] for digest in tensor_digests(files)]


def _of_memory(model: Any) -> list[Any]:
    """For a model that was made in memory."""
    found = []
    for name, parameter in sorted(model.named_parameters()):
        # As bytes, because NumPy has no bfloat16.
        values = parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        found.append([name, str(parameter.dtype), list(parameter.shape), hashlib.sha256(values).hexdigest()])
    return found
