"""The newest events in Postgres: what feature heads and a person's history are read from, one partition a day."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta

import duckdb
import psycopg

from orchestration.compute import online
from orchestration.compute.lake import Lake
from schemas import online_sql
from schemas.personal_data import RECENT_DAYS
from schemas.ranker import MAX_HISTORY

_LOCK_SECONDS = 1
"""How long events that are posted may have to wait for a partition to be made or dropped."""


def roll_partitions(connection: psycopg.Connection, lake: Lake, now: datetime) -> None:
    """Make the daily partitions that `recent_events` lacks, up to tomorrow's, and drop those that nothing reads any more.

    A transaction of its own, before anything else is written: who adds or drops a partition locks all of the table, and
    a post that waits for one of our event ids holds a part of it. While somebody else writes to the lake or holds the
    table, nothing is done: the default partition takes what has none, and the next write tries again.
    """
    today = now.astimezone(UTC).date()
    # A day more than is loaded: tiles are counted anew from it.
    oldest = today - timedelta(days=RECENT_DAYS + 1)
    wanted = {_partition(oldest + timedelta(days=n)): oldest + timedelta(days=n) for n in range(RECENT_DAYS + 3)}
    with connection.transaction():
        have = {
            name
            for (name,) in connection.execute(
                "SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = 'recent_events'::regclass"
            )
        } - {"recent_events_default"}
        passed = sorted(name for name in have if name < _partition(oldest))
        missing = sorted(wanted.keys() - have)
    if passed or missing:
        try:
            with connection.transaction():
                if lake.try_hold_writes(connection):
                    connection.execute(f"SET LOCAL lock_timeout = '{_LOCK_SECONDS}s'")
                    connection.execute("LOCK TABLE recent_events IN ACCESS EXCLUSIVE MODE")
                    for name in passed:
                        _drop(connection, name)
                    for name in missing:
                        _make(connection, name, wanted[name])
        except psycopg.errors.LockNotAvailable:
            pass
    with connection.transaction():
        connection.execute(
            "DELETE FROM recent_events_default WHERE drained AND occurred_at < %s", (f"{oldest}T00:00:00Z",)
        )


def _partition(day: date) -> str:
    return f"recent_events_{day:%Y%m%d}"


def _drop(connection: psycopg.Connection, name: str) -> None:
    waiting = connection.execute(f"SELECT EXISTS (SELECT FROM {name} WHERE NOT drained)").fetchone()
    if waiting == (False,):
        connection.execute(f"DROP TABLE {name}")


def _make(connection: psycopg.Connection, name: str, day: date) -> None:
    since, until = f"{day}T00:00:00Z", f"{day + timedelta(days=1)}T00:00:00Z"
    held = connection.execute(
        "SELECT EXISTS (SELECT FROM recent_events_default WHERE occurred_at >= %s AND occurred_at < %s)", (since, until)
    ).fetchone()
    # A day whose events are in the default partition stays there.
    if held == (False,):
        connection.execute(f"CREATE TABLE {name} PARTITION OF recent_events FOR VALUES FROM ('{since}') TO ('{until}')")


def keep_recent(connection: psycopg.Connection, db: duckdb.DuckDBPyConnection, now: datetime) -> None:
    """Copy what of `new_events` belongs into the online tables: recent events and each person's last 200."""
    first = now.date() - timedelta(days=RECENT_DAYS)
    recent = db.execute(
        "SELECT event_id, occurred_at, user_id, item_id, kind, value, known_at FROM new_events WHERE occurred_at >= ?",
        [datetime(first.year, first.month, first.day, tzinfo=UTC)],
    )
    connection.execute("CREATE TEMP TABLE incoming (LIKE recent_events INCLUDING DEFAULTS) ON COMMIT DROP")
    _copy(connection, "incoming (event_id, occurred_at, user_id, item_id, kind, value, known_at)", recent)
    connection.execute(
        # One that was posted before is there, and counted.
        "WITH stored AS (INSERT INTO recent_events (event_id, occurred_at, user_id, item_id, kind, value, known_at, drained) "
        "SELECT event_id, occurred_at, user_id, item_id, kind, value, known_at, true FROM incoming AS i "
        "WHERE NOT EXISTS (SELECT FROM recent_events AS p WHERE p.event_id = i.event_id) RETURNING *), "
        f"{online_sql.tile_steps_sql('stored', '%(since)s')} SELECT",
        {"since": online.tiles_since(now)},
    )
    online.trim_tiles(connection, now)
    history = db.execute(
        "SELECT user_id, occurred_at, event_id, item_id, kind, value FROM new_events QUALIFY row_number() OVER "
        f"(PARTITION BY user_id ORDER BY occurred_at DESC, event_id DESC) <= {MAX_HISTORY} ORDER BY user_id, occurred_at"
    )
    connection.execute("CREATE TEMP TABLE incoming_history (LIKE user_history) ON COMMIT DROP")
    _copy(connection, "incoming_history (user_id, occurred_at, event_id, item_id, kind, value)", history)
    connection.execute("INSERT INTO user_history SELECT * FROM incoming_history ON CONFLICT DO NOTHING")
    connection.execute(
        "DELETE FROM user_history h USING (SELECT user_id, occurred_at, event_id, row_number() OVER "
        "(PARTITION BY user_id ORDER BY occurred_at DESC, event_id DESC) AS place FROM user_history "
        "WHERE user_id IN (SELECT DISTINCT user_id FROM incoming_history)) ranked "
        "WHERE ranked.place > %s AND (h.user_id, h.occurred_at, h.event_id) = "
        "(ranked.user_id, ranked.occurred_at, ranked.event_id)",
        (MAX_HISTORY,),
    )
    connection.execute("DROP TABLE incoming, incoming_history")


def _copy(connection: psycopg.Connection, target: str, result: duckdb.DuckDBPyConnection) -> None:
    with connection.cursor().copy(f"COPY {target} FROM STDIN") as copy:
        while rows := result.fetchmany(10_000):
            for row in rows:
                copy.write_row(row)
