"""Count what a server does, for Prometheus: requests, tokens, what was served from kept chunk KV, what waits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from focus_core.server.answering import Finished

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """The counters of one server; none carries a name of a memory, a document or a caller."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "focusllm_answers", "Answers by outcome", ["outcome"], registry=self.registry
        )  # done, failed
        self._seconds = Histogram("focusllm_queue_seconds", "Seconds that answers waited", registry=self.registry)
        self._tokens = Counter("focusllm_tokens", "Tokens by kind", ["kind"], registry=self.registry)
        self._documents = Counter("focusllm_documents", "Documents read into memories", registry=self.registry)

    def gauge(self, name: str, what: str, value: Callable[[], float]) -> None:
        """Show a value that is asked for when metrics are read."""
        Gauge(f"focusllm_{name}", what, registry=self.registry).set_function(value)

    @contextmanager
    def request(self) -> Iterator[Callable[[], None]]:
        """Count one request: done if what this gives is called, else failed."""
        outcome = "failed"

        def done() -> None:
            nonlocal outcome
            outcome = "done"

        try:
            yield done
        finally:
            self._requests.labels(outcome).inc()

    def waited(self, seconds: float) -> None:
        """Record how long an answer waited."""
        self._seconds.observe(seconds)

    def answered(self, finished: Finished) -> None:
        """Record the tokens of an answer."""
        usage = finished.answer.usage
        self._tokens.labels("local").inc(usage.local)
        self._tokens.labels("memory").inc(usage.memory)
        self._tokens.labels("generated").inc(usage.generated)

    def read(self, documents: int) -> None:
        """Record documents that were read into a memory."""
        self._documents.inc(documents)

    def text(self) -> bytes:
        """Return all of it in Prometheus' text format."""
        return generate_latest(self.registry)
