"""Why a feature has its value: the partition it was read from, that partition's states, and the events behind both."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from typing import Any

import numpy as np
import psycopg

from inference.assemble import finish
from inference.features import Status
from orchestration.compute.duck import duck
from orchestration.compute.lake import Lake
from orchestration.compute.materialise import load_item_categories
from schemas.errors import DefinitionError, LarderError
from schemas.feature_sql import read_sql
from schemas.features import FeatureView, Transform, column
from schemas.views import VIEWS

PRESENT, MISSING, EXPIRED = (status.name for status in (Status.PRESENT, Status.MISSING, Status.EXPIRED))
_EVENT = "e.event_id, e.user_id, e.item_id, e.kind, e.value, e.occurred_at, e.known_at"


@dataclass(frozen=True, slots=True)
class EventRow:
    """One event behind a value."""

    event_id: str
    user_id: str
    item_id: str
    kind: str
    value: float | None
    occurred_at: datetime
    known_at: datetime

    @property
    def late(self) -> bool:
        """True if it was learned of after its day (UTC) had ended."""
        return self.known_at.astimezone(UTC).date() > self.occurred_at.astimezone(UTC).date()


@dataclass(frozen=True, slots=True)
class Partition:
    """The partition a value was read from; `lake_events` are those of its day in the lake now, `events` when it was built."""

    partition_date: date
    built_at: datetime
    stale_at: datetime | None
    events: int
    lake_events: int

    @property
    def stale(self) -> bool:
        """True if the lake's day is no longer the one it was built from, or an erasure marked it."""
        return self.stale_at is not None or self.events != self.lake_events


@dataclass(frozen=True, slots=True)
class FeatureExplained:
    """One feature's value as read (`encoded`: as the ranker gets it), None unless PRESENT.

    `states` holds, per column of the snapshot, its state there and the one merged with the head. `head_events` counts
    the head's events inside the window, whatever condition the feature sets on them.
    """

    name: str
    window_days: int
    since: datetime
    status: str
    value: float | None
    encoded: float | None
    states: dict[str, tuple[float | None, float | None]]
    head_events: int


@dataclass(frozen=True, slots=True)
class Explanation:
    """Everything behind one entity's features of one view at one instant, times in UTC.

    `snapshot` lists the newest events of the lake behind the partition, `snapshot_events` says how many there are;
    `late` lists those of them that were learned of after their day. `unread` counts events since the partition that a
    read does not see, as they are older than what is kept online.
    """

    view: FeatureView
    key: tuple[str, ...]
    at: datetime
    partition: Partition | None
    features: tuple[FeatureExplained, ...]
    head: tuple[EventRow, ...]
    snapshot: tuple[EventRow, ...]
    snapshot_events: int
    late: tuple[EventRow, ...]
    unread: int


def explain(
    view: FeatureView, key: tuple[str, ...], at: datetime, *, url: str, lake: Lake, limit: int | None = 20
) -> Explanation:
    """What `view` reads for the entity `key` at the instant `at`, and the rows that made it; at most `limit` of the lake's.

    Raises DefinitionError if the key does not fit the view, LarderError for a person who asked to be forgotten.
    """
    if len(key) != len(view.entity.keys):
        raise DefinitionError(
            f"view {view.name!r} is keyed by {', '.join(view.entity.keys)}; the key has {len(key)} parts: give "
            f"{len(view.entity.keys)}"
        )
    named = dict(zip(view.entity.keys, key, strict=True))
    midnight = at.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    with psycopg.connect(url, options="-c TimeZone=UTC", application_name="larder-explain") as connection:
        # One state of the database for everything that follows.
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        _refuse_hidden(connection, named)
        where = " AND ".join(f"{name} = %({name})s" for name in named)
        longest = timedelta(days=max(entry.ttl_days for entry in VIEWS))
        parameters = {**named, "at": at, "head_since": at - longest}
        row = connection.execute(read_sql(view, where), parameters).fetchone()
        assert row is not None
        width = len(view.entity.keys)
        as_of, settled_at = row[width], row[width + 1]
        # As every read does: without a partition that is fit to be read, today's events alone are no value.
        found = row[0] is not None and settled_at is not None
        settled = midnight if settled_at is None else datetime.fromtimestamp(settled_at, UTC)
        partition = None if settled_at is None else _partition(connection, view, settled.date() - timedelta(days=1))
        stored = _states(connection, view, where, named, partition.partition_date if partition else None)
        expired = partition is None and _ever_built(connection, view, where, named, midnight.date())
        head = _head(connection, view, named, max(settled, at - longest), at)
        snapshot = _Lake(connection, lake, view, named, settled, at, limit)
    merged = dict(zip((name for name, _, _ in view.columns), row[width + 2 :], strict=True))
    plain = replace(view, features=tuple(replace(f, transform=Transform.IDENTITY) for f in view.features))
    arrays = {name: np.array([np.nan if value is None else float(value)]) for name, value in merged.items()}
    anchors = {"at": np.array([at.timestamp()]), "as_of": np.array([float(as_of)]), "present": np.array([found])}
    values, mask = finish(plain, arrays, **anchors)
    encoded, _ = finish(view, arrays, **anchors)
    features = []
    for index, feature in enumerate(view.features):
        since = midnight - timedelta(days=feature.window_days)
        present = bool(mask[0, index])
        columns = [column(state, feature.window_days) for state in feature.states]
        features.append(
            FeatureExplained(
                feature.name,
                feature.window_days,
                since,
                PRESENT if present else EXPIRED if expired else MISSING,
                float(values[0, index]) if present else None,
                float(encoded[0, index]) if present else None,
                {name: (stored.get(name), merged[name]) for name in columns},
                sum(event.occurred_at >= since for event in head),
            )
        )
    unread = len(snapshot.since - {event.event_id for event in head})
    return Explanation(
        view,
        key,
        at,
        partition,
        tuple(features),
        head,
        snapshot.newest if partition else (),
        snapshot.count if partition else 0,
        snapshot.late if partition else (),
        unread,
    )


class _Lake:
    """The lake's events of one entity: those behind a partition, and the ids of those since."""

    def __init__(
        self,
        connection: psycopg.Connection[Any],
        lake: Lake,
        view: FeatureView,
        named: dict[str, str],
        settled: datetime,
        at: datetime,
        limit: int | None,
    ) -> None:
        first = settled - timedelta(days=view.max_window_days)
        paths = lake.paths(connection, first.date(), at.astimezone(UTC).date()).values()
        with lake.named(paths), duck() as db:
            db.register("lake_events", lake.dataset(paths))
            db.register("items", load_item_categories(connection))
            conditions = " AND ".join(f"{name} = ?" for name in named)
            source = "lake_events AS e"
            if view.entity.by_category:
                source += " JOIN (SELECT item_id AS of_item, unnest(categories) AS category FROM items) ON of_item = e.item_id"
            db.execute(
                f"CREATE TEMP TABLE mine AS SELECT {_EVENT} FROM {source} "
                f"WHERE {conditions} AND occurred_at >= ? AND occurred_at < ?",
                [*named.values(), first, at],
            )
            most = "" if limit is None else f" LIMIT {limit}"
            order = f"ORDER BY occurred_at DESC, event_id DESC{most}"
            late = "CAST(known_at AS DATE) > CAST(occurred_at AS DATE)"
            behind = "FROM mine WHERE occurred_at < ?"
            self.newest = _rows(db.execute(f"SELECT * {behind} {order}", [settled]).fetchall())
            self.late = _rows(db.execute(f"SELECT * {behind} AND {late} {order}", [settled]).fetchall())
            [(self.count,)] = db.execute(f"SELECT count(*) {behind}", [settled]).fetchall()
            since = db.execute("SELECT event_id FROM mine WHERE occurred_at >= ?", [settled]).fetchall()
            self.since = {event_id for (event_id,) in since}


def _rows(rows: list[tuple[Any, ...]]) -> tuple[EventRow, ...]:
    return tuple(EventRow(*row) for row in rows)


def _refuse_hidden(connection: psycopg.Connection[Any], named: dict[str, str]) -> None:
    hidden = connection.execute(
        "SELECT request_id FROM erasure_requests WHERE user_id = %s", (named.get("user_id"),)
    ).fetchone()
    if hidden is not None:
        raise LarderError(
            "this person asked to be forgotten and is shown to nobody; "
            f"`python -m orchestration.forget --resume` fulfils the request {hidden[0]}"
        )


def _partition(connection: psycopg.Connection[Any], view: FeatureView, day: date) -> Partition:
    row = connection.execute(
        "SELECT l.partition_date, l.built_at, l.stale_at, l.events, coalesce(f.rows, 0) FROM feature_ledger AS l "
        "LEFT JOIN lake_files AS f ON f.day = l.partition_date WHERE l.view = %s AND l.partition_date = %s",
        (view.name, day),
    ).fetchone()
    assert row is not None  # the read found it in the ledger, in this same state of the database
    return Partition(*row)


def _states(
    connection: psycopg.Connection[Any], view: FeatureView, where: str, named: dict[str, str], day: date | None
) -> dict[str, float | None]:
    """The entity's row of one partition, instants in seconds; empty without one."""
    names = [f"EXTRACT(EPOCH FROM {name})::float8" if state.is_instant else name for name, state, _ in view.columns]
    row = connection.execute(
        f"SELECT {', '.join(names)} FROM features.{view.name} WHERE partition_date = %(day)s AND {where}",
        {**named, "day": day},
    ).fetchone()
    return dict(zip((name for name, _, _ in view.columns), row, strict=True)) if row else {}


def _ever_built(
    connection: psycopg.Connection[Any], view: FeatureView, where: str, named: dict[str, str], before: date
) -> bool:
    """Whether an older partition, out of its ttl, holds the entity."""
    row = connection.execute(
        f"SELECT 1 FROM features.{view.name} WHERE partition_date < %(before)s AND {where} LIMIT 1",
        {**named, "before": before},
    ).fetchone()
    return row is not None


def _head(
    connection: psycopg.Connection[Any], view: FeatureView, named: dict[str, str], since: datetime, at: datetime
) -> tuple[EventRow, ...]:
    """The recent events that a read merges into the snapshot, the newest first."""
    conditions = " AND ".join(f"{'c' if name == 'category' else 'e'}.{name} = %({name})s" for name in named)
    source = "recent_events AS e"
    if view.entity.by_category:
        source += " JOIN (SELECT item_id, unnest(categories) AS category FROM items) AS c ON c.item_id = e.item_id"
    rows = connection.execute(
        f"SELECT {_EVENT} FROM {source} WHERE {conditions} AND e.occurred_at >= %(since)s AND e.occurred_at < %(at)s "
        "ORDER BY e.occurred_at DESC, e.event_id DESC",
        {**named, "since": since, "at": at},
    ).fetchall()
    return _rows(rows)
