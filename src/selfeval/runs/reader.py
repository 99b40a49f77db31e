"""Read the files of a run folder without its lock, even while the run is in progress.

Files are written atomically (`selfeval.store.writing`): a reader sees a whole shard or nothing of it. This module does not
import torch.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from selfeval.config import BackboneConfig, RunConfig, config_of_run, nearest
from selfeval.errors import InputError, RunFolderError
from selfeval.labelling.label_file import LABELS
from selfeval.links import OF_OTHERS, entries, refuse_links
from selfeval.records import (
    ComparedReplies,
    Drop,
    Label,
    Pair,
    Question,
    ReferenceAnswer,
    Reply,
    Sampled,
    ScoredPair,
    Seed,
    Split,
    Verdict,
    from_json,
)
from selfeval.store import check_files, has_manifest, read_metrics, read_object, read_rows, read_run

__all__ = ["KINDS", "RunReader", "SplitName", "backbone_config", "pairs_of", "round_folder", "round_seed"]

SplitName = Literal["train", "test"]

_REPAIR = "correct or remove this line, or restore the file from a backup"
_REDO = "remove this file and regenerate it: selfeval run --output DIR"


def pairs_of(split: Split) -> str:
    """Return the folder of the pairs of a split. Separate folders allow passing a trainer only one split."""
    return f"pairs/{split.value}"


def round_seed(seed: int, number: int) -> int:
    """Return the seed of a round: the run's in round 1, later one derived only from the run's seed and the round number."""
    return seed if number == 1 else random.Random(f"{seed}/round/{number}").getrandbits(48)


def round_folder(root: Path, number: int) -> Path:
    """Return the folder of a round, in the folder of its run."""
    return root if number == 1 else root / "rounds" / f"{number:02d}"


def backbone_config(config: RunConfig, run: Mapping[str, Any]) -> BackboneConfig:
    """Return the settings of the backbone with the precision chosen for this run and model, whatever memory is free now.

    Args:
        config: the requested configuration.
        run: content of run.json.
    """
    device, backbone = run.get("device") or {}, config.backbone
    if backbone.precision == "auto" == device.get("asked") and config.model == device.get("model"):
        return backbone.model_copy(update={"precision": device["precision"]})
    return backbone


@dataclass(frozen=True)
class _Kind:
    """A kind of record: its class, the stage that writes it (None: people), and the files (glob patterns) that hold it."""

    record: Any
    stage: str | None
    files: tuple[str, ...]

    @property
    def fields(self) -> list[str]:
        """Names of the record's fields."""
        return [field.name for field in fields(self.record)]


KINDS: Mapping[str, _Kind] = {
    "seeds": _Kind(Seed, "questions", ("seeds.jsonl",)),
    "questions": _Kind(Question, "questions", ("questions/shard-*.jsonl",)),
    "replies": _Kind(Reply, "replies", ("replies/shard-*.jsonl",)),
    "reference_answers": _Kind(ReferenceAnswer, "replies", ("reference_answers/shard-*.jsonl",)),
    "verdicts": _Kind(Verdict, "verdicts", ("verdicts/shard-*.jsonl",)),
    "pairs": _Kind(Pair, "pairs", tuple(f"{pairs_of(split)}/shard-*.jsonl" for split in Split)),
    "sampled": _Kind(Sampled, "policy", ("policy/shard-*.jsonl",)),
    "scored": _Kind(ScoredPair, "evaluation", ("evaluation/scored.jsonl",)),
    "compared": _Kind(ComparedReplies, "evaluation", ("evaluation/compared.jsonl",)),
    "labels": _Kind(Label, None, (LABELS,)),
    "dropped": _Kind(Drop, "questions", ("dropped/*/shard-*.jsonl",)),
}
"""Every kind of record of a run, by name."""

_NOUNS = {"sampled": "sampled replies", "scored": "scored pairs", "compared": "compared replies", "dropped": "dropped records"}
"""Nouns for the kinds whose name is none, in messages."""


class RunReader:
    """The files of one round of a run. A run without rounds is its round 1.

    Args:
        folder: folder of the run, or of one of its rounds (`RUN/rounds/02`).

    Raises:
        RunFolderError: the folder is not a run, a link in it leads out of it, or its run.json is damaged or was written by an
            incompatible version.

    Example:
        >>> reader = RunReader("runs/first")
        >>> reader.status
        'finished'
        >>> reader.records("questions")[0].split.value
        'train'
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        # The folder may come from somebody else, and what is read from it is shown, scored and exported.
        refuse_links(self.folder, entries(self.folder, OF_OTHERS), RunFolderError)
        self.config = self._read_config()

    def __repr__(self) -> str:
        return f"RunReader({str(self.folder)!r}, {self.status})"

    def _read_config(self) -> RunConfig:
        # The lock is created before run.json, so this is a run that has not written it yet.
        if (self.folder / ".lock").exists() and not (self.folder / "run.json").exists():
            raise RunFolderError(
                f"{self.folder} has no run.json yet; the run is just starting, or was stopped before it started"
            )
        values = self.run
        if "config" not in values and values.get("status") == "running":
            raise RunFolderError(f"{self.folder} has no configuration yet; the run is just starting")
        return config_of_run(values.get("config"), self.folder / "run.json")

    # -- run.json -------------------------------------------------------------------------------------------------------

    @property
    def run(self) -> dict[str, Any]:
        """Current content of run.json."""
        return read_run(self.folder)

    @property
    def status(self) -> str:
        """`running`, `finished`, `partial` (stopped by --until) or `interrupted`."""
        return str(self.run.get("status", "unknown"))

    @property
    def stages(self) -> dict[str, dict[str, Any]]:
        """The row of each stage that has begun: state, seconds, counts."""
        return dict(self.run.get("stages") or {})

    @property
    def round(self) -> int:
        """Number of this round, counted from 1."""
        return int(self.run.get("round", 1))

    @property
    def root(self) -> Path:
        """Folder of the run, which is that of its first round."""
        return self.folder if self.round == 1 else self.folder.parent.parent

    @property
    def rounds(self) -> list[RunReader]:
        """This round and, if this is the folder of a run, the later rounds that have begun."""
        found = [self]
        while self.round == 1 and (round_folder(self.folder, len(found) + 1) / "run.json").is_file():
            found.append(RunReader(round_folder(self.folder, len(found) + 1)))
        return found

    def is_finished(self, stage: str) -> bool:
        """Return whether a stage has written its manifest, which it does after all its records."""
        return has_manifest(self.folder, stage)

    # -- records --------------------------------------------------------------------------------------------------------

    def records(self, kind: str, *, split: Split | SplitName | None = None) -> list[Any]:
        """Read the records of a kind that have been written so far.

        Args:
            kind: one of `KINDS`.
            split: Optional. Only those of training or of test questions. Default: all.

        Raises:
            RunFolderError: there is no such kind, none is written yet, or a file is damaged.
            InputError: these records have no split, or there is no such split.
        """
        record = _kind(kind).record
        return [from_json(record, row) for row in self.rows(kind, split=split)]

    def rows(self, kind: str, *, split: Split | SplitName | None = None) -> Iterator[dict[str, Any]]:
        """Read records as JSON objects, file by file; see `records`."""
        paths = self._paths(kind)
        belongs = self._filter(kind, None if split is None else _split(split))
        for path in paths:
            yield from filter(belongs, self._rows_of(path, appended=_kind(kind).stage is None))

    def _filter(self, kind: str, split: Split | None) -> Callable[[dict[str, Any]], bool]:
        """Return a predicate for records of a split; a record without a split has that of the question it refers to."""
        names = _kind(kind).fields
        if split is None:
            return lambda row: True
        if "split" in names:
            return lambda row: row["split"] == split.value
        if "question_id" not in names:
            raise InputError(f'records "{kind}" have no split; omit it')
        # Read when the filter is built, once for all files of the kind.
        ids = {row["id"] for row in self.rows("questions", split=split)}
        return lambda row: row["question_id"] in ids

    def _paths(self, kind: str) -> list[Path]:
        found = [path for pattern in _kind(kind).files for path in sorted(self.folder.glob(pattern))]
        stage = _kind(kind).stage
        # Nobody has to label: a run without labels has none.
        if not found and stage is not None and not self.is_finished(stage):
            noun = _NOUNS.get(kind, kind.replace("_", " "))
            raise RunFolderError(
                f"{self.folder} has no {noun} yet: the stage {stage} has not written any. Wait while the run is in progress, "
                f"or resume it: selfeval run --output {self.folder}"
            )
        return found

    def _rows_of(self, path: Path, *, appended: bool) -> Iterator[dict[str, Any]]:
        self.check([path])
        try:
            yield from read_rows(path, _REPAIR if appended else _REDO, appended=appended)
        # Between listing and opening: no lock is held while a run may set results aside.
        except FileNotFoundError as error:
            raise RunFolderError(f"{path} was just set aside by a run with other settings; reopen the run") from error

    # -- other files ----------------------------------------------------------------------------------------------------

    def metrics(self, stage: str) -> list[dict[str, Any]]:
        """Read the metrics of a stage, one dict per step; empty before its first step."""
        return read_metrics(self.folder / "metrics" / f"{stage}.jsonl")

    def report(self) -> dict[str, Any]:
        """Read report.json.

        Raises:
            RunFolderError: it is not written yet, or is damaged.
        """
        path = self.folder / "report.json"
        if not path.is_file() and not self.is_finished("report"):
            done = [name for name, row in self.stages.items() if row.get("state") == "finished"]
            raise RunFolderError(
                f"{self.folder} has no report yet (stages finished so far: {', '.join(done) or 'none'}). Wait while the run "
                f"is in progress, or resume it: selfeval run --output {self.folder}"
            )
        self.check([path])
        return read_object(path)

    @property
    def roles_folder(self) -> Path:
        """The folder that contains one folder per trained role."""
        return self.folder / "roles"

    def check(self, paths: list[Path]) -> None:
        """Refuse files whose content is not what a finished stage wrote; see `selfeval.store.check_files`.

        Raises:
            RunFolderError: a file is damaged or missing.
        """
        try:
            check_files(self.folder, paths)
        except RunFolderError:
            # A run in progress may have replaced a file after its manifest was read.
            if self.status != "running":
                raise
            check_files(self.folder, paths)


def _kind(name: str) -> _Kind:
    if name not in KINDS:
        raise RunFolderError(f'there are no records "{name}"{nearest(name, list(KINDS))}')
    return KINDS[name]


def _split(name: str) -> Split:
    try:
        return Split(name)
    except ValueError:
        raise InputError(f'there is no split "{name}"{nearest(name, [split.value for split in Split])}') from None
