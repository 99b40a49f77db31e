"""Vectors in the run folder: each text is embedded once per embedder.

`embeddings/EMBEDDER/` has files that are written once and never changed, each under a new name, so two processes can add to the
same folder. Many files are merged into one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

import numpy as np
from filelock import FileLock, Timeout

from selfeval.errors import EndpointError, StorageError
from selfeval.quality.embeddings.protocol import Embedder, Vectors
from selfeval.quality.embeddings.vector_files import VectorFile, open_vectors, write_vectors
from selfeval.store import fingerprint
from selfeval.texts import text_digest

__all__ = ["EMBEDDINGS", "CachedEmbedder"]

EMBEDDINGS = "embeddings"
"""Folder in a run folder with the vectors."""

_GROUP = 1024
_MOST_FILES = 32


class CachedEmbedder:
    """An embedder that keeps its vectors on disk.

    Args:
        embedder: computes the vectors that are not kept yet.
        folder: folder of the vectors, such as `RUN/embeddings`.
        note: Optional. Receives a message if a file is damaged or cannot be read, or if vectors cannot be kept.
        group: Texts that are embedded before their vectors are written: an interruption loses no more than these.
            Default: 1024.
    """

    def __init__(
        self, embedder: Embedder, folder: Path, note: Callable[[str], None] = lambda message: None, *, group: int = _GROUP
    ) -> None:
        self.embedder, self._note, self._group = embedder, note, group
        self.folder = folder / fingerprint(embedder.name)
        self._width: int | None = None
        self._skipped: set[Path] = set()
        self._is_unmerged = False
        self._files: dict[Path, VectorFile] = {}
        self._places: dict[bytes, tuple[VectorFile, int]] = {}
        self._unkept: dict[bytes, Vectors] = {}

    @property
    def name(self) -> str:
        """Name of the embedder."""
        return self.embedder.name

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Return `[N, D]` vectors, those of texts that were embedded before from the disk; zeros for blank texts.

        A damaged file is removed, with a message, and its texts are embedded again.

        Raises:
            EndpointError: a server returns vectors of another width than before.
        """
        self._read_new_files()
        keys = {text: text_digest(text) for text in texts if text.strip()}
        fresh = self._embed_missing([(key, text) for text, key in keys.items() if self._find(key) is None])
        if self._width is None:
            return self.embedder.embed(texts)  # all of them are blank, or there are none
        found_ND = np.zeros((len(texts), self._width), np.float32)
        for number, text in enumerate(texts):
            if text in keys:
                kept = self._find(keys[text])
                found_ND[number] = fresh[keys[text]] if kept is None else kept
        return found_ND

    def _embed_missing(self, missing: Sequence[tuple[bytes, str]]) -> dict[bytes, Vectors]:
        """Embed and keep texts, and return their vectors by key: another process may remove the file at once, to merge it."""
        fresh: dict[bytes, Vectors] = {}
        for start in range(0, len(missing), self._group):
            keys, texts = zip(*missing[start : start + self._group], strict=True)
            vectors_ND = self.embedder.embed(texts)
            self._check_width(vectors_ND.shape[1])
            fresh |= zip(keys, vectors_ND, strict=True)
            self._keep(keys, vectors_ND)
        return fresh

    def _check_width(self, width: int) -> None:
        if self._width not in (None, width):
            raise EndpointError(
                f"the embedder {self.name} returned vectors with {width} dimensions, but those in {self.folder} have "
                f"{self._width}; remove this folder if the model behind the address has changed, or set the former model"
            )
        self._width = width

    def _find(self, key: bytes) -> Vectors | None:
        if (place := self._places.get(key)) is not None:
            row: Vectors = place[0].vectors_ND[place[1]]
            return row
        return self._unkept.get(key)

    def _keep(self, keys: Sequence[bytes], vectors_ND: Vectors) -> None:
        path = self.folder / f"{uuid4().hex}.safetensors"
        try:
            write_vectors(path, self.name, keys, vectors_ND)
        except StorageError as error:
            # Vectors can be computed again, so a full or read-only disk does not end the work.
            if not self._unkept:
                self._note(f"vectors are not kept: {error}")
            self._unkept.update(zip(keys, vectors_ND, strict=True))
            return
        self._open(path)
        self._merge()

    def _read_new_files(self) -> None:
        for path in sorted(self.folder.glob("*.safetensors")):
            if path not in self._files and path not in self._skipped:
                self._open(path)

    def _open(self, path: Path) -> None:
        try:
            file = open_vectors(path, self.name)
        except FileNotFoundError:  # merged by another process
            return
        except ValueError as error:
            self._note(f"{path} is damaged ({error}); its vectors are computed again")
            with suppress(OSError):
                path.unlink(missing_ok=True)
            return
        except OSError as error:  # such as too many open files: the file may be good
            self._skip(path, f"cannot be read ({error})")
            return
        width = file.vectors_ND.shape[1]
        if width == 0 or self._width not in (None, width):
            self._skip(path, f"has vectors with {width} dimensions")
            return
        self._width = width
        self._files[path] = file
        for row, key in enumerate(file.keys):
            # The first file that has a text wins, so later ones do not change its vector.
            self._places.setdefault(key, (file, row))

    def _skip(self, path: Path, reason: str) -> None:
        self._skipped.add(path)
        self._note(f"{path} {reason} and is not used; its vectors are computed again")

    def _merge(self) -> None:
        """Merge the files into one if there are many. Another process that has them mapped keeps reading the old ones."""
        if len(self._files) < _MOST_FILES or self._is_unmerged:
            return
        try:
            with self._merging() as alone:
                if alone:
                    self._merge_files()
        except (OSError, ValueError, StorageError) as error:
            # Many files are only slower, so a full disk does not end the work.
            self._is_unmerged = True
            self._note(f"the files in {self.folder} are not merged: {error}")

    def _merge_files(self) -> None:
        old, places = list(self._files), self._places
        path = self.folder / f"{uuid4().hex}.safetensors"
        write_vectors(path, self.name, list(places), np.stack([file.vectors_ND[row] for file, row in places.values()]))
        merged = open_vectors(path, self.name)
        # Only now that the new file is open: until then the vectors of the old ones are needed.
        self._files = {path: merged}
        self._places = {key: (merged, row) for row, key in enumerate(merged.keys)}
        for one in old:
            one.unlink(missing_ok=True)

    @contextmanager
    def _merging(self) -> Iterator[bool]:
        lock = FileLock(self.folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()
