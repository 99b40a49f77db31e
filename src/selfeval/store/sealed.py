"""JSON files that contain a hash of their own content, so that any later change is detected."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from selfeval.errors import RunFolderError
from selfeval.store.files import fingerprint, read_object, write_json

__all__ = ["SEAL", "read_sealed", "refuse_changed", "write_sealed"]

SEAL = "hash"
"""Key of the hash in a sealed file."""


def write_sealed(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object with a hash of its content, to detect any later change."""
    unsealed = {key: value for key, value in values.items() if key != SEAL}
    write_json(path, {**unsealed, SEAL: fingerprint(unsealed)})


def read_sealed(path: Path, *keys: str, remedy: str) -> dict[str, Any]:
    """Read an object written by `write_sealed`.

    Args:
        path: path of the file.
        keys: required keys.
        remedy: advice for the error message if the file is missing or damaged.

    Raises:
        RunFolderError: the file is missing or damaged.
    """
    values = read_object(path, *keys, SEAL, remedy=remedy)
    refuse_changed(path, values, remedy)
    return values


def refuse_changed(path: Path, values: Mapping[str, Any], remedy: str) -> None:
    """Compare the content of a sealed file with its hash.

    Raises:
        RunFolderError: they differ.
    """
    unsealed = {key: value for key, value in values.items() if key != SEAL}
    if values[SEAL] != fingerprint(unsealed):
        raise RunFolderError(f"{path} is damaged (its values do not match their hash); {remedy}")
