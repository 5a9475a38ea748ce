"""The OpenTelemetry SDK, set up once from the environment and only if an endpoint is set; nothing of it is imported before.

It is kept out of OpenTelemetry's globals, which belong to whoever hosts us.
"""

from __future__ import annotations

import atexit
import logging
import os
import secrets
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar, Token
from functools import lru_cache
from importlib import metadata
from typing import TYPE_CHECKING, Any, Literal

from inference.deferred import Deferred
from inference.propagation import TraceContext

if TYPE_CHECKING:
    from opentelemetry.metrics import Meter
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import SpanProcessor, TracerProvider

logger = logging.getLogger(__name__)
deferred = Deferred()

Value = str | bool | int | float
Kind = Literal["internal", "server", "client", "producer", "consumer"]

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
ENDPOINT_VARIABLES = (ENDPOINT, "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT")


class _State:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.ready = False
        self.tracing: Tracing | None = None
        self.metering: Metering | None = None


_state = _State()


def tracing() -> Tracing | None:
    """What makes spans; None where no endpoint for traces is set."""
    if not _state.ready:
        _set_up()
    return _state.tracing


def metering() -> Metering | None:
    """What counts and measures; None where no endpoint for metrics is set."""
    if not _state.ready:
        _set_up()
    return _state.metering


def flush(timeout_ms: int) -> bool:
    """Send what is waiting, within `timeout_ms`; False if it took longer. For platforms that freeze a process."""
    waiting = [part.flush for part in (_state.tracing, _state.metering) if part is not None]
    return _within(timeout_ms, waiting, "larder-flush")


def shutdown(timeout_ms: int) -> None:
    """Send what is waiting, within `timeout_ms`, and forget the set-up; what comes next reads the environment again."""
    with _state.lock:
        parts = [part for part in (_state.tracing, _state.metering) if part is not None]
        _state.tracing = _state.metering = None
        _state.ready = False
    _within(timeout_ms, [part.stop for part in parts], "larder-telemetry-stop")


def _within(timeout_ms: int, work: Sequence[Callable[[int], None]], name: str) -> bool:
    # The SDK's own force_flush ignores its timeout, and a frozen process must not wait for a dead collector.
    # Each in a thread of its own: spans that nobody takes hold no metric back.
    until = time.monotonic() + timeout_ms / 1000
    pending = []
    for one in work:
        done = threading.Event()
        threading.Thread(target=_finish, args=(one, timeout_ms, done), name=name, daemon=True).start()
        pending.append(done)
    return all(done.wait(max(0.0, until - time.monotonic())) for done in pending)


def _finish(work: Callable[[int], None], timeout_ms: int, done: threading.Event) -> None:
    try:
        work(timeout_ms)
        done.set()
    except Exception as error:  # noqa: BLE001 - telemetry that cannot be sent is no reason to fail
        logger.warning("telemetry was not sent: %s", type(error).__name__)


def _set_up() -> None:
    with _state.lock:
        if not _state.ready:
            if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() != "true":
                if _wanted("TRACES"):
                    _state.tracing = _tracing()
                if _wanted("METRICS"):
                    _state.metering = Metering(_meter_provider())
            _state.ready = True


def _wanted(signal: Literal["TRACES", "METRICS"]) -> bool:
    if os.environ.get(f"OTEL_{signal}_EXPORTER", "").strip().lower() == "none":
        return False
    return any(os.environ.get(name) for name in (ENDPOINT, f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT"))


class OpenSpan:
    """A span between its two instants; what the SDK makes of it, it makes when the span is closed."""

    __slots__ = ("attributes", "context", "ended_ns", "error", "kind", "links", "name", "parent", "started_ns", "token")

    def __init__(
        self,
        name: str,
        kind: Kind,
        attributes: dict[str, Value],
        context: TraceContext,
        parent: TraceContext | None,
        links: Sequence[TraceContext],
    ) -> None:
        self.name, self.kind, self.attributes, self.links = name, kind, attributes, links
        self.context, self.parent = context, parent
        self.error = ""
        self.started_ns = time.time_ns()
        self.ended_ns = 0
        self.token: Token[OpenSpan | None] | None = None

    def set(self, name: str, value: Value) -> None:
        self.attributes[name] = value

    def fail(self, error_type: str) -> None:
        self.error = error_type


_current: ContextVar[OpenSpan | None] = ContextVar("larder_span", default=None)


class Tracing:
    """Spans, nested by context. A request pays for ids and instants; the SDK's work waits for `deferred`."""

    def __init__(self, provider: TracerProvider, processor: SpanProcessor) -> None:
        from opentelemetry import trace
        from opentelemetry.sdk.trace import ReadableSpan
        from opentelemetry.sdk.trace.sampling import Decision
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope

        self._sampled = Decision.RECORD_AND_SAMPLE
        self._trace = trace
        self._kinds = {kind.name.lower(): kind for kind in trace.SpanKind}
        self._provider = provider
        self._processor = processor
        self._ended = ReadableSpan
        self._scope = InstrumentationScope("larder", version())
        self._fine, self._failed = trace.Status(), trace.Status(trace.StatusCode.ERROR)

    def open(
        self,
        name: str,
        kind: Kind,
        attributes: Mapping[str, Value] | None,
        remote: TraceContext | None,
        links: Sequence[TraceContext],
    ) -> OpenSpan:
        """Start a span below `remote`, else below the current one, and make it the current one until it is closed."""
        within = _current.get()
        said = dict(attributes) if attributes else {}
        parent = within.context if remote is None and within is not None else remote
        # Ids from the system: a seeded generator would repeat itself in every process woken from one snapshot.
        trace_id = parent.trace_id if parent else secrets.token_hex(16)
        if parent is not None and parent is not remote:
            sampled = parent.sampled
        else:
            result = self._provider.sampler.should_sample(
                context_of(remote), int(trace_id, 16), name, self._kinds[kind], said
            )
            sampled = result.decision is self._sampled
        context = TraceContext(trace_id, secrets.token_hex(8), sampled, parent.tracestate if parent else "")
        opened = OpenSpan(name, kind, said, context, parent, links)
        opened.token = _current.set(opened)
        return opened

    def close(self, span: OpenSpan) -> None:
        """End a span that `open` gave; the one before it is the current one again."""
        span.ended_ns = time.time_ns()
        if span.token is not None:
            _current.reset(span.token)
        if span.context.sampled:
            deferred.add(self._emit, span)

    def current(self) -> TraceContext | None:
        span = _current.get()
        return span.context if span is not None else None

    def flush(self, timeout_ms: int) -> None:
        deferred.drain()
        self._provider.force_flush(timeout_ms)

    def stop(self, timeout_ms: int) -> None:
        self.flush(timeout_ms)
        self._provider.shutdown()

    def _emit(self, span: OpenSpan) -> None:
        """The closed `span` as the SDK exports it. A tracer would first make one that is open, which costs as much again."""
        if span.error:
            span.attributes["error.type"] = span.error
        self._processor.on_end(
            self._ended(
                span.name,
                _remote(span.context),
                _remote(span.parent) if span.parent is not None else None,
                self._provider.resource,
                span.attributes,
                kind=self._kinds[span.kind],
                links=[self._trace.Link(_remote(link)) for link in span.links],
                status=self._failed if span.error else self._fine,
                start_time=span.started_ns,
                end_time=span.ended_ns,
                instrumentation_scope=self._scope,
            )
        )


class Metering:
    """Where instruments come from; see inference/metrics.py for what they are."""

    def __init__(self, provider: MeterProvider) -> None:
        self._provider = provider
        self.meter: Meter = provider.get_meter("larder", version())

    def flush(self, timeout_ms: int) -> None:
        deferred.drain()
        self._provider.force_flush(timeout_ms)

    def stop(self, timeout_ms: int) -> None:
        deferred.drain()
        self._provider.shutdown(timeout_ms)  # which sends what is waiting


def measure(record: Callable[..., None], value: float, attributes: Mapping[str, Value]) -> None:
    """`record(value, attributes)` of an instrument, a little later, as of the current span."""
    span = _current.get()
    deferred.add(_measure, record, value, attributes, span.context if span is not None else None)


def _measure(
    record: Callable[..., None], value: float, attributes: Mapping[str, Value], within: TraceContext | None
) -> None:
    record(value, attributes, context_of(within))


@lru_cache(64)  # a request's measures share a few
def context_of(context: TraceContext | None) -> Any:
    """OpenTelemetry's context in which `context` is the current span; an empty one for None."""
    from opentelemetry import trace
    from opentelemetry.context import Context

    return trace.set_span_in_context(trace.NonRecordingSpan(_remote(context)), Context()) if context else Context()


@lru_cache(64)  # a request's spans share their parents
def _remote(context: TraceContext) -> Any:
    from opentelemetry import trace

    return trace.SpanContext(
        int(context.trace_id, 16),
        int(context.span_id, 16),
        is_remote=True,
        trace_flags=trace.TraceFlags(trace.TraceFlags.SAMPLED if context.sampled else trace.TraceFlags.DEFAULT),
        trace_state=trace.TraceState.from_header([context.tracestate]) if context.tracestate else None,
    )


def _tracing() -> Tracing:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider, processor = TracerProvider(resource=_resource()), BatchSpanProcessor(OTLPSpanExporter())
    provider.add_span_processor(processor)
    atexit.register(deferred.drain)  # before the provider's own, which sends it
    return Tracing(provider, processor)


def _meter_provider() -> MeterProvider:
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
    from opentelemetry.sdk.metrics import Histogram, MeterProvider
    from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
    from opentelemetry.sdk.metrics.view import Aggregation, ExponentialBucketHistogramAggregation

    # Exponential buckets are as exact at 1 ms as at 1 s. Who has no place for them says so by the standard's variable.
    said = os.environ.get("OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION")
    preferred: dict[type, Aggregation] = {} if said else {Histogram: ExponentialBucketHistogramAggregation()}
    exporter = OTLPMetricExporter(preferred_aggregation=preferred)
    provider = MeterProvider(metric_readers=[PeriodicExportingMetricReader(exporter)], resource=_resource())
    atexit.register(deferred.drain)
    return provider


def _resource() -> Resource:
    from opentelemetry.sdk.resources import Resource

    return Resource.create(_resource_attributes())


def _resource_attributes() -> dict[str, str]:
    """Who we are. What OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES say wins, so it is left out here."""
    environment = os.environ
    # Without an instance, the counts of two processes would be one series that jumps to and fro.
    attributes = {"service.name": "larder", "service.version": version(), "service.instance.id": str(uuid.uuid4())}
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


def version() -> str:
    """The version of the code that runs."""
    try:
        return metadata.version("larder")
    except metadata.PackageNotFoundError:  # run from a source tree that was never installed
        return "0"
