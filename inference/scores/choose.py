"""Which items each of many people chooses from: the sources of a request, their shares and their order, on arrays.

What a request asks of the database (inference/candidates.py) is computed here for b people at once: the nearest items to
their vectors, exactly; what people went on to after their last items; what is trending; what is new. Nothing that they
had comes back, an item counts at its best place, and the best placed are kept.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from inference.scores.catalogue import Neighbours, Shelf

Floats = NDArray[np.float32]
Numbers = NDArray[np.int64]
Entries = tuple[Numbers, Numbers, Numbers]
"""Owners, items and places, all `(e,)`."""

_GROUPS = 32
"""Scores are looked at in so many groups at a time; see `nearest`."""
_BLOCK_ITEMS = 131_072
"""Scores of so many items lie in memory at a time."""
_PLACES = 1 << 10
"""More than any source's share."""


def nearest(users: Floats, matrix: Floats, hidden: tuple[Numbers, Numbers], k: int) -> Entries:
    """The k largest of `users (b, d) @ matrix (M, d).T` in each row, best first: rows, columns and places from 1.

    `hidden` are rows and columns that do not count. Of equal ones the first column wins.
    """
    rows, columns, scores = (np.zeros(0, kind) for kind in (np.int64, np.int64, np.float32))
    for begin in range(0, len(matrix), _BLOCK_ITEMS):
        block = matrix[begin : begin + _BLOCK_ITEMS]
        all_scores = users @ block.T  # (b, m)
        here = (hidden[1] >= begin) & (hidden[1] < begin + len(block))
        all_scores[hidden[0][here], hidden[1][here] - begin] = -np.inf
        found = _at_least_kth(all_scores, k)
        rows = np.concatenate([rows, found[0]])
        columns = np.concatenate([columns, found[1] + begin])
        scores = np.concatenate([scores, all_scores[found]])
    order = np.lexsort((columns, -scores, rows))
    order = order[np.isfinite(scores[order])]
    rows, columns = rows[order], columns[order]
    places = _places(rows, len(users))
    kept = places <= k
    return rows[kept], columns[kept], places[kept]


def _at_least_kth(scores: Floats, k: int) -> tuple[Numbers, Numbers]:
    """Where `scores (b, m)` are at least a bound that k of their row reach: the k largest, and few others.

    The k-th largest of the groups' largest is such a bound, and to find it takes one look at each score, where sorting
    them apart would take several.
    """
    b, m = scores.shape
    wide = m // _GROUPS
    if wide <= 2 * k:
        found = np.nonzero(scores > -np.inf)
        return found[0], found[1]
    highest = scores[:, : wide * _GROUPS].reshape(b, _GROUPS, wide).max(axis=1)  # (b, wide)
    bound = np.partition(highest, wide - k, axis=1)[:, wide - k, None]
    found = np.nonzero(scores >= bound)
    return found[0], found[1]


def visited(
    recent: Entries, seen: tuple[Numbers, Numbers], neighbours: Neighbours, size: int, b: int, most: int
) -> Entries:
    """What people went on to after the `recent` items of b people (places from 1, the newest), `most` for each.

    `seen` are owners and items that do not count; `size` is above every item's number.
    """
    owners, items, places = (part[recent[1] < len(neighbours.begins) - 1] for part in recent)
    begins, many = neighbours.begins[items], np.diff(neighbours.begins)[items]
    at = np.arange(many.sum()) + np.repeat(begins - np.cumsum(many) + many, many)
    weights = neighbours.scores[at] / np.sqrt(np.repeat(places, many))
    keys = np.repeat(owners * size, many) + neighbours.items[at]
    keys = np.concatenate([keys, seen[0] * size + seen[1]])
    weights = np.concatenate([weights, np.full(len(seen[0]), -np.inf)])
    if not len(keys):
        return recent
    order = np.argsort(keys)
    keys = keys[order]
    first = np.flatnonzero(np.diff(keys, prepend=-1))
    evidence = np.add.reduceat(weights[order], first)
    good = evidence > -np.inf
    keys, evidence = keys[first[good]], evidence[good]
    owners = keys // size
    order = np.argsort(owners - evidence / (evidence.max(initial=0.0) * 2 + 1), kind="stable")
    owners, items = owners[order], keys[order] % size
    places = _places(owners, b)
    kept = places <= most
    return owners[kept], items[kept], places[kept]


def listed(items: Numbers, seen: tuple[Numbers, Numbers], size: int, b: int, most: int, longest: int) -> Entries:
    """For each of b people the first `most` of the list `items` that they have not seen; they saw at most `longest`."""
    items = items[: most + longest]
    where = np.full(size, -1, np.int64)
    where[items] = np.arange(len(items))
    free = np.ones((b, len(items)), bool)
    at = where[np.minimum(seen[1], size - 1)]
    hit = (seen[1] < size) & (at >= 0)
    free[seen[0][hit], at[hit]] = False
    places = np.cumsum(free, axis=1)
    owners, columns = np.nonzero(free & (places <= most))
    return owners, items[columns], places[owners, columns]


def merged(entries: list[Entries], size: int, b: int, limit: int, available: NDArray[np.bool_]) -> Numbers:
    """Every item once at its best place, the best `limit` of each of b people, then those that are `available (size,)`.

    `(b, limit)`, -1 behind the last one.
    """
    owners, items, places = (np.concatenate(parts) for parts in zip(*entries, strict=True))
    keys = np.sort((owners * size + items) * _PLACES + places)
    keys = keys[np.diff(keys // _PLACES, prepend=-1) != 0]
    places, keys = keys % _PLACES, keys // _PLACES
    keys = np.sort((keys // size * _PLACES + places) * size + keys % size)
    owners, items = keys // (size * _PLACES), keys % size
    kept = (_places(owners, b) <= limit) & available[items]
    owners, items = owners[kept], items[kept]
    chosen = np.full((b, limit), -1, np.int64)
    chosen[owners, _places(owners, b) - 1] = items
    return chosen


def choose(
    users: Floats, recent: Entries, seen: tuple[Numbers, Numbers], shelf: Shelf, limit: int, longest: int
) -> Numbers:
    """Candidates `(b, limit)` of people with vectors `users (b, d)`, -1 behind the last one.

    `recent` and `seen` are their last items, the newest first, and all that they had: no more than `longest` each.
    """
    b, size = len(users), shelf.size
    share, part, few = limit // 2, limit // 3, limit // 10
    # The database compares in half precision; what it would call nearest is asked for here as well.
    asked = users.astype(np.float16).astype(np.float32)
    column = np.full(size, -1, np.int64)
    column[shelf.rows] = np.arange(len(shelf.rows))
    known = seen[1] < size
    known_seen = seen[0][known], seen[1][known]
    at = column[known_seen[1]]
    rows, columns, places = nearest(asked, shelf.matrix, (known_seen[0][at >= 0], at[at >= 0]), share)
    entries = [
        (rows, shelf.rows[columns], places),
        visited(recent, known_seen, shelf.neighbours, size, b, part),
        listed(shelf.trending, known_seen, size, b, part, longest),
        listed(shelf.fresh, known_seen, size, b, few, longest),
    ]
    return merged(entries, size, b, limit, shelf.available)


def _places(owners: Numbers, b: int) -> Numbers:
    """Places from 1 of entries in order of their `owners`, who are below b."""
    begins = np.searchsorted(owners, np.arange(b))
    places: Numbers = np.arange(1, len(owners) + 1) - begins[owners]
    return places
