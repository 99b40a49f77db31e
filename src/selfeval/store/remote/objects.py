"""Objects at a URL: whole reads, whole writes, and writes that depend on the object that is there.

A conditional write is the only operation that two machines cannot both succeed in, so the lease and the index of a run depend
on it. S3 has it (`If-None-Match`, `If-Match`), and so has Google Cloud Storage (`ifGenerationMatch`). For local files and for
memory, a lock makes a comparison and a write one operation. Azure has it too, but adlfs does not offer it: there the comparison
comes first, and `conditional` is False.

Other file systems of fsspec, such as sftp, write to the object itself. A kill would leave half an index, with which the run
cannot be read any more. They are refused: fsspec has no rename that is one operation everywhere.
"""

from __future__ import annotations

import hashlib
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from selfeval.errors import InputError, MissingPackageError
from selfeval.store.files import writing

__all__ = ["Objects", "open_objects"]

_PACKAGES = {"s3": ("s3fs", "s3"), "s3a": ("s3fs", "s3")}
"""Package and extra of a protocol, where this package has an extra."""


class Objects:
    """Objects below a URL, by name.

    Args:
        files: file system of fsspec.
        root: its path of the URL.

    Attributes:
        conditional: whether `put_if` excludes other writers.
        settles: whether a lease is read again after it was written, because other writers may not be excluded.
    """

    conditional = False
    settles = True

    def __init__(self, files: Any, root: str) -> None:
        self._files, self._root = files, root.rstrip("/")

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def read(self, name: str) -> bytes | None:
        """Return the content of an object; None if there is none."""
        try:
            return bytes(self._files.cat_file(self._path(name)))
        except FileNotFoundError:
            return None

    def read_version(self, name: str) -> tuple[bytes, str] | None:
        """Return the content of an object and its version; None if there is none."""
        data = self.read(name)
        return None if data is None else (data, _digest(data))

    def download(self, name: str, path: Path) -> bool:
        """Write the content of an object to a local file. Return False if there is no such object."""
        try:
            self._files.get_file(self._path(name), str(path))
        except FileNotFoundError:
            return False
        return True

    def upload(self, name: str, data: bytes | Path) -> None:
        """Write an object, from memory or a file; readers see all of it or nothing."""
        self._make_folder(name)
        if isinstance(data, Path):
            self._files.put_file(str(data), self._path(name))
        else:
            self._files.pipe_file(self._path(name), data)

    def _make_folder(self, name: str) -> None:
        """Create the folder of an object, on file systems that have folders."""
        self._files.makedirs(self._path(name).rpartition("/")[0], exist_ok=True)

    def put_if(self, name: str, data: bytes, version: str | None) -> str | None:
        """Write an object if its version is still the given one.

        Args:
            name: the object.
            data: its new content, which differs from every earlier one.
            version: its version, from `read_version` or an earlier call; None if it must not exist.

        Returns:
            Its new version, or None if it has another version.
        """
        with self._alone():
            found = self.read_version(name)
            if (None if found is None else found[1]) != version:
                return None
            self.upload(name, data)
        return _digest(data)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Exclude other writers while the block runs, where the implementation can."""
        yield

    def reconnect(self) -> None:
        """Read the credentials again, where the implementation keeps them."""

    def remove(self, name: str) -> None:
        """Remove an object, if it is there."""
        with suppress(FileNotFoundError):
            self._files.rm_file(self._path(name))

    def names(self, folder: str) -> list[str]:
        """Return the names of the objects in a folder."""
        try:
            found = self._files.ls(self._path(folder), detail=False)
        except FileNotFoundError:
            return []
        return [f"{folder}/{path.rstrip('/').rpartition('/')[2]}" for path in found]


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


_memory = threading.Lock()
_LOCKED = 30.0
"""Seconds after which a lock of `file://` that is not free counts as a failed call."""


class _InMemory(Objects):
    """Objects in the memory of this process; no other process sees them."""

    conditional = True
    settles = False

    def download(self, name: str, path: Path) -> bool:
        # fsspec gives all readers of an object the same position in it.
        with _memory:
            return super().download(name, path)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with _memory:
            yield


class _InFiles(Objects):
    """Objects in a folder of this machine, or of a shared file system, where the lock may hold on one machine only."""

    conditional = True

    def upload(self, name: str, data: bytes | Path) -> None:
        # fsspec writes in place, so a reader could see half an object.
        with writing(Path(self._path(name))) as part:
            if isinstance(data, Path):
                shutil.copyfile(data, part)
            else:
                part.write_bytes(data)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        Path(self._root).mkdir(parents=True, exist_ok=True)
        # A process that is suspended while it has the lock must not stop all others without a message.
        with FileLock(f"{self._root}/.lock", timeout=_LOCKED):
            yield


class _InS3(Objects):
    """Objects in S3, or in a store with its protocol."""

    conditional = True
    settles = False

    def _make_folder(self, name: str) -> None:
        """Do nothing: it would create the bucket."""

    def read_version(self, name: str) -> tuple[bytes, str] | None:
        bucket, key, _ = self._files.split_path(self._path(name))
        try:
            found = self._files.call_s3("get_object", Bucket=bucket, Key=key)
            return bytes(self._read_all(found["Body"])), str(found["ETag"])
        except FileNotFoundError:
            return None

    def reconnect(self) -> None:
        self._files.connect(refresh=True)

    def _read_all(self, body: Any) -> bytes:
        from fsspec.asyn import sync

        return bytes(sync(self._files.loop, body.read))

    def put_if(self, name: str, data: bytes, version: str | None) -> str | None:
        bucket, key, _ = self._files.split_path(self._path(name))
        condition = {"IfNoneMatch": "*"} if version is None else {"IfMatch": version}
        try:
            written = self._files.call_s3("put_object", Bucket=bucket, Key=key, Body=data, **condition)
        # There is no object of that version; without a condition, a missing bucket is no such answer.
        except FileNotFoundError:
            if version is None:
                raise
            return None
        except OSError as error:
            if _code(error) in ("PreconditionFailed", "412", "ConditionalRequestConflict", "409"):
                return None
            raise
        return str(written["ETag"])


def _code(error: BaseException) -> str:
    """Return the code of S3's answer, from the error that s3fs translated; empty if there is none."""
    response = getattr(error.__cause__, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


class _InGoogle(Objects):
    """Objects in Google Cloud Storage; the version is the generation of the object."""

    conditional = True
    settles = False

    def _make_folder(self, name: str) -> None:
        """Do nothing: it would create the bucket."""

    def read_version(self, name: str) -> tuple[bytes, str] | None:
        try:
            headers, data = self._files.call("GET", self._files.url(self._path(name)))
        except FileNotFoundError:
            return None
        return bytes(data), str(headers["X-Goog-Generation"])

    def put_if(self, name: str, data: bytes, version: str | None) -> str | None:
        bucket, key, _ = self._files.split_path(self._path(name))
        # The address of downloads with another path: gcsfs has no public name for it.
        place = self._files.url(self._path(name)).partition("/download/")[0]
        try:
            written = self._files.call(
                "POST",
                f"{place}/upload/storage/v1/b/{bucket}/o",
                uploadType="media",
                name=key,
                ifGenerationMatch=version or "0",
                data=data,
                json_out=True,
            )
        except FileExistsError:  # the translation of "precondition failed"
            return None
        return str(written["generation"])


_KINDS = {
    "memory": _InMemory,
    "file": _InFiles,
    "local": _InFiles,
    "s3": _InS3,
    "s3a": _InS3,
    "gs": _InGoogle,
    "gcs": _InGoogle,
    "az": Objects,
    "abfs": Objects,
    "abfss": Objects,
}
"""Implementation of each protocol whose writes are complete or absent."""
_OPTIONS = {name: {"use_listings_cache": False} for name in ("s3", "s3a", "gs", "gcs")}
"""Options of the file system of a protocol."""


def open_objects(url: str) -> Objects:
    """Open a URL. Nothing is read or written.

    Options of the file system, such as the address of an S3-compatible store, come from the service's environment variables and
    configuration files, and from those of fsspec.

    Raises:
        MissingPackageError: the package for the protocol is not installed.
        InputError: a run cannot be kept at such a URL, or the package refuses the URL or its configuration.
    """
    import fsspec

    scheme = url.partition("://")[0].lower()
    if scheme not in _KINDS:
        raise InputError(
            f"a run cannot be kept at {scheme}://, where a kill in the middle of a write would leave half a file; expected a "
            f"store whose writes are complete or absent ({', '.join(f'{name}://' for name in _KINDS)}), or a folder, for "
            "example a mounted one"
        )
    try:
        files, root = fsspec.core.url_to_fs(url, **_OPTIONS.get(scheme, {}))
    except ImportError as error:
        if scheme in _PACKAGES:
            raise MissingPackageError(f"a run at {scheme}://", *_PACKAGES[scheme]) from error
        raise InputError(f"a run at {scheme}:// needs a package that is not installed: {error}") from error
    except ValueError as error:
        raise InputError(f"{url} cannot be opened ({error}); expected for example s3://bucket/runs/shop") from error
    return _KINDS[scheme](files, root)
