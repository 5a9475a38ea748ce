"""Which labels are predicted from what: queries, and the splits that they come from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from orchestration.compute.co_visitation import positive
from orchestration.compute.interactions import Interactions

SECOND_MICROSECONDS = 1_000_000


@dataclass(frozen=True, slots=True)
class Queries:
    """`q` labels to predict, each from the slice of its person's events that could be known.

    Label `i` is row `label[i]` of `interactions`; its history is rows `start[i]:stop[i]`, oldest first. Where a history
    was shortened on purpose, `seen_from[i]` is where it began: what was cut off is forgotten, but not offered again.
    """

    interactions: Interactions
    label: NDArray[np.int64]  # (q,)
    start: NDArray[np.int64]  # (q,)
    stop: NDArray[np.int64]  # (q,)
    seen_from: NDArray[np.int64] | None = None  # (q,); None: start

    def __len__(self) -> int:
        return len(self.label)

    @property
    def user(self) -> NDArray[np.int32]:
        """`(q,)` index into the interactions' people."""
        return self.interactions.user[self.label]

    @property
    def at(self) -> NDArray[np.int64]:
        """`(q,)` the request's clock: microseconds since 1970, UTC."""
        return self.interactions.occurred_at[self.label]

    @property
    def target(self) -> NDArray[np.int32]:
        """`(q,)` the item to find."""
        return self.interactions.item[self.label]

    def take(self, rows: slice | NDArray[np.int64] | NDArray[np.bool_]) -> Queries:
        """The same events with only these labels."""
        seen_from = None if self.seen_from is None else self.seen_from[rows]
        return Queries(self.interactions, self.label[rows], self.start[rows], self.stop[rows], seen_from)

    def requests(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The `r` different requests behind the labels: a label of each `(r,)`, and each label's request `(q,)`.

        Labels of one person, instant and history are one request: a scorer has one answer for all of them.
        """
        begin = self.start if self.seen_from is None else self.seen_from
        key = np.stack([self.user.astype(np.int64), self.at, self.start, self.stop, begin])
        # Sorted by column tuples: np.unique over an axis takes several times as long.
        order = np.lexsort(key[::-1])
        new = np.ones(len(order), bool)
        new[1:] = (key[:, order[1:]] != key[:, order[:-1]]).any(axis=0)
        request = np.empty(len(order), np.int64)
        request[order] = np.cumsum(new) - 1
        return order[new], request

    def histories(self) -> list[NDArray[np.int32]]:
        """The items each label's person had before, oldest first."""
        return [self.interactions.item[start:stop] for start, stop in zip(self.start, self.stop, strict=True)]

    def seen(self) -> NDArray[np.bool_]:
        """`(q, items)`: what the person already had and must not be offered again."""
        mask = np.zeros((len(self), len(self.interactions.item_ids)), bool)
        row, event = rows_between(self.start if self.seen_from is None else self.seen_from, self.stop)
        mask[row, self.interactions.item[event]] = True
        return mask


@dataclass(frozen=True, slots=True)
class Split:
    """`train` is all that a model may be fitted on; `queries` is what it is asked."""

    name: str
    train: Interactions
    queries: Queries

    def sampled(self, requests: int, *, seed: int = 0) -> Split:
        """At most so many of the requests, chosen by `seed`, each with all its labels; the name says so if some are left out."""
        first, request = self.queries.requests()
        if len(first) <= requests:
            return self
        chosen = np.zeros(len(first), bool)
        chosen[np.random.default_rng(seed).permutation(len(first))[:requests]] = True
        name = f"{self.name}, {requests:,} of {len(first):,} requests"
        return Split(name, self.train, self.queries.take(chosen[request]))


def rows_between(start: NDArray[np.int64], stop: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The slices `start[i]:stop[i]` one after the other: number of the slice `(m,)` and row `(m,)`."""
    length = stop - start
    number = np.repeat(np.arange(len(start)), length)
    step = np.arange(int(length.sum())) - np.repeat(np.cumsum(length) - length, length)
    return number, np.repeat(start, length) + step


def queries_for(interactions: Interactions, labels: NDArray[np.int64], *, strictly_earlier: bool) -> Queries:
    """Queries for row indices `labels (q,)`; hides are no labels, nor is an item the person already had.

    `strictly_earlier`: the history ends before the label's second, not before its row. Most events of MovieLens share
    their second with another of the same person, and no request arrives between them.
    """
    user = interactions.user[labels]
    start = interactions.offsets()[user]
    stop = labels.copy()
    if strictly_earlier:
        stop = burst_starts(interactions)[labels]
    repeated = _is_repeat(interactions)[labels]
    kept = positive(interactions.kind[labels]) & ~repeated
    return Queries(interactions, labels[kept], start[kept], stop[kept])


def burst_starts(interactions: Interactions) -> NDArray[np.int64]:
    """`(n,)` row of the first event of the same person in the same second."""
    second = interactions.occurred_at // SECOND_MICROSECONDS
    first = np.ones(len(interactions), bool)
    first[1:] = (second[1:] != second[:-1]) | (interactions.user[1:] != interactions.user[:-1])
    return np.maximum.accumulate(np.where(first, np.arange(len(interactions)), 0)).astype(np.int64)


def leave_one_out(interactions: Interactions, *, holdout: str = "test", least_events: int = 3) -> Split:
    """Each person's last event is the test label, the one before it the validation label (Kang & McAuley 2018).

    `holdout` is "test" (train on all but the last) or "validation" (train on all but the last two).
    """
    offsets = interactions.offsets()
    enough = np.diff(offsets) >= least_events
    last = offsets[1:][enough] - 1
    keep = np.ones(len(interactions), bool)
    keep[last] = False
    if holdout == "test":
        queries = queries_for(interactions, last, strictly_earlier=False)
        return Split("leave-one-out test", interactions.take(keep), queries)
    if holdout != "validation":
        raise ValueError(f"holdout {holdout!r} is unknown; known: test, validation")
    # The test labels are gone for good here: nothing tuned on the validation labels can have seen them.
    known = interactions.take(keep)
    last = known.offsets()[1:][enough] - 1
    keep = np.ones(len(known), bool)
    keep[last] = False
    return Split("leave-one-out validation", known.take(keep), queries_for(known, last, strictly_earlier=False))


def time_split(interactions: Interactions, *, cut_rate: float = 0.9, until_rate: float = 1.0) -> Split:
    """Train on the first `cut_rate` of the events by time; predict every later one from strictly earlier seconds.

    Models stay frozen at the cut while histories go on; people and items that appear only later are included. Every
    positive event after the cut is a label, except of an item that the person already had.
    `until_rate` < 1 leaves the newest events out altogether: that is how a validation slice before the cut is made.
    """
    ordered = np.sort(interactions.occurred_at)
    cut = ordered[min(int(len(ordered) * cut_rate), len(ordered) - 1)]
    until = ordered[int(len(ordered) * until_rate)] if until_rate < 1 else ordered[-1] + 1
    known = interactions.take(interactions.occurred_at < until)
    late = np.flatnonzero(known.occurred_at >= cut).astype(np.int64)
    return Split(
        f"time split {cut_rate:g}–{until_rate:g}",
        known.take(known.occurred_at < cut),
        queries_for(known, late, strictly_earlier=True),
    )


def _is_repeat(interactions: Interactions) -> NDArray[np.bool_]:
    """`(n,)`: the person had this item in an earlier row."""
    key = interactions.user.astype(np.int64) * max(len(interactions.item_ids), 1) + interactions.item
    repeat = np.ones(len(interactions), bool)
    repeat[np.unique(key, return_index=True)[1]] = False
    return repeat
