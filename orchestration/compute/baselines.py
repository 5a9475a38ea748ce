"""Rows that stand in every evaluation: what a ranker must beat, from counts to matrix factorisation.

Fitted on the training events alone and frozen; a request's own history is folded in when it is asked.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from implicit.cpu.als import AlternatingLeastSquares
from numpy.typing import NDArray
from scipy import sparse
from threadpoolctl import threadpool_limits

from orchestration.compute.co_visitation import WindowedPopularity, co_visitation, popularity, positive
from orchestration.compute.evaluate import Scorer, score_co_visitation, score_popularity, score_windowed_popularity
from orchestration.compute.interactions import Interactions
from orchestration.compute.splits import Queries, Split, rows_between

FLOORS = ("popularity", "7-day popularity", "co-visitation", "item-kNN", "ALS")
_ROWS = 1024
"""Items whose neighbours are found at once: 80 MB of similarities at 20,000 items."""


def floors(split: Split) -> dict[str, Scorer]:
    """The rows of `FLOORS` for a split, fitted on its training events."""
    counts = popularity(split.train)
    return {
        "popularity": score_popularity(counts),
        # What was popular lately is public knowledge at the label's time; nothing is fitted.
        "7-day popularity": score_windowed_popularity(WindowedPopularity(split.queries.interactions, days=7)),
        "co-visitation": score_co_visitation(co_visitation(split.train), counts),
        "item-kNN": item_knn(split.train),
        "ALS": als(split.train),
    }


def als(
    train: Interactions,
    *,
    factors: int = 128,
    regularization: float = 5.0,
    alpha: float = 1.0,
    iterations: int = 15,
    seed: int = 0,
) -> Scorer:
    """Implicit-feedback matrix factorisation (Hu, Koren & Volinsky 2008), by the library `implicit`.

    An item that a person had counts 1 with confidence `alpha`, any other 0 with confidence 1. A request's history is folded
    in: its person's factors are solved for it, whoever was trained on. People without history get popularity, which also breaks ties.

    By NDCG@10 on validation (a slice of MovieLens-100K, 80–90 % of its events; the last but one of MovieLens-1M) more
    confidence or fewer factors only lost; a regularisation of 10 gave 0.066 and 0.049, 5 gives 0.065 and 0.049 and leaves
    something to learn where there are few events.
    """
    # A thread per person is the library's own; BLAS threads below them would only wait for each other.
    with threadpool_limits(1, "blas"):
        model = AlternatingLeastSquares(
            factors=factors,
            regularization=regularization,
            alpha=alpha,
            iterations=iterations,
            random_state=seed,
        )
        model.fit(_had(train), show_progress=False)
    by_popularity = _by_popularity(train)
    item_factors: NDArray[np.float32] = model.item_factors

    def score(queries: Queries) -> NDArray[np.float32]:
        with threadpool_limits(1, "blas"):
            person = model.recalculate_user(np.arange(len(queries)), history_matrix(queries))
            scores: NDArray[np.float32] = person @ item_factors.T + by_popularity
        return scores

    return score


def item_knn(train: Interactions, *, k: int = 200) -> Scorer:
    """Item-based neighbours by the cosine of who had them (Sarwar et al. 2001; Deshpande & Karypis 2004).

    A score is the sum over the history; each item keeps its `k` nearest. People without history get popularity, which also
    breaks ties. A constant in the divisor, which would make little of the chance meetings of rare items, only lost on
    validation (MovieLens-100K and 1M, as above).
    """
    neighbours = _nearest(_had(train), k)
    by_popularity = _by_popularity(train)

    def score(queries: Queries) -> NDArray[np.float32]:
        return np.asarray((history_matrix(queries) @ neighbours).todense(), np.float32) + by_popularity

    return score


def history_matrix(queries: Queries) -> sparse.csr_matrix:
    """`(q, items) float32`: 1 for every item of the history that its person did not only hide."""
    events = queries.interactions
    number, row = rows_between(queries.start, queries.stop)
    kept = positive(events.kind[row])
    return _ones(number[kept], events.item[row[kept]], (len(queries), len(events.item_ids)))


def _had(interactions: Interactions) -> sparse.csr_matrix:
    """`(people, items) float32`: 1 where a person had an item."""
    kept = positive(interactions.kind)
    shape = (len(interactions.user_ids), len(interactions.item_ids))
    return _ones(interactions.user[kept], interactions.item[kept], shape)


def _ones(row: NDArray[Any], column: NDArray[np.int32], shape: tuple[int, int]) -> sparse.csr_matrix:
    matrix = sparse.csr_matrix((np.ones(len(row), np.float32), (row, column)), shape=shape)
    matrix.sum_duplicates()
    matrix.data[:] = 1
    return matrix


def _nearest(had: sparse.csr_matrix, k: int) -> sparse.csr_matrix:
    """`(items, items)`: row i holds what i says of its k most similar items."""
    items = had.shape[1]
    # At least 1: what nobody had has no neighbours, whatever it is divided by.
    norm = np.sqrt(np.maximum(np.asarray(had.sum(axis=0)).ravel(), 1))
    by_item = had.T.tocsr()
    row, column, value = [], [], []
    for begin in range(0, items, _ROWS):
        together = np.asarray((by_item[begin : begin + _ROWS] @ had).todense(), np.float32)  # (rows, items)
        likeness = together / (norm[begin : begin + _ROWS, None] * norm)
        here = np.arange(len(likeness))
        likeness[here, begin + here] = 0
        top = np.argpartition(-likeness, min(k, items) - 1, axis=1)[:, :k]
        value.append(likeness[here[:, None], top].ravel())
        row.append(np.repeat(begin + here, top.shape[1]))
        column.append(top.ravel())
    matrix = sparse.csr_matrix(
        (np.concatenate(value), (np.concatenate(row), np.concatenate(column))), shape=(items, items)
    )
    matrix.eliminate_zeros()
    return matrix


def _by_popularity(train: Interactions) -> NDArray[np.float32]:
    """`(items,)`: too little to count against any other evidence."""
    counts = popularity(train)
    return counts / max(float(counts.max(initial=0)), 1.0) * np.float32(1e-6)
