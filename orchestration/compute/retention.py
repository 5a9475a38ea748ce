"""The end of what is too old, table by table, as schemas/personal_data.py declares it; the same run twice deletes nothing more."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
from psycopg import sql

from orchestration.compute.lake import Lake
from orchestration.compute.recent import roll_partitions
from schemas.personal_data import Place, places

BATCH_ROWS = 10_000
"""Rows in one transaction: no lock is held for longer than these take, and a run that dies has done what it did."""
RECENT = "public.recent_events"


@dataclass(frozen=True, slots=True)
class Ended:
    """What was deleted of one table, or would be: rows from before `before`, kept for `days`; `why` it has an end."""

    table: str
    rows: int
    days: int
    before: datetime
    why: str


def expired(connection: psycopg.Connection[Any], now: datetime, declared: Iterable[Place] | None = None) -> list[Ended]:
    """What `end` would delete at `now`."""
    return [_ended(place, now, _count(connection, place, _before(place, now))) for place in _with_an_end(declared)]


def end(
    connection: psycopg.Connection[Any],
    lake: Lake,
    now: datetime | None = None,
    declared: Iterable[Place] | None = None,
) -> list[Ended]:
    """Delete what is too old at `now`, batch by batch, and drop the partitions of recent events that nothing reads."""
    now = now or datetime.now(UTC)
    found = [_ended(place, now, _delete(connection, place, _before(place, now))) for place in _with_an_end(declared)]
    roll_partitions(connection, lake, now)
    connection.commit()
    return found


def _with_an_end(declared: Iterable[Place] | None) -> list[Place]:
    return [place for place in (places() if declared is None else declared) if place.expiry is not None]


def _before(place: Place, now: datetime) -> datetime:
    assert place.expiry is not None
    return now - timedelta(days=place.expiry.days)


def _ended(place: Place, now: datetime, rows: int) -> Ended:
    assert place.expiry is not None
    return Ended(place.table, rows, place.expiry.days, _before(place, now), place.why)


def _condition(place: Place) -> sql.Composed:
    assert place.expiry is not None
    return sql.SQL("{} < %s AND ({})").format(sql.Identifier(place.expiry.column), sql.SQL(place.expiry.only))


def _count(connection: psycopg.Connection[Any], place: Place, before: datetime) -> int:
    statement = sql.SQL("SELECT count(*) FROM {} WHERE {}").format(
        sql.Identifier(*place.table.split(".")), _condition(place)
    )
    (rows,) = connection.execute(statement, (before,)).fetchone() or (0,)
    return int(rows)


def _delete(connection: psycopg.Connection[Any], place: Place, before: datetime) -> int:
    table = sql.Identifier(*place.table.split("."))
    statement = sql.SQL(
        "DELETE FROM {} WHERE ctid = ANY(ARRAY(SELECT ctid FROM {} WHERE {} LIMIT {} FOR UPDATE SKIP LOCKED))"
    ).format(table, table, _condition(place), sql.Literal(BATCH_ROWS))
    total = 0
    while True:
        rows = connection.execute(statement, (before,)).rowcount
        connection.commit()
        total += rows
        # What somebody else holds just now is old tomorrow, too.
        if rows < BATCH_ROWS:
            return total
