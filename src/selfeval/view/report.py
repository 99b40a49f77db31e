"""The report of a run, in which figures, counts and charts lead to their records."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse
from markupsafe import Markup

from selfeval.errors import RunFolderError
from selfeval.report.map_points import read_map_points
from selfeval.report.page import render_body
from selfeval.report.reading import read_metrics, read_report
from selfeval.report.schema import Report
from selfeval.runs.activity import activity_of
from selfeval.view.addresses import question_address, records_address
from selfeval.view.index import encodable
from selfeval.view.indexes import index_of
from selfeval.view.links import Records, linked_fields
from selfeval.view.opened import RunName
from selfeval.view.pages import PageRoute, opened_runs, page

__all__ = ["report_links", "router"]

router = APIRouter(route_class=PageRoute)

_WAIT_SECONDS = 2.0


@router.get("/run/{run}/report")
def report_page(run: str, request: Request) -> HTMLResponse:
    """Show the report; a run without one says what is missing."""
    reader = opened_runs(request).reader(run)
    shared = {"title": f"Report · {run}", "run": run, "tab": "report"}
    try:
        reader.report()  # checks that it is there and not damaged
    except RunFolderError as error:
        is_running = activity_of(reader).is_running
        return page(request, "no_report.html.j2", **shared, reason=str(error), is_running=is_running)
    report = read_report(reader.folder / "report.json")
    links = report_links(run, report)
    index = index_of(request, reader.folder)
    index.refresh(reader, ("questions",), _WAIT_SECONDS)
    with index.reading() as connection:
        links.update(_sample_links(connection, run, report))
    points = read_map_points(reader.folder)
    questions = {point.id: question_address(run, point.id) for point in points if point.id}
    body = render_body(report, read_metrics(reader.folder), links, points, questions)
    return page(request, "report.html.j2", **shared, body=Markup(body), folder=reader.folder)


def report_links(run: RunName, report: Report) -> dict[str, str]:
    """Return the address of the records of each field of a report."""
    links = {path: _address(run, path, records) for path, records in linked_fields(report)}
    # The chart of all baselines.
    if "evaluator.baselines.first_wins" in links:
        links["evaluator.baselines"] = links["evaluator.baselines.first_wins"]
    return links


def _address(run: RunName, path: str, records: Records) -> str:
    place = path.split(".")[1] if path.startswith("rounds.") else "0"
    name, _, number = run.rpartition("@")
    base = name if name and number.isdecimal() else run
    owner = f"{base}@{int(place) + 1}" if path.startswith("rounds.") and place != "0" else run
    return records_address(owner, records.kind, records.parameters)


def _sample_links(connection: sqlite3.Connection, run: RunName, report: Report) -> Iterator[tuple[str, str]]:
    """Yield the address of the question of each sample, which is found by its text."""
    sql = "SELECT question FROM questions JOIN questions_text USING (id) WHERE same = ? AND text = ?"
    for place, sample in enumerate(report.samples):
        found = connection.execute(sql, (hash(sample.question), encodable(sample.question))).fetchone()
        if found:
            yield f"samples.{place}", f"{question_address(run, found[0])}#compared-title"
