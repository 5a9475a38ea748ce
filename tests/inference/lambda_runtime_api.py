"""A stand-in for the cloud's side of AWS Lambda: the Runtime API, with the real runtime client against it.

https://docs.aws.amazon.com/lambda/latest/dg/runtimes-api.html: `next` blocks until there is an
invocation; the runtime posts its answer, or an error, under the invocation's id.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PREFIX = "/2018-06-01/runtime"
ROOT = Path(__file__).parent.parent.parent


@dataclass(slots=True)
class Invocation:
    """One event on its way; `payload` is what the function answered, byte for byte."""

    event: bytes
    timeout_ms: int
    headers: dict[str, str] = field(default_factory=dict)
    id: str = field(default_factory=lambda: str(uuid.uuid4()))
    payload: bytes = b""
    failed: bool = False
    done: threading.Event = field(default_factory=threading.Event)


class RuntimeApi(ThreadingHTTPServer):
    """The server. `invoke` hands an event to whichever runtime asks next and waits for its answer."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Requests)
        self.waiting: queue.Queue[Invocation] = queue.Queue()
        self.running: dict[str, Invocation] = {}
        self.init_errors: list[bytes] = []
        self.stopping = threading.Event()
        self.started_at = 0.0
        self.ready = threading.Event()
        self.ready_seconds = 0.0
        """From the start of the runtime's process until it first asked for work."""

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"

    def invoke(self, event: object, *, timeout_ms: int = 10_000, headers: Mapping[str, str] | None = None) -> bytes:
        """The function's answer. Raises RuntimeError with the error it posted, or if none came in time."""
        invocation = Invocation(json.dumps(event).encode(), timeout_ms, dict(headers or {}))
        self.waiting.put(invocation)
        if not invocation.done.wait(30):
            raise RuntimeError(f"the function did not answer; errors at its start: {self.init_errors}")
        if invocation.failed:
            raise RuntimeError(invocation.payload.decode())
        return invocation.payload


class _Requests(BaseHTTPRequestHandler):
    server: RuntimeApi
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path != f"{PREFIX}/invocation/next":
            self._reply(404)
            return
        if not self.server.ready.is_set():
            self.server.ready_seconds = time.perf_counter() - self.server.started_at
            self.server.ready.set()
        while not self.server.stopping.is_set():
            try:
                invocation = self.server.waiting.get(timeout=0.05)
            except queue.Empty:
                continue
            self.server.running[invocation.id] = invocation
            headers = {
                "Content-Type": "application/json",
                "Lambda-Runtime-Aws-Request-Id": invocation.id,
                "Lambda-Runtime-Deadline-Ms": str(int(time.time() * 1000) + invocation.timeout_ms),
                "Lambda-Runtime-Invoked-Function-Arn": "arn:aws:lambda:eu-central-1:000000000000:function:larder",
                **invocation.headers,
            }
            self._reply(200, invocation.event, headers)
            return
        self._reply(503)

    def do_POST(self) -> None:
        body = self._body()
        if self.path == f"{PREFIX}/init/error":
            self.server.init_errors.append(body)
            self._reply(202)
            return
        *_, invocation_id, outcome = self.path.split("/")
        invocation = self.server.running.pop(invocation_id, None)
        if invocation is None or outcome not in ("response", "error"):
            self._reply(404)
            return
        invocation.payload, invocation.failed = body, outcome == "error"
        self._reply(202)
        invocation.done.set()

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _reply(self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        # A runtime that was stopped while it waited for work does not take its answer.
        with suppress(BrokenPipeError, ConnectionResetError):
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)


@contextmanager
def running_function(
    handler: str,
    environment: Mapping[str, str] | None = None,
    python: Sequence[str] = (sys.executable,),
) -> Iterator[RuntimeApi]:
    """The Runtime API with one real runtime (`python -m awslambdaric <handler>`) asking it for work."""
    api = RuntimeApi()
    thread = threading.Thread(target=api.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    variables = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("AWS_LAMBDA", "OTEL_"))},
        "AWS_LAMBDA_RUNTIME_API": api.address,
        "AWS_LAMBDA_FUNCTION_NAME": "larder",
        "PYTHONPATH": f"{Path(__file__).parent}:{ROOT}",
        **(environment or {}),
    }
    with tempfile.TemporaryFile() as output:
        api.started_at = time.perf_counter()
        process = subprocess.Popen(
            [*python, "-m", "awslambdaric", handler], env=variables, stdout=output, stderr=output, cwd=ROOT
        )
        try:
            yield api
        except RuntimeError as error:
            output.seek(0)
            error.add_note(output.read().decode(errors="replace"))
            raise
        finally:
            process.kill()
            process.wait()
            api.stopping.set()
            api.shutdown()
            api.server_close()
            thread.join(10)
