"""What people did with what they were shown: the events that carry a request's id, however old they are.

`recent_events` has those of two weeks; the lake has all that were drained into it. Both are read, each event once.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date, datetime
from typing import Any

import duckdb
import psycopg
import pyarrow as pa

from orchestration.compute.lake import Lake

OUTCOMES = pa.schema(
    [
        ("event_id", pa.string()),
        ("request_id", pa.string()),
        ("user_id", pa.string()),
        ("item_id", pa.string()),
        ("kind", pa.string()),
        ("value", pa.float64()),
        ("occurred_at", pa.timestamp("us", tz="UTC")),
    ]
)
_COLUMNS = ", ".join(OUTCOMES.names)
_RECENT = (
    f"SELECT {_COLUMNS} FROM recent_events WHERE request_id IS NOT NULL AND occurred_at >= %s AND occurred_at < %s"
)
_PIECE = 50_000
"""Rows read from Postgres at a time."""


def load_outcomes(
    db: duckdb.DuckDBPyConnection, connection: psycopg.Connection[Any], lake: Lake, since: datetime, until: datetime
) -> None:
    """Table `outcomes` of `db`: the events with a request's id that occurred in [since, until), as `OUTCOMES`.

    Raises LakeError if a file of those days is damaged.
    """
    load_rows(db, "outcomes", OUTCOMES, connection, _RECENT, (since, until))
    paths = lake.paths(connection, since.date(), until.date()).values()
    with lake.named(paths):
        lake.register(db, "lake_outcomes", paths)
        db.execute(
            f"INSERT INTO outcomes SELECT {_COLUMNS} FROM lake_outcomes WHERE request_id IS NOT NULL "
            "AND occurred_at >= ? AND occurred_at < ? AND event_id NOT IN (SELECT event_id FROM outcomes)",
            [since, until],
        )


def outcomes_kept(connection: psycopg.Connection[Any], lake: Lake, day: date) -> bool:
    """Whether what was done on `day` (UTC) can still be told: an event of it is in `recent_events`, or a file of the lake
    says which request each event belongs to. Files of an older release do not."""
    row = connection.execute(
        "SELECT EXISTS (SELECT FROM recent_events WHERE (occurred_at AT TIME ZONE 'UTC')::date = %s "
        # The same again in words that find the day's partition.
        "AND occurred_at >= %s::date - 1 AND occurred_at < %s::date + 2)",
        (day, day, day),
    ).fetchone()
    if row and row[0]:
        return True
    files = lake.dataset(lake.paths(connection, day, day).values()).get_fragments()
    return any("request_id" in file.physical_schema.names and file.count_rows() for file in files)


def load_rows(
    db: duckdb.DuckDBPyConnection,
    name: str,
    schema: pa.Schema,
    connection: psycopg.Connection[Any],
    query: str,
    parameters: Sequence[Any],
) -> None:
    """What `query` gives as the table `name` of `db`, read in pieces."""
    empty = schema.empty_table()
    db.register(f"no_{name}", empty)
    db.execute(f"CREATE OR REPLACE TABLE {name} AS SELECT * FROM no_{name}")
    # In a transaction of its own where none is open: a cursor with a name needs one.
    with connection.transaction(), connection.cursor(name=f"larder_{name}") as cursor:
        cursor.itersize = _PIECE
        cursor.execute(query, parameters)
        while rows := cursor.fetchmany(_PIECE):
            columns = [
                pa.array(column, kind) for column, kind in zip(zip(*rows, strict=True), schema.types, strict=True)
            ]
            db.register("piece", pa.table(columns, schema=schema))
            db.execute(f"INSERT INTO {name} SELECT * FROM piece")
