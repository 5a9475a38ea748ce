"""Tracing: spans and trace context, real when an OTLP endpoint is set, otherwise next to nothing.

No user id, prompt text or event body may ever become part of a span: name things by route, step,
version and count. Exceptions are recorded by their type only, because their text may quote a person.

Tracing is on when OTEL_EXPORTER_OTLP_ENDPOINT or OTEL_EXPORTER_OTLP_TRACES_ENDPOINT is set (and
OTEL_SDK_DISABLED is not `true`). Off, nothing of OpenTelemetry is imported, and an incoming trace
context is still handed on by `inject`.
"""

from __future__ import annotations

import os
import re
import secrets
import threading
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

Value = str | bool | int | float
Kind = Literal["internal", "server", "client", "producer", "consumer"]

ENDPOINT_VARIABLES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")

_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_XRAY_ROOT = re.compile(r"1-([0-9a-f]{8})-([0-9a-f]{24})")
_XRAY_PARENT = re.compile(r"[0-9a-f]{16}")


class Span(Protocol):
    """One open span."""

    def set(self, name: str, value: Value) -> None:
        """Set the attribute `name`."""

    def fail(self, error_type: str) -> None:
        """Mark the span as failed; `error_type` is a type or a status, never a message."""


@dataclass(frozen=True, slots=True)
class TraceContext:
    """Where in a trace we are: ids as hex, as in a `traceparent` header."""

    trace_id: str
    span_id: str
    sampled: bool

    @property
    def traceparent(self) -> str:
        return f"00-{self.trace_id}-{self.span_id}-{'01' if self.sampled else '00'}"


def extract(carrier: Mapping[str, str]) -> TraceContext | None:
    """The context in `carrier` (names in lower case): `traceparent`, else `x-amzn-trace-id`, else None.

    An X-Ray header that is not sampled counts as none: Lambda writes one into every invocation
    when X-Ray itself is off, and it would switch off every trace of ours.
    """
    match = _TRACEPARENT.fullmatch(carrier.get("traceparent", "").strip())
    if match:
        version, trace_id, span_id, flags, rest = match.groups()
        future = version not in ("00", "ff")  # only a later version may append fields
        if ((version == "00" and not rest) or future) and int(trace_id, 16) and int(span_id, 16):
            return TraceContext(trace_id, span_id, bool(int(flags, 16) & 1))
    fields = dict(part.strip().partition("=")[::2] for part in carrier.get("x-amzn-trace-id", "").split(";"))
    root = _XRAY_ROOT.fullmatch(fields.get("Root", ""))
    parent = _XRAY_PARENT.fullmatch(fields.get("Parent", ""))
    if root and parent and fields.get("Sampled") == "1":
        return TraceContext(root[1] + root[2], parent[0], True)
    return None


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
    tracing = _tracing()
    if tracing is None:
        with _passing_on(carrier):
            yield _NO_SPAN
        return
    with tracing.span(name, kind, attributes, extract(carrier) if carrier is not None else None) as opened:
        yield opened


@contextmanager
def server_span(
    name: str, carrier: Mapping[str, str], attributes: Mapping[str, Value] | None = None
) -> Generator[Span]:
    """The span of one request that came from outside; the process's first is flagged as a cold start."""
    with span(name, "server", {"faas.coldstart": _first_request(), **(attributes or {})}, carrier) as opened:
        yield opened


def current() -> TraceContext | None:
    """The context of the current span; with tracing off, the one that came in."""
    tracing = _tracing()
    return tracing.current() if tracing is not None else _incoming.get()


def current_trace_id() -> str:
    """The current trace's id, 32 hex digits; empty outside a trace."""
    context = current()
    return context.trace_id if context else ""


def inject() -> dict[str, str]:
    """What to send along (headers, run tags) so that the other side's spans hang under the current one."""
    context = current()
    return {"traceparent": context.traceparent} if context else {}


def flush(timeout_ms: int) -> bool:
    """Send what is waiting, within `timeout_ms`; False if it took longer. For platforms that freeze a process."""
    tracing = _state.tracing
    return tracing is None or tracing.flush(timeout_ms)


def shutdown(timeout_ms: int = 1000) -> None:
    """Flush and forget the set-up; the next span reads the environment again."""
    with _state.lock:
        tracing, _state.tracing, _state.ready = _state.tracing, None, False
    if tracing is not None:
        tracing.flush(timeout_ms)
        tracing.stop()


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


class _State:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.ready = False
        self.tracing: _Tracing | None = None
        self.cold = True


_state = _State()


def _first_request() -> bool:
    cold, _state.cold = _state.cold, False
    return cold


def _tracing() -> _Tracing | None:
    if not _state.ready:
        with _state.lock:
            if not _state.ready:
                wanted = any(os.environ.get(name) for name in ENDPOINT_VARIABLES)
                disabled = os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
                _state.tracing = _Tracing(_provider()) if wanted and not disabled else None
                _state.ready = True
    return _state.tracing


class _OpenSpan:
    """The SDK's span behind our two verbs."""

    __slots__ = ("_span",)

    def __init__(self, opened: Any) -> None:
        self._span = opened

    def set(self, name: str, value: Value) -> None:
        self._span.set_attribute(name, value)

    def fail(self, error_type: str) -> None:
        from opentelemetry.trace import Status, StatusCode

        self._span.set_attribute("error.type", error_type)
        self._span.set_status(Status(StatusCode.ERROR))


class _Tracing:
    """The SDK, set up once. Kept out of OpenTelemetry's globals, which belong to whoever hosts us."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("larder", _version())

    @contextmanager
    def span(
        self, name: str, kind: Kind, attributes: Mapping[str, Value] | None, parent: TraceContext | None
    ) -> Generator[_OpenSpan]:
        from opentelemetry import trace

        with self._tracer.start_as_current_span(
            name,
            context=_remote(parent) if parent else None,
            kind=trace.SpanKind[kind.upper()],
            attributes=dict(attributes or {}),
            record_exception=False,
            set_status_on_exception=False,
        ) as opened:
            ours = _OpenSpan(opened)
            try:
                yield ours
            except BaseException as error:
                ours.fail(type(error).__name__)
                raise

    def current(self) -> TraceContext | None:
        from opentelemetry import trace

        context = trace.get_current_span().get_span_context()
        if not context.is_valid:
            return None
        return TraceContext(f"{context.trace_id:032x}", f"{context.span_id:016x}", context.trace_flags.sampled)

    def flush(self, timeout_ms: int) -> bool:
        # The SDK's own force_flush ignores its timeout, and a frozen process must not wait for a dead collector.
        done = threading.Event()

        def work() -> None:
            self._provider.force_flush(timeout_ms)
            done.set()

        threading.Thread(target=work, name="larder-flush", daemon=True).start()
        return done.wait(timeout_ms / 1000)

    def stop(self) -> None:
        threading.Thread(target=self._provider.shutdown, name="larder-trace-stop", daemon=True).start()


def _remote(parent: TraceContext) -> Any:
    from opentelemetry import trace

    context = trace.SpanContext(
        int(parent.trace_id, 16),
        int(parent.span_id, 16),
        is_remote=True,
        trace_flags=trace.TraceFlags(trace.TraceFlags.SAMPLED if parent.sampled else trace.TraceFlags.DEFAULT),
    )
    return trace.set_span_in_context(trace.NonRecordingSpan(context))


def _provider() -> TracerProvider:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.id_generator import IdGenerator

    class SystemRandomIds(IdGenerator):
        """Ids from the system: a seeded generator would repeat itself in every process woken from one snapshot."""

        def generate_span_id(self) -> int:
            return secrets.randbits(64) or 1

        def generate_trace_id(self) -> int:
            return secrets.randbits(128) or 1

    provider = TracerProvider(resource=Resource.create(_resource_attributes()), id_generator=SystemRandomIds())
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


def _resource_attributes() -> dict[str, str]:
    """Who we are. What OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES say wins, so it is left out here."""
    environment = os.environ
    attributes = {"service.name": "larder", "service.version": _version()}
    if "AWS_LAMBDA_FUNCTION_NAME" in environment:
        attributes |= {
            "cloud.provider": "aws",
            "cloud.platform": "aws_lambda",
            "cloud.region": environment.get("AWS_REGION", ""),
            "faas.name": environment["AWS_LAMBDA_FUNCTION_NAME"],
            "faas.version": environment.get("AWS_LAMBDA_FUNCTION_VERSION", ""),
            "faas.instance": environment.get("AWS_LAMBDA_LOG_STREAM_NAME", ""),
        }
    elif "K_SERVICE" in environment:  # Cloud Run and Knative alike, so the cloud stays unsaid
        attributes |= {"faas.name": environment["K_SERVICE"], "faas.version": environment.get("K_REVISION", "")}
    said = {part.partition("=")[0].strip() for part in environment.get("OTEL_RESOURCE_ATTRIBUTES", "").split(",")}
    if environment.get("OTEL_SERVICE_NAME"):
        said.add("service.name")
    return {name: value for name, value in attributes.items() if value and name not in said}


def _version() -> str:
    try:
        return metadata.version("larder")
    except metadata.PackageNotFoundError:  # run from a source tree that was never installed
        return "0"
