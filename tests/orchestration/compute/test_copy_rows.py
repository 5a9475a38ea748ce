"""What goes into Postgres by COPY comes out as it was, whatever stands in it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta

import psycopg
import pyarrow as pa
import pytest
from conftest import days_ago
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from worlds import ListSource

from orchestration.compute import copy_rows as copy_module
from orchestration.compute import materialise as module
from orchestration.compute.copy_rows import copy_rows
from orchestration.compute.ingest import ingest
from orchestration.compute.lake import Lake
from orchestration.compute.materialise import materialise
from schemas.events import Event, Item
from schemas.views import VIEWS

SCHEMA = pa.schema(
    [
        ("day", pa.date32()),
        ("key", pa.string()),
        ("other", pa.string()),
        ("n", pa.int64()),
        ("x", pa.float64()),
        ("at", pa.timestamp("us", tz="UTC")),
    ]
)
TABLE = "CREATE TEMP TABLE copied (day date, key text, other text, n bigint, x float8, at timestamptz)"
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
ROW = st.tuples(
    st.none() | st.dates(date(1, 1, 1), date(9999, 12, 31)),
    st.none() | TEXT,
    TEXT,
    st.none() | st.integers(-(2**63), 2**63 - 1),
    st.none() | st.floats(allow_nan=False),
    st.none() | st.datetimes(datetime(1, 1, 2), datetime(9999, 12, 30), timezones=st.just(UTC)),
)


def batch(rows: list[tuple[object, ...]]) -> pa.RecordBatch:
    columns = [[row[place] for row in rows] for place in range(len(SCHEMA))]
    return pa.record_batch(
        [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)], SCHEMA
    )


def stored(connection: psycopg.Connection) -> list[tuple[object, ...]]:
    return connection.execute("SELECT day, key, other, n, x, at FROM copied ORDER BY ctid").fetchall()


@given(rows=st.lists(ROW, max_size=20), skipped=st.integers(0, 3), chunk_bytes=st.sampled_from([1, 300, 1 << 20]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_every_row_comes_back_in_order(
    connection: psycopg.Connection, rows: list[tuple[object, ...]], skipped: int, chunk_bytes: int
) -> None:
    before, copy_module._CHUNK_BYTES = copy_module._CHUNK_BYTES, chunk_bytes
    try:
        with connection.transaction(force_rollback=True):
            connection.execute(TABLE)
            # A slice: its texts do not begin where their buffer does.
            assert copy_rows(connection, "copied", SCHEMA, [batch(rows).slice(skipped)]) == len(rows[skipped:])
            assert stored(connection) == rows[skipped:]
    finally:
        copy_module._CHUNK_BYTES = before


def test_no_number_stays_no_number_and_long_texts_take_no_more_room_than_they_need(
    connection: psycopg.Connection,
) -> None:
    connection.execute(TABLE)
    long = "é" * 1_000_000
    rows = [(None, "short", "", None, math.nan, None), *[(None, "k", "", 1, math.inf, None)] * 500]
    found = copy_rows(connection, "copied", SCHEMA, [batch([*rows, (None, long, "", 2, -math.inf, None)])])
    assert found == 502
    answers = stored(connection)
    assert math.isnan(answers[0][4])  # type: ignore[arg-type]
    assert answers[1:] == [*rows[1:], (None, long, "", 2, -math.inf, None)]


def test_of_rows_that_break_off_nothing_is_stored(connection: psycopg.Connection) -> None:
    connection.execute(TABLE)
    connection.commit()

    def broken() -> Iterator[pa.RecordBatch]:
        yield batch([(None, "k", "", 1, 1.0, None)])
        raise RuntimeError("the file is gone")

    with pytest.raises(RuntimeError, match="the file is gone"), connection.transaction():
        copy_rows(connection, "copied", SCHEMA, broken())
    assert stored(connection) == []


def test_a_partition_larger_than_a_piece_is_stored_as_any_other(
    database: str, connection: psycopg.Connection, lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = [
        Event(
            f"e{number}", f"u{number % 40}", f"i{number % 3}", "rating", float(number % 5), days_ago(number % 4 + 1.5)
        )
        for number in range(400)
    ]
    items = [Item(f"i{number}", "Item", categories=("a", "b", "c")[: number + 1]) for number in range(3)]
    ingest(ListSource(events, items), lake, connection, now=days_ago(0))
    connection.commit()
    first, last = days_ago(6).date(), days_ago(1).date()

    def tables() -> list[list[tuple[object, ...]]]:
        for view in VIEWS:
            materialise(view, first, last, url=database, lake=lake)
        connection.rollback()
        return [connection.execute(f"SELECT * FROM features.{view.name} ORDER BY ctid").fetchall() for view in VIEWS]

    whole = tables()
    assert all(len(rows) > 10 for rows in whole)
    for rows, view in zip(whole, VIEWS, strict=True):
        assert rows == sorted(rows, key=lambda row: row[: 1 + len(view.entity.keys)])  # type: ignore[arg-type, return-value]
    connection.execute(f"TRUNCATE {', '.join(f'features.{view.name}' for view in VIEWS)}")
    connection.commit()
    monkeypatch.setattr(module, "_PIECE_ROWS", 7)
    assert tables() == whole
    assert last - first == timedelta(days=5)
