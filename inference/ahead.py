"""A person's list that was scored ahead (inference/score_all.py), as a request falls back on it: where it is read, how it ranks.

It comes with the floor's own candidates, in the same statement, so that it costs no round trip and is read only when no
model can rank. A list counts while it is young enough, and if the model that made it serves or is older than the one that
does: a release that cannot be loaded leaves the lists of the one before, and one that was rolled back leaves nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

import numpy as np
from numpy.typing import NDArray

SOURCE = 64
"""The bit of this source among those of `inference.candidates.SOURCES`."""
LISTED = (
    "(SELECT u.item_id, u.score, u.place, s.model_version FROM user_scores AS s "
    "JOIN model_versions AS made_by ON made_by.version = s.model_version "
    "CROSS JOIN LATERAL unnest(s.item_ids, s.scores) WITH ORDINALITY AS u (item_id, score, place) "
    "WHERE s.user_id = %(ahead_user)s AND s.scored_at >= %(ahead_since)s AND made_by.created_at <= ("
    "SELECT v.created_at FROM model_aliases AS a JOIN model_versions AS v USING (version) WHERE a.alias = 'champion') "
    # Who asked to be forgotten reads as unknown from that moment on.
    "AND NOT EXISTS (SELECT FROM erasure_requests AS q WHERE q.user_id = %(ahead_user)s))"
)
"""Items of the list with scores, places from 1 and the model that made it."""


@dataclass(frozen=True, slots=True)
class Ahead:
    """Whose list is wanted, and since when it must have been scored."""

    user_id: str
    since: datetime

    def source(self, allowed: str) -> str:
        """The sub-select that picks candidates; `allowed` is a condition on `{0}`, an item's id."""
        return (
            f"(SELECT l.item_id, {SOURCE} AS source, l.place, 0::float8 AS evidence FROM {LISTED} AS l "
            f"WHERE {allowed.format('l.item_id')})"
        )

    def parameters(self) -> Mapping[str, object]:
        """The values that the statement names."""
        return {"ahead_user": self.user_id, "ahead_since": self.since}


def ranked(listed: NDArray[np.float32], floor: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scores `(n,)`: those of the list as they are, then everything else in the order of the `floor`'s.

    `listed (n,)` is NaN for what is not in the list.
    """
    there = np.isfinite(listed)
    if not there.any():
        return floor
    below = listed[there].min() - 1
    return np.where(there, listed, below - (floor.max() - floor)).astype(np.float32)
