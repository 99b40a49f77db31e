"""The server process: listen, serve, and drain when it is asked to stop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn

from selfeval.errors import InputError
from selfeval.rollout.drafts import Speculation
from selfeval.serve.app import Application, make_app
from selfeval.serve.gate import Access
from selfeval.serve.limits import Limits
from selfeval.serve.metrics import Metrics
from selfeval.serve.served_run import ServedRun
from selfeval.serve.service import Service
from selfeval.serve.worker import Worker

__all__ = ["listen", "serve"]

_BACKLOG = 2048
_AT_ONCE = 130
"""Exit code after a second signal."""


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


def serve(
    run: ServedRun,
    listener: socket.socket,
    access: Access,
    limits: Limits,
    *,
    drain_seconds: float,
    ready: Callable[[], None],
    speculation: Speculation = Speculation.AUTO,
) -> None:
    """Serve a run until SIGINT or SIGTERM.

    Args:
        run: the models.
        listener: result of `listen`.
        access: who may use the server.
        limits: what requests may take.
        drain_seconds: seconds that running requests have to finish after the first signal.
        ready: is called when requests are accepted.
        speculation: when drafts of the next tokens are read, as in `LiveBatch`. Default: `auto`.
    """
    worker = Worker(run, limits, speculation)
    application = make_app(Service(run, worker, limits, Metrics(worker)), access)
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
    server = _Server(config, application, drain_seconds, ready)
    worker.start()
    try:
        asyncio.run(server.serve([listener]))
    finally:
        worker.stop(timeout=5)
