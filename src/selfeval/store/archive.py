"""Replaced results in `replaced/1`, `replaced/2`, ... of a run folder, each with the metadata needed to restore it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from selfeval.errors import RunFolderError
from selfeval.store.files import read_object
from selfeval.store.ledger import read_key
from selfeval.store.moves import FACTS, Shelf, only_markers, refuse_other_places

__all__ = ["OF_THE_RUN", "Archive"]

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
        return sorted(int(p.parent.name) for p in self.folder.glob(f"*/{FACTS}") if p.parent.name.isdecimal())

    def facts(self, number: int) -> dict[str, Any]:
        """Read the metadata of archived results: configuration, keys, stages (with their entries in run.json) and paths.

        Raises:
            RunFolderError: there is no such number, or its metadata is damaged.
        """
        path = self.folder / str(number) / FACTS
        if number not in self.numbers():
            there = ", ".join(map(str, self.numbers())) or "none"
            raise RunFolderError(f"{self.folder} has no results {number} that can be restored; available: {there}")
        remedy = f"its results remain in {path.parent}; move the files you need into the run folder yourself"
        facts = read_object(path, "config", "keys", "stages", "paths", remedy=remedy)
        _refuse_other_kinds(path, facts, remedy)
        refuse_other_places(path, facts["paths"], remedy)
        return facts

    def shelf_for(self, stages: Mapping[str, Sequence[Path]], run: Mapping[str, Any]) -> Shelf | None:
        """Plan to set stages aside.

        Args:
            stages: files and folders of each stage; the last one contains the stage's key.
            run: contents of run.json when these results were created.

        Returns:
            Where they go, and the metadata to write there; None if they have no files.
        """
        # A stage need not have written all of its paths.
        found = [path for paths in stages.values() for path in paths if path.exists()]
        if not found:
            return None
        folder = self._free_folder(found)
        facts = read_object(folder / FACTS) if (folder / FACTS).is_file() else self._new_facts(run)
        facts["stages"] |= {stage: run.get("stages", {}).get(stage, {}) for stage in stages}
        names = [path.relative_to(self.root).as_posix() for path in found]
        facts["paths"] += names
        return Shelf(int(folder.name), names, facts)

    def shelf_of(self, number: int, aside: Shelf | None) -> Shelf:
        """Plan to put archived results back.

        Args:
            number: number of the results.
            aside: results that are set aside first, to make room.

        Raises:
            RunFolderError: a file or folder that is not set aside is in their place.
        """
        facts = self.facts(number)
        for name in facts["paths"]:
            target = self.root / name
            if target.exists() and not only_markers(target) and name not in (aside.paths if aside else ()):
                raise RunFolderError(
                    f"{target} exists, and is no result that would be set aside; move it away and rerun the same command"
                )
        return Shelf(number, facts["paths"], facts)

    def _new_facts(self, run: Mapping[str, Any]) -> dict[str, Any]:
        keys = {path.parent.name: read_key(self.root, path.parent.name) for path in sorted(self.root.glob("*/key.json"))}
        kept = {name: run.get(name) for name in OF_THE_RUN}
        return {**kept, "keys": keys, "stages": {}, "paths": []}

    def _free_folder(self, paths: Sequence[Path]) -> Path:
        # A second result of the same stage must not overwrite the first, so it gets the next number.
        folder = self.folder / str(self._number)
        if self._number is None or any((folder / path.relative_to(self.root)).exists() for path in paths):
            taken = [int(path.name) for path in self.folder.glob("*") if path.name.isdecimal()]
            self._number = max(taken, default=0) + 1
        return self.folder / str(self._number)


def _refuse_other_kinds(path: Path, facts: Mapping[str, Any], remedy: str) -> None:
    """Check that the metadata are objects, and keys and stages objects of objects."""
    for name in ("config", "keys", "stages"):
        value = {} if name == "config" and facts[name] is None else facts[name]
        whole = isinstance(value, dict) and (name == "config" or all(isinstance(one, dict) for one in value.values()))
        if not whole:
            raise RunFolderError(f"{path} is damaged (the values of '{name}' are not objects); {remedy}")
    for row in facts["stages"].values():
        if not isinstance(row.get("seconds", 0.0), int | float) or not isinstance(row.get("counts") or {}, dict):
            raise RunFolderError(f"{path} is damaged (a stage's 'seconds' are no number, or its 'counts' no object); {remedy}")
