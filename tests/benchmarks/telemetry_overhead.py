"""What telemetry costs a request: the real application in this process, asked with it on and off by turns.

    python -m tests.benchmarks.telemetry_overhead [--quick]

On means spans and metrics to an OTLP receiver in another process, exports included, and a line of log for each request.
`cpu_…_ms` is what the process used per request, its threads and the last flush included.
Both halves are of one run and one machine, in short turns one after the other, so that a machine that is busier for a while
is so for both; the last line is one JSON object. `telemetry_overhead_rate` is how much longer the median request takes: the
median over all pairs of turns.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

from inference import otel, request_log, telemetry
from inference.http import handle
from inference.runtime import LarderApplication
from infra import postgres
from infra.feature_tables import ensure_view_tables
from tests.benchmarks.frame import machine, note
from tests.inference.otlp_receiver import receiving
from tests.served_world import build

HEADERS = {"content-type": "application/json"}
ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
WARM = 5
SPANS = 6
"""Of one request, at least: itself, two round trips, two runs of the ranker, re-ranking; three runs where they overlap."""


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="proves that it runs, measures nothing")
    quick = parser.parse_args(arguments).quick
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        url = postgres.start_embedded(Path(folder) / "pg")
        postgres.migrate(url)
        ensure_view_tables(url)
        sizes: dict[str, Any] = {} if quick else {"people": 200, "items": 1_200, "size": "standard"}
        world = build(url, Path(folder) / "world", **sizes)
        report = measure(world, rounds=2 if quick else 24, block=10 if quick else 200)
    report |= {"quick": quick, "machine": machine()}
    print(json.dumps(report))
    return report


class World(Protocol):
    """A deployment to ask."""

    @property
    def people(self) -> list[str]: ...

    def application(self, **more: Any) -> LarderApplication: ...


def measure(world: World, *, rounds: int, block: int) -> dict[str, Any]:
    """`rounds` times `block` requests without telemetry and as many with it, in turns; milliseconds and a rate."""
    application = world.application(access="platform")
    took: dict[bool, list[float]] = {False: [], True: []}
    cpu_seconds = {False: 0.0, True: 0.0}
    ratios: list[float] = []
    before = os.environ.pop(ENDPOINT, None)
    # Spans leave while requests are asked, not only between the turns: five times as often as they would by default.
    os.environ.setdefault("OTEL_BSP_SCHEDULE_DELAY", "1000")
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    receiver = multiprocessing.get_context("spawn").Process(target=_receive, args=(theirs,))
    receiver.start()
    try:
        endpoint = ours.recv()
        _ask(application, world, block // 2)
        telemetry.shutdown()
        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            for turn in range(rounds):
                this: dict[bool, float] = {}
                # Whoever is second may find the machine warmer, or busier: they take turns in that as well.
                for on in (False, True) if turn % 2 else (True, False):
                    if on:
                        os.environ[ENDPOINT] = endpoint
                    # The environment is read anew; a thread of the application may have read it since the last turn.
                    telemetry.shutdown(10_000)
                    request_log.open_log(nowhere if on else "off")
                    assert (otel.tracing() is not None) == on, "telemetry is not as this turn wants it"
                    _ask(application, world, WARM)  # what is set up once is not a request's cost
                    began = time.process_time()
                    asked = _ask(application, world, block)
                    this[on] = statistics.median(asked)
                    took[on] += asked
                    os.environ.pop(ENDPOINT, None)
                    request_log.open_log("off")
                    telemetry.shutdown(10_000)
                    cpu_seconds[on] += time.process_time() - began
                ratios.append(this[True] / this[False])
                note(f"round {turn + 1} of {rounds}: {this[False]:.2f} ms off, {this[True]:.2f} ms on")
        ours.send("end")
        spans, series = ours.recv()
    finally:
        application.close()
        receiver.join(10)
        receiver.kill()
        if before is not None:
            os.environ[ENDPOINT] = before
    assert spans >= rounds * (block + WARM) * SPANS, (
        f"the receiver got {spans} spans of {rounds * block} requests: this measured nothing"
    )
    assert series, "the receiver got no metric: this measured nothing"
    spread = statistics.quantiles(ratios, n=4)
    return {
        "telemetry_overhead_rate": round(statistics.median(ratios) - 1, 4),
        "quartiles": [round(spread[0] - 1, 4), round(spread[2] - 1, 4)],
        "mean_overhead_rate": round(statistics.fmean(took[True]) / statistics.fmean(took[False]) - 1, 4),
        "p50_off_ms": round(statistics.median(took[False]), 3),
        "p50_on_ms": round(statistics.median(took[True]), 3),
        "cpu_off_ms": round(cpu_seconds[False] / len(took[False]) * 1_000, 3),
        "cpu_on_ms": round(cpu_seconds[True] / len(took[True]) * 1_000, 3),
        "requests": len(took[True]),
        "spans": spans,
    }


def _ask(application: LarderApplication, world: World, requests: int) -> list[float]:
    """Milliseconds of each of so many requests, people in turn."""
    found = []
    for number in range(requests):
        body = json.dumps({"user_id": world.people[number % len(world.people)], "k": 10}).encode()
        began = time.perf_counter()
        response = handle(application, "POST", "/recommendations", HEADERS, body, deadline=None)
        found.append((time.perf_counter() - began) * 1000)
        assert response.status == 200
        assert b'"degraded":[]' in response.body
    return found


def _receive(connection: Connection) -> None:
    """Another process's receiver: says where it listens, and at the end how many spans and series it got."""
    with receiving() as receiver:
        connection.send(receiver.url)
        connection.recv()
        spans = sum(len(scope.spans) for resource in receiver.resources() for scope in resource.scope_spans)
        connection.send((spans, len(receiver.metrics())))


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
