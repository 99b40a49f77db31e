"""Serve the models of a run."""

from __future__ import annotations

import socket
from collections.abc import Callable

from fastapi import APIRouter

from selfeval.rollout.drafts import Speculation
from selfeval.serve.app import make_app
from selfeval.serve.gate import Access
from selfeval.serve.limits import Limits
from selfeval.serve.metrics import Metrics
from selfeval.serve.process import serve_application
from selfeval.serve.served_run import ServedRun
from selfeval.serve.service import Service
from selfeval.serve.worker import Worker

__all__ = ["serve"]


def serve(
    run: ServedRun,
    listener: socket.socket,
    access: Access,
    limits: Limits,
    *,
    drain_seconds: float,
    ready: Callable[[], None],
    pages: APIRouter | None = None,
    speculation: Speculation = Speculation.AUTO,
) -> None:
    """Serve a run until SIGINT or SIGTERM.

    Args:
        run: the models.
        listener: result of `selfeval.serve.process.listen`.
        access: who may use the server.
        limits: what requests may take.
        drain_seconds: seconds that running requests have to finish after the first signal.
        ready: is called when requests are accepted.
        pages: Optional. The pages of `selfeval view`, which the same process serves. Default: none.
        speculation: when drafts of the next tokens are read, as in `LiveBatch`. Default: `auto`.
    """
    worker = Worker(run, limits, speculation)
    application = make_app(Service(run, worker, limits, Metrics(worker)), access, pages)
    worker.start()
    try:
        serve_application(application, listener, drain_seconds=drain_seconds, ready=ready)
    finally:
        worker.stop(timeout=5)
