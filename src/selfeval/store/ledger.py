"""State of each stage: fresh, missing, changed or damaged, by its key, its inputs, and the hash of every file it wrote.

The hashes of a finished stage are in its manifest. Before that, those of its shards are in its journal, `written.json`, which
records the hash of a shard before the shard is written. A shard without a journal entry was not written by this version
and is recreated.

Everything is read without the run's lock: `score`, `export`, `show` and `report` can check files during a run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from selfeval.errors import RunFolderError
from selfeval.links import stays_inside
from selfeval.store.files import content_hash, fingerprint
from selfeval.store.sealed import read_sealed, write_sealed

__all__ = [
    "JOURNAL",
    "Changed",
    "Damaged",
    "Expected",
    "Fresh",
    "Ledger",
    "Missing",
    "Output",
    "State",
    "check_files",
    "has_manifest",
    "hashes",
    "journal_of",
    "missing_files",
    "note_shards",
    "read_journal",
    "read_key",
    "read_manifest",
]

JOURNAL = "written.json"
"""Journal in a stage's folder: hashes of its shards and of their dropped records, by path relative to the run folder."""


# -- states -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fresh:
    """The stage is finished, intact, and was computed from the current configuration and inputs."""


@dataclass(frozen=True)
class Missing:
    """The stage is not finished, or some of its files are lost.

    Attributes:
        files: lost files of a finished stage, relative to the run folder; empty if it never finished.
    """

    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class Changed:
    """The stage has results of another configuration, or of other inputs.

    Attributes:
        why: the part that changed.
    """

    why: Literal["configuration", "inputs"]


@dataclass(frozen=True)
class Damaged:
    """The content of a file of the finished stage has changed since it was written.

    Attributes:
        file: path relative to the run folder.
    """

    file: str


State = Fresh | Missing | Changed | Damaged
"""State of a stage; exactly one of these four."""


# -- the ledger ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Output:
    """The output of a stage in a round, as an input of another stage.

    Attributes:
        root: folder of the round.
        stage: name of the stage that writes it.
    """

    root: Path
    stage: str

    @property
    def content(self) -> str | None:
        """Fingerprint of the output and of the inputs, which depend on all stages before it; None if it is not finished."""
        if not has_manifest(self.root, self.stage):
            return None
        manifest = read_manifest(self.root, self.stage)
        return fingerprint([manifest["inputs"], manifest["files"]])


@dataclass(frozen=True)
class Expected:
    """The configuration and inputs from which a stage has to be computed.

    Attributes:
        key: fingerprint of the configuration that its output depends on.
        reads: outputs that it reads, and plain values that count like one.
        added: fingerprints of further inputs, such as labels of people.
        owned: files and folders that it writes outside its folder.
    """

    key: str
    reads: Sequence[Output | int] = ()
    owned: Sequence[Path] = ()
    added: Sequence[str] = ()

    @property
    def inputs(self) -> str | None:
        """Fingerprint of everything that the stage reads; None if some of it is not finished."""
        parts = [part.content if isinstance(part, Output) else part for part in self.reads]
        if None in parts:
            return None
        # A single output stands for itself, so `restore` can compare it with one output's content.
        whole = "" if not parts else str(parts[0]) if len(parts) == 1 else fingerprint(parts)
        return "+".join([whole, *self.added])


class Ledger:
    """State of the stages in the folder of one round.

    Args:
        root: the folder.
        expected: Optional. The configuration and inputs that each stage should have. Without it, only files are compared with
            the manifests.

    Example:
        >>> Ledger(Path("runs/first")).state("policy")
        Fresh()
    """

    def __init__(self, root: Path, expected: Mapping[str, Expected] | None = None) -> None:
        self.root, self.expected = root, expected or {}

    def state(self, stage: str) -> State:
        """Return the state of a stage.

        A changed configuration counts before damage, because its results are not used anyway; damage counts before changed
        inputs, because a damaged file may be why they differ.

        Raises:
            RunFolderError: the manifest or key.json cannot be read.
        """
        expected = self.expected.get(stage)
        # A key without results is no obstacle: the next `begin` overwrites it.
        if expected and self.key(stage) != expected.key and self.has_work(stage):
            return Changed("configuration")
        if damaged := self._damaged(stage):
            return Damaged(damaged)
        if expected and self._has_other_inputs(stage, expected):
            return Changed("inputs")
        if not has_manifest(self.root, stage):
            return Missing()
        missing = missing_files(self.root, stage)
        return Missing(tuple(missing)) if missing else Fresh()

    def key(self, stage: str) -> str | None:
        """Return the fingerprint of the configuration that a stage was computed with; None if it has not started."""
        return read_key(self.root, stage).get("key")

    def has_work(self, stage: str) -> bool:
        """Return whether a stage has produced anything, finished or not."""
        owned = self.expected[stage].owned if stage in self.expected else ()
        markers = ("key.json", JOURNAL)
        return any(p.exists() for p in owned) or any(p.name not in markers for p in (self.root / stage).glob("*"))

    def _has_other_inputs(self, stage: str, expected: Expected) -> bool:
        """Return whether a stage has results of other inputs. Unfinished inputs are not compared yet."""
        found, wanted = read_key(self.root, stage).get("inputs"), expected.inputs
        # None: not begun, or an input is unfinished and will be compared once it is there.
        return None not in (found, wanted) and found != wanted and self.has_work(stage)

    def _damaged(self, stage: str) -> str | None:
        if not has_manifest(self.root, stage):
            return None
        return next((name for name, written in _written(self.root, stage).items() if not _is(self.root / name, written)), None)


# -- manifests, keys and journals ---------------------------------------------------------------------------------------


def has_manifest(root: Path, stage: str) -> bool:
    """Return whether the stage was finished, even if its files are now missing or damaged."""
    return (root / stage / "manifest.json").is_file()


def read_manifest(root: Path, stage: str) -> dict[str, Any]:
    """Read the manifest of a finished stage.

    Raises:
        RunFolderError: the manifest is missing or damaged.
    """
    path, remedy = root / stage / "manifest.json", "remove it and rerun the same command"
    values = read_sealed(path, "key", "inputs", "counts", "files", "also", remedy=remedy)
    for section in ("files", "also"):
        _refuse_other_files(path, values[section], remedy)
    return values


def read_key(root: Path, stage: str) -> dict[str, Any]:
    """Read `key` and `inputs` of a stage's work so far, from key.json or else from the manifest; empty before it began.

    Raises:
        RunFolderError: the file is damaged.
    """
    path = root / stage / "key.json"
    # key.json is written when a stage begins, the manifest when it is finished.
    if path.exists():
        values = read_sealed(path, "key", "inputs", remedy="remove it and rerun the same command")
        return {"key": values["key"], "inputs": values["inputs"]}
    if has_manifest(root, stage):
        values = read_manifest(root, stage)
        return {"key": values["key"], "inputs": values["inputs"]}
    return {}


def journal_of(name: str) -> str:
    """Return the folder whose journal has the hash of a shard, or of its dropped records, given by its path in the run."""
    return Path(name).parent.as_posix().removeprefix("dropped/")


def read_journal(root: Path, stage: str) -> dict[str, str]:
    """Read the hash of every shard of a stage, by path in the run folder; empty if there is no journal.

    Raises:
        RunFolderError: the journal is damaged.
    """
    path = root / stage / JOURNAL
    if not path.exists():
        return {}
    remedy = "remove it and rerun the same command, which regenerates the shards of this folder"
    found = read_sealed(path, "shards", remedy=remedy)["shards"]
    _refuse_other_files(path, found, remedy)
    return dict(found)


def _refuse_other_files(path: Path, hashes: Any, remedy: str) -> None:
    """Check that a section of a file maps paths in the run folder to hashes.

    The folder may be untrusted: the files are read, and a journal is written next to a shard.
    """
    if not isinstance(hashes, dict):
        raise RunFolderError(f"{path} is damaged (its files are a {type(hashes).__name__}, expected an object); {remedy}")
    for name, written in hashes.items():
        if not stays_inside(name):
            raise RunFolderError(f"{path} is damaged (it lists {name!r}, which is not a path in the run folder); {remedy}")
        if not isinstance(written, str):
            raise RunFolderError(f"{path} is damaged (it lists {name!r} without a hash); {remedy}")


def note_shards(root: Path, stage: str, hashes: Mapping[str, str]) -> None:
    """Add hashes to a stage's journal."""
    # Sorted: the order in which shards are finished differs from run to run.
    write_sealed(root / stage / JOURNAL, {"shards": dict(sorted({**read_journal(root, stage), **hashes}.items()))})


# -- files --------------------------------------------------------------------------------------------------------------


def _written(root: Path, stage: str) -> dict[str, str]:
    values = read_manifest(root, stage)
    return {**values["files"], **values["also"]}


def missing_files(root: Path, stage: str) -> list[str]:
    """Return the missing files of a finished stage."""
    return [name for name in _written(root, stage) if not (root / name).is_file()]


def _is(path: Path, written: str) -> bool:
    # A missing file is not damaged; `missing_files` reports it.
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
    """Return the hashes of unfinished stages' shards, without those that were noted but not written before a kill."""
    # The manifest of a finished stage has the hashes of its shards.
    unfinished = [path.parent.name for path in root.glob(f"*/{JOURNAL}") if not has_manifest(root, path.parent.name)]
    noted = {name: written for stage in unfinished for name, written in read_journal(root, stage).items()}
    return {name: written for name, written in noted.items() if (root / name).is_file()}


def _refuse_damaged(path: Path, written: str) -> None:
    if not path.is_file():
        raise RunFolderError(f"{path} is missing; `selfeval run --output DIR` regenerates it, or restore it from a backup")
    if not _is(path, written):
        raise RunFolderError(
            f"{path} is damaged: its content does not match its recorded hash. Restore it from a backup, or remove it and "
            "regenerate it: selfeval run --output DIR"
        )


def hashes(root: Path, paths: Iterable[Path]) -> dict[str, str]:
    """Hash the content of each file, recursing into folders and skipping journals, by path relative to the run folder."""
    files = [f for path in paths for f in (path.rglob("*") if path.is_dir() else [path])]
    return {f.relative_to(root).as_posix(): content_hash(f) for f in sorted(files) if f.is_file() and f.name != JOURNAL}
