"""Admission of requests: host, token, drain, size of the body; and their count in the metrics."""

from __future__ import annotations

import asyncio
import ipaddress
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from selfeval.serve.api_errors import ApiError, error_response
from selfeval.serve.metrics import Metrics
from selfeval.serve.page_access import PageAccess, is_page, problem_page

__all__ = ["Access", "Gate", "authorized", "is_loopback"]

_OPEN = ("/", "/health")
"""Paths that need no token: where the pages are, and whether the server accepts requests."""
_GONE = 499
"""Status in the metrics for a client that left before the response began; nginx uses it too."""
_STALLED_SECONDS = 30.0
"""A response ends if its client reads nothing for so long: it would hold its places in the queue as long as it likes."""


def is_loopback(host: str) -> bool:
    """Return whether only this machine can connect to an address: `localhost`, 127.0.0.0/8 or ::1."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


@dataclass(frozen=True)
class Access:
    """Who may use the server.

    Attributes:
        token: the token that requests carry; None: no token is needed.
        loopback: whether the server listens on a loopback address. The header Host must then name this machine, so that a web
            page whose name was pointed at this address cannot use the server through a browser (DNS rebinding).
    """

    token: str | None
    loopback: bool

    def allows(self, headers: Mapping[str, str]) -> bool:
        """Return whether a request carries the token, compared in constant time."""
        if self.token is None:
            return True
        scheme, _, given = headers.get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and secrets.compare_digest(given.strip().encode(), self.token.encode())

    def names_this_machine(self, host: str) -> bool:
        """Return whether the header Host is accepted."""
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
        return not self.loopback or is_loopback(name)


class Gate:
    """ASGI middleware that admits requests and counts them.

    Args:
        app: the application.
        access: who may use it.
        body_bytes: maximum size of a body.
        metrics: Optional. Receives a count and the seconds of every request. Default: none are kept.

    Attributes:
        draining: whether new requests are refused with 503.
        active: number of requests that are being answered, without those to `/health`.
    """

    def __init__(self, app: ASGIApp, access: Access, body_bytes: int, metrics: Metrics | None = None) -> None:
        self._app, self._access, self._body_bytes, self._metrics = app, access, body_bytes, metrics
        self._pages = PageAccess(access.token)
        self.draining, self.active = False, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, status, is_stalled = time.monotonic(), _GONE, False
        is_counted = scope["path"] not in _OPEN

        async def send_and_note(message: Message) -> None:
            nonlocal status, is_stalled
            if message["type"] == "http.response.start":
                status = message["status"]
            try:
                async with asyncio.timeout(_STALLED_SECONDS):
                    await send(message)  # waits while the buffer of the connection is full
            except TimeoutError:
                is_stalled = True
                raise

        self.active += is_counted
        try:
            await self._admit(scope, receive, send_and_note)
        except Exception:
            if not is_stalled:  # otherwise the server closes the connection, because the response is not complete
                raise
        finally:
            self.active -= is_counted
            self._measure(scope, status, time.monotonic() - begun)

    def _measure(self, scope: Scope, status: int, seconds: float) -> None:
        if self._metrics is not None:
            path = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(path, str(status)).inc()
            self._metrics.seconds.labels(path).observe(seconds)

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        scope.setdefault("state", {})["authorized"] = self._access.allows(headers)
        if response := self._response(scope, headers):
            await response(scope, receive, send)
        else:
            await self._app(scope, self._limited(receive), send)

    def _response(self, scope: Scope, headers: Headers) -> Response | None:
        """Return the response to a request that does not reach the application."""
        error = self._refusal(scope, headers)
        if not is_page(scope["path"]):
            return None if error is None else error_response(error)
        return self._pages.respond(scope, headers) if error is None else problem_page(error.status, error.message)

    def _refusal(self, scope: Scope, headers: Mapping[str, str]) -> ApiError | None:
        if not self._access.names_this_machine(headers.get("host", "")):
            return ApiError(
                403,
                "the header Host does not name this machine; connect to 127.0.0.1 or localhost, or pass --host to the server",
                "wrong_host",
            )
        if scope["path"] in _OPEN:
            return None
        if not scope["state"]["authorized"] and not is_page(scope["path"]):
            message = (
                "missing or wrong token; send the header `Authorization: Bearer TOKEN` with the token printed at the start"
            )
            return ApiError(401, message, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        if self.draining:
            return ApiError(
                503, "the server is shutting down; send the request elsewhere", "draining", headers={"Retry-After": "5"}
            )
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self._body_bytes:
            return self._too_large(int(length))
        return None

    def _too_large(self, length: int) -> ApiError:
        return ApiError(413, _too_large(length, self._body_bytes), "too_large")

    def _limited(self, receive: Receive) -> Receive:
        """Count the bytes that arrive: a chunked body does not say its length."""
        total = 0

        async def counted() -> Message:
            nonlocal total
            message = await receive()
            total += len(message.get("body", b""))
            if total > self._body_bytes:
                # FastAPI passes on an exception of this class, and no other, while it reads a body.
                raise HTTPException(413, _too_large(total, self._body_bytes))
            return message

        return counted

    async def idle(self) -> None:
        """Wait until no request is being answered."""
        while self.active:
            await asyncio.sleep(0.02)


def _too_large(length: int, most: int) -> str:
    return f"the body has {length:,} bytes or more, the limit is {most:,} (--max-body-bytes)"


def authorized(scope: Any) -> bool:
    """Return whether a request carried the token."""
    return bool(scope["state"]["authorized"])
