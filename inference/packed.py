"""What `schemas.batch_sql.live_sql` gives of an entity, taken apart and finished: all its views for all keys at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import numpy as np
from numpy.typing import NDArray

from inference.assemble import encode, finished
from inference.live import DAY_SECONDS, Bools, Floats, Layout, Places, Tiles, merge, midnight_of, utc_day


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
    place: Mapping[tuple[str, ...], int],
    newest: Sequence[int | None],
    packed: Sequence[bytes | None],
    at: datetime,
    *,
    encoded: bool,
) -> Packed:
    """The features of n keys at the present `at`, from what `live_sql` gives of an entity.

    `place` says in which row of the answer a key belongs, `newest` (v) is in days before today. `packed` holds the rows
    and the tiles, each after the keys that they are of, None where there is nothing. `encoded` gives values as the ranker
    gets them.
    """
    rows, tiles = packed[: len(packed) // 2], packed[len(packed) // 2 :]
    midnight, seconds = midnight_of(utc_day(at)), at.timestamp()
    edges = tuple(
        day if day is not None and day >= -view.ttl_days else None
        for day, view in zip(newest, layout.views, strict=True)
    )
    states, held = _rows(layout, place, rows)
    expired = None
    if None in edges:
        # Without a partition that is fit to be read there are only today's events, and those alone are no value.
        unsettled = np.array([edge is None for edge in edges])
        expired = held & unsettled
    merge(layout, states, held, edges, _tiles(layout, place, tiles))
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


def _rows(layout: Layout, place: Mapping[tuple[str, ...], int], packed: Sequence[bytes | None]) -> tuple[Floats, Bools]:
    """States `(n, c)`, NaN where there is none, and which views have a row of n keys, `(n, v)`."""
    *keys, raw = packed
    n, whole = len(place), _words(raw or b"", layout.packed_width)
    fit = whole.take(layout.hash_at, axis=1) == layout.hashes
    found = whole.view(np.float64).take(layout.packed, axis=1)
    if np.count_nonzero(fit) < fit.size:
        np.copyto(found, np.nan, where=~fit.take(layout.view_of, axis=1))
    if n == len(whole) == 1:  # nothing to put in order
        return found, fit
    states, held = np.full((n, found.shape[1]), np.nan), np.zeros((n, fit.shape[1]), bool)
    owners = _owners(place, keys)
    states[owners], held[owners] = found, fit
    return states, held


def _tiles(layout: Layout, place: Mapping[tuple[str, ...], int], packed: Sequence[bytes | None]) -> Tiles | None:
    *keys, raw = packed
    if raw is None:
        return None
    values = _words(raw, 1 + layout.tile_width).view(np.float64)
    return Tiles(values[:, 0], _owners(place, keys), values[:, 1:])


def _owners(place: Mapping[tuple[str, ...], int], keys: Sequence[bytes | None]) -> Places:
    """`(m,)`: where the keys belong that came as one value per key column."""
    columns = [raw.decode().split("\0") for raw in keys if raw is not None]
    return np.fromiter(map(place.__getitem__, zip(*columns, strict=True)), np.intp)


def _words(packed: bytes, width: int) -> NDArray[np.int64]:
    """`(m, width)` of 8 bytes each, in this machine's order; doubles are a view of it."""
    words = np.frombuffer(packed, ">i8")
    # Once for all: every step on numbers in the network's order would turn them round again.
    return words.astype(np.int64).reshape(-1, width)
