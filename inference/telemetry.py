"""Tracing: spans and trace context, real when an OTLP endpoint is set, otherwise next to nothing.

No user id, prompt text or event body may ever become part of a span: name things by route, step,
version and count. Exceptions are recorded by their type only, because their text may quote a person.

Traces and metrics (inference/metrics.py) are on when OTEL_EXPORTER_OTLP_ENDPOINT is set, or that of one signal alone
(OTEL_EXPORTER_OTLP_TRACES_ENDPOINT, …_METRICS_ENDPOINT), and OTEL_SDK_DISABLED is not `true`. Off, nothing of
OpenTelemetry is imported, and an incoming trace context is still handed on by `inject`.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
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


@contextmanager
def span(
    name: str,
    kind: Kind = "internal",
    attributes: Mapping[str, Value] | None = None,
    carrier: Mapping[str, str] | None = None,
) -> Generator[Span]:
    """A span around the block, child of the current one or, with a `carrier`, of the one named there.

    An exception that leaves the block marks the span as failed, with the exception's type.
    """
    began = time.perf_counter()
    failed = ""
    tracing = otel.tracing()
    try:
        if tracing is None:
            with _passing_on(carrier):
                yield _NO_SPAN
        else:
            parent = extract(carrier) if carrier is not None else None
            with tracing.span(name, kind, attributes, parent) as opened:
                yield opened
    except BaseException as error:
        failed = type(error).__name__
        raise
    finally:
        if kind == "client" and name.startswith(DATABASE):
            metrics.database_took(name.removeprefix(DATABASE), time.perf_counter() - began, failed)


@contextmanager
def server_span(
    name: str, carrier: Mapping[str, str], attributes: Mapping[str, Value] | None = None
) -> Generator[Span]:
    """The span of one request that came from outside; the process's first is flagged as a cold start."""
    cold = metrics.first_request(str((attributes or {}).get("faas.trigger", "http")))
    with span(name, "server", {"faas.coldstart": cold, **(attributes or {})}, carrier) as opened:
        yield opened


@contextmanager
def batch_span(
    name: str, senders: Sequence[TraceContext], attributes: Mapping[str, Value] | None = None
) -> Generator[Span]:
    """The span of a batch of messages, with a link to each of its `senders` (`propagation.of_messages`) and no parent."""
    cold = metrics.first_request("pubsub")
    said = {"faas.coldstart": cold, "faas.trigger": "pubsub", **(attributes or {})}
    tracing = otel.tracing()
    if tracing is None:
        yield _NO_SPAN
        return
    with tracing.span(name, "consumer", said, None, senders) as opened:
        yield opened


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


class _NoSpan:
    __slots__ = ()

    def set(self, name: str, value: Value) -> None:
        pass

    def fail(self, error_type: str) -> None:
        pass


_NO_SPAN = _NoSpan()
_incoming: ContextVar[TraceContext | None] = ContextVar("larder_incoming_trace", default=None)


@contextmanager
def _passing_on(carrier: Mapping[str, str] | None) -> Generator[None]:
    if carrier is None:
        yield
        return
    token = _incoming.set(extract(carrier))
    try:
        yield
    finally:
        _incoming.reset(token)
