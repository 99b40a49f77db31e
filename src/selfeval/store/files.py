"""Atomic writes, size-limited reads, and content hashes of files."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from selfeval.errors import RunFolderError, StorageError
from selfeval.store.changes import CHANGING, notify
from selfeval.texts import parse_json

__all__ = [
    "as_storage_error",
    "content_hash",
    "file_hash",
    "fingerprint",
    "open_file",
    "open_to_umask",
    "read_json",
    "read_object",
    "recover_folder",
    "write_file",
    "write_json",
    "writing",
]

_LARGEST_JSON = 256 << 20
"""Size limit of JSON files in bytes; the largest file of a run, report.json, has a few MiB."""

_OLD = ".old"
"""Suffix of a folder that is being replaced."""

_REMEDY = "remove it and rerun the same command to rebuild it"


def fingerprint(value: Any) -> str:
    """Return a short hash of a JSON-serialisable value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# -- hashes -------------------------------------------------------------------------------------------------------------


def file_hash(path: Path) -> str:
    """Compute the SHA-256 of a file's bytes, as hex.

    Cached in this process by path, size and modification time, because weight files are hashed repeatedly.

    Raises:
        RunFolderError: not a regular file.
        OSError: the file is missing or cannot be read.
    """
    return _hash(path, "bytes")


def content_hash(path: Path) -> str:
    """Compute the SHA-256 of a file's content, independent of key order.

    `.json` files are hashed in canonical form. So are the headers of `.safetensors` files, because the order of their metadata
    differs between processes (the library keeps it in a hash map). Other files, and files that do not parse as their suffix
    suggests, are hashed byte for byte.

    Raises:
        RunFolderError: not a regular file.
        OSError: the file is missing or cannot be read.
    """
    kinds = {".json": "json", ".safetensors": "safetensors"}
    return _hash(path, kinds.get(path.suffix, "bytes"))


def _hash(path: Path, kind: str) -> str:
    whole = Path(os.path.realpath(path))  # Path.resolve raises RuntimeError at a loop of links before Python 3.13
    # Size and time are part of the cache key, so a changed file is hashed again.
    facts = whole.stat()
    return _cached_hash(whole, kind, facts.st_size, facts.st_mtime_ns)


@lru_cache(maxsize=1 << 16)
def _cached_hash(path: Path, kind: str, size: int, changed_ns: int) -> str:
    found = hashlib.sha256()
    with open_file(path) as file:
        if kind == "json":
            _add_json(found, file, size)
        elif kind == "safetensors":
            _add_header(found, file, size)
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def _add_json(found: Any, file: BinaryIO, size: int) -> None:
    """Read the whole file and hash it in canonical form; rewind it if it is not JSON."""
    if size > _LARGEST_JSON:
        return
    try:
        found.update(_canonical(file.read()))
    except ValueError:
        file.seek(0)


def _add_header(found: Any, file: BinaryIO, size: int) -> None:
    """Read the header of a safetensors file and hash it in canonical form; rewind the file if it has no valid header."""
    start = file.read(8)
    # safetensors: 8 bytes little-endian length, a JSON header of that length, then the data.
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
    try:
        if length > min(size - 8, _LARGEST_JSON):
            raise ValueError("the header is longer than the file")
        # The header only; the caller hashes the data that follow, byte for byte.
        found.update(_canonical(file.read(length)))
    except ValueError:
        file.seek(0)


def _canonical(data: bytes) -> bytes:
    return json.dumps(parse_json(data, lenient=True), sort_keys=True, separators=(",", ":")).encode()


# -- reading ------------------------------------------------------------------------------------------------------------


def open_file(path: Path) -> BinaryIO:
    """Open a regular file for reading.

    Raises:
        RunFolderError: not a regular file; reading a named pipe or a terminal would block forever.
        OSError: the file is missing or cannot be opened.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        kind = "folder" if path.is_dir() else "device or named pipe"
        raise RunFolderError(f"{path} is a {kind}, expected a file; remove it and rerun the same command")
    return path.open("rb")


def read_json(path: Path, remedy: str | None = None) -> Any:
    """Read a JSON file.

    Args:
        path: path of the file.
        remedy: advice for the error message if the file is missing or damaged. Default: rerun the command to rebuild it.

    Raises:
        RunFolderError: the file is missing or damaged.
    """
    what_helps = remedy or _REMEDY
    try:
        with open_file(path) as file:
            # Limit to the file size, because `read` allocates as much as it is asked for.
            data = file.read(min(os.fstat(file.fileno()).st_size, _LARGEST_JSON) + 1)
        if len(data) > _LARGEST_JSON:
            raise ValueError(f"it has more than {_LARGEST_JSON >> 20} MiB")
        return parse_json(data, lenient=True)
    except FileNotFoundError as error:
        raise RunFolderError(f"{path} is missing; {remedy or f'is {path.parent} a run folder?'}") from error
    except ValueError as error:
        raise RunFolderError(f"{path} is damaged ({error}); {what_helps}") from error
    except OSError as error:
        raise RunFolderError(f"{path} cannot be read ({error.strerror or error}); {what_helps}") from error


def read_object(path: Path, *keys: str, remedy: str | None = None) -> dict[str, Any]:
    """Read a JSON object from a file.

    Args:
        path: path of the file.
        keys: required keys.
            remedy: see `read_json`.

    Raises:
        RunFolderError: the file is missing or damaged, is not an object, or lacks a key.
    """
    value = read_json(path, remedy)
    if not isinstance(value, dict):
        raise RunFolderError(f"{path} is damaged (a JSON {type(value).__name__}, expected an object); {remedy or _REMEDY}")
    if missing := [key for key in keys if key not in value]:
        raise RunFolderError(f"{path} is damaged (it has no {', '.join(missing)}); {remedy or _REMEDY}")
    return value


# -- writing ------------------------------------------------------------------------------------------------------------


@contextmanager
def writing(path: Path, *, new: bool = False) -> Iterator[Path]:
    """Yield a temporary path next to `path`, and rename it to `path` if the block succeeds.

    An existing file is replaced by a file, and an existing folder by a folder.

    Args:
        path: a file, or a folder, which is replaced with everything in it.
        new: never replace anything but an empty folder. Default: False.

    Raises:
        StorageError: the disk is full or cannot be written; an existing file at `path` is unchanged.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(temporary)
        if not new:
            recover_folder(_aside(path))
        yield temporary
        open_to_umask(temporary)
        # Before the rename: after a power failure, the new name must not point to data that were never written.
        _sync(temporary)
        with CHANGING:
            if new and path.is_dir():
                os.rmdir(path)
            _replace(temporary, path)
    # KeyboardInterrupt included: no temporary files are left behind.
    except BaseException as error:
        with _ignoring_system_errors():
            _remove(temporary)
        cause = _as_os_error(error)
        if cause is None:
            raise
        raise as_storage_error(path, cause) from error
    notify(path)


def _aside(path: Path) -> Path:
    """Return the place of an old folder while a new one is moved to its path."""
    return path.with_name(f".{path.name}{_OLD}")


def _replace(temporary: Path, path: Path) -> None:
    """Rename a file or folder to `path`."""
    if not (temporary.is_dir() and path.is_dir()):
        os.replace(temporary, path)
        return
    # `os.replace` cannot replace a folder that has files, so the old one is moved away first. After a kill in between,
    # `recover_folder` moves it back.
    old = _aside(path)
    os.replace(path, old)
    try:
        os.replace(temporary, path)
    except BaseException:
        os.replace(old, path)
        raise
    with _ignoring_system_errors():
        _remove(old)


def recover_folder(old: Path) -> None:
    """Undo or finish the replacement of a folder by a process that was killed.

    Args:
        old: path where `writing` kept the old folder, `.NAME.old`. Other paths, and one that does not exist, are ignored.

    Raises:
        StorageError: the folder cannot be moved or removed.
    """
    name = old.name.removeprefix(".").removesuffix(_OLD)
    if old.name != f".{name}{_OLD}" or not name or not old.is_dir() or old.is_symlink():
        return
    path = old.with_name(name)
    try:
        if os.path.lexists(path):
            _remove(old)
        else:
            os.replace(old, path)
    except OSError as error:
        raise as_storage_error(path, error) from error


@contextmanager
def _ignoring_system_errors() -> Iterator[None]:
    """Suppress OS errors during cleanup, so they do not hide the original error."""
    try:
        yield
    except OSError:
        return


def write_file(path: Path, data: bytes | str) -> None:
    """Write a file atomically; text is encoded as UTF-8."""
    with writing(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def write_json(path: Path, value: Any) -> None:
    """Write `value` atomically as indented JSON."""
    write_file(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def open_to_umask(path: Path) -> None:
    """Set the permissions of a file, or of a folder and its contents, to those implied by the umask.

    safetensors 0.8 writes files with mode 0600 regardless of the umask, and copies keep the mode of their source. Otherwise
    other users, or the server of a shared folder, could not read the weights.
    """
    umask = os.umask(0o077)  # reading it means setting it; the stricter value cannot expose a file of another thread
    os.umask(umask)
    for found in (path, *path.rglob("*")):
        if not found.is_symlink():
            found.chmod((found.stat().st_mode | (0o777 if found.is_dir() else 0o666)) & ~umask & 0o777)


def _sync(path: Path) -> None:
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    for file in files:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# -- errors of the system -----------------------------------------------------------------------------------------------

_SPACE = "free some space and rerun the same command"
_CAUSES = {
    errno.ENOSPC: ("the disk is full", _SPACE),
    errno.EDQUOT: ("the disk quota is used up", _SPACE),
    errno.EFBIG: (
        "the file would be larger than this process may write",
        "raise the limit (ulimit -f) and rerun the same command",
    ),
    errno.EACCES: ("permission denied", "make it writable for this user, or use another folder, and rerun the command"),
    errno.EPERM: ("the system does not permit it", "make it writable for this user, or use another folder"),
    errno.EROFS: ("the disk is mounted read-only", "mount it read-write, or copy the folder to another disk and use that"),
    errno.ENAMETOOLONG: ("the name is too long for this disk", "use a folder with a shorter path"),
    errno.EISDIR: ("a folder of that name exists", "move that folder away and rerun the same command"),
    errno.ENOTEMPTY: ("files have appeared in that folder", "move them away, or use another folder, and rerun the command"),
    errno.ELOOP: ("its path is a loop of symbolic links", "remove the link, or use another folder"),
    errno.EIO: ("the disk reports an input/output error", "check the disk, or copy the folder to another disk and use that"),
    errno.EMFILE: ("this process has too many files open", "raise the limit (ulimit -n) and rerun the same command"),
    errno.ENFILE: ("the system has too many files open", "close other programs and rerun the same command"),
}
"""Cause and remedy for each OS error code."""


def as_storage_error(path: Path, error: OSError) -> StorageError:
    """Convert an OS error into a `StorageError` that names the cause and a remedy."""
    path = Path(re.sub(r"/\.([^/]+)\.part(?=/|$)", r"/\1", str(path)))  # the name that it would have got
    unknown = error.strerror or str(error), "fix this and rerun the same command"
    cause, remedy = _CAUSES.get(error.errno or 0, unknown)
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        # Both mean that a path component is a file instead of a folder; the OS does not say which one.
        blocking = next((p for p in reversed(path.parents) if p.exists() and not p.is_dir()), path)
        cause, remedy = f"{blocking} is a file, not a folder", "move that file away, or use another folder"
    return StorageError(f"cannot write {path}: {cause}. Nothing is lost: {remedy}")


def _as_os_error(error: BaseException) -> OSError | None:
    """Return the OS error behind `error`, if any; safetensors only mentions it in its message, as `(os error N)`."""
    if isinstance(error, OSError):
        return error
    found = re.search(r"\(os error (\d+)\)", str(error)) if isinstance(error, Exception) else None
    return OSError(int(found.group(1)), os.strerror(int(found.group(1)))) if found else None
