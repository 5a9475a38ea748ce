"""A small model of the rewards of a list's places, for doubly robust estimates: it never judges the people it learned from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Ints = NDArray[np.int64]

FOLDS = 2
RIDGE = 1.0
"""In rows: as much as one more list without rewards says."""


@dataclass(frozen=True, slots=True)
class RewardModel:
    """`columns (n, m, f)`: what is known of each candidate; `weights (folds, k, f)`; `fold (n,)` says which one judges whom."""

    columns: Array
    weights: Array
    fold: Ints

    def of(self, place: int, candidates: Ints) -> Array:
        """`(n, c)`: the expected reward at `place` of `candidates (n, c)`, indices in the pool; 0 for −1."""
        known = np.take_along_axis(self.columns, np.maximum(candidates, 0)[..., None], axis=1)
        found = np.einsum("ncf,nf->nc", known, self.weights[self.fold, place])
        return np.asarray(np.where(candidates >= 0, np.clip(found, 0.0, 1.0), 0.0))


def fit_rewards(
    shown: Ints, logged_scores: Array, scores: Array, there: NDArray[np.bool_], rewards: Array, person: Ints
) -> RewardModel:
    """Least squares of the rewards at each place on both rankers' scores, for each fold on the people of the others.

    Arrays as in `off_policy.Logged`; `scores (n, m)` are the candidate's. Linear, because a wrong model costs width and
    nothing else, and is fitted thousands of times where the estimates are proven.
    """
    columns = _columns(_standard(logged_scores, there), _standard(scores, there))
    _, who = np.unique(person, return_inverse=True)
    fold = who % FOLDS
    k, f = shown.shape[1], columns.shape[2]
    weights = np.zeros((FOLDS, k, f))
    for place in range(k):
        taken = shown[:, place]
        known = np.take_along_axis(columns, np.maximum(taken, 0)[:, None, None], axis=1)[:, 0]
        for one in range(FOLDS):
            rows = (fold != one) & (taken >= 0)
            x = known[rows]
            weights[one, place] = np.linalg.solve(x.T @ x + RIDGE * np.eye(f), x.T @ rewards[rows, place])
    return RewardModel(columns, weights, fold)


def _standard(scores: Array, there: NDArray[np.bool_]) -> Array:
    """Scores of all pools together with mean 0 and spread 1, cut at three; 0 where no candidate is."""
    held = scores[there]
    spread = float(held.std()) or 1.0
    return np.where(there, np.clip((scores - float(held.mean())) / spread, -3, 3), 0.0)


def _columns(logged: Array, candidate: Array) -> Array:
    return np.stack(
        [np.ones_like(logged), logged, candidate, logged**2, candidate**2, logged * candidate, candidate**3], axis=-1
    )
