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
    """The m candidates among what some parts picked, in order: `at (m,)` where each stands in the first part that has it, the
    parts one behind the other; `rows (m,)` their places in memory; of each its sources, evidence and likeness to the wish."""

    at: NDArray[np.intp]
    rows: NDArray[np.intp]
    sources: NDArray[np.int64]
    evidence: NDArray[np.float64]
    wish: NDArray[np.float32]


def merged(parts: Sequence[Picked], items: CachedItems, at: datetime, limit: int) -> Merged:
    """The best placed `limit` of all parts, less what is not there: as one statement of all sources would have merged them."""
    whole = joined(parts)
    keys = whole.rows.copy()
    strange = np.flatnonzero(keys < 0)
    if len(strange):  # what is no item has nothing but its name
        numbers: dict[str, int] = {}
        for place in strange.tolist():
            keys[place] = len(items) + numbers.setdefault(whole.named[place], len(numbers))
    order = np.argsort(keys, kind="stable")
    begins = np.flatnonzero(np.diff(keys[order], prepend=-1))
    first = order[begins]
    if len(first):
        places = np.minimum.reduceat(whole.places[order], begins)
        sources = np.bitwise_or.reduceat(whole.sources[order], begins)
        evidence = np.maximum.reduceat(whole.evidence[order], begins)
    else:
        places, sources, evidence = whole.places, whole.sources, whole.evidence
    # Items in memory stand in the order of their ids; what is none of them is dropped, whichever it would have been.
    best = np.lexsort((keys[first], places))[:limit]
    best = best[whole.there(items, at)[first[best]]]
    chosen = first[best]
    return Merged(chosen, whole.rows[chosen], sources[best], evidence[best], whole.wish[chosen])


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


def joined(parts: Sequence[Picked]) -> Picked:
    """Parts of one read of features, one behind the other."""
    begins = np.cumsum([0, *(len(part) for part in parts)])
    raw, many, owners = zip(*(part.tiles for part in parts), strict=True)

    def together(name: str) -> Any:
        return np.concatenate([getattr(part, name) for part in parts])

    return Picked(
        [name for part in parts for name in part.named],
        together("rows"),
        together("sources"),
        together("places"),
        together("evidence"),
        together("wish"),
        (
            b"".join(raw),
            np.concatenate(many),
            np.concatenate([own + begin for own, begin in zip(owners, begins[:-1], strict=True)]),
        ),
        parts[0].newest,
        parts[0].seen,
    )


def certain(first: Picked, most: Most, limit: int, *, wish: bool) -> int:
    """How many of the first part, from its best placed on, are among the best placed `limit` whatever the others have."""
    # Of each of their sources one item stands at each place.
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
