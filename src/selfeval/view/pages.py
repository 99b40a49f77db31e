"""Render pages: templates, shared variables, headers, and errors as pages."""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine
from functools import cache
from pathlib import Path
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, Response
from fastapi.routing import APIRoute
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from selfeval.errors import InputError
from selfeval.serve.page_access import PAGES, SAFE_HEADERS, problem_page
from selfeval.view.opened import OpenedRuns
from selfeval.view.problems import NotFoundError

__all__ = ["PageRoute", "is_fragment", "opened_runs", "page"]

_LOG = logging.getLogger(__name__)
_FRAGMENT = "x-fragment"
"""Header of the script that refreshes a part of a page."""


_TABS = (
    ("overview", "Overview"),
    ("report", "Report"),
    ("questions", "Questions"),
    ("replies", "Replies"),
    ("verdicts", "Verdicts"),
    ("pairs", "Pairs"),
    ("dropped", "Dropped"),
    ("scored", "Test pairs"),
    ("compared", "Before and after"),
    ("sampled", "Training samples"),
    ("label", "Label"),
)
"""Pages of a run: part of the address, and name."""


def page(request: Request, template: str, **variables: Any) -> HTMLResponse:
    """Return a page from a template of this package, which escapes all text that is not marked as safe."""
    rendered = _environment().get_template(template).render(root=PAGES, tabs=_TABS, **variables)
    # JSON can hold halves of surrogate pairs, which cannot be encoded.
    return HTMLResponse(rendered.encode("utf-8", "replace"), headers=SAFE_HEADERS)


def is_fragment(request: Request) -> bool:
    """Return whether the script asks for the changing part of a page alone."""
    return _FRAGMENT in request.headers


def opened_runs(request: Request) -> OpenedRuns:
    """Return the runs that the pages show."""
    found: OpenedRuns = request.state.runs
    return found


@cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        # A misspelt name in a template is an error, not an empty cell.
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


class PageRoute(APIRoute):
    """A route whose errors are pages."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                return await handle(request)
            except NotFoundError as error:
                return problem_page(404, str(error))
            except InputError as error:
                return problem_page(400, str(error))
            except RequestValidationError as error:
                first = error.errors()[0]
                return problem_page(400, f"{first['loc'][-1]}: {first['msg']}")
            except Exception:
                _LOG.exception("the page %s could not be rendered", request.url.path)
                return problem_page(500, "This page could not be rendered; the traceback is in the terminal of the server.")

        return answer
