"""Snapshots into Postgres: a range of partitions of one view in one transaction, the ledger with the data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from itertools import pairwise
from typing import Any

import duckdb
import psycopg
import pyarrow as pa

from infra.feature_tables import newest_partition
from orchestration.compute.copy_rows import copy_rows
from orchestration.compute.engines import DuckDB, Engine, SnapshotJob, oldest_day
from orchestration.compute.lake import Lake
from orchestration.compute.measures import against_day_before, first_day, measure_snapshot
from orchestration.compute.snapshots import snapshot_schema
from orchestration.compute.stale import LEDGER_LOCK, overtaken_days
from orchestration.compute.tombstones import count_erasures, no_erasure_since
from schemas.checks import Measures
from schemas.errors import LarderError
from schemas.features import FeatureView
from schemas.online_sql import SEEN, put_rows_sql

_PIECE_ROWS = 200_000
_BATCH_ROWS = 16_384
_SAMPLE = 2_000


@dataclass(frozen=True, slots=True)
class PartitionReport:
    """What one partition of one view holds."""

    partition_date: date
    rows: int
    events: int
    measures: Measures


def materialise(
    view: FeatureView, first: date, last: date, *, url: str, lake: Lake, engine: Engine | None = None
) -> list[PartitionReport]:
    """Build the partitions `first` to `last` of `view` from the lake and replace them in Postgres.

    One transaction: all of these partitions and their ledger rows, or none. Repeating it gives the same rows and
    clears their marks, except where a day that was read changed meanwhile. If somebody is forgotten meanwhile, it
    begins again from the lake without them. The `engine` is a DuckDB of its own unless one is given: one that builds
    several ranges keeps what they have in common.
    """
    if engine is None:
        with DuckDB() as own:
            return materialise(view, first, last, url=url, lake=lake, engine=own)
    while True:
        with psycopg.connect(url) as connection:
            seen = count_erasures(connection)
        try:
            return _build(view, first, last, url, lake, seen, engine)
        except Exception:
            # A file of the lake that was erased under our hands, or Overtaken.
            with psycopg.connect(url) as connection:
                if count_erasures(connection) == seen:
                    raise


def _build(
    view: FeatureView, first: date, last: date, url: str, lake: Lake, seen: int, engine: Engine
) -> list[PartitionReport]:
    """`materialise`, as long as there have been no more than `seen` erasures; else it raises."""
    days = [first + timedelta(days=offset) for offset in range((last - first).days + 1)]
    oldest = oldest_day(view, first)
    with psycopg.connect(url) as connection:
        # One state of the lake: files and their counts belong together.
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        # What this snapshot does not show may yet be in the files; what it shows of a load is.
        (shown,) = connection.execute(f"SELECT {SEEN}").fetchone() or (None,)
        files = lake.paths(connection, oldest, last)
        counted: dict[date, int] = dict(
            connection.execute("SELECT day, rows FROM lake_files WHERE day BETWEEN %s AND %s", (first, last))
        )
        before = connection.execute(
            "SELECT rows FROM feature_ledger WHERE view = %s AND partition_date = %s AND definition_hash = %s",
            (view.name, first - timedelta(days=1), view.definition_hash),
        ).fetchone()
        items = load_item_categories(connection)
        source_first = first_day(connection)
    with lake.named(files.values()), engine.snapshot(SnapshotJob(view, tuple(days), lake, files, items, seen)) as db:
        reports = _reports(db, view, days, counted, float(before[0]) if before else None, source_first)
        with psycopg.connect(url) as connection, no_erasure_since(connection, seen):
            _replace(connection, view, reports, _batches(db, view, reports))
            # Until the commit no event is stored that would have to mark what is written here.
            connection.execute("SELECT pg_advisory_xact_lock_shared(%s)", (LEDGER_LOCK,))
            stale = overtaken_days(days, view.max_window_days, files, lake.paths(connection, oldest, last))
            _enter(connection, view, engine.name, shown, reports, stale)
            # The newest partition is what is read online; an older one changes nothing there.
            if newest_partition(connection, view) == last:
                for sql in put_rows_sql(view, f"'{last}'::date"):
                    connection.execute(sql)
    return reports


def _replace(
    connection: psycopg.Connection[Any],
    view: FeatureView,
    reports: Sequence[PartitionReport],
    batches: Iterator[pa.RecordBatch],
) -> None:
    """Put `batches` in the place of what the table holds of these partitions."""
    # Two runs of one view wait for each other; different views do not.
    connection.execute("SELECT pg_advisory_xact_lock(hashtext('features.' || %s))", (view.name,))
    connection.execute(
        f"DELETE FROM features.{view.name} WHERE partition_date BETWEEN %s AND %s",
        (reports[0].partition_date, reports[-1].partition_date),
    )
    written = copy_rows(connection, f"features.{view.name}", snapshot_schema(view), batches)
    if written != (measured := sum(report.rows for report in reports)):
        raise LarderError(f"{measured} rows of {view.name} had to be written, {written} were")


def _enter(
    connection: psycopg.Connection[Any],
    view: FeatureView,
    engine: str,
    seen: str,
    reports: Sequence[PartitionReport],
    stale: set[date],
) -> None:
    """Write the partitions into the ledger."""
    connection.execute(
        "INSERT INTO feature_ledger (view, partition_date, definition_hash, engine, rows, events, seen, stale_at) "
        "SELECT %s, day, %s, %s, rows, events, %s, CASE WHEN stale THEN now() END "
        "FROM unnest(%s::date[], %s::bigint[], %s::bigint[], %s::bool[]) AS t (day, rows, events, stale) "
        "ON CONFLICT (view, partition_date) DO UPDATE SET "
        "definition_hash = excluded.definition_hash, engine = excluded.engine, rows = excluded.rows, "
        "events = excluded.events, seen = excluded.seen, built_at = now(), stale_at = excluded.stale_at",
        (
            view.name,
            view.definition_hash,
            engine,
            seen,
            [report.partition_date for report in reports],
            [report.rows for report in reports],
            [report.events for report in reports],
            [report.partition_date in stale for report in reports],
        ),
    )


def _batches(
    db: duckdb.DuckDBPyConnection, view: FeatureView, reports: Sequence[PartitionReport]
) -> Iterator[pa.RecordBatch]:
    """The rows of the relation `snapshot` by partition and key: so they fill the table's primary key from left to right.

    Sorted a piece at a time, so that no more than a piece is held.
    """
    columns, order = ", ".join(snapshot_schema(view).names), ", ".join(view.entity.keys)
    for where, values in _pieces(db, view.entity.keys[0], reports):
        yield from db.sql(
            f"SELECT {columns} FROM snapshot WHERE {where} ORDER BY partition_date, {order}", params=values
        ).to_arrow_reader(_BATCH_ROWS)


def _pieces(
    db: duckdb.DuckDBPyConnection, key: str, reports: Sequence[PartitionReport]
) -> Iterator[tuple[str, list[Any]]]:
    """Conditions that cut the relation `snapshot` into pieces of about `_PIECE_ROWS` rows, in order.

    Small partitions share a piece, a large one is cut between its keys.
    """
    together: list[PartitionReport] = []
    for report in reports:
        if together and sum(one.rows for one in (*together, report)) > _PIECE_ROWS:
            yield "partition_date BETWEEN ? AND ?", [together[0].partition_date, together[-1].partition_date]
            together = []
        if report.rows <= _PIECE_ROWS:
            together.append(report)
            continue
        day = report.partition_date
        parts = -(-report.rows // _PIECE_ROWS)
        sample = db.execute(
            f"SELECT key FROM (SELECT {key} AS key FROM snapshot WHERE partition_date = ?) USING SAMPLE {_SAMPLE} ROWS",
            [day],
        ).fetchall()
        keys = sorted(found for (found,) in sample)
        cuts = [keys[len(keys) * part // parts] for part in range(1, parts)]
        yield f"partition_date = ? AND {key} <= ?", [day, cuts[0]]
        for low, high in pairwise(cuts):
            yield f"partition_date = ? AND {key} > ? AND {key} <= ?", [day, low, high]
        yield f"partition_date = ? AND {key} > ?", [day, cuts[-1]]
    if together:
        yield "partition_date BETWEEN ? AND ?", [together[0].partition_date, together[-1].partition_date]


def load_item_categories(connection: psycopg.Connection) -> pa.Table:
    """The relation `items (item_id, categories)` that views grouped by category join."""
    rows = connection.execute("SELECT item_id, categories FROM items ORDER BY item_id").fetchall()
    return pa.table(
        {
            "item_id": pa.array([item_id for item_id, _ in rows], pa.string()),
            "categories": pa.array([categories for _, categories in rows], pa.list_(pa.string())),
        }
    )


def _reports(
    db: duckdb.DuckDBPyConnection,
    view: FeatureView,
    days: list[date],
    counted: dict[date, int],
    rows_before: float | None,
    source_first: date | None,
) -> list[PartitionReport]:
    found = measure_snapshot(db, view)
    rows = {day: found[day]["rows"] if day in found else 0.0 for day in days}
    known = rows if rows_before is None else {days[0] - timedelta(days=1): rows_before} | rows
    over = against_day_before(known, days, source_first)
    return [
        PartitionReport(
            day,
            int(rows[day]),
            counted.get(day, 0),
            {"rows": 0.0, **found.get(day, {}), **over.get(day, {})},
        )
        for day in days
    ]
