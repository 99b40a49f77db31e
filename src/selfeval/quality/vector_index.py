"""An index of vectors: nearest neighbours by dot product, in memory or memory-mapped from a file.

Below `EXACT` vectors the search compares the query with all of them. Above, an inverted file (IVF: Jégou et al. 2011,
https://doi.org/10.1109/TPAMI.2010.57, section IV) groups the vectors by k-means, and a search compares the query with those of
the nearest groups. A graph (HNSW) answers more queries per second at the same recall, but takes several times as long to build
(`benchmarks/index.py`), and a run is searched with a few queries at a time, over records that change while it is in progress.

Shapes: N vectors, Q queries, K neighbours, D dimensions.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from selfeval.errors import MissingPackageError, RunFolderError, StorageError
from selfeval.quality.embeddings import Vectors
from selfeval.store import code_of, file_hash, fingerprint, is_own, read_object, write_json, writing
from selfeval.texts import text_digest

__all__ = ["EXACT", "Contents", "Neighbours", "VectorIndex", "check_packages", "text_hash"]

EXACT = 50_000
"""Number of vectors from which the search is approximate."""
_PROBED = 64
"""Groups that are searched."""
_TRAINED_ON = 64
"""Vectors per group that k-means reads; faiss warns below 39."""
_SCHEMA = 2


@dataclass(frozen=True)
class Contents:
    """The vectors of an index: by which embedder, and of which texts.

    Attributes:
        embedder: name of the embedder.
        keys: [N], a name for each vector, such as the id of a record.
        hashes: [N], `text_hash` of each text.
    """

    embedder: str
    keys: tuple[str, ...]
    hashes: tuple[str, ...]

    @classmethod
    def of(cls, embedder: str, texts: Sequence[tuple[str, str]]) -> Contents:
        """Describe the vectors of some texts.

        Args:
            embedder: name of the embedder.
            texts: key and text of each vector.
        """
        return cls(embedder, tuple(key for key, _ in texts), tuple(text_hash(text) for _, text in texts))


def text_hash(text: str) -> str:
    """Return the first 64 bits of the SHA-256 of a text, as hex."""
    return text_digest(text).hex()[:16]


@dataclass(frozen=True)
class Neighbours:
    """The nearest vectors of a query, the most similar first.

    Attributes:
        rows: [K], their rows in the index.
        similarities: [K], dot products with the query.
    """

    rows: NDArray[np.int64]
    similarities: NDArray[np.float32]


class VectorIndex:
    """Vectors of length 1 that can be searched. See `build`, `open` and `open_or_build`.

    Example:
        >>> axes = np.eye(3, dtype=np.float32)
        >>> index = VectorIndex.build(axes, Contents.of("axes", [("x", "left"), ("y", "up"), ("z", "near")]))
        >>> [found] = index.search(np.array([[0.6, 0.8, 0.0]], dtype=np.float32), 2)
        >>> [index.contents.keys[row] for row in found.rows], found.similarities.round(1).tolist()
        (['y', 'x'], [0.800000011920929, 0.6000000238418579])
    """

    def __init__(self, made: Any, contents: Contents) -> None:
        self._faiss, self.contents = made, contents
        if self._is_approximate:
            # Row to place in the groups, for `vectors`. Built here, because threads of `selfeval view` share an index.
            made.make_direct_map()

    @classmethod
    def build(cls, vectors_ND: Vectors, contents: Contents) -> VectorIndex:
        """Build an index in memory. It depends only on the vectors.

        Args:
            vectors_ND: vectors of length 1.
            contents: what they are.

        Raises:
            MissingPackageError: faiss is not installed.
            ValueError: the numbers of vectors, keys and hashes differ.
        """
        if not len(vectors_ND) == len(contents.keys) == len(contents.hashes):
            raise ValueError(f"got {len(vectors_ND)} vectors, {len(contents.keys)} keys and {len(contents.hashes)} hashes")
        faiss = _import_faiss()
        vectors_ND = np.ascontiguousarray(vectors_ND, dtype=np.float32)
        made = faiss.IndexFlatIP(vectors_ND.shape[1]) if len(vectors_ND) < EXACT else _inverted_file(faiss, vectors_ND)
        made.add(vectors_ND)
        return cls(made, contents)

    @classmethod
    def open(cls, path: Path, contents: Contents | None = None) -> VectorIndex | None:
        """Open an index memory-mapped.

        Args:
            path: path of the file; its contents are in a JSON file of the same name.
            contents: Optional. What the index must contain. Default: anything.

        Returns:
            The index; None if there is none, if it is damaged, if another user wrote it, or if it has other contents.

        Raises:
            MissingPackageError: faiss is not installed.
        """
        faiss = _import_faiss()
        try:
            saved = read_object(_facts(path), "schema", "embedder", "keys", "hashes", "code")
            known = Contents(saved["embedder"], tuple(saved["keys"]), tuple(saved["hashes"]))
            # Before faiss reads the file: a damaged one may crash it, and a forged one may do more. Whoever can write to the
            # folder could still replace the file between the two; a private copy would close this, but not be memory-mapped.
            if (
                saved["schema"] != _SCHEMA
                or contents not in (None, known)
                or not is_own(_digest(file_hash(path), known), saved["code"])
            ):
                return None
            # Before faiss 1.11 there is no such flag, and the index is loaded into memory.
            made = faiss.read_index(str(path), getattr(faiss, "IO_FLAG_MMAP_IFC", 0))
        except (RunFolderError, OSError, TypeError, RuntimeError):
            return None
        return cls(made, known) if made.ntotal == len(known.keys) == len(known.hashes) else None

    @classmethod
    def open_or_build(
        cls, path: Path, contents: Contents, embed: Callable[[], Vectors], note: Callable[[str], None]
    ) -> VectorIndex:
        """Open an index with these contents; if there is none, build it and save it.

        Args:
            path: path of the file.
            contents: what the index must contain.
            embed: returns the vectors, `[N, D]`.
            note: receives a message if the folder is not writable; the index is then kept in memory only.

        Raises:
            MissingPackageError: faiss is not installed.
        """
        found = cls.open(path, contents)
        if found is not None:
            return found
        made = cls.build(embed(), contents)
        try:
            made.save(path)
        except StorageError as error:
            note(f"the index is not saved, so the next search builds it again: {error}")
        return made

    def save(self, path: Path) -> None:
        """Write the index, and what it contains. A reader sees the old index, the new one, or none.

        Raises:
            StorageError: the disk is full or not writable.
        """
        code_of("")  # fails before the index is written
        faiss, found = _import_faiss(), hashlib.sha256()
        with writing(path) as temporary, temporary.open("wb") as file:

            def write(part: bytes) -> int:
                found.update(part)
                return file.write(part)

            # Not by faiss itself, which ignores a disk that is full when it closes the file.
            faiss.write_index(self._faiss, faiss.PyCallbackIOWriter(write))
        contents = {"embedder": self.contents.embedder, "keys": self.contents.keys, "hashes": self.contents.hashes}
        # After the index: with the code of another file, the index is not opened.
        write_json(_facts(path), {"schema": _SCHEMA, "code": code_of(_digest(found.hexdigest(), self.contents)), **contents})

    def __len__(self) -> int:
        return len(self.contents.keys)

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the embedder and the texts."""
        return fingerprint([self.contents.embedder, self.contents.hashes])

    def search(self, queries_QD: Vectors, count: int, among: Sequence[int] | None = None) -> list[Neighbours]:
        """Find the nearest vectors of each query.

        Args:
            queries_QD: vectors of length 1.
            count: number of neighbours, > 0. There are fewer if the index, or the groups that are searched, have fewer.
            among: Optional. Rows to search in. Default: all.

        Raises:
            ValueError: count is not positive.
        """
        if count <= 0:
            raise ValueError(f"count must be positive, got {count}")
        queries_QD = np.ascontiguousarray(queries_QD, dtype=np.float32)
        limit = len(self) if among is None else len(among)
        if not limit:
            empty = Neighbours(np.empty(0, np.int64), np.empty(0, np.float32))
            return [empty] * len(queries_QD)
        if among is not None and limit < EXACT and self._is_approximate:
            # Few of them may be in the groups that are searched.
            return _compared_with_all(queries_QD, self.vectors(among), np.asarray(among, dtype=np.int64), min(count, limit))
        found = self._faiss.search(queries_QD, min(count, limit), params=self._parameters(among))
        # -1 marks a neighbour that was not found.
        return [Neighbours(row_K[row_K >= 0], similarity_K[row_K >= 0]) for similarity_K, row_K in zip(*found, strict=True)]

    @property
    def _is_approximate(self) -> bool:
        return isinstance(self._faiss, _import_faiss().IndexIVF)

    def _parameters(self, among: Sequence[int] | None) -> Any:
        faiss = _import_faiss()
        chosen = {} if among is None else {"sel": faiss.IDSelectorBatch(np.asarray(among, dtype=np.int64))}
        if self._is_approximate:
            return faiss.SearchParametersIVF(nprobe=_PROBED, **chosen)
        return faiss.SearchParameters(**chosen)

    def vectors(self, rows: Sequence[int]) -> Vectors:
        """Return the vectors of some rows, `[len(rows), D]`."""
        found: Vectors = self._faiss.reconstruct_batch(np.asarray(rows, dtype=np.int64))
        return found


def _compared_with_all(queries_QD: Vectors, vectors_ND: Vectors, rows_N: NDArray[np.int64], count: int) -> list[Neighbours]:
    similarities_QN = queries_QD @ vectors_ND.T
    nearest_QK = np.argsort(-similarities_QN, axis=1, kind="stable")[:, :count]
    return [Neighbours(rows_N[near_K], one_N[near_K]) for near_K, one_N in zip(nearest_QK, similarities_QN, strict=True)]


def check_packages() -> None:
    """Refuse to work without the library of the index.

    Raises:
        MissingPackageError: faiss is not installed.
    """
    _import_faiss()


def _import_faiss() -> ModuleType:
    try:
        import faiss
    except ImportError as error:
        raise MissingPackageError("the search index", "faiss", extra="data") from error
    return faiss


def _inverted_file(faiss: Any, vectors_ND: Vectors) -> Any:
    """Return an empty inverted file with trained groups."""
    count, dimensions = vectors_ND.shape
    # 4 √N groups: comparing the query with all centroids then takes about as long as with the vectors of the groups searched.
    groups = 2 ** round(math.log2(4 * math.sqrt(count)))
    made = faiss.IndexIVFFlat(faiss.IndexFlatIP(dimensions), dimensions, groups, faiss.METRIC_INNER_PRODUCT)
    made.cp.max_points_per_centroid = _TRAINED_ON
    made.train(vectors_ND)
    return made


def _digest(index: str, contents: Contents) -> str:
    """Return the hash of an index and its contents together: other keys would name other texts than those that are found."""
    return fingerprint([index, contents.embedder, contents.keys, contents.hashes])


def _facts(path: Path) -> Path:
    """Return the path of the file with the contents of an index."""
    return path.with_suffix(".json")
