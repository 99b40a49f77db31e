"""The page that compares runs: settings, figures with the intervals of their differences, curves, and replies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated
from urllib.parse import urlencode

from fastapi import APIRouter, Query, Request
from fastapi.responses import HTMLResponse

from selfeval.view.compared_runs import ComparedRun, differences, notes, open_runs
from selfeval.view.overlaid_curves import overlaid_curves
from selfeval.view.pages import PageRoute, opened_runs, page
from selfeval.view.paired_replies import FILTERS, paired_replies
from selfeval.view.run_figures import figure_rows

__all__ = ["router"]

router = APIRouter(route_class=PageRoute)

_PER_PAGE = 20


@router.get("/compare")
def compare(
    request: Request,
    run: Annotated[list[str] | None, Query()] = None,
    show: str = "all",
    page_number: Annotated[int, Query(alias="page", ge=1, le=10**6)] = 1,
) -> HTMLResponse:
    """Compare two to four runs."""
    runs = open_runs(opened_runs(request), run or [])
    show = show if show in FILTERS else "all"
    every = paired_replies(runs)
    shown = [paired for paired in every if paired.passes(show)]
    pages = max(1, -(-len(shown) // _PER_PAGE))
    number = min(page_number, pages)
    return page(
        request,
        "compare.html.j2",
        title="Compare runs",
        runs=runs,
        notes=list(notes(runs)),
        differences=differences(runs),
        figures=figure_rows(runs),
        curves=overlaid_curves(runs),
        every=len(every),
        found=len(shown),
        replies=shown[(number - 1) * _PER_PAGE : number * _PER_PAGE],
        first=(number - 1) * _PER_PAGE,
        filters=[(name, words, sum(paired.passes(name) for paired in every)) for name, words in FILTERS.items()],
        show=show,
        number=number,
        pages=pages,
        swapped=_address([*runs[1:], runs[0]]),
        before=_address(runs, show, number - 1) if number > 1 else "",
        after=_address(runs, show, number + 1) if number < pages else "",
    )


def _address(runs: Sequence[ComparedRun], show: str = "all", number: int = 1) -> str:
    """Return the query of a page of this comparison."""
    given = [("show", show)] * (show != "all") + [("page", str(number))] * (number > 1)
    return urlencode([*(("run", run.name) for run in runs), *given])
