"""Links in folders that may come from somebody else.

A model folder and a run folder are data. A link in one of them that leads to another place on this disk would put the file
it points to into a prompt, a report or an exported folder, which are made to be shown and published.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from selfeval.errors import InputError

__all__ = ["entries", "refuse_links"]

_PACKAGE = Path(__file__).parent
"""Some installers link a package's files to a cache; they are not somebody else's."""


def entries(folder: Path) -> list[Path]:
    """Return everything in a folder and its subfolders, linked folders as links and not by their content."""
    found = []
    for place, folders, files in os.walk(folder):
        found += [Path(place, name) for name in (*folders, *files)]
    return sorted(found)


def refuse_links(root: Path, paths: Iterable[Path], error: type[InputError]) -> None:
    """Refuse files and folders that lead out of the folder they are in.

    Args:
        root: the folder that may not be left. It may be a link itself, since the user named it.
        paths: in it; those that do not exist are skipped.
        error: the kind of error to raise.

    Raises:
        InputError: of the kind `error`; names the link, the place it leads to, and the remedy.
    """
    if root.absolute().is_relative_to(_PACKAGE):
        return
    allowed = _allowed(Path(os.path.realpath(root)))
    for path in paths:
        target = Path(os.path.realpath(path))  # not Path.resolve, which raises on a loop of links
        if os.path.lexists(path) and not any(target.is_relative_to(place) for place in allowed):
            raise error(
                f"{path} is a link to {target}, outside of {root}, and links are not followed out of a folder; replace it with "
                "a copy of the file if it belongs there"
            )


def _allowed(root: Path) -> tuple[Path, ...]:
    """In the hub's cache the files of `snapshots/REVISION` are links to `blobs` of the same repository."""
    for place in (root, *root.parents):
        if place.parent.name == "snapshots" and (place.parent.parent / "blobs").is_dir():
            return root, place.parent.parent / "blobs"
    return (root,)
