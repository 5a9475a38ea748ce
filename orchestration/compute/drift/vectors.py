"""What people take and what they are shown as vectors, a person a week, and how far this week's lie from those before."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import psycopg
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pgvector.psycopg import register_vector

from orchestration.compute.drift.judge import (
    LEAST_REFERENCES,
    MMD,
    WAITING,
    Finding,
    decide,
    room,
)
from orchestration.compute.drift.mmd import PERMUTATIONS, median_distance, mmd
from orchestration.compute.drift.served import Request, Window
from orchestration.compute.drift.sketches import LEAST_CLUSTERS
from orchestration.compute.lake import Lake
from orchestration.compute.vectors import plain
from schemas.events import NEGATIVE_KINDS
from schemas.ranker import TEXT_DIM

VECTORS = "vectors"
MOST_PEOPLE = 2_000
"""People of a week, and of all the weeks before together, that are compared at most."""
FEW_PERMUTATIONS = 50
LEAST_DISCREPANCY = 0.1
"""MMD, of at most √2. Quiet weeks of the simulator's world, with its seasons and fashions, lie up to 0.07 apart."""

Items = Mapping[str, Iterable[str]]
"""Items by person."""


def taken(
    lake: Lake, connection: psycopg.Connection[Any], window: Window, *, most: int = MOST_PEOPLE, seed: int = 0
) -> dict[str, list[str]]:
    """What each person took in the window, from the lake, hides left out; of at most `most` people, chosen by `seed`."""
    kept = ~pc.field("kind").isin(sorted(NEGATIVE_KINDS))
    table = lake.events(connection, window.first, window.last).to_table(columns=["user_id", "item_id"], filter=kept)
    people = pc.unique(table["user_id"]).sort()
    if len(people) > most:
        chosen = np.sort(np.random.default_rng(seed).permutation(len(people))[:most])
        table = table.filter(pc.is_in(table["user_id"], value_set=people.take(pa.array(chosen))))
    found: dict[str, list[str]] = {}
    for user_id, item_id in zip(table["user_id"].to_pylist(), table["item_id"].to_pylist(), strict=True):
        found.setdefault(user_id, []).append(item_id)
    return found


def shown(requests: Sequence[Request], champion: str | None) -> dict[str, list[str]]:
    """What the champion showed each person; another model shows something else by right."""
    found: dict[str, list[str]] = {}
    for one in requests:
        if one.model_version == champion:
            found.setdefault(one.user_id, []).extend(one.item_ids)
    return found


def person_vectors(
    connection: psycopg.Connection[Any], items: Items, *, most: int = MOST_PEOPLE, seed: int = 0
) -> NDArray[np.float32]:
    """`(people, 384)`: the mean text vector of each person's items, of at most `most` people chosen by `seed`."""
    people = sorted(items)
    if len(people) > most:
        people = [people[place] for place in np.random.default_rng(seed).permutation(len(people))[:most]]
    wanted = sorted({item_id for person in people for item_id in items[person]})
    register_vector(connection)
    vectors = {
        item_id: plain(vector)
        for item_id, vector in connection.execute(
            "SELECT item_id, vector FROM text_vectors WHERE item_id = ANY(%s)", (wanted,)
        )
    }
    means = []
    for person in people:
        known = [vectors[item_id] for item_id in items[person] if item_id in vectors]
        if known:
            means.append(np.mean(known, axis=0))
    return np.array(means, np.float32).reshape(len(means), TEXT_DIM)


def compare_vectors(
    name: str, current: NDArray[np.float32], references: Sequence[NDArray[np.float32]], alpha: float, seed: int = 0
) -> Finding:
    """A finding on this week's people `(n, d)` against those of the weeks before `(m, d)` each."""
    about = (VECTORS, name, MMD, "week")
    references = [one for one in references if len(one) >= LEAST_CLUSTERS]
    if len(current) < LEAST_CLUSTERS or len(references) < LEAST_REFERENCES:
        words = (
            f"{len(current)} people, and {len(references)} weeks before with {LEAST_CLUSTERS}; "
            f"{LEAST_CLUSTERS} and {LEAST_REFERENCES} are needed"
        )
        return Finding(*about, WAITING, clusters=len(current), words=words)
    before = _thinned(np.concatenate(references), seed)
    width = median_distance(before, seed)
    distance = _root(mmd(current, before, width=width, permutations=0).squared)
    usual = max(
        _root(mmd(one, _thinned(np.concatenate(others), seed), width=width, permutations=0).squared)
        for one, others in (
            (references[place], [*references[:place], *references[place + 1 :]]) for place in range(len(references))
        )
    )
    # What is too near to matter needs no exact p-value.
    matters = distance >= max(LEAST_DISCREPANCY, room(len(references)) * usual)
    found = mmd(current, before, width=width, permutations=PERMUTATIONS if matters else FEW_PERMUTATIONS, seed=seed)
    state = decide(distance, found.p, least=LEAST_DISCREPANCY, usual=usual, references=len(references), alpha=alpha)
    sizes = (len(current), len(before), len(references))
    return Finding(*about, state, distance, found.p, LEAST_DISCREPANCY, usual, *sizes)


def _thinned(vectors: NDArray[np.float32], seed: int) -> NDArray[np.float32]:
    if len(vectors) <= MOST_PEOPLE:
        return vectors
    return vectors[np.random.default_rng(seed).permutation(len(vectors))[:MOST_PEOPLE]]


def _root(squared: float) -> float:
    return float(np.sqrt(max(squared, 0.0)))
