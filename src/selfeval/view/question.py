"""The page of a question: its replies, verdicts with their evidence, pairs, drops, test scores, and before and after."""

from __future__ import annotations

import shlex
import sqlite3
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import HTMLResponse

from selfeval import records
from selfeval.records import from_json
from selfeval.runs.reader import KINDS as FILES
from selfeval.view.addresses import records_address
from selfeval.view.evidence import explain, verdict_sentence
from selfeval.view.index import Located, RunIndex
from selfeval.view.indexes import index_of
from selfeval.view.kinds import KINDS, right_by_gold
from selfeval.view.pages import PageRoute, opened_runs, page
from selfeval.view.problems import NotFoundError
from selfeval.view.shown import texts_of
from selfeval.view.similar import similar_pairs

__all__ = ["router"]

router = APIRouter(route_class=PageRoute)

_WAIT_SECONDS = 5.0
_IDS = 1 << 63
"""Ids of records are below; SQLite stores no larger number."""
_MOST = 20
"""Records of a kind on the page; a link leads to all of them."""
_BY_QUESTION = ("reference_answers", "replies", "verdicts", "pairs", "scored", "compared", "sampled")


@router.get("/run/{run}/question/{question}")
def question_page(run: str, question: str, request: Request, show: Annotated[int, Query(ge=-1, lt=_IDS)] = -1) -> HTMLResponse:
    """Show everything about a question; of many records of a kind, the first ones and the one with the id `show`."""
    reader = opened_runs(request).reader(run)
    index = index_of(request, reader.folder)
    progress = index.refresh(reader, KINDS, _WAIT_SECONDS)
    with index.reading() as connection:
        found = {kind: _of(connection, index, kind, question, show) for kind in ("questions", *_BY_QUESTION)}
        if not found["questions"]:
            wait = "" if progress.is_complete else " The run is still being indexed; reload the page."
            raise NotFoundError(f"There is no question {question!r} in {run}.{wait}")
        asked: records.Question = found["questions"][0][1]
        drops = _drops(connection, index, asked)
        named = [name for _, v in [*found["verdicts"], *found["scored"]] for name in (v.first, v.second)]
        texts = texts_of(connection, "replies", "reply", [*named, *(c.before for _, c in found["compared"])])
        similar = similar_pairs(reader.folder, asked, connection, index) if found["verdicts"] or found["scored"] else []
        counts = {kind: _count(connection, kind, question) for kind in _BY_QUESTION}
    return page(
        request,
        "question.html.j2",
        title=f"{asked.id} · {run}",
        run=run,
        tab="questions",
        asked=asked,
        found=found,
        drops=drops,
        texts=texts,
        counts=counts,
        all_records={kind: records_address(run, kind, {"question": asked.id}) for kind in _BY_QUESTION},
        verdicts=[(number, v, verdict_sentence(v), explain(v.evidence)) for number, v in found["verdicts"]],
        by_gold={number: right_by_gold(pair.gold_first, pair.gold_second, pair.margin) for number, pair in found["scored"]},
        similar=similar,
        search_command=f"selfeval search {shlex.quote(str(reader.folder))}",
        progress=progress,
    )


Numbered = tuple[int, Any]
"""Id of a record in the index, and the record."""


def _of(connection: sqlite3.Connection, index: RunIndex, kind: str, question: str, show: int) -> list[Numbered]:
    """Return the first records of a kind about a question, and the one to show."""
    sql = f"SELECT id, start, size FROM {kind} WHERE question = ? ORDER BY id <> ?, id LIMIT {_MOST}"
    return _loaded(index, kind, sorted((Located(*row) for row in connection.execute(sql, (question, show))), key=_by_id))


def _by_id(place: Located) -> int:
    return place.id


def _loaded(index: RunIndex, kind: str, places: Sequence[Located]) -> list[Numbered]:
    rows = zip(places, index.load(places), strict=True)
    return [(place.id, from_json(FILES[kind].record, row)) for place, row in rows]


def _count(connection: sqlite3.Connection, kind: str, question: str) -> int:
    return int(connection.execute(f"SELECT count(*) FROM {kind} WHERE question = ?", (question,)).fetchone()[0])


def _drops(connection: sqlite3.Connection, index: RunIndex, asked: records.Question) -> list[Numbered]:
    """Return the dropped records with the text of a question: they have no id of it."""
    sql = "SELECT id, start, size FROM dropped WHERE same = ? ORDER BY id LIMIT ?"
    places = [Located(*row) for row in connection.execute(sql, (hash(asked.text), _MOST))]
    # Different texts can have one hash.
    return [(number, drop) for number, drop in _loaded(index, "dropped", places) if drop.text == asked.text]
