"""Why a served vector is not the one that training would see: each cause is proven by recomputing under it.

A hypothesis is a world: the events that the read would have had if it were true, under a key of its own. One pass of the
point-in-time code recomputes all worlds, and a cause is named only if its world gives what was served.

A read at the present is as of its statement's snapshot. It sees what was committed until then, so `known_at`, which is
when the storing transaction began (or, for historical loads, when the event happened), does not decide what it saw: an
event that was being committed while the read took place has a `known_at` before the read and was not seen, or is dated
after the instant that the request began and was. Therefore every event keeps the transaction that stored it and every
logged read its snapshot; the first world holds exactly what was visible. If it gives what was served, the event and the
read passed each other: late data, not a bug.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from typing import Any

import numpy as np
import psycopg
import pyarrow as pa
import pyarrow.dataset as ds
from numpy.typing import NDArray

from orchestration.compute.duck import duck
from orchestration.compute.lake import EVENT_SCHEMA, Lake
from orchestration.compute.point_in_time import PointInTime
from orchestration.compute.skew import (
    BUG,
    LATE_DATA,
    STALE_SNAPSHOT,
    Difference,
    Floats,
    Mismatch,
    differing,
    vectors,
)
from schemas.features import FeatureView

_CHUNK = 200
_MOST_EVENTS = 300_000
"""Events in memory at once, about: a world holds its key's events once more."""
_CUTS = 16
"""So many transactions that came after a partition was built are told apart for one key."""
_AHEAD = 5e-3
"""What a few minutes' lead of a sender's clock changes in an age or a decayed count, at most."""

Row = tuple[str, str, str, str, float | None, datetime, datetime]
"""An event, in the order of the lake's columns."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A `pg_snapshot`: which transactions a statement saw."""

    until: int
    running: frozenset[int]

    @classmethod
    def parse(cls, text: str) -> Snapshot:
        """From `xmin:xmax:xip,xip…` as Postgres writes it."""
        _, until, running = text.split(":")
        return cls(int(until), frozenset(int(part) for part in running.split(",") if part))

    def sees(self, transaction: int) -> bool:
        return transaction < self.until and transaction not in self.running

    def sees_row(self, xmin: int) -> bool:
        """Whether it saw a row of that xmin, which is a transaction's number modulo 2^32."""
        transaction = (self.until & ~0xFFFFFFFF) | xmin
        # Of the numbers that share these bits, the one within half a round of the snapshot.
        transaction += 2**32 * ((transaction < self.until - 2**31) - (transaction > self.until + 2**31))
        return self.sees(transaction)


@dataclass(frozen=True, slots=True)
class _World:
    cause: str
    events: list[Row]
    late_days: int
    ahead: bool


class _Imagined(Lake):
    """A lake of hypotheses."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table

    def events(self, connection: psycopg.Connection, first: date | None = None, last: date | None = None) -> ds.Dataset:
        return ds.dataset(self._table)


class Causes:
    """Explains differences on one state of the database and the lake."""

    def __init__(self, connection: psycopg.Connection[Any], known: Lake) -> None:
        self._connection, self._known = connection, known

    def explain(self, differences: Sequence[Difference]) -> Iterator[Mismatch]:
        """Every value that differs, with its cause."""
        for view in {found.view.name: found.view for found in differences}.values():
            mine = [found for found in differences if found.view.name == view.name]
            for start in range(0, len(mine), _CHUNK):
                yield from self._explain(view, mine[start : start + _CHUNK])

    def _explain(self, view: FeatureView, differences: list[Difference]) -> Iterator[Mismatch]:
        column = _column(view)
        ids = {_id(view, found) for found in differences}
        events, stored = self._events(column, ids), self._stored(column, ids)
        several: list[tuple[Difference, list[_World]]] = []
        rows = 0
        for found in differences:
            several.append((found, _worlds(found, events.get(_id(view, found), []), stored)))
            rows += sum(len(world.events) for world in several[-1][1])
            if rows > _MOST_EVENTS or found is differences[-1]:
                left = self._left(view, several)
                for (difference, worlds), wrong in zip(several, left, strict=True):
                    # The world that leaves the least unexplained; of several, the first.
                    best = min(range(len(worlds)), key=[int(entry.sum()) for entry in wrong].__getitem__)
                    rest = BUG
                    if wrong[best].any():
                        rest = self._told_by_others(difference, events.get(_id(view, difference), []), stored)
                    yield from difference.mismatches(
                        [
                            None if not differs else rest if unexplained else worlds[best].cause
                            for differs, unexplained in zip(difference.wrong, wrong[best], strict=True)
                        ]
                    )
                several, rows = [], 0

    def _left(self, view: FeatureView, several: list[tuple[Difference, list[_World]]]) -> list[list[NDArray[np.bool_]]]:
        """For each difference and each of its worlds: the features `(f,)` that are still not what was served."""
        flat = [(found, world) for found, worlds in several for world in worlds]
        recomputed = iter(self._recompute(view, flat))
        return [
            [
                found.wrong
                & differing(view, found.served.numbers[None], next(recomputed)[None], _AHEAD if world.ahead else 0.0)[0]
                for world in worlds
            ]
            for found, worlds in several
        ]

    def _recompute(self, view: FeatureView, worlds: list[tuple[Difference, _World]]) -> list[Floats]:
        """What the point-in-time code makes of each world: `(f,)` each."""
        column = _column(view)
        position = EVENT_SCHEMA.names.index(column)
        rows: list[tuple[object, ...]] = []
        for number, (_, world) in enumerate(worlds):
            rows += [(*event[:position], f"{number}", *event[position + 1 :]) for event in world.events]
        columns = list(zip(*rows, strict=True)) or [()] * len(EVENT_SCHEMA.names)
        table = pa.table([pa.array(values, field.type) for values, field in zip(columns, EVENT_SCHEMA, strict=True)], EVENT_SCHEMA)  # fmt: skip
        found: list[Floats] = [np.zeros(0, np.float32)] * len(worlds)
        with PointInTime(_Imagined(table), self._connection) as ask:
            for late_days in {world.late_days for _, world in worlds}:
                numbers = [place for place, (_, world) in enumerate(worlds) if world.late_days == late_days]
                keys = [
                    tuple(
                        f"{number}" if name == column else part
                        for name, part in zip(view.entity.keys, worlds[number][0].served.key, strict=True)
                    )
                    for number in numbers
                ]
                at = [worlds[number][0].served.read_at for number in numbers]
                for number, values in zip(numbers, vectors(ask, _longer(view, late_days), keys, at), strict=True):
                    # Without a partition in its ttl nothing at all is read.
                    settled = worlds[number][0].served.partition_date is not None
                    found[number] = values if settled else np.full_like(values, np.nan)
        return found

    def _events(self, column: str, ids: set[str]) -> dict[str, list[Row]]:
        """Everything the store knows of these people or items, by id."""
        found: dict[str, list[Row]] = {}
        with duck() as db:
            db.register("known_events", self._known.events(self._connection))
            db.register("chosen", pa.table({column: pa.array(sorted(ids), pa.string())}))
            position = EVENT_SCHEMA.names.index(column)
            for row in db.execute(
                f"SELECT {', '.join(EVENT_SCHEMA.names)} FROM known_events SEMI JOIN chosen USING ({column}) ORDER BY occurred_at"
            ).fetchall():
                found.setdefault(row[position], []).append(row)
        return found

    def _stored(self, column: str, ids: set[str]) -> dict[str, int]:
        """By which transaction their recent events were stored."""
        return dict(
            self._connection.execute(
                f"SELECT event_id, stored_by FROM recent_events WHERE {column} = ANY(%s) AND stored_by IS NOT NULL",
                (sorted(ids),),
            ).fetchall()
        )

    def _told_by_others(self, found: Difference, events: list[Row], stored: dict[str, int]) -> str:
        """The cause where the past itself was changed since, so that no recomputation can show it; else a bug."""
        served = found.served
        if served.built_by and served.seen and not Snapshot.parse(served.seen).sees_row(served.built_by):
            # Built again, or marked stale, between the read and the writing of its log: the build it used is not known.
            return STALE_SNAPSHOT
        if "user_id" not in found.view.entity.keys and self._any(
            "SELECT FROM erasure_receipts WHERE forgotten_at >= %s", (served.read_at,)
        ):
            # Somebody who was counted then is forgotten: the row that was served has become stale.
            return STALE_SNAPSHOT
        items = sorted({event[2] for event in events})
        if found.view.entity.by_category and self._any(
            "SELECT FROM items WHERE item_id = ANY(%s) AND updated_at >= coalesce(%s, %s)",
            (items, served.built_at, served.read_at),
        ):
            # What the catalogue says of an item's categories came later; it keeps no history.
            return LATE_DATA
        # A load of events older than those kept online says nothing of when it came, but its days were written anew.
        days = sorted({_day(event[5]) for event in events if event[0] not in stored})
        since = served.built_at or served.read_at
        if self._any(
            "SELECT FROM lake_files WHERE day = ANY(%s) AND written_at >= %s AND EXISTS "
            "(SELECT FROM ingests WHERE finished_at >= %s AND stored_rows > 0)",
            (days, since, since),
        ):
            return LATE_DATA
        return BUG

    def _any(self, query: str, parameters: tuple[object, ...]) -> bool:
        return self._connection.execute(f"{query} LIMIT 1", parameters).fetchone() is not None


def _worlds(found: Difference, events: list[Row], stored: dict[str, int]) -> list[_World]:
    """What the read may have had, the likeliest first.

    First all that was visible to it. Then the same less what its partition, by its build's snapshot, cannot hold. Then
    less one, two, three … of the transactions that posted events after the partition had ended: they may have waited to
    be drained into the lake when it was built. Where the partition was older than yesterday's, windows that reach into
    it are longer by the days it was late.
    """
    served = found.served
    at, partition = served.read_at, served.partition_date
    today = _day(at)
    read = _Knowledge(stored, served.seen, at)
    visible = [event for event in events if _day(event[5]) <= today and read.has(event)]
    late_days = 0 if partition is None else (today - partition).days - 1
    ahead = any(event[5] >= at for event in visible)

    def world(cause: str, held: list[Row]) -> _World:
        return _World(cause, _on_time(held, at), late_days, ahead)

    if partition is None or late_days > 0:
        cause = STALE_SNAPSHOT
    elif visible == [event for event in events if event[5] < at and event[6] <= at]:
        # The very events that training has: if they make another vector there, training is wrong.
        cause = BUG
    else:
        cause = LATE_DATA
    worlds = [world(cause, visible)]
    if partition is None:
        return worlds
    if served.built_at is not None:
        build = _Knowledge(stored, served.built_seen, served.built_at)
        visible = [event for event in visible if _day(event[5]) > partition or build.has(event)]
        worlds.append(world(STALE_SNAPSHOT, visible))
    late = {
        event[0]: stored[event[0]]
        for event in visible
        if _day(event[5]) <= partition < _day(event[6]) and event[0] in stored
    }
    for first in sorted(set(late.values()), reverse=True)[:_CUTS]:
        held = [event for event in visible if late.get(event[0], -1) < first]
        worlds.append(world(STALE_SNAPSHOT, held))
    return worlds


class _Knowledge:
    """What a statement knew: by its snapshot where an event's transaction is kept, else by when the event was known."""

    def __init__(self, stored: dict[str, int], seen: str | None, at: datetime) -> None:
        self._stored, self._at = stored, at
        self._snapshot = None if seen is None else Snapshot.parse(seen)

    def has(self, event: Row) -> bool:
        transaction = self._stored.get(event[0])
        if transaction is None or self._snapshot is None:
            return event[6] <= self._at
        return self._snapshot.sees(transaction)


def _day(instant: datetime) -> date:
    return instant.astimezone(UTC).date()


def _on_time(events: list[Row], read_at: datetime) -> list[Row]:
    """The same events, all known in time; one that a fast clock dated after the read happened right before it."""
    before = read_at - timedelta(microseconds=1)
    return [(*event[:5], min(event[5], before), min(event[5], before), *event[7:]) for event in events]


def _longer(view: FeatureView, late_days: int) -> FeatureView:
    """`view` as it reads when its newest partition is `late_days` older than yesterday's."""
    if not late_days:
        return view
    return replace(
        view,
        features=tuple(
            replace(feature, window_days=feature.window_days + late_days * (feature.window_days > late_days))
            for feature in view.features
        ),
    )


def _column(view: FeatureView) -> str:
    """The key column that an event has of its own: what tells worlds apart."""
    return "user_id" if "user_id" in view.entity.keys else "item_id"


def _id(view: FeatureView, found: Difference) -> str:
    return found.served.key[view.entity.keys.index(_column(view))]
