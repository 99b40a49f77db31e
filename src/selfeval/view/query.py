"""A selection of records as it is in an address: search, filters, order and page; and the SQL that finds the records."""

from __future__ import annotations

import math
import re
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from urllib.parse import urlencode

from selfeval.errors import InputError
from selfeval.texts import nearest
from selfeval.view.index import Located, has_full_text
from selfeval.view.kinds import KINDS, Choice, Exact, Filter, Kind, Range, Tags, Value

__all__ = ["NONE", "PAGE", "Facet", "Found", "Query", "find", "parse_query"]

PAGE = 50
"""Records per page."""
NONE = "none"
"""Value of a choice for records without one."""
_MOST_OPTIONS = 200
_SHORTEST = 3
"""Characters of the shortest text that trigrams find."""
_LONGEST_SEARCH = 1000
_LONGEST_SHOWN = 40
"""Characters of a wrong value in a message."""
_MOST_WORDS = 20
"""Different words of a search; each can be a scan of all texts of the kind and of the kinds that it mentions."""


@dataclass(frozen=True)
class Query:
    """A selection of the records of a kind.

    Attributes:
        kind: the kind.
        words: text to search; empty: no search.
        filters: values of the set filters, by parameter.
        sort: column to sort by; empty: the order of the files.
        descending: whether the largest value comes first.
        page: number of the page, from 1.
    """

    kind: Kind
    words: str
    filters: Mapping[str, str]
    sort: str
    descending: bool
    page: int

    @property
    def is_filtered(self) -> bool:
        """Whether a search or a filter is set."""
        return bool(self.words or self.filters)

    def address(self, *, page: int = 1, sort: str | None = None, without: str | None = None) -> str:
        """Return the query string of this selection, beginning with `?`.

        Args:
            page: the page.
            sort: Optional. Another order. Default: the same.
            without: Optional. A parameter to leave out. Default: none.
        """
        order = ("-" if self.descending else "") + self.sort if sort is None else sort
        values = {"q": self.words, **self.filters, "sort": order, "page": "" if page == 1 else str(page)}
        found = urlencode({name: value for name, value in values.items() if value and name != without})
        return f"?{found}" if found else "?"


@dataclass(frozen=True)
class Facet:
    """The values that a filter can have, with the number of records under the other filters."""

    filter: Choice | Tags
    counts: Mapping[str, int]


@dataclass(frozen=True)
class Found:
    """The records of a page.

    Attributes:
        total: number of selected records.
        records: places of those of the page.
        facets: counts of the values of each choice.
        unused: ranges over columns that are empty in all records of the kind.
    """

    total: int
    records: tuple[Located, ...]
    facets: tuple[Facet, ...]
    unused: frozenset[str] = frozenset()


# -- the address --------------------------------------------------------------------------------------------------------


def parse_query(kind: Kind, parameters: Mapping[str, str]) -> Query:
    """Read a selection from an address. Empty parameters are those of empty fields in a form.

    Raises:
        InputError: an unknown parameter, a number that is none, an unknown tag or column to sort by, or a search that is too
            long.
    """
    given = {name: value.strip() for name, value in parameters.items() if value.strip()}
    words, order, page = given.pop("q", ""), given.pop("sort", ""), given.pop("page", "1")
    _require_short(words)
    allowed = {name: one for one in kind.filters for name in _names(one)}
    for name, value in given.items():
        if name not in allowed:
            raise InputError(f"{kind.title} have no filter {name!r}{nearest(name, list(allowed))}")
        _require_valid(allowed[name], name, value)
    sort = order.removeprefix("-")
    if sort and sort not in kind.columns:
        raise InputError(f"{kind.title} cannot be sorted by {sort!r}{nearest(sort, list(kind.columns))}")
    return Query(kind, words, given, sort, order.startswith("-"), _page(page))


def _names(one: Filter) -> tuple[str, ...]:
    return (f"{one.name}_min", f"{one.name}_max") if isinstance(one, Range) else (one.name,)


def _require_short(words: str) -> None:
    if len(words) > _LONGEST_SEARCH:
        raise InputError(f"the search has {len(words):,} characters, the limit is {_LONGEST_SEARCH:,}; shorten it")
    if (count := len(_split(words))) > _MOST_WORDS:
        raise InputError(
            f"the search has {count:,} different words, the limit is {_MOST_WORDS}; remove some, or put a phrase in quotes"
        )


def _require_valid(one: Filter, name: str, value: str) -> None:
    if isinstance(one, Range) or (isinstance(one, Exact) and one.is_number):
        _number(name, value)
    if isinstance(one, Tags) and value not in one.words:
        shown = value if len(value) <= _LONGEST_SHOWN else f"{value[:_LONGEST_SHOWN]}…"
        raise InputError(f"{name} is {shown!r}, expected one of {', '.join(one.words)}")


def _number(name: str, value: str) -> float:
    try:
        found = float(value)
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise InputError(f"{name} is {value!r}, expected a number such as 0.5")
    return found


def _page(value: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", value) or int(value) < 1:
        raise InputError(f"page is {value!r}, expected a number from 1")
    return int(value)


# -- SQL ----------------------------------------------------------------------------------------------------------------

_Condition = tuple[str, list[Value]]
"""A condition with its values. Names of tables and columns are those of `KINDS`; everything from the address is a value."""


def find(connection: sqlite3.Connection, query: Query, *, whole: bool = False) -> Found:
    """Find the records of a page.

    Args:
        connection: of the index; see `RunIndex.reading`.
        query: the selection.
        whole: return all records instead of one page, and no facets. Default: False.
    """
    kind = query.kind
    if query.words:
        _search(connection, kind, query.words)
    conditions = dict(_conditions(query))
    where, values = _where(conditions)
    total = connection.execute(f"SELECT count(*) FROM {kind.name} AS t{where}", values).fetchone()[0]
    limit = "" if whole else f" LIMIT {PAGE} OFFSET {(query.page - 1) * PAGE}"
    rows = connection.execute(f"SELECT id, start, size FROM {kind.name} AS t{where}{_order(query)}{limit}", values)
    found = tuple(Located(*row) for row in rows)
    if whole:
        return Found(total, found, ())
    return Found(total, found, tuple(_facets(connection, kind, conditions)), _unused(connection, kind))


def _unused(connection: sqlite3.Connection, kind: Kind) -> frozenset[str]:
    columns = [one.name for one in kind.filters if isinstance(one, Range)]
    if not columns:
        return frozenset()
    known = ", ".join(f"count({column})" for column in columns)
    row = connection.execute(f"SELECT {known} FROM {kind.name}").fetchone()
    return frozenset(column for column, count in zip(columns, row, strict=True) if not count)


def _order(query: Query) -> str:
    if not query.sort:
        return " ORDER BY id"
    # Records without a value come last in both directions.
    return f" ORDER BY {query.sort} IS NULL, {query.sort} {'DESC' if query.descending else 'ASC'}, id"


def _where(conditions: Mapping[str, _Condition], without: str = "") -> tuple[str, list[Value]]:
    used = [condition for name, condition in conditions.items() if name != without]
    text = " AND ".join(f"({sql})" for sql, _ in used)
    return (f" WHERE {text}" if text else ""), [value for _, values in used for value in values]


def _conditions(query: Query) -> Iterator[tuple[str, _Condition]]:
    """Yield the condition of each set filter by its name, and that of the search."""
    if query.words:
        yield "q", ("t.id IN (SELECT id FROM found)", [])
    for one in query.kind.filters:
        for name in _names(one):
            if name in query.filters:
                yield name, _condition(one, name, query.filters[name])


def _condition(one: Filter, name: str, value: str) -> _Condition:
    if isinstance(one, Range):
        return f"t.{one.name} {'>=' if name.endswith('_min') else '<='} ?", [float(value)]
    if isinstance(one, Exact):
        return f"t.{one.name} = ?", [float(value) if one.is_number else value]
    if isinstance(one, Tags):
        return f"t.{one.name} LIKE ? ESCAPE '\\'", [f"% {_escaped(value)} %"]
    column = _column(one)
    if value == NONE:
        return f"{column} IS NULL", []
    options = one.groups[value][1] if value in one.groups else (value,)
    return f"{column} IN ({', '.join('?' * len(options))})", list(options)


def _column(one: Choice) -> str:
    if not one.through:
        return f"t.{one.name}"
    return f"(SELECT other.{one.name} FROM {one.through} AS other WHERE other.question = t.question)"


def _facets(connection: sqlite3.Connection, kind: Kind, conditions: Mapping[str, _Condition]) -> Iterator[Facet]:
    for one in kind.filters:
        if isinstance(one, Choice):
            where, values = _where(conditions, one.name)
            sql = f"SELECT {_column(one)} AS value, count(*) FROM {kind.name} AS t{where} GROUP BY value ORDER BY 2 DESC, 1"
            rows = connection.execute(f"{sql} LIMIT {_MOST_OPTIONS}", values).fetchall()
            yield Facet(one, {NONE if value is None else str(value): count for value, count in rows})
        elif isinstance(one, Tags):
            where, values = _where(conditions, one.name)
            sums = ", ".join(f"total(t.{one.name} LIKE '% {word} %')" for word in one.words)
            row = connection.execute(f"SELECT {sums} FROM {kind.name} AS t{where}", values).fetchone()
            yield Facet(one, {word: int(count) for word, count in zip(one.words, row, strict=True) if count})


# -- search -------------------------------------------------------------------------------------------------------------


def _search(connection: sqlite3.Connection, kind: Kind, words: str) -> None:
    """Put the ids of the records that contain all words into the temporary table `found`.

    A word may be in the text of the record itself or of its question or replies.
    """
    connection.execute("DROP TABLE IF EXISTS temp.found")
    conditions, values = [], []
    for word in _split(words):
        sql, value = _contains(kind.name, word)
        parts = [f"t.id IN ({sql})"]
        values.append(value)
        for column, other in kind.mentions.items():
            sql, value = _contains(other, word)
            key = "question" if other == "questions" else "reply"
            parts.append(f"t.{column} IN (SELECT {key} FROM {other} WHERE id IN ({sql}))")
            values.append(value)
        conditions.append(f"({' OR '.join(parts)})")
    where = f" WHERE {' AND '.join(conditions)}" if conditions else ""
    connection.execute(f"CREATE TEMP TABLE found AS SELECT t.id FROM {kind.name} AS t{where}", values)
    connection.execute("CREATE INDEX temp.found_id ON found(id)")


def _split(words: str) -> list[str]:
    """Return the different words of a search; a part in double quotes is one word."""
    return list(dict.fromkeys(quoted or word for quoted, word in re.findall(r'"([^"]+)"|([^\s"]+)', words)))


def _contains(kind: str, word: str) -> tuple[str, str]:
    """Return a query for the ids of the records of a kind whose text contains a word, and its value."""
    if has_full_text() and len(word) >= _SHORTEST and "\x00" not in word:
        # In quotes, nothing in the word is an operator of the query language.
        quoted = word.replace('"', '""')
        return f"SELECT rowid FROM {kind}_words WHERE {kind}_words MATCH ?", f'"{quoted}"'
    return f"SELECT id FROM {kind}_text WHERE text LIKE ? ESCAPE '\\'", f"%{_escaped(word)}%"


def _escaped(word: str) -> str:
    return re.sub(r"([\\%_])", r"\\\1", word)


assert all(other in KINDS for kind in KINDS.values() for other in kind.mentions.values())
