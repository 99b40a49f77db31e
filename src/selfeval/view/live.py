"""Pages whose changing part is fetched again by static/live.js."""

from __future__ import annotations

import hashlib
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from selfeval.serve.page_access import SAFE_HEADERS
from selfeval.view.pages import is_fragment, page

__all__ = ["FAST", "SLOW", "live_page"]

FAST, SLOW = 2, 15
"""Seconds between two refreshes of a page about a run in progress, and about finished ones."""


def live_page(request: Request, template: str, **variables: Any) -> Response:
    """Return a page, or its changing part alone if the script asks for it; 304 if the script has it already.

    Args:
        request: the request.
        template: name of the template without suffix; the changing part is `NAME_live`, which the template includes.
        **variables: variables of both.
    """
    if not is_fragment(request):
        return page(request, f"{template}.html.j2", **variables)
    response = page(request, f"{template}_live.html.j2", **variables)
    tag = f'"{hashlib.sha256(bytes(response.body)).hexdigest()[:32]}"'
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers={**SAFE_HEADERS, "ETag": tag})
    response.headers["ETag"] = tag
    return response
