"""Packed rows and tiles, as Postgres gives them, into merged states: the online read's arithmetic, whole tables at once.

What SQL does for a read at an earlier instant (`schemas.feature_sql.read_sql`) is done here for a read at the present,
where one packed value per key carries all views of its entity. Both give the same states.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from functools import cache, lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inference.assemble import Recipe, recipe
from schemas.features import Entity, FeatureView, Merge
from schemas.features import column as column_name
from schemas.online_sql import tile_states, views_of
from schemas.views import CANDIDATE_VIEWS, VIEWS

HEAD_MOST = timedelta(days=max(view.ttl_days for view in VIEWS))
"""How far back the events since a snapshot can reach: an older snapshot is not read."""
DAY_SECONDS = 86_400
_EPOCH = date(1970, 1, 1)
_PLANS = 512
"""Distinct (edges, day) whose weights are kept: a process meets a handful a day."""

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Places = NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Columns:
    """States of one view for n keys: one float64 `(n,)` array per snapshot column, NaN where there is none.

    `as_of (n,)` is when decayed states were weighed, seconds since 1970; NaN for keys that have nothing. `settled` is
    False where no partition of the view is fit to be read; `settled_at` is the midnight that ended it, in seconds.
    """

    keys: list[tuple[str, ...]]
    states: Mapping[str, Floats]
    as_of: Floats
    settled: bool
    settled_at: float | None = None
    seen: str | None = None
    """Which transactions the read saw (a `pg_snapshot`), where that was asked for."""


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Where the states of an entity lie: the c snapshot columns of its v views side by side, and its tiles.

    Of each column: `view_of (c,)` its view, `tile (c,)` the place of its state in a tile, `packed (c,)` its place in a row
    of `schemas.batch_sql.live_sql`, `windows (c,)` in days, `half_lives (c,)` in days, NaN where nothing decays,
    `counts (c,)` True where nothing is 0. `lasts` are pairs of a LAST column and that of its instant.
    """

    views: tuple[FeatureView, ...]
    names: tuple[tuple[str, ...], ...]
    spans: tuple[slice, ...]
    features: tuple[slice, ...]
    """Where each view's features are among those of `recipe`."""
    recipe: Recipe
    view_of: Places
    tile: Places
    packed: Places
    windows: NDArray[np.int64]
    half_lives: Floats
    counts: Bools
    minima: Places
    maxima: Places
    lasts: tuple[tuple[int, int], ...]
    tile_width: int
    packed_width: int
    hash_at: Places
    """Where in such a row each view's part begins, with the hash of its definition; `(v,)`."""
    hashes: NDArray[np.int64]
    """What those must be, `(v,)`: a part of another definition would be read as other states."""


@cache
def layout_of(entity: Entity) -> Layout:
    """The layout of an entity, made once."""
    views, states = views_of(entity), tile_states(entity)
    tile_place = {state.name: place for place, state in enumerate(states)}
    columns = [(number, *column) for number, view in enumerate(views) for column in view.columns]
    place = {(number, name): at for at, (number, name, _, _) in enumerate(columns)}
    begins = np.cumsum([0, *(len(view.columns) for view in views)]).tolist()
    ends = np.cumsum([0, *(len(view.features) for view in views)]).tolist()

    def merged_by(merge: Merge) -> list[int]:
        return [at for at, (_, _, state, _) in enumerate(columns) if state.merge is merge]

    return Layout(
        views=views,
        names=tuple(tuple(name for name, _, _ in view.columns) for view in views),
        spans=tuple(slice(begin, end) for begin, end in pairwise(begins)),
        features=tuple(slice(begin, end) for begin, end in pairwise(ends)),
        recipe=recipe(views),
        view_of=np.array([number for number, _, _, _ in columns], np.intp),
        tile=np.array([tile_place[state.name] for _, _, state, _ in columns], np.intp),
        packed=np.array([at + number + 1 for at, (number, _, _, _) in enumerate(columns)], np.intp),
        windows=np.array([days for _, _, _, days in columns], np.int64),
        half_lives=np.array(
            [state.half_life_days if state.merge is Merge.DECAY else np.nan for _, _, state, _ in columns], np.float64
        ),
        counts=np.array([state.is_count or state.merge is Merge.DECAY for _, _, state, _ in columns], bool),
        minima=np.array(merged_by(Merge.MIN), np.intp),
        maxima=np.array(merged_by(Merge.MAX), np.intp),
        lasts=tuple(
            (at, place[number, column_name(state.by, days)])
            for at, (number, _, state, days) in enumerate(columns)
            if state.by is not None
        ),
        tile_width=len(states),
        packed_width=len(columns) + len(views),
        hash_at=np.array(begins[:-1], np.intp) + np.arange(len(views)),
        hashes=np.array([int.from_bytes(bytes.fromhex(view.definition_hash), signed=True) for view in views], np.int64),
    )


@dataclass(frozen=True, slots=True)
class Tiles:
    """t tiles: `days (t,)` (0 today, -1 yesterday), `owners (t,)` the key that each is of, `values (t, s)` its states."""

    days: Floats
    owners: Places
    values: Floats


def live_columns(entity: Entity, rows: Sequence[tuple[Any, ...]], today: date, keys: int) -> dict[str, Columns]:
    """Columns of every view of `entity` from rows of `keys` key columns followed by `schemas.online_sql.outputs_sql`.

    One column more is what the read saw; see `Columns.seen`.
    """
    layout = layout_of(entity)
    views = layout.views
    width = keys + 2 * len(views) + 1
    seen = rows[0][width] if rows and len(rows[0]) > width else None
    edges = tuple(rows[0][keys : keys + len(views)]) if rows else (None,) * len(views)
    found = [row for row in rows if row[0] is not None]
    states = np.full((len(found), len(layout.view_of)), np.nan)
    held = np.zeros((len(found), len(views)), bool)
    for number, span in enumerate(layout.spans):
        size_bytes = 8 * (1 + span.stop - span.start)
        packed = [row[keys + len(views) + number] for row in found]
        sized = [place for place, value in enumerate(packed) if value is not None and len(value) == size_bytes]
        words = np.frombuffer(b"".join([packed[place] for place in sized]), ">i8").reshape(-1, size_bytes // 8)
        # A row packed by another definition would be read as other states: it counts as missing.
        fit = words[:, 0] == layout.hashes[number]
        places = np.array(sized, np.intp)[fit]
        held[places, number] = True
        states[places, span] = words[fit, 1:].view(">f8")
    tiles = _tiles([row[width - 1] for row in found], layout.tile_width)
    return merged_columns(layout, [row[:keys] for row in found], states, held, edges, tiles, today, seen)


def merged_columns(
    layout: Layout,
    named: list[tuple[str, ...]],
    states: Floats,
    held: Bools,
    edges: tuple[int | None, ...],
    tiles: Tiles,
    today: date,
    seen: str | None,
) -> dict[str, Columns]:
    """Columns of every view of `layout` for the keys `named`, of partitions' `states (n, c)` and what came after.

    `held (n, v)` says who has a row in a view's partition, `edges` (v) are those partitions in days before today. Both
    arrays are changed.
    """
    merge(layout, states, held, edges, tiles)
    midnight = midnight_of(today)
    return {
        view.name: Columns(
            named,
            {name: states[:, span.start + place] for place, name in enumerate(layout.names[number])},
            np.where(held[:, number], midnight, np.nan),
            edge is not None,
            None if edge is None else midnight + (edge + 1) * DAY_SECONDS,
            seen,
        )
        for number, (view, span, edge) in enumerate(zip(layout.views, layout.spans, edges, strict=True))
    }


def _tiles(packed: Sequence[bytes | None], states: int) -> Tiles:
    """The tiles of n keys: of each, its days one after the other, each day and its states."""
    many = [len(raw) if raw is not None else 0 for raw in packed]
    return tiles_of(b"".join(raw for raw in packed if raw is not None), many, np.arange(len(packed)), states)


def tiles_of(raw: bytes, long: Sequence[int] | NDArray[np.integer[Any]], owners: Places, states: int) -> Tiles:
    """Tiles one after the other: of each of `owners` so many bytes as `long` says, each tile its day and `states` states."""
    values = np.frombuffer(raw, ">f8").reshape(-1, 1 + states).astype(np.float64)
    return Tiles(values[:, 0], np.repeat(owners, np.asarray(long, np.intp) // (8 * (1 + states))), values[:, 1:])


def merge(layout: Layout, states: Floats, present: Bools, edges: tuple[int | None, ...], tiles: Tiles | None) -> None:
    """Merge `states (n, c)` of the partitions `edges` (v, days before today) with the days after them, in place.

    `present (n, v)` says who has a row in a view's partition, and becomes True for those who have anything.
    """
    begun = _since(layout, edges)
    if begun is not None:
        states *= begun
    if tiles is not None and len(tiles.days):
        for day in np.unique(tiles.days).tolist() if tiles.days.min() < tiles.days.max() else [tiles.days[0]]:
            _merge_day(layout, states, present, edges, int(day), tiles)
    empty = np.isnan(states)
    empty &= layout.counts
    if np.count_nonzero(present) < present.size:
        empty &= present.take(layout.view_of, axis=1)
    np.copyto(states, 0.0, where=empty)


def _merge_day(
    layout: Layout, states: Floats, present: Bools, edges: tuple[int | None, ...], day: int, tiles: Tiles
) -> None:
    after, weights = _that_day(layout, edges, day)
    if not after.any():
        return
    chosen = np.flatnonzero(tiles.days == day)
    owners = tiles.owners[chosen]
    present[owners] |= after
    added = tiles.values[chosen].take(layout.tile, axis=1)
    added *= weights
    held = states[owners]
    both = held + added
    np.copyto(both, added, where=np.isnan(held))
    np.copyto(both, held, where=np.isnan(added))
    for places, of_two in ((layout.minima, np.fmin), (layout.maxima, np.fmax)):
        if len(places):
            both[:, places] = of_two(held.take(places, axis=1), added.take(places, axis=1))
    for at, instant in layout.lasts:
        both[:, at] = _later(held[:, instant], held[:, at], added[:, instant], added[:, at])
    states[owners] = both


@lru_cache(_PLANS)
def _since(layout: Layout, edges: tuple[int | None, ...]) -> Floats | None:
    """What partitions that ended some days ago are multiplied by, `(c,)`: NaN where the window began after, None if 1."""
    late_days = np.array([0 if edge is None else -(edge + 1) for edge in edges], np.int64)[layout.view_of]
    weights = np.array([_weight(*of) for of in zip(layout.half_lives.tolist(), late_days.tolist(), strict=True)])
    weights[layout.windows <= late_days] = np.nan
    return None if (weights == 1.0).all() else weights


@lru_cache(_PLANS)
def _that_day(layout: Layout, edges: tuple[int | None, ...], day: int) -> tuple[Bools, Floats]:
    """Which views' partitions ended before `day`, `(v,)`, and what its tiles are multiplied by, `(c,)`: NaN, no part."""
    after = np.array([day > (-1 if edge is None else edge) for edge in edges], bool)
    # Weighed at its day's end.
    weights = np.array([_weight(half, -(day + 1)) for half in layout.half_lives.tolist()])
    weights[~after[layout.view_of] | (day < -layout.windows)] = np.nan
    return after, weights


def _weight(half_life_days: float, days: int) -> float:
    """What is left of a weight after `days`; all of it where nothing decays."""
    return 1.0 if np.isnan(half_life_days) else float(2.0 ** (-days / half_life_days))


def _later(held_at: Floats, held: Floats, added_at: Floats, added: Floats) -> Floats:
    """Of each two values the one with the later instant, the larger one of a single instant; NaN is none."""
    none = -np.inf
    one, other = (np.where(np.isnan(at), none, at) for at in (held_at, added_at))
    return np.where(one > other, held, np.where(other > one, added, np.fmax(held, added)))


def snapshot_columns(view: FeatureView, rows: Sequence[tuple[Any, ...]]) -> Columns:
    """Rows of `schemas.feature_sql.read_sql`: keys, as_of, settled_at, then the states; NULL becomes NaN."""
    width = 1 if view in CANDIDATE_VIEWS else len(view.entity.keys)
    names = [name for name, _, _ in view.columns]
    settled_at = next((row[width + 1] for row in rows if row[width + 1] is not None), None)
    rows = [row for row in rows if row[0] is not None]
    block = np.array([row[width:] for row in rows], np.float64).reshape(len(rows), 2 + len(names))
    return Columns(
        [row[:width] for row in rows],
        {name: block[:, 2 + index] for index, name in enumerate(names)},
        block[:, 0],
        settled_at is not None,
        settled_at,
    )


def utc_day(at: datetime) -> date:
    """The day, in UTC, of an instant."""
    return at.astimezone(UTC).date()


def midnight_of(day: date) -> float:
    """The instant at which a day begins, in seconds since 1970."""
    return float((day - _EPOCH).days * DAY_SECONDS)
