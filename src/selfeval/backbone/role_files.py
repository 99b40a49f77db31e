"""Files of a saved role, with content hashes that prevent loading a damaged role."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from selfeval.errors import RunFolderError
from selfeval.store import content_hash, read_object, write_json

__all__ = ["check_role", "save_adapter_config", "seal_role"]

_SEALED = ("adapter_config.json", "adapter_model.safetensors", "head.safetensors")


def save_adapter_config(config: Any, folder: Path) -> None:
    """Write PEFT's adapter_config.json with its lists of names in order.

    PEFT holds these names in sets, and writes them in the order of the set: another one in every process, as it depends on
    PYTHONHASHSEED.
    """
    config.save_pretrained(str(folder))
    path = folder / "adapter_config.json"
    values = read_object(path)
    unordered = [name for name in values if isinstance(getattr(config, name, None), set)]
    write_json(path, {**values, **{name: sorted(values[name]) for name in unordered}})


def seal_role(folder: Path, base: str, base_fingerprint: str) -> None:
    """Write role.json: the base that the role belongs to, and the hash of each of its files."""
    files = {name: content_hash(folder / name) for name in _SEALED if (folder / name).is_file()}
    write_json(folder / "role.json", {"base": base, "base_fingerprint": base_fingerprint, "files": files})


def check_role(folder: Path) -> dict[str, Any]:
    """The contents of role.json, when every file of the role is what was written.

    Raises:
        RunFolderError: a file is missing or damaged.
    """
    remedy = f"put back a good copy, or remove {folder} and give the command that wrote it again"
    origin = read_object(folder / "role.json", "base", "base_fingerprint", "files", remedy=remedy)
    files = origin["files"] if isinstance(origin["files"], dict) else {}
    if not {"adapter_config.json", "adapter_model.safetensors"} <= files.keys():
        raise RunFolderError(f"{folder / 'role.json'} is damaged (it does not name the role's files); {remedy}")
    for name, written in files.items():
        path = folder / name
        if not path.is_file():
            raise RunFolderError(f"{path} is missing; {remedy}")
        if content_hash(path) != written:
            raise RunFolderError(f"{path} is damaged: its content is not what was written there; {remedy}")
    return origin
