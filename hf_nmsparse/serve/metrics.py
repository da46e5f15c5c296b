"""What the server counts, as Prometheus reads it."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, multiprocess
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["FOLDER", "Metrics", "Watched", "forget_dead_processes"]

_SECONDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 30, 60)
_TEXTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)

FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""Names the folder where processes write what they count for each other. It is read at the import."""


class Metrics:
    """Counters of one server; where it is several processes, of all of them."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter("nmsparse_requests", "Requests answered", ["path", "status"], registry=registry)
        self.seconds = Histogram(
            "nmsparse_request_seconds", "From header to answer", ["path"], registry=registry, buckets=_SECONDS
        )
        self._texts = Counter("nmsparse_sentences", "Sentences translated in batches", registry=registry)
        self._tokens = Counter("nmsparse_source_tokens", "Their tokens", registry=registry)
        self._batches = Histogram("nmsparse_batch_sentences", "Sentences of a batch", registry=registry, buckets=_TEXTS)
        self._batch_seconds = Histogram(
            "nmsparse_batch_seconds", "Time of a batch", registry=registry, buckets=_SECONDS
        )
        self._waited = Histogram(
            "nmsparse_wait_seconds", "What a text waits for its batch", registry=registry, buckets=_SECONDS
        )
        self._waiting = Gauge(
            "nmsparse_waiting_sentences", "Sentences in the queues", registry=registry, multiprocess_mode="livesum"
        )

    def waiting(self, change: int) -> None:
        """So many texts more wait."""
        if change:
            self._waiting.inc(change)

    def batch(self, texts: int, tokens: int, waited: Sequence[float], seconds: float) -> None:
        """A batch was translated."""
        self._texts.inc(texts)
        self._tokens.inc(tokens)
        self._batches.observe(texts)
        self._batch_seconds.observe(seconds)
        for each in waited:
            self._waited.observe(each)

    def page(self) -> bytes:
        """All of it, as text."""
        if FOLDER in os.environ:
            registry = CollectorRegistry()
            multiprocess.MultiProcessCollector(registry)
            return generate_latest(registry)
        return generate_latest(self._registry)


def forget_dead_processes() -> None:
    """Takes out of the sums what processes had waiting that are no more."""
    for file in Path(os.environ[FOLDER]).glob("gauge_live*_*.db"):
        process = int(file.stem.rpartition("_")[2])
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            with suppress(FileNotFoundError):  # another process has just done so
                multiprocess.mark_process_dead(process)


class Watched:
    """Counts the requests that an application answers, by the paths that it knows."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), "none"  # where the client went away

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception:
            status = "500"  # which is answered further outside
            raise
        finally:
            path = getattr(scope.get("route"), "path", "unknown")
            self._metrics.requests.labels(path, status).inc()
            self._metrics.seconds.labels(path).observe(time.perf_counter() - began)
