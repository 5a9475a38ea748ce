"""The public read of the feature store: any number of views and keys in one round trip, into float32 arrays.

    found = read_features(store, {USER_ACTIVITY: [("u1",), ("u2",)], ITEM_ACTIVITY: [("i1",)]})
    found["user_activity"].values      # (2, f) float32, with `valid`, `status` and `age_seconds` beside it

It is the read of the recommender (inference/live.py, schemas/feature_sql.py) for keys of the caller's choice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import IntEnum
from functools import cache
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inference.assemble import finish
from inference.live import HEAD_MOST, Columns, live_columns, snapshot_columns, utc_day
from inference.store import PLAN_ONCE, Store, set_locally
from inference.telemetry import span
from schemas import batch_sql, online_sql
from schemas.errors import DefinitionError
from schemas.features import Entity, FeatureView, Transform
from schemas.views import VIEWS

Key = tuple[str, ...]
Rows = Sequence[tuple[Any, ...]]
_DAY_SECONDS = 86_400.0


class Status(IntEnum):
    """What became of one value that was asked for."""

    MISSING = 0
    """There is nothing: no event, a feature without a value, or only a row of another definition."""
    PRESENT = 1
    EXPIRED = 2
    """There is a value, and it is older than the view's `ttl_days`: it reads as NULL."""


@dataclass(frozen=True, slots=True)
class FeatureBlock:
    """Features of one view for n keys, in the order in which they were asked for.

    `values (n, f) float32`, 0 where not valid; `valid (n, f) bool`, True where PRESENT; `status (n, f) uint8` of
    `Status`. `age_seconds (n,) float64`: from the end of the partition that the row was read from to the read, which is
    what `ttl_days` is held against (events since then are in the values too); NaN for keys of which there is nothing.
    """

    view: FeatureView
    keys: tuple[Key, ...]
    at: datetime
    values: NDArray[np.float32]
    valid: NDArray[np.bool_]
    status: NDArray[np.uint8]
    age_seconds: NDArray[np.float64]

    @property
    def names(self) -> tuple[str, ...]:
        """The features' names: what the second axis is."""
        return tuple(feature.name for feature in self.view.features)


def read_features(
    store: Store,
    keys: Mapping[FeatureView, Sequence[Key]],
    *,
    at: datetime | None = None,
    timeout_ms: int = 2_000,
    encoded: bool = False,
) -> dict[str, FeatureBlock]:
    """Read every view of `keys` for the keys it names, by the name of the view, in one statement.

    A key is a tuple with one part per key column, such as `("u1", "drama")`. Without `at` the read is of the present:
    everything committed until now. With `at` it is of that instant: daily snapshots and the single events before it,
    those that were learned of later included. `encoded` gives values as the ranker gets them (log1p of counts) instead
    of plain ones. Raises DefinitionError for a key that does not fit its view, Unavailable if the database does not
    answer within `timeout_ms`.
    """
    _check(keys)
    instant = datetime.now(UTC) if at is None else at
    wanted = {view: list(dict.fromkeys(asked)) for view, asked in keys.items() if asked}
    if not wanted:
        found: dict[str, tuple[Columns, dict[Key, float]]] = {}
    elif at is None:
        found = _read_live(store, wanted, instant, timeout_ms)
    else:
        found = _read_past(store, wanted, instant, timeout_ms)
    nothing = Columns([], {}, np.zeros(0), False)
    return {
        view.name: block_of(view, asked, instant, *found.get(view.name, (nothing, {})), encoded=encoded)
        for view, asked in keys.items()
    }


def _check(keys: Mapping[FeatureView, Sequence[Key]]) -> None:
    for view, asked in keys.items():
        if view not in VIEWS:
            raise DefinitionError(
                f"view {view.name!r} is not one of schemas/views.py ({', '.join(known.name for known in VIEWS)}), so "
                "nothing is stored of it; declare it there and materialise it"
            )
        for key in asked:
            if isinstance(key, str) or len(key) != len(view.entity.keys):
                raise DefinitionError(
                    f"{key!r} is no key of view {view.name!r}; give a tuple ({', '.join(view.entity.keys)},)"
                )


def _read_live(
    store: Store, wanted: dict[FeatureView, list[Key]], at: datetime, timeout_ms: int
) -> dict[str, tuple[Columns, dict[Key, float]]]:
    """Columns of each view, and the ends (seconds) of the partitions of its expired rows."""
    entities = online_sql.entities(wanted)
    asked = {
        entity: list(dict.fromkeys(key for view in wanted if view.entity == entity for key in wanted[view]))
        for entity in entities
    }
    today = utc_day(at)
    rows = _ask(store, _live_sql(entities), {"today": today} | _arrays(list(asked.values())), timeout_ms)
    widest = max(len(entity.keys) for entity in entities)
    most = max(len(online_sql.views_of(entity)) for entity in entities)
    midnight = datetime(today.year, today.month, today.day, tzinfo=UTC).timestamp()
    found: dict[str, tuple[Columns, dict[Key, float]]] = {}
    for part, entity in enumerate(entities):
        views, width = online_sql.views_of(entity), len(entity.keys)
        mine = [row[1:] for row in rows if row[0] == part]
        tiles = widest + 2 * most
        plain = [
            (*row[:width], *row[widest : widest + len(views)], *row[widest + most :][: len(views)], row[tiles])
            for row in mine
        ]
        columns = live_columns(entity, plain, today, width)
        for place, view in enumerate(views):
            days = {row[:width]: row[tiles + 1 + place] for row in mine}
            ends = {key: midnight + (day + 1) * _DAY_SECONDS for key, day in days.items() if day is not None}
            found[view.name] = columns[view.name], ends
    return found


def _read_past(
    store: Store, wanted: dict[FeatureView, list[Key]], at: datetime, timeout_ms: int
) -> dict[str, tuple[Columns, dict[Key, float]]]:
    views = tuple(wanted)
    parameters = {"at": at, "head_since": at - HEAD_MOST} | _arrays(list(wanted.values()))
    rows = _ask(store, _past_sql(views), parameters, timeout_ms)
    widest = max(len(view.entity.keys) for view in views)
    found: dict[str, tuple[Columns, dict[Key, float]]] = {}
    for part, view in enumerate(views):
        width = len(view.entity.keys)
        mine = [row[1:] for row in rows if row[0] == part]
        ends = {row[:width]: row[widest + 2] for row in mine if row[widest + 2] is not None}
        plain = [
            (*row[:width], *row[widest : widest + 2], *row[widest + 3 :][: len(view.columns)])
            for row in mine
            if row[widest + 2] is None
        ]
        found[view.name] = snapshot_columns(view, plain), ends
    return found


def block_of(
    view: FeatureView,
    asked: Sequence[Key],
    at: datetime,
    columns: Columns,
    ends: Mapping[Key, float] = MappingProxyType({}),
    *,
    encoded: bool,
) -> FeatureBlock:
    """The rows of `asked` from the `columns` that a read gave; `ends` says when the partitions of expired rows ended."""
    n, seconds = len(asked), at.timestamp()
    place = {key: row for row, key in enumerate(columns.keys)}
    rows = np.array([place.get(key, -1) for key in asked], np.int64)
    # Without a partition that is fit to be read there are only today's events, and those alone are no value.
    there = (rows >= 0) & columns.settled
    states = {name: np.full(n, np.nan) for name, _, _ in view.columns}
    as_of = np.full(n, np.nan)
    if there.any():
        for name, column in states.items():
            column[there] = columns.states[name][rows[there]]
        as_of[there] = columns.as_of[rows[there]]
    there &= np.isfinite(as_of)
    shown = view if encoded else _plain(view)
    values, mask = finish(shown, states, at=np.full(n, seconds), as_of=np.nan_to_num(as_of), present=there)
    valid = mask > 0
    status = np.where(valid, Status.PRESENT, Status.MISSING).astype(np.uint8)
    age = np.full(n, np.nan)
    if columns.settled_at is not None:
        age[there] = seconds - columns.settled_at
    else:
        for row, key in enumerate(asked):
            if key in ends:
                status[row], age[row] = Status.EXPIRED, seconds - ends[key]
    return FeatureBlock(view, tuple(asked), at, values, valid, status, age)


def _ask(store: Store, sql: str, parameters: dict[str, Any], timeout_ms: int) -> Rows:
    with store.connection() as connection, span("db read_features", kind="client", attributes=_ATTRIBUTES):
        with connection.pipeline():
            set_locally(connection, timeout_ms, PLAN_ONCE)
            # Planning this statement takes longer than running it: the connection keeps its plan.
            cursor = connection.cursor(binary=True).execute(sql, parameters, prepare=True)
        return cursor.fetchall()


_ATTRIBUTES: dict[str, str | int] = {"db.system.name": "postgresql", "db.operation.batch.size": 3}


def _arrays(keys: Sequence[Sequence[Key]]) -> dict[str, Any]:
    """The parameters `k<part>_<column>` of `batch_sql`."""
    return {
        f"k{part}_{place}": list(column)
        for part, asked in enumerate(keys)
        for place, column in enumerate(zip(*asked, strict=True))
    }


@cache
def _plain(view: FeatureView) -> FeatureView:
    return replace(view, features=tuple(replace(entry, transform=Transform.IDENTITY) for entry in view.features))


@cache
def _live_sql(entities: tuple[Entity, ...]) -> str:
    return batch_sql.live_sql(entities)


@cache
def _past_sql(views: tuple[FeatureView, ...]) -> str:
    return batch_sql.past_sql(views)
