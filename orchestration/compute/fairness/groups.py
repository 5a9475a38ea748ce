"""Groups of items and segments of people that a fairness report looks at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import psycopg
from numpy.typing import NDArray

from orchestration.compute.fairness.exposure import Groups
from orchestration.compute.interactions import Interactions
from orchestration.compute.segments import HISTORY_LENGTHS

PROVIDER, CATEGORY, POPULARITY = "provider", "category", "popularity"
BUCKETS = (("head", 0.2), ("middle", 0.6), ("tail", 1.0))
"""Popularity buckets: the most popular fifth of the catalogue, the two fifths below, the others."""
NEW_DAYS = 28
"""A person is new for so many days after their first event."""


def item_groups(
    connection: psycopg.Connection[Any], interactions: Interactions, since: datetime, provider: str
) -> dict[str, Groups]:
    """The groups of every item, by what they are groups of.

    `provider` names the attribute that says whose an item is; no such kind where no item has it. Popularity counts what
    people did before `since`: what the days themselves made popular is their outcome.
    """
    rows = connection.execute("SELECT item_id, categories, attributes->>%s FROM items", (provider,)).fetchall()
    found: dict[str, Groups] = {
        CATEGORY: {
            item_id: {name: 1 / len(categories) for name in categories} if categories else {"(none)": 1.0}
            for item_id, categories, _ in rows
        },
        POPULARITY: popularity_buckets(interactions, since),
    }
    if any(whose for _, _, whose in rows):
        found[PROVIDER] = {item_id: {whose or "(none)": 1.0} for item_id, _, whose in rows}
    return found


def popularity_buckets(interactions: Interactions, since: datetime) -> Groups:
    """Each item's bucket by its events before `since`."""
    before = interactions.occurred_at < round(since.timestamp() * 1_000_000)
    counts = np.bincount(interactions.item[before], minlength=len(interactions.item_ids))
    order = np.argsort(-counts, kind="stable")
    share = np.empty(len(order))
    share[order] = (np.arange(len(order)) + 1) / max(len(order), 1)
    return {
        item_id: {next(name for name, upto in BUCKETS if part <= upto + 1e-9): 1.0}
        for item_id, part in zip(interactions.item_ids.tolist(), share.tolist(), strict=True)
    }


def people_segments(
    interactions: Interactions,
    people: Sequence[str],
    at: Sequence[datetime],
    profiles: Mapping[str, Mapping[str, Any]],
    columns: Sequence[str],
) -> dict[str, NDArray[np.bool_]]:
    """Which requests `(r,)`, by person and instant, each segment holds.

    By the length of the history at that instant, by how long the person has been there, and by each of `columns` of the
    profile, which are only those that somebody declared.
    """
    micros = np.array([round(one.timestamp() * 1_000_000) for one in at], np.int64)
    place = {person: number for number, person in enumerate(interactions.user_ids.tolist())}
    offsets = interactions.offsets()
    length = np.zeros(len(people), np.int64)
    first = np.full(len(people), np.iinfo(np.int64).max)
    for row, person in enumerate(people):
        if (number := place.get(person)) is not None:
            mine = interactions.occurred_at[offsets[number] : offsets[number + 1]]
            length[row] = np.searchsorted(mine, micros[row])
            first[row] = mine[0] if len(mine) else first[row]
    found = {}
    for low, high in HISTORY_LENGTHS:
        words = f"{low}" if low == high else f"{low}+" if high is None else f"{low}–{high}"
        found[f"history of {words} events"] = (length >= low) & (length <= (np.inf if high is None else high))
    new = first > micros - round(timedelta(days=NEW_DAYS).total_seconds() * 1_000_000)
    found[f"new (first event within {NEW_DAYS} days)"], found["old"] = new, ~new
    for column in columns:
        values = np.array([str(profiles.get(person, {}).get(column, "(none)")) for person in people])
        found |= {f"{column}: {value}": values == value for value in np.unique(values).tolist()}
    return found
