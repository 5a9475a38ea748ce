"""Which labels validate, which the second stage learns from, and the hard candidates that stand beside each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from inference.asked import RECENT_ITEMS
from orchestration.compute.co_visitation import DAY_MICROSECONDS, Neighbours, WindowedPopularity, positive
from orchestration.compute.impressions import PassedOver
from orchestration.compute.interactions import Interactions
from orchestration.compute.lists import FRESH_DAYS, LIST_LENGTH
from orchestration.compute.splits import Queries, queries_for
from orchestration.compute.train_config import TrainConfig

SLATE = 64
"""Candidates of a training slate: the positive, then 63 mined negatives."""
RECENT_RATE = 0.4
"""Labels come from the newest events, this share of them: drawn at random there, they gave NDCG@10 0.104 on a validation
slice of MovieLens-100K where each person's last ten gave 0.099 (simulator 0.073 and 0.070)."""
NEVER = 1e4
"""As the log of an expectation: a candidate that must not count as a negative."""

SERVED = 500
"""Candidates of a request: a source's list is a half, a third or a tenth of that, as in `inference/candidates.py`."""
QUOTA = (21, 6, 18, 6, 2)
"""Negatives of a slate by the user vector, the wish, co-visitation, trending, fresh; of 63, the rest is popular or anything."""
UNIFORM = 6

_WISH_SHARPNESS = 20.0
_PART = 64


def recent_rows(interactions: Interactions) -> NDArray[np.int64]:
    """Rows of the newest `RECENT_RATE` of the events, ascending."""
    return _newest_rows(interactions, RECENT_RATE)


def newest_labels(interactions: Interactions, config: TrainConfig) -> Queries:
    """Some of the newest labels, each with the history that was visible in an earlier second."""
    newest = queries_for(interactions, _newest_rows(interactions, config.validation_rate), strictly_earlier=True)
    chosen = np.random.default_rng(config.seed).permutation(len(newest))[: config.validation_labels]
    return newest.take(np.sort(chosen))


def held_rows(interactions: Interactions, config: TrainConfig) -> NDArray[np.int64]:
    """Rows of the newest `config.held_rate` of the events, ascending, which only stage 2 learns; none where there is no stage 2."""
    return (
        _newest_rows(interactions, config.held_rate)
        if config.slate_epochs and config.slate_rows
        else np.empty(0, np.int64)
    )


def slate_labels(
    interactions: Interactions, recent: NDArray[np.int64], held: NDArray[np.int64], config: TrainConfig
) -> Queries:
    """Rows of stage 2, those `held` before others of the `recent` ones, else at random, with the history that was visible in
    an earlier second: as a request would see it."""
    # Mining costs a pass of the ranker per label: none is mined that no epoch will use.
    most = config.slate_rows * max(config.slate_epochs, 1)
    drawn = np.random.default_rng((config.seed, 6)).permutation(recent)
    rows = drawn[np.argsort(~np.isin(drawn, held), kind="stable")][:most]
    return queries_for(interactions, np.sort(rows), strictly_earlier=True)


def random_slates(
    interactions: Interactions, counts: NDArray[np.float32], seed: int, size: int = 512
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Some label rows `(l,)` with some candidates `(l, 64)`, popular ones more often."""
    generator = np.random.default_rng((seed, 7))
    rows = np.sort(generator.permutation(len(interactions))[:size]).astype(np.int64)
    share = np.cumsum(counts / counts.sum())
    items = np.searchsorted(share, generator.random((len(rows), SLATE))).clip(max=len(share) - 1)
    return rows, items.astype(np.int32)


@dataclass(frozen=True, slots=True)
class Sources:
    """What serving draws candidates from, as of each label; see `inference/candidates.py`."""

    similarity: Callable[[Queries], NDArray[np.float32]]  # the retriever's logits `(q, items)`, wish included
    neighbours: Neighbours
    trending: WindowedPopularity
    counts: NDArray[np.float32]  # (items,) popularity of all time: fills trending up
    available_at: NDArray[np.int64] | None  # (items,) microseconds UTC
    texts: NDArray[np.float32]  # (items, 384) unit vectors
    wishes: NDArray[np.float32]  # (labels, 384) each label's wish; zeros without one

    def weights(self, part: Queries, rows: NDArray[np.int64], banned: NDArray[np.bool_]) -> list[NDArray[np.float32]]:
        """How much each source wants each item, `(q, items)` each and 0 beyond the length of its list: user vector, wish,
        co-visitation, trending, fresh. `part` are the label rows `rows (q,)`; no list holds what is `banned (q, items)`."""
        logits = self.similarity(part)
        wished = self.wishes[rows]
        closeness = np.exp(_WISH_SHARPNESS * (wished @ self.texts.T - 1)) * wished.any(1, keepdims=True)
        day = part.at - part.at % DAY_MICROSECONDS
        days, place = np.unique(day, return_inverse=True)
        lists = (
            (np.exp(logits - logits.max(axis=1, keepdims=True)), SERVED // 2),
            (closeness, SERVED // 3),
            (self._visited(part), SERVED // 3),
            (np.stack([self._trending(int(at)) for at in days])[place], SERVED // 3),
            (np.stack([self._fresh(int(at)) for at in days])[place], SERVED // 10),
        )
        return [_first(np.where(banned, 0, weight), size) for weight, size in lists]

    def _visited(self, part: Queries) -> NDArray[np.float32]:
        """`(q, items)`: neighbours of the last different items, each worth 1/√place, newest first, as serving's SQL has it."""
        items = len(self.neighbours.item)
        liked = positive(part.interactions.kind)
        weights = np.zeros((len(part), items), np.float32)
        for row, (start, stop) in enumerate(zip(part.start.tolist(), part.stop.tolist(), strict=True)):
            newest = part.interactions.item[start:stop][liked[start:stop]][::-1].tolist()
            recent = list(dict.fromkeys(newest))[:RECENT_ITEMS]
            found = self.neighbours.item[recent]  # (r, k)
            worth = self.neighbours.score[recent] / np.sqrt(np.arange(1, len(recent) + 1))[:, None]
            np.add.at(weights[row], found[found >= 0], worth[found >= 0])
        return weights

    def _trending(self, at: int) -> NDArray[np.float32]:
        """`(items,)`: every item of the list alike, as all of it is offered; put in order by what is popular this week."""
        recent = self.trending.at(at) + self.counts / max(float(self.counts.max(initial=0)), 1.0) * 1e-3
        order = np.argsort(-recent, kind="stable")[:LIST_LENGTH]
        weights = np.zeros(len(recent), np.float32)
        # A little more for the better placed decides who is within the list once what a person had is out.
        weights[order] = np.where(recent[order] > 0, 1 + 1e-3 * np.arange(len(order))[::-1] / LIST_LENGTH, 0)
        return weights

    def _fresh(self, at: int) -> NDArray[np.float32]:
        """`(items,)`: what had arrived lately when the day `at` began, newer ones a little more."""
        if self.available_at is None:
            return np.zeros(len(self.counts), np.float32)
        since = at - FRESH_DAYS * DAY_MICROSECONDS
        new = (self.available_at > since) & (self.available_at <= at)
        age = np.where(new, at - np.where(new, self.available_at, at), 0) / (at - since)
        return np.where(new, 1 + 1e-3 * (1 - age), 0).astype(np.float32)


def mine(
    labels: Queries,
    sources: Sources,
    absent: Callable[[NDArray[np.int64]], NDArray[np.bool_]],
    seed: int,
    passed_over: PassedOver | None = None,
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Slates `(labels, 64)`, the positive first, and the log of how often each candidate was to be expected there.

    Negatives come from the sources that serving draws from, by `QUOTA`, the rest from the whole catalogue; never an item
    the person had before the label or one that was not there yet (`absent`). What a source with an empty list does not
    give, popularity does. Without the correction by the second array the ranker would learn that what its sources like
    is wrong. What the person had been shown and passed over is there for certain, and so without a correction.
    """
    generator = np.random.default_rng((seed, 3))
    negatives = SLATE - 1
    items = np.empty((len(labels), SLATE), np.int32)
    log_q = np.zeros((len(labels), SLATE), np.float32)
    # Similar lengths together: the retriever pads histories.
    order = np.argsort(labels.stop - labels.start, kind="stable")
    for begin in range(0, len(labels), _PART):
        rows = order[begin : begin + _PART]
        part = labels.take(rows)
        here = np.arange(len(part))
        banned = part.seen() | absent(part.at)
        banned[here, part.target] = True
        allowed = (~banned).astype(np.float32)
        expected = np.zeros(banned.shape)
        left = np.full((len(part), 1), float(negatives - sum(QUOTA) - UNIFORM))
        for weight, count in zip(sources.weights(part, rows, banned), QUOTA, strict=True):
            total = weight.sum(axis=1, keepdims=True)
            expected += count * weight / np.maximum(total, 1e-12)
            left += count * (total <= 0)
        for weight, share in ((allowed * sources.counts, left), (allowed, UNIFORM)):
            expected += share * weight / np.maximum(weight.sum(axis=1, keepdims=True), 1e-12)
        # Drawn without repetition in proportion to what the sources expect together (Gumbel top-k, Kool et al. 2019).
        draw = np.where(banned, -np.inf, np.log(np.maximum(expected, 1e-12)) + generator.gumbel(size=banned.shape))
        if passed_over is not None:
            label, shown = passed_over.before(part.user, part.at)
            offered = ~banned[label, shown]
            expected[label[offered], shown[offered]] = 1.0
            draw[label[offered], shown[offered]] = np.inf
        count = min(negatives, draw.shape[1])
        top = np.argpartition(-draw, count - 1, axis=1)[:, :count]
        # A catalogue smaller than a slate: the rest repeats what was picked.
        top = np.concatenate([part.target[:, None], top], axis=1)[:, np.arange(SLATE) % (count + 1)]
        items[rows] = top
        # A person who had nearly everything: what must not be offered is no negative either.
        log_q[rows] = np.where(
            banned[here[:, None], top], NEVER, np.log(np.clip(expected[here[:, None], top], 1e-6, 1))
        )
    log_q[:, 0] = 0
    return items, log_q


def _first(weights: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """`weights (q, items)`, 0 but for the `size` largest of each row."""
    if size >= weights.shape[1]:
        return weights
    least = np.partition(weights, -size, axis=1)[:, -size, None]
    return np.where(weights >= least, weights, 0)


def _newest_rows(interactions: Interactions, rate: float) -> NDArray[np.int64]:
    """Rows of the newest `rate` of the events, ascending; none of no events."""
    if len(interactions) == 0:
        return np.empty(0, np.int64)
    since = np.quantile(interactions.occurred_at, 1 - rate, method="lower")
    return np.flatnonzero(interactions.occurred_at >= since).astype(np.int64)
