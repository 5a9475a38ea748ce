"""Feast beside ours: its own virtual environment, the same server, people, items, labels and instants.

Feast computes no windows: it is given rows that are ready, as many as ours has events, so its share is only to keep and
join them. Its default (one call, one connection) and its best (a pool, people and items apart; the fastest offline store
that runs) are both measured.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
from psycopg.conninfo import conninfo_to_dict

from schemas.features import USER
from tests.benchmarks.features_world import BENCH_VIEWS, TODAY, Sizes, events, label_table, names
from tests.benchmarks.frame import environment

REQUIREMENT = "feast[postgres,duckdb]==0.67.0"
ENVIRONMENT = Path(__file__).parents[2] / "build" / "bench-feast-0.67.0"
"""Below build/, which git ignores; delete it to have it made again."""
MANY_SECONDS = 300
"""Feast is given so long for the million labels."""


def measure(server: str, scratch: Path, sizes: Sizes, say: Callable[[str], None]) -> dict[str, float]:
    """Feast's figures, by the names of ours."""
    python = environment(ENVIRONMENT, ([REQUIREMENT],), say)
    folder = scratch / "feast"
    folder.mkdir(parents=True, exist_ok=True)
    database = "larder_bench_feast"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE IF EXISTS {database} WITH (FORCE)")
        connection.execute(f"CREATE DATABASE {database}")
    head, _, options = server.partition("?")
    url = f"{head.rsplit('/', 1)[0]}/{database}?{options}"
    try:
        say("preparing Feast's tables")
        task = _prepare(url, folder, sizes)
        (folder / "task.json").write_text(json.dumps(task))
        say("measuring Feast")
        command = [str(python), "-W", "ignore", str(Path(__file__).with_name("feast_runner.py")), str(folder)]
        subprocess.run(command, check=True, stdout=sys.stderr)
        many = _many(command, folder, say)
    finally:
        with psycopg.connect(server, autocommit=True) as connection:
            connection.execute(f"DROP DATABASE {database} WITH (FORCE)")
    found: dict[str, float] = json.loads((folder / "feast.json").read_text())
    return found | many


def _many(command: list[str], folder: Path, say: Callable[[str], None]) -> dict[str, float]:
    """Feast's fastest on the million labels. Where it does not finish, `pit_1m_at_least_seconds` says how long it was given.

    It has most of the machine's memory, and not all: what asks for more is to fail, and not the machine.
    """
    say("measuring Feast on the million labels")
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    limit = int(pages * size * 0.85)
    began = time.monotonic()
    try:
        subprocess.run(
            [*command, "many"],
            check=True,
            stdout=sys.stderr,
            timeout=MANY_SECONDS,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
        )
    except subprocess.TimeoutExpired:
        say(f"Feast did not finish within {MANY_SECONDS} s")
        return {"pit_1m_at_least_seconds": MANY_SECONDS}
    except subprocess.CalledProcessError as error:
        seconds = time.monotonic() - began
        say(
            f"Feast gave up after {seconds:.0f} s (exit {error.returncode}): {limit / 1e9:.0f} GB are not enough, or see above"
        )
        return {"pit_1m_failed_after_seconds": seconds}
    found: dict[str, float] = json.loads((folder / "feast-many.json").read_text())
    return found


def _prepare(url: str, folder: Path, sizes: Sizes) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    views, rows = [], 0
    expected: dict[str, float] = {}
    users = names("user", np.arange(sizes.users - min(sizes.feast_rows, sizes.users), sizes.users))
    items = names("item", np.arange(sizes.items))
    asked = items.slice(len(items) - sizes.candidates).to_pylist()
    person = users[-1].as_py()
    with psycopg.connect(url) as connection:
        for view in BENCH_VIEWS:
            columns = [feature.name for feature in view.features]
            keys = users if view.entity == USER else items
            values = rng.normal(size=(len(keys), len(columns)))
            key = view.entity.keys[0]
            _fill(connection, f"source_{view.name}", key, keys, values, columns)
            wanted = len(keys) - 1 if view.entity == USER else keys.index(asked[0]).as_py()
            expected |= {f"{view.name}__{name}": float(values[wanted, n]) for n, name in enumerate(columns)}
            views.append(
                {"name": view.name, "entity": view.entity.name, "table": f"source_{view.name}", "columns": columns}
            )
            rows += len(keys)
        # One row for each of our events: what Feast would have to be given for every change of a value.
        made = events(sizes, sizes.history)
        columns = [feature.name for feature in BENCH_VIEWS[0].features]
        values = rng.normal(size=(len(made), len(columns)))
        at = pa.array(made.seconds * 1_000_000, pa.timestamp("us", tz="UTC"))
        history = pa.table(
            {"user_id": names("user", made.user), "at": at}
            | {name: pa.array(values[:, place]) for place, name in enumerate(columns)}
        )
        pq.write_table(history, folder / "history.parquet")
        _fill(connection, "history", "user_id", history["user_id"], values, columns, made.seconds)
        connection.execute("CREATE INDEX ON history (user_id, at)")
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("VACUUM ANALYZE")
    for count, file in ((sizes.labels, "labels"), (sizes.many_labels, "labels-many")):
        pq.write_table(label_table(sizes, count), folder / f"{file}.parquet")
    for view in BENCH_VIEWS:
        # The fastest store reads files. Whose history a row is of, and when, is as in ours.
        of = names("user", made.user) if view.entity == USER else names("item", made.item)
        values = rng.normal(size=(len(made), len(view.features)))
        columns_of = {feature.name: pa.array(values[:, place]) for place, feature in enumerate(view.features)}
        pq.write_table(pa.table({view.entity.keys[0]: of, "at": at} | columns_of), folder / f"{view.name}.parquet")
    known = conninfo_to_dict(url)
    return {
        "host": known.get("host", "localhost"),
        "port": int(known.get("port") or 5432),
        "database": known["dbname"],
        "user": known.get("user", "postgres"),
        "password": known.get("password", ""),
        "views": views,
        "rows": rows,
        "user_ids": [person],
        "items": asked,
        "expected": expected,
        "history_columns": columns,
        "repeats": min(sizes.repeats, 30),
    }


def _fill(
    connection: psycopg.Connection[Any],
    table: str,
    key: str,
    keys: Any,
    values: np.ndarray,
    columns: list[str],
    seconds: np.ndarray | None = None,
) -> None:
    listed = ", ".join(f"{name} float8" for name in columns)
    connection.execute(f"CREATE TABLE {table} ({key} text, at timestamptz, {listed})")
    when = np.full(len(values), TODAY.timestamp() - 86_400) if seconds is None else seconds
    with connection.cursor().copy(f"COPY {table} FROM STDIN") as copy:
        for name, at, row in zip(
            keys.to_pylist(), np.asarray(when).astype("M8[s]").astype(str), values.tolist(), strict=True
        ):
            copy.write_row([name, f"{at}Z", *row])
