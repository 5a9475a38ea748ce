"""Packed rows and tiles, as Postgres gives them, into merged states: the online read's arithmetic, whole columns at once.

What SQL does for a read at an earlier instant (`schemas.feature_sql.read_sql`) is done here for a read at the present,
where one packed value per key carries all views of its entity. Both give the same states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any

import numpy as np
from numpy.typing import NDArray

from schemas.features import Entity, FeatureView, Merge
from schemas.online_sql import tile_states, views_of
from schemas.views import CANDIDATE_VIEWS, VIEWS

HEAD_MOST = timedelta(days=max(view.ttl_days for view in VIEWS))
"""How far back the events since a snapshot can reach: an older snapshot is not read."""
_DAY_SECONDS = 86_400
_EPOCH = date(1970, 1, 1)

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Columns:
    """States of one view for n keys: one float64 `(n,)` array per snapshot column, NaN where there is none.

    `as_of (n,)` is when decayed states were weighed, seconds since 1970; NaN for keys that have nothing. `settled` is
    False where no partition of the view is fit to be read; `settled_at` is the midnight that ended it, in seconds.
    """

    keys: list[tuple[str, ...]]
    states: dict[str, Floats]
    as_of: Floats
    settled: bool
    settled_at: float | None = None


def live_columns(entity: Entity, rows: Sequence[tuple[Any, ...]], today: date, keys: int) -> dict[str, Columns]:
    """Columns of every view of `entity` from rows of `keys` key columns followed by `schemas.online_sql.outputs_sql`."""
    views = views_of(entity)
    edges = rows[0][keys : keys + len(views)] if rows else (None,) * len(views)
    found = [row for row in rows if row[0] is not None]
    tiles = _Tiles(entity, [row[keys + 2 * len(views)] for row in found])
    named = [row[:keys] for row in found]
    return {
        view.name: _columns(view, named, [row[keys + len(views) + place] for row in found], tiles, edges[place], today)
        for place, view in enumerate(views)
    }


class _Tiles:
    """The tiles of n keys, decoded: per day (0 today, -1 yesterday), whose they are and what they hold."""

    def __init__(self, entity: Entity, packed: Sequence[bytes | None]) -> None:
        states = tile_states(entity)
        width = 1 + len(states)
        self.place = {state.name: 1 + place for place, state in enumerate(states)}
        block = np.frombuffer(b"".join(raw for raw in packed if raw is not None), ">f8").reshape(-1, width)
        owner = np.repeat(np.arange(len(packed)), [len(raw) // (8 * width) if raw is not None else 0 for raw in packed])
        days = np.unique(block[:, 0]) if len(block) else ()
        self.days = {int(day): (owner[block[:, 0] == day], block[block[:, 0] == day]) for day in days}


def _columns(
    view: FeatureView,
    keys: list[tuple[str, ...]],
    packed: Sequence[bytes | None],
    tiles: _Tiles,
    edge: int | None,
    today: date,
) -> Columns:
    """Merge `packed` states of the partition `edge` (days before today) with the days after it."""
    n, names = len(keys), view.columns
    midnight = float((today - _EPOCH).days * _DAY_SECONDS)
    width = 8 * (1 + len(names))
    version = bytes.fromhex(view.definition_hash)
    # A row packed by another definition would be read as other states: it counts as missing.
    held = [row for row, raw in enumerate(packed) if raw is not None and len(raw) == width and raw[:8] == version]
    block = np.full((n, len(names)), np.nan)
    if held:
        raw = b"".join(value for value in packed if value is not None and len(value) == width and value[:8] == version)
        block[held] = np.frombuffer(raw, ">f8").reshape(len(held), -1)[:, 1:]
    present = np.zeros(n, bool)
    present[held] = True
    since = -1 if edge is None else edge
    late_days = -(since + 1)
    for column, (_, state, window_days) in enumerate(names):
        if window_days <= late_days:  # began after the snapshot ended
            block[:, column] = np.nan
        elif state.merge is Merge.DECAY:
            block[:, column] *= _weight(state.half_life_days, late_days)
    for day, (owner, values) in tiles.days.items():
        if day <= since:
            continue
        present[owner] = True
        for column, (_, state, window_days) in enumerate(names):
            if day < -window_days:
                continue
            value = values[:, tiles.place[state.name]].astype(np.float64)
            if state.merge is Merge.DECAY:  # weighed at its day's end
                value = value * _weight(state.half_life_days, -(day + 1))
            block[owner, column] = _merged(state.merge, block[owner, column], value)
    for column, (_, state, _) in enumerate(names):
        if state.is_count or state.merge is Merge.DECAY:
            block[present & np.isnan(block[:, column]), column] = 0.0
    return Columns(
        keys,
        {name: block[:, column] for column, (name, _, _) in enumerate(names)},
        np.where(present, midnight, np.nan),
        edge is not None,
        None if edge is None else midnight + (edge + 1) * _DAY_SECONDS,
    )


def _weight(half_life_days: float | None, days: int) -> float:
    """What is left of a weight after `days`."""
    return float(2.0 ** (-days / (half_life_days or 1.0)))


def _merged(merge: Merge, held: Floats, added: Floats) -> Floats:
    match merge:
        case Merge.MIN:
            return np.fmin(held, added)
        case Merge.MAX:
            return np.fmax(held, added)
        case _:
            both = np.nan_to_num(held) + np.nan_to_num(added)
            return np.where(np.isnan(held) & np.isnan(added), np.nan, both)


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
