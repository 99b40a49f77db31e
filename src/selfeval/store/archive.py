"""Replaced results in `replaced/1`, `replaced/2`, ... of a run folder, each with the metadata needed to restore it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from selfeval.errors import RunFolderError
from selfeval.links import stays_inside
from selfeval.store.files import as_storage_error, read_object, write_json
from selfeval.store.ledger import JOURNAL, read_key

__all__ = ["OF_THE_RUN", "Archive"]

_FACTS = "archive.json"

OF_THE_RUN = ("config", "device", "made_of", "commit", "date", "templates")
"""Values of run.json that results depend on; restored together with them."""


class Archive:
    """Archive of replaced results in a run folder.

    Results that one process sets aside share a number, unless a stage is set aside twice.

    Args:
        root: the run folder.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.folder = root, root / "replaced"
        self._number: int | None = None

    def numbers(self) -> list[int]:
        """Return the numbers of restorable results, oldest first."""
        return sorted(int(p.parent.name) for p in self.folder.glob(f"*/{_FACTS}") if p.parent.name.isdecimal())

    def facts(self, number: int) -> dict[str, Any]:
        """Read the metadata of archived results: configuration, keys, stages (with their entries in run.json) and paths.

        Raises:
            RunFolderError: there is no such number, or its metadata is damaged.
        """
        path = self.folder / str(number) / _FACTS
        if number not in self.numbers():
            there = ", ".join(map(str, self.numbers())) or "none"
            raise RunFolderError(f"{self.folder} has no results {number} that can be restored; available: {there}")
        remedy = f"its results remain in {path.parent}; move the files you need into the run folder yourself"
        facts = read_object(path, "config", "keys", "stages", "paths", remedy=remedy)
        _refuse_other_kinds(path, facts, remedy)
        _refuse_other_places(path, facts["paths"], remedy)
        return facts

    def take(self, stage: str, paths: Sequence[Path], run: Mapping[str, Any]) -> None:
        """Move the existing paths of a stage to the archive.

        Args:
            stage: name of the stage.
            paths: files and folders of the run; the last one contains the stage's key.
            run: contents of run.json when these results were created.
        """
        # A stage need not have written all of its paths.
        found = [path for path in paths if path.exists()]
        target = self._target(found)
        path = target / _FACTS
        facts = read_object(path) if path.is_file() else self._new_facts(run)
        facts["stages"][stage] = run.get("stages", {}).get(stage, {})
        facts["paths"] += [p.relative_to(self.root).as_posix() for p in found]
        # Before the first move: after a kill, every file in the archive is listed, and `put_back` skips listed files that are
        # still in the run.
        write_json(path, facts)
        for source in found:
            self._move(source, target / source.relative_to(self.root))

    def _new_facts(self, run: Mapping[str, Any]) -> dict[str, Any]:
        keys = {path.parent.name: read_key(self.root, path.parent.name) for path in sorted(self.root.glob("*/key.json"))}
        kept = {name: run.get(name) for name in OF_THE_RUN}
        return {**kept, "keys": keys, "stages": {}, "paths": []}

    def _target(self, paths: Sequence[Path]) -> Path:
        # A second result of the same stage must not overwrite the first, so it gets the next number.
        if self._number is None or any((self._folder() / path.relative_to(self.root)).exists() for path in paths):
            taken = [int(path.name) for path in self.folder.glob("*") if path.name.isdecimal()]
            self._number = max(taken, default=0) + 1
        return self._folder()

    def _folder(self) -> Path:
        return self.folder / str(self._number)

    def _move(self, source: Path, target: Path) -> None:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(source, target)
        except OSError as error:
            raise as_storage_error(target, error) from error

    def put_back(self, number: int) -> None:
        """Restore archived results; only a stage's key and journal may exist at their destination.

        If killed, the remaining files stay in the archive, and the next call resumes.
        """
        folder = self.folder / str(number)
        for name in self.facts(number)["paths"]:
            source, target = folder / name, self.root / name
            if source.exists():
                # Left by a stage that began and wrote nothing; anything else would make `rmdir` fail.
                for marker in ("key.json", JOURNAL):
                    (target / marker).unlink(missing_ok=True)
                if target.is_dir():
                    target.rmdir()
                self._move(source, target)
        # Files that are not listed stay in the archive.
        left = [path for path in folder.rglob("*") if path.is_file() and path.name != _FACTS]
        if not left:
            shutil.rmtree(folder)

    def note_restoring(self, number: int) -> None:
        """Record that the destination of these results is free, so a killed restore resumes instead of restarting."""
        write_json(self.folder / str(number) / _FACTS, {**self.facts(number), "restoring": True})


def _refuse_other_kinds(path: Path, facts: Mapping[str, Any], remedy: str) -> None:
    """Check that the metadata are objects, and keys and stages objects of objects."""
    for name in ("config", "keys", "stages"):
        value = {} if name == "config" and facts[name] is None else facts[name]
        whole = isinstance(value, dict) and (name == "config" or all(isinstance(one, dict) for one in value.values()))
        if not whole:
            raise RunFolderError(f"{path} is damaged (the values of '{name}' are not objects); {remedy}")


def _refuse_other_places(path: Path, names: Any, remedy: str) -> None:
    """Reject paths outside the run folder, which may be untrusted: restoring must not touch any other folder."""
    if not isinstance(names, list):
        raise RunFolderError(f"{path} is damaged (its paths are a {type(names).__name__}, expected a list); {remedy}")
    for name in names:
        if not stays_inside(name):
            raise RunFolderError(f"{path} is damaged (it lists {name!r}, which is not a path in the run folder); {remedy}")
