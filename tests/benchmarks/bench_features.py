"""`make bench-features`: the feature store measured on the embedded Postgres, and with PEERS=1 Feast beside it.

Answers are checked before anything is timed. Every section runs in a process of its own, so that peak memory is its own,
and against a database of its own on one server:

    online     one request of 1 person + 500 items, 50 features over 5 views, snapshot and head; one person; hot heads; ingest
    load       prepared rows of 10 features into Postgres, ledger and online rows included
    backfill   90 days of user_activity and item_activity, lake to Postgres, against one COPY and one statement; Dagster's share
    growth     the same with a tenth of the events: what ten times as many cost
    pit        20 thousand labels against 500 thousand events; pit_many: a million labels × 5 views, file to file
    feast      with --peers: Feast, in its own virtual environment, on the same server and the same events

Ends with one JSON object, and writes it with everything else under tests/benchmarks/results/. With `--work FOLDER` what is
finished is kept there, and a repeat goes on from it.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from tests.benchmarks import frame
from tests.benchmarks.features_world import BENCH_VIEWS, QUICK, Sizes, install, place
from tests.benchmarks.frame import note, say

SECTIONS = ("online", "load", "backfill", "growth", "pit", "pit_many")
KEYS = (
    "read_501x50_p50_ms",
    "read_501x50_p99_ms",
    "read_1_p50_ms",
    "round_trips",
    "materialise_rows_per_s",
    "materialise_peak_rss_mb",
    "backfill_seconds",
    "copy_seconds",
    "backfill_over_copy",
    "backfill_over_single_statement",
    "dagster_seconds_per_partition",
    "pit_20k_ms",
    "pit_1m_peak_rss_mb",
    "hot_head_read_p50_ms",
    "ingest_100_p50_ms",
    "backfill_growth_10x",
)
"""What the last line holds; with --peers also the keys that feast_peer gives, prefixed with `feast_`."""


def main(arguments: Sequence[str] | None = None) -> int:
    options, chosen = frame.options(__doc__, SECTIONS, "Feast", arguments)
    sizes = QUICK if options.quick else Sizes()
    with tempfile.TemporaryDirectory(prefix="larder-bench-") as scratch:
        work = options.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        from infra import postgres

        server = postgres.start_embedded(Path(scratch) / "postgres")
        report: dict[str, Any] = {
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "quick": options.quick,
            "machine": machine(server),
        }
        say("machine", report["machine"])
        numbers: dict[str, float] = {}
        for name in chosen:
            numbers |= frame.kept(work, name, partial(_section, name, server, Path(scratch), sizes))
            say(name, {key: numbers[key] for key in list(numbers) if key in KEYS})
        if options.peers:
            from tests.benchmarks.feast_peer import measure

            found = frame.kept(work, "feast", lambda: measure(server, Path(scratch), sizes, note))
            numbers |= {f"feast_{key}": value for key, value in found.items()}
    report["numbers"] = {key: round(value, 4) for key, value in numbers.items()}
    frame.write(options.out, "features", report)
    frame.table(numbers, KEYS, "Feast", "feast_")
    last = {key: round(numbers[key], 4) for key in KEYS if key in numbers}
    print(json.dumps(last | {key: round(value, 4) for key, value in numbers.items() if key.startswith("feast_")}))
    return 0


def _section(name: str, server: str, scratch: Path, sizes: Sizes) -> dict[str, float]:
    began = time.monotonic()
    if name == "growth":
        few, many = replace(sizes, events=sizes.events // 10), sizes
        small, large = (
            frame.apart(name, run, name, server, scratch / label, one)
            for label, one in (("tenth", few), ("whole", many))
        )
        found = {"backfill_growth_10x": large["seconds"] / small["seconds"]} | {
            f"growth_{key}_{label}": one[key] for label, one in (("tenth", small), ("whole", large)) for key in one
        }
    else:
        found = frame.apart(name, run, name, server, scratch, sizes)
    note(f"{name} took {time.monotonic() - began:.0f} s")
    return found


def run(name: str, server: str, scratch: Path, sizes: Sizes) -> dict[str, float]:
    """A section, in this process."""
    if name in ("backfill", "growth"):
        from schemas.views import ITEM_ACTIVITY, USER_ACTIVITY

        install((USER_ACTIVITY, ITEM_ACTIVITY))
    else:
        install(BENCH_VIEWS)
    sections = importlib.import_module("tests.benchmarks.features_sections")
    with place(server, scratch, name) as where:
        found: dict[str, float] = getattr(sections, name)(where, sizes, note)
    return found


def machine(server: str) -> dict[str, Any]:
    """What it runs on, the server included."""
    import duckdb
    import psycopg

    with psycopg.connect(server) as connection:
        (version,) = connection.execute("SHOW server_version").fetchone() or ("",)
        (fsync,) = connection.execute("SHOW fsync").fetchone() or ("",)
    return {**frame.machine(), "postgres": version, "fsync": fsync, "duckdb": duckdb.__version__}


if __name__ == "__main__":
    sys.exit(main())
