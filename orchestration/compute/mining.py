"""Which labels validate, which the second stage learns from, and the hard candidates that stand beside each."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from orchestration.compute.co_visitation import Neighbours, popularity
from orchestration.compute.interactions import Interactions
from orchestration.compute.splits import Queries, queries_for
from orchestration.compute.train_config import TrainConfig

SLATE = 64
"""Candidates of a training slate: the positive, then 63 mined negatives."""
RECENT_RATE = 0.4
"""Labels come from the newest events, this share of them: drawn at random there, they gave NDCG@10 0.104 on a validation
slice of MovieLens-100K where each person's last ten gave 0.099 (simulator 0.073 and 0.070)."""
NEVER = 1e4
"""As the log of an expectation: a candidate that must not count as a negative."""

_PART = 64


def recent_rows(interactions: Interactions) -> NDArray[np.int64]:
    """Rows of the newest `RECENT_RATE` of the events, ascending."""
    return _newest_rows(interactions, RECENT_RATE)


def newest_labels(interactions: Interactions, config: TrainConfig) -> Queries:
    """Some of the newest labels, each with the history that was visible in an earlier second."""
    newest = queries_for(interactions, _newest_rows(interactions, config.validation_rate), strictly_earlier=True)
    chosen = np.random.default_rng(config.seed).permutation(len(newest))[: config.validation_labels]
    return newest.take(np.sort(chosen))


def slate_labels(interactions: Interactions, recent: NDArray[np.int64], config: TrainConfig) -> Queries:
    """Some of the `recent` rows at random, with the history that was visible in an earlier second: as a request would see it."""
    # Mining costs a pass of the ranker per label: none is mined that no epoch will use.
    most = config.slate_rows * max(config.slate_epochs, 1)
    rows = np.sort(np.random.default_rng((config.seed, 6)).permutation(recent)[:most])
    return queries_for(interactions, rows, strictly_earlier=True)


def random_slates(
    interactions: Interactions, counts: NDArray[np.float32], seed: int, size: int = 512
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Some label rows `(l,)` with some candidates `(l, 64)`, popular ones more often."""
    generator = np.random.default_rng((seed, 7))
    rows = np.sort(generator.permutation(len(interactions))[:size]).astype(np.int64)
    share = np.cumsum(counts / counts.sum())
    items = np.searchsorted(share, generator.random((len(rows), SLATE))).clip(max=len(share) - 1)
    return rows, items.astype(np.int32)


def mine(
    labels: Queries,
    similarity: Callable[[Queries], NDArray[np.float32]],
    neighbours: Neighbours,
    absent: Callable[[NDArray[np.int64]], NDArray[np.bool_]],
    seed: int,
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Slates `(labels, 64)`, the positive first, and the log of how often each candidate was to be expected there.

    Negatives come from the sources that serving draws from: a third are the retriever's own top items (`similarity`
    gives its logits `(q, items)`), a third follow the last events by counts, the rest are popular or uniform; never an
    item the person had before the label or one that was not there yet (`absent`). Without the correction by the second
    array the ranker would learn that what its sources like is wrong.
    """
    events = labels.interactions
    generator = np.random.default_rng((seed, 3))
    counts = popularity(events)
    popular = counts / counts.sum()
    negatives = SLATE - 1
    quota = np.array([negatives // 3, negatives // 3, negatives // 6])
    quota = np.append(quota, negatives - quota.sum())
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
        logits = similarity(part)
        sources = (
            np.exp(logits - logits.max(axis=1, keepdims=True)),
            neighbours.score_histories(part.histories()),
            np.broadcast_to(popular, banned.shape),
            np.ones(banned.shape),
        )
        expected = np.zeros(banned.shape)
        for source, count in zip(sources, quota, strict=True):
            weight = np.where(banned, 0, source)
            expected += count * weight / np.maximum(weight.sum(axis=1, keepdims=True), 1e-12)
        # Drawn without repetition in proportion to what the sources expect together (Gumbel top-k, Kool et al. 2019).
        draw = np.where(banned, -np.inf, np.log(np.maximum(expected, 1e-12)) + generator.gumbel(size=banned.shape))
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


def _newest_rows(interactions: Interactions, rate: float) -> NDArray[np.int64]:
    """Rows of the newest `rate` of the events, ascending; none of no events."""
    if len(interactions) == 0:
        return np.empty(0, np.int64)
    since = np.quantile(interactions.occurred_at, 1 - rate, method="lower")
    return np.flatnonzero(interactions.occurred_at >= since).astype(np.int64)
