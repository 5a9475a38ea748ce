"""Batches of people through the ranker: their inputs as schemas/ranker.py names them, their vectors, candidates and scores."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from inference.asked import RECENT_ITEMS
from inference.assemble import crossed, graph_values
from inference.ranker import Ranker
from inference.scores.catalogue import Shelf
from inference.scores.choose import Entries, choose
from inference.scores.people import People
from schemas.events import KINDS, NEGATIVE_KINDS
from schemas.ranker import MAX_HISTORY

Floats = NDArray[np.float32]
Numbers = NDArray[np.int64]
_NEGATIVE = np.array([kind in NEGATIVE_KINDS for kind in KINDS])


@dataclass(slots=True)
class Spent:
    """Seconds that were spent on each step, over all threads."""

    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, step: str, since: float) -> float:
        """Count the time since an instant of `time.perf_counter()`; gives the present one."""
        now = time.perf_counter()
        self.seconds[step] = self.seconds.get(step, 0.0) + now - since
        return now

    def merge(self, other: Spent) -> None:
        """Add what another counted."""
        for step, seconds in other.seconds.items():
            self.seconds[step] = self.seconds.get(step, 0.0) + seconds


@dataclass(frozen=True, slots=True)
class Scored:
    """Lists of b people, best first: `rows (b,)` their places among the people, `items (b, k)`, -1 behind the last one,
    `scores (b, k)`; `candidates (b, n)` what they chose from, -1 behind the last one."""

    rows: Numbers
    items: Numbers
    scores: Floats
    candidates: Numbers


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many candidates each person has, how many items are kept, and how many people go through the graph at once.

    `ahead` people at a time look for their candidates, `at_once` of them are ranked: with few the activations stay in a
    core's own cache, and a second core works on others meanwhile. A GPU wants as many as there are.
    """

    candidates: int = 200
    kept: int = 50
    at_once: int = 8
    ahead: int = 64


def batches(people: People, size: int) -> Iterator[Numbers]:
    """Rows of `people`, `size` at a time, in order of how long their histories are: so little of a batch is padding."""
    order = np.argsort(np.diff(people.begins), kind="stable")
    for begin in range(0, len(order), size):
        yield order[begin : begin + size]


def score(people: People, rows: Numbers, shelf: Shelf, ranker: Ranker, sizes: Sizes, spent: Spent) -> Scored:
    """The lists of the people in `rows`: what a request of each would rank, ranked."""
    began = time.perf_counter()
    inputs = person_inputs(people, rows, shelf)
    parts = [slice(begin, begin + sizes.at_once) for begin in range(0, len(rows), sizes.at_once)]
    begun = []
    for part in parts:
        longest = int((people.begins[rows[part] + 1] - people.begins[rows[part]]).max(initial=1))
        own = {name: _tail(name, value[part], longest) for name, value in inputs.items()}
        began = spent.add("assemble", began)
        begun.append(ranker.begin(own))
        began = spent.add("user vectors", began)
    users = np.concatenate([one.user_vector for one in begun])
    candidates = choose(users, *_asked(people, rows), shelf, sizes.candidates, MAX_HISTORY)
    began = spent.add("candidates", began)
    scores = np.full(candidates.shape, -np.inf, np.float32)
    for part, one in zip(parts, begun, strict=True):
        chosen = candidates[part]
        described = candidate_inputs(people, rows[part], chosen, shelf)
        began = spent.add("assemble", began)
        scores[part] = np.where(chosen >= 0, ranker.finish(one, described), -np.inf)
        began = spent.add("rank", began)
    # As `rerank.best`: of equal scores the better placed candidate.
    order = np.argsort(-scores, axis=1, kind="stable")[:, : sizes.kept]
    items, best = np.take_along_axis(candidates, order, axis=1), np.take_along_axis(scores, order, axis=1)
    spent.add("assemble", began)
    return Scored(rows, items, best, candidates)


def person_inputs(people: People, rows: Numbers, shelf: Shelf) -> dict[str, NDArray[np.generic]]:
    """The inputs that describe the people in `rows` (b,), as `inference.ranker_inputs.person_inputs` makes one's."""
    b, dim = len(rows), shelf.vectors.shape[1]
    owners, events = _events(people, rows)
    # As there: what has no vector is left out, so that the newest that has one stands last.
    items = people.items[events]
    kept = np.flatnonzero(items < shelf.size)
    kept = kept[shelf.has_vector[items[kept]]]
    owners, events, items = owners[kept], events[kept], items[kept]
    counts = np.bincount(owners, minlength=b)
    h = max(int(counts.max(initial=0)), 1)
    begins = np.cumsum(counts) - counts
    columns = np.arange(len(owners)) - begins[owners] + h - counts[owners]
    vectors = np.zeros((b, h, dim), np.float32)
    kinds = np.zeros((b, h), np.int64)
    values, gaps, mask = (np.zeros((b, h), np.float32) for _ in range(3))
    vectors[owners, columns] = shelf.vectors[items]
    kinds[owners, columns] = people.kinds[events] + 1
    values[owners, columns] = graph_values(people.values[events])
    seconds = people.seconds[events]
    following = np.append(seconds[1:], people.at)
    following[columns == h - 1] = people.at
    # As `history_gaps`, of everybody at once.
    gaps[owners, columns] = np.maximum(following - seconds, 0.0).astype(np.float32)
    mask[owners, columns] = 1.0
    return {
        "context_features": people.context[rows],
        "context_mask": people.context_mask[rows],
        "prompt_vector": np.zeros((b, dim), np.float32),
        "prompt_mask": np.zeros(b, np.float32),
        "history_vectors": vectors,
        "history_kinds": kinds,
        "history_values": values,
        "history_gaps": gaps,
        "history_mask": mask,
    }


def candidate_inputs(
    people: People, rows: Numbers, candidates: Numbers, shelf: Shelf
) -> dict[str, NDArray[np.generic]]:
    """The inputs that describe `candidates (b, n)` of the people in `rows`; zeros where there is none, -1."""
    there = (candidates >= 0)[:, :, None]
    items = np.maximum(candidates, 0)
    values, masks = [shelf.values[items]], [shelf.mask[items]]
    for number in range(len(people.crossed)):
        value, mask = _crossed(people, number, rows, items, shelf)
        values.append(value)
        masks.append(mask)
    parts = {
        "candidate_vectors": shelf.vectors[items],
        "candidate_features": np.concatenate(values, 2),
        "candidate_mask": np.concatenate(masks, 2),
    }
    if not there.all():
        parts = {name: part * there for name, part in parts.items()}
    return {name: np.ascontiguousarray(part, np.float32) for name, part in parts.items()}


def _crossed(people: People, number: int, rows: Numbers, items: Numbers, shelf: Shelf) -> tuple[Floats, Floats]:
    """Features by category of the people in `rows`, carried over to their candidates `items (b, n)`."""
    mine = people.crossed[number]
    b, f = len(rows), mine.values.shape[1]
    begins, ends = (np.searchsorted(mine.owners, rows, side=side) for side in ("left", "right"))
    counts = ends - begins
    wide = int(counts.max(initial=0))
    if not wide:
        nothing = np.zeros((*items.shape, f), np.float32)
        return nothing, nothing
    owners = np.repeat(np.arange(b), counts)
    columns = np.arange(len(owners)) - (np.cumsum(counts) - counts)[owners]
    at = begins[owners] + columns
    values, mask = (np.zeros((b, wide, f), np.float32) for _ in range(2))
    values[owners, columns], mask[owners, columns] = mine.values[at], mine.mask[at]
    # Where a person's categories stand; the last column is for those that they have nothing of, and for padding.
    where = np.full((b, shelf.category_count + 1), wide, np.int64)
    where[owners, mine.categories[at]] = columns
    membership = np.zeros((*items.shape, wide + 1), np.float32)
    named = where[np.arange(b)[:, None, None], shelf.categories[items]]  # (b, n, c)
    np.put_along_axis(membership, named, np.float32(1), axis=2)
    return crossed(values, mask, membership[:, :, :wide])


def _asked(people: People, rows: Numbers) -> tuple[Entries, tuple[Numbers, Numbers]]:
    """The last items of the people in `rows`, newest first with places from 1, and all that they had."""
    owners, events = _events(people, rows)
    items = people.items[events]
    liked = np.flatnonzero(~_NEGATIVE[people.kinds[events]])[::-1]
    # Of each item the newest event: the first one from behind.
    wide = np.int64(items.max(initial=0) + 1)
    _, first = np.unique(owners[liked] * wide + items[liked], return_index=True)
    newest = liked[np.sort(first)]
    newest = newest[np.argsort(owners[newest], kind="stable")]
    mine = owners[newest]
    places = np.arange(1, len(mine) + 1) - np.searchsorted(mine, np.arange(len(rows)))[mine]
    kept = places <= RECENT_ITEMS
    return (mine[kept], items[newest][kept], places[kept]), (owners, items)


def _events(people: People, rows: Numbers) -> tuple[Numbers, Numbers]:
    """Owners (places in `rows`) and numbers of all events of the people in `rows`, in order."""
    begins, counts = people.begins[rows], people.begins[rows + 1] - people.begins[rows]
    owners = np.repeat(np.arange(len(rows)), counts)
    return owners, np.arange(len(owners)) + np.repeat(begins - np.cumsum(counts) + counts, counts)


def _tail(name: str, value: NDArray[np.generic], longest: int) -> NDArray[np.generic]:
    """An input without the padding that the longest history of the others brought."""
    return np.ascontiguousarray(value[:, -longest:]) if name.startswith("history_") else value
