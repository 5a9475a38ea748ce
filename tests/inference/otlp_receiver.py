"""A real OTLP/HTTP receiver on loopback that keeps what it is sent."""

from __future__ import annotations

import gzip
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

TRACES, METRICS = "/v1/traces", "/v1/metrics"


class Receiver(ThreadingHTTPServer):
    """Keeps the bytes of every export; `delay_seconds` makes it slow."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Export)
        self.exports: list[tuple[str, bytes]] = []
        self.delay_seconds = 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def bodies(self) -> list[bytes]:
        return [body for _, body in self.exports]

    @property
    def paths(self) -> list[str]:
        return [path for path, _ in self.exports]

    def resources(self) -> list[Any]:
        sent = [ExportTraceServiceRequest.FromString(body) for path, body in self.exports if path == TRACES]
        return [r for request in sent for r in request.resource_spans]

    def spans(self) -> dict[str, Any]:
        return {s.name: s for r in self.resources() for scope in r.scope_spans for s in scope.spans}

    def metric_resources(self) -> list[Any]:
        sent = [ExportMetricsServiceRequest.FromString(body) for path, body in self.exports if path == METRICS]
        return [r for request in sent for r in request.resource_metrics]

    def metrics(self) -> dict[str, Any]:
        """The newest state of each instrument: they are cumulative."""
        return {m.name: m for r in self.metric_resources() for scope in r.scope_metrics for m in scope.metrics}


class _Export(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(self.server.delay_seconds)
        whole = gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
        self.server.exports.append((self.path, whole))
        self.send_response(200)
        self.send_header("Content-Type", "application/x-protobuf")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@contextmanager
def receiving() -> Iterator[Receiver]:
    """A receiver for as long as the block runs."""
    server = Receiver()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


def points(metric: Any) -> list[Any]:
    """The data points of a metric, whatever its kind."""
    return list(getattr(metric, metric.WhichOneof("data")).data_points)
