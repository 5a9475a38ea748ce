"""Everything a function asks of Postgres: named SQL, one pipeline per question, rows into numpy.

A recommendation takes two round trips: `read_person` and `pick_candidates`. Each sends all its statements at once.
"""

from __future__ import annotations

import json
import queue
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cache
from importlib import resources
from typing import Any

import numpy as np
import psycopg
from numpy.typing import NDArray

from inference.telemetry import span
from schemas.errors import Unavailable
from schemas.feature_sql import read_sql
from schemas.features import FeatureView
from schemas.ranker import MAX_HISTORY
from schemas.views import CANDIDATE_VIEWS, CONTEXT_VIEWS, CROSS_VIEWS, VIEWS

SOURCES: dict[str, int] = {"user_vector": 1, "wish": 2, "co_visitation": 4, "trending": 8, "fresh": 16, "given": 32}
_HEAD_MOST = timedelta(days=max(view.ttl_days for view in VIEWS))
"""How far back the events since a snapshot can reach: an older snapshot is not read."""
_NEVER = 1 << 30
"""Executions before psycopg prepares a statement by itself."""
_CONNECT_SECONDS = 2
_PLAN_ONCE = "SET LOCAL plan_cache_mode = force_generic_plan"
"""A request's statements have one good plan each, whatever their parameters. Making it for every request, over every
day's partition of the recent events, takes longer than running it."""


@cache
def statement(name: str) -> str:
    """The SQL in `inference/sql/<name>.sql`."""
    return (resources.files("inference") / "sql" / f"{name}.sql").read_text(encoding="utf-8")


@dataclass(frozen=True, slots=True)
class Columns:
    """States of one view for n entities: keys, one float64 `(n,)` array per snapshot column, and the reads' anchors.

    `settled` is False where no partition of the view is fit to be read.
    """

    keys: list[tuple[str, ...]]
    states: dict[str, NDArray[np.float64]]
    as_of: NDArray[np.float64]
    settled: bool


@dataclass(frozen=True, slots=True)
class History:
    """A person's newest events, oldest first: parallel lists, `vectors` None where an item has none."""

    item_ids: list[str]
    titles: list[str | None]
    kinds: list[str]
    values: list[float | None]
    occurred_at: NDArray[np.float64]
    vectors: list[NDArray[np.float32] | None]


@dataclass(frozen=True, slots=True)
class Champion:
    """The version that serves, where its files are, and the alias's revision."""

    version: str
    revision: int
    path: str


@dataclass(frozen=True, slots=True)
class PersonRow:
    """The answer to `read_person`."""

    champion: Champion | None
    history: History
    views: dict[str, Columns]


@dataclass(frozen=True, slots=True)
class Filters:
    """Conditions on candidates; `categories` None means any."""

    exclude: Sequence[str] = ()
    categories: Sequence[str] | None = None
    exclude_categories: Sequence[str] = ()

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
        return " AND ".join(conditions)

    def parameters(self) -> dict[str, object]:
        """The values that the conditions name."""
        return {
            "exclude": list(self.exclude),
            "categories": None if self.categories is None else list(self.categories),
            "exclude_categories": list(self.exclude_categories),
        }


@dataclass(frozen=True, slots=True)
class Candidates:
    """n candidates: parallel sequences; `vectors (n, d) float32` with zeros where an item has none yet,
    `wish (n,)` the cosine of its text and the wish's."""

    item_ids: list[str]
    titles: list[str]
    categories: list[list[str]]
    sources: NDArray[np.int64]
    evidence: NDArray[np.float64]
    vectors: NDArray[np.float32]
    has_vector: NDArray[np.bool_]
    wish: NDArray[np.float32]
    features: Columns

    def __len__(self) -> int:
        return len(self.item_ids)


@dataclass(slots=True)
class Store:
    """Connections to one database, opened when needed, at most `size` at a time."""

    url: str
    size: int = 4
    _idle: queue.LifoQueue[psycopg.Connection[Any]] = field(default_factory=queue.LifoQueue)

    @contextmanager
    def connection(self) -> Iterator[psycopg.Connection[Any]]:
        """A connection in autocommit; a broken one is thrown away. Raises Unavailable if none can be had."""
        try:
            connection = self._idle.get_nowait()
        except queue.Empty:
            connection = self._connect()
        try:
            yield connection
        except psycopg.errors.QueryCanceled as error:
            raise Unavailable("the database did not answer in time") from error
        except (psycopg.OperationalError, psycopg.InterfaceError) as error:
            connection.close()
            raise Unavailable("the database cannot be reached") from error
        finally:
            if connection.closed or self._idle.qsize() >= self.size:
                connection.close()
            else:
                self._idle.put(connection)

    def close(self) -> None:
        """Close every idle connection."""
        while not self._idle.empty():
            self._idle.get_nowait().close()

    def _connect(self) -> psycopg.Connection[Any]:
        try:
            connection = psycopg.connect(
                self.url,
                autocommit=True,
                # Nothing is prepared by itself: only what every request asks is worth it, and says so below.
                prepare_threshold=_NEVER,
                connect_timeout=_CONNECT_SECONDS,
                options="-c TimeZone=UTC",
                application_name="larder",
            )
            answering = connection.execute("SELECT pg_backend_pid()").fetchone()
            if answering is None or answering[0] != connection.info.backend_pid:
                # A pooler stands between: the next transaction may meet a server that prepared something else.
                connection.prepare_threshold = None
        except psycopg.Error as error:
            raise Unavailable("the database cannot be reached") from error
        return connection

    # --- one round trip each -------------------------------------------------------------------------------------

    def read_person(self, user_id: str, at: datetime, timeout_ms: int) -> PersonRow:
        """Champion, newest events with their item vectors, and the person's feature views, as of `at`."""
        parameters = {"user_id": user_id, "at": at, "head_since": at - _HEAD_MOST, "limit": MAX_HISTORY}
        views = (*CONTEXT_VIEWS, *CROSS_VIEWS)
        with self.connection() as connection, span("db read_person", kind="client", attributes=_db(4 + len(views))):
            with connection.pipeline():
                _execute(connection, f"SET LOCAL statement_timeout = {timeout_ms}", None)
                _execute(connection, _PLAN_ONCE, None)
                cursors = [
                    _execute(connection, sql, parameters, prepare=True)
                    for sql in (
                        statement("read_champion"),
                        statement("read_history"),
                        *(_person_sql(view) for view in views),
                    )
                ]
            rows = [cursor.fetchall() for cursor in cursors]
        champion = Champion(*rows[0][0]) if rows[0] else None
        history = rows[1][::-1]
        vectors = iter(half_vectors([row[4] for row in history if row[4] is not None]))
        return PersonRow(
            champion,
            History(
                [row[0] for row in history],
                [row[5] for row in history],
                [row[1] for row in history],
                [row[2] for row in history],
                np.array([row[3] for row in history], np.float64),
                [None if row[4] is None else next(vectors) for row in history],
            ),
            {view.name: _columns(view, result) for view, result in zip(views, rows[2:], strict=True)},
        )

    def pick_candidates(
        self,
        *,
        at: datetime,
        filters: Filters,
        limit: int,
        timeout_ms: int,
        champion: str | None = None,
        dim: int = 0,
        user_vector: NDArray[np.float32] | None = None,
        wish_text: NDArray[np.float32] | None = None,
        recent: Sequence[str] = (),
        given: Sequence[str] | None = None,
    ) -> Candidates:
        """Candidates with titles, vectors and features, at most `limit`, from the sources that apply.

        `user_vector (d,)` searches the champion's item vectors, `wish_text (384,)` the text vectors; `recent` are the person's last items, newest first; `given` replaces all sources.
        """
        sources, parameters = _sources(
            filters,
            limit,
            champion,
            dim,
            user_vector,
            wish_text,
            list(recent),
            None if given is None else list(given),
        )
        (view,) = CANDIDATE_VIEWS
        names = [name for name, _, _ in view.columns]
        sql = statement("pick_candidates").format(
            allowed=filters.allowed("i"),
            limit=limit,
            sources="\n    UNION ALL ".join(sources),
            features=read_sql(view, "item_id IN (SELECT item_id FROM merged)"),
            vector="v.vector" if champion else "NULL",
            vector_join="LEFT JOIN item_vectors AS v ON v.item_id = m.item_id AND v.model_version = %(champion)s"
            if champion
            else "",
            wish="NULL" if wish_text is None else "1 - (t.vector <=> %(wish_text)s::vector)",
            wish_join="" if wish_text is None else "LEFT JOIN text_vectors AS t ON t.item_id = m.item_id",
            columns=", ".join(f"f.{name}" for name in ("as_of", "settled_at", *names)),
        )
        parameters |= {"at": at, "head_since": at - _HEAD_MOST, **filters.parameters()}
        if wish_text is not None:
            parameters["wish_text"] = _literal(wish_text)
        with self.connection() as connection, span("db pick_candidates", kind="client", attributes=_db(3)):
            with connection.pipeline():
                _execute(connection, f"SET LOCAL statement_timeout = {timeout_ms}", None)
                _execute(connection, _PLAN_ONCE, None)
                cursor = _execute(connection, sql, parameters, prepare=True)
            rows = cursor.fetchall()
        raw = [row[5] for row in rows]
        has_vector = np.array([value is not None for value in raw], bool)
        vectors = np.zeros((len(rows), dim), np.float32)
        if has_vector.any():
            vectors[has_vector] = half_vectors([value for value in raw if value is not None])
        return Candidates(
            [row[0] for row in rows],
            [row[3] for row in rows],
            [row[4] for row in rows],
            np.array([row[1] for row in rows], np.int64),
            np.array([row[2] for row in rows], np.float64),
            vectors,
            has_vector,
            np.array([row[6] or 0.0 for row in rows], np.float32),
            _columns(view, [(row[0], *row[7:]) for row in rows]),
        )

    def similar(
        self,
        *,
        at: datetime,
        k: int,
        filters: Filters,
        item_id: str | None,
        text: NDArray[np.float32] | None,
        timeout_ms: int,
    ) -> list[tuple[str, str, float]] | None:
        """`(item_id, title, cosine)` of the k nearest items by text; None if the anchor item has no vector."""
        parameters: dict[str, object] = {"at": at, "k": k, "item_id": item_id, **filters.parameters()}
        if item_id is not None:
            query = "(SELECT vector FROM text_vectors WHERE item_id = %(item_id)s)"
            parameters["exclude"] = [*filters.exclude, item_id]
        else:
            query = "%(text)s::vector"
            parameters["text"] = _literal(text)
        with self.connection() as connection, span("db similar", kind="client", attributes=_db(3)):
            with connection.pipeline():
                _execute(connection, f"SET LOCAL statement_timeout = {timeout_ms}", None)
                known = _execute(connection, "SELECT 1 FROM text_vectors WHERE item_id = %(item_id)s", parameters)
                found = _execute(
                    connection, statement("similar_items").format(query=query, allowed=filters.allowed("i")), parameters
                )
            if item_id is not None and known.fetchone() is None:
                return None
            return found.fetchall()

    def accept_events(self, events: Sequence[dict[str, object]], timeout_ms: int) -> set[str]:
        """Store events once each; returns the ids that were new. All or none."""
        people = sorted({str(event["user_id"]) for event in events})
        with self.connection() as connection, span("db accept_events", kind="client", attributes=_db(3)):
            with connection.pipeline():
                _execute(connection, f"SET LOCAL statement_timeout = {timeout_ms}", None)
                stored = _execute(connection, statement("accept_events"), {"events": json.dumps(events)})
                _execute(connection, statement("trim_history"), {"user_ids": people, "keep": MAX_HISTORY})
            return {row[0] for row in stored.fetchall()}

    def ping(self, timeout_ms: int) -> Champion | None:
        """The champion, in one round trip: what `/health` measures."""
        with self.connection() as connection, connection.pipeline():
            _execute(connection, f"SET LOCAL statement_timeout = {timeout_ms}", None)
            cursor = _execute(connection, statement("read_champion"), None)
        row = cursor.fetchone()
        return Champion(*row) if row else None


def half_vectors(raw: Sequence[bytes]) -> NDArray[np.float32]:
    """`(n, d)`: pgvector halfvecs as Postgres sends them in binary: int16 dimension, int16 unused, big-endian float16s."""
    if not raw:
        return np.zeros((0, 0), np.float32)
    return np.frombuffer(b"".join(raw), ">f2").reshape(len(raw), -1)[:, 2:].astype(np.float32)


def _execute(
    connection: psycopg.Connection[Any], sql: str, parameters: dict[str, Any] | None, *, prepare: bool = False
) -> psycopg.Cursor[Any]:
    # Binary results: float64 columns need no parsing, and vectors arrive as bytes without a type look-up.
    return connection.cursor(binary=True).execute(sql, parameters, prepare=prepare)


@cache
def _person_sql(view: FeatureView) -> str:
    asked = "(SELECT FROM erasure_requests AS r WHERE r.user_id = %(user_id)s)"
    return read_sql(view, f"user_id = %(user_id)s AND NOT EXISTS {asked}")


def _columns(view: FeatureView, rows: Sequence[tuple[Any, ...]]) -> Columns:
    """Rows of `read_sql`: keys, as_of, settled_at, then the states; NULL becomes NaN."""
    width = 1 if view in CANDIDATE_VIEWS else len(view.entity.keys)
    names = [name for name, _, _ in view.columns]
    settled = any(row[width + 1] is not None for row in rows)
    rows = [row for row in rows if row[0] is not None]
    block = np.array([row[width:] for row in rows], np.float64).reshape(len(rows), 2 + len(names))
    return Columns(
        [row[:width] for row in rows],
        {name: block[:, 2 + index] for index, name in enumerate(names)},
        block[:, 0],
        settled,
    )


def _literal(vector: NDArray[np.float32] | None) -> str:
    assert vector is not None
    return "[" + ",".join(f"{value:.7g}" for value in vector.tolist()) + "]"


def _sources(
    filters: Filters,
    limit: int,
    champion: str | None,
    dim: int,
    user_vector: NDArray[np.float32] | None,
    wish_text: NDArray[np.float32] | None,
    recent: list[str],
    given: list[str] | None,
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
        return [sql], {"given": given, "champion": champion, "recent": recent}
    picked: list[str] = []
    parameters: dict[str, Any] = {"champion": champion, "recent": recent}
    # Written into the statement: a plan made for any limit expects far fewer rows than these.
    share, part, few = limit // 2, limit // 3, limit // 10
    # The lists hold items that were there when they were made: only a filter by category has to look at the items first.
    by_category = filters.categories is not None or bool(filters.exclude_categories)
    listed = "{0} IN (SELECT item_id FROM allowed)" if by_category else filters.not_excluded("{0}")
    typed = f"v.vector::halfvec({dim})"
    ann = (
        "(SELECT item_id, {bit} AS source, row_number() OVER (ORDER BY distance, item_id) AS place, 0::float8 AS evidence "
        "FROM (SELECT v.item_id, {distance} AS distance FROM {table} AS v WHERE {where} v.item_id IN (SELECT item_id FROM allowed) "
        "ORDER BY distance LIMIT {limit}) AS nearest)"
    )
    if champion is not None and user_vector is not None:
        parameters["user_vector"] = _literal(user_vector)
        distance = f"({typed} <#> %(user_vector)s::halfvec({dim}))"
        picked.append(
            ann.format(
                bit=SOURCES["user_vector"], distance=distance, table="item_vectors", limit=share,
                where="v.model_version = %(champion)s AND",
            )
        )  # fmt: skip
    if wish_text is not None:
        picked.append(
            ann.format(
                bit=SOURCES["wish"],
                distance="(v.vector <=> %(wish_text)s::vector)",
                table="text_vectors",
                limit=part,
                where="",
            )
        )
    if recent:
        picked.append(
            f"(SELECT item_id, {SOURCES['co_visitation']} AS source, row_number() OVER (ORDER BY evidence DESC, item_id) AS place, "
            "evidence FROM (SELECT c.neighbour_id AS item_id, sum(c.score / sqrt(r.place)) AS evidence "
            "FROM unnest(%(recent)s::text[]) WITH ORDINALITY AS r (item_id, place) JOIN co_visitation AS c ON c.item_id = r.item_id "
            f"WHERE {listed.format('c.neighbour_id')} GROUP BY 1 ORDER BY evidence DESC LIMIT {part}) AS visited)"
        )
    for name, size in (("trending", part), ("fresh", few)):
        picked.append(
            f"(SELECT p.item_id, {SOURCES[name]} AS source, row_number() OVER (ORDER BY p.rank) AS place, 0::float8 AS evidence "
            f"FROM popular_items AS p WHERE p.list = '{name}' AND {listed.format('p.item_id')} "
            f"ORDER BY p.rank LIMIT {size})"
        )
    return picked, parameters


def _db(statements: int) -> dict[str, str | int]:
    return {"db.system.name": "postgresql", "db.operation.batch.size": statements}
