"""The items as arrays: what a request would look up for each of its candidates, read once for everybody who is scored.

N items are all that have a row, a vector or neighbours, in the order of their ids; an item is its number among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from itertools import chain
from typing import NamedTuple

import numpy as np
import psycopg
from numpy.typing import NDArray

from inference.assemble import finish
from inference.live import Columns, live_columns, utc_day
from inference.sql_files import half_vectors, statement
from schemas import online_sql
from schemas.errors import ArtifactError, ScoresError
from schemas.features import ITEM
from schemas.views import CANDIDATE_VIEWS

Floats = NDArray[np.float32]
Numbers = NDArray[np.int64]

_ITEMS_AT_ONCE = 2_000
_KEYS_AT_ONCE = 1 << 16
"""What is made of so many stays in a core's own cache."""
NEVER = np.inf
"""When something is available that is not in the catalogue."""


@dataclass(frozen=True, slots=True)
class Neighbours:
    """Co-visitation by item: those of item i are `begins[i]:begins[i + 1]` of `items` and `scores`."""

    begins: Numbers
    items: Numbers
    scores: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Catalogue:
    """N items at one moment, with the vectors of one model version."""

    item_ids: list[str]
    numbers: dict[str, int]
    vectors: Floats
    """`(N, d)`, zeros where there is none."""
    has_vector: NDArray[np.bool_]
    available_at: NDArray[np.float64]
    """`(N,)` in seconds since 1970: `-inf` always, `NEVER` for what is no item."""
    categories: Numbers
    """`(N, c)`: numbers among `category_names`, and their count where there are no more."""
    category_names: list[str]
    neighbours: Neighbours
    lists: dict[str, Numbers]
    """`trending` and `fresh`, in order."""
    features: Columns
    """Of the candidate view, one row per item."""


@dataclass(frozen=True, slots=True)
class Shelf:
    """The catalogue as of one instant: what the arithmetic needs, and nothing but arrays.

    `rows (M,)` are the items that a search may find and `matrix (M, d) float32` their vectors; `values`, `mask (N, g)`
    the candidate view's features as the ranker gets them.
    """

    vectors: Floats
    has_vector: NDArray[np.bool_]
    available: NDArray[np.bool_]
    rows: Numbers
    matrix: Floats
    values: Floats
    mask: Floats
    categories: Numbers
    category_count: int
    neighbours: Neighbours
    trending: Numbers
    fresh: Numbers

    @property
    def size(self) -> int:
        """How many items there are."""
        return len(self.vectors)


def shelf_of(catalogue: Catalogue, at: datetime) -> Shelf:
    """The catalogue as of `at`."""
    seconds = at.timestamp()
    available = catalogue.available_at <= seconds
    rows = np.flatnonzero(available & catalogue.has_vector)
    (view,) = CANDIDATE_VIEWS
    features = catalogue.features
    values, mask = finish(
        view,
        features.states,
        at=np.full(len(catalogue.item_ids), seconds),
        as_of=np.nan_to_num(features.as_of),
        present=np.isfinite(features.as_of) & features.settled,
    )
    return Shelf(
        catalogue.vectors,
        catalogue.has_vector,
        available,
        rows,
        np.ascontiguousarray(catalogue.vectors[rows]),
        values,
        mask,
        catalogue.categories,
        len(catalogue.category_names),
        catalogue.neighbours,
        catalogue.lists["trending"],
        catalogue.lists["fresh"],
    )


def read_catalogue(
    connection: psycopg.Connection, beside: psycopg.Connection, version: str, dim: int, at: datetime
) -> Catalogue:
    """All items, with the item vectors of model `version`, as of the present `at`.

    Co-visitation, half of the work, is read over the connection `beside`, at the same time. Raises ArtifactError if the
    version has no item vectors: there is nothing to search.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="co-visitation") as pool:
        return _read(connection, pool.submit(_co_visitation, beside), version, dim, at)


def _read(
    connection: psycopg.Connection, co_visitation: Future[_CoVisitation], version: str, dim: int, at: datetime
) -> Catalogue:
    cursor = connection.cursor(binary=True)
    items = cursor.execute(
        "SELECT item_id, categories, date_part('epoch', available_at)::float8 FROM items ORDER BY item_id"
    ).fetchall()
    found = cursor.execute("SELECT item_id, vector FROM item_vectors WHERE model_version = %s", (version,)).fetchall()
    if not found:
        raise ArtifactError(f"model {version} has no item vectors; materialise item_vectors, then score again")
    listed = cursor.execute(
        "SELECT list, item_id FROM popular_items WHERE list IN ('trending', 'fresh') ORDER BY list, rank"
    ).fetchall()
    # In the database's order: that of items first, where places are shared by their ids.
    numbers: dict[str, int] = {}
    for item_id in chain((row[0] for row in items), (row[0] for row in found), (row[1] for row in listed)):
        numbers.setdefault(item_id, len(numbers))
    categories, names = _categories([row[1] for row in items])
    neighbours, strangers = _neighbours(connection, numbers, co_visitation.result())
    # Nobody is given what is nothing but somebody's neighbour, so that its id is not wanted.
    item_ids = [*numbers, *[""] * strangers]
    n = len(item_ids)
    vectors, has_vector = np.zeros((n, dim), np.float32), np.zeros(n, bool)
    places = np.fromiter((numbers[row[0]] for row in found), np.int64, len(found))
    read = half_vectors([row[1] for row in found])
    if read.shape[1] != dim:
        raise ArtifactError(
            f"item vectors of model {version} are {read.shape[1]} wide, the model is {dim}; release again"
        )
    vectors[places], has_vector[places] = read, True
    available_at = np.full(n, NEVER)
    available_at[: len(items)] = [-np.inf if row[2] is None else row[2] for row in items]
    return Catalogue(
        item_ids,
        numbers,
        vectors,
        has_vector,
        available_at,
        np.concatenate([categories, np.full((n - len(items), categories.shape[1]), len(names), np.int64)]),
        names,
        neighbours,
        {
            name: np.array([numbers[row[1]] for row in listed if row[0] == name], np.int64)
            for name in ("trending", "fresh")
        },
        _features(connection, numbers, n, at),
    )


def _categories(named: Sequence[Sequence[str]]) -> tuple[Numbers, list[str]]:
    names = list(dict.fromkeys(name for row in named for name in row))
    place = {name: number for number, name in enumerate(names)}
    wide = max((len(row) for row in named), default=0)
    padded = np.full((len(named), max(wide, 1)), len(names), np.int64)
    for row, own in enumerate(named):
        padded[row, : len(own)] = [place[name] for name in own]
    return padded, names


class _CoVisitation(NamedTuple):
    """Ids, how many neighbours each has, and of all neighbours the hashes of their ids and their scores."""

    owners: list[str]
    many: list[int]
    keys: Numbers
    scores: NDArray[np.float64]


def _co_visitation(connection: psycopg.Connection) -> _CoVisitation:
    """All of co-visitation, a row per item and in parts, as there may be millions."""
    owners: list[str] = []
    many: list[int] = []
    keys: list[NDArray[np.int64]] = [np.zeros(0, np.int64)]
    scores: list[NDArray[np.float64]] = [np.zeros(0)]
    with connection.transaction(), connection.cursor("neighbours", binary=True) as cursor:
        cursor.execute(statement("read_neighbours"))
        while rows := cursor.fetchmany(_ITEMS_AT_ONCE):
            owners += [row[0] for row in rows]
            many += [len(row[1]) // 8 for row in rows]
            keys.append(np.frombuffer(b"".join(row[1] for row in rows), ">i8").astype(np.int64))
            scores.append(np.frombuffer(b"".join(row[2] for row in rows), ">f8").astype(np.float64))
    return _CoVisitation(owners, many, np.concatenate(keys), np.concatenate(scores))


def _neighbours(
    connection: psycopg.Connection, numbers: dict[str, int], found: _CoVisitation
) -> tuple[Neighbours, int]:
    """What was `found`, by numbers; and how many items only it names.

    `numbers` learns the items that have neighbours; those that are nothing but neighbours get the numbers after all of it.
    """
    owners, keys, scores = found.owners, found.keys, found.scores
    many = np.array(found.many, np.int64)
    of = np.array([numbers.setdefault(owner, len(numbers)) for owner in owners], np.int64)
    items, strangers = _numbered(connection, numbers, keys)
    counts = np.zeros(len(numbers) + strangers, np.int64)
    counts[of] = many
    begins = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=begins[1:])
    # Read in the order of ids; put in that of numbers.
    places = np.repeat(begins[of] - (np.cumsum(many) - many), many) + np.arange(begins[-1])
    by_item, by_score = np.empty(begins[-1], np.int64), np.empty(begins[-1])
    by_item[places], by_score[places] = items, scores
    return Neighbours(begins, by_item, by_score), strangers


def _numbered(connection: psycopg.Connection, numbers: dict[str, int], keys: NDArray[np.int64]) -> tuple[Numbers, int]:
    """The numbers of items by the hashes `keys` of their ids, and how many of them are not in `numbers`.

    Millions of texts to be looked up would take as long as all the rest. That two ids of 10 million share a hash of 64
    bits happens once in 400,000 catalogues; then it is said, as a list could then name the wrong one.
    """
    (hashed,) = connection.cursor(binary=True).execute(
        "SELECT string_agg(int8send(hashtextextended(item_id, 0)), ''::bytea ORDER BY place) "
        "FROM unnest(%s::text[]) WITH ORDINALITY AS u (item_id, place)",
        (list(numbers),),
    ).fetchone() or (None,)
    known = np.frombuffer(hashed or b"", ">i8").astype(np.int64).view(np.uint64)
    asked = keys.view(np.uint64)
    order = np.argsort(known)
    known = known[order]
    if len(known) > 1 and not np.diff(known).all():
        raise ScoresError("two items share a hash of their ids, so nobody can be scored ahead; give one another id")
    at = np.minimum(_places(known, asked), max(len(known) - 1, 0))
    strange = known[at] != asked if len(known) else np.ones(len(asked), bool)
    found: Numbers = order[at] if len(known) else np.zeros(len(asked), np.int64)
    strangers = np.unique(keys[strange])
    found[strange] = len(numbers) + np.searchsorted(strangers, keys[strange])
    return found, len(strangers)


def _places(known: NDArray[np.uint64], asked: NDArray[np.uint64]) -> NDArray[np.int32]:
    """What `np.searchsorted(known, asked)` gives, five times as fast: hashes are even, so that their first bits say almost
    where they stand."""
    shift = np.uint64(63 - len(known).bit_length())
    begins = np.searchsorted(known >> shift, np.arange(2 << len(known).bit_length(), dtype=np.uint64)).astype(np.int32)
    most = int(np.diff(begins, append=np.int32(len(known))).max())
    places = np.empty(len(asked), np.int32)
    for begin in range(0, len(asked), _KEYS_AT_ONCE):
        part = asked[begin : begin + _KEYS_AT_ONCE]
        at = begins[part >> shift]
        for _ in range(most):
            at += known[np.minimum(at, len(known) - 1)] < part
        places[begin : begin + _KEYS_AT_ONCE] = np.minimum(at, len(known))
    return places


def _features(connection: psycopg.Connection, numbers: dict[str, int], n: int, at: datetime) -> Columns:
    """The candidate view's states, one row for each of n items; NaN for those of which there is nothing."""
    (view,) = CANDIDATE_VIEWS
    today = utc_day(at)
    sql = online_sql.read_entity_sql(ITEM, "true")
    rows = connection.cursor(binary=True).execute(sql, {"today": today}).fetchall()
    read = live_columns(ITEM, rows, today, 1)[view.name]
    places = np.fromiter((numbers.get(key[0], -1) for key in read.keys), np.int64, len(read.keys))
    known = places >= 0
    as_of = np.full(n, np.nan)
    as_of[places[known]] = read.as_of[known]
    states = {}
    for name, column in read.states.items():
        states[name] = np.full(n, np.nan)
        states[name][places[known]] = column[known]
    return Columns([], states, as_of, read.settled, read.settled_at)
