"""Items in memory, and a request's candidates by them: their ids from Postgres, packed, and the rest from beside us."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime
from itertools import repeat
from typing import Any, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from inference.candidates import Candidates, CategoryNumbers, Most
from inference.live import DAY_SECONDS, Bools, Floats, layout_of, merged_columns, midnight_of, tiles_of
from schemas.features import ITEM
from schemas.views import CANDIDATE_VIEWS

T = TypeVar("T")
_ALSO = 5
"""Where in a packed row the likeness of the part before is."""


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


class _At(Sequence[T]):
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
            return _At(self._values, self._places[index])
        return self._values[int(self._places[index])]


@dataclass(frozen=True, slots=True)
class Picked:
    """The row of a packed `candidates_sql`: n items that its sources picked, the best placed first.

    `rows (n,)` are their places among the items in memory, -1 for what is none; `tiles` is of those that have any: the
    bytes, how many of each, and where each owner is among the n.
    """

    named: list[str]
    rows: NDArray[np.intp]
    sources: NDArray[np.int64]
    places: NDArray[np.int64]
    evidence: NDArray[np.float64]
    wish: NDArray[np.float32]
    tiles: tuple[bytes, NDArray[np.int64], NDArray[np.intp]]
    newest: tuple[int | None, ...]
    """Of each item view, the partition that is read, in days before today."""
    seen: str | None = None

    def __len__(self) -> int:
        return len(self.named)

    def there(self, items: CachedItems, at: datetime) -> Bools:
        """`(n,)`: which of them are items and have come by the instant `at`."""
        there: Bools = (self.rows >= 0) & (items.available_at[self.rows] <= at.timestamp())
        return there

    def take(self, chosen: NDArray[np.intp]) -> Picked:
        """Those at the places `chosen (m,)`, in that order."""
        if len(chosen) == len(self) and (chosen == np.arange(len(self))).all():
            return self
        where = np.full(len(self), -1, np.intp)
        where[chosen] = np.arange(len(chosen))
        return Picked(
            [self.named[place] for place in chosen.tolist()],
            self.rows[chosen],
            self.sources[chosen],
            self.places[chosen],
            self.evidence[chosen],
            self.wish[chosen],
            _tiles_at(self.tiles, where),
            self.newest,
            self.seen,
        )


def picked_of(row: Sequence[Any], items: CachedItems) -> Picked:
    """The row of a packed `candidates_sql`, its values as the driver gives them or all of them in binary."""
    ids, sources, places, evidence, wish, _, owners, long, tiles, *edges = row
    edges = [int.from_bytes(edge, signed=True) if isinstance(edge, bytes) else edge for edge in edges]
    views = layout_of(ITEM).views
    named = ids.decode().split("\0") if ids is not None else []

    def numbers(packed: bytes | None, kind: str) -> Any:
        return np.frombuffer(packed or b"", kind)

    known: tuple[bytes, NDArray[np.int64], NDArray[np.intp]] = b"", np.zeros(0, np.int64), np.zeros(0, np.intp)
    if owners is not None and long is not None and tiles is not None:
        place = {name: index for index, name in enumerate(named)}
        at = np.array([place[name] for name in owners.decode().split("\0")], np.intp)
        known = tiles, numbers(long, ">i4").astype(np.int64), at
    return Picked(
        named,
        np.fromiter(map(items.places.get, named, repeat(-1)), np.intp, len(named)),
        numbers(sources, ">i4").astype(np.int64),
        numbers(places, ">i4").astype(np.int64),
        numbers(evidence, ">f8").astype(np.float64),
        np.zeros(len(named), np.float32) if wish is None else numbers(wish, ">f8").astype(np.float32),
        known,
        tuple(edges[: len(views)]),
        edges[len(views)] if len(edges) > len(views) else None,
    )


def with_likeness(listed: Picked, row: Sequence[Any]) -> Picked:
    """What the first part listed with its likeness to the wish, which the second one's `row` tells; without a wish as it is."""
    likeness = row[_ALSO]
    return listed if likeness is None else replace(listed, wish=np.frombuffer(likeness, ">f8").astype(np.float32))


def candidates_of(picked: Picked, items: CachedItems, today: date) -> Candidates:
    """Candidates by what is known of each item; all that is `picked` must be there."""
    layout = layout_of(ITEM)
    rows = picked.rows
    midnight_day = int(midnight_of(today) // DAY_SECONDS)
    held = np.stack(
        [
            np.zeros(len(rows), np.bool_) if edge is None else items.days[rows, number] == midnight_day + edge
            for number, edge in enumerate(picked.newest)
        ],
        axis=1,
    )
    states = items.states[rows]
    if not held.all():
        np.copyto(states, np.nan, where=~held.take(layout.view_of, axis=1))
    columns = merged_columns(
        layout,
        [(name,) for name in picked.named],
        states,
        held,
        picked.newest,
        tiles_of(*picked.tiles, layout.tile_width),
        today,
        picked.seen,
    )
    (view,) = CANDIDATE_VIEWS
    return Candidates(
        picked.named,
        _At(items.titles, rows),
        _At(items.categories, rows),
        picked.sources,
        picked.evidence,
        items.vectors[rows].astype(np.float32),
        items.has_vector[rows],
        picked.wish,
        columns[view.name],
        groups=np.zeros(len(rows), np.int64),
        category_numbers=CategoryNumbers(items.category_numbers.rows[rows], items.category_numbers.numbers),
    )


@dataclass(frozen=True, slots=True)
class Merged:
    """The candidates among what two parts picked, in order: `first (m,)` their places in the first part, -1 for what the
    second one alone has, `second (m,)` likewise; `rows (m,)` their places in memory; and of each its sources, evidence and likeness to the wish."""

    first: NDArray[np.intp]
    second: NDArray[np.intp]
    rows: NDArray[np.intp]
    sources: NDArray[np.int64]
    evidence: NDArray[np.float64]
    wish: NDArray[np.float32]


def merged(first: Picked, second: Picked, items: CachedItems, at: datetime, limit: int) -> Merged:
    """The best placed `limit` of two parts, less what is not there: as one statement of all sources would have merged them."""
    in_first = _places_in(first, second)
    both, alone = np.flatnonzero(in_first >= 0), np.flatnonzero(in_first < 0)
    n = len(first)
    at_first = np.concatenate([np.arange(n), np.full(len(alone), -1)])
    at_second = np.concatenate([np.full(n, -1), alone])
    at_second[in_first[both]] = both
    places = np.concatenate([first.places, second.places[alone]])
    sources = np.concatenate([first.sources, second.sources[alone]])
    evidence = np.concatenate([first.evidence, second.evidence[alone]])
    shared = in_first[both]
    places[shared] = np.minimum(places[shared], second.places[both])
    sources[shared] |= second.sources[both]
    evidence[shared] = np.maximum(evidence[shared], second.evidence[both])
    rows = np.concatenate([first.rows, second.rows[alone]])
    # Items in memory stand in the order of their ids; what is none of them is dropped, whichever it would have been.
    order = np.lexsort((np.where(rows < 0, len(items), rows), places))[:limit]
    there = np.concatenate([first.there(items, at), second.there(items, at)[alone]])
    order = order[there[order]]
    wish = np.concatenate([first.wish, second.wish[alone]])
    return Merged(at_first[order], at_second[order], rows[order], sources[order], evidence[order], wish[order])


def joined(first: Picked, second: Picked) -> Picked:
    """One behind the other, which have no item in common."""
    (raw, many, owners), (more_raw, more_many, more_owners) = first.tiles, second.tiles
    return Picked(
        [*first.named, *second.named],
        np.concatenate([first.rows, second.rows]),
        np.concatenate([first.sources, second.sources]),
        np.concatenate([first.places, second.places]),
        np.concatenate([first.evidence, second.evidence]),
        np.concatenate([first.wish, second.wish]),
        (raw + more_raw, np.concatenate([many, more_many]), np.concatenate([owners, more_owners + len(first)])),
        second.newest,
        second.seen,
    )


def _places_in(first: Picked, second: Picked) -> NDArray[np.intp]:
    """Where each of the second part's items stands in the first one, -1 for those that do not."""
    if not len(first):
        return np.full(len(second), -1, np.intp)
    order = np.argsort(first.rows)
    at = order[np.minimum(np.searchsorted(first.rows, second.rows, sorter=order), len(order) - 1)]
    found = np.where(first.rows[at] == second.rows, at, -1)
    strange = np.flatnonzero(second.rows < 0)
    if len(strange):  # what is no item has nothing but its name
        where = {name: place for place, name in enumerate(first.named)}
        found[strange] = [where.get(second.named[place], -1) for place in strange.tolist()]
    return found


class _InOrder(Mapping[str, Floats]):
    """Columns of several parts, put together where somebody looks at one: after the ranker hardly anybody does."""

    def __init__(self, parts: Sequence[Mapping[str, Floats]], order: NDArray[np.intp]) -> None:
        self._parts, self._order = parts, order

    def __getitem__(self, name: str) -> Floats:
        return np.concatenate([part[name] for part in self._parts])[self._order]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts[0])

    def __len__(self) -> int:
        return len(self._parts[0])


def in_order(parts: Sequence[Candidates], order: NDArray[np.intp], chosen: Merged, items: CachedItems) -> Candidates:
    """The candidates of `parts`, of one read of features, in the `order (m,)` of what was `chosen`."""
    ids = [item_id for part in parts for item_id in part.item_ids]
    named = [ids[place] for place in order.tolist()]
    rows = chosen.rows

    def together(arrays: Iterable[NDArray[Any]]) -> Any:
        return np.concatenate(list(arrays))[order]

    features = replace(
        parts[0].features,
        keys=[(name,) for name in named],
        states=_InOrder([part.features.states for part in parts], order),
        as_of=together(part.features.as_of for part in parts),
    )
    return Candidates(
        named,
        _At(items.titles, rows),
        _At(items.categories, rows),
        chosen.sources,
        chosen.evidence,
        together(part.vectors for part in parts),
        items.has_vector[rows],
        chosen.wish,
        features,
        groups=np.zeros(len(named), np.int64),
        category_numbers=CategoryNumbers(items.category_numbers.rows[rows], items.category_numbers.numbers),
    )


def certain(first: Picked, most: Most, limit: int, *, wish: bool) -> int:
    """How many of the first part, from its best placed on, are among the best placed `limit` whatever the second part has."""
    # Of each source of the second part one item stands at each place.
    ahead = np.minimum(first.places, most.user_vector) + (np.minimum(first.places, most.wish) if wish else 0)
    return int(np.count_nonzero(np.arange(len(first)) + ahead < limit))


def _tiles_at(
    tiles: tuple[bytes, NDArray[np.int64], NDArray[np.intp]], where: NDArray[np.intp]
) -> tuple[bytes, NDArray[np.int64], NDArray[np.intp]]:
    """`tiles` of owners that have moved to `where (n,)`, -1 for those that are left out."""
    raw, many, owners = tiles
    at = where[owners]
    if (at < 0).any():
        ends = np.cumsum(many)
        raw = b"".join(
            raw[end - length : end]
            for end, length, place in zip(ends.tolist(), many.tolist(), at.tolist(), strict=True)
            if place >= 0
        )
        many, at = many[at >= 0], at[at >= 0]
    return raw, many, at
