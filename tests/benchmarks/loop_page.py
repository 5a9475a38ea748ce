"""The page's weight and first paint, and how soon feedback is in the next answer, all over HTTP on the real function.

    python -m tests.benchmarks.loop_page [--quick]

`page_bytes` is what a browser gets to show the page, everything counted, nothing compressed. `page_fcp_ms` is the median
first contentful paint over fresh browser contexts, `page_fcp_worst_ms` the longest. `feedback_visible_ms` is the longest
time from the return of `POST /events` to an answer of `POST /recommendations` without the item that was hidden, over many
people one after the other. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from infra import postgres
from infra.feature_tables import ensure_view_tables
from tests.benchmarks.frame import machine, note
from tests.inference.browser import chromium
from tests.served_world import ServedWorld, build
from tests.worlds import key_header

PAINTS = 15
HIDES = 200
PATIENCE_SECONDS = 10.0


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="proves that it runs, measures little")
    quick = parser.parse_args(arguments).quick
    report = measure(quick) | {"quick": quick, "machine": machine()}
    print(json.dumps(report))
    return report


def measure(quick: bool) -> dict[str, Any]:
    """`page_bytes`, `page_fcp_ms`, `feedback_visible_ms` and their spread, on a world of its own."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        url = postgres.start_embedded(Path(folder) / "pg")
        postgres.migrate(url)
        ensure_view_tables(url)
        sizes: dict[str, Any] = {"people": 12, "items": 120} if quick else {"people": 200, "items": 1_200}
        note("a world to serve …")
        world = build(url, Path(folder) / "world", **sizes)
        header = key_header(url, per_minute=1_000_000)
        with _serving(world) as port:
            note("first paints …")
            found = _paint(f"http://127.0.0.1:{port}/", 3 if quick else PAINTS)
            note("feedback …")
            took = _feedback(port, header, world, 10 if quick else HIDES)
    return found | {
        "feedback_visible_ms": round(max(took), 2),
        "feedback_visible_p50_ms": round(statistics.median(took), 2),
        "feedback_rounds": len(took),
    }


@contextmanager
def _serving(world: ServedWorld) -> Iterator[int]:
    """The function in a process of its own, as `make serve` runs it; the port that it listens on."""
    settings = world.settings()
    environment = os.environ | {
        "DATABASE_URL": settings.database_url,
        "LARDER_WRITER_URL": settings.writer_url,
        "ARTIFACTS_URL": settings.artifacts_url,
        "LARDER_TIMEOUT_MS": "30000",
        "LARDER_REQUEST_LOG": "off",
        "PYTHONUNBUFFERED": "1",
    }
    command = [sys.executable, "-m", "inference.handlers.asgi", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        first = process.stdout.readline()
        assert "larder listens on" in first, "the function did not start"
        yield int(first.rsplit(":", 1)[1])
    finally:
        process.terminate()
        process.wait(20)
        if process.stdout is not None:
            process.stdout.close()


def _paint(base: str, rounds: int) -> dict[str, Any]:
    """Weight and first contentful paint of the page as whoever comes for the first time gets it."""
    paints: list[float] = []
    sizes: dict[str, int] = {}
    with chromium() as browser:
        for _ in range(rounds):
            context = browser.new_context()
            page = context.new_page()
            page.on("response", lambda answer: sizes.update({answer.url: len(answer.body())}))
            page.goto(base, wait_until="networkidle")
            paints.append(
                page.evaluate(
                    "performance.getEntriesByName('first-contentful-paint').map((paint) => paint.startTime)[0]"
                )
            )
            context.close()
    assert all(url.startswith(base) for url in sizes), f"asked elsewhere: {sorted(sizes)}"
    return {
        "page_bytes": sum(sizes.values()),
        "page_files": len(sizes),
        "page_fcp_ms": round(statistics.median(paints), 1),
        "page_fcp_worst_ms": round(max(paints), 1),
    }


def _feedback(port: int, header: dict[str, str], world: ServedWorld, rounds: int) -> list[float]:
    """Milliseconds from the return of a hide to an answer without the item, one per round."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)

    def post(path: str, document: object) -> dict[str, Any]:
        connection.request("POST", path, json.dumps(document), {"content-type": "application/json", **header})
        response = connection.getresponse()
        body: dict[str, Any] = json.loads(response.read())
        assert response.status == 200, body
        return body

    took: list[float] = []
    try:
        for number in range(rounds):
            user = world.people[number % len(world.people)]
            asked = {"user_id": user, "k": 10}
            shown = post("/recommendations", asked)
            item = shown["items"][0]["item_id"]
            event = {"event_id": f"bench-{number}", "user_id": user, "item_id": item, "kind": "hide"}
            post("/events", {"events": [event | {"request_id": shown["request_id"]}]})
            began = time.perf_counter()
            while item in {one["item_id"] for one in post("/recommendations", asked)["items"]}:
                assert time.perf_counter() - began < PATIENCE_SECONDS, "feedback did not reach the list"
            took.append((time.perf_counter() - began) * 1_000)
    finally:
        connection.close()
    return took


if __name__ == "__main__":
    main()
