"""The folder that a model is read from: one that is given, or the snapshot of a hub id in the local cache.

A hub id is a name that moves: its files change with every commit. A run is therefore tied to a snapshot.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from selfeval.backbone.check import errors_of_model
from selfeval.backbone.weights import weight_files
from selfeval.errors import ModelError

__all__ = ["READ", "commit_of", "ensure_snapshot", "model_folder"]

READ = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".py", ".spm", ".vocab", ".bpe")
"""Endings of what loading reads in a model folder besides weights: configs, tokenizer files, chat templates, remote code."""


def model_folder(name: str) -> Path | None:
    """The folder of a model: `name` itself, or the snapshot that a hub id stands for now; None where none is cached.

    The files of a snapshot are links into the cache, which readers follow.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    try:
        config = try_to_load_from_cache(name, "config.json")
    except HFValidationError:  # neither a folder nor the form of a hub id
        return None
    return Path(config).parent if isinstance(config, str) else None


def commit_of(name: str) -> str | None:
    """The commit of a hub id's snapshot in the cache; None for a folder of the user's."""
    folder = model_folder(name)
    return None if folder is None or Path(name).is_dir() else folder.name


def ensure_snapshot(name: str) -> None:
    """Download the files of a hub id that are not cached, so their content is known before they are used.

    Raises:
        ModelError: it cannot be downloaded, or has no safetensors files.
    """
    with errors_of_model(name):
        try:
            snapshot_download(name, allow_patterns=[f"*{ending}" for ending in READ])
        except LocalEntryNotFoundError as error:
            raise ModelError(f"model {name} is not in the cache, and the Hub cannot be reached; download it first") from error
        files = weight_files(name)
    if not files:
        raise ModelError(
            f"{name} has no weights in a supported format (model.safetensors); pickles (.bin) and GGUF are not supported: use "
            "a model with safetensors files, or download and convert it"
        )
