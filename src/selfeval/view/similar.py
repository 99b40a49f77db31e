"""Kept pairs of similar questions, by the vectors that `selfeval search` has saved. No model is loaded.

An index of other texts is not used: the text of each question that is shown is compared with the hash in the index.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from selfeval.errors import MissingPackageError
from selfeval.quality.vector_index import VectorIndex, text_hash
from selfeval.records import Pair, Question, from_json
from selfeval.runs.search import index_path
from selfeval.view.index import Located, RunIndex

__all__ = ["SimilarPair", "similar_pairs"]

_MOST = 5
"""Similar questions on a page."""
_SEARCHED = 100
"""Nearest questions among which those with kept pairs are looked for."""


@dataclass(frozen=True)
class SimilarPair:
    """The kept pair of a similar question with the highest confidence.

    Attributes:
        similarity: of both questions, in [-1, 1].
        question: the similar question.
        pair: the pair.
    """

    similarity: float
    question: Question
    pair: Pair


def similar_pairs(folder: Path, asked: Question, connection: sqlite3.Connection, index: RunIndex) -> list[SimilarPair] | None:
    """Return kept pairs of the questions most similar to a question.

    Args:
        folder: the run folder.
        asked: the question.
        connection: of the index of the records.
        index: index of the records.

    Returns:
        The pairs, the most similar question first; None if there is no vector of this question.
    """
    vectors = _opened(index_path(folder, "questions"))
    if vectors is None:
        return None
    found, rows = vectors
    row = rows.get(asked.id)
    if row is None or found.contents.hashes[row] != text_hash(asked.text):
        return None
    [near] = found.search(found.vectors([row]), _SEARCHED)
    shown: list[SimilarPair] = []
    for similarity, other in zip(near.similarities, near.rows, strict=True):
        if other != row and len(shown) < _MOST:
            shown += _of_question(float(similarity), int(other), found, connection, index)
    return shown


def _of_question(
    similarity: float, row: int, vectors: VectorIndex, connection: sqlite3.Connection, index: RunIndex
) -> Iterator[SimilarPair]:
    name, known = vectors.contents.keys[row], vectors.contents.hashes[row]
    pairs = "SELECT id, start, size FROM pairs WHERE question = ? ORDER BY confidence DESC, id LIMIT 1"
    questions = "SELECT id, start, size FROM questions WHERE question = ? LIMIT 1"
    for pair in index.load(_located(connection, pairs, name)):
        for question in index.load(_located(connection, questions, name)):
            if text_hash(question["text"]) == known:
                yield SimilarPair(similarity, from_json(Question, question), from_json(Pair, pair))


def _located(connection: sqlite3.Connection, sql: str, name: str) -> list[Located]:
    return [Located(*row) for row in connection.execute(sql, (name,))]


def _opened(path: Path) -> tuple[VectorIndex, Mapping[str, int]] | None:
    """Return the index and its rows by id; None without one, or without the package for it."""
    try:
        facts = path.with_suffix(".json").stat()
    except OSError:
        return None
    return _cached(path, facts.st_mtime_ns, facts.st_size)


@lru_cache(maxsize=4)
def _cached(path: Path, changed_ns: int, size: int) -> tuple[VectorIndex, Mapping[str, int]] | None:
    """Open an index. Cached, because its names and hashes take longer to read than a page."""
    try:
        found = VectorIndex.open(path)
    except MissingPackageError:
        return None
    return None if found is None else (found, {key: row for row, key in enumerate(found.contents.keys)})
