"""State of each stage: its key, the fingerprint of its inputs, and the hash of every file it wrote.

The hashes of a finished stage are in its manifest. Before that, those of its shards are in its journal, `written.json`, which
records the hash of a shard before the shard is written. A shard without a journal entry was not written by this version
and is recreated.

Everything is read without the run's lock: `score`, `export`, `show` and `report` can check files during a run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from selfeval.errors import RunFolderError
from selfeval.store.files import content_hash, fingerprint, read_object, write_json
from selfeval.store.run_file import check_run_values

__all__ = [
    "JOURNAL",
    "check_files",
    "damaged_files",
    "has_manifest",
    "hashes",
    "journal_of",
    "missing_files",
    "note_shards",
    "read_journal",
    "read_key",
    "read_manifest",
    "read_run",
    "read_sealed",
    "write_sealed",
]

JOURNAL = "written.json"
"""Journal in a stage's folder: hashes of its shards and of their dropped records, by path relative to the run folder."""

_SEAL = "hash"
_REBUILD_RUN = "remove it and give the whole command again: the recipe or --model, --seeds and every --set"


def write_sealed(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object with a hash of its content, to detect any later change."""
    unsealed = {key: value for key, value in values.items() if key != _SEAL}
    write_json(path, {**unsealed, _SEAL: fingerprint(unsealed)})


def _refuse_changed(path: Path, values: Mapping[str, Any], remedy: str) -> None:
    unsealed = {key: value for key, value in values.items() if key != _SEAL}
    if values[_SEAL] != fingerprint(unsealed):
        raise RunFolderError(f"{path} is damaged (a value of it is not what was written); {remedy}")


def read_sealed(path: Path, *keys: str, remedy: str) -> dict[str, Any]:
    """Read an object written by `write_sealed`.

    Args:
        path: path of the file.
        keys: required keys.
        remedy: advice for the error message if the file is missing or damaged.

    Raises:
        RunFolderError: the file is missing or damaged.
    """
    values = read_object(path, *keys, _SEAL, remedy=remedy)
    _refuse_changed(path, values, remedy)
    return values


def read_run(root: Path) -> dict[str, Any]:
    """Read run.json.

    Raises:
        RunFolderError: the file is missing or damaged.
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
    """Read the manifest of a finished stage.

    Raises:
        RunFolderError: the manifest is missing or damaged.
    """
    path, remedy = root / stage / "manifest.json", "remove it and give the same command again"
    return read_sealed(path, "key", "inputs", "counts", "files", "also", remedy=remedy)


def read_key(root: Path, stage: str) -> dict[str, Any]:
    """`key` and `inputs` of a stage's work so far, from key.json or else from the manifest; empty before it began."""
    path = root / stage / "key.json"
    if path.exists():
        return read_object(path, "key", remedy="remove it and give the same command again")
    if has_manifest(root, stage):
        values = read_manifest(root, stage)
        return {"key": values["key"], "inputs": values["inputs"]}
    return {}


def journal_of(name: str) -> str:
    """The folder whose journal has the hash of a shard, or of a shard's dropped records, given by its path in the run."""
    return Path(name).parent.as_posix().removeprefix("dropped/")


def read_journal(root: Path, stage: str) -> dict[str, str]:
    """Read the hash of every shard of a stage, by path in the run folder; empty if there is no journal.

    Raises:
        RunFolderError: the journal is damaged.
    """
    path = root / stage / JOURNAL
    if not path.exists():
        return {}
    remedy = "remove it and give the same command again, which makes the shards of this folder again"
    found = read_sealed(path, "shards", remedy=remedy)["shards"]
    if not isinstance(found, dict):
        raise RunFolderError(f"{path} is damaged (its shards are a {type(found).__name__}, expected an object); {remedy}")
    return found


def note_shards(root: Path, stage: str, hashes: Mapping[str, str]) -> None:
    """Add hashes to a stage's journal."""
    write_sealed(root / stage / JOURNAL, {"shards": {**read_journal(root, stage), **hashes}})


def _written(root: Path, stage: str) -> dict[str, str]:
    values = read_manifest(root, stage)
    return {**values["files"], **values["also"]}


def missing_files(root: Path, stage: str) -> list[str]:
    """Return the missing files of a finished stage."""
    return [name for name in _written(root, stage) if not (root / name).is_file()]


def damaged_files(root: Path, stage: str) -> list[str]:
    """Return the files of a finished stage whose content has changed since it was written."""
    return [name for name, written in _written(root, stage).items() if not _is(root / name, written)]


def _is(path: Path, written: str) -> bool:
    return not path.is_file() or content_hash(path) == written


def check_files(root: Path, paths: Iterable[Path]) -> None:
    """Refuse files whose content differs from the hash recorded by their stage.

    Args:
        root: run folder.
        paths: files of the run; a folder stands for all files in it. Files without a recorded hash are skipped.

    Raises:
        RunFolderError: a file is damaged, or a file of one of the folders is missing.
    """
    noted = _in_journals(root)
    noted.update({n: h for path in sorted(root.glob("*/manifest.json")) for n, h in _written(root, path.parent.name).items()})
    for path in paths:
        wanted = path.relative_to(root).as_posix()
        for name, written in noted.items():
            if name == wanted or name.startswith(f"{wanted}/"):
                _refuse_damaged(root / name, written)


def _in_journals(root: Path) -> dict[str, str]:
    """The shards of unfinished stages; one that was noted and not written before a kill is not missed."""
    unfinished = [path.parent.name for path in root.glob(f"*/{JOURNAL}") if not has_manifest(root, path.parent.name)]
    noted = {name: written for stage in unfinished for name, written in read_journal(root, stage).items()}
    return {name: written for name, written in noted.items() if (root / name).is_file()}


def _refuse_damaged(path: Path, written: str) -> None:
    if not path.is_file():
        raise RunFolderError(f"{path} is missing; `selfeval run --output DIR` makes it again, or put back a good copy")
    if not _is(path, written):
        raise RunFolderError(
            f"{path} is damaged: its content is not what was written. Put back a good copy, or remove it and make it again: "
            "selfeval run --output DIR"
        )


def hashes(root: Path, paths: Iterable[Path]) -> dict[str, str]:
    """Hash the content of each file, recursing into folders and skipping journals, by path relative to the run folder."""
    files = [f for path in paths for f in (path.rglob("*") if path.is_dir() else [path])]
    return {f.relative_to(root).as_posix(): content_hash(f) for f in sorted(files) if f.is_file() and f.name != JOURNAL}
