"""`make bench-serving`: how fast the function answers, starts and holds out, on a catalogue of 100,000 items.

Load generator, function and embedded Postgres share this machine. The function is the real one: the ASGI door in a process of
its own over HTTP, or the Lambda door under `awslambdaric`; it reads and writes by the two roles that `make serve` gives it.
The ranker is `standard` in int8 with random weights, which take as long as learned ones; nothing here says how good it is.
Every section runs in a process of its own, and checks its answers before it times them:

    latency     one client: with a wish and without; Postgres and the ranker asked alone; the rest is our Python
    load        eight clients for a minute; what a request costs the processor, by part
    cold        fresh processes under Lambda's runtime, from the package that `size` weighs
    size        that package, with model and encoder
    telemetry   spans and metrics on and off by turns, to a real receiver
    promotions  the alias moved a hundred times under load
    fuzz        what nobody would send, through four doors; the slope of memory
    scores      everybody scored ahead

Ends with one JSON object, and writes it with everything else under tests/benchmarks/results/. With `--work FOLDER` the world
and what is finished are kept there, and a repeat goes on from it.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from tests.benchmarks import frame
from tests.benchmarks.frame import note, say
from tests.benchmarks.serving_world import FILE, QUICK, Sizes, World, build, install

SECTIONS = ("latency", "load", "cold", "size", "telemetry", "promotions", "fuzz", "scores")
OWN_VIEWS = ("promotions", "fuzz", "scores")
"""Sections on the deployment's own views, not the bench's."""
KEYS = (
    "p50_ms",
    "prompt_p50_ms",
    "p99_ms",
    "own_overhead_ms",
    "round_trips",
    "concurrent_rps",
    "concurrent_errors",
    "cpu_ms_per_request",
    "cold_start_ready_ms",
    "cold_start_first_answer_ms",
    "function_size_bytes",
    "telemetry_overhead_rate",
    "promotions_under_load_errors",
    "score_all_users_per_s",
    "fuzz_errors",
    "fuzz_memory_slope_bytes_per_request",
)
"""What the last line holds; null for what cannot be measured here."""


def main(arguments: Sequence[str] | None = None) -> int:
    options, chosen = frame.options(__doc__, SECTIONS, "nobody", arguments)
    sizes = QUICK if options.quick else Sizes()
    with tempfile.TemporaryDirectory(prefix="larder-bench-", ignore_cleanup_errors=True) as scratch:
        work = (options.work or Path(scratch)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        from infra import postgres

        server = postgres.start_embedded(work / "postgres")
        report: dict[str, Any] = {
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "quick": options.quick,
            "machine": machine(server),
            "sections": {},
        }
        say("machine", report["machine"])
        if not (work / FILE).exists():
            frame.apart("world", make, server, work, sizes)
        numbers: dict[str, float | None] = {}
        for name in chosen:
            made = frame.kept(work, name, partial(_section, name, server, work, sizes))
            numbers |= made["numbers"]
            report["sections"][name] = made
            say(name, made["numbers"])
    frame.write(options.out, "serving", report)
    frame.table({key: value for key, value in numbers.items() if value is not None}, KEYS, "", "peer_")
    last = {key: numbers[key] for key in KEYS if key in numbers}
    print(json.dumps({key: round(value, 4) if value is not None else None for key, value in last.items()}))
    return 0


def make(server: str, work: Path, sizes: Sizes) -> dict[str, Any]:
    """Build the world, in this process."""
    began = time.monotonic()
    install()
    build(server, work, sizes).keep(work)
    note(f"world took {time.monotonic() - began:.0f} s")
    return {}


def _section(name: str, server: str, work: Path, sizes: Sizes) -> dict[str, Any]:
    began = time.monotonic()
    found = frame.apart(name, run, name, work, sizes)
    note(f"{name} took {time.monotonic() - began:.0f} s")
    return found


def run(name: str, work: Path, sizes: Sizes) -> dict[str, Any]:
    """A section, in this process: its numbers, and details for the dated file."""
    if name not in OWN_VIEWS:
        install()
    module = "serving_sections" if name in ("latency", "load") else "serving_more"
    section = getattr(importlib.import_module(f"tests.benchmarks.{module}"), name)
    found: dict[str, Any] = section(World.kept(work), work, sizes, note)
    return found


def machine(server: str) -> dict[str, Any]:
    """What it runs on, the server included."""
    import psycopg

    with psycopg.connect(server) as connection:
        (version,) = connection.execute("SHOW server_version").fetchone() or ("",)
        (buffers,) = connection.execute("SHOW shared_buffers").fetchone() or ("",)
    return {**frame.machine(), "postgres": version, "shared_buffers": buffers}


if __name__ == "__main__":
    sys.exit(main())
