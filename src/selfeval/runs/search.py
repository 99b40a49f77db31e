"""Search the records of a run by meaning, also while the run is in progress.

The folder `search/` of a run has one index of its questions and one of its replies. A pair is found by its question. An index
is opened only if it is of the present texts and of the same embedder; otherwise it is built again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from selfeval.errors import InputError, RunFolderError
from selfeval.quality.embeddings import Embedder, Vectors
from selfeval.quality.embeddings.cache import CachedEmbedder
from selfeval.quality.vector_index import Contents, VectorIndex
from selfeval.records import Pair
from selfeval.runs.reader import RunReader
from selfeval.texts import shortened

__all__ = ["Found", "RunSearch", "SearchKind", "check_kind", "index_path"]

SearchKind = Literal["questions", "replies", "pairs"]

_AT_ONCE = 1024
"""Texts per call of the embedder, between two reports of progress."""


@dataclass(frozen=True)
class Found:
    """A record that was found.

    Attributes:
        similarity: dot product of the vectors of its text and of the text that was searched for, in [-1, 1].
        id: id of the question or reply; of a pair, that of its question.
        text: the question or reply; of a pair, its question.
        question_id: id of its question.
        chosen, rejected: the replies of a pair; None for other records.
        confidence: the judge's confidence in a pair, in [0.5, 1]; None for other records.
    """

    similarity: float
    id: str
    text: str
    question_id: str
    chosen: str | None = None
    rejected: str | None = None
    confidence: float | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the fields that this record has."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def index_path(folder: Path, kind: Literal["questions", "replies"]) -> Path:
    """Return the path of an index in a run folder."""
    return folder / "search" / f"{kind}.faiss"


def check_kind(name: str) -> SearchKind:
    """Return the kind of records with this name.

    Raises:
        InputError: these records cannot be searched.
    """
    kinds: dict[str, SearchKind] = {kind: kind for kind in get_args(SearchKind)}
    if name not in kinds:
        raise InputError(f'records "{name}" cannot be searched; use {", ".join(kinds)}')
    return kinds[name]


class RunSearch:
    """The records of a run that can be searched, read when they are first needed.

    Args:
        reader: files of the run, or of one of its rounds.
        embedder: maps texts to vectors. Its name is compared with that of a saved index.
        report_progress: Optional. Receives the number of embedded texts and that of all texts.
        note: Optional. Receives a message if the folder is not writable; the search works nevertheless.
    """

    def __init__(
        self,
        reader: RunReader,
        embedder: Embedder,
        *,
        report_progress: Callable[[int, int], None] = lambda done, total: None,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._reader, self._embedder, self._report_progress, self._note = reader, embedder, report_progress, note

    def search(self, text: str, kind: SearchKind = "questions", count: int = 10) -> list[Found]:
        """Find the records whose texts are most similar to a text.

        Args:
            text: any text.
            kind: `questions`, `replies`, or `pairs`, which are found by their questions. Default: `questions`.
            count: maximum number of records, > 0. Default: 10.

        Returns:
            The records, the most similar first. Replies with equal texts are found once.

        Raises:
            InputError: the text is empty or has no word that the embedder knows, the count is not positive, or there is no such
                kind.
            MissingPackageError: faiss is not installed.
            RunFolderError: no such record is written yet, or a file is damaged.
        """
        kind = check_kind(kind)
        if not text.strip():
            raise InputError("the text to search for is empty; pass some words")
        if count < 1:
            raise InputError(f"the number of records must be at least 1, got {count}")
        if kind == "pairs":
            return self._pairs_like(text, count)
        index, rows = (self.questions, self._questions) if kind == "questions" else (self.replies, self._replies)
        [near] = index.search(self._query(text), count)
        return [_found(float(s), rows[row]) for s, row in zip(near.similarities, near.rows, strict=True)]

    def _pairs_like(self, text: str, count: int) -> list[Found]:
        pairs = self._pairs
        among = [row for row, question in enumerate(self._questions) if question["id"] in pairs]
        [near] = self.questions.search(self._query(text), count, among)
        found = (
            Found(float(s), pair.question_id, pair.prompt, pair.question_id, pair.chosen, pair.rejected, pair.confidence)
            for s, row in zip(near.similarities, near.rows, strict=True)
            for pair in pairs[self._questions[row]["id"]]
        )
        return list(islice(found, count))

    def _query(self, text: str) -> Vectors:
        # Not kept in the run folder: it is not a text of the run.
        embedder = self._embedder.embedder if isinstance(self._embedder, CachedEmbedder) else self._embedder
        query = embedder.embed([text])
        if not query.any():
            raise InputError(
                f"{embedder.name} knows no word of {shortened(text)!r}; use other words, or another embeddings.embedder"
            )
        return query

    # -- records --------------------------------------------------------------------------------------------------------

    @cached_property
    def _questions(self) -> Sequence[Mapping[str, Any]]:
        return [{"id": row["id"], "text": row["text"], "question_id": row["id"]} for row in self._reader.rows("questions")]

    @cached_property
    def _replies(self) -> Sequence[Mapping[str, Any]]:
        # Without the token ids, which would take more memory than the texts and the vectors together.
        rows = ({name: row[name] for name in ("id", "text", "question_id")} for row in self._reader.rows("replies"))
        first = {row["text"]: row for row in reversed(list(rows)) if row["text"].strip()}
        return list(first.values())[::-1]

    @cached_property
    def _pairs(self) -> Mapping[str, Sequence[Pair]]:
        """Pairs by question, those of the highest confidence first."""
        found: defaultdict[str, list[Pair]] = defaultdict(list)
        for pair in sorted(self._reader.records("pairs"), key=lambda pair: -pair.confidence):
            found[pair.question_id].append(pair)
        return found

    # -- indexes --------------------------------------------------------------------------------------------------------

    @cached_property
    def questions(self) -> VectorIndex:
        """The index of the questions: one row per question, in their order."""
        return self._index("questions", self._questions)

    @cached_property
    def replies(self) -> VectorIndex:
        """The index of the distinct replies."""
        return self._index("replies", self._replies)

    def _index(self, kind: Literal["questions", "replies"], rows: Sequence[Mapping[str, Any]]) -> VectorIndex:
        if not rows:
            raise RunFolderError(f"{self._reader.folder} has no {kind} to search yet; wait until the run has written some")
        contents = Contents.of(self._embedder.name, [(row["id"], row["text"]) for row in rows])
        texts = [row["text"] for row in rows]
        path = index_path(self._reader.folder, kind)
        return VectorIndex.open_or_build(path, contents, lambda: self._embedded(texts), self._note)

    def _embedded(self, texts: Sequence[str]) -> Vectors:
        parts = []
        for start in range(0, len(texts), _AT_ONCE):
            self._report_progress(start, len(texts))
            parts.append(self._embedder.embed(texts[start : start + _AT_ONCE]))
        self._report_progress(len(texts), len(texts))
        return np.concatenate(parts)


def _found(similarity: float, row: Mapping[str, Any]) -> Found:
    return Found(similarity, row["id"], row["text"], row["question_id"])
