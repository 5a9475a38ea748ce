"""Putting damaged days of the lake aside, so that a load fills them again: nothing is lost silently.

A day whose file is missing or unreadable goes back to the file before it, where there is one, else it has none. What
Postgres still has of it as posted waits to be drained again, all other ids of it are free to be loaded again, and what
was built from it is stale. The damaged file stays where it is, named by nobody, until a vacuum or an erasure removes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any

import psycopg

from orchestration.compute.event_keys import take_keys
from orchestration.compute.lake import DAMAGED, Damage, Lake
from orchestration.compute.stale import mark_stale
from orchestration.compute.tombstones import erase_alone


@dataclass(frozen=True, slots=True)
class Mended:
    """A day that was put aside: its damage, and where its events are now; what is left comes from the source or not."""

    damage: Damage
    restored: int
    """Events in the file before the damaged one, which is the day's file again."""
    recent: int
    """Events of it that Postgres has: they are drained into the lake again."""

    @property
    def waiting(self) -> int:
        """Events that only the source can bring back."""
        return max(0, self.damage.rows - self.restored - self.recent)


def mend(lake: Lake, connection: psycopg.Connection[Any], *, dry_run: bool = False) -> list[Mended]:
    """Read every file of the lake and put the days aside whose file cannot be read, in one transaction; returns them.

    With `dry_run` nothing is changed. Loads, builds, drains and erasures wait meanwhile.
    """
    with connection.transaction(force_rollback=dry_run):
        erase_alone(connection)
        lake.hold_writes(connection)
        found = lake.damages(connection)
        if not found:
            return []
        # Posts wait here until the commit: none takes an id that is about to be freed.
        connection.execute("LOCK TABLE event_keys IN SHARE ROW EXCLUSIVE MODE")
        mended = [_put_aside(lake, connection, damage) for damage in found]
        mark_stale(connection, [damage.day for damage in found])
        return mended


def _put_aside(lake: Lake, connection: psycopg.Connection[Any], damage: Damage) -> Mended:
    day, previous = damage.day, damage.previous
    span = (f"{day}T00:00:00Z", f"{day + timedelta(days=1)}T00:00:00Z")
    connection.execute(
        "UPDATE recent_events SET drained = false WHERE drained AND occurred_at >= %s AND occurred_at < %s", span
    )
    connection.execute(
        "DELETE FROM event_keys AS k WHERE occurred_at >= %s AND occurred_at < %s "
        "AND NOT EXISTS (SELECT FROM recent_events AS r WHERE r.event_id = k.event_id)",
        span,
    )
    if previous is None:
        restored = 0
        connection.execute("DELETE FROM lake_files WHERE day = %s", (day,))
    else:
        # Events were only ever added since: an erasure leaves no file before its own.
        restored = previous.rows
        connection.execute(
            "UPDATE lake_files SET path = %s, rows = %s, previous = NULL, keyed = true, written_at = now() WHERE day = %s",
            (previous.path, previous.rows, day),
        )
        events = lake.dataset([previous.path])
        take_keys(connection, events.to_batches(columns=["event_id", "occurred_at"], batch_size=65_536))
    (recent,) = connection.execute(
        "SELECT count(*) FROM recent_events WHERE NOT drained AND occurred_at >= %s AND occurred_at < %s", span
    ).fetchone() or (0,)
    connection.execute(
        # The clock, not the transaction's beginning: a load that it waited for came before it.
        "INSERT INTO quarantine (source, file, line, reason, row, seen_at) VALUES (%s, %s, 0, %s, %s, clock_timestamp()) "
        "ON CONFLICT (source, file, line, reason) DO UPDATE SET seen_at = excluded.seen_at",
        (DAMAGED, damage.path, damage.reason, f"{damage.rows} events of {day}"),
    )
    return Mended(damage, restored, int(recent))


def put_aside_days(connection: psycopg.Connection[Any]) -> set[date]:
    """The days that were put aside since the last load: what is loaded of them is no late event."""
    rows = connection.execute(
        "SELECT DISTINCT substring(file FROM 'day=([0-9-]{10})/')::date FROM quarantine WHERE source = %s "
        "AND seen_at > coalesce((SELECT max(finished_at) FROM ingests), '-infinity')",
        (DAMAGED,),
    ).fetchall()
    return {day for (day,) in rows}
