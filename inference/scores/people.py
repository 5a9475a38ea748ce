"""A chunk of people as arrays: who they are, their newest events and their features, in as many questions as one needs.

The features come by the online read that a request makes (`schemas.online_sql`, `inference.live`), for all of the chunk
at once, and are finished by the same code.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

import numpy as np
import psycopg
from numpy.typing import NDArray

from inference.assemble import finish
from inference.live import Columns, live_columns, utc_day
from inference.scores.catalogue import Catalogue
from inference.sql_files import statement
from schemas import online_sql
from schemas.consent import consent_default
from schemas.events import KINDS
from schemas.features import FeatureView
from schemas.ranker import MAX_HISTORY
from schemas.views import CONTEXT_VIEWS, CROSS_VIEWS

Floats = NDArray[np.float32]
Numbers = NDArray[np.int64]

_KIND = {kind: number for number, kind in enumerate(KINDS)}
_AMONG = "user_id = ANY(%(users)s::text[])"


@dataclass(frozen=True, slots=True)
class Crossed:
    """Features by category of a view: `owners (r,)` whose they are, `categories (r,)`, `values`, `mask (r, f)`."""

    owners: Numbers
    categories: Numbers
    values: Floats
    mask: Floats


@dataclass(frozen=True, slots=True)
class People:
    """m people at the instant `at`, in seconds.

    The events of person i, oldest first, are `begins[i]:begins[i + 1]` of `items` (numbers of the catalogue; those from
    its size on are unknown to it), `kinds` (places in KINDS), `values` (NaN: none) and `seconds`.
    """

    at: float
    begins: Numbers
    items: Numbers
    kinds: Numbers
    values: Floats
    seconds: NDArray[np.float64]
    context: Floats
    context_mask: Floats
    crossed: tuple[Crossed, ...]
    """One of each of CROSS_VIEWS."""

    def __len__(self) -> int:
        return len(self.begins) - 1


def next_people(connection: psycopg.Connection, after: str, most: int) -> tuple[list[str], str | None]:
    """Those of the next `most` people after `after`, in order, who did not ask to be forgotten and agree to be personalised;
    and the last one looked at, None if there is nobody more."""
    parameters = {"after": after, "most": most, "unless_said": consent_default()}
    rows = connection.execute(statement("next_people"), parameters).fetchall()
    return [user_id for user_id, hidden in rows if not hidden], rows[-1][0] if rows else None


def read_people(
    connection: psycopg.Connection, users: list[str], catalogue: Catalogue, at: datetime
) -> tuple[People, bool]:
    """What a request of each of `users` would read at the present `at`; and whether it would have had their features."""
    today = utc_day(at)
    place = {user_id: row for row, user_id in enumerate(users)}
    entities = online_sql.entities((*CONTEXT_VIEWS, *CROSS_VIEWS))
    parameters = {"users": users, "at": at, "today": today}
    with connection.pipeline():
        history = connection.cursor(binary=True).execute(statement("read_histories"), parameters)
        reads = [
            connection.cursor(binary=True).execute(online_sql.read_entity_sql(entity, _AMONG), parameters)
            for entity in entities
        ]
    views: dict[str, Columns] = {}
    for entity, cursor in zip(entities, reads, strict=True):
        views |= live_columns(entity, cursor.fetchall(), today, len(entity.keys))
    begins, items, kinds, values, seconds = _histories(history.fetchall(), place, catalogue)
    parts = [_context(view, views[view.name], place, at.timestamp()) for view in CONTEXT_VIEWS]
    settled = all(views[view.name].settled for view in CONTEXT_VIEWS)
    people = People(
        at.timestamp(),
        begins,
        items,
        kinds,
        values,
        seconds,
        np.concatenate([part[0] for part in parts], 1),
        np.concatenate([part[1] for part in parts], 1),
        tuple(_crossed(view, views[view.name], place, catalogue, at.timestamp()) for view in CROSS_VIEWS),
    )
    return people, settled


def _histories(
    rows: list[tuple[str, bytes, bytes, bytes]], place: dict[str, int], catalogue: Catalogue
) -> tuple[Numbers, Numbers, Numbers, Floats, NDArray[np.float64]]:
    """Rows `(user_id, item_ids, kinds, packed)`: texts with a zero between, pairs of instant and value."""
    rows = sorted(rows, key=lambda row: place[row[0]])
    items: list[str] = []
    kinds: list[str] = []
    packed: list[bytes] = []
    counts = np.zeros(len(place), np.int64)
    for user_id, item_ids, names, numbers in rows:
        own = item_ids.decode().split("\0")[-MAX_HISTORY:]
        counts[place[user_id]] = len(own)
        items += own
        kinds += names.decode().split("\0")[-MAX_HISTORY:]
        packed.append(numbers[-16 * len(own) :])
    begins = np.zeros(len(place) + 1, np.int64)
    np.cumsum(counts, out=begins[1:])
    # Items that are nowhere any more still count among the recent ones: each has a number of its own.
    unknown: dict[str, int] = {}
    size, known = len(catalogue.item_ids), catalogue.numbers
    found = [known[item] if item in known else unknown.setdefault(item, size + len(unknown)) for item in items]
    pairs = np.frombuffer(b"".join(packed), ">f8").reshape(-1, 2).astype(np.float64)
    return (
        begins,
        np.array(found, np.int64),
        np.array([_KIND[kind] for kind in kinds], np.int64),
        pairs[:, 1].astype(np.float32),
        pairs[:, 0],
    )


def _context(view: FeatureView, columns: Columns, place: dict[str, int], seconds: float) -> tuple[Floats, Floats]:
    values, mask = (np.zeros((len(place), len(view.features)), np.float32) for _ in range(2))
    if columns.keys and columns.settled:
        rows = np.array([place[key[0]] for key in columns.keys], np.int64)
        values[rows], mask[rows] = _finished(view, columns, seconds)
    return values, mask


def _crossed(
    view: FeatureView, columns: Columns, place: dict[str, int], catalogue: Catalogue, seconds: float
) -> Crossed:
    number = {name: row for row, name in enumerate(catalogue.category_names)}
    # A category that no item has is nobody's.
    rows = [row for row, key in enumerate(columns.keys) if key[-1] in number] if columns.settled else []
    values, mask = (np.zeros((0, len(view.features)), np.float32) for _ in range(2))
    if rows:
        values, mask = _finished(view, columns, seconds)
    owners = np.array([place[columns.keys[row][0]] for row in rows], np.int64)
    order = np.argsort(owners, kind="stable")
    chosen = np.array(rows, np.int64)[order]
    categories = np.array([number[columns.keys[row][-1]] for row in rows], np.int64)
    return Crossed(owners[order], categories[order], values[chosen], mask[chosen])


def _finished(view: FeatureView, columns: Columns, seconds: float) -> tuple[Floats, Floats]:
    n = len(columns.keys)
    return finish(view, columns.states, at=np.full(n, seconds), as_of=columns.as_of, present=np.ones(n, bool))
