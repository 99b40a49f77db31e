"""The page on which a person compares two replies, and the figures from the labels so far."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlencode

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from markupsafe import Markup

from selfeval.errors import InputError
from selfeval.quality.statistics import Figure
from selfeval.report.charts import Track
from selfeval.report.drawing import interval_tracks
from selfeval.report.figures import cells, describe
from selfeval.report.labels import human_labels, threshold_sentence
from selfeval.report.schema import HumanLabels
from selfeval.runs.labelling import LabelSession, LabelTask
from selfeval.serve.page_access import PAGES, SAFE_HEADERS
from selfeval.view.label_desk import LabelDesk
from selfeval.view.pages import PageRoute, opened_runs, page

__all__ = ["router"]

router = APIRouter(route_class=PageRoute)

_COOKIE = "selfeval-rater"
_YEAR = 365 * 24 * 3600


def _desk(request: Request) -> LabelDesk:
    found: LabelDesk = request.state.desk
    return found


@router.get("/run/{run}/label")
def label_page(run: str, request: Request, rater: str = "") -> HTMLResponse:
    """Show the next pair of a rater, or ask for the rater's name."""
    desk, folder = _desk(request), opened_runs(request).reader(run).folder
    # The name of the desk is that of the person who started the server, and others may open the page.
    name = (rater or unquote(request.cookies.get(_COOKIE, ""))).strip()
    shared = {"title": f"Label {run}", "run": run, "tab": "label", "rater": name, "desk": desk}
    try:
        task = desk.task(folder)
        session = desk.session(folder, name) if name else None
    except InputError as problem:  # no pairs yet, or the name is not allowed
        return page(request, "label.html.j2", **shared, problem=str(problem), figures=None)
    return page(request, "label.html.j2", **shared, problem="", **_asked(task, session), figures=_figures(task))


def _asked(task: LabelTask, session: LabelSession | None) -> dict[str, Any]:
    """Return the variables of the next pair; no pair without a rater, or at the end of the session."""
    if session is None:
        return {"pair": None, "done": 0, "total": len(task.pairs)}
    done, total = session.progress
    return {"pair": session.next_pair(), "done": done, "total": total}


@router.post("/run/{run}/label")
async def answer(run: str, request: Request) -> Response:
    """Save an answer, or take the last one back, and show the next pair."""
    given = dict(parse_qsl((await request.body()).decode("utf-8", "replace"), keep_blank_values=True))
    if missing := [name for name in ("rater", "choice") if not given.get(name, "").strip()]:
        raise InputError(f"the form has no {missing[0]}; go back and reload the page")
    rater = given["rater"].strip()
    await run_in_threadpool(_save, run, request, given)
    address = f"{PAGES}/run/{quote(run, safe='')}/label?{urlencode({'rater': rater})}"
    response = RedirectResponse(address, 303, SAFE_HEADERS)
    response.set_cookie(_COOKIE, quote(rater, safe=""), path=PAGES, max_age=_YEAR, httponly=True, samesite="lax")
    return response


def _save(run: str, request: Request, given: dict[str, str]) -> None:
    session = _desk(request).session(opened_runs(request).reader(run).folder, given["rater"])
    if given["choice"] == "undo":
        session.undo()
        return
    question_id, first, second, texts = (given.get(name, "") for name in ("question_id", "first", "second", "texts"))
    session.task.record(session.rater, question_id, first, second, given["choice"], texts=texts)


# -- figures ------------------------------------------------------------------------------------------------------------


def _figures(task: LabelTask) -> dict[str, Any] | None:
    """Return the variables of the panel with the figures; None for labels that may be trained on, which give none."""
    if task.for_training:
        return None
    labels = human_labels(task.agreement(), task.threshold())
    threshold = threshold_sentence(labels.threshold) if labels.decided else ""
    return {"labels": labels, "rows": _rows(labels), "chart": Markup(_chart(labels)), "threshold": threshold}


def _shares(labels: HumanLabels) -> list[tuple[str, Figure]]:
    return [("evaluator", labels.evaluator), ("judge", labels.judge), ("judge, kept verdicts", labels.judge_kept)]


def _rows(labels: HumanLabels) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [(f"People agree with the {name}", *cells(figure)) for name, figure in _shares(labels)]
    if labels.kappa is not None:
        rows.append((f"Kappa of {labels.raters} raters", *cells(labels.kappa, as_percent=False)))
    return rows


def _chart(labels: HumanLabels) -> str:
    # The column of names is narrow.
    shares = [(name.removesuffix(" verdicts"), figure) for name, figure in _shares(labels)]
    measured = [(name, figure) for name, figure in shares if figure.value is not None]
    tracks = [Track(name, figure.known, figure.ci_low, figure.ci_high, name == "evaluator") for name, figure in measured]
    label = "; ".join(f"{name} {describe(figure)}" for name, figure in measured)
    return interval_tracks(tracks, label=f"Agreement with people: {label}", reference=0.5) if tracks else ""
