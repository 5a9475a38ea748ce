"""What was shown and passed over: the served log joined with its outcomes, as negatives for the slates of training.

A list says nothing of what nobody looked at. Of a list that led to an event, the items above the lowest one that was acted
upon were looked at and passed over ("click > skip above", Joachims et al. 2005, after eye tracking); those below it, and
lists that led to nothing, are left out. What a person did choose at any time of the training data is no negative of theirs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import psycopg
from numpy.typing import NDArray

from orchestration.compute.co_visitation import positive
from orchestration.compute.interactions import Interactions

KEPT_DAYS = 7
"""How long an item that was passed over counts against itself: moods change, and a list holds what fitted that day."""
MOST = 16
"""Passed-over items that a slate takes, the newest ones; the other 47 negatives come from the sources as ever."""
_DAY_MICROSECONDS = 86_400_000_000

_PASSED_OVER = """
    WITH acted AS (
        SELECT DISTINCT e.request_id, e.user_id, e.item_id FROM recent_events AS e
        WHERE e.request_id IS NOT NULL AND e.occurred_at <= to_timestamp(%(until)s)
    ), shown AS (
        SELECT r.user_id, r.served_at, s.item_id, s.place, a.item_id IS NOT NULL AS acted_upon,
            max(s.place) FILTER (WHERE a.item_id IS NOT NULL) OVER (PARTITION BY r.request_id) AS lowest
        FROM served_requests AS r CROSS JOIN LATERAL unnest(r.item_ids) WITH ORDINALITY AS s (item_id, place)
        LEFT JOIN acted AS a ON a.request_id = r.request_id AND a.user_id = r.user_id AND a.item_id = s.item_id
        WHERE r.served_at <= to_timestamp(%(until)s)
            AND EXISTS (SELECT FROM acted AS any_ WHERE any_.request_id = r.request_id AND any_.user_id = r.user_id)
    )
    SELECT user_id, item_id, (extract(epoch FROM served_at) * 1000000)::bigint FROM shown
    WHERE place < lowest AND NOT acted_upon ORDER BY user_id COLLATE "C", served_at, place
"""


@dataclass(frozen=True, slots=True)
class PassedOver:
    """`n` items that people passed over, by person and then by time; indices are those of the interactions."""

    user: NDArray[np.int32]  # (n,)
    item: NDArray[np.int32]  # (n,)
    shown_at: NDArray[np.int64]  # (n,) microseconds since 1970, UTC

    def __len__(self) -> int:
        return len(self.user)

    def before(self, user: NDArray[np.int32], at: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """For labels of `user (q,)` at `at (q,)`: number of the label `(m,)` and item `(m,)`, the newest `MOST` of the last
        `KEPT_DAYS` each. Nothing that was shown later: training must not know what a request could not."""
        first = np.searchsorted(self.user, user, "left")
        last = np.searchsorted(self.user, user, "right")
        labels, items = [np.empty(0, np.int64)], [np.empty(0, np.int32)]
        for label in np.flatnonzero(last > first).tolist():
            mine = slice(int(first[label]), int(last[label]))
            shown = self.shown_at[mine]
            since = np.searchsorted(shown, at[label] - KEPT_DAYS * _DAY_MICROSECONDS, "right")
            until = np.searchsorted(shown, at[label], "right")
            newest = np.unique(self.item[mine][max(since, until - MOST) : until])
            labels.append(np.full(len(newest), label, np.int64))
            items.append(newest)
        return np.concatenate(labels), np.concatenate(items)


def load_passed_over(connection: psycopg.Connection[Any], interactions: Interactions) -> PassedOver:
    """What the people of `interactions` passed over until the last of its events; nothing where no list was logged.

    Bounded by the events, not by now: a training that was interrupted and goes on mines what it would have mined.
    """
    none = PassedOver(np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.int64))
    if not len(interactions):
        return none
    until = int(interactions.occurred_at.max()) / 1_000_000
    rows = connection.execute(_PASSED_OVER, {"until": until}).fetchall()
    if not rows:
        return none
    user_ids, item_ids, shown_at = (np.array(column) for column in zip(*rows, strict=True))
    user, known_user = _places(interactions.user_ids, user_ids)
    item, known_item = _places(interactions.item_ids, item_ids)
    liked = positive(interactions.kind)
    chosen = _pairs(interactions, interactions.user[liked], interactions.item[liked])
    kept = known_user & known_item & ~np.isin(_pairs(interactions, user, item), chosen)
    order = np.lexsort((shown_at[kept], user[kept]))
    return PassedOver(user[kept][order], item[kept][order], shown_at[kept][order].astype(np.int64))


def _places(known: NDArray[np.str_], ids: NDArray[np.str_]) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Where each of `ids (n,)` stands in `known`, sorted, and whether it does."""
    if not len(known):
        return np.zeros(len(ids), np.int32), np.zeros(len(ids), bool)
    place = np.minimum(np.searchsorted(known, ids), len(known) - 1).astype(np.int32)
    return place, known[place] == ids


def _pairs(interactions: Interactions, user: NDArray[np.int32], item: NDArray[np.int32]) -> NDArray[np.int64]:
    """`(n,)`: one number per person and item."""
    return user.astype(np.int64) * max(len(interactions.item_ids), 1) + item
