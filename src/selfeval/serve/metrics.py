"""The figures of `/metrics`, in the text format of Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from selfeval.serve.worker import Worker

__all__ = ["Metrics"]

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters, gauges and histograms of one server.

    Args:
        worker: its queue and batches are read when the figures are.
    """

    def __init__(self, worker: Worker) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "selfeval_requests",
            "Requests, by path and HTTP status; 499: the client left.",
            ("path", "status"),
            registry=self._registry,
        )
        self.seconds = Histogram(
            "selfeval_request_seconds",
            "Seconds from a request to the end of its response.",
            ("path",),
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.first_token_seconds = Histogram(
            "selfeval_first_token_seconds",
            "Seconds from a streamed request to its first token.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.tokens = Counter("selfeval_tokens", "Tokens of prompts and replies.", ("kind",), registry=self._registry)
        self._gauge("selfeval_running_rows", "Replies that are being sampled.", lambda: worker.running)
        self._gauge("selfeval_waiting_rows", "Replies that wait for a place.", lambda: worker.waiting)
        self._gauge("selfeval_waiting_scorings", "Scoring requests that wait.", lambda: worker.scoring)
        self._registry.register(_Drafts(worker))
        self._gauge("selfeval_cache_bytes", "Bytes of the KV caches.", lambda: worker.cache_bytes)

    def _gauge(self, name: str, text: str, value: Callable[[], int]) -> None:
        Gauge(name, text, registry=self._registry).set_function(value)

    def text(self) -> bytes:
        """Return all figures."""
        return generate_latest(self._registry)


class _Drafts(Collector):
    """Count drafted tokens; the worker counts them, and they are read when the figures are."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def collect(self) -> Iterator[CounterMetricFamily]:
        found = CounterMetricFamily(
            "selfeval_drafted_tokens", "Tokens that were drafted for replies sampled alone, by result.", labels=("result",)
        )
        counts = self._worker.drafts
        found.add_metric(["accepted"], counts.accepted)
        found.add_metric(["rejected"], counts.read - counts.accepted)
        yield found
