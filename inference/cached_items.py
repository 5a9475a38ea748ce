"""Items in memory, and a request's candidates by them: their ids from Postgres, packed, and the rest from beside us."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime
from itertools import repeat
from typing import Any, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from inference.candidates import Candidates, CategoryNumbers
from inference.live import DAY_SECONDS, Bools, Floats, layout_of, merged_columns, midnight_of, tiles_of
from schemas.features import ITEM
from schemas.views import CANDIDATE_VIEWS

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class CachedItems:
    """All N items of one state of the tables, with the vectors of one model version."""

    state: str
    """That of the log of changes, see `schemas.catalogue_sql.STATE`."""
    model_version: str
    places: dict[str, int]
    """Where an item, by its id, is in what follows."""
    titles: list[str]
    categories: list[list[str]]
    category_numbers: CategoryNumbers
    available_at: NDArray[np.float64]
    """`(N,)` in seconds since 1970, `-inf` for what has always been there."""
    vectors: NDArray[np.float16]
    """`(N, d)`, zeros where an item has none."""
    has_vector: Bools
    days: NDArray[np.int32]
    """`(N, v)`: of each item view the partition that the states are of, in days since 1970."""
    states: Floats
    """`(N, c)`: the views' states side by side, as `inference.live.Layout` has them."""

    def __len__(self) -> int:
        return len(self.places)


class _Picked(Sequence[T]):
    """The values at some places: of most candidates nobody asks for any."""

    def __init__(self, values: Sequence[T], places: NDArray[np.intp]) -> None:
        self._values, self._places = values, places

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        if isinstance(index, slice):
            return _Picked(self._values, self._places[index])
        return self._values[int(self._places[index])]


def candidates_of(row: Sequence[Any], items: CachedItems, at: datetime, today: date) -> Candidates:
    """The row of `candidates_sql`, packed, with what is known of each item: those that have come by the instant `at`, in order."""
    ids, sources, evidence, wish, owners, long, tiles, *edges = row
    layout = layout_of(ITEM)
    views = layout.views
    named = ids.decode().split("\0") if ids is not None else []
    places = np.fromiter(map(items.places.get, named, repeat(-1)), np.intp, len(named))
    # What is no item, or has not come yet, is no candidate, as where the tables are joined.
    kept = np.flatnonzero(places >= 0)
    kept = kept[items.available_at[places[kept]] <= at.timestamp()]
    whole = len(kept) == len(named)
    if not whole:
        named, places = [named[place] for place in kept.tolist()], places[kept]
    midnight_day = int(midnight_of(today) // DAY_SECONDS)
    newest = tuple(edges[: len(views)])
    held = np.stack(
        [
            np.zeros(len(places), np.bool_) if edge is None else items.days[places, number] == midnight_day + edge
            for number, edge in enumerate(newest)
        ],
        axis=1,
    )
    states = items.states[places]
    if not held.all():
        np.copyto(states, np.nan, where=~held.take(layout.view_of, axis=1))
    columns = merged_columns(
        layout,
        [(name,) for name in named],
        states,
        held,
        newest,
        tiles_of(*_known(owners, long, tiles, named), layout.tile_width),
        today,
        edges[len(views)] if len(edges) > len(views) else None,
    )
    (view,) = CANDIDATE_VIEWS

    def numbers(packed: bytes | None, kind: str) -> Any:
        values = np.frombuffer(packed or b"", kind)
        return values if whole else values[kept]

    return Candidates(
        named,
        _Picked(items.titles, places),
        _Picked(items.categories, places),
        numbers(sources, ">i4").astype(np.int64),
        numbers(evidence, ">f8").astype(np.float64),
        items.vectors[places].astype(np.float32),
        items.has_vector[places],
        np.zeros(len(named), np.float32) if wish is None else numbers(wish, ">f8").astype(np.float32),
        columns[view.name],
        groups=np.zeros(len(named), np.int64),
        category_numbers=CategoryNumbers(items.category_numbers.rows[places], items.category_numbers.numbers),
    )


def _known(
    owners: bytes | None, long: bytes | None, tiles: bytes | None, named: list[str]
) -> tuple[bytes, NDArray[np.int64], NDArray[np.intp]]:
    """Tiles of the candidates `named`: the bytes, how many of each owner, and where each owner is."""
    if owners is None or long is None or tiles is None:
        return b"", np.zeros(0, np.int64), np.zeros(0, np.intp)
    place = {name: index for index, name in enumerate(named)}
    at = np.array([place.get(name, -1) for name in owners.decode().split("\0")], np.intp)
    many = np.frombuffer(long, ">i4").astype(np.int64)
    if (at < 0).any():
        ends = np.cumsum(many)
        tiles = b"".join(
            tiles[end - length : end]
            for end, length, where in zip(ends.tolist(), many.tolist(), at.tolist(), strict=True)
            if where >= 0
        )
        at, many = at[at >= 0], many[at >= 0]
    return tiles, many, at
