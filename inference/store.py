"""Everything a function asks of Postgres: named SQL, one pipeline per question, rows into numpy.

A recommendation takes two round trips: `read_person` and `pick_candidates`. Each sends all its statements at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import date, datetime, timedelta
from functools import cache
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
import psycopg
from numpy.typing import NDArray
from psycopg import generators

from inference import cached_items
from inference.ahead import Ahead
from inference.breaker import Breaker
from inference.cached_items import CachedItems
from inference.candidates import Candidates, Filters, candidates_of, candidates_sql
from inference.connections import Connections, StoreConnection
from inference.live import HEAD_MOST, Columns, live_columns, snapshot_columns, utc_day
from inference.sql_files import half_vectors, statement, vector_literal
from inference.telemetry import span
from schemas import catalogue_sql, online_sql, prompts
from schemas.feature_sql import read_sql
from schemas.features import Entity, FeatureView
from schemas.functions import SERVED_KEPT_DAYS
from schemas.ranker import MAX_HISTORY
from schemas.views import CONTEXT_VIEWS, CROSS_VIEWS

T = TypeVar("T")

SERVED_KEPT = timedelta(days=SERVED_KEPT_DAYS)
_SHOWN_PERSON = (
    "user_id = %(user_id)s AND NOT EXISTS (SELECT FROM erasure_requests AS q WHERE q.user_id = %(user_id)s)"
    " AND coalesce((SELECT c.personalise FROM consents AS c WHERE c.user_id = %(user_id)s), %(unless_said)s::boolean)"
)
"""Who asked to be forgotten, or does not agree to being personalised, reads as unknown from that moment on."""
SEARCH = {"hnsw.ef_search": "280", "hnsw.iterative_scan": "strict_order"}
"""An HNSW index stops at 40 rows by itself and filters only what it found: look wider, and go on until there are enough.
Half of 500 candidates, and what a person had among them, fit into the first look: a second one costs more than a wider first."""
PLAN_ONCE = {"plan_cache_mode": "force_generic_plan"}
"""A request's statements have one good plan each, whatever their parameters. Making it for every request, over every
day's partition of the recent events, takes longer than running it."""
_ROW = PLAN_ONCE | {"enable_seqscan": "off"}
"""What is asked by key goes by the index, also when the plan was made while the table was still small."""
NO_COLUMNS = Columns([], {}, np.zeros(0), False)
"""A view of which nothing was read."""
_PLAN_EACH = {"plan_cache_mode": "auto", "enable_seqscan": "on"}
"""What holds for all others, whatever stayed in the session."""


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
    wish_template: str = prompts.DEFAULTS["wish"]
    """The one that won, for those who answer without a model."""
    model_version: str | None = None
    """The version whose item vectors the history has."""
    personalise: bool = True
    """False: the person has not agreed to it, and nothing of them was read."""
    held_back: list[str] = field(default_factory=list)
    """Items shown lately without a reaction, where that was asked for."""
    catalogue: str | None = None
    """The state of what is kept of items, see `inference.item_cache.ItemCache.get`."""


@dataclass(slots=True)
class Store:
    """Questions to one database, over at most `size` connections; `name` says in messages and metrics whose they are.

    Every method takes the time that it may have, and ends in it whatever the network does. All raise StatementFailed if
    the database refuses a statement, and Unavailable if it cannot be reached or does not answer in time.
    """

    url: str = field(repr=False)
    size: int = 4
    name: str = "the database"
    _connections: Connections = field(init=False)

    def __post_init__(self) -> None:
        self._connections = Connections(self.url, self.size, self.name)

    @property
    def breaker(self) -> Breaker:
        """What keeps requests from a database that does not answer."""
        return self._connections.breaker

    @property
    def in_use(self) -> int:
        """How many questions are being asked at this moment."""
        return self._connections.in_use

    @contextmanager
    def connection(self, timeout_ms: float | None = None) -> Iterator[StoreConnection]:
        """A connection in autocommit, for at most `timeout_ms` if given; a broken one is thrown away."""
        with self._connections.connection(timeout_ms) as connection:
            yield connection

    def ask(self, question: Callable[[StoreConnection], T], timeout_ms: float) -> T:
        """What `question` reads from a connection; asked once more on a new one if the first turns out to be dead."""
        return self._connections.run(question, timeout_ms)

    def close(self) -> None:
        """Close every connection; the next question opens another."""
        self._connections.close()

    def restored(self) -> None:
        """Start anew in a process that woke from a snapshot: what was open leads nowhere."""
        self.close()
        self.breaker.reset()

    def read_row(self, sql: str, parameters: Sequence[str], timeout_ms: int) -> list[bytes | None]:
        """The one row, every value in binary, of a statement with parameters `$1`, `$2` … that is asked again and again.

        It is planned once for all parameters. Where the session is ours alone its settings stay, and all that is sent
        from the second time on is the statement's name and the parameters; behind a pooler nothing stays.
        """

        def question(connection: StoreConnection) -> list[bytes | None]:
            name = connection.prepared.get(sql)
            if name is not None and connection.timeout_ms == timeout_ms:
                # A cursor would take longer to hand this over than the server to answer it.
                values = [parameter.encode() for parameter in parameters]
                connection.pgconn.send_query_prepared(name, values, result_format=psycopg.pq.Format.BINARY)
                results = connection.wait(generators.execute(connection.pgconn))
                if connection.closed or not results:  # then there may be no SQLSTATE
                    raise psycopg.OperationalError("the connection was lost")
                result = results[-1]
                if result.status != psycopg.pq.ExecStatus.TUPLES_OK:
                    raise psycopg.errors.error_from_result(result)
            else:
                result = _first_result(connection, sql, parameters, timeout_ms)
            return [result.get_value(0, column) for column in range(result.nfields)]

        return self.ask(question, timeout_ms)

    # --- one round trip each -------------------------------------------------------------------------------------

    def read_person(
        self,
        user_id: str,
        at: datetime,
        timeout_ms: float,
        *,
        live: bool = False,
        audited: bool = False,
        model: str | None = None,
        features: bool = True,
        unless_said: bool = True,
        held_days: int = 0,
        request_id: str | None = None,
    ) -> PersonRow:
        """Champion, newest events with their item vectors, and the person's feature views, as of `at`.

        `live` says that `at` is the present: features then come packed, with all that happened until now. Without it
        they come from daily snapshots and single events, which know what was before any instant. `audited`: also which
        transactions a live read saw. `model` is the version whose item vectors are wanted, None: the champion's, whichever
        it is in the very snapshot that names it. Without `features` the views are empty. `unless_said`: whether who has
        said nothing of it agrees to being personalised; of who does not, nothing is read. With `held_days`, also the items
        that were shown within so many days before `at`, by other requests than `request_id`, and that nothing came of.
        """
        today = utc_day(at)
        parameters = {"user_id": user_id, "at": at, "limit": MAX_HISTORY, "model": model, "unless_said": unless_said}
        parameters |= {"today": today} if live else {"head_since": at - HEAD_MOST}
        views = (*CONTEXT_VIEWS, *CROSS_VIEWS)
        entities = online_sql.entities(views)
        reads = [_entity_sql(entity, audited) for entity in entities] if live else [_person_sql(view) for view in views]
        if not features:
            reads = []
        also = [statement("read_held_back")] if held_days else []
        parameters |= {"held_since": at - timedelta(days=held_days), "request_id": request_id} if held_days else {}

        def question(connection: StoreConnection) -> list[list[tuple[Any, ...]]]:
            with connection.pipeline():
                set_locally(connection, connection.server_ms(), PLAN_ONCE)
                cursors = [
                    _execute(connection, sql, parameters, prepare=True) for sql in (_history_sql(), *reads, *also)
                ]
            return [cursor.fetchall() for cursor in cursors]

        with span("db read_person", kind="client", attributes=on_postgres(2 + len(reads) + len(also))):
            rows = self.ask(question, timeout_ms)
        held_back = [item_id for (item_id,) in rows.pop()] if also else []
        champion, wish_template = _released(rows[0][0])
        history = [row[7:] for row in rows[0][::-1] if row[7] is not None]
        vectors = iter(half_vectors([row[4] for row in history if row[4] is not None]))
        if not features:
            read = {view.name: NO_COLUMNS for view in views}
        elif live:
            read = _live(entities, rows[1:], today)
        else:
            read = {view.name: snapshot_columns(view, result) for view, result in zip(views, rows[1:], strict=True)}
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
            read,
            wish_template,
            rows[0][0][4],
            rows[0][0][5],
            held_back,
            rows[0][0][6],
        )

    def pick_candidates(
        self,
        *,
        at: datetime,
        filters: Filters,
        limit: int,
        timeout_ms: float,
        champion: str | None = None,
        dim: int = 0,
        user_vector: NDArray[np.float32] | None = None,
        wish_text: NDArray[np.float32] | None = None,
        recent: Sequence[str] = (),
        given: Sequence[str] | None = None,
        live: bool = False,
        audited: bool = False,
        features: bool = True,
        ahead: Ahead | None = None,
        items: CachedItems | None = None,
    ) -> Candidates:
        """Candidates with titles, vectors and features, at most `limit`, from the sources that apply.

        `user_vector (d,)` searches the champion's item vectors, `wish_text (384,)` the text vectors; `recent` are the person's last items, newest first; `given` replaces all sources; `live`, `audited` and `features` as in `read_person`.
        `ahead` adds the list that was scored ahead; it says nothing of a wish or of what is given. With `items`, those of
        `champion` that are in memory, only what they do not tell is read, where that is enough.
        """
        if not (live and features and champion and user_vector is not None and given is None and ahead is None):
            items = None
        if not filters.by_ids:
            items = None
        sql, parameters = candidates_sql(
            at=at,
            filters=filters,
            limit=limit,
            champion=champion,
            dim=dim,
            user_vector=user_vector,
            wish_text=wish_text,
            recent=list(recent),
            given=None if given is None else list(given),
            live=live,
            audited=audited,
            features=features,
            ahead=ahead,
            packed=items is not None,
        )

        def question(connection: StoreConnection) -> list[tuple[Any, ...]]:
            with connection.pipeline():
                set_locally(connection, connection.server_ms(), SEARCH | PLAN_ONCE)
                cursor = _execute(connection, sql, parameters, prepare=True)
            return cursor.fetchall()

        with span(
            "db pick_candidates", kind="client", attributes=on_postgres(2) | {"recsys.items.cached": items is not None}
        ):
            rows = self.ask(question, timeout_ms)
        if items is not None:
            picked = cached_items.picked_of(rows[0], items)
            picked = picked.take(np.flatnonzero(picked.there(items, at)))
            return cached_items.candidates_of(picked, items, utc_day(at))
        return candidates_of(rows, dim, utc_day(at) if live else None, features=features, ahead=ahead is not None)

    def similar(
        self,
        *,
        at: datetime,
        k: int,
        filters: Filters,
        item_id: str | None,
        text: NDArray[np.float32] | None,
        timeout_ms: float,
    ) -> list[tuple[str, str, float]] | None:
        """`(item_id, title, cosine)` of the k nearest items by text; None if the anchor item has no vector."""
        if item_id is not None:
            query = "(SELECT vector FROM text_vectors WHERE item_id = %(item_id)s)"
            filters = replace(filters, exclude=[*filters.exclude, item_id])
        else:
            query = "%(text)s::vector"
        parameters: dict[str, object] = {"at": at, "k": k, "item_id": item_id, **filters.parameters()}
        if item_id is None:
            parameters["text"] = vector_literal(text)

        def question(connection: StoreConnection) -> list[tuple[str, str, float]] | None:
            with connection.pipeline():
                set_locally(connection, connection.server_ms(), SEARCH)
                known = _execute(connection, "SELECT 1 FROM text_vectors WHERE item_id = %(item_id)s", parameters)
                found = _execute(
                    connection, statement("similar_items").format(query=query, allowed=filters.allowed("i")), parameters
                )
            if item_id is not None and known.fetchone() is None:
                return None
            return found.fetchall()

        with span("db similar", kind="client", attributes=on_postgres(3)):
            return self.ask(question, timeout_ms)

    def accept_events(self, events: Sequence[dict[str, object]], timeout_ms: float) -> set[str]:
        """Store events once each; returns the ids that were new. All or none.

        If the connection was lost after the events were stored and before the answer came, the second try finds all of
        them there: they are kept once, and count as repeats.
        """
        return {row[0] for row in self.call("accept_events", [json.dumps(events)], timeout_ms)}

    def log_served(self, rows: Sequence[dict[str, object]], timeout_ms: float) -> int:
        """Keep feature vectors as they were served, of people who are not forgotten; drop old ones. Gives how many."""
        return int(self.call("log_served", [json.dumps(rows)], timeout_ms)[0][0])

    def log_served_requests(self, rows: Sequence[dict[str, object]], timeout_ms: float) -> int:
        """Keep what was shown, of people who are not forgotten; drop old rows. Gives how many were new."""
        return int(self.call("log_served_requests", [json.dumps(rows)], timeout_ms)[0][0])

    def call(self, function: str, arguments: Sequence[str], timeout_ms: float) -> list[tuple[Any, ...]]:
        """The rows of one of the database's own functions (schemas/functions.py), in one round trip."""
        sql = f"SELECT * FROM {function}({', '.join(['%s'] * len(arguments))})"
        with span(f"db {function}", kind="client", attributes=on_postgres(2)):
            return self.rows(sql, arguments, timeout_ms)

    def rows(
        self, sql: str, parameters: Sequence[str] | Mapping[str, object], timeout_ms: float
    ) -> list[tuple[Any, ...]]:
        """The rows of any one statement, in one round trip and one transaction."""

        def question(connection: StoreConnection) -> list[tuple[Any, ...]]:
            with connection.pipeline():
                set_locally(connection, connection.server_ms())
                cursor = connection.cursor(binary=True).execute(sql, parameters)
            return cursor.fetchall()

        return self.ask(question, timeout_ms)

    def ping(self, timeout_ms: float) -> Champion | None:
        """The champion, in one round trip: what `/health` measures."""

        def question(connection: StoreConnection) -> tuple[Any, ...]:
            with connection.pipeline():
                set_locally(connection, connection.server_ms())
                cursor = _execute(connection, statement("read_champion"))
            row: tuple[Any, ...] = cursor.fetchall()[0]
            return row

        return _released(self.ask(question, timeout_ms))[0]


def _released(row: tuple[Any, ...]) -> tuple[Champion | None, str]:
    """The columns of `read_champion`, with which a row of `read_history` begins."""
    return None if row[0] is None else Champion(*row[:3]), row[3] or prompts.DEFAULTS["wish"]


def _first_result(
    connection: StoreConnection, sql: str, parameters: Sequence[str], timeout_ms: int
) -> psycopg.pq.abc.PGresult:
    """What `Store.read_row` does the first time in a session: settings, statement and question in one round trip."""
    connection.timeout_ms = None  # if this fails the settings are rolled back with it
    name = f"row_{len(connection.prepared)}"
    cursor = psycopg.RawCursor(connection)
    prepares = not connection.pooled and sql not in connection.prepared
    try:
        with connection.pipeline():
            set_locally(connection, timeout_ms, _ROW, stay=not connection.pooled)
            if prepares:
                _execute(connection, f"PREPARE {name} AS {sql}")
            cursor.execute(sql.encode(), parameters, binary=True)
    except psycopg.Error:
        if prepares:  # a statement outlives what is rolled back: one more would be left with every failure
            connection.close()
        raise
    if not connection.pooled:
        connection.timeout_ms = timeout_ms
        connection.prepared.setdefault(sql, name.encode())
    assert cursor.pgresult is not None
    return cursor.pgresult


def set_locally(
    connection: psycopg.Connection[Any],
    timeout_ms: int,
    settings: Mapping[str, str] = MappingProxyType({}),
    *,
    stay: bool = False,
) -> None:
    """Settings for the rest of this pipeline, which is one transaction to the server; `stay`: for those after it too."""
    _execute(connection, settings_sql(timeout_ms, settings, stay=stay))


def settings_sql(timeout_ms: int, settings: Mapping[str, str], *, stay: bool = False) -> str:
    """The statement of `set_locally`."""
    # A zone from the environment (PGTZ) would win over one among the connection's options.
    # SET LOCAL would do the same, and warn in the server's log each time that nobody said BEGIN.
    settings = {"statement_timeout": str(timeout_ms), "TimeZone": "UTC", **_PLAN_EACH, **settings}
    local = "false" if stay else "true"
    return "SELECT " + ", ".join(f"set_config('{name}', '{value}', {local})" for name, value in settings.items())


def _execute(
    connection: psycopg.Connection[Any], sql: str, parameters: dict[str, Any] | None = None, *, prepare: bool = False
) -> psycopg.Cursor[Any]:
    # Binary results: float64 columns need no parsing, and vectors arrive as bytes without a type look-up.
    return connection.cursor(binary=True).execute(sql, parameters, prepare=prepare)


def _live(entities: Sequence[Entity], results: Sequence[Sequence[tuple[Any, ...]]], today: date) -> dict[str, Columns]:
    return {
        name: columns
        for entity, rows in zip(entities, results, strict=True)
        for name, columns in live_columns(entity, rows, today, len(entity.keys)).items()
    }


@cache
def _history_sql() -> str:
    return statement("read_history").format(catalogue=catalogue_sql.STATE)


@cache
def _entity_sql(entity: Entity, audited: bool) -> str:
    sql = online_sql.read_entity_sql(entity, _SHOWN_PERSON)
    return f"SELECT r.*, {online_sql.SEEN} FROM ({sql}) AS r" if audited else sql


@cache
def _person_sql(view: FeatureView) -> str:
    return read_sql(view, _SHOWN_PERSON)


def on_postgres(statements: int) -> dict[str, str | int]:
    """The attributes of a span around so many statements."""
    return {"db.system.name": "postgresql", "db.operation.batch.size": statements}
