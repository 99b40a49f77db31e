"""The columns of the tables of records, and how a record is shown in them."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from selfeval.report.figures import number
from selfeval.view.index import Located, encodable
from selfeval.view.kinds import Row, right_by_gold

__all__ = ["COLUMNS", "Cell", "Column", "Entry", "entries", "excerpt", "texts_of"]

_LONGEST = 280
"""Characters of a text in a table; the page of the question shows all of it."""


@dataclass(frozen=True)
class Entry:
    """A record with the texts that it refers to.

    Attributes:
        id: id in the index.
        row: the record.
        question_id: id of its question; empty if it has none.
        question: text of its question.
        replies: texts of replies by id.
    """

    id: int
    row: Row
    question_id: str
    question: str
    replies: Mapping[str, str]


@dataclass(frozen=True)
class Cell:
    """A cell of a table: a text, and its style (`text`, `number`, `right`, `wrong`, `plain`)."""

    text: str
    style: str


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        title: its heading.
        cell: makes the cell of a record.
        sort: column of the index to sort by; empty: the table cannot be sorted by it.
        is_number: whether it is aligned to the right.
        leads: whether the cell links to the record on the page of its question.
    """

    title: str
    cell: Callable[[Entry], Cell]
    sort: str = ""
    is_number: bool = False
    leads: bool = False


def excerpt(text: str) -> str:
    """Return the beginning of a text.

    >>> excerpt("short")
    'short'
    """
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST].rstrip()} …"


def _text(read: Callable[[Entry], str | None]) -> Callable[[Entry], Cell]:
    return lambda entry: Cell(excerpt(read(entry) or ""), "text")


def _plain(name: str, **words: str) -> Callable[[Entry], Cell]:
    def cell(entry: Entry) -> Cell:
        value = str(entry.row[name])
        return Cell(words.get(value, value.replace("_", " ")), "plain")

    return cell


def _number(read: Callable[[Entry], float | None]) -> Callable[[Entry], Cell]:
    def cell(entry: Entry) -> Cell:
        value = read(entry)
        shown = "–" if value is None else f"{value:,}" if isinstance(value, int) else number(value)
        return Cell(shown, "number")

    return cell


def _share(read: Callable[[Entry], float | None]) -> Callable[[Entry], Cell]:
    def cell(entry: Entry) -> Cell:
        value = read(entry)
        return Cell("–" if value is None else f"{value:.3f}", "number")

    return cell


def _signed(read: Callable[[Entry], float]) -> Callable[[Entry], Cell]:
    return lambda entry: Cell(f"{read(entry):+.2f}", "number")


def _of(name: str) -> Callable[[Entry], Any]:
    return lambda entry: entry.row[name]


def _reply(name: str) -> Callable[[Entry], str]:
    return lambda entry: entry.replies.get(entry.row[name], entry.row[name])


def _verdict_confidence(entry: Entry) -> float | None:
    probability = entry.row["probability"]
    return None if probability is None else max(probability, 1 - probability)


def _gold(read: Callable[[Row], bool | None]) -> Callable[[Entry], Cell]:
    def cell(entry: Entry) -> Cell:
        right = read(entry.row)
        return Cell("–", "plain") if right is None else Cell("✓ right", "right") if right else Cell("✗ wrong", "wrong")

    return cell


def _finished(name: str) -> Callable[[Entry], Cell]:
    return lambda entry: Cell("yes" if entry.row[name] else "cut off", "plain")


def _chosen(entry: Entry) -> Cell:
    """Return which reply of a verdict is preferred."""
    state, probability = entry.row["state"], entry.row["probability"]
    if probability is None:
        return Cell("–", "plain")
    if state == "tie" or probability == 0.5:
        return Cell("neither", "plain")
    return Cell("first" if probability > 0.5 else "second", "plain")


def _evaluator_choice(entry: Entry) -> Cell:
    margin = entry.row["margin"]
    return Cell("neither" if margin == 0 else "first" if margin > 0 else "second", "plain")


_OUTCOME_STYLES = {"win": "right", "loss": "wrong"}


def _outcome(entry: Entry) -> Cell:
    outcome = entry.row["outcome"]
    return Cell(outcome, _OUTCOME_STYLES.get(outcome, "pill"))


_STATE_STYLES = {"kept": "right", "unparsable": "wrong"}


def _state(entry: Entry) -> Cell:
    state = entry.row["state"]
    return Cell(state, _STATE_STYLES.get(state, "pill"))


_QUESTION = Column("Question", _text(lambda entry: entry.question or entry.question_id), "question", leads=True)
_SPLIT = Column("Split", _plain("split", train="training"), "split")

COLUMNS: Mapping[str, Sequence[Column]] = {
    "seeds": (
        Column("Seed", _text(_of("question")), leads=True),
        Column("Reply", _text(_of("reply"))),
    ),
    "questions": (
        Column("Question", _text(_of("text")), "question", leads=True),
        Column("Id", _plain("id"), "question"),
        _SPLIT,
        Column("Source", _plain("source", self="the model"), "source"),
        Column("Characters", _number(lambda entry: len(entry.row["text"])), "length", is_number=True),
    ),
    "replies": (
        _QUESTION,
        Column("Reply", _text(_of("text"))),
        Column("Method", _plain("sampling_method"), "method"),
        Column("Temperature", _number(_of("temperature")), "temperature", is_number=True),
        Column("Tokens", _number(lambda entry: len(entry.row["ids"])), "tokens", is_number=True),
        Column("Log-prob", _number(_of("logprob")), "logprob", is_number=True),
        Column("Finished", _finished("finished"), "finished"),
    ),
    "reference_answers": (
        _QUESTION,
        Column("Reference answer", _text(_of("text"))),
        Column("Characters", _number(lambda entry: len(entry.row["text"])), "length", is_number=True),
    ),
    "verdicts": (
        _QUESTION,
        Column("First reply", _text(_reply("first"))),
        Column("Second reply", _text(_reply("second"))),
        Column("State", _state, "state"),
        Column("Better", _chosen, "probability"),
        Column("Confidence", _share(_verdict_confidence), "confidence", is_number=True),
        Column("Tie", _share(_of("tie")), "tie", is_number=True),
        _SPLIT,
    ),
    "pairs": (
        _QUESTION,
        Column("Chosen", _text(_of("chosen"))),
        Column("Rejected", _text(_of("rejected"))),
        Column("Confidence", _share(_of("confidence")), "confidence", is_number=True),
        _SPLIT,
    ),
    "dropped": (
        Column("Text", _text(_of("text")), leads=True),
        Column("Stage", _plain("stage"), "stage"),
        Column("Reason", _plain("reason"), "reason"),
    ),
    "scored": (
        _QUESTION,
        Column("First reply", _text(_reply("first"))),
        Column("Second reply", _text(_reply("second"))),
        Column("Margin", _signed(_of("margin")), "margin", is_number=True),
        Column("Evaluator", _evaluator_choice, "certainty"),
        Column("By gold", _gold(lambda row: right_by_gold(row["gold_first"], row["gold_second"], row["margin"])), "by_gold"),
        Column("Judge", _chosen, "probability"),
        Column("State", _state, "state"),
    ),
    "compared": (
        _QUESTION,
        Column("Before", _text(_reply("before"))),
        Column("After", _text(_of("after"))),
        Column("Outcome", _outcome, "outcome"),
        Column("Gold before", _gold(lambda row: row["gold_before"]), "gold_before"),
        Column("Gold after", _gold(lambda row: row["gold_after"]), "gold_after"),
        Column("Score before", _signed(_of("score_before")), "score_before", is_number=True),
        Column("Score after", _signed(_of("score_after")), "score_after", is_number=True),
    ),
    "sampled": (
        Column("Step", _number(_of("step")), "step", is_number=True),
        _QUESTION,
        Column("Reply", _text(_of("text"))),
        Column("Score", _signed(_of("score")), "score", is_number=True),
        Column("Finished", _finished("finished"), "finished"),
    ),
}
"""The columns of each kind. One of them links to the question."""


# -- texts that records refer to ----------------------------------------------------------------------------------------


def entries(connection: sqlite3.Connection, kind: str, places: Sequence[Located], rows: Iterable[Row]) -> list[Entry]:
    """Return records with the texts of their questions and replies."""
    rows = list(rows)
    ids = [_question_id(connection, kind, row) for row in rows]
    questions = texts_of(connection, "questions", "question", ids)
    named = [row[name] for row in rows for name in ("first", "second", "before") if name in row]
    replies = texts_of(connection, "replies", "reply", named)
    return [
        Entry(place.id, row, question, questions.get(question, ""), replies)
        for place, row, question in zip(places, rows, ids, strict=True)
    ]


def _question_id(connection: sqlite3.Connection, kind: str, row: Row) -> str:
    if kind == "questions":
        return str(row["id"])
    if "question_id" in row:
        return str(row["question_id"])
    if twin := (row.get("detail") or {}).get("of"):
        return str(twin)
    text = row["question"] if kind == "seeds" else row["text"]
    found = connection.execute(
        "SELECT question FROM questions JOIN questions_text USING (id) WHERE same = ? AND text = ?",
        (hash(text), encodable(text)),
    ).fetchone()
    return str(found[0]) if found else ""


def texts_of(connection: sqlite3.Connection, kind: str, column: str, ids: Iterable[str]) -> dict[str, str]:
    """Return the texts of records by their ids.

    Args:
        connection: of the index.
        kind: kind of the records, `questions` or `replies`.
        column: column of their id.
        ids: the ids; unknown ones are left out.
    """
    wanted = sorted(set(ids) - {""})
    places = ", ".join("?" * len(wanted))
    rows = connection.execute(
        f"SELECT {column}, text FROM {kind} JOIN {kind}_text USING (id) WHERE {column} IN ({places})", wanted
    )
    return dict(rows.fetchall())
