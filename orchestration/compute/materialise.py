"""Snapshots into Postgres: a range of partitions of one view in one transaction, the ledger with the data."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, timedelta

import adbc_driver_postgresql.dbapi
import duckdb
import psycopg
import pyarrow as pa
from sqlalchemy import text
from sqlalchemy.schema import CreateColumn, CreateTable

from infra.postgres import engine_for
from orchestration.compute.engines import DuckDB, Engine, SnapshotJob
from orchestration.compute.lake import Lake, duck
from orchestration.compute.measures import against_day_before, measure_snapshot
from orchestration.compute.online import ensure_online_tables
from orchestration.compute.tombstones import COUNT_ERASURES, ERASURE_LOCK, Overtaken, count_erasures
from schemas.checks import Measures
from schemas.features import FeatureView
from schemas.online_sql import put_rows_sql
from schemas.tables import view_table
from schemas.views import VIEWS

DUCKDB = DuckDB()


@dataclass(frozen=True, slots=True)
class PartitionReport:
    """What one partition of one view holds."""

    partition_date: date
    rows: int
    events: int
    measures: Measures


def ensure_view_tables(url: str) -> None:
    """Create the table of every declared view, and add the columns that a changed declaration brought.

    Old columns stay: rows of an earlier definition are told apart by the ledger's definition hash.
    """
    engine = engine_for(url)
    with engine.begin() as connection:
        connection.exec_driver_sql("SELECT pg_advisory_xact_lock(7205393)")
        for view in VIEWS:
            table = view_table(view)
            connection.execute(CreateTable(table, if_not_exists=True))
            have = set(
                connection.execute(
                    text(
                        "SELECT column_name FROM information_schema.columns "
                        "WHERE table_schema = 'features' AND table_name = :name"
                    ),
                    {"name": view.name},
                ).scalars()
            )
            for column in table.columns:
                if column.name not in have:
                    definition = CreateColumn(column).compile(engine)
                    connection.exec_driver_sql(f"ALTER TABLE features.{view.name} ADD COLUMN {definition}")
        driver = connection.connection.driver_connection
        assert isinstance(driver, psycopg.Connection)
        ensure_online_tables(driver)


def materialise(
    view: FeatureView, first: date, last: date, *, url: str, lake: Lake, engine: Engine = DUCKDB
) -> list[PartitionReport]:
    """Build the partitions `first` to `last` of `view` from the lake by `engine` and replace them in Postgres.

    One transaction: all of these partitions and their ledger rows, or none. Repeating it gives the same rows. If
    somebody is forgotten meanwhile, it begins again from the lake without them.
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
    with psycopg.connect(url) as connection:
        # The earliest day that the first partition's longest window covers: a file before it must not matter.
        files = lake.paths(connection, first - timedelta(days=view.max_window_days - 1), last)
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
            cursor.executemany(
                "INSERT INTO feature_ledger (view, partition_date, definition_hash, engine, rows, events) "
                "VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT (view, partition_date) DO UPDATE SET "
                "definition_hash = excluded.definition_hash, engine = excluded.engine, rows = excluded.rows, "
                "events = excluded.events, built_at = now(), stale_at = NULL",
                [
                    (view.name, report.partition_date, view.definition_hash, engine.name, report.rows, report.events)
                    for report in reports
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
