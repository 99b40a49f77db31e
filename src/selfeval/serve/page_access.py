"""Access of browsers to the pages under `/view`: the token comes in the link, and then in a cookie."""

from __future__ import annotations

import hmac
import secrets
from html import escape
from urllib.parse import parse_qsl, quote, urlencode

from starlette.datastructures import Headers
from starlette.requests import cookie_parser
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.types import Scope

__all__ = ["PAGES", "SAFE_HEADERS", "PageAccess", "is_page", "problem_page"]

PAGES = "/view"
"""Path of the pages."""

_STATIC = f"{PAGES}/static/"
"""Style sheets and scripts, which the page of a refusal needs too."""
SAFE_HEADERS = {
    # Text of models and people is escaped; should a page ever fail to do so, the browser still runs nothing of it.
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
"""Headers of every page."""


def is_page(path: str) -> bool:
    """Return whether a path belongs to the pages."""
    return path == PAGES or path.startswith(f"{PAGES}/")


class PageAccess:
    """Decides about requests to the pages.

    A browser cannot send a header when it opens a link, so the link has the token: `/view/?token=TOKEN`. The first response
    replaces it by a cookie, which scripts cannot read, and redirects to the link without it. The cookie is not the token but
    derived from it: browsers send the cookies of this machine to its other servers too, which must not learn the token.

    Args:
        token: the token; None: no token is needed.
    """

    def __init__(self, token: str | None) -> None:
        self._token = token
        self._session = "" if token is None else hmac.new(token.encode(), b"selfeval view", "sha256").hexdigest()

    def respond(self, scope: Scope, headers: Headers) -> Response | None:
        """Return the redirect of a link with the token, or a refusal; None: the request is admitted."""
        if not _is_read(scope) and not _from_same_origin(scope, headers):
            return problem_page(403, "This page was opened from another site, which may not change anything here.")
        if self._token is None or scope["path"].startswith(_STATIC):
            return None
        given = parse_qsl(scope.get("query_string", b"").decode("latin-1"), keep_blank_values=True)
        token = next((value for name, value in given if name == "token"), None)
        if token is not None and _is_read(scope) and _equal(token, self._token):
            return self._redirect(scope, headers, [(name, value) for name, value in given if name != "token"])
        if _equal(cookie_parser(headers.get("cookie", "")).get(_cookie(headers), ""), self._session):
            return None
        return problem_page(
            401,
            "The token is missing or wrong. Open the link that the server printed at its start; a restart prints a new one.",
        )

    def _redirect(self, scope: Scope, headers: Headers, query: list[tuple[str, str]]) -> Response:
        # Relative to this server: a path that begins with two slashes would be another host.
        path = "/" + quote(scope["path"].lstrip("/")) + (f"?{urlencode(query)}" if query else "")
        response = RedirectResponse(path, 303, SAFE_HEADERS)
        response.set_cookie(_cookie(headers), self._session, path=PAGES, httponly=True, samesite="lax")
        return response


def _equal(given: str, expected: str) -> bool:
    return secrets.compare_digest(given.encode(), expected.encode())


def _is_read(scope: Scope) -> bool:
    return scope["method"] in ("GET", "HEAD")


def _from_same_origin(scope: Scope, headers: Headers) -> bool:
    """Return whether a request that changes something comes from a page of this server; browsers always send its origin."""
    origin = headers.get("origin", "")
    return origin.partition("://")[2] == headers.get("host", "") and origin.startswith(("http://", "https://"))


def _cookie(headers: Headers) -> str:
    """Return the name of the cookie. Cookies do not distinguish ports, so that two servers would overwrite each other's."""
    port = headers.get("host", "").rpartition(":")[2]
    return f"selfeval-pages-{port if port.isdecimal() else 'default'}"


def problem_page(status: int, message: str) -> HTMLResponse:
    """Return a page with an error and a link to the list of runs."""
    page = (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, '
        f'initial-scale=1"><title>{status} · Self-Evaluator</title><link rel="stylesheet" href="{_STATIC}report.css">'
        f'<link rel="stylesheet" href="{_STATIC}view.css"></head>'
        f'<body><main class="sheet"><h1>{status}</h1><p>{escape(message)}</p><p><a href="{PAGES}/">All runs</a></p></main>'
        "</body></html>"
    )
    # The message may name a path with bytes that are not UTF-8.
    return HTMLResponse(page.encode("utf-8", "replace"), status, SAFE_HEADERS)
