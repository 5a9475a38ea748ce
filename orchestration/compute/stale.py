"""Which partitions hold what they should not, or lack what they should hold, because a day of the lake changed after them.

A build compares, when it writes, the days that it read with the days as they are; a write to the lake marks what was
built before it. Both hold the same lock while they do so, one shared and one alone: no change falls between the two.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import Any

import psycopg

from orchestration.compute.settle import stretches
from schemas.views import VIEWS

LEDGER_LOCK = 7_205_395
LONGEST_WINDOW_DAYS = 3650
"""For the partitions of a view that is no longer declared."""
DAILY = ("events", *(view.name for view in VIEWS))
"""The assets with a partition a day, in the order of their making."""
_WINDOWS = {view.name: view.max_window_days for view in VIEWS}


@dataclass(frozen=True, slots=True)
class Staleness:
    """The stale partitions of one view: how many, since when the oldest of them, and the first and last day."""

    partitions: int
    since: datetime | None
    first: date | None
    last: date | None


def mark_stale(
    connection: psycopg.Connection[Any], days: Iterable[date], *, except_views: Iterable[str] = ()
) -> dict[str, int]:
    """Mark every partition whose window covers one of `days`, in the caller's transaction; how many, by view.

    From here to the commit no build writes the ledger: one that read the lake before sees afterwards that it changed.
    """
    connection.execute("SELECT pg_advisory_xact_lock(%s)", (LEDGER_LOCK,))
    changed, left_out = sorted(days), set(except_views)
    found = connection.execute("SELECT DISTINCT view FROM feature_ledger ORDER BY view").fetchall()
    marked: dict[str, int] = {}
    for view in [view for (view,) in found if view not in left_out]:
        # The first mark stays: it says since when.
        marked[view] = connection.execute(
            "UPDATE feature_ledger SET stale_at = coalesce(stale_at, now()) WHERE view = %s "
            "AND EXISTS (SELECT FROM unnest(%s::date[]) AS t (day) "
            "WHERE partition_date >= t.day AND partition_date < t.day + %s)",
            (view, changed, _WINDOWS.get(view, LONGEST_WINDOW_DAYS)),
        ).rowcount
    return {view: partitions for view, partitions in marked.items() if partitions}


def overtaken_days(
    days: Sequence[date], window_days: int, read: Mapping[date, str], now: Mapping[date, str]
) -> set[date]:
    """The partitions among `days` that were built from the files `read` of days that have others `now`."""
    changed = [day for day in read.keys() | now.keys() if read.get(day) != now.get(day)]
    return {day for day in days if any(day - timedelta(days=window_days) < other <= day for other in changed)}


def staleness(connection: psycopg.Connection[Any], view: str) -> Staleness:
    """What of `view` is stale."""
    row = connection.execute(
        "SELECT count(*), min(stale_at), min(partition_date), max(partition_date) FROM feature_ledger "
        "WHERE view = %s AND stale_at IS NOT NULL",
        (view,),
    ).fetchone()
    return Staleness(*(row or (0, None, None, None)))


def undrained_days(connection: psycopg.Connection[Any], before: date) -> list[date]:
    """The days before `before` (UTC) of which posted events wait to be moved into the lake, in order."""
    rows = connection.execute(
        "SELECT DISTINCT (occurred_at AT TIME ZONE 'UTC')::date AS day FROM recent_events WHERE NOT drained "
        "AND occurred_at < %s::date::timestamp AT TIME ZONE 'UTC' ORDER BY day",
        (before,),
    ).fetchall()
    return [day for (day,) in rows]


def to_rebuild(connection: psycopg.Connection[Any], first: date, last: date) -> dict[str, set[date]]:
    """The daily partitions from `first` to `last` that late events made, or once drained will make, stale, by asset.

    `events` is in it with the days whose posted events came after a partition that covers them was built. What came
    for a day before `first` is drained with `first`.
    """
    found: dict[str, set[date]] = {"events": set(), **{view.name: set() for view in VIEWS}}
    rows = connection.execute("SELECT view, partition_date, stale_at IS NOT NULL FROM feature_ledger").fetchall()
    built: dict[str, set[date]] = {}
    for view, day, stale in rows:
        built.setdefault(view, set()).add(day)
        if stale and view in found:
            found[view].add(day)
    for day in undrained_days(connection, last + timedelta(days=1)):
        for view in VIEWS:
            covering = {other for other in built.get(view.name, ()) if 0 <= (other - day).days < view.max_window_days}
            if covering:
                found["events"].add(max(day, first))
                found[view.name] |= covering
    kept = {name: {day for day in days if first <= day <= last} for name, days in found.items()}
    return {name: days for name, days in kept.items() if days}


def rebuild_parts(wanted: Mapping[str, Collection[date]]) -> list[tuple[tuple[str, ...], date, date]]:
    """`(assets, first, last)` of every run that builds `wanted` (days by asset, in the order of their making) again.

    One run for each stretch of days without a gap, all its assets together: in a run of its own a view could come
    before the events that it reads.
    """
    parts = []
    for first, last in stretches(day for days in wanted.values() for day in days):
        assets = tuple(name for name, days in wanted.items() if any(first <= day <= last for day in days))
        parts.append((assets, first, last))
    return parts
