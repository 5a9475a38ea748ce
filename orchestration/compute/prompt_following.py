"""How far the ranker's lists move towards a wish, and the weight at which serving adds the wish's own likeness.

Everything here is measured on what the ranker was trained and validated on; no test label is looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from inference.rerank import follow_wish
from orchestration.compute.cold import stranger
from orchestration.compute.evaluate import MakeSlates, RankerScorer, Scorer, gain, interval
from orchestration.compute.prompt_evaluation import countable, lift
from orchestration.compute.splits import Queries
from orchestration.compute.trained_ranker import TrainedRanker
from orchestration.compute.wishes import Wishes

WEIGHTS = (0.0, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 60.0)
"""Logits per unit of cosine that are tried; 0 is the model alone."""
UNMEASURED_WEIGHT = 20.0
"""Where a catalogue has no categories, so that nothing can be measured: what was chosen on MovieLens-100K."""
LEAST_LIFT = 3.0
"""Of a category in the first 20 of somebody of whom nothing is known but the wish for it."""


@dataclass(frozen=True, slots=True)
class Following:
    """What one weight does: lift for the wish alone, NDCG@10 on validation labels with a wish that fits the label."""

    weight: float
    genre_lift: float
    ndcg_at_10: float


@dataclass(frozen=True, slots=True)
class PromptFollowing:
    """Every weight that was tried, the one chosen, and what the same labels score without a wish."""

    rows: tuple[Following, ...]
    wish_weight: float
    genre_lift: float
    ndcg_at_10_with_wish: float
    ndcg_at_10_without_wish: float
    gain_low: float
    gain_high: float
    categories: int
    labels: int

    def words(self) -> str:
        """The choice for people."""
        alone = next(row for row in self.rows if row.weight == 0)
        return (
            f"wishes: a category's share in the first 20 is {self.genre_lift:.1f} times the catalogue's at weight "
            f"{self.wish_weight:g} ({alone.genre_lift:.1f} by the model alone), over {self.categories} categories; "
            f"validation NDCG@10 {self.ndcg_at_10_without_wish:.4f} without a wish, {self.ndcg_at_10_with_wish:.4f} with one "
            f"that fits"
        )


@dataclass(frozen=True, slots=True)
class WishedScorer:
    """A ranker asked as serving asks it when there is a wish: its candidates, its score, moved towards the wish.

    `texts (q, 384)` are the wishes of the queries whose labels are `labels (q,)`, ascending; a zero row is no wish.
    """

    ranker: RankerScorer
    projection: tuple[NDArray[np.float32], NDArray[np.float32]]
    text_vectors: NDArray[np.float32]
    labels: NDArray[np.int64]
    texts: NDArray[np.float32]
    weight: float

    def __call__(self, queries: Queries) -> NDArray[np.float32]:
        asking = replace(self.ranker, wish_vectors=self._in_item_space, sources=(*self.ranker.sources, self.likeness))
        return follow_wish(asking(queries), self.likeness(queries), self.weight)

    def likeness(self, queries: Queries) -> NDArray[np.float32]:
        """`(q, items)` cosine of each query's wish and every item's text."""
        return np.asarray(self._texts(queries) @ self.text_vectors.T, np.float32)

    def _texts(self, queries: Queries) -> NDArray[np.float32]:
        return self.texts[np.searchsorted(self.labels, queries.label)]

    def _in_item_space(self, queries: Queries) -> NDArray[np.float32]:
        weight, bias = self.projection
        texts = self._texts(queries)
        projected = texts @ weight.T + bias
        projected /= np.maximum(np.linalg.norm(projected, axis=1, keepdims=True), 1e-12)
        return np.asarray(projected * texts.any(axis=1, keepdims=True), np.float32)


def measure_following(
    trained: TrainedRanker,
    validation: Queries,
    slates: MakeSlates,
    wishes: Wishes,
    text_vectors: NDArray[np.float32],
    sources: tuple[Scorer, ...],
    *,
    rerank: int,
    weights: Sequence[float] = WEIGHTS,
) -> PromptFollowing | None:
    """Try every weight and choose: the best NDCG@10 with a wish among those that reach the least lift.

    `slates` are over the table of `validation`; `sources` as in `RankerScorer`. If no weight reaches the lift, the one
    with the highest is chosen. None where no validation label has a category to wish for.
    """
    generator = np.random.default_rng((trained.config.seed, 11))
    texts, meant = wishes.draw(validation.target, generator)
    asks = np.flatnonzero(meant.any(1))
    labelled = validation.take(asks)
    if not len(labelled):
        return None
    ranker = trained.scorer(slates, rerank=rerank, sources=sources)
    plain = gain(_ranks(ranker(labelled), labelled), 10)
    wished = WishedScorer(ranker, trained.text_projection(), text_vectors, labelled.label, texts[asks], 0.0)
    categories = countable(wishes.item_categories)
    nobody = strangers(labelled, len(categories))
    unknown = WishedScorer(
        # Popularity alone: whoever has no history has nothing that somebody went on to.
        trained.scorer(stranger(slates), rerank=rerank, sources=sources[:1]),
        wished.projection,
        text_vectors,
        nobody.label,
        wishes.category_vectors[categories],
        0.0,
    )
    # The ranker is asked once: weights differ in what is added to its scores.
    scores, likeness = wished(labelled), wished.likeness(labelled)
    alone, alone_likeness = unknown(nobody), unknown.likeness(nobody)
    rows, gains = [], []
    for weight in weights:
        gains.append(gain(_ranks(follow_wish(scores, likeness, weight), labelled), 10))
        moved = follow_wish(alone, alone_likeness, weight)
        rows.append(Following(weight, lift(moved, categories, wishes.item_categories), float(gains[-1].mean())))
    able = [row for row in rows if row.genre_lift >= LEAST_LIFT or not len(categories)]
    best = max(able, key=lambda row: row.ndcg_at_10) if able else max(rows, key=lambda row: row.genre_lift)
    low, high = interval(gains[rows.index(best)] - plain, labelled.user)
    return PromptFollowing(
        tuple(rows),
        best.weight,
        best.genre_lift,
        best.ndcg_at_10,
        float(plain.mean()),
        low,
        high,
        len(categories),
        len(labelled),
    )


def _ranks(scores: NDArray[np.float32], queries: Queries) -> NDArray[np.int64]:
    """`(q,)` rank of each label by its own row of `scores (q, items)`: a wish is the label's, not its request's."""
    own = scores[np.arange(len(queries)), queries.target][:, None]
    earlier = np.arange(scores.shape[1])[None, :] < queries.target[:, None]
    better = ((scores > own) | ((scores == own) & earlier)) & ~queries.seen()
    return np.asarray(1 + better.sum(1), np.int64)


def strangers(queries: Queries, count: int) -> Queries:
    """`count` requests of people of whom nothing is known, at the newest instants of the table of `queries`."""
    events = queries.interactions
    newest = np.sort(np.argsort(events.occurred_at, kind="stable")[-count:]) if count else np.empty(0, np.int64)
    return Queries(events, newest, newest, newest)
