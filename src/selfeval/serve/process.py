"""The process of a server: listen on an address, answer requests, and drain when it is asked to stop.

This module does not import torch: `selfeval view` serves pages without a model.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn
from fastapi import FastAPI
from starlette.types import Receive, Scope, Send

from selfeval.errors import InputError
from selfeval.serve.gate import Gate

__all__ = ["Application", "listen", "serve_application"]

_BACKLOG = 2048
_AT_ONCE = 130
"""Exit code after a second signal."""


class Application:
    """The application with its gate.

    Attributes:
        api: the endpoints.
        gate: admits and counts requests.
    """

    def __init__(self, api: FastAPI, gate: Gate) -> None:
        self.api, self.gate = api, gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.gate(scope, receive, send)


def listen(host: str, port: int) -> socket.socket:
    """Reserve an address; connections are accepted later, by `serve`.

    Args:
        host: name or address.
        port: port; 0 is a free one.

    Raises:
        InputError: the address cannot be used.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        raise InputError(
            f"cannot listen on {host} port {port} ({error.strerror}); pass a free --port (0 picks one) or another --host"
        ) from error
    return found


class _Server(uvicorn.Server):
    """A server that finishes the running requests after the first signal, and ends at once after the second.

    New requests are answered with 503 in the meantime, which uvicorn would not accept any more.
    """

    def __init__(
        self, config: uvicorn.Config, application: Application, drain_seconds: float, ready: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._application, self._drain_seconds, self._ready = application, drain_seconds, ready
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()

        def handle(number: int, frame: FrameType | None) -> None:
            if self._application.gate.draining:
                os._exit(_AT_ONCE)
            self._application.gate.draining = True
            loop.call_soon_threadsafe(self._begin_drain)

        handled = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, handle) for number in handled}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _begin_drain(self) -> None:
        self._draining = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._application.gate.idle(), self._drain_seconds)
        self.should_exit = True


def serve_application(
    application: Application, listener: socket.socket, *, drain_seconds: float, ready: Callable[[], None]
) -> None:
    """Serve an application until SIGINT or SIGTERM.

    Args:
        application: the application.
        listener: result of `listen`.
        drain_seconds: seconds that running requests have to finish after the first signal.
        ready: is called when requests are accepted.
    """
    config = uvicorn.Config(
        application,
        log_level="warning",
        access_log=False,
        lifespan="off",
        loop="asyncio",
        http="h11",
        ws="none",
        server_header=False,
        backlog=_BACKLOG,
        # Connections that are kept alive, and requests that had their time to drain.
        timeout_graceful_shutdown=1,
    )
    asyncio.run(_Server(config, application, drain_seconds, ready).serve([listener]))
