"""Writing to a run folder: shards, manifests, metrics, and a lock that excludes other processes.

All writes are atomic: files are written to a temporary name and renamed. A stage's `manifest.json` is written last, so its
existence means that the stage is finished. Results that cannot be used any more are moved to `replaced/`, never deleted.
`selfeval.store.ledger` reads the state of the stages.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from selfeval.errors import RunFolderError
from selfeval.links import OF_OTHERS, entries, refuse_links
from selfeval.records import Drop
from selfeval.store import ledger, metrics
from selfeval.store.archive import Archive
from selfeval.store.changes import CHANGING
from selfeval.store.files import as_storage_error, file_hash, recover_folder, write_file, write_json
from selfeval.store.moves import Move, read_move
from selfeval.store.progress import PROGRESS
from selfeval.store.records import as_lines, read_records, write_records
from selfeval.store.run_file import read_run
from selfeval.store.run_lock import LOCK, RunLock
from selfeval.store.sealed import write_sealed

__all__ = ["RunStore"]

_REDO_SHARD = "remove this file and rerun the same command to redo the shard"

R = TypeVar("R")


class RunStore:
    """A run folder, locked by this process.

    Args:
        root: the folder, created if it does not exist.

    Raises:
        RunFolderError: the folder exists and is not a run, contains a link to the outside, or is locked by another process.
        StorageError: the folder cannot be created.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            # Before anything is created in the folder, which may not be a run at all.
            self._refuse_other_folders()
            root.mkdir(parents=True, exist_ok=True)
            # The folder may be untrusted: through a link in it, this process could write or delete files elsewhere.
            found = entries(root, OF_OTHERS)
            refuse_links(root, found, RunFolderError)
            self._lock = RunLock(root)
        except OSError as error:
            raise as_storage_error(root, error) from error
        self._join(root)
        try:
            for path in found:
                recover_folder(path)
            self._complete_move()
        except BaseException:
            self.close()
            raise

    def _join(self, root: Path) -> None:
        """Use a folder that is open."""
        self.root, self._archive, self._folder_id = root, Archive(root), _identity(root)

    def _refuse_other_folders(self) -> None:
        if self.root.exists() and not self.root.is_dir():
            raise RunFolderError(f"output {self.root} is a file; pass a folder")
        if self.root.exists() and any(self.root.iterdir()) and not self._is_run():
            raise RunFolderError(
                f"output folder {self.root} exists and is not a run folder (no run.json); pass another --output"
            )

    def _is_run(self) -> bool:
        """Whether the folder is a run, including one without run.json (lost, or killed before it was written)."""
        # A folder with nothing else was created by a process that was killed before its first write.
        begun = (LOCK, ".run.json.part", "run.log", PROGRESS, f".{PROGRESS}.part")
        if (self.root / "run.json").is_file() or all(p.name in begun for p in self.root.iterdir()):
            return True
        ours = any((self.root / name).is_file() for name in (LOCK, "seeds.jsonl"))
        return ours and any(self.root.glob("*/key.json"))

    def close(self) -> None:
        """Release the lock."""
        self._lock.release()

    def check_writable(self) -> None:
        """Refuse to write if the folder was removed, or removed and created again.

        Writing would create it again without run.json, and without the lock: its results would belong to no configuration.

        Raises:
            RunFolderError: the folder was removed.
        """
        if _identity(self.root) != self._folder_id:
            raise RunFolderError(
                f"{self.root} was removed or replaced while this process was using it; move it back and rerun the same "
                "command, or start again"
            )

    # -- run.json ---------------------------------------------------------------------------------------------------

    @property
    def run(self) -> dict[str, Any]:
        """Contents of run.json; an empty dict before the first write."""
        return read_run(self.root) if (self.root / "run.json").exists() else {}

    def write_text(self, path: Path, text: str) -> None:
        """Write a file of the run in one step.

        Raises:
            RunFolderError: the run folder was removed.
            StorageError: the file cannot be written.
        """
        self.check_writable()
        write_file(path, text)

    def write_json(self, path: Path, value: Any) -> None:
        """Write a file of the run in one step, as JSON; see `write_text`."""
        self.check_writable()
        write_json(path, value)

    def update_run(self, **values: Any) -> None:
        """Set top-level values of run.json.

        Raises:
            RunFolderError: run.json is damaged, or the folder was removed.
        """
        self.check_writable()
        write_sealed(self.root / "run.json", {**self.run, **values})

    def record_stage(self, stage: str, **values: Any) -> None:
        """Update a stage's entry (state, seconds, counts) in run.json; seconds accumulate over interrupted attempts."""
        stages = dict(self.run.get("stages", {}))
        row = dict(stages.get(stage, {}))
        row.update(values, seconds=round(row.get("seconds", 0.0) + values.get("seconds", 0.0), 2))
        stages[stage] = row
        self.update_run(stages=stages)

    # -- stages -----------------------------------------------------------------------------------------------------

    def folder(self, stage: str) -> Path:
        return self.root / stage

    def manifest(self, stage: str) -> dict[str, Any]:
        return ledger.read_manifest(self.root, stage)

    def begin(self, stage: str, key: str, inputs: str = "") -> None:
        """Record the configuration and the inputs of a stage before it starts.

        Args:
            stage: name of the stage.
            key: fingerprint of the configuration that its output depends on.
            inputs: fingerprint of the outputs that it reads. Default: empty.
        """
        self.check_writable()
        values = {"key": key, "inputs": inputs}
        # An unchanged key is left alone, so a resume does not touch the files of a finished stage.
        if ledger.read_key(self.root, stage) != values:
            write_sealed(self.folder(stage) / "key.json", values)

    def set_aside(self, stage: str, owned: Sequence[Path] = ()) -> None:
        """Move all files of a stage to `replaced/`, so the stage starts over.

        Args:
            stage: name of the stage.
            owned: files and folders that it writes outside its folder. Default: none.
        """
        self._move({stage: owned}, stages={name: row for name, row in self.run.get("stages", {}).items() if name != stage})

    def put_back(self, number: int, room: Mapping[str, Sequence[Path]], **values: Any) -> None:
        """Move archived results back from `replaced/`.

        Args:
            number: number of the results.
            room: the stages whose current results are set aside first, with the files and folders that each writes outside
                its folder.
            values: values of run.json that belong to the results.

        Raises:
            RunFolderError: there are no such results, or files that are not set aside are in their place.
        """
        self._move(room, number, **values)

    def _move(self, aside: Mapping[str, Sequence[Path]], back: int | None = None, **values: Any) -> None:
        self._complete_move()  # the journal has room for one, and this process may have failed in the middle of it
        # The folder with key.json last: until then, readers see that the results are incomplete.
        paths = {
            stage: [*(path for path in owned if self.folder(stage) not in path.parents), self.folder(stage)]
            for stage, owned in aside.items()
        }
        shelf = self._archive.shelf_for(paths, self.run)
        Move(shelf, None if back is None else self._archive.shelf_of(back, shelf), values).begin(self._archive.folder)
        self._complete_move()

    def _complete_move(self) -> None:
        """Complete the move that the journal records, if there is one."""
        move = read_move(self._archive.folder)
        if move is not None:
            with CHANGING:
                move.rename(self.root, self._archive.folder)
                self.update_run(**move.run)
                move.end(self._archive.folder)

    def reopen(self, stage: str) -> None:
        """Remove a stage's manifest and the shards whose dropped records are lost; keep all other files."""
        # While the manifest is still there: without a journal entry, intact shards would be computed again.
        self._note_from_manifest(stage)
        for name in ledger.missing_files(self.root, stage):
            if name.startswith(f"dropped/{stage}/"):
                # The shard of the same number; both are recreated together.
                (self.folder(stage) / Path(name).name).unlink(missing_ok=True)
        (self.folder(stage) / "manifest.json").unlink(missing_ok=True)

    def _note_from_manifest(self, stage: str) -> None:
        """Recreate missing journals of a finished stage from the hashes in its manifest."""
        manifest, found = self.manifest(stage), dict[str, dict[str, str]]()
        for name, written in {**manifest["files"], **manifest["also"]}.items():
            # Both hashes are of the plain bytes: `content_hash` has a canonical form for .json and .safetensors only.
            if Path(name).match("shard-*.jsonl"):
                found.setdefault(ledger.journal_of(name), {})[name] = written
        for folder, hashes in found.items():
            if not (self.root / folder / ledger.JOURNAL).exists():
                ledger.note_shards(self.root, folder, hashes)

    def finish(
        self,
        stage: str,
        key: str,
        counts: Mapping[str, Any],
        outputs: Sequence[Path] = (),
        inputs: str = "",
        also: Sequence[Path] = (),
    ) -> None:
        """Write the manifest, which marks the stage as finished.

        Args:
            stage: name of the stage.
            key: key of the stage.
            counts: statistics for the user and for later stages.
            outputs: files and folders, in addition to the shards, that later stages need. Default: none.
            inputs: fingerprint of the outputs that it read. Default: empty.
            also: additional files and folders whose integrity is checked, although no stage depends on them. Default: none.
        """
        self.check_writable()
        manifest = {
            "stage": stage,
            "key": key,
            "inputs": inputs,
            "counts": counts,
            "files": ledger.hashes(self.root, [*self.shards(stage), *outputs]),
            "also": ledger.hashes(self.root, also),
        }
        write_sealed(self.folder(stage) / "manifest.json", manifest)

    # -- records ----------------------------------------------------------------------------------------------------

    def shards(self, stage: str) -> list[Path]:
        return sorted(self.folder(stage).glob("shard-*.jsonl"))

    def has_shard(self, stage: str, index: int, *, drops: bool | None = False) -> bool:
        """Whether an intact shard exists, with its file of dropped records if the stage drops records.

        A shard that is not in the stage's journal (written by a version without journals, or the journal was lost) does not
        count and is recreated.

        Args:
            stage: name of the stage.
            index: index of the shard.
            drops: whether the stage drops records; None if only the shards of this version have such a file. Default: False.

        Raises:
            RunFolderError: a file's content has changed since it was written, or the journal is damaged.
        """
        if not self.shard_path(stage, index).is_file():
            return False
        noted = ledger.read_journal(self.root, stage)
        if drops is None:
            # The journal is written before the files: a name that is not in it was never written, rather than lost.
            drops = self._dropped_path(stage, index).relative_to(self.root).as_posix() in noted
        paths = self._paths_of_shard(stage, index, drops=drops)
        if not all(path.is_file() for path in paths):
            return False
        names = [path.relative_to(self.root).as_posix() for path in paths]
        if not all(name in noted for name in names):
            return False
        for path, name in zip(paths, names, strict=True):
            if file_hash(path) != noted[name]:
                raise RunFolderError(f"{path} is damaged: its content does not match its recorded hash; {_REDO_SHARD}")
        return True

    def _paths_of_shard(self, stage: str, index: int, *, drops: bool) -> list[Path]:
        # The shard itself last, in the order in which `write_shard` writes: it completes the pair.
        return [*([self._dropped_path(stage, index)] if drops else []), self.shard_path(stage, index)]

    def shard_path(self, stage: str, index: int) -> Path:
        return self.folder(stage) / f"shard-{index:05d}.jsonl"

    def _dropped_path(self, stage: str, index: int) -> Path:
        return self.root / "dropped" / stage / f"shard-{index:05d}.jsonl"

    def write_shard(self, stage: str, index: int, records: Iterable[Any], drops: Iterable[Drop] | None = None) -> None:
        """Write a shard, preceded by the records it dropped (None if the stage never drops records).

        Their hashes are added to the stage's journal first, so a kill at any point leaves no shard without a journal entry.
        """
        self.check_writable()
        parts = [*([] if drops is None else [as_lines(drops)]), as_lines(records)]
        paths = self._paths_of_shard(stage, index, drops=drops is not None)
        hashes = {path: hashlib.sha256(lines).hexdigest() for path, lines in zip(paths, parts, strict=True)}
        for path, written in hashes.items():
            if path.is_file() and file_hash(path) != written:
                path.unlink()  # if killed before the replacement, the old file would not match the new journal entry
        ledger.note_shards(self.root, stage, {path.relative_to(self.root).as_posix(): h for path, h in hashes.items()})
        for path, lines in zip(paths, parts, strict=True):
            write_file(path, lines)

    def write_dropped(self, stage: str, index: int, drops: Iterable[Drop]) -> None:
        """Write the dropped records of a shard that is not there, which `write_shard` replaces when it is."""
        self.check_writable()
        write_records(self._dropped_path(stage, index), drops)

    def write_records(self, name: str, records: Iterable[Any]) -> None:
        """Write a file of records at the top level of the run folder."""
        self.check_writable()
        write_records(self.root / name, records)

    def read_shard(self, stage: str, index: int, kind: type[R]) -> list[R]:
        return read_records(self.shard_path(stage, index), kind, _REDO_SHARD)

    def read(self, stage: str, kind: type[R]) -> list[R]:
        """Read all records of a stage, in order."""
        return [record for path in self.shards(stage) for record in read_records(path, kind, _REDO_SHARD)]

    def read_dropped(self, stage: str) -> list[Drop]:
        paths = sorted((self.root / "dropped" / stage).glob("shard-*.jsonl"))
        return [record for path in paths for record in read_records(path, Drop, _REDO_SHARD)]

    # -- metrics ----------------------------------------------------------------------------------------------------

    def metrics_path(self, stage: str) -> Path:
        return self.root / "metrics" / f"{stage}.jsonl"

    def add_metrics(self, stage: str, values: Mapping[str, Any]) -> None:
        """Append a line to the stage's metrics."""
        self.check_writable()
        metrics.add_metrics(self.metrics_path(stage), values)

    def keep_metrics(self, stage: str, last_step: int) -> None:
        """Remove lines after `last_step`, written by a run that was killed after its last checkpoint."""
        self.check_writable()
        metrics.keep_metrics(self.metrics_path(stage), last_step)

    def read_metrics(self, stage: str) -> list[dict[str, Any]]:
        """Read the stage's metrics; skip a truncated last line."""
        return metrics.read_metrics(self.metrics_path(stage))


def _identity(folder: Path) -> tuple[int, int] | None:
    """Return device and number of a folder, which another folder of the same name does not have; None if there is none."""
    try:
        facts = os.stat(folder)
    except FileNotFoundError:
        return None
    return facts.st_dev, facts.st_ino
