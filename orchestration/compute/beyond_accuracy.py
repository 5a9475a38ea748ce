"""What a hit rate does not tell of lists: what they cover, how new, how mixed, how popular, how true to taste and to themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from orchestration.compute.baselines import history_matrix
from orchestration.compute.co_visitation import popularity
from orchestration.compute.evaluate import aligned
from orchestration.compute.interactions import Interactions
from orchestration.compute.splits import Queries

SMOOTHING = 0.01
"""Share of the history's genres mixed into a list's, so that a genre the list lacks costs much and not infinitely."""


@dataclass(frozen=True, slots=True)
class BeyondAccuracy:
    """Of the top-k lists of some requests; None where what it needs was not given."""

    coverage_rate: float  # of the catalogue's items, in at least one list
    novelty_bits: float  # mean self-information of an item shown (Vargas & Castells 2011)
    diversity: float | None  # mean 1 − cosine of the texts of two items of a list (Ziegler et al. 2005)
    popularity_percentile: float  # mean, 1 for the most popular item
    exposure_gini: float  # 0: every item is shown as often, 1: only one is
    genre_divergence: float | None  # mean KL of a list's genres from the history's, in nats (Steck 2018)


@dataclass(frozen=True, slots=True)
class Reliability:
    """Calibration of probabilities; `bins` holds trials, mean probability and hit rate of each, from the least probable."""

    ece: float  # expected calibration error: |probability − hit rate|, weighted by trials (Naeini et al. 2015)
    mean_probability: float
    hit_rate: float
    bins: tuple[tuple[int, float, float], ...]


def beyond_accuracy(
    lists: NDArray[np.int32],
    requests: Queries | None,
    train: Interactions,
    *,
    k: int = 10,
    text_vectors: NDArray[np.float32] | None = None,
    item_genres: NDArray[np.bool_] | None = None,
) -> BeyondAccuracy:
    """Judge the first k of `lists (r, n)`, items best first with −1 for none, shown for `requests` (one each).

    `text_vectors (items, t)` and `item_genres (items, g)` describe the catalogue. A list's distance from its person's
    taste is taken over requests whose history has genres; without `requests` it is not taken.
    """
    lists = lists[:, :k]
    shown = lists >= 0
    items = len(train.item_ids)
    counts = popularity(train).astype(np.float64)
    exposure = np.bincount(lists[shown], minlength=items)
    # As if everything had been picked once more: what nobody had yet is new, not infinitely so.
    information = -np.log2((counts + 1) / (counts.sum() + items))
    return BeyondAccuracy(
        float((exposure > 0).mean()),
        _mean(information, lists, shown),
        None if text_vectors is None else _diversity(text_vectors, lists, shown),
        _mean(_percentile(counts), lists, shown),
        _gini(exposure),
        None
        if item_genres is None or requests is None
        else _genre_divergence(item_genres.astype(np.float64), lists, shown, requests),
    )


def beyond_accuracy_table(rows: Mapping[str, BeyondAccuracy]) -> str:
    """The figures of every scorer as aligned text."""
    names = [entry.name for entry in fields(BeyondAccuracy)]
    lines = [["", *(name.replace("_", " ") for name in names)]]
    for name, row in rows.items():
        figures = [getattr(row, figure) for figure in names]
        lines.append([name, *("–" if figure is None else f"{figure:.3f}" for figure in figures)])
    return aligned(lines)


def reliability(probability: NDArray[np.float64], hit: NDArray[np.bool_], *, bins: int = 10) -> Reliability:
    """How well `probability (n,)` says how often `hit (n,)` is true, in bins of about as many trials; equals stay together.

    Bins of equal width would put all but a few trials into one: that an item is picked is seldom probable.
    """
    edges = np.unique(np.quantile(probability, np.linspace(0, 1, bins + 1)[1:-1]))
    place = np.searchsorted(edges, probability, side="right")
    trials = np.bincount(place, minlength=bins)
    said = np.bincount(place, probability, minlength=bins) / np.maximum(trials, 1)
    true = np.bincount(place, hit.astype(np.float64), minlength=bins) / np.maximum(trials, 1)
    error = float((trials * np.abs(said - true)).sum() / max(len(hit), 1))
    rows = tuple((int(n), float(p), float(h)) for n, p, h in zip(trials, said, true, strict=True) if n)
    return Reliability(error, float(probability.mean()), float(hit.mean()), rows)


def pick_reliability(
    lists: NDArray[np.int32], scores: NDArray[np.float32], queries: Queries, calibration: tuple[float, float]
) -> Reliability:
    """Whether an item listed is picked as often as sigmoid(scale · score + offset) says; `calibration` is (scale, offset).

    `lists` and `scores (r, n)` are a row's of an evaluation on `queries`; each label picks one item, listed or not.
    """
    _, request = queries.requests()
    items, shown = lists[request], lists[request] >= 0
    scale, offset = calibration
    probability = 1 / (1 + np.exp(-(scale * scores[request].astype(np.float64) + offset)))
    return reliability(probability[shown], (items == queries.target[:, None])[shown])


def _mean(values: NDArray[np.float64], lists: NDArray[np.int32], shown: NDArray[np.bool_]) -> float:
    """Mean of an item's value `(items,)` over what was shown."""
    return float(values[lists[shown]].mean()) if shown.any() else 0.0


def _percentile(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """`(items,)`: share of the other items that are less popular; equals count half."""
    ordered = np.sort(counts)
    below, upto = np.searchsorted(ordered, counts, side="left"), np.searchsorted(ordered, counts, side="right")
    return np.asarray((below + (upto - below - 1) / 2) / max(len(counts) - 1, 1))


def _gini(exposure: NDArray[np.int64]) -> float:
    ordered = np.sort(exposure).astype(np.float64)
    n, total = len(ordered), ordered.sum()
    if n < 2 or total == 0:
        return 0.0
    # Divided by (n − 1) / n, its value when one item has everything: 1 is then reached at any size.
    return float(((2 * np.arange(1, n + 1) - n - 1) * ordered).sum() / (n * total) * n / (n - 1))


def _diversity(text_vectors: NDArray[np.float32], lists: NDArray[np.int32], shown: NDArray[np.bool_]) -> float:
    unit = text_vectors / np.maximum(np.linalg.norm(text_vectors, axis=1, keepdims=True), 1e-12)
    size = shown.sum(axis=1)
    together = np.zeros(len(lists))
    for begin in range(0, len(lists), 1024):
        rows = slice(begin, begin + 1024)
        total = (unit[lists[rows]] * shown[rows, :, None]).sum(axis=1)
        # |Σ v|² counts every pair twice and every item once.
        together[rows] = (total**2).sum(axis=1)
    pairs = size >= 2
    if not pairs.any():
        return 0.0
    likeness = (together[pairs] - size[pairs]) / (size[pairs] * (size[pairs] - 1))
    return float(1 - likeness.mean())


def _genre_divergence(
    item_genres: NDArray[np.float64], lists: NDArray[np.int32], shown: NDArray[np.bool_], requests: Queries
) -> float | None:
    # An item spreads one unit of interest over its genres.
    spread = item_genres / np.maximum(item_genres.sum(axis=1, keepdims=True), 1)
    taste = np.asarray(history_matrix(requests) @ spread)
    offered = np.zeros_like(taste)
    np.add.at(offered, np.nonzero(shown)[0], spread[lists[shown]])
    known = (taste.sum(axis=1) > 0) & (offered.sum(axis=1) > 0)
    if not known.any():
        return None
    p = taste[known] / taste[known].sum(axis=1, keepdims=True)
    q = offered[known] / offered[known].sum(axis=1, keepdims=True)
    q = (1 - SMOOTHING) * q + SMOOTHING * p
    ratio = np.divide(p, q, out=np.ones_like(p), where=p > 0)
    return float((p * np.log(ratio)).sum(axis=1).mean())
