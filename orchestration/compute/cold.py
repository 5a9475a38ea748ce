"""How a scorer treats the new: items with text only, people with few events, people with a wish only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from orchestration.compute.co_visitation import positive
from orchestration.compute.evaluate import MakeSlates, Scorer, SlateFeatures, aligned, best_items, judge
from orchestration.compute.interactions import Interactions
from orchestration.compute.splits import Queries, Split
from schemas.views import CROSS_VIEWS

HISTORY_LENGTHS = (0, 1, 3, 5)
"""Events that new people have had, for the rise of quality with each."""

_NEIGHBOUR_EVENTS = 5
"""Events whose mean text stands for a person. Of 1, 3, 5, 10, 20 and 50, five find most hidden items of MovieLens-1M
(recall@50 0.076, other items hidden than any test hides; ten find 0.071, the last alone 0.062)."""


def hide_items(interactions: Interactions, *, share: float = 0.1, seed: int = 0) -> Split:
    """Take `share` of the items with events out of training, chosen by `seed`; ask for the last of them that each person had.

    Nothing of a hidden item is left in training or in a history, and nothing that a person did after the label:
    `Split.train` is what came before it, `queries` is one label for everybody who had a hidden item with anything before.
    Hidden items keep their place in the catalogue, so their text is known.
    """
    hidden = np.zeros(len(interactions.item_ids), bool)
    held = np.unique(interactions.item)
    hidden[np.random.default_rng(seed).permutation(held)[: round(share * len(held))]] = True
    concerned = hidden[interactions.item]
    row = np.arange(len(interactions))
    label = np.full(len(interactions.user_ids), -1, np.int64)
    asked = concerned & positive(interactions.kind)
    np.maximum.at(label, interactions.user[asked], row[asked])
    end = np.where(label >= 0, label, len(interactions))[interactions.user]
    known = ~concerned & (row < end)
    kept = interactions.take(known | (row == end))
    place = np.cumsum(known | (row == end)) - 1
    labels = place[label[label >= 0]]
    start = kept.offsets()[kept.user[labels]]
    queries = Queries(kept, labels, start, labels.copy())
    return Split(f"{hidden.sum()} hidden items", interactions.take(known), queries.take(queries.stop > queries.start))


def recall_at(scorer: Scorer, queries: Queries, k: int = 50) -> NDArray[np.bool_]:
    """`(q,)`: whether each label is among the first k of all items not seen before; the mean is recall@k."""
    return np.asarray(judge(scorer, queries).ranks <= k)


def nearest_to_mean(text_vectors: NDArray[np.float32], *, last: int = _NEIGHBOUR_EVENTS) -> Scorer:
    """Items whose text `(items, t)` is nearest to the mean text of the last events."""
    unit = text_vectors / np.maximum(np.linalg.norm(text_vectors, axis=1, keepdims=True), 1e-12)

    def score(queries: Queries) -> NDArray[np.float32]:
        mean = np.zeros((len(queries), unit.shape[1]), np.float32)
        for row, history in enumerate(queries.histories()):
            if len(history):
                mean[row] = unit[history[-last:]].mean(axis=0)
        scores: NDArray[np.float32] = mean @ unit.T
        return scores

    return score


def nearest_to_last(text_vectors: NDArray[np.float32]) -> Scorer:
    """Items whose text `(items, t)` is nearest to that of the last event."""
    return nearest_to_mean(text_vectors, last=1)


@dataclass(frozen=True, slots=True)
class ColdItems:
    """Recall@k of hidden items by a scorer and by the better of the plain text neighbours."""

    k: int
    labels: int
    recall: float
    text_recall: dict[str, float]
    ratio: float
    low: float  # of the ratio, 95 % over people
    high: float


def cold_items(
    scorer: Scorer, queries: Queries, text_vectors: NDArray[np.float32], *, k: int = 50, seed: int = 0
) -> ColdItems:
    """A scorer's recall of hidden items over that of text neighbours, on the queries of `hide_items`."""
    found = recall_at(scorer, queries, k)
    bars = {
        "mean of the last": recall_at(nearest_to_mean(text_vectors), queries, k),
        "nearest to the last": recall_at(nearest_to_last(text_vectors), queries, k),
    }
    bar = max(bars.values(), key=lambda hits: float(hits.mean()))
    # One label each, so drawing labels is drawing people.
    drawn = np.random.default_rng(seed).integers(0, len(found), (1000, len(found)))
    ratios = found[drawn].sum(axis=1) / np.maximum(bar[drawn].sum(axis=1), 1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return ColdItems(
        k,
        len(found),
        float(found.mean()),
        {name: float(hits.mean()) for name, hits in bars.items()},
        float(found.sum() / max(bar.sum(), 1)),
        float(low),
        float(high),
    )


def shorten_histories(queries: Queries, events: int) -> Queries:
    """The same labels, from the last `events` of each history.

    What is cut off is still not offered, so the same items are ranked at every length and only what is known differs.
    """
    start = np.maximum(queries.start, queries.stop - events)
    return replace(queries, start=start, seen_from=queries.start if queries.seen_from is None else queries.seen_from)


def stranger(slates: MakeSlates) -> MakeSlates:
    """The same slates as of somebody never met: nothing known of the person, nor of the person with a candidate.

    A shortened history goes with it: else the features would still tell of all that was cut off.
    """
    crossed = sum(len(view.features) for view in CROSS_VIEWS)

    def make(rows: NDArray[np.int64], candidates: NDArray[np.int32]) -> SlateFeatures:
        known = slates(rows, candidates)
        of_items = np.arange(known.candidate_features.shape[2]) < known.candidate_features.shape[2] - crossed
        return SlateFeatures(
            np.zeros_like(known.context_features),
            np.zeros_like(known.context_mask),
            known.candidate_features * of_items,
            known.candidate_mask * of_items,
        )

    return make


@dataclass(frozen=True, slots=True)
class GenreLift:
    """Rates of a genre among the first k: with the wish, without one, and in the catalogue."""

    genre: str
    wished: float
    unwished: float
    catalogue: float

    @property
    def lift(self) -> float:
        """How many times as often as in the catalogue."""
        return self.wished / self.catalogue


@dataclass(frozen=True, slots=True)
class GenreLifts:
    """Every genre's, and `lift`: mean rate with the wish over mean rate in the catalogue, which no rare genre rules."""

    k: int
    genres: tuple[GenreLift, ...]
    lift: float

    def table(self) -> str:
        """The figures as aligned text."""
        lines = [["genre", f"in top {self.k}", "without a wish", "in the catalogue", "lift"]]
        lines += [
            [row.genre, f"{row.wished:.2f}", f"{row.unwished:.2f}", f"{row.catalogue:.2f}", f"{row.lift:.1f}"]
            for row in self.genres
        ]
        return f"{aligned(lines)}\nlift {self.lift:.2f}"


def genre_lift(
    scorer: Callable[[NDArray[np.float32] | None], Scorer],
    queries: Queries,
    wishes: NDArray[np.float32],
    item_genres: NDArray[np.bool_],
    genres: list[str],
    *,
    k: int = 20,
    least_items: int = 20,
) -> GenreLifts:
    """What a wish for each genre does to the list of somebody of whom nothing else is known.

    `scorer` makes a scorer for one wish, a row of `wishes (g, …)`, or for None; `queries` are requests of people without
    history, `item_genres (items, g)` says what is of which genre. Genres with fewer than `least_items` items cannot fill
    a list and are left out.
    """
    shared = item_genres.mean(axis=0)

    def rates(of: Scorer) -> NDArray[np.float64]:
        scores = of(queries)
        lists = best_items(scores, queries.seen(), k)
        return np.asarray(item_genres[lists[lists >= 0]].mean(axis=0))

    unwished = rates(scorer(None))
    rows = tuple(
        GenreLift(genre, float(rates(scorer(wishes[place]))[place]), float(unwished[place]), float(shared[place]))
        for place, genre in enumerate(genres)
        if item_genres[:, place].sum() >= least_items
    )
    lift = sum(row.wished for row in rows) / max(sum(row.catalogue for row in rows), 1e-12)
    return GenreLifts(k, rows, lift)
