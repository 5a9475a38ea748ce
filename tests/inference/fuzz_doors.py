"""The four doors of one application, asked by a `Fuzzer` as their platforms would, and what came of it."""

from __future__ import annotations

import asyncio
import gc
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fuzz import Fuzzer, Sent, fault_of, slope_bytes

from inference.handlers.asgi import create_app
from inference.handlers.aws_lambda import create_handler
from inference.routes import Application

DOORS = ("asgi", "gateway", "direct", "sqs")
SAMPLES = 40


@dataclass(slots=True)
class Report:
    """What a door did with so many requests. `faults` are the first few, each with the number that makes it again."""

    requests: int = 0
    faults: list[str] = field(default_factory=list)
    errors: int = 0
    slowest_seconds: float = 0.0
    slope_bytes_per_request: float = 0.0
    statuses: dict[int, int] = field(default_factory=dict)


class Context:
    """What Lambda passes beside an event."""

    aws_request_id = "fuzz"

    def __init__(self, headers: dict[str, str]) -> None:
        self.client_context = type("Client", (), {"custom": headers})()

    def get_remaining_time_in_millis(self) -> int:
        return 30_000


WARM_UP = 10_000
"""Requests before memory is watched: by then every pool and bounded cache has been as full as it will be.

What a new process takes in the first thousands is its own: malloc's arenas, one per thread, ONNX Runtime's arena that grows
to the largest slate, the JSON parser's 16,384 kept strings.
"""


def fuzz(door: str, app: Application, fuzzer: Fuzzer, requests: int, warm_up: int = 0) -> Report:
    """Ask `door` `warm_up` + `requests` times; during the latter memory is looked at forty times."""
    ask = _asker(door, app, fuzzer)
    report = Report()
    samples: list[tuple[int, int]] = []
    every = max(requests // SAMPLES, 1)
    try:
        for number in range(warm_up + requests):
            began = time.perf_counter()
            try:
                status, fault = ask(number)
                report.statuses[status] = report.statuses.get(status, 0) + 1
            except Exception as error:  # noqa: BLE001 - a door that raises is what is looked for
                fault = f"raised {type(error).__name__}: {str(error)[:200]}"
            report.slowest_seconds = max(report.slowest_seconds, time.perf_counter() - began)
            report.requests += 1
            if fault is not None:
                report.errors += 1
                if len(report.faults) < 10:
                    report.faults.append(f"{door} {number}: {fault}")
            if number >= warm_up and (number - warm_up) % every == 0:
                gc.collect()
                samples.append((number, _rss_bytes()))
    finally:
        ask(-1)
    report.slope_bytes_per_request = slope_bytes(samples)
    return report


def _asker(door: str, app: Application, fuzzer: Fuzzer) -> Callable[[int], tuple[int, str | None]]:
    """Asks the request of a number; what it was answered and what is wrong with that. -1 ends it."""
    if door == "asgi":
        return _Asgi(app, fuzzer)
    handler = create_handler(lambda: app)
    nobody, keyed = Context({}), Context(fuzzer.headers)

    def gateway(number: int) -> tuple[int, str | None]:
        if number < 0:
            return 0, None
        event = fuzzer.gateway(number)
        answer = handler(event, nobody)
        assert isinstance(answer, dict)
        return answer["statusCode"], fault_of(answer["statusCode"], answer["body"].encode())

    def direct(number: int) -> tuple[int, str | None]:
        if number < 0:
            return 0, None
        document: Any = fuzzer.document(number)
        answer = handler(document, keyed)
        assert isinstance(answer, bytes)
        refused = answer.startswith(b'{"error"')
        internal = answer.startswith(b'{"error":{"type":"internal"')
        status = 500 if internal else 422 if refused else 200
        return status, fault_of(status, answer)

    def sqs(number: int) -> tuple[int, str | None]:
        if number < 0:
            return 0, None
        event = fuzzer.batch(number)
        answer = handler(event, nobody)
        assert isinstance(answer, dict)
        sent = {record["messageId"] for record in event["Records"]}
        failed = [failure["itemIdentifier"] for failure in answer["batchItemFailures"]]
        wrong = set(failed) - sent or len(failed) != len(set(failed))
        return 207 if failed else 200, f"failures {failed} of {sorted(sent)}" if wrong else None

    return {"gateway": gateway, "direct": direct, "sqs": sqs}[door]


class _Asgi:
    """The ASGI door, started, without a server around it: what the server would refuse by itself comes in too."""

    def __init__(self, app: Application, fuzzer: Fuzzer) -> None:
        self._fuzzer = fuzzer
        # The application outlives this door.
        self._door = create_app(lambda: _Kept(app), threads=2)  # type: ignore[arg-type,return-value]
        self._loop = asyncio.new_event_loop()
        self._life: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._said: asyncio.Queue[Any] = asyncio.Queue()
        self._ending = self._loop.create_task(self._door({"type": "lifespan"}, self._life.get, self._said.put))  # type: ignore[arg-type]
        self._loop.run_until_complete(self._life.put({"type": "lifespan.startup"}))
        started = self._loop.run_until_complete(self._said.get())
        assert started["type"] == "lifespan.startup.complete", started

    def __call__(self, number: int) -> tuple[int, str | None]:
        if number < 0:
            self._loop.run_until_complete(self._life.put({"type": "lifespan.shutdown"}))
            self._loop.run_until_complete(self._ending)
            self._loop.close()
            return 0, None
        sent = self._fuzzer.sent(number)
        status, body = self._loop.run_until_complete(asyncio.wait_for(self._ask(sent), 30))
        return status, fault_of(status, body, sent.method)

    async def _ask(self, sent: Sent) -> tuple[int, bytes]:
        scope = {
            "type": "http",
            "method": sent.method,
            "path": sent.path,
            "scheme": "http",
            "query_string": sent.query.encode("latin-1", "replace"),
            "headers": [(name.encode(), value.encode("latin-1")) for name, value in sent.headers.items()],
        }
        # A body comes in parts, as it does over a network.
        half = len(sent.body) // 2
        parts = [sent.body[:half], sent.body[half:]]
        said: list[Any] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

        async def send(message: Any) -> None:
            said.append(message)

        await self._door(scope, receive, send)
        start, *rest = said
        return start["status"], b"".join(message["body"] for message in rest)


class _Kept:
    """The application without a way to close it."""

    def __init__(self, app: Application) -> None:
        self._app = app

    def __getattr__(self, name: str) -> Any:
        if name == "close":
            raise AttributeError(name)
        return getattr(self._app, name)


def _rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
