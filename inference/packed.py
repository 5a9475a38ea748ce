"""What `schemas.batch_sql.live_sql` gives of an entity, taken apart and finished: all its views for all keys at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import numpy as np
from numpy.typing import NDArray

from inference.assemble import encode, finished
from inference.live import DAY_SECONDS, Bools, Floats, Layout, Tiles, merge, midnight_of, utc_day


@dataclass(frozen=True, slots=True)
class Packed:
    """Features of the v views of an entity, f in all, for n keys: as in `inference.features.FeatureBlock`.

    `values (n, f) float32`, `valid (n, f) bool`, `age_seconds (n, v) float64`; `expired (n, v) bool` says whose row is of
    a partition out of its ttl, None where no partition is.
    """

    layout: Layout
    values: NDArray[np.float32]
    valid: NDArray[np.bool_]
    age_seconds: Floats
    expired: Bools | None


def read_packed(
    layout: Layout,
    n: int,
    newest: Sequence[int | None],
    rows: bytes | None,
    tiles: bytes | None,
    at: datetime,
    *,
    encoded: bool,
) -> Packed:
    """The features of n keys at the present `at`, from what `live_sql` gives of an entity.

    `newest` (v) in days before today, `rows` and `tiles` one packed value each, None where there is nothing. `encoded`
    gives values as the ranker gets them.
    """
    midnight, seconds = midnight_of(utc_day(at)), at.timestamp()
    edges = tuple(
        day if day is not None and day >= -view.ttl_days else None
        for day, view in zip(newest, layout.views, strict=True)
    )
    states, held = _rows(layout, n, rows)
    expired = None
    if None in edges:
        # Without a partition that is fit to be read there are only today's events, and those alone are no value.
        unsettled = np.array([edge is None for edge in edges])
        expired = held & unsettled
    merge(layout, states, held, edges, _tiles(layout, tiles))
    raw = finished(layout.recipe, states, at=seconds, as_of=midnight)
    there = held
    if expired is not None:
        there = (held & ~unsettled) | expired
        for part, edge in zip(layout.features, edges, strict=True):
            if edge is None:
                raw[:, part] = np.nan
    values, valid = encode(layout.recipe, raw, log1p=encoded)
    ages = np.array([np.nan if day is None else seconds - (midnight + (day + 1) * DAY_SECONDS) for day in newest])
    return Packed(layout, values, valid, np.where(there, ages, np.nan), expired)


def _rows(layout: Layout, n: int, packed: bytes | None) -> tuple[Floats, Bools]:
    """States `(n, c)`, NaN where there is none, and which views have a row of n keys, `(n, v)`."""
    if packed is None:
        return np.full((n, len(layout.view_of)), np.nan), np.zeros((n, len(layout.views)), bool)
    whole = _words(packed, layout.packed_width)
    held = whole.take(layout.hash_at, axis=1) == layout.hashes
    states = whole.view(np.float64).take(layout.packed, axis=1)
    if np.count_nonzero(held) < held.size:
        np.copyto(states, np.nan, where=~held.take(layout.view_of, axis=1))
    places = whole[:, 0] - 1
    if len(places) == n and (n == 1 or not np.count_nonzero(places != np.arange(n))):
        return states, held
    all_states, all_held = np.full((n, len(layout.view_of)), np.nan), np.zeros((n, len(layout.views)), bool)
    all_states[places], all_held[places] = states, held
    return all_states, all_held


def _tiles(layout: Layout, packed: bytes | None) -> Tiles | None:
    if packed is None:
        return None
    whole = _words(packed, 2 + layout.tile_width)
    values = whole.view(np.float64)
    return Tiles(values[:, 1], whole[:, 0] - 1, values[:, 2:])


def _words(packed: bytes, width: int) -> NDArray[np.int64]:
    """`(m, width)` of 8 bytes each, in this machine's order; doubles are a view of it."""
    words = np.frombuffer(packed, ">i8")
    # Once for all: every step on numbers in the network's order would turn them round again.
    return words.astype(np.int64).reshape(-1, width)
