"""The run folder: shards, manifests, metrics, and the lock that keeps a second process out.

Nothing is ever half written: every file is written beside itself and moved into place, and a stage's `manifest.json` is
written last, so that its existence means that the stage is finished. A stage whose key (its configuration and that of all
it depends on) has changed is moved to `replaced/`, never deleted.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from selfeval.errors import RunFolderError, StorageError
from selfeval.records import Drop, from_json, to_json

__all__ = ["RunStore", "fingerprint", "open_to_umask", "read_json", "write_json", "writing"]

R = TypeVar("R")


def fingerprint(value: Any) -> str:
    """Short content hash of a JSON-ready value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Yields a path beside `path` to write to, and moves it into place when the block succeeds.

    Raises:
        StorageError: the disk is full or cannot be written; what stood at `path` is untouched.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(temporary)
        yield temporary
        open_to_umask(temporary)
        _sync(temporary)
        if path.is_dir():
            _remove(path)
        os.replace(temporary, path)
    except BaseException as error:
        _remove(temporary)
        cause = _as_os_error(error)
        if cause is None:
            raise
        raise _storage_error(path, cause) from error


def open_to_umask(path: Path) -> None:
    """Give a file, or a folder and everything in it, the permissions that plain writing would have given it.

    safetensors 0.8 writes 0600 whatever the umask is, and copies keep the mode of their source: a colleague, or the server that
    a shared folder is mounted on, could not read the weights.
    """
    umask = os.umask(0o077)  # reading it means setting it; the stricter value cannot expose a file of another thread
    os.umask(umask)
    for found in (path, *path.rglob("*")):
        if not found.is_symlink():
            found.chmod((found.stat().st_mode | (0o777 if found.is_dir() else 0o666)) & ~umask & 0o777)


def _as_os_error(error: BaseException) -> OSError | None:
    """The system's error behind `error`; safetensors wraps those of its own writes in a text that ends in `(os error N)`."""
    if isinstance(error, OSError):
        return error
    found = re.search(r"\(os error (\d+)\)", str(error)) if isinstance(error, Exception) else None
    return OSError(int(found.group(1)), os.strerror(int(found.group(1)))) if found else None


def _storage_error(path: Path, error: OSError) -> StorageError:
    reasons = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up", errno.EACCES: "permission denied"}
    reason = reasons.get(getattr(error, "errno", None) or 0, str(error))
    return StorageError(f"cannot write {path}: {reason}. Nothing is lost: free some space and give the same command again")


def _sync(path: Path) -> None:
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    for file in files:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically."""
    with writing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> Any:
    """The JSON value in `path`.

    Raises:
        RunFolderError: the file is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunFolderError(f"{path} is missing; is {path.parent} a run folder?") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RunFolderError(f"{path} is damaged ({error}); remove it and run again to rebuild it") from error


class RunStore:
    """One run folder, held by one process.

    Args:
        root: the folder; created when it does not exist.

    Raises:
        RunFolderError: the folder exists and is not a run, or another process works in it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        if root.exists() and not root.is_dir():
            raise RunFolderError(f"output {root} is a file; give a folder")
        if root.exists() and any(root.iterdir()) and not self._is_run():
            raise RunFolderError(f"output folder {root} exists and is not a run (no run.json); give another --output")
        try:
            root.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(root / ".lock")
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise RunFolderError(f"another process works in {root}; wait for it, or name another folder") from error
        except OSError as error:
            raise _storage_error(root, error) from error

    def _is_run(self) -> bool:
        begun = (".lock", ".run.json.part")
        return (self.root / "run.json").is_file() or all(p.name in begun for p in self.root.iterdir())

    def close(self) -> None:
        """Lets another process in."""
        self._lock.release()

    # -- run.json ---------------------------------------------------------------------------------------------------

    @property
    def run(self) -> dict[str, Any]:
        """The contents of run.json (an empty dict before the first write)."""
        path = self.root / "run.json"
        return dict(read_json(path)) if path.exists() else {}

    def update_run(self, **values: Any) -> None:
        """Sets top-level values of run.json."""
        write_json(self.root / "run.json", {**self.run, **values})

    def record_stage(self, stage: str, **values: Any) -> None:
        """Updates one stage's row (state, seconds, counts) in run.json; seconds add up over interrupted tries."""
        stages = dict(self.run.get("stages", {}))
        row = dict(stages.get(stage, {}))
        row.update(values, seconds=round(row.get("seconds", 0.0) + values.get("seconds", 0.0), 2))
        stages[stage] = row
        self.update_run(stages=stages)

    # -- stages -----------------------------------------------------------------------------------------------------

    def folder(self, stage: str) -> Path:
        return self.root / stage

    def is_finished(self, stage: str) -> bool:
        """Whether the manifest exists, and every file that it names is still there."""
        path = self.folder(stage) / "manifest.json"
        return path.is_file() and all((self.root / name).is_file() for name in read_json(path)["files"])

    def check_files(self, stage: str) -> None:
        """Compares what a finished stage wrote with the hashes in its manifest.

        Raises:
            RunFolderError: a file is not what was written; the message names it.
        """
        for name, written in self.manifest(stage)["files"].items():
            if _sha256(self.root / name) != written:
                path = self.root / name
                raise RunFolderError(
                    f"{path} is not what was written there (its hash differs); remove it, and it is made again"
                )

    def content(self, stage: str) -> str:
        """Fingerprint of what a finished stage wrote and of what it was made from."""
        manifest = self.manifest(stage)
        return fingerprint([manifest["inputs"], manifest["files"]])

    def manifest(self, stage: str) -> dict[str, Any]:
        return dict(read_json(self.folder(stage) / "manifest.json"))

    def made_from(self, stage: str) -> str | None:
        """Fingerprint of what the stage's work so far was made from; None before it began."""
        marker = self.folder(stage) / "key.json"
        return read_json(marker).get("inputs") if marker.exists() else None

    def note_inputs(self, stage: str, inputs: str) -> None:
        """Writes down, before a stage begins to work, what it works from."""
        marker = self.folder(stage) / "key.json"
        write_json(marker, {**read_json(marker), "inputs": inputs})

    def begin(self, stage: str, key: str, owned: Sequence[Path] = ()) -> bool:
        """Prepares a stage for work under `key`; True when finished or half-done work of another key was set aside.

        Args:
            stage: its name.
            key: fingerprint of the configuration that its output depends on.
            owned: further files and folders of the run that belong to this stage.
        """
        marker = self.folder(stage) / "key.json"
        changed = not marker.exists() or read_json(marker)["key"] != key
        produced = any(path.exists() for path in owned) or any(p != marker for p in self.folder(stage).glob("*"))
        if changed and produced:
            self.set_aside(stage, owned)
        if changed:
            write_json(marker, {"key": key})
        return changed and produced

    def set_aside(self, stage: str, owned: Sequence[Path] = ()) -> None:
        """Moves everything of a stage to `replaced/`; its key is kept, so that the stage begins anew."""
        marker = self.folder(stage) / "key.json"
        key = read_json(marker)["key"] if marker.exists() else None
        # The folder with the marker goes last: a kill before that leaves the old key, and the next run goes on from here.
        self._move([*(path for path in owned if self.folder(stage) not in path.parents), self.folder(stage)])
        self.update_run(stages={name: row for name, row in self.run.get("stages", {}).items() if name != stage})
        if key is not None:
            write_json(marker, {"key": key})

    def reopen(self, stage: str) -> None:
        """Forgets that a stage was finished; what is still there is kept."""
        (self.folder(stage) / "manifest.json").unlink(missing_ok=True)

    def _move(self, paths: Iterable[Path]) -> None:
        number = 1
        while (self.root / "replaced" / str(number)).exists():
            number += 1
        for path in paths:
            if path.exists():
                target = self.root / "replaced" / str(number) / path.relative_to(self.root)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, target)

    def finish(self, stage: str, key: str, counts: Mapping[str, Any], outputs: Sequence[Path] = (), inputs: str = "") -> None:
        """Writes the manifest: from now on the stage is finished.

        Args:
            key: its key.
            counts: what it did, for the user and for later stages.
            outputs: files and folders, besides the shards, that later stages need.
            inputs: fingerprint of what the stage was made from (`content` of the stage before).
        """
        found = [*self.shards(stage), *(f for path in outputs for f in (path.rglob("*") if path.is_dir() else [path]))]
        files = {str(f.relative_to(self.root)): _sha256(f) for f in sorted(found) if f.is_file()}
        manifest = {"stage": stage, "key": key, "inputs": inputs, "counts": counts, "files": files}
        write_json(self.folder(stage) / "manifest.json", manifest)

    # -- records ----------------------------------------------------------------------------------------------------

    def shards(self, stage: str) -> list[Path]:
        return sorted(self.folder(stage).glob("shard-*.jsonl"))

    def has_shard(self, stage: str, index: int) -> bool:
        return self._shard(stage, index).is_file()

    def _shard(self, stage: str, index: int) -> Path:
        return self.folder(stage) / f"shard-{index:05d}.jsonl"

    def write_shard(self, stage: str, index: int, records: Iterable[Any], drops: Iterable[Drop] = ()) -> None:
        """Writes one shard of records and, before it, what this shard dropped (no file when that is nothing)."""
        dropped = list(drops)
        if dropped:
            self._write_lines(self.root / "dropped" / stage / f"shard-{index:05d}.jsonl", dropped)
        self._write_lines(self._shard(stage, index), records)

    def write_records(self, name: str, records: Iterable[Any]) -> None:
        """Writes a file of records at the top of the run folder."""
        self._write_lines(self.root / name, records)

    def _write_lines(self, path: Path, records: Iterable[Any]) -> None:
        lines = [json.dumps(to_json(record), ensure_ascii=False) + "\n" for record in records]
        with writing(path) as temporary:
            temporary.write_text("".join(lines), encoding="utf-8")

    def read_shard(self, stage: str, index: int, kind: type[R]) -> list[R]:
        return self._read_lines(self._shard(stage, index), kind)

    def read(self, stage: str, kind: type[R]) -> list[R]:
        """All records of a stage, in order."""
        return [record for path in self.shards(stage) for record in self._read_lines(path, kind)]

    def read_dropped(self, stage: str) -> list[Drop]:
        paths = sorted((self.root / "dropped" / stage).glob("shard-*.jsonl"))
        return [record for path in paths for record in self._read_lines(path, Drop)]

    def _read_lines(self, path: Path, kind: type[R]) -> list[R]:
        records = []
        for number, line in enumerate(path.read_bytes().splitlines(), start=1):  # text would split at U+2028 too
            try:
                records.append(from_json(kind, json.loads(line)))
            except (TypeError, ValueError) as error:
                remedy = "remove this file to redo the shard"
                raise RunFolderError(f"{path}, line {number} is damaged ({error}); {remedy}") from error
        return records

    # -- metrics ----------------------------------------------------------------------------------------------------

    def metrics_path(self, stage: str) -> Path:
        return self.root / "metrics" / f"{stage}.jsonl"

    def add_metrics(self, stage: str, values: Mapping[str, Any]) -> None:
        """Appends one line to the stage's metrics."""
        path = self.metrics_path(stage)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
        except OSError as error:
            raise _storage_error(path, error) from error

    def keep_metrics(self, stage: str, last_step: int) -> None:
        """Forgets the lines after `last_step` (written by a run that was killed after its last checkpoint)."""
        lines = self.read_metrics(stage)
        with writing(self.metrics_path(stage)) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in lines if line["step"] <= last_step))

    def read_metrics(self, stage: str) -> list[dict[str, Any]]:
        """The lines of a stage's metrics; a last line that was cut by a kill is left out."""
        path = self.metrics_path(stage)
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        try:
            return [json.loads(line) for line in lines if line.endswith(b"\n")]
        except ValueError as error:
            raise RunFolderError(f"{path} is damaged ({error}); remove it and run again to redo the stage") from error
