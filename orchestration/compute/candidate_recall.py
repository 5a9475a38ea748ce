"""How often the item to find is among the candidates: of every source of serving, and of all of them together.

The rules are those of `inference/candidates.py` and `inference/sql/pick_candidates.sql`, offline: the same share of the
limit for each source, items the person had and items not there yet left out, merged by the best place. The lists are as
they would be if made at the request's instant; nearest neighbours are exact.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from inference.recommend import RECENT_ITEMS
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
    size = 0
    for begin in range(0, len(asked), batch):
        part = asked.take(slice(begin, begin + batch))
        picked = pick(part, sources, limit=limit)
        labels = by_request[bound[begin] : bound[begin + len(part)]]
        row, target = request[labels] - begin, queries.target[labels]
        everything = merge(list(picked.values()), limit)
        union[labels] = _has(everything, row, target)
        size += int((everything >= 0).sum())
        for name, items in picked.items():
            found.setdefault(name, np.zeros(len(queries), bool))[labels] = _has(items, row, target)
            rest = merge([other for key, other in picked.items() if key != name], limit)
            without.setdefault(name, np.zeros(len(queries), bool))[labels] = _has(rest, row, target)
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
    if not picked:
        return np.full((1, limit), -1, np.int32)
    items = max(int(source.max(initial=0)) for source in picked) + 1
    best = np.full((len(picked[0]), items + 1), np.inf, np.float32)  # the last column takes what is no item
    here = np.arange(len(best))[:, None]
    for source in picked:
        column = np.where(source >= 0, source, items)
        best[here, column] = np.minimum(best[here, column], np.arange(1, source.shape[1] + 1, dtype=np.float32))
    best = best[:, :items]
    return best_items(-best, np.isinf(best), limit)


def _evidence(queries: Queries, neighbours: Neighbours) -> NDArray[np.float32]:
    """`(q, items)`: what people went on to after the last different items that were not hidden, newer ones first."""
    events = queries.interactions
    scores = np.zeros((len(queries), len(events.item_ids)), np.float32)
    for row, (start, stop) in enumerate(zip(queries.start.tolist(), queries.stop.tolist(), strict=True)):
        liked = events.item[start:stop][positive(events.kind[start:stop])]
        recent = list(dict.fromkeys(liked[::-1].tolist()))[:RECENT_ITEMS]
        weight = neighbours.score[recent] / np.sqrt(np.arange(1, len(recent) + 1, dtype=np.float32))[:, None]
        np.add.at(scores[row], np.maximum(neighbours.item[recent], 0), weight)  # an empty place has score 0
    return scores


def _listed(
    scores: NDArray[np.float32], left_out: NDArray[np.bool_], seen: NDArray[np.bool_], size: int
) -> NDArray[np.int32]:
    """The best `size` of a stored list, which is cut at its own length before it is known who asks."""
    whole = best_items(scores, left_out, LIST_LENGTH)
    on_list = np.zeros((len(seen), seen.shape[1] + 1), bool)
    np.put_along_axis(on_list, np.where(whole >= 0, whole, seen.shape[1]).astype(np.int64), True, axis=1)
    return best_items(scores, ~on_list[:, :-1] | seen, size)


def _only(there: NDArray[np.bool_], items: NDArray[np.int32]) -> NDArray[np.int32]:
    """What is there already; the others leave their places empty."""
    here = np.arange(len(items))[:, None]
    return np.where((items >= 0) & there[here, items], items, -1)


def _has(items: NDArray[np.int32], row: NDArray[np.int64], target: NDArray[np.int32]) -> NDArray[np.bool_]:
    """`(l,)`: whether `target (l,)` is among the items of its request `row (l,)`."""
    found: NDArray[np.bool_] = (items[row] == target[:, None]).any(axis=1)
    return found
