"""A request's candidates and their scores, while Postgres searches: for a process that has the items in memory.

    Postgres    co-visitation, lists, today │ search by the wish │ search by the user vector
    we          encode the wish             │ user vector        │ rank what is certain      │ rank the rest

What co-visitation and the lists give is known long before the search has ended. Most of it is among the candidates
however that ends, because candidates are taken by their place in each source; so it is put together and ranked while the
database works on. A score does not depend on what else is ranked beside it, and so the answer is the same as if everything
had been ranked at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from inference import cached_items
from inference.cached_items import CachedItems, Picked
from inference.candidate_parts import pick_in_parts
from inference.candidates import Candidates, Filters, most_of
from inference.live import Columns, utc_day
from inference.machine import PROCESSORS
from inference.ranker import Begun, Inputs, Ranker
from inference.ranker_inputs import candidate_inputs
from inference.store import Store
from schemas.errors import Unavailable

WORTH_RANKING = 32
"""With fewer that are certain, a second run costs more than it saves."""


class Models(Protocol):
    """What ranking in parts needs of the models; see inference/models.py."""

    def finish_ranking(
        self, ranker: Ranker, begun: Begun, candidates: Inputs, left_ms: float
    ) -> NDArray[np.float32]: ...


@dataclass(frozen=True, slots=True)
class Ranked:
    """n candidates, the inputs that describe them, and their scores `(n,)`."""

    candidates: Candidates
    inputs: Inputs
    scores: NDArray[np.float32]


@dataclass(slots=True)
class Overlap:
    """One request's candidates, in parts."""

    models: Models
    ranker: Ranker
    items: CachedItems
    views: dict[str, Columns]
    """The person's."""
    at: datetime
    limit: int
    filters: Filters
    recent: Sequence[str]
    wish: Callable[[], NDArray[np.float32] | None] | None
    """Waits for the vector of the wish, if the request has one."""
    left_ms: Callable[[], float]
    step: Callable[[str], AbstractContextManager[None]]
    begin: Callable[[], Begun]
    begun: Begun | None = None
    _store: Store | None = None
    _early: Ranked | None = None
    _chosen: NDArray[np.intp] = field(default_factory=lambda: np.zeros(0, np.intp))
    """Places in the first part of those that are ranked early."""
    _failure: Unavailable | None = None

    def run(self, store: Store, timeout_ms: float) -> Ranked | None:
        """Pick and rank; the picking may take `timeout_ms`.

        None where a partition of features ended in between, so that the parts are of different ones. Raises what the
        store and the models raise.
        """
        self._store = store
        parts = pick_in_parts(
            store,
            at=self.at,
            filters=self.filters,
            limit=self.limit,
            timeout_ms=timeout_ms,
            champion=self.ranker.version,
            dim=self.ranker.dim,
            wish=self.wish,
            recent=self.recent,
            items=self.items,
            vector=self._vector,
            meanwhile=self._rank_certain,
        )
        if self._failure is not None:
            raise self._failure
        assert parts is not None
        return self._rank_rest(parts) if len({part.newest for part in parts}) == 1 else None

    @property
    def _wished(self) -> bool:
        return self.wish is not None and self.wish() is not None

    def _vector(self) -> NDArray[np.float32] | None:
        try:
            self.begun = self.begun or self.begin()
        except Unavailable as failure:  # told when the connection is free again
            self._failure = failure
            return None
        vector: NDArray[np.float32] = self.begun.user_vector[0]
        return vector

    def _rank_certain(self, first: Picked) -> None:
        assert self.begun is not None
        assert self._store is not None
        self._early, self._chosen = None, np.zeros(0, np.intp)
        # A graph in one piece would go through the history once more for each run. And with more requests at the database
        # than processors, none of these waits for it: then two runs are nothing but dearer than one.
        if self.begun.states is None or self._store.in_use > PROCESSORS:
            return
        sure = cached_items.certain(first, most_of(self.limit), self.limit, wish=self._wished)
        chosen = np.flatnonzero(first.there(self.items, self.at)[:sure])
        if len(chosen) < WORTH_RANKING:
            return
        try:
            self._early, self._chosen = self._ranked(first.take(chosen)), chosen
        except Unavailable as failure:
            self._failure = failure

    def _rank_rest(self, parts: Sequence[Picked]) -> Ranked:
        merged = cached_items.merged(parts, self.items, self.at, self.limit)
        ends = np.cumsum([len(part) for part in parts])
        where = np.full(ends[-1], -1, np.intp)
        where[self._chosen] = np.arange(len(self._chosen))
        order = where[merged.at]  # among those that are ranked, first the early ones
        late: list[Picked] = []
        ranked_so_far = len(self._chosen)
        for part, end in zip(parts, ends.tolist(), strict=True):
            mine = np.flatnonzero((order < 0) & (merged.at < end))
            late.append(part.take(merged.at[mine] - (end - len(part))))
            order[mine] = ranked_so_far + np.arange(len(mine))
            ranked_so_far += len(mine)
        runs = [self._early] if self._early is not None else []
        rest = cached_items.joined(late)
        if len(rest) or not runs:
            runs.append(self._ranked(rest))
        return Ranked(
            cached_items.in_order([run.candidates for run in runs], order, merged, self.items),
            {name: np.concatenate([run.inputs[name] for run in runs], axis=1)[:, order] for name in runs[0].inputs},
            np.concatenate([run.scores for run in runs])[order],
        )

    def _ranked(self, picked: Picked) -> Ranked:
        assert self.begun is not None
        with self.step("rank"):
            candidates = cached_items.candidates_of(picked, self.items, utc_day(self.at))
            rows = candidate_inputs(candidates, self.views, self.at)
            if not len(candidates):
                return Ranked(candidates, rows, np.zeros(0, np.float32))
            return Ranked(
                candidates, rows, self.models.finish_ranking(self.ranker, self.begun, rows, self.left_ms())[0]
            )
