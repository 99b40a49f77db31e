"""The runs of a comparison: their readers, evidence and settings, and notes about figures that cannot be compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfeval.errors import InputError
from selfeval.evaluation.run_comparison import RunEvidence, shared_questions
from selfeval.records import Split
from selfeval.report.sections import flat
from selfeval.runs.activity import activity_of
from selfeval.runs.reader import KINDS, RunReader, round_folder
from selfeval.view.drawn import Drawn, version_of
from selfeval.view.opened import OpenedRuns, RunName

__all__ = ["LETTERS", "ComparedRun", "Difference", "differences", "notes", "open_runs"]

LETTERS = "ABCD"
"""Short names of the runs on the page; there are as many as a chart has colours."""
_GOLD_FILE = "the gold file"
_EVIDENCE: Drawn[RunEvidence] = Drawn(16)


@dataclass(frozen=True)
class ComparedRun:
    """A run on the page.

    Attributes:
        letter: its short name.
        name: its name in addresses.
        reader: reads its files.
        evidence: its results on the test questions; empty before the evaluation.
    """

    letter: str
    name: RunName
    reader: RunReader
    evidence: RunEvidence

    @property
    def status(self) -> str:
        """Status of the run, with that of its process."""
        return activity_of(self.reader).status

    @property
    def gold(self) -> tuple[Any, Any]:
        """What decides whether a reply is right: the domain, and the content of the gold file."""
        return self.reader.config.domain, (self.reader.run.get("made_of") or {}).get(_GOLD_FILE)

    @property
    def referee(self) -> tuple[Any, Any]:
        """Who compares the policy with its start: a server, or the model with the template of the referee."""
        server = self.reader.config.evaluation.referee
        return server, (self.reader.run.get("templates") or {}).get("referee.jinja")

    @property
    def values(self) -> dict[str, str]:
        """The configuration in effect and the versions of the software, by dotted key."""
        run = self.reader.run
        precision = (run.get("device") or {}).get("precision")
        return {
            **dict(flat(self.reader.config.model_dump(mode="json"))),
            **({"backbone.precision (chosen)": str(precision)} if precision else {}),
            **{f"versions.{name}": str(version) for name, version in (run.get("versions") or {}).items()},
        }


def open_runs(opened: OpenedRuns, names: Sequence[RunName]) -> list[ComparedRun]:
    """Open the runs of a comparison, each once.

    Raises:
        InputError: there are fewer than two runs, or more than letters.
        NotFoundError: there is no run of a name.
        RunFolderError: a run is damaged.
    """
    wanted = list(dict.fromkeys(names))
    if not 2 <= len(wanted) <= len(LETTERS):
        raise InputError(
            f"A comparison needs 2 to {len(LETTERS)} different runs, got {len(wanted)}; select them in the list of runs."
        )
    readers = [opened.reader(name) for name in wanted]
    return [
        ComparedRun(letter, name, reader, _evidence(reader))
        for letter, name, reader in zip(LETTERS, wanted, readers, strict=False)
    ]


def _evidence(reader: RunReader) -> RunEvidence:
    folders = [round_folder(reader.root, number) for number in range(1, reader.round + 1)]
    patterns = [pattern for kind in ("questions", "compared", "scored") for pattern in KINDS[kind].files]
    paths = [path for folder in folders for pattern in patterns for path in sorted(folder.glob(pattern))]
    return _EVIDENCE.get(reader.folder, version_of(paths), lambda: _read_evidence(reader, folders))


def _read_evidence(reader: RunReader, folders: Sequence[Path]) -> RunEvidence:
    rounds = [*(RunReader(folder) for folder in folders[:-1]), reader]
    trained = [row for one in rounds for row in _records(one, "questions") if row.split == Split.TRAIN]
    tests = [row for row in _records(reader, "questions") if row.split == Split.TEST]
    return RunEvidence(
        questions={row.id: row.text for row in tests},
        trained=frozenset(row.text for row in trained),
        compared=_records(reader, "compared"),
        scored=_records(reader, "scored"),
    )


def _records(reader: RunReader, kind: str) -> list[Any]:
    """Return the records of a kind; none before its stage has written them, and none of a version without this kind."""
    has_files = any(any(reader.folder.glob(pattern)) for pattern in KINDS[kind].files)
    if not has_files:
        return []
    found: list[Any] = reader.records(kind)
    return found


@dataclass(frozen=True)
class Difference:
    """A setting with different values; a run without it has an empty one."""

    key: str
    values: tuple[str, ...]


def differences(runs: Sequence[ComparedRun]) -> dict[str, list[Difference]]:
    """Return the settings that differ between runs, by section; those of the run as a whole are in the section `run`."""
    values = [run.values for run in runs]
    found: dict[str, list[Difference]] = {}
    for key in dict.fromkeys(key for one in values for key in one):
        row = tuple(one.get(key, "") for one in values)
        if len(set(row)) > 1:
            section = key.partition(".")[0] if "." in key else "run"
            found.setdefault(section, []).append(Difference(key, row))
    # The versions last: they rarely matter.
    return {name: found[name] for name in sorted(found, key=lambda name: name == "versions")}


def notes(runs: Sequence[ComparedRun]) -> Iterator[str]:
    """Yield what has to be known to read the comparison, such as figures that cannot be compared."""
    first, *others = runs
    for run in runs:
        if not run.evidence.compared:
            yield f"Run {run.letter} has no evaluation yet, so it has no figures and no replies here."
    for run in others:
        yield from _notes(first, run)


def _notes(a: ComparedRun, b: ComparedRun) -> Iterator[str]:
    pair = f"{a.letter} and {b.letter}"
    if a.gold != b.gold:
        yield f"Gold of {pair} is not the same (domain {_domain(a)} and {_domain(b)}), so accuracies by gold are not compared."
    if a.reader.config.model != b.reader.config.model:
        yield f"{pair} start from different models, so their win rates and KL are over different starts."
    if a.referee != b.referee:
        yield f"The referees of {pair} are not the same, so their win rates are not compared."
    if not (a.evidence.questions and b.evidence.questions):
        return
    shared, smaller = shared_questions(a.evidence, b.evidence), min(len(a.evidence.questions), len(b.evidence.questions))
    texts = set(b.evidence.questions.values())
    left_out = sum(text in texts for text in set(a.evidence.questions.values())) - len(shared)
    yield f"{pair} share {len(shared):,} of {smaller:,} test questions." + (
        f" {left_out:,} more are left out, because one of the runs was trained on them." if left_out else ""
    )


def _domain(run: ComparedRun) -> str:
    return run.reader.config.domain or "your own questions"
