"""The runs that the pages show, by the name that they have in an address."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from selfeval.errors import InputError
from selfeval.runs.listing import run_folders
from selfeval.runs.reader import RunReader
from selfeval.view.problems import NotFoundError

__all__ = ["OpenedRuns", "RunName"]

RunName = str
"""Name of a run in an address: its path with `~` for `/`, `\\xff` for a byte that is not UTF-8, and `@2` for round 2."""


class OpenedRuns:
    """The runs under some folders. They are searched again at every call, because runs begin and end while a page is open.

    Args:
        folders: run folders, or folders that contain some.
        may_be_missing: a folder may be created later, by the first run. Default: False.

    Raises:
        InputError: one of them is not a folder.
    """

    def __init__(self, folders: Sequence[Path], *, may_be_missing: bool = False) -> None:
        if not may_be_missing and (missing := [folder for folder in folders if not folder.is_dir()]):
            raise InputError(f"{missing[0]} is not a folder; pass a run folder, or a folder that contains some (default: runs)")
        self.folders = tuple(folders)

    def named(self) -> dict[RunName, Path]:
        """Return the folders of all runs by name, in the order of the folders that were passed."""
        found: dict[RunName, Path] = {}
        for name, folder in self._found():
            if folder in found.values():  # passed twice, or inside of another one
                continue
            while name in found:
                name += "+"
            found[name] = folder
        return found

    def _found(self) -> Iterator[tuple[RunName, Path]]:
        for given in self.folders:
            for folder in run_folders(given):
                inner = folder.relative_to(given).parts
                yield _name(inner or (given.resolve().name,)), folder.resolve()

    def reader(self, name: RunName) -> RunReader:
        """Open a run, or a round of it.

        Raises:
            NotFoundError: there is no such run or round.
            RunFolderError: its run.json is damaged.
        """
        run, _, number = name.rpartition("@") if name.rpartition("@")[2].isdecimal() else (name, "", "1")
        folder = self.named().get(run)
        if folder is None:
            raise NotFoundError(f"There is no run {run!r} here.")
        rounds = RunReader(folder).rounds
        if not 1 <= int(number) <= len(rounds):
            raise NotFoundError(f"The run {run!r} has no round {number}; it has {len(rounds)}.")
        return rounds[int(number) - 1]


def _name(parts: Sequence[str]) -> RunName:
    # "@" separates the round, and "~" the folders. A folder may have any bytes in its name, but an address only characters.
    name = os.fsencode("~".join(parts)).decode("utf-8", "backslashreplace")
    return name.replace("@", "_")
