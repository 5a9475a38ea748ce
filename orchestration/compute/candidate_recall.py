"""How often the item to find is among the candidates: of every source of serving, and of all of them together.

The rules are those of `inference/candidates.py` and `inference/sql/pick_candidates.sql`, offline: the same share of the
limit for each source, items the person had and items not there yet left out, merged by the best place. The lists are as
they would be if made at the request's instant; nearest neighbours are exact.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from inference.asked import RECENT_ITEMS
from orchestration.compute.co_visitation import (
    DAY_MICROSECONDS,
    Neighbours,
    WindowedPopularity,
    co_visitation,
    popularity,
    positive,
)
from orchestration.compute.evaluate import Scorer, aligned, best_items, interval
from orchestration.compute.lists import FRESH_DAYS, LIST_LENGTH, NEIGHBOURS, TRENDING_DAYS
from orchestration.compute.splits import Queries, Split

LIMIT = 500


@dataclass(frozen=True, slots=True)
class CandidateRecall:
    """Share of labels among the candidates; the interval is of the union, 95 % over people."""

    limit: int
    labels: int
    union: float
    interval: tuple[float, float]
    by_source: dict[str, float]  # within the source's own share of the limit
    without: dict[str, float]  # of the union, if the source were not there
    candidates_mean: float = field(default=0.0)  # different items in the union

    def table(self) -> str:
        """The figures as aligned text."""
        lines = [["source", f"recall@{self.limit}", "union without it"]]
        lines += [[name, f"{recall:.4f}", f"{self.without[name]:.4f}"] for name, recall in self.by_source.items()]
        lines.append(["union", f"{self.union:.4f}", f"{self.interval[0]:.4f}–{self.interval[1]:.4f}"])
        return f"{aligned(lines)}\n{self.labels} labels, {self.candidates_mean:.0f} candidates a request"


@dataclass(frozen=True, slots=True)
class Sources:
    """What serving draws candidates from. `similarity` scores items by the user vector, `wish` by the prompt's text.

    Either is None where there is none: no trained model, or requests without a prompt.
    """

    neighbours: Neighbours
    trending: WindowedPopularity
    counts: NDArray[np.float32]  # (items,) positive events, all time
    similarity: Scorer | None = None
    wish: Scorer | None = None


def sources_of(split: Split, *, similarity: Scorer | None = None, wish: Scorer | None = None) -> Sources:
    """The sources frozen at the split's cut; what is trending goes on, as the list that is made again every day does."""
    return Sources(
        co_visitation(split.train, k=NEIGHBOURS),
        WindowedPopularity(split.queries.interactions, days=TRENDING_DAYS),
        popularity(split.train),
        similarity,
        wish,
    )


def candidate_recall(split: Split, sources: Sources, *, limit: int = LIMIT, batch: int = 256) -> CandidateRecall:
    """Recall on the split's labels; each request is asked once."""
    queries = split.queries
    first, request = queries.requests()
    asked = queries.take(first)
    by_request = np.argsort(request, kind="stable")
    bound = np.searchsorted(request[by_request], np.arange(len(asked) + 1))
    found: dict[str, NDArray[np.bool_]] = {}
    without: dict[str, NDArray[np.bool_]] = {}
    union = np.zeros(len(queries), bool)
    catalogue = len(queries.interactions.item_ids)
    size = 0
    for begin in range(0, len(asked), batch):
        part = asked.take(slice(begin, begin + batch))
        places = {name: _places(items, catalogue) for name, items in pick(part, sources, limit=limit).items()}
        labels = by_request[bound[begin] : bound[begin + len(part)]]
        row, target = request[labels] - begin, queries.target[labels]
        best = np.minimum.reduce(list(places.values()))
        union[labels] = _within(best, row, target, limit)
        size += int(np.minimum(np.isfinite(best).sum(axis=1), limit).sum())
        for name, own in places.items():
            found.setdefault(name, np.zeros(len(queries), bool))[labels] = np.isfinite(own[row, target])
            others = [other for key, other in places.items() if key != name]
            rest = np.minimum.reduce(others) if others else np.full_like(own, np.inf)
            without.setdefault(name, np.zeros(len(queries), bool))[labels] = _within(rest, row, target, limit)
    return CandidateRecall(
        limit,
        len(queries),
        float(union.mean()),
        interval(union.astype(np.float64), queries.user),
        {name: float(hits.mean()) for name, hits in found.items()},
        {name: float(hits.mean()) for name, hits in without.items()},
        size / max(len(asked), 1),
    )


def pick(queries: Queries, sources: Sources, *, limit: int = LIMIT) -> dict[str, NDArray[np.int32]]:
    """Each source's items `(q, its share of the limit)`, best first, −1 where it has no more."""
    events = queries.interactions
    seen = queries.seen()
    at = queries.at
    there = np.ones(seen.shape, bool)
    if events.available_at is not None:
        there = events.available_at[None, :] <= at[:, None]
    picked = {}
    if sources.similarity is not None:
        picked["user vector"] = best_items(sources.similarity(queries), seen | ~there, limit // 2)
    if sources.wish is not None:
        picked["wish"] = best_items(sources.wish(queries), seen | ~there, limit // 3)
    # The lists look at what the person had before they are cut, and at what is there only afterwards, as the SQL does.
    evidence = _evidence(queries, sources.neighbours)
    picked["co-visitation"] = best_items(evidence, seen | (evidence <= 0), limit // 3)
    recent = sources.trending.at_each(at) + sources.counts / max(float(sources.counts.max(initial=0)), 1.0) * 1e-3
    picked["trending"] = _listed(recent.astype(np.float32), recent <= 0, seen, limit // 3)
    if events.available_at is not None:
        # Whole days of microseconds have more digits than a float32: items are put in order once, by their arrival.
        newest = np.empty(len(events.item_ids), np.float32)
        newest[np.argsort(-events.available_at, kind="stable")] = -np.arange(len(newest))
        new = there & (events.available_at[None, :] > at[:, None] - FRESH_DAYS * DAY_MICROSECONDS)
        picked["fresh"] = _listed(np.broadcast_to(newest, seen.shape), ~new, seen, limit // 10)
    return {name: _only(there, items) for name, items in picked.items()}


def merge(picked: list[NDArray[np.int32]], limit: int) -> NDArray[np.int32]:
    """`(q, limit)`: the items with the best place in any source, −1 where there are no more; ties by catalogue order."""
    items = max(int(source.max(initial=0)) for source in picked) + 1
    best = np.minimum.reduce([_places(source, items) for source in picked])
    return best_items(-best, np.isinf(best), limit)


def _places(picked: NDArray[np.int32], items: int) -> NDArray[np.float32]:
    """`(q, items)`: the place of each item in a source's `picked (q, n)`, infinite where it is not there."""
    places = np.full((len(picked), items + 1), np.inf, np.float32)  # the last column takes what is no item
    column = np.where(picked >= 0, picked, items)
    places[np.arange(len(picked))[:, None], column] = np.arange(1, picked.shape[1] + 1, dtype=np.float32)
    return places[:, :items]


def _within(
    best: NDArray[np.float32], row: NDArray[np.int64], target: NDArray[np.int32], limit: int
) -> NDArray[np.bool_]:
    """`(l,)`: whether `target (l,)` is among the `limit` best placed of its request `row (l,)`, as `merge` would say."""
    inside = np.zeros(len(row), bool)
    for some in range(0, len(row), 256):
        part = slice(some, some + 256)
        places, own = best[row[part]], best[row[part], target[part]][:, None]
        earlier = np.arange(best.shape[1]) < target[part][:, None]
        before = ((places < own) | ((places == own) & earlier)).sum(axis=1)
        inside[part] = np.isfinite(own[:, 0]) & (before < limit)
    return inside


def _evidence(queries: Queries, neighbours: Neighbours) -> NDArray[np.float32]:
    """`(q, items)`: what people went on to after the last different items that were not hidden, newer ones first."""
    events = queries.interactions
    items = len(events.item_ids)
    recent: list[list[int]] = []
    for start, stop in zip(queries.start.tolist(), queries.stop.tolist(), strict=True):
        liked = events.item[start:stop][positive(events.kind[start:stop])]
        recent.append(list(dict.fromkeys(liked[::-1].tolist()))[:RECENT_ITEMS])
    length = np.array([len(last) for last in recent], np.int64)
    request = np.repeat(np.arange(len(recent)), length)
    last = np.array([item for some in recent for item in some], np.int64)
    place = np.concatenate([*(np.arange(1, n + 1) for n in length), np.empty(0, np.int64)])
    weight = neighbours.score[last] / np.sqrt(place)[:, None]  # (m, k); an empty place has score 0
    cell = request[:, None] * items + np.maximum(neighbours.item[last], 0)
    scores = np.bincount(cell.ravel(), weight.ravel(), minlength=len(recent) * items)
    return scores.reshape(len(recent), items).astype(np.float32)


def _listed(
    scores: NDArray[np.float32], left_out: NDArray[np.bool_], seen: NDArray[np.bool_], size: int
) -> NDArray[np.int32]:
    """The best `size` of a stored list, which is cut at its own length before it is known who asks."""
    whole = best_items(scores, left_out, LIST_LENGTH)
    free = (whole >= 0) & ~np.take_along_axis(seen, np.maximum(whole, 0), axis=1)
    place = np.cumsum(free, axis=1) - 1
    row, column = np.nonzero(free & (place < size))
    kept = np.full((len(whole), size), -1, np.int32)
    kept[row, place[row, column]] = whole[row, column]
    return kept


def _only(there: NDArray[np.bool_], items: NDArray[np.int32]) -> NDArray[np.int32]:
    """What is there already; the others leave their places empty."""
    here = np.arange(len(items))[:, None]
    return np.where((items >= 0) & there[here, items], items, -1)
