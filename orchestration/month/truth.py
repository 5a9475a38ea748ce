"""What people really want on a day, and what they do with a list: the truth that every estimate is held against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import numpy as np
from numpy.typing import NDArray

from orchestration.month.plan import CLICK_AT, CLICK_SCALE, HIDE_AT, HIDE_MOST, K
from orchestration.sources.simulator import Simulator

Array = NDArray[np.float64]


def examination(places: int) -> Array:
    """`(places,)`: how likely it is that an item at each place is looked at."""
    return np.asarray(1 / np.log2(np.arange(2, places + 2)))


def taken(relevance: Array) -> Array:
    """The probability that who looks at items of that relevance takes them, of the same shape."""
    return np.asarray(1 / (1 + np.exp(-(relevance - CLICK_AT) / CLICK_SCALE)))


def clicks(relevance: Array) -> Array:
    """The probability of a click at each place of lists `(…, k)` of that relevance, in order."""
    return examination(relevance.shape[-1]) * taken(relevance)


def hides(relevance: Array) -> Array:
    """The probability of a hide at each place of lists `(…, k)`: of who looked, and did not take."""
    irrelevant = HIDE_MOST / (1 + np.exp((relevance - HIDE_AT) / CLICK_SCALE))
    return np.asarray(examination(relevance.shape[-1]) * (1 - taken(relevance)) * irrelevant)


@dataclass(frozen=True, slots=True)
class DayTruth:
    """The relevance `(u, i)` of every available item to everybody who asks on a day, at its noon."""

    users: dict[str, int]
    items: dict[str, int]
    relevance: Array

    @classmethod
    def of(cls, simulator: Simulator, user_ids: Sequence[str], item_ids: Sequence[str], at: datetime) -> DayTruth:
        pairs = simulator.relevance(np.repeat(user_ids, len(item_ids)).tolist(), list(item_ids) * len(user_ids), at)
        return cls(
            {user_id: row for row, user_id in enumerate(user_ids)},
            {item_id: column for column, item_id in enumerate(item_ids)},
            pairs.reshape(len(user_ids), len(item_ids)).astype(np.float64),
        )

    def of_list(self, user_id: str, item_ids: Sequence[str]) -> Array:
        """`(k,)`: the relevance of a list to a person."""
        return np.asarray(self.relevance[self.users[user_id], [self.items[item] for item in item_ids]])

    def best(self, user_id: str, had: set[str], k: int = K) -> Array:
        """`(k,)`: the relevance of the best list that could be shown, without what the person had."""
        row = self.relevance[self.users[user_id]].copy()
        row[[self.items[item] for item in had if item in self.items]] = -np.inf
        best = np.sort(row)[::-1][:k]
        return np.asarray(best[np.isfinite(best)])
