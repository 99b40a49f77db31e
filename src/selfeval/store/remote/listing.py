"""The files of a working copy at one moment, although this process and others write to it.

Files are replaced by renames, so a link keeps the content of a file that was replaced afterwards. Renames of this process wait
(`selfeval.store.changes`). Those of other processes, such as the workers of a training, do not: the folder is listed a second
time, and if both lists agree, the folder was in this state between them.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from selfeval.store.changes import CHANGING
from selfeval.store.remote.working_copy import Facts, facts_of, files_of

__all__ = ["Listing", "copy_start", "listed"]

_ATTEMPTS = 8
_CHUNK = 1 << 20
_PAUSE = 0.01
"""Seconds before the second attempt; doubled before each later one."""


@dataclass(frozen=True)
class Listing:
    """The files of a working copy.

    Attributes:
        facts: facts of each file.
        parts: links to the changed ones, or copies, which keep their content.
    """

    facts: Mapping[str, Facts]
    parts: Mapping[str, Path]


def listed(root: Path, known: Mapping[str, Facts], staging: Path) -> Listing | None:
    """List a working copy at one moment.

    Lines that are appended to a file afterwards are in its link too. A kill at that later moment would have kept them as well.

    Args:
        root: the working copy.
        known: facts of the files whose content is known.
        staging: folder for the links, on the same file system; it is emptied.

    Returns:
        None if other processes have renamed files during every attempt.
    """
    for attempt in range(_ATTEMPTS):
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        with CHANGING:
            found = _list(root, known, staging)
            if _is_unchanged(found, dict(files_of(root))):
                return found
        time.sleep(_PAUSE * 2**attempt)
    return None


def _list(root: Path, known: Mapping[str, Facts], staging: Path) -> Listing:
    facts, parts = dict(files_of(root)), dict[str, Path]()
    for path, found in list(facts.items()):
        if known.get(path) == found:
            continue
        part = staging / str(len(parts))
        if _link(root / path, part):
            parts[path] = part
        else:
            del facts[path]
    return Listing(facts, parts)


def _is_unchanged(before: Listing, after: Mapping[str, Facts]) -> bool:
    """Return whether no file was renamed, added or removed between two lists."""
    return before.facts.keys() == after.keys() and all(
        # Equal numbers are the same file only while a link keeps the number from being given to another one.
        facts == after[path] or (path in before.parts and _number(before.parts[path]) == facts[0] == after[path][0])
        for path, facts in before.facts.items()
    )


def _number(part: Path) -> int | None:
    facts = facts_of(part)
    return None if facts is None else facts[0]


def _link(source: Path, target: Path) -> bool:
    """Keep the content of a file under another name. Return False if the file was removed just now."""
    try:
        os.link(source, target)
    except FileNotFoundError:
        return False
    except OSError:  # a file system without hard links
        try:
            shutil.copy2(source, target)
        except FileNotFoundError:
            return False
    return True


def copy_start(source: Path, target: Path, size: int) -> None:
    """Copy the first bytes of a file to which others may append."""
    with source.open("rb") as read, target.open("wb") as write:
        while size and (data := read.read(min(size, _CHUNK))):
            write.write(data)
            size -= len(data)
