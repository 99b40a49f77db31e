"""The page of a run in progress or finished: stages, curves, samples, watchdogs."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

from selfeval.view.pages import PageRoute, opened_runs, page

__all__ = ["router"]

router = APIRouter(route_class=PageRoute)


@router.get("/run/{run}")
def overview(run: str, request: Request) -> HTMLResponse:
    """Show the state of a run."""
    reader = opened_runs(request).reader(run)
    return page(request, "overview.html.j2", title=run, run=run, tab="overview", status=reader.status, stages=reader.stages)
