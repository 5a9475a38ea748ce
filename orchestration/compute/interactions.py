"""Events as arrays, sorted by person and time: what every learner and every measure starts from."""

from __future__ import annotations

from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import psycopg
from numpy.typing import NDArray

from orchestration.compute.consents import agreed
from orchestration.compute.duck import duck
from orchestration.compute.lake import Lake
from schemas.events import KINDS


@dataclass(frozen=True, slots=True)
class Interactions:
    """`n` events of `len(user_ids)` people with `len(item_ids)` items.

    Rows are sorted by (user, occurred_at, event_id), so one person's events are one slice.
    `item_ids` is the whole catalogue, items without events included.
    """

    user_ids: NDArray[np.str_]  # (people,)
    item_ids: NDArray[np.str_]  # (items,)
    user: NDArray[np.int32]  # (n,) index into user_ids
    item: NDArray[np.int32]  # (n,) index into item_ids
    occurred_at: NDArray[np.int64]  # (n,) microseconds since 1970, UTC
    kind: NDArray[np.int64]  # (n,) index in KINDS + 1
    value: NDArray[np.float32]  # (n,) NaN where the event has none
    available_at: NDArray[np.int64] | None = None  # (items,) microseconds; before all time: has always been there

    def __len__(self) -> int:
        return len(self.item)

    def arrays(self) -> tuple[NDArray[Any] | None, ...]:
        """Every field, in order: what makes this table and no other."""
        return tuple(getattr(self, field.name) for field in fields(self))

    def offsets(self) -> NDArray[np.int64]:
        """`(people + 1,)`: person `u` owns rows `offsets[u]:offsets[u + 1]`."""
        return np.searchsorted(self.user, np.arange(len(self.user_ids) + 1)).astype(np.int64)

    def take(self, rows: NDArray[np.bool_] | NDArray[np.int64]) -> Interactions:
        """The same people and items with only these rows (order kept)."""
        return Interactions(
            self.user_ids,
            self.item_ids,
            self.user[rows],
            self.item[rows],
            self.occurred_at[rows],
            self.kind[rows],
            self.value[rows],
            self.available_at,
        )


def newest_known(lake: Lake, connection: psycopg.Connection) -> datetime | None:
    """When the store learned of the last event in the lake; None if that is empty."""
    with duck() as db:
        db.register("lake_events", lake.events(connection))
        [(micros,)] = db.execute("SELECT epoch_us(max(known_at)) FROM lake_events").fetchall()
    return None if micros is None else datetime.fromtimestamp(0, UTC) + timedelta(microseconds=micros)


def load_interactions(
    lake: Lake, connection: psycopg.Connection, known_until: datetime | None = None, *, as_served: bool = False
) -> Interactions:
    """All events of the lake with items that are in the catalogue (others cannot be scored), as arrays, but those of
    people who have not agreed to being personalised.

    `known_until` leaves out what the store learned of later. `as_served` leaves out late events (learned of on a later
    day) that came after the person's next one: no request saw them where they stand in that history.
    """
    catalogue = connection.execute(
        'SELECT item_id, (extract(epoch FROM available_at) * 1000000)::bigint FROM items ORDER BY item_id COLLATE "C"'
    ).fetchall()
    item_ids = np.array([item_id for item_id, _ in catalogue], np.str_)
    always = np.iinfo(np.int64).min
    available_at = np.array([always if since is None else since for _, since in catalogue], np.int64)
    with duck() as db:
        db.register("lake_events", lake.events(connection))
        rows = db.execute(
            "SELECT user_id, item_id, epoch_us(occurred_at) AS occurred_at, kind, value FROM (SELECT *, "
            "CAST(known_at AS DATE) > CAST(occurred_at AS DATE) "
            "AND known_at > lead(occurred_at) OVER (PARTITION BY user_id ORDER BY occurred_at, event_id) AS overtaken "
            f"FROM lake_events WHERE known_at <= COALESCE(CAST(? AS TIMESTAMPTZ), 'infinity') AND {agreed(connection, db)}) "
            "WHERE NOT (? AND COALESCE(overtaken, false)) ORDER BY user_id, occurred_at, event_id",
            [known_until, as_served],
        ).fetchnumpy()
    users = rows["user_id"].astype(np.str_)
    items = rows["item_id"].astype(np.str_)
    user_ids = np.unique(users)
    place = np.minimum(np.searchsorted(item_ids, items), max(len(item_ids) - 1, 0))
    known = item_ids[place] == items if len(item_ids) else np.zeros(len(items), bool)
    kinds = rows["kind"].astype(np.str_)
    kind = np.zeros(len(kinds), np.int64)
    for number, name in enumerate(KINDS, start=1):
        kind[kinds == name] = number
    value = np.ma.filled(np.ma.asarray(rows["value"]).astype(np.float32), np.nan)
    return Interactions(
        user_ids,
        item_ids,
        np.searchsorted(user_ids, users).astype(np.int32),
        place.astype(np.int32),
        rows["occurred_at"].astype(np.int64),
        kind,
        value,
        available_at,
    ).take(known)
