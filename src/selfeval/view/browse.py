"""Tables of records: filters, search, sorting and paging; and their download."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, Response, StreamingResponse

from selfeval.errors import RunFolderError
from selfeval.runs.activity import activity_of
from selfeval.runs.reader import KINDS as FILES
from selfeval.runs.reader import RunReader
from selfeval.serve.page_access import SAFE_HEADERS
from selfeval.view.addresses import record_address
from selfeval.view.index import Progress, RunIndex, has_full_text
from selfeval.view.indexes import index_of
from selfeval.view.kinds import KINDS, Choice, Exact, Filter, Kind, Range, Tags
from selfeval.view.pages import PageRoute, opened_runs, page
from selfeval.view.query import NONE, PAGE, Facet, Found, Query, find, parse_query
from selfeval.view.shown import COLUMNS, Column, entries

__all__ = ["needed_kinds", "router"]

router = APIRouter(route_class=PageRoute)

_WAIT_SECONDS = 1.5
"""A page waits so long for the index before it shows the records so far."""
_DOWNLOAD_SECONDS = 600
"""A download waits so long for the index."""


def needed_kinds(kind: str) -> tuple[str, ...]:
    """Return the kinds of records that a page of a kind shows: itself, its questions and the replies that it names."""
    return tuple(dict.fromkeys(("questions", kind, *KINDS[kind].mentions.values())))


def _page_of(kind: Kind) -> Callable[[str, Request], HTMLResponse]:
    def records(run: str, request: Request) -> HTMLResponse:
        return _records(kind, run, request)

    return records


def _download_of(kind: Kind) -> Callable[[str, Request], Response]:
    def download(run: str, request: Request) -> Response:
        return _download(kind, run, request)

    return download


def _records(kind: Kind, run: str, request: Request) -> HTMLResponse:
    """Show a page of records."""
    query = parse_query(kind, request.query_params)
    reader = opened_runs(request).reader(run)
    index = index_of(request, reader.folder)
    progress = index.refresh(reader, needed_kinds(kind.name), _WAIT_SECONDS)
    with index.reading() as connection:
        found = find(connection, query)
        rows = entries(connection, kind.name, found.records, index.load(found.records))
    return page(
        request,
        "records.html.j2",
        title=f"{kind.title} · {run}",
        run=run,
        tab=kind.name,
        kind=kind,
        query=query,
        found=found,
        rows=[(entry, record_address(run, kind.name, entry.question_id, entry.id)) for entry in rows],
        columns=[_heading(column, query) for column in COLUMNS[kind.name]],
        fields=list(_fields(query, found)),
        set_filters=list(_set_filters(query)),
        pages=_pages(query, found),
        progress=progress,
        missing=_missing(reader, kind),
        has_full_text=has_full_text(),
    )


def _download(kind: Kind, run: str, request: Request) -> Response:
    """Return the selected records as JSON lines, as they are in their files.

    Raises:
        RunFolderError: some of the records cannot be read, or are not indexed in time.
    """
    query = parse_query(kind, request.query_params)
    reader = opened_runs(request).reader(run)
    index = index_of(request, reader.folder)
    # Questions and replies matter only to a search or a filter: if one of their files is damaged, all verdicts are still there.
    kinds = needed_kinds(kind.name) if query.is_filtered else (kind.name,)
    _require_all(index.refresh(reader, kinds, _DOWNLOAD_SECONDS))
    with index.reading() as connection:
        found = find(connection, query, whole=True)
    headers = {**SAFE_HEADERS, "Content-Disposition": f'attachment; filename="{kind.name}.jsonl"'}
    return StreamingResponse(_whole_lines(index, found), headers=headers, media_type="application/jsonl")


def _require_all(progress: Progress) -> None:
    if progress.problems:
        raise RunFolderError(f"The download would be incomplete: {'; '.join(progress.problems)}")
    if not progress.is_complete:
        raise RunFolderError(
            f"The download would be incomplete: {progress.done:,} of {progress.total:,} bytes are indexed; try again later"
        )


def _whole_lines(index: RunIndex, found: Found) -> Iterator[bytes]:
    for line in index.lines(found.records):
        yield line if line.endswith(b"\n") else line + b"\n"


for _kind in KINDS.values():
    router.add_api_route(f"/run/{{run}}/{_kind.name}", _page_of(_kind), name=_kind.name)
    router.add_api_route(f"/run/{{run}}/{_kind.name}.jsonl", _download_of(_kind), name=f"{_kind.name}.jsonl")


def _missing(reader: RunReader, kind: Kind) -> str:
    """Return why there is no file of these records; empty if there is one."""
    if any(True for pattern in FILES[kind.name].files for _ in reader.folder.glob(pattern)):
        return ""
    stage = FILES[kind.name].stage
    assert stage is not None, "only labels belong to no stage, and they have no page"
    if reader.is_finished(stage):
        return f"The stage {stage} is finished and wrote no such records."
    if activity_of(reader).is_running:
        return f"The stage {stage} has not written any yet; reload the page later."
    return f"The stage {stage} has not written any. Resume the run: selfeval run --output {reader.folder}"


# -- headings and paging ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Heading:
    """A heading with its link, and the value of aria-sort."""

    column: Column
    link: str
    order: str

    @property
    def arrow(self) -> str:
        return {"ascending": "↑", "descending": "↓"}.get(self.order, "")


def _heading(column: Column, query: Query) -> _Heading:
    if not column.sort:
        return _Heading(column, "", "")
    is_sorted = query.sort == column.sort
    order = ("descending" if query.descending else "ascending") if is_sorted else ""
    # Numbers begin with the largest one; a second click turns the order round.
    falls = not query.descending if is_sorted else column.is_number
    return _Heading(column, query.address(sort=f"{'-' if falls else ''}{column.sort}"), order)


@dataclass(frozen=True)
class _Pages:
    """The links below a table."""

    number: int
    count: int
    first: int
    last: int
    links: tuple[tuple[str, str], ...]


def _pages(query: Query, found: Found) -> _Pages:
    count = max(1, math.ceil(found.total / PAGE))
    now = query.page
    links = []
    if now > 1:
        links += [("First", query.address(page=1)), ("Previous", query.address(page=min(now - 1, count)))]
    if now < count:
        links += [("Next", query.address(page=now + 1)), ("Last", query.address(page=count))]
    first = (now - 1) * PAGE + 1
    return _Pages(now, count, first, first + len(found.records) - 1, tuple(links))


# -- the form -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Field:
    """A field of the form: `select` with options (value, name), `range` or `text`."""

    shape: str
    name: str
    label: str
    value: str = ""
    low: str = ""
    high: str = ""
    options: tuple[tuple[str, str], ...] = ()


def _fields(query: Query, found: Found) -> Iterator[_Field]:
    """Yield the fields of the form, without those of properties that no record of the run has."""
    by_name = {facet.filter.name: facet for facet in found.facets}
    for one in query.kind.filters:
        value = query.filters.get(one.name, "")
        if isinstance(one, Range):
            low, high = (query.filters.get(f"{one.name}_{end}", "") for end in ("min", "max"))
            if low or high or one.name not in found.unused:
                yield _Field("range", one.name, one.label, low=low, high=high)
        elif isinstance(one, Exact):
            yield _Field("number" if one.is_number else "text", one.name, one.label, value)
        elif value or set(by_name[one.name].counts) - {NONE}:
            yield _Field("select", one.name, one.label, value, options=tuple(_options(by_name[one.name], value)))


def _options(facet: Facet, value: str) -> Iterator[tuple[str, str]]:
    one, counts = facet.filter, facet.counts
    groups = one.groups if isinstance(one, Choice) else {}
    for name, (title, values) in groups.items():
        if counts or name == value:
            yield name, f"{title} ({sum(counts.get(each, 0) for each in values):,})"
    for name, count in counts.items():
        yield name, f"{_word(one, name)} ({count:,})"
    if value and value not in counts and value not in groups:
        yield value, f"{_word(one, value)} (0)"


def _word(one: Choice | Tags, value: str) -> str:
    if value == NONE and NONE not in one.words:
        return "not known"
    return one.words.get(value, value.replace("_", " "))


def _set_filters(query: Query) -> Iterator[tuple[str, str]]:
    """Yield the search and the set filters in words, each with the address without it."""
    if query.words:
        yield f"search “{query.words}”", query.address(without="q")
    for one in query.kind.filters:
        for name, words in _in_words(one, query):
            yield words, query.address(without=name)


def _in_words(one: Filter, query: Query) -> Iterator[tuple[str, str]]:
    if isinstance(one, Range):
        for end, sign in (("min", "≥"), ("max", "≤")):
            if value := query.filters.get(f"{one.name}_{end}"):
                yield f"{one.name}_{end}", f"{one.label} {sign} {value}"
    elif value := query.filters.get(one.name):
        if isinstance(one, Choice) and value in one.groups:
            value = one.groups[value][0]
        elif not isinstance(one, Exact):
            value = _word(one, value)
        yield one.name, f"{one.label}: {value}"
