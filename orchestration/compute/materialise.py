"""Snapshots into Postgres: a range of partitions of one view in one transaction, the ledger with the data."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, timedelta

import adbc_driver_postgresql.dbapi
import duckdb
import psycopg
import pyarrow as pa

from orchestration.compute.engines import DuckDB, Engine, SnapshotJob
from orchestration.compute.lake import Lake, duck
from orchestration.compute.measures import against_day_before, measure_snapshot
from orchestration.compute.stale import LEDGER_LOCK, overtaken_days
from orchestration.compute.tombstones import COUNT_ERASURES, Overtaken, count_erasures
from schemas.checks import Measures
from schemas.features import FeatureView
from schemas.online_sql import ERASURE_LOCK, SEEN, put_rows_sql

DUCKDB = DuckDB()


@dataclass(frozen=True, slots=True)
class PartitionReport:
    """What one partition of one view holds."""

    partition_date: date
    rows: int
    events: int
    measures: Measures


def materialise(
    view: FeatureView, first: date, last: date, *, url: str, lake: Lake, engine: Engine = DUCKDB
) -> list[PartitionReport]:
    """Build the partitions `first` to `last` of `view` from the lake by `engine` and replace them in Postgres.

    One transaction: all of these partitions and their ledger rows, or none. Repeating it gives the same rows and
    clears their marks, except where a day that was read changed meanwhile. If somebody is forgotten meanwhile, it
    begins again from the lake without them.
    """
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
    # The earliest day that the first partition's longest window covers: a file before it must not matter.
    oldest = first - timedelta(days=view.max_window_days - 1)
    with psycopg.connect(url) as connection:
        # One state of the lake: files, their generations and their counts belong together.
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        # What this snapshot does not show may yet be in the files; what it shows of a load is.
        (shown,) = connection.execute(f"SELECT {SEEN}").fetchone() or (None,)
        files = lake.paths(connection, oldest, last)
        read = lake.generations(connection, oldest, last)
        counted: dict[date, int] = dict(
            connection.execute("SELECT day, rows FROM lake_files WHERE day BETWEEN %s AND %s", (first, last))
        )
        before = connection.execute(
            "SELECT rows FROM feature_ledger WHERE view = %s AND partition_date = %s AND definition_hash = %s",
            (view.name, first - timedelta(days=1), view.definition_hash),
        ).fetchone()
        items = load_item_categories(connection)
    days = [first + timedelta(days=offset) for offset in range((last - first).days + 1)]
    job = SnapshotJob(view, tuple(days), lake, tuple(files), items, seen)
    with duck() as db, engine.snapshot(db, job):
        reports = _reports(db, view, days, counted, float(before[0]) if before else None)
        columns = ", ".join(["partition_date", *view.entity.keys, *(name for name, _, _ in view.columns)])
        reader = db.sql(
            f"SELECT {columns} FROM snapshot ORDER BY partition_date, {', '.join(view.entity.keys)}"
        ).to_arrow_reader(65_536)
        with adbc_driver_postgresql.dbapi.connect(url) as adbc, adbc.cursor() as cursor:
            cursor.execute(f"SELECT pg_advisory_xact_lock_shared({ERASURE_LOCK})")
            cursor.execute(COUNT_ERASURES)
            if cursor.fetchone() != (seen,):
                raise Overtaken(f"somebody was forgotten while {view.name} was built; build it again")
            # Two runs of one view wait for each other; different views do not.
            cursor.execute("SELECT pg_advisory_xact_lock(hashtext('features.' || $1))", (view.name,))
            cursor.execute(
                f"DELETE FROM features.{view.name} WHERE partition_date >= $1 AND partition_date <= $2", (first, last)
            )
            cursor.adbc_ingest(view.name, reader, mode="append", db_schema_name="features")
            # Until the commit no event is stored that would have to mark what is written here.
            cursor.execute(f"SELECT pg_advisory_xact_lock_shared({LEDGER_LOCK})")
            cursor.execute("SELECT day, generation FROM lake_files WHERE day >= $1 AND day <= $2", (oldest, last))
            stale = overtaken_days(days, view.max_window_days, read, dict(cursor.fetchall()))
            cursor.executemany(
                "INSERT INTO feature_ledger (view, partition_date, definition_hash, engine, rows, events, seen, stale_at) "
                "VALUES ($1, $2, $3, $4, $5, $6, $7, CASE WHEN $8 THEN now() END) "
                "ON CONFLICT (view, partition_date) DO UPDATE SET "
                "definition_hash = excluded.definition_hash, engine = excluded.engine, rows = excluded.rows, "
                "events = excluded.events, seen = excluded.seen, built_at = now(), stale_at = excluded.stale_at",
                [
                    (view.name, day, view.definition_hash, engine.name, report.rows, report.events, shown, day in stale)
                    for report in reports
                    for day in [report.partition_date]
                ],
            )
            # The newest partition is what is read online; an older one changes nothing there.
            cursor.execute(
                "SELECT max(partition_date) FROM feature_ledger WHERE view = $1 AND definition_hash = $2",
                (view.name, view.definition_hash),
            )
            if cursor.fetchone() == (last,):
                for sql in put_rows_sql(view, f"'{last}'::date"):
                    cursor.execute(sql)
            adbc.commit()
    return reports


def load_item_categories(connection: psycopg.Connection) -> pa.Table:
    """The relation `items (item_id, categories)` that views grouped by category join."""
    rows = connection.execute("SELECT item_id, categories FROM items").fetchall()
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
) -> list[PartitionReport]:
    found = measure_snapshot(db, view)
    rows = {day: found[day]["rows"] if day in found else 0.0 for day in days}
    known = rows if rows_before is None else {days[0] - timedelta(days=1): rows_before} | rows
    over = against_day_before(known, days)
    return [
        PartitionReport(
            day,
            int(rows[day]),
            counted.get(day, 0),
            {"rows": 0.0, **found.get(day, {}), **({"rows_over_day_before": over[day]} if day in over else {})},
        )
        for day in days
    ]
