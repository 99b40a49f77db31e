"""The application of `selfeval view`, and the router that `selfeval serve --view` adds to its own."""

from __future__ import annotations

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, RedirectResponse, Response

from selfeval import __version__
from selfeval.serve.api_errors import handle_errors
from selfeval.serve.gate import Access, Gate
from selfeval.serve.page_access import PAGES
from selfeval.serve.process import Application
from selfeval.view import browse, compare, label_page, overview, question, report, run_list, static
from selfeval.view.indexes import Indexes
from selfeval.view.label_desk import LabelDesk
from selfeval.view.opened import OpenedRuns

__all__ = ["make_view", "view_router"]

_BODY_BYTES = 1 << 20


def view_router(runs: OpenedRuns, desk: LabelDesk | None = None) -> APIRouter:
    """Return the routes of all pages, under `/view`.

    Args:
        runs: the runs to show.
        desk: Optional. How pairs are labelled. Default: pairs of test questions, by a rater who gives a name on the page.
    """
    indexes, labels = Indexes(), LabelDesk() if desk is None else desk

    def remember(request: Request) -> None:
        request.state.runs, request.state.indexes, request.state.desk = runs, indexes, labels

    router = APIRouter(prefix=PAGES, include_in_schema=False, dependencies=[Depends(remember)])
    for module in (static, run_list, overview, compare, label_page, browse, question, report):
        router.include_router(module.router)
    return router


def make_view(runs: OpenedRuns, access: Access, desk: LabelDesk | None = None) -> Application:
    """Return an application that serves the pages alone.

    Args:
        runs: the runs to show.
        access: who may use it.
        desk: Optional. See `view_router`.
    """
    api = FastAPI(title="Self-Evaluator", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    api.include_router(view_router(runs, desk))
    api.add_api_route("/", _to_pages)
    api.add_api_route("/health", _health)
    handle_errors(api)
    gate = Gate(api, access, _BODY_BYTES)
    api.state.gate = gate
    return Application(api, gate)


async def _to_pages() -> Response:
    return RedirectResponse(f"{PAGES}/", 307)


async def _health() -> JSONResponse:
    return JSONResponse({"status": "ok"})
