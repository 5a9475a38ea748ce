"""The HTTP door for uvicorn (local, Cloud Run, Knative): reads a body, calls the core in a thread, answers."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import contextvars
import logging
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import uvicorn

from inference import metrics, telemetry
from inference.http import handle, refused
from inference.routes import Application, Response
from schemas.errors import LarderError, RequestError, SettingsError, Unavailable
from schemas.json_body import MAX_BODY_BYTES, body_too_large

logger = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]

GRACE_SECONDS = 10
"""How long requests in flight may take to finish after SIGTERM; Cloud Run kills after ten."""


BODY_SECONDS = 10.0
"""How long a body may take to arrive. Whoever sends slower than that holds a connection for nothing."""


def create_app(
    app_factory: Callable[[], Application],
    *,
    threads: int = 8,
    max_waiting: int = 64,
    timeout_ms: int | None = None,
    body_seconds: float = BODY_SECONDS,
) -> AsgiApp:
    """An ASGI app around what `app_factory` builds, once, when the server starts.

    At most `threads` requests run at once and `max_waiting` more wait; beyond that the answer is 503,
    because a queue without an end only turns slow answers into none. `timeout_ms` is the deadline of a request, counted
    from when its body was there, waiting included; a body that takes longer than `body_seconds` to arrive is answered 408.
    """
    return _Door(app_factory, threads, max_waiting, timeout_ms, body_seconds)


class _Door:
    def __init__(
        self,
        app_factory: Callable[[], Application],
        threads: int,
        max_waiting: int,
        timeout_ms: int | None,
        body_seconds: float,
    ) -> None:
        self._factory = app_factory
        self._timeout_ms = timeout_ms
        self._body_seconds = body_seconds
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="larder")
        self._limit = threads + max_waiting
        self._in_flight = 0
        self._app: Application | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:
            raise RuntimeError(f"this door speaks HTTP only, not {scope['type']}")

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        try:
            self._app = await asyncio.get_running_loop().run_in_executor(self._pool, self._factory)
        except LarderError as error:
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            return
        except Exception as error:
            logger.exception("the application could not be built")
            await send({"type": "lifespan.startup.failed", "message": type(error).__name__})
            return
        await send({"type": "lifespan.startup.complete"})
        unwatch = metrics.watch(self._read)
        await receive()
        unwatch()
        # Requests have ended by now; an application that holds a connection may say how to let go of it.
        close = getattr(self._app, "close", None)
        if callable(close):
            await asyncio.to_thread(close)
        self._pool.shutdown()
        await asyncio.to_thread(telemetry.shutdown)
        await send({"type": "lifespan.shutdown.complete"})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Repeated headers are joined as RFC 9110 says, so that none can hide behind another.
        headers: dict[str, str] = {}
        for raw_name, raw_value in scope["headers"]:
            name, value = raw_name.decode("latin-1").lower(), raw_value.decode("latin-1")
            headers[name] = f"{headers[name]}, {value}" if name in headers else value
        try:
            async with asyncio.timeout(self._body_seconds):
                body = await _read_body(headers, receive)
        except TimeoutError:
            late = RequestError(f"the body did not arrive within {self._body_seconds:g} s; send it at once", status=408)
            response = refused(late, scope["method"], scope["path"], headers, _attributes(scope))
            await _send(send, response, {"connection": "close"})
            return
        except RequestError as error:
            # What is left of the body was not read, so the connection cannot carry another request.
            response = refused(error, scope["method"], scope["path"], headers, _attributes(scope))
            await _send(send, response, {"connection": "close"})
            return
        if body is not None:
            await _send(send, await self._call(scope, headers, body))

    async def _call(self, scope: Scope, headers: dict[str, str], body: bytes) -> Response:
        method, path, attributes = scope["method"], scope["path"], _attributes(scope)
        query = scope.get("query_string", b"").decode("latin-1")
        if self._app is None:
            not_started = Unavailable("the application is not started; run the server with lifespan on")
            return refused(not_started, method, path, headers, attributes)
        if self._in_flight >= self._limit:
            full = Unavailable(f"{self._in_flight} requests are waiting already; try again")
            return refused(full, method, path, headers, attributes)
        app = self._app
        context = contextvars.copy_context()
        arrived = time.monotonic()
        deadline = None if self._timeout_ms is None else arrived + self._timeout_ms / 1_000
        self._in_flight += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._pool,
                lambda: context.run(
                    handle,
                    app,
                    method,
                    path,
                    headers,
                    body,
                    deadline=deadline,
                    attributes=attributes,
                    arrived=arrived,
                    query=query,
                ),
            )
        except RuntimeError as error:  # the pool is shut: the server is on its way out
            return refused(error, method, path, headers, attributes)
        finally:
            self._in_flight -= 1

    def _read(self) -> Iterator[metrics.Reading]:
        yield "recsys.requests.in_flight", self._in_flight, {}


def _attributes(scope: Scope) -> dict[str, telemetry.Value]:
    """What the door knows of a request, for its span."""
    return {"url.scheme": scope.get("scheme", "http"), "faas.trigger": "http"}


async def _read_body(headers: dict[str, str], receive: Receive) -> bytes | None:
    """The body, or None if the caller went away. Raises RequestError as soon as it is too large."""
    announced = headers.get("content-length", "")
    if announced.isascii() and announced.isdigit() and int(announced[:20]) > MAX_BODY_BYTES:
        raise body_too_large()
    chunks: list[bytes] = []
    size_bytes = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        chunk = message.get("body", b"")
        size_bytes += len(chunk)
        if size_bytes > MAX_BODY_BYTES:
            raise body_too_large()
        chunks.append(chunk)
        if not message.get("more_body", False):
            return b"".join(chunks)


async def _send(send: Send, response: Response, extra: dict[str, str] | None = None) -> None:
    headers = {**response.headers, "content-length": str(len(response.body)), **(extra or {})}
    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": response.status, "headers": raw})
    await send({"type": "http.response.body", "body": response.body})


class _Server(uvicorn.Server):
    """Says where it listens once it does, not before."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started and sockets:
            host, port = sockets[0].getsockname()[:2]
            url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
            print(f"larder listens on {url}\n")
            print(f"  curl -s {url}/recommendations -H 'content-type: application/json' \\")
            print("""    -H "authorization: Bearer $LARDER_KEY" \\""")
            print(
                """    -d '{"user_id": "user-00001", "k": 5, "prompt": "something quiet", "explain": true}'""",
                flush=True,
            )


def serve(app: AsgiApp, host: str, port: int) -> bool:
    """Run `app` until SIGTERM or SIGINT; False if it could not start."""
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    server = _Server(config)
    # It raises the signal that ended it once more; by then every request has its answer.
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[config.bind_socket()])
    return server.started


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make serve", description="Answer HTTP requests on this machine.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8080, help="port to listen on; 0 picks one (default: %(default)s)")
    options = parser.parse_args(arguments)
    from inference.runtime import create_application
    from inference.settings import read_settings

    try:
        settings = read_settings()
    except SettingsError as error:
        print(f"error ({error.type}): {error}", file=sys.stderr)
        return 1
    app = create_app(lambda: create_application(settings), threads=settings.concurrency, timeout_ms=settings.timeout_ms)
    return 0 if serve(app, options.host, options.port) else 1


if __name__ == "__main__":
    sys.exit(main())
