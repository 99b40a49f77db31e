"""An index of the records of a run: filters, full-text search, sorting and paging over hundreds of thousands of records.

The index is a SQLite database in a temporary folder of the process, never in the run folder: a run is only read. It holds the
columns and the searched text of every record and the place of the record in its file, from which the record is read when it
is shown. A thread indexes file by file, so that a page can show the records so far. Files are indexed again when their
size, time or inode changes, and the records of files that are gone are removed: a changed setting sets files aside.

SQLite's FTS5 with trigrams finds text in any language, also in those without spaces between words. Without FTS5, and for
words of one or two characters, the texts are scanned.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from selfeval.errors import InputError, RunFolderError
from selfeval.runs.reader import KINDS as FILES
from selfeval.runs.reader import RunReader
from selfeval.store import open_file
from selfeval.texts import parse_json
from selfeval.view.kinds import KINDS, Kind, Value

__all__ = ["LINES", "Located", "Progress", "RunIndex", "encodable", "has_full_text"]

_LOG = logging.getLogger(__name__)
LINES = 32
"""Bits of the line number in the id of a record; the number of its file is above them."""
_CHUNK = 2000
"""Records per insert."""
_CHECKED = 64
"""Files whose hashes are compared at once: every comparison reads all manifests of the run."""
_QUERY_SECONDS = 30.0
"""A page may query the index for so long."""
_STEPS_BETWEEN_CHECKS = 10_000
"""Instructions of SQLite between two checks of this limit."""
_RETRY_SECONDS = 10.0
"""A damaged file is read again after this time, because a run in progress may not have noted its hash yet."""


@cache
def has_full_text() -> bool:
    """Return whether this SQLite has FTS5 with trigrams (3.34 and later)."""
    try:
        with closing(sqlite3.connect(":memory:")) as connection:
            connection.execute("CREATE VIRTUAL TABLE probe USING fts5(text, tokenize='trigram')")
    except sqlite3.OperationalError:
        return False
    return True


@dataclass(frozen=True)
class Progress:
    """How much of the files is indexed.

    Attributes:
        done: bytes in the index.
        total: bytes of all files.
        problems: a message per damaged file.
    """

    done: int
    total: int
    problems: tuple[str, ...]

    @property
    def is_complete(self) -> bool:
        """Whether all files are indexed."""
        return self.done >= self.total


@dataclass(frozen=True)
class Located:
    """Place of a record.

    Attributes:
        id: id in the index: number of the file, and number of the line from 0.
        start: first byte of its line.
        size: bytes of its line.
    """

    id: int
    start: int
    size: int


@dataclass(frozen=True)
class _File:
    """A file in the index, or one that waits; `facts` distinguish its versions."""

    number: int
    kind: str
    size: int
    facts: tuple[int, int, int]
    done: int = 0
    problem: str = ""
    read_at: float = 0.0


class RunIndex:
    """The index of a run, or of a round of it.

    Args:
        folder: folder of the run.
        path: path of the database, which is created.
    """

    def __init__(self, folder: Path, path: Path) -> None:
        self._folder, self._path = folder, path
        self._lock = threading.Lock()
        self._numbers: dict[Path, int] = {}
        self._files: dict[Path, _File] = {}
        self._waiting: dict[Path, _File | None] = {}
        self._worker: threading.Thread | None = None
        self._idle = threading.Event()
        with closing(self._connect()) as connection:
            connection.executescript("PRAGMA journal_mode=WAL;" + ";".join(_schema()))

    # -- reading --------------------------------------------------------------------------------------------------------

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Yield a connection that sees one state of the index; a thread may index in the meantime.

        Raises:
            InputError: a query took too long.
        """
        with closing(self._connect()) as connection:
            connection.execute("BEGIN")
            end = time.monotonic() + _QUERY_SECONDS
            connection.set_progress_handler(lambda: time.monotonic() > end, _STEPS_BETWEEN_CHECKS)
            try:
                yield connection
            except sqlite3.OperationalError as error:
                if str(error) != "interrupted":  # by the handler
                    raise
                raise InputError(
                    f"the search took longer than {_QUERY_SECONDS:g} s; use fewer words, each of three letters or more"
                ) from error

    def load(self, located: Sequence[Located]) -> Iterator[dict[str, Any]]:
        """Return the records, each of which is read from its file by the iterator.

        The iterator raises RunFolderError if a file was replaced since it was indexed.
        """
        return (parse_json(line, lenient=True) for line in self.lines(located))

    def lines(self, located: Sequence[Located]) -> Iterator[bytes]:
        """Yield the lines of records, as they are in their files.

        Raises:
            RunFolderError: a file was replaced since it was indexed.
        """
        paths = {number: path for path, number in list(self._numbers.items())}
        number = -1
        file: BinaryIO | None = None
        try:
            for place in located:
                if place.id >> LINES != number or file is None:
                    number = place.id >> LINES
                    if file is not None:
                        file.close()
                    file = self._open(paths[number])
                file.seek(place.start)
                yield file.read(place.size)
        finally:
            if file is not None:
                file.close()

    def _open(self, path: Path) -> BinaryIO:
        """Open a file that is the one in the index."""
        replaced = RunFolderError(f"{path} was just replaced by the run; reload the page")
        try:
            file = open_file(path)
        except FileNotFoundError:
            raise replaced from None
        known = self._files.get(path)
        if known is None or _facts(os.fstat(file.fileno())) != known.facts:
            file.close()
            raise replaced
        return file

    # -- refreshing -----------------------------------------------------------------------------------------------------

    def refresh(self, reader: RunReader, kinds: Iterable[str], wait: float) -> Progress:
        """Index new and changed files in a thread.

        Args:
            reader: the run, which checks the hashes of its files.
            kinds: kinds of records to index, the most urgent first.
            wait: seconds to wait for the thread.

        Returns:
            The progress after that time.
        """
        kinds = tuple(kinds)
        with self._lock:
            for kind in kinds:
                self._find(kind)
            if self._waiting and (self._worker is None or not self._worker.is_alive()):
                self._idle.clear()
                self._worker = threading.Thread(target=self._work, args=(reader,), daemon=True, name="selfeval-index")
                self._worker.start()
            worker = self._worker
        if worker is not None:
            self._idle.wait(wait)
        return self._progress(kinds)

    def _progress(self, kinds: Sequence[str]) -> Progress:
        with self._lock:
            waiting = [file for file in self._waiting.values() if file is not None and file.kind in kinds]
            found = [file for file in self._files.values() if file.kind in kinds]
        done = sum(file.size for file in found) + sum(file.done for file in waiting)
        problems = tuple(file.problem for file in found if file.problem)
        # A file that is indexed again is counted once.
        again = {file.number for file in waiting}
        done -= sum(file.size for file in found if file.number in again)
        return Progress(done, done + sum(file.size - file.done for file in waiting), problems)

    def _find(self, kind: str) -> None:
        """Compare the files of a kind with the index and note which have to be indexed or removed."""
        present: set[Path] = set()
        for pattern in FILES[kind].files:
            for path in sorted(self._folder.glob(pattern)):
                try:
                    facts = path.stat()
                except FileNotFoundError:  # replaced while it was listed
                    continue
                present.add(path)
                self._note(path, kind, _facts(facts))
        for path, known in self._files.items():
            if known.kind == kind and path not in present:
                self._waiting[path] = None

    def _note(self, path: Path, kind: str, facts: tuple[int, int, int]) -> None:
        known, waiting = self._files.get(path), self._waiting.get(path)
        is_old = known is None or known.facts != facts
        is_damaged = known is not None and known.problem and time.monotonic() - known.read_at > _RETRY_SECONDS
        if (is_old or is_damaged) and (waiting is None or waiting.facts != facts):
            number = self._numbers.setdefault(path, len(self._numbers))
            self._waiting[path] = _File(number, kind, facts[0], facts)

    # -- the thread -----------------------------------------------------------------------------------------------------

    def _work(self, reader: RunReader) -> None:
        try:
            with closing(self._connect()) as connection:
                while batch := self._next_batch():
                    damaged = _damaged(reader, [path for path, file in batch if file is not None])
                    for path, file in batch:
                        self._update(connection, path, file, damaged.get(path, ""))
        except Exception:
            _LOG.exception("the records of %s could not be indexed", self._folder)
        finally:
            with self._lock:
                # After an exception; otherwise another thread may have begun, and is not idle.
                if self._worker is threading.current_thread():
                    self._idle.set()

    def _next_batch(self) -> list[tuple[Path, _File | None]]:
        with self._lock:
            batch = list(self._waiting.items())[:_CHECKED]
            if not batch:
                # Inside of the lock: after this, `refresh` starts a new thread, which is not idle.
                self._worker = None
                self._idle.set()
            return batch

    def _update(self, connection: sqlite3.Connection, path: Path, file: _File | None, problem: str) -> None:
        """Replace the records of a file in the index."""
        known = self._files.get(path) or file
        assert known is not None
        connection.execute("BEGIN")
        _remove(connection, known)
        if file is not None and not problem:
            connection.execute("SAVEPOINT file")
            problem = self._insert(connection, path, file)
            connection.execute("ROLLBACK TO file" if problem else "RELEASE file")
        connection.execute("COMMIT")
        with self._lock:
            if file is None:
                self._files.pop(path, None)
            else:
                self._files[path] = replace(file, done=file.size, problem=problem, read_at=time.monotonic())
            # Unless it changed again in the meantime.
            if (waiting := self._waiting.get(path)) is None or (file is not None and waiting.facts == file.facts):
                self._waiting.pop(path, None)

    def _insert(self, connection: sqlite3.Connection, path: Path, file: _File) -> str:
        """Insert the records of a file; return the problem of a damaged one."""
        try:
            for rows, end in _chunks(path, file):
                _insert_rows(connection, KINDS[file.kind], rows)
                with self._lock:
                    if (waiting := self._waiting.get(path)) is not None and waiting.facts == file.facts:
                        self._waiting[path] = replace(waiting, done=min(end, file.size))
        except FileNotFoundError:
            return f"{path} was set aside by the run"
        except InputError as error:
            return str(error)
        return ""

    def _connect(self) -> sqlite3.Connection:
        # Autocommit: transactions are begun by hand. A connection moves between threads but has one at a time.
        connection = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False, timeout=60)
        # The index is lost with its process anyway.
        connection.execute("PRAGMA synchronous=OFF")
        return connection


def _facts(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_size, found.st_mtime_ns, found.st_ino


def _damaged(reader: RunReader, paths: list[Path]) -> dict[Path, str]:
    """Return the problem of each file whose content is not what its stage wrote."""
    if not _problem(reader, paths):
        return {}
    return {path: problem for path in paths if (problem := _problem(reader, [path]))}


def _problem(reader: RunReader, paths: list[Path]) -> str:
    try:
        reader.check(paths)
    except FileNotFoundError:
        return "a file was set aside by the run while it was read"
    except InputError as error:
        return str(error)
    return ""


# -- the database -------------------------------------------------------------------------------------------------------


def _schema() -> Iterator[str]:
    for kind in KINDS.values():
        name, columns = kind.name, ", ".join(kind.columns)
        yield f"CREATE TABLE {name}(id INTEGER PRIMARY KEY, start, size, {columns})"
        # In a separate table: filters and sorting read the columns of all records, without their texts.
        yield f"CREATE TABLE {name}_text(id INTEGER PRIMARY KEY, text)"
        for column in ("question", "reply", "same"):
            if column in kind.columns:
                yield f"CREATE INDEX {name}_{column} ON {name}({column})"
        if has_full_text():
            options = f"content='{name}_text', content_rowid='id', tokenize='trigram'"
            yield f"CREATE VIRTUAL TABLE {name}_words USING fts5(text, {options})"


def _remove(connection: sqlite3.Connection, file: _File) -> None:
    name, ids = file.kind, (file.number << LINES, ((file.number + 1) << LINES) - 1)
    if has_full_text():
        # The words of a record are found again through its text, which is therefore removed last.
        connection.execute(
            f"INSERT INTO {name}_words({name}_words, rowid, text) "
            f"SELECT 'delete', id, text FROM {name}_text WHERE id BETWEEN ? AND ?",
            ids,
        )
    for table in (name, f"{name}_text"):
        connection.execute(f"DELETE FROM {table} WHERE id BETWEEN ? AND ?", ids)


_Row = tuple[int, int, int, tuple[Value, ...], str]


def _chunks(path: Path, file: _File) -> Iterator[tuple[list[_Row], int]]:
    """Yield the records of a file in chunks, each with the position of its end in the file.

    Raises:
        RunFolderError: a line is damaged.
    """
    kind, start, rows = KINDS[file.kind], 0, []
    with open_file(path) as opened:
        for number, line in enumerate(opened):
            try:
                values, text = _values(kind, line)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
                raise RunFolderError(f"{path}, line {number + 1} is damaged ({reason})") from error
            rows.append(((file.number << LINES) + number, start, len(line), values, text))
            start += len(line)
            if len(rows) == _CHUNK:
                yield rows, start
                rows = []
    yield rows, start


def _values(kind: Kind, line: bytes) -> tuple[tuple[Value, ...], str]:
    record = parse_json(line, lenient=True)
    return tuple(_storable(read(record)) for read in kind.columns.values()), str(_storable(kind.text(record)))


def encodable(text: str) -> str:
    """Replace halves of surrogate pairs, which JSON can hold, but neither a database nor a page."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _storable(value: Value) -> Value:
    """Return a value that SQLite can store.

    Raises:
        TypeError: it has the wrong type.
        ValueError: a whole number does not fit in 64 bits.
    """
    if isinstance(value, str):
        return encodable(value)
    if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
        raise ValueError("a whole number does not fit in 64 bits")
    if value is not None and not isinstance(value, int | float):
        raise TypeError(f"a {type(value).__name__} where a text or a number is expected")
    return value


def _insert_rows(connection: sqlite3.Connection, kind: Kind, rows: list[_Row]) -> None:
    places = ", ".join("?" * (3 + len(kind.columns)))
    connection.executemany(
        f"INSERT INTO {kind.name} VALUES ({places})", ((id_, start, size, *values) for id_, start, size, values, _ in rows)
    )
    texts = [(id_, text) for id_, *_, text in rows]
    connection.executemany(f"INSERT INTO {kind.name}_text VALUES (?, ?)", texts)
    if has_full_text():
        connection.executemany(f"INSERT INTO {kind.name}_words(rowid, text) VALUES (?, ?)", texts)
