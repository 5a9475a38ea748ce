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
"""So many scores are one group of which the largest is looked at; see `_reached`."""
_BLOCK = 1 << 19
"""So many scores are computed at a time: they stay in a core's own cache until they were looked at."""
_PLACES = 1 << 10
"""More than any source's share."""


def nearest(users: Floats, matrix: Floats, hidden: tuple[Numbers, Numbers], k: int) -> Entries:
    """The k largest of `users (b, d) @ matrix (M, d).T` in each row, best first: rows, columns and places from 1.

    `hidden` are rows and columns that do not count. Of equal ones the first column wins.
    """
    wide = max(_BLOCK // max(len(users), 1), 2 * _GROUPS * k)
    hidden_rows, hidden_columns = hidden
    # Items by people, not people by items: a tall product is faster than a wide one, by half.
    asked = np.ascontiguousarray(users.T)
    # What k of those seen so far reach, k of all reach: less than that is among the k largest of none that follow either.
    reached = np.full((len(users), k), np.finfo(np.float32).min, np.float32)  # above what is hidden
    bound = reached.min(axis=1)
    parts: list[tuple[Numbers, Numbers, Floats]] = []
    for begin in range(0, len(matrix), wide):
        scores = matrix[begin : begin + wide] @ asked  # (wide, b)
        here = (hidden_columns >= begin) & (hidden_columns < begin + wide)
        scores[hidden_columns[here] - begin, hidden_rows[here]] = -np.inf
        reached = _reached(reached, scores)
        bound = reached.min(axis=1)
        found = np.flatnonzero(scores >= bound)  # of one dimension: of two it takes five times as long
        column, row = np.divmod(found, len(users))
        parts.append((row, column + begin, scores.ravel()[found]))
    if not parts:
        nobody = np.zeros(0, np.int64)
        return nobody, nobody, nobody
    rows, columns, best = (np.concatenate(column) for column in zip(*parts, strict=True))
    # The last bound is the highest.
    good = np.flatnonzero(best >= bound[rows])
    good = good[np.lexsort((columns[good], -best[good], rows[good]))]
    rows, columns = rows[good], columns[good]
    places = _places(rows, len(users))
    kept = places <= k
    return rows[kept], columns[kept], places[kept]


def _reached(reached: Floats, scores: Floats) -> Floats:
    """`reached (b, k)`, scores of k different items each, made higher by those of `scores (m, b)` that are.

    The largest of each of some groups are looked at, and few that are among the k largest share one: it takes one look at
    each score, where sorting them apart would take several.
    """
    k = reached.shape[1]
    wide = len(scores) // _GROUPS
    if not wide:
        return reached
    highest = scores[: wide * _GROUPS].reshape(_GROUPS, wide, -1).max(axis=0)  # (wide, b)
    both = np.concatenate([reached, highest.T], axis=1)
    return np.partition(both, both.shape[1] - k, axis=1)[:, -k:]


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


def listed(items: Numbers, seen: tuple[Numbers, Numbers], b: int, most: int, longest: int) -> Entries:
    """For each of b people the first `most` of the list `items` that they have not seen; they saw at most `longest`."""
    items = items[: most + longest]
    if not len(items):
        return items, items, items
    order = np.argsort(items)
    at = order[np.minimum(np.searchsorted(items, seen[1], sorter=order), len(items) - 1)]
    hit = items[at] == seen[1]
    free = np.ones((b, len(items)), bool)
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
    known = seen[1] < size
    known_seen = seen[0][known], seen[1][known]
    at = np.minimum(np.searchsorted(shelf.rows, known_seen[1]), max(len(shelf.rows) - 1, 0))
    here = shelf.rows[at] == known_seen[1] if len(shelf.rows) else np.zeros(len(at), bool)
    rows, columns, places = nearest(asked, shelf.matrix, (known_seen[0][here], at[here]), share)
    entries = [
        (rows, shelf.rows[columns], places),
        visited(recent, known_seen, shelf.neighbours, size, b, part),
        listed(shelf.trending, known_seen, b, part, longest),
        listed(shelf.fresh, known_seen, b, few, longest),
    ]
    return merged(entries, size, b, limit, shelf.available)


def _places(owners: Numbers, b: int) -> Numbers:
    """Places from 1 of entries in order of their `owners`, who are below b."""
    begins = np.searchsorted(owners, np.arange(b))
    places: Numbers = np.arange(1, len(owners) + 1) - begins[owners]
    return places
