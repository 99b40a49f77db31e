"""Links and paths in folders of unknown origin.

A model folder and a run folder are data. A link in one of them that leads elsewhere on this disk would copy the file
it points to into a prompt, a report or an exported folder, which are meant to be shown and published. A path in one of their
files that leads elsewhere would have a file there read, moved or overwritten.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from selfeval.errors import InputError

__all__ = ["OF_OTHERS", "entries", "refuse_links", "stays_inside"]

OF_OTHERS = ("trackers/wandb",)
"""Subfolders of a run folder that nothing reads, and in which another program creates links to its cache."""
_PACKAGE = Path(__file__).parent
"""This package's folder is trusted: some installers link a package's files to a cache."""


def entries(folder: Path, skip: Sequence[str] = ()) -> list[Path]:
    """Return all entries of a folder and its subfolders. Linked folders are returned as links and not entered.

    Args:
        folder: the folder.
        skip: subfolders whose content is left out, relative to `folder`. Default: none.
    """
    found, left_out = [], {folder / name for name in skip}
    for place, folders, files in os.walk(folder):
        found += [Path(place, name) for name in (*folders, *files)]
        folders[:] = [name for name in folders if Path(place, name) not in left_out]
    return sorted(found)


def stays_inside(name: object) -> bool:
    """Return whether a value of a file is a relative path, with forward slashes, that does not leave its folder.

    Example:
        >>> [stays_inside(name) for name in ("questions/shard-00000.jsonl", "../notes", "/etc/passwd", "", 3)]
        [True, False, False, False, False]
    """
    parts = PurePosixPath(name).parts if isinstance(name, str) and "\0" not in name and "\\" not in name else ()
    return bool(parts) and ".." not in parts and parts[0] != "/"


def refuse_links(root: Path, paths: Iterable[Path], error: type[InputError]) -> None:
    """Refuse files and folders that lead out of the folder they are in.

    Args:
        root: the folder that must not be left. It may be a link itself, because the user named it.
        paths: paths in `root`; those that do not exist are skipped.
        error: class of the error to raise.

    Raises:
        InputError: an instance of `error`; the message names the link, its target, and the remedy.
    """
    if root.absolute().is_relative_to(_PACKAGE):
        return
    allowed = _allowed(Path(os.path.realpath(root)))
    for path in paths:
        target = Path(os.path.realpath(path))  # not Path.resolve, which raises on a symlink loop
        if os.path.lexists(path) and not any(target.is_relative_to(place) for place in allowed):
            raise error(
                f"{path} is a link to {target}, outside of {root}, and links that leave the folder are not followed; replace "
                "it with a copy of the file if it belongs there"
            )


def _allowed(root: Path) -> tuple[Path, ...]:
    """Return the folders that links may lead to.

    In the hub's cache, the files of `snapshots/REVISION` are links to `blobs` of the same repository.
    """
    for place in (root, *root.parents):
        if place.parent.name == "snapshots" and (place.parent.parent / "blobs").is_dir():
            return root, place.parent.parent / "blobs"
    return (root,)
