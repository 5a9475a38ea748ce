"""Tracing: spans and trace context, real when an OTLP endpoint is set, otherwise next to nothing.

No user id, prompt text or event body may ever become part of a span: name things by route, step,
version and count. Exceptions are recorded by their type only, because their text may quote a person.

Traces and metrics (inference/metrics.py) are on when OTEL_EXPORTER_OTLP_ENDPOINT is set, or that of one signal alone
(OTEL_EXPORTER_OTLP_TRACES_ENDPOINT, …_METRICS_ENDPOINT), and OTEL_SDK_DISABLED is not `true`. Off, nothing of
OpenTelemetry is imported, and an incoming trace context is still handed on by `inject`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar, Token
from types import TracebackType
from typing import Protocol

from inference import metrics, otel
from inference.otel import ENDPOINT_VARIABLES, Kind, Value
from inference.propagation import TraceContext, extract

__all__ = [
    "ENDPOINT_VARIABLES",
    "Kind",
    "Span",
    "TraceContext",
    "Value",
    "batch_span",
    "before_snapshot",
    "current",
    "current_trace_id",
    "extract",
    "flush",
    "inject",
    "server_span",
    "shutdown",
    "span",
]

DATABASE = "db "
"""A client span whose name begins so is also measured, as the operation that the rest of its name says."""


class Span(Protocol):
    """One open span."""

    def set(self, name: str, value: Value) -> None:
        """Set the attribute `name`."""

    def fail(self, error_type: str) -> None:
        """Mark the span as failed; `error_type` is a type or a status, never a message."""


class _Opening(AbstractContextManager[Span]):
    """What `span` and its kin give: opens on entry, closes and measures on exit."""

    __slots__ = ("_asked", "_began", "_carrier", "_opened", "_token", "_tracing")

    def __init__(
        self,
        name: str,
        kind: Kind,
        attributes: Mapping[str, Value] | None,
        carrier: Mapping[str, str] | None,
        links: Sequence[TraceContext] = (),
    ) -> None:
        self._asked = (name, kind, attributes, links)
        self._carrier = carrier
        self._began = 0.0
        self._tracing: otel.Tracing | None = None
        self._opened: otel.OpenSpan | None = None
        self._token: Token[TraceContext | None] | None = None

    def __enter__(self) -> Span:
        name, kind, attributes, links = self._asked
        parent = None if self._carrier is None else extract(self._carrier)
        self._tracing = otel.tracing()
        self._began = time.perf_counter()
        if self._tracing is not None:
            self._opened = self._tracing.open(name, kind, attributes, parent, links)
            return self._opened
        if self._carrier is not None:
            self._token = _incoming.set(parent)
        return _NO_SPAN

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        took = time.perf_counter() - self._began
        failed = kind.__name__ if kind is not None else ""
        if self._tracing is not None and self._opened is not None:
            if failed:
                self._opened.fail(failed)
            self._tracing.close(self._opened)
        elif self._token is not None:
            _incoming.reset(self._token)
        name, of, _, _ = self._asked
        if of == "client" and name.startswith(DATABASE):
            metrics.database_took(name.removeprefix(DATABASE), took, failed)
        elif of == "consumer":
            metrics.batch_processed(took, failed)


def span(
    name: str,
    kind: Kind = "internal",
    attributes: Mapping[str, Value] | None = None,
    carrier: Mapping[str, str] | None = None,
) -> AbstractContextManager[Span]:
    """A span around the block, child of the current one or, with a `carrier`, of the one named there.

    An exception that leaves the block marks the span as failed, with the exception's type.
    """
    return _Opening(name, kind, attributes, carrier)


def server_span(
    name: str, carrier: Mapping[str, str], attributes: Mapping[str, Value] | None = None
) -> AbstractContextManager[Span]:
    """The span of one request that came from outside; the process's first is flagged as a cold start."""
    cold = metrics.first_request(str((attributes or {}).get("faas.trigger", "http")))
    return _Opening(name, "server", {"faas.coldstart": cold, **(attributes or {})}, carrier)


def batch_span(
    name: str, senders: Sequence[TraceContext], attributes: Mapping[str, Value] | None = None
) -> AbstractContextManager[Span]:
    """The span of a batch of messages, with a link to each of its `senders` (`propagation.of_messages`) and no parent."""
    cold = metrics.first_request("pubsub")
    said = {"faas.coldstart": cold, "faas.trigger": "pubsub", **(attributes or {})}
    return _Opening(name, "consumer", said, None, senders)


def current() -> TraceContext | None:
    """The context of the current span; with tracing off, the one that came in."""
    tracing = otel.tracing()
    return tracing.current() if tracing is not None else _incoming.get()


def current_trace_id() -> str:
    """The current trace's id, 32 hex digits; empty outside a trace."""
    context = current()
    return context.trace_id if context else ""


def inject() -> dict[str, str]:
    """What to send along (headers, run tags) so that the other side's spans hang under the current one."""
    context = current()
    return context.headers() if context else {}


def flush(timeout_ms: int) -> bool:
    """Send what is waiting, within `timeout_ms`; False if it took longer. For platforms that freeze a process."""
    return otel.flush(timeout_ms)


def shutdown(timeout_ms: int = 1000) -> None:
    """Flush and forget the set-up; the next span reads the environment again."""
    otel.shutdown(timeout_ms)


def before_snapshot(timeout_ms: int = 1000) -> None:
    """Flush and leave nothing of this process behind: no instance id, no thread, no count that two copies would share."""
    otel.shutdown(timeout_ms)
    metrics.cold_again()


class _NoSpan:
    __slots__ = ()

    def set(self, name: str, value: Value) -> None:
        pass

    def fail(self, error_type: str) -> None:
        pass


_NO_SPAN = _NoSpan()
_incoming: ContextVar[TraceContext | None] = ContextVar("larder_incoming_trace", default=None)
