"""What is known of each stage's work: its key, what it was made from, and the hash of every file that it wrote.

All of it is read without the run's lock, so that `score`, `export`, `show` and `report` use only what is whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from selfeval.errors import RunFolderError
from selfeval.store.files import content_hash, fingerprint, read_object, write_json
from selfeval.store.run_file import check_run_values

__all__ = [
    "check_files",
    "damaged_files",
    "has_manifest",
    "hashes",
    "missing_files",
    "read_key",
    "read_manifest",
    "read_run",
    "write_sealed",
]

_SEAL = "hash"
_REBUILD_RUN = "remove it and give the whole command again: the recipe or --model, --seeds and every --set"


def write_sealed(path: Path, values: Mapping[str, Any]) -> None:
    """Writes an object with a hash of itself, so that a change of any value is noticed."""
    unsealed = {key: value for key, value in values.items() if key != _SEAL}
    write_json(path, {**unsealed, _SEAL: fingerprint(unsealed)})


def _refuse_changed(path: Path, values: Mapping[str, Any], remedy: str) -> None:
    unsealed = {key: value for key, value in values.items() if key != _SEAL}
    if values[_SEAL] != fingerprint(unsealed):
        raise RunFolderError(f"{path} is damaged (a value of it is not what was written); {remedy}")


def read_run(root: Path) -> dict[str, Any]:
    """The contents of run.json.

    Raises:
        RunFolderError: it is missing or damaged.
    """
    path = root / "run.json"
    if not path.exists():
        raise RunFolderError(f"{root} is not a run (no run.json); give the folder that `selfeval run` wrote")
    values = read_object(path, remedy=_REBUILD_RUN)
    if _SEAL in values:
        _refuse_changed(path, values, _REBUILD_RUN)
    check_run_values(path, values, _REBUILD_RUN)
    return values


def has_manifest(root: Path, stage: str) -> bool:
    return (root / stage / "manifest.json").is_file()


def read_manifest(root: Path, stage: str) -> dict[str, Any]:
    """The manifest of a finished stage.

    Raises:
        RunFolderError: it is missing or damaged.
    """
    path, remedy = root / stage / "manifest.json", "remove it and give the same command again"
    values = read_object(path, "key", "inputs", "counts", "files", "also", _SEAL, remedy=remedy)
    _refuse_changed(path, values, remedy)
    return values


def read_key(root: Path, stage: str) -> dict[str, Any]:
    """`key` and `inputs` of a stage's work so far, from key.json or else from the manifest; empty before it began."""
    path = root / stage / "key.json"
    if path.exists():
        return read_object(path, "key", remedy="remove it and give the same command again")
    if has_manifest(root, stage):
        values = read_manifest(root, stage)
        return {"key": values["key"], "inputs": values["inputs"]}
    return {}


def _written(root: Path, stage: str) -> dict[str, str]:
    values = read_manifest(root, stage)
    return {**values["files"], **values["also"]}


def missing_files(root: Path, stage: str) -> list[str]:
    """The files of a finished stage that are not there."""
    return [name for name in _written(root, stage) if not (root / name).is_file()]


def damaged_files(root: Path, stage: str) -> list[str]:
    """The files of a finished stage whose content is not what was written."""
    return [name for name, written in _written(root, stage).items() if not _is(root / name, written)]


def _is(path: Path, written: str) -> bool:
    return not path.is_file() or content_hash(path) == written


def check_files(root: Path, paths: Iterable[Path]) -> None:
    """Refuses files whose content is not what the stage that wrote them noted.

    Args:
        root: of the run.
        paths: files of it; folders stand for all files in them. A file that no finished stage wrote is passed over.

    Raises:
        RunFolderError: a file is damaged, or a file of one of the folders is missing.
    """
    noted = {n: h for path in sorted(root.glob("*/manifest.json")) for n, h in _written(root, path.parent.name).items()}
    for path in paths:
        wanted = path.relative_to(root).as_posix()
        for name, written in noted.items():
            if name == wanted or name.startswith(f"{wanted}/"):
                _refuse_damaged(root / name, written)


def _refuse_damaged(path: Path, written: str) -> None:
    if not path.is_file():
        raise RunFolderError(f"{path} is missing; `selfeval run --output DIR` makes it again, or put back a good copy")
    if not _is(path, written):
        raise RunFolderError(
            f"{path} is damaged: its content is not what was written. Put back a good copy, or remove it and make it again: "
            "selfeval run --output DIR"
        )


def hashes(root: Path, paths: Iterable[Path]) -> dict[str, str]:
    """Hash of the content of each file, those in folders included, by its path in the run folder."""
    files = [f for path in paths for f in (path.rglob("*") if path.is_dir() else [path])]
    return {f.relative_to(root).as_posix(): content_hash(f) for f in sorted(files) if f.is_file()}
