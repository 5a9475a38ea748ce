"""Explored lists from the served log, as arrays for off-policy estimates, and what a shadow would have shown instead."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import psycopg
import pyarrow as pa
from numpy.typing import NDArray

from orchestration.compute.duck import duck
from orchestration.compute.experiments.metrics import ATTRIBUTED_DAYS, CLICK_KINDS
from orchestration.compute.lake import Lake
from orchestration.compute.off_policy import Estimate, Evaluation, Logged, NoSupport, difference, evaluate
from orchestration.compute.outcomes import load_outcomes

Array = NDArray[np.float64]

MOST_LISTS = 200_000
"""The newest so many explored lists are read at most."""
PLACES = 10
"""Of each list, at most: weights grow with every place."""

_LISTS = (
    "SELECT request_id, user_id, served_at, item_ids[:%(places)s], propensities[:%(places)s], candidate_ids, candidate_scores "
    "FROM served_requests WHERE propensities IS NOT NULL AND candidate_ids IS NOT NULL AND cardinality(item_ids) > 0 "
    "AND served_at >= %(since)s AND served_at < %(until)s AND (%(asked)s::text[] IS NULL OR request_id = ANY(%(asked)s)) "
    f"ORDER BY served_at DESC LIMIT {MOST_LISTS}"
)
_CLICKS = (
    "SELECT DISTINCT o.request_id, o.item_id FROM outcomes AS o JOIN explored AS e USING (request_id, user_id) "
    f"WHERE o.kind = ANY(?) AND o.occurred_at < e.served_at + INTERVAL {ATTRIBUTED_DAYS} DAY"
)
_EXPLORED = pa.schema(
    [("request_id", pa.string()), ("user_id", pa.string()), ("served_at", pa.timestamp("us", tz="UTC"))]
)
_SHADOWS = (
    "SELECT request_id, item_ids FROM shadow_requests WHERE experiment = %(experiment)s AND arm = %(arm)s "
    "AND served_at >= %(since)s AND served_at < %(until)s"
)


def read_explored(
    connection: psycopg.Connection[Any],
    lake: Lake,
    since: datetime,
    until: datetime,
    *,
    places: int = PLACES,
    asked: list[str] | None = None,
) -> tuple[Logged, list[str], list[list[str]]]:
    """The explored lists of those days with their clicks; their request ids; their pools' item ids.

    `asked` keeps those requests only. Lists that show what their pool lacks are left out: nothing can be said of them.
    """
    values = {"since": since, "until": until, "places": places, "asked": asked}
    rows = connection.execute(_LISTS, values).fetchall()
    clicks = _clicks(connection, lake, [row[:3] for row in rows])
    kept, requests, pools = [], [], []
    for request_id, user_id, _, item_ids, propensities, pool, scores in rows:
        index = {item_id: place for place, item_id in enumerate(pool)}
        if all(item_id in index for item_id in item_ids):
            shown = [index[item_id] for item_id in item_ids]
            clicked = [float((request_id, item_id) in clicks) for item_id in item_ids]
            kept.append((user_id, shown, propensities, scores, clicked))
            requests.append(request_id)
            pools.append(pool)
    n, k = len(kept), max((len(row[1]) for row in kept), default=0)
    m = max((len(pool) for pool in pools), default=0)
    shown_at = np.full((n, k), -1, np.int64)
    chance, rewards = np.ones((n, k)), np.zeros((n, k))
    there, logged_scores = np.zeros((n, m), bool), np.zeros((n, m))
    for row, (_, shown, propensities, scores, clicked) in enumerate(kept):
        shown_at[row, : len(shown)] = shown
        chance[row, : len(shown)] = propensities
        rewards[row, : len(shown)] = clicked
        there[row, : len(scores)] = True
        logged_scores[row, : len(scores)] = scores
    _, person = np.unique(np.array([row[0] for row in kept], dtype=np.str_), return_inverse=True)
    return Logged(shown_at, chance, there, logged_scores, rewards, person.astype(np.int64)), requests, pools


def _clicks(
    connection: psycopg.Connection[Any], lake: Lake, lists: Sequence[tuple[str, str, datetime]]
) -> set[tuple[str, str]]:
    """Request and item of every click of the person whom one of the `lists` (request, person, when) was served to."""
    if not lists:
        return set()
    served = [at for _, _, at in lists]
    with duck() as db:
        load_outcomes(db, connection, lake, min(served), max(served) + timedelta(days=ATTRIBUTED_DAYS))
        columns = [
            pa.array(column, kind) for column, kind in zip(zip(*lists, strict=True), _EXPLORED.types, strict=True)
        ]
        db.register("explored", pa.table(columns, schema=_EXPLORED))
        return set(db.execute(_CLICKS, [list(CLICK_KINDS)]).fetchall())


def shadow_scores(
    connection: psycopg.Connection[Any], experiment: str, arm: str, since: datetime, until: datetime
) -> dict[str, list[str]]:
    """What a shadow would have shown, in order, by request."""
    values = {"experiment": experiment, "arm": arm, "since": since, "until": until}
    return dict(connection.execute(_SHADOWS, values).fetchall())


def judge_shadow(
    connection: psycopg.Connection[Any], lake: Lake, experiment: str, arm: str, since: datetime, until: datetime
) -> tuple[Evaluation, Estimate]:
    """What a shadow's lists would be worth, and how much more than the lists of the ranker that was explored.

    Judged are as many places as the log supports. Raises NoSupport if that is none.
    """
    lists = shadow_scores(connection, experiment, arm, since, until)
    logged, requests, pools = read_explored(connection, lake, since, until, asked=list(lists))
    scores = np.full(logged.scores.shape, -1.0)
    for row, (request_id, pool) in enumerate(zip(requests, pools, strict=True)):
        rank = {item_id: place for place, item_id in enumerate(lists[request_id])}
        # Below everything it names, in the pool's own order; an item it names and the pool lacks makes room for the next,
        # which the weights count as a list that could not be shown only where it comes first.
        scores[row, : len(pool)] = [-float(rank.get(item_id, len(rank) + place)) for place, item_id in enumerate(pool)]
    return judge_most(logged, scores)


def judge_most(logged: Logged, scores: Array) -> tuple[Evaluation, Estimate]:
    """A candidate with `scores (n, m)` and its lead over the logged ranker, over as many places as the log supports for
    both. Raises NoSupport, with the reason of the first place, if that is none."""
    for places in range(logged.shown.shape[1], 0, -1):
        cut = logged.first(places)
        try:
            candidate = evaluate(cut, scores)
            return candidate, difference(candidate, evaluate(cut, cut.scores))
        except NoSupport:
            if places == 1:
                raise
    return evaluate(logged, scores), Estimate(0.0, 0.0, 0.0, 0.0)
