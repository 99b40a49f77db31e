"""Moves of results between a run folder and its archive, which are completed after a kill at any point.

A move takes several renames and a change of run.json. It is written to a journal, `replaced/moving.json`, before the first
rename, and the journal is removed after the last change. The next process that opens the run folder completes a move whose
journal it finds. Every step can be repeated.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from selfeval.errors import RunFolderError
from selfeval.links import stays_inside
from selfeval.store.files import as_storage_error, write_json
from selfeval.store.ledger import JOURNAL
from selfeval.store.sealed import read_sealed, write_sealed

__all__ = ["FACTS", "Move", "Shelf", "only_markers", "read_move", "refuse_other_places"]

FACTS = "archive.json"
"""Metadata of archived results, in their folder."""

_MOVING = "moving.json"
_MARKERS = ("key.json", JOURNAL)
"""Files of a stage that began and wrote nothing."""


@dataclass(frozen=True)
class Shelf:
    """One side of a move: a numbered folder of the archive, and the paths to move into or out of it.

    Attributes:
        number: number of the folder.
        paths: paths relative to the run folder.
        facts: the folder's metadata.
    """

    number: int
    paths: Sequence[str]
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Move:
    """A move as its journal records it.

    Attributes:
        aside: results to set aside; None if there are none.
        back: archived results to put back afterwards; None if there are none.
        run: values of run.json to set at the end.
    """

    aside: Shelf | None
    back: Shelf | None
    run: Mapping[str, Any]

    def begin(self, archive: Path) -> None:
        """Write the journal. From now on the move is completed, by this process or by the next one."""
        write_sealed(archive / _MOVING, asdict(self))

    def rename(self, root: Path, archive: Path) -> None:
        """Make all renames that are still to be made."""
        if self.aside:
            self._set_aside(root, archive / str(self.aside.number), self.aside)
        if self.back:
            self._put_back(root, archive / str(self.back.number), self.back)

    def _set_aside(self, root: Path, folder: Path, shelf: Shelf) -> None:
        # First, so that every file in the archive is listed.
        write_json(folder / FACTS, shelf.facts)
        for name in shelf.paths:
            # A path that is in both places was set aside before the kill, and other results are already back in its place.
            if (root / name).exists() and not (folder / name).exists():
                _rename(root / name, folder / name)

    def _put_back(self, root: Path, folder: Path, shelf: Shelf) -> None:
        for name in shelf.paths:
            if (folder / name).exists():
                _rename(folder / name, root / name)

    def end(self, archive: Path) -> None:
        """Remove the folder whose results were put back, and the journal. Files that are not listed stay in the archive."""
        if self.back:
            folder = archive / str(self.back.number)
            (folder / FACTS).unlink(missing_ok=True)
            if not any(path.is_file() for path in folder.rglob("*")):
                shutil.rmtree(folder, ignore_errors=True)
        (archive / _MOVING).unlink(missing_ok=True)


def read_move(archive: Path) -> Move | None:
    """Read the journal of a move that a killed process left unfinished; None if there is none.

    Raises:
        RunFolderError: the journal is damaged.
    """
    path = archive / _MOVING
    if not path.exists():
        return None
    remedy = f"remove it; the files that it was moving are in {archive.parent} and {archive}"
    values = read_sealed(path, "aside", "back", "run", remedy=remedy)
    try:
        move = Move(_shelf(values["aside"]), _shelf(values["back"]), dict(values["run"]))
    except (TypeError, ValueError) as error:
        raise RunFolderError(f"{path} is damaged ({error}); {remedy}") from error
    for shelf in (move.aside, move.back):
        refuse_other_places(path, list(shelf.paths) if shelf else [], remedy)
    return move


def _shelf(values: Any) -> Shelf | None:
    if values is None:
        return None
    found = Shelf(**values)
    whole = isinstance(found.facts, dict) and isinstance(found.facts.get("stages"), dict)
    if type(found.number) is not int or not isinstance(found.paths, list) or not whole:
        raise ValueError("a folder of the archive needs a number, a list of paths and facts with the stages")
    return found


def only_markers(path: Path) -> bool:
    """Return whether a path is the folder of a stage that began and wrote nothing."""
    return path.is_dir() and all(part.name in _MARKERS for part in path.iterdir())


def _rename(source: Path, target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if only_markers(target):
            shutil.rmtree(target)
        os.replace(source, target)
    except OSError as error:
        raise as_storage_error(target, error) from error


def refuse_other_places(path: Path, names: Any, remedy: str) -> None:
    """Reject paths outside the run folder, which may be untrusted: a move must not touch any other folder.

    Args:
        path: file that lists the paths, for the error message.
        names: the paths.
        remedy: advice for the error message.

    Raises:
        RunFolderError: they are not a list of paths in the run folder.
    """
    if not isinstance(names, list):
        raise RunFolderError(f"{path} is damaged (its paths are a {type(names).__name__}, expected a list); {remedy}")
    for name in names:
        if not stays_inside(name):
            raise RunFolderError(f"{path} is damaged (it lists {name!r}, which is not a path in the run folder); {remedy}")
