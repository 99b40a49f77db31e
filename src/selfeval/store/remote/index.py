"""The index of a run at a URL: `index.json`, which names the object of every file.

A folder of the run, such as a checkpoint, is replaced by one rename, and results are moved to `replaced/` by others. Objects
have neither, so files are not objects of the same name. Each content is an object that never changes, and the index says
which files there are. Replacing the index, by one conditional write, replaces all files at once: a reader, and a process that
resumes the run, see a state in which the run folder has been at one moment.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from selfeval.errors import RunFolderError
from selfeval.links import stays_inside
from selfeval.store.files import fingerprint
from selfeval.store.remote.objects import Objects
from selfeval.store.remote.reaching import reach
from selfeval.store.sealed import SEAL
from selfeval.texts import parse_json

__all__ = ["INDEX", "OBJECTS", "Entry", "Index", "epoch_of", "object_name", "read_index"]

INDEX = "index.json"
"""Name of the index among the objects of a run."""

OBJECTS = "objects"
"""Folder of the objects of files."""

_FORMAT = 1
_OBJECT = re.compile(rf"{OBJECTS}/(\d{{6}})-[0-9a-f]{{64}}")


@dataclass(frozen=True)
class Entry:
    """A file of the run.

    Attributes:
        object: name of its object.
        sha256: hash of its bytes, as hex.
        bytes: its size.
        modified: when it was changed, in nanoseconds since 1970.
    """

    object: str
    sha256: str
    bytes: int
    modified: int


@dataclass(frozen=True)
class Index:
    """The files of the run.

    Attributes:
        files: entry of each file, by path in the run folder.
        epoch: number of the lease of the process that wrote it.
        id: distinguishes it from every other one.
    """

    files: Mapping[str, Entry] = field(default_factory=dict)
    epoch: int = 0
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def as_bytes(self) -> bytes:
        """Return its content, with a hash of itself."""
        values = {
            "format": _FORMAT,
            "id": self.id,
            "epoch": self.epoch,
            "files": {path: asdict(entry) for path, entry in sorted(self.files.items())},
        }
        return json.dumps({**values, SEAL: fingerprint(values)}, ensure_ascii=False).encode()


def object_name(epoch: int, sha256: str) -> str:
    """Return the name of the object of a content.

    It has the number of the lease, so that a process that has lost its lease never removes an object of its successor.
    """
    return f"{OBJECTS}/{epoch:06d}-{sha256}"


def epoch_of(name: str) -> int | None:
    """Return the number of the lease in the name of an object; None for other names."""
    found = _OBJECT.fullmatch(name)
    return int(found[1]) if found else None


def read_index(objects: Objects, url: str, patience: float) -> tuple[Index, str] | None:
    """Read the index and its version; None if there is none.

    Raises:
        RunFolderError: it is damaged, or of another version of this package.
        StorageError: the store cannot be reached.
    """
    found = reach(lambda: objects.read_version(INDEX), url, "read the index", patience=patience)
    return None if found is None else (_parsed(found[0], url), found[1])


def _parsed(data: bytes, url: str) -> Index:
    try:
        values = parse_json(data, lenient=True)
        written = values.pop(SEAL)
        if values["format"] != _FORMAT:
            raise ValueError(f"its format is {values['format']!r}, this version of selfeval reads {_FORMAT}")
        if written != fingerprint(values):
            raise ValueError("its content does not match its hash")
        files = {path: _entry(path, entry) for path, entry in values["files"].items()}
        return Index(files, int(values["epoch"]), str(values["id"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunFolderError(
            f"{url}/{INDEX} is damaged ({error}); restore this object from an earlier version or a backup, or use another URL"
        ) from error


def _entry(path: Any, values: Mapping[str, Any]) -> Entry:
    entry = Entry(**values)
    # The index may come from somebody else: nothing outside of the working copy and of the objects may be read or written.
    if not stays_inside(path) or epoch_of(entry.object) is None:
        raise ValueError(f"it lists {path!r} as {entry.object!r}")
    if not isinstance(entry.sha256, str) or type(entry.bytes) is not int or type(entry.modified) is not int:
        raise ValueError(f"the values of {path!r} have other types")
    return entry
