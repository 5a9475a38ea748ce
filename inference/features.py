"""The public read of the feature store: any number of views and keys in one round trip, into float32 arrays.

    found = read_features(store, {USER_ACTIVITY: [("u1",), ("u2",)], ITEM_ACTIVITY: [("i1",)]})
    found["user_activity"].values      # (2, f) float32, with `valid`, `status` and `age_seconds` beside it

It is the read of the recommender (inference/live.py, schemas/feature_sql.py) for keys of the caller's choice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import IntEnum
from functools import cache
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inference.assemble import encode, natural, recipe
from inference.connections import StoreConnection
from inference.live import HEAD_MOST, Columns, layout_of, snapshot_columns, utc_day
from inference.packed import Packed, read_packed
from inference.sql_files import text_array
from inference.store import PLAN_ONCE, Store, set_locally
from inference.telemetry import span
from schemas import batch_sql, online_sql
from schemas.errors import DefinitionError
from schemas.features import Entity, FeatureView
from schemas.views import VIEWS

Key = tuple[str, ...]
_NOTHING = Columns([], {}, np.zeros(0), False)


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
    wanted = {view: asked for view, asked in keys.items() if asked}
    if not wanted:
        found: dict[str, FeatureBlock] = {}
    elif at is None:
        found = _read_live(store, wanted, instant, timeout_ms, encoded)
    else:
        found = _read_past(store, wanted, instant, timeout_ms, encoded)
    return {
        view.name: found[view.name] if asked else block_of(view, (), instant, _NOTHING, encoded=encoded)
        for view, asked in keys.items()
    }


def _check(keys: Mapping[FeatureView, Sequence[Key]]) -> None:
    right: tuple[object, int] = (None, 0)
    for view, asked in keys.items():
        if view not in VIEWS:
            raise DefinitionError(
                f"view {view.name!r} is not one of schemas/views.py ({', '.join(known.name for known in VIEWS)}), so "
                "nothing is stored of it; declare it there and materialise it"
            )
        width = len(view.entity.keys)
        if right[0] is asked and right[1] == width:  # one list for several views
            continue
        right = asked, width
        if set(map(type, asked)) <= {tuple} and set(map(len, asked)) <= {width}:
            continue
        for key in asked:
            if isinstance(key, str) or len(key) != width:
                raise DefinitionError(
                    f"{key!r} is no key of view {view.name!r}; give a tuple ({', '.join(view.entity.keys)},)"
                )


def _read_live(
    store: Store, wanted: dict[FeatureView, Sequence[Key]], at: datetime, timeout_ms: int, encoded: bool
) -> dict[str, FeatureBlock]:
    entities = online_sql.entities(wanted)
    today, asked = utc_day(at), []
    parameters = [today.isoformat()]
    for entity in entities:
        lists = [of for view, of in wanted.items() if view.entity is entity or view.entity == entity]
        distinct = dict.fromkeys(lists[0])
        for more in lists[1:]:
            if more is not lists[0]:
                distinct |= dict.fromkeys(more)
        asked.append({key: row for row, key in enumerate(distinct)})
        try:
            parameters += [text_array(column) for column in zip(*distinct, strict=True)]
        except TypeError:
            wrong = next(key for key in distinct if not all(isinstance(part, str) for part in key))
            raise DefinitionError(f"{wrong!r} is no key of {entity.name!r}; give a tuple of texts") from None
    with span("db read_features", kind="client", attributes=_ATTRIBUTES):
        row = store.read_row(_live_sql(entities), parameters, timeout_ms)
    found: dict[str, FeatureBlock] = {}
    layouts = [layout_of(entity) for entity in entities]
    begin, packed = 0, sum(len(layout.views) for layout in layouts)
    for entity, layout, place in zip(entities, layouts, asked, strict=True):
        end, last = begin + len(layout.views), packed + 2 * (len(entity.keys) + 1)
        newest = [None if raw is None else int.from_bytes(raw, signed=True) for raw in row[begin:end]]
        read = read_packed(layout, place, newest, row[packed:last], at, encoded=encoded)
        begin, packed = end, last
        for number, view in enumerate(layout.views):
            if view in wanted:
                found[view.name] = _live_block(view, wanted[view], at, place, read, number)
    return found


def _live_block(
    view: FeatureView, asked: Sequence[Key], at: datetime, place: dict[Key, int], read: Packed, number: int
) -> FeatureBlock:
    """The view `number` of an entity that was read for the keys of `place`, as the caller asked for it."""
    mine = read.layout.features[number]
    values, valid, age = read.values[:, mine], read.valid[:, mine], read.age_seconds[:, number]
    status = valid.astype(np.uint8)  # PRESENT or MISSING
    if read.expired is not None:
        status[read.expired[:, number]] = Status.EXPIRED
    keys = tuple(asked)
    if keys != tuple(place):
        rows = np.array([place[key] for key in keys], np.intp)
        values, valid, status, age = values[rows], valid[rows], status[rows], age[rows]
    return FeatureBlock(view, keys, at, values, valid, status, age)


def _read_past(
    store: Store, wanted: dict[FeatureView, Sequence[Key]], at: datetime, timeout_ms: int, encoded: bool
) -> dict[str, FeatureBlock]:
    views = tuple(wanted)
    parameters = {"at": at, "head_since": at - HEAD_MOST} | {
        f"k{part}_{place}": list(column)
        for part, asked in enumerate(wanted.values())
        for place, column in enumerate(zip(*dict.fromkeys(asked), strict=True))
    }

    def question(connection: StoreConnection) -> list[tuple[Any, ...]]:
        with connection.pipeline():
            set_locally(connection, connection.server_ms(), PLAN_ONCE)
            # Planning this statement takes longer than running it: the connection keeps its plan.
            cursor = connection.cursor(binary=True).execute(_past_sql(views), parameters, prepare=True)
        return cursor.fetchall()

    with span("db read_features", kind="client", attributes=_ATTRIBUTES):
        rows = store.ask(question, timeout_ms)
    widest = max(len(view.entity.keys) for view in views)
    found: dict[str, FeatureBlock] = {}
    for part, view in enumerate(views):
        width = len(view.entity.keys)
        mine = [row[1:] for row in rows if row[0] == part]
        ends = {row[:width]: row[widest + 2] for row in mine if row[widest + 2] is not None}
        plain = [
            (*row[:width], *row[widest : widest + 2], *row[widest + 3 :][: len(view.columns)])
            for row in mine
            if row[widest + 2] is None
        ]
        found[view.name] = block_of(view, wanted[view], at, snapshot_columns(view, plain), ends, encoded=encoded)
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
    raw = natural(view, states, at=np.full(n, seconds), as_of=np.nan_to_num(as_of), present=there)
    values, valid = encode(recipe((view,)), raw, log1p=encoded)
    status = np.where(valid, Status.PRESENT, Status.MISSING).astype(np.uint8)
    age = np.full(n, np.nan)
    if columns.settled_at is not None:
        age[there] = seconds - columns.settled_at
    else:
        for row, key in enumerate(asked):
            if key in ends:
                status[row], age[row] = Status.EXPIRED, seconds - ends[key]
    return FeatureBlock(view, tuple(asked), at, values, valid, status, age)


_ATTRIBUTES: dict[str, str | int] = {"db.system.name": "postgresql"}


@cache
def _live_sql(entities: tuple[Entity, ...]) -> str:
    return batch_sql.live_sql(entities)


@cache
def _past_sql(views: tuple[FeatureView, ...]) -> str:
    return batch_sql.past_sql(views)
