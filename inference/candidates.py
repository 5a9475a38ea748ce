"""Which items a request chooses from: the sources' SQL, the caller's filters, and the rows as arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from inference.ahead import LISTED, SOURCE, Ahead
from inference.live import HEAD_MOST, Columns, live_columns, snapshot_columns, utc_day
from inference.predicates import Condition, all_sql
from inference.sql_files import half_vectors, statement, text_array, vector_literal
from schemas import online_sql
from schemas.feature_sql import read_sql
from schemas.features import ITEM, FeatureView
from schemas.ranker import TEXT_DIM
from schemas.views import CANDIDATE_VIEWS

SOURCES: dict[str, int] = {
    "user_vector": 1,
    "wish": 2,
    "co_visitation": 4,
    "trending": 8,
    "fresh": 16,
    "given": 32,
    "ahead": SOURCE,
}


Part = Literal["listed", "wished", "near"]
"""What is known of a person, what is near to the wish, and what is near to the user vector."""

_PACKED_LIKENESS = "string_agg(float8send(coalesce({}, 0)), ''::bytea ORDER BY m.place, m.item_id)"
"""How like the wish each candidate's text is."""
_ALSO = (
    "(SELECT string_agg(float8send(coalesce(1 - (w.vector <=> %(wish_text)s::vector), 0)), ''::bytea ORDER BY o.place) "
    "FROM unnest(%(listed)s::text[]) WITH ORDINALITY AS o (item_id, place) LEFT JOIN text_vectors AS w ON w.item_id = o.item_id)"
)
"""Likewise of the items that the part before this one has listed."""


@dataclass(frozen=True, slots=True)
class Filters:
    """Conditions on candidates; `categories` None means any. Of each of `groups` is told who belongs to it."""

    exclude: Sequence[str] = ()
    categories: Sequence[str] | None = None
    exclude_categories: Sequence[str] = ()
    years: tuple[int | None, int | None] | None = None
    """First and last, either None for open; an item of which no year is known is let through."""
    where: Sequence[Condition] = ()
    groups: Sequence[Condition] = ()

    def not_excluded(self, item_id: str) -> str:
        """The condition that the column `item_id` is none of those left out."""
        # In a plan made for any array, `<> ALL` walks the array for each row; this becomes one hash table.
        return f"{item_id} NOT IN (SELECT unnest(%(exclude)s::text[]))" if self.exclude else "true"

    def allowed(self, item: str) -> str:
        """The conditions on the row `item` of `items`: those in use alone, as each is weighed for every row."""
        conditions = [f"({item}.available_at IS NULL OR {item}.available_at <= %(at)s)"]
        if self.exclude:
            conditions.append(self.not_excluded(f"{item}.item_id"))
        if self.categories is not None:
            conditions.append(f"{item}.categories && %(categories)s::text[]")
        if self.exclude_categories:
            conditions.append(f"NOT {item}.categories && %(exclude_categories)s::text[]")
        if self.years is not None:
            year = f"{item}.attributes->>'year'"
            conditions.append(
                f"coalesce(CASE WHEN {year} ~ '^[0-9]{{4}}$' THEN ({year})::int END "
                "BETWEEN %(first_year)s::int AND %(last_year)s::int, true)"
            )
        if self.where:
            conditions.append(all_sql(self.where, item, "where")[0])
        return " AND ".join(conditions)

    @property
    def looks_at_items(self) -> bool:
        """Whether more than an item's id decides."""
        return self.categories is not None or self.years is not None or bool(self.exclude_categories or self.where)

    @property
    def by_ids(self) -> bool:
        """Whether an item's id alone decides, and nothing is told of it."""
        return not self.looks_at_items and not self.groups

    def group_bits(self, item: str) -> str:
        """An integer with a bit for each group that the row `item` of `items` belongs to, the first the lowest."""
        bits = [
            f"CASE WHEN {condition.sql(item, f'group_{number}')[0]} THEN {1 << number} ELSE 0 END::bigint"
            for number, condition in enumerate(self.groups)
        ]
        return " | ".join(bits) or "0::bigint"

    def parameters(self) -> dict[str, object]:
        """The values that the conditions name."""
        found: dict[str, object] = {
            "exclude": text_array(self.exclude),
            "categories": None if self.categories is None else list(self.categories),
            "exclude_categories": list(self.exclude_categories),
            "first_year": self.years[0] or 0 if self.years else 0,
            "last_year": self.years[1] or 9999 if self.years else 9999,
        }
        for number, condition in enumerate(self.groups):
            found |= condition.sql("i", f"group_{number}")[1]
        return found | all_sql(self.where, "i", "where")[1]


@dataclass(frozen=True, slots=True)
class CategoryNumbers:
    """Which categories n items are in: `rows (n, c)` numbers of them, `len(numbers)` where an item has no more."""

    rows: NDArray[np.int32]
    numbers: dict[str, int]


@dataclass(frozen=True, slots=True)
class Candidates:
    """n candidates: parallel sequences; `vectors (n, d) float32` with zeros where an item has none yet,
    `wish (n,)` the cosine of its text and the wish's."""

    item_ids: list[str]
    titles: Sequence[str]
    categories: Sequence[list[str]]
    sources: NDArray[np.int64]
    evidence: NDArray[np.float64]
    vectors: NDArray[np.float32]
    has_vector: NDArray[np.bool_]
    wish: NDArray[np.float32]
    features: Columns
    features_read: bool = True
    """False where they could not be, and `features` says nothing."""
    ahead: NDArray[np.float32] | None = None
    """`(n,)`: scores of the list that was scored ahead, NaN for what is not in it; None where it was not asked for."""
    ahead_version: str | None = None
    """The model that made that list."""
    groups: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """`(n,)`: a bit for each of the filters' groups that the item belongs to, see `Filters.group_bits`."""
    category_numbers: CategoryNumbers | None = None
    """The same as `categories`, where it is at hand."""

    def __len__(self) -> int:
        return len(self.item_ids)


def candidates_sql(
    *,
    at: datetime,
    filters: Filters,
    limit: int,
    champion: str | None,
    dim: int,
    user_vector: NDArray[np.float32] | None,
    wish_text: NDArray[np.float32] | None,
    recent: list[str],
    given: list[str] | None,
    live: bool,
    audited: bool = False,
    features: bool = True,
    ahead: Ahead | None = None,
    packed: bool = False,
    part: Part | None = None,
) -> tuple[str, dict[str, Any]]:
    """The statement of `Store.pick_candidates` and its parameters; arguments as there.

    `packed` gives it for a process that has the items in memory, see inference/cached_items.py: of live reads with a
    model and with features, none of which asks for what an item is. A `part` has some of the sources alone.
    """
    sources, parameters = _sources(
        filters, limit, champion, dim, user_vector, wish_text, recent, given, live, ahead, part
    )
    (view,) = CANDIDATE_VIEWS
    picked = "item_id IN (SELECT item_id FROM merged)"
    if not features:
        read, joins, columns = "nothing AS (SELECT 1)", "", "NULL"
    elif live:
        read = f"edge AS MATERIALIZED ({online_sql.edge_sql([view])}), t AS ({online_sql.tiles_sql(ITEM, picked)})"
        joins = (
            f"LEFT JOIN {online_sql.rows_table(ITEM)} AS r ON r.item_id = m.item_id "
            "LEFT JOIN t ON t.item_id = m.item_id CROSS JOIN edge"
        )
        columns = online_sql.outputs_sql(ITEM) + (f", {online_sql.SEEN}" if audited else "")
        parameters["today"] = utc_day(at)
    else:
        read = f"features AS ({read_sql(view, picked)})"
        joins = "LEFT JOIN features AS f ON f.item_id = m.item_id"
        columns = ", ".join(f"f.{name}" for name in ("as_of", "settled_at", *(name for name, _, _ in view.columns)))
        parameters["head_since"] = at - HEAD_MOST
    vector, vector_join, wish, wish_join = "NULL", "", "NULL", ""
    if champion is not None:
        vector = "v.vector"
        vector_join = "LEFT JOIN item_vectors AS v ON v.item_id = m.item_id AND v.model_version = %(champion)s"
    if wish_text is not None:
        wish = "1 - (w.vector <=> %(wish_text)s::vector)"
        wish_join = "LEFT JOIN text_vectors AS w ON w.item_id = m.item_id"
        parameters["wish_text"] = vector_literal(wish_text)
    elif ahead is not None:
        wish, wish_join = "l.score, l.model_version", f"LEFT JOIN {LISTED} AS l ON l.item_id = m.item_id"
    if packed:
        edges, _ = online_sql.output_columns(ITEM)
        given_rows = statement("read_picked").format(
            edges=", ".join([*edges, *([online_sql.SEEN] if audited else [])]),
            wish=_PACKED_LIKENESS.format(wish) if wish_text is not None else "NULL::bytea",
            wish_join=wish_join,
            also=_ALSO if part == "wished" else "NULL::bytea",
        )
    else:
        given_rows = statement("read_candidates").format(
            feature_joins=joins,
            vector=vector,
            vector_join=vector_join,
            wish=wish,
            wish_join=wish_join,
            groups=filters.group_bits("i"),
            columns=columns,
        )
    sql = statement("pick_candidates").format(
        allowed=filters.allowed("i"),
        limit=limit,
        sources="\n    UNION ALL ".join(sources),
        features=read,
        given=given_rows,
    )
    return sql, parameters | {"at": at, **filters.parameters()}


class PartShape(NamedTuple):
    """What decides how the statement of a part reads, whatever the request's own values are."""

    limit: int
    dim: int
    excludes: bool
    wishes: bool
    has_recent: bool


@lru_cache(64)
def part_sql(part: Part, shape: PartShape) -> str:
    """The packed statement of a `part` for a live read with a model, of filters by ids alone; see `candidates_sql`."""
    sql, _ = candidates_sql(
        at=datetime(2000, 1, 1, tzinfo=UTC),
        filters=Filters(exclude=["some"] if shape.excludes else []),
        limit=shape.limit,
        champion="some",
        dim=shape.dim,
        user_vector=np.zeros(shape.dim, np.float32) if part == "near" else None,
        wish_text=np.zeros(TEXT_DIM, np.float32) if shape.wishes else None,
        recent=["some"] if shape.has_recent else [],
        given=None,
        live=True,
        packed=True,
        part=part,
    )
    return sql


class Most(NamedTuple):
    """How many candidates come at most from each source."""

    user_vector: int
    wish: int
    co_visitation: int
    trending: int
    fresh: int


def most_of(limit: int) -> Most:
    """How many of `limit` candidates come from each source."""
    return Most(limit // 2, limit // 3, limit // 3, limit // 3, limit // 10)


def candidates_of(
    rows: Sequence[tuple[Any, ...]], dim: int, today: date | None, *, features: bool = True, ahead: bool = False
) -> Candidates:
    """Rows of `candidates_sql` as arrays; `today` is the day of a live read, None for one at an earlier instant.

    `ahead`: they say how each item was scored ahead, and by which model, in place of the wish's likeness.
    """
    listed, listed_by = None, None
    if ahead:
        listed = np.array([np.nan if row[6] is None else row[6] for row in rows], np.float32)
        listed_by = next((row[7] for row in rows if row[7] is not None), None)
        rows = [(*row[:6], None, *row[8:]) for row in rows]
    (view,) = CANDIDATE_VIEWS
    raw = [row[5] for row in rows]
    has_vector = np.array([value is not None for value in raw], bool)
    vectors = np.zeros((len(rows), dim), np.float32)
    if has_vector.any():
        vectors[has_vector] = half_vectors([value for value in raw if value is not None])
    read = [(row[0], *row[8:]) for row in rows]
    if not features:
        columns = _unknown(view, [row[0] for row in rows])
    elif today is None:
        columns = snapshot_columns(view, read)
    else:
        columns = live_columns(ITEM, read, today, 1)[view.name]
    return Candidates(
        [row[0] for row in rows],
        [row[3] for row in rows],
        [row[4] for row in rows],
        np.array([row[1] for row in rows], np.int64),
        np.array([row[2] for row in rows], np.float64),
        vectors,
        has_vector,
        np.array([row[6] or 0.0 for row in rows], np.float32),
        columns,
        features,
        listed,
        listed_by,
        np.array([row[7] for row in rows], np.int64),
    )


def _unknown(view: FeatureView, item_ids: list[str]) -> Columns:
    """The columns of items whose features were not read."""
    nothing = np.full(len(item_ids), np.nan)
    return Columns([(item_id,) for item_id in item_ids], {name: nothing for name, _, _ in view.columns}, nothing, False)


def _sources(
    filters: Filters,
    limit: int,
    champion: str | None,
    dim: int,
    user_vector: NDArray[np.float32] | None,
    wish_text: NDArray[np.float32] | None,
    recent: list[str],
    given: list[str] | None,
    live: bool,
    ahead: Ahead | None,
    part: Part | None,
) -> tuple[list[str], dict[str, Any]]:
    """The sub-selects that pick candidates `(item_id, source, place, evidence)`, and their parameters."""
    if given is not None:
        # Without a model these are put in order by the same evidence as the floor's own candidates.
        sql = (
            f"(SELECT g.item_id, {SOURCES['given']} AS source, coalesce(min(p.rank), 100000 + min(g.place)) AS place, "
            "coalesce(sum(c.score / sqrt(r.place)), 0) AS evidence "
            "FROM unnest(%(given)s::text[]) WITH ORDINALITY AS g (item_id, place) "
            "LEFT JOIN popular_items AS p ON p.list = 'trending' AND p.item_id = g.item_id "
            "LEFT JOIN (unnest(%(recent)s::text[]) WITH ORDINALITY AS r (item_id, place) "
            "JOIN co_visitation AS c ON c.item_id = r.item_id) ON c.neighbour_id = g.item_id "
            "WHERE g.item_id IN (SELECT item_id FROM allowed) GROUP BY g.item_id)"
        )
        return [sql], {"given": text_array(given), "champion": champion, "recent": text_array(recent)}
    picked: list[str] = []
    parameters: dict[str, Any] = {"champion": champion, "recent": text_array(recent)}
    # Written into the statement: a plan made for any limit expects far fewer rows than these.
    most = most_of(limit)
    # The lists hold items that were there when they were made, so only a filter by what an item is has to look at them
    # first. A read at an earlier instant drops those that came later afterwards, and may get fewer than asked for.
    listed = "{0} IN (SELECT item_id FROM allowed)" if filters.looks_at_items else filters.not_excluded("{0}")
    if ahead is not None:
        picked.append(ahead.source(listed))
        parameters |= ahead.parameters()
    # At the present few items are still to come, and to look each up that is near takes a tenth of the statement: those are
    # dropped with the others that came later. At an earlier instant they may be most of the catalogue.
    near = (
        filters.not_excluded("v.item_id")
        if live and not filters.looks_at_items
        else "v.item_id IN (SELECT item_id FROM allowed)"
    )
    typed = f"v.vector::halfvec({dim})"
    ann = (
        "(SELECT item_id, {bit} AS source, row_number() OVER (ORDER BY distance, item_id) AS place, 0::float8 AS evidence "
        "FROM (SELECT v.item_id, {distance} AS distance FROM {table} AS v WHERE {where} {near} "
        "ORDER BY distance LIMIT {limit}) AS nearest)"
    )
    if part in (None, "near") and champion is not None and user_vector is not None:
        parameters["user_vector"] = vector_literal(user_vector)
        distance = f"({typed} <#> %(user_vector)s::halfvec({dim}))"
        picked.append(
            ann.format(
                bit=SOURCES["user_vector"], distance=distance, table="item_vectors", limit=most.user_vector,
                where="v.model_version = %(champion)s AND", near=near,
            )
        )  # fmt: skip
    if part in (None, "wished") and wish_text is not None:
        picked.append(
            ann.format(
                bit=SOURCES["wish"],
                distance="(v.vector <=> %(wish_text)s::vector)",
                table="text_vectors",
                limit=most.wish,
                where="",
                near=near,
            )
        )
    if part in (None, "listed") and recent:
        picked.append(
            f"(SELECT item_id, {SOURCES['co_visitation']} AS source, row_number() OVER (ORDER BY evidence DESC, item_id) AS place, "
            "evidence FROM (SELECT c.neighbour_id AS item_id, sum(c.score / sqrt(r.place)) AS evidence "
            "FROM unnest(%(recent)s::text[]) WITH ORDINALITY AS r (item_id, place) JOIN co_visitation AS c ON c.item_id = r.item_id "
            f"WHERE {listed.format('c.neighbour_id')} GROUP BY 1 ORDER BY evidence DESC LIMIT {most.co_visitation}) AS visited)"
        )
    for name, size in (("trending", most.trending), ("fresh", most.fresh)) if part in (None, "listed") else ():
        picked.append(
            f"(SELECT p.item_id, {SOURCES[name]} AS source, row_number() OVER (ORDER BY p.rank) AS place, 0::float8 AS evidence "
            f"FROM popular_items AS p WHERE p.list = '{name}' AND {listed.format('p.item_id')} "
            f"ORDER BY p.rank LIMIT {size})"
        )
    return picked, parameters
