"""The list of all runs."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

from selfeval.runs.listing import listed_run
from selfeval.view.pages import PageRoute, opened_runs, page

__all__ = ["router"]

router = APIRouter(route_class=PageRoute)


@router.get("/")
def run_list(request: Request) -> HTMLResponse:
    """Show all runs with their status and main figures."""
    runs = [(name, listed_run(folder)) for name, folder in opened_runs(request).named().items()]
    return page(request, "run_list.html.j2", title="Runs", runs=runs)
