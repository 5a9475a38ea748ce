"""Everything a function asks of Postgres: named SQL, one pipeline per question, rows into numpy.

A recommendation takes two round trips: `read_person` and `pick_candidates`. Each sends all its statements at once.
"""

from __future__ import annotations

import json
import logging
import queue
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import date, datetime, timedelta
from functools import cache
from types import MappingProxyType
from typing import Any

import numpy as np
import psycopg
from numpy.typing import NDArray

from inference.candidates import Candidates, Filters, candidates_of, candidates_sql
from inference.live import HEAD_MOST, Columns, live_columns, snapshot_columns, utc_day
from inference.sql_files import half_vectors, statement, vector_literal
from inference.telemetry import span
from schemas import online_sql, prompts
from schemas.errors import Unavailable
from schemas.feature_sql import read_sql
from schemas.features import Entity, FeatureView
from schemas.functions import SERVED_KEPT_DAYS
from schemas.ranker import MAX_HISTORY
from schemas.views import CONTEXT_VIEWS, CROSS_VIEWS

logger = logging.getLogger(__name__)

_NEVER = 1 << 30
"""Executions before psycopg prepares a statement by itself."""
_CONNECT_SECONDS = 2
SERVED_KEPT = timedelta(days=SERVED_KEPT_DAYS)
_SHOWN_PERSON = "user_id = %(user_id)s AND NOT EXISTS (SELECT FROM erasure_requests AS q WHERE q.user_id = %(user_id)s)"
"""Who asked to be forgotten reads as unknown from that moment on."""
_SEARCH = {"hnsw.ef_search": "200", "hnsw.iterative_scan": "strict_order"}
"""An HNSW index stops at 40 rows by itself and filters only what it found: look wider, and go on until there are enough."""
PLAN_ONCE = {"plan_cache_mode": "force_generic_plan"}
"""A request's statements have one good plan each, whatever their parameters. Making it for every request, over every
day's partition of the recent events, takes longer than running it."""
_ROW = PLAN_ONCE | {"enable_seqscan": "off"}
"""What is asked by key goes by the index, also when the plan was made while the table was still small."""
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


class StoreConnection(psycopg.Connection[Any]):
    """A connection that knows what its session holds, so that nothing is set or prepared twice."""

    pooled = False
    """Whether a pooler stands between: the next transaction may then meet another session."""
    timeout_ms: int | None = None
    """The statement timeout of a session that is set for `Store.read_row`; None: it is not."""

    def __init__(self, pgconn: psycopg.pq.abc.PGconn) -> None:
        super().__init__(pgconn)
        self.prepared: dict[str, bytes] = {}
        """Names of the statements that `Store.read_row` has asked in this session."""


@dataclass(slots=True)
class Store:
    """Connections to one database, opened when needed, at most `size` at a time."""

    url: str = field(repr=False)
    size: int = 4
    _idle: queue.LifoQueue[StoreConnection] = field(default_factory=queue.LifoQueue)

    @contextmanager
    def connection(self) -> Iterator[StoreConnection]:
        """A connection in autocommit; a broken one is thrown away. Raises Unavailable if none can be had."""
        try:
            connection = self._idle.get_nowait()
        except queue.Empty:
            connection = self._connect()
        try:
            yield connection
        except psycopg.errors.QueryCanceled as error:
            raise Unavailable("the database did not answer in time") from error
        except (
            psycopg.errors.UndefinedColumn,
            psycopg.errors.UndefinedTable,
            psycopg.errors.UndefinedFunction,
        ) as error:
            # This code was deployed before the database was: a feature was added and its tables are not made yet.
            message = (
                f"the database does not have the tables of this version's features yet ({error.diag.message_primary}); "
                "`make run` or `make serve` with this version makes them"
            )
            # A recommendation goes down a rung, and its answer names the rung alone.
            logger.error(message)
            raise Unavailable(message) from error
        except psycopg.errors.InsufficientPrivilege as error:
            message = (
                f"the database lets this role not do that ({error.diag.message_primary}); `make run`, `make serve` or "
                "`python -m infra.postgres migrate` with this version gives each role its rights"
            )
            logger.error(message)
            raise Unavailable(message) from error
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

    def _connect(self) -> StoreConnection:
        try:
            connection = StoreConnection.connect(
                self.url,
                autocommit=True,
                # Nothing is prepared by itself: only what every request asks is worth it, and says so below.
                prepare_threshold=_NEVER,
                connect_timeout=_CONNECT_SECONDS,
                application_name="larder",
                client_encoding="UTF8",
            )
            answering = connection.execute("SELECT pg_backend_pid()").fetchone()
            if answering is None or answering[0] != connection.info.backend_pid:
                # A pooler stands between: the next transaction may meet a server that prepared something else.
                connection.prepare_threshold = None
                connection.pooled = True
        except psycopg.Error as error:
            raise Unavailable("the database cannot be reached") from error
        return connection

    def read_row(self, sql: str, parameters: Sequence[str], timeout_ms: int) -> list[bytes | None]:
        """The one row, every value in binary, of a statement with parameters `$1`, `$2` … that is asked again and again.

        It is planned once for all parameters. Where the session is ours alone its settings stay, and all that is sent
        from the second time on is the statement's name and the parameters; behind a pooler nothing stays.
        """
        with self.connection() as connection:
            name = connection.prepared.get(sql)
            if name is not None and connection.timeout_ms == timeout_ms:
                # A cursor would take longer to hand this over than the server to answer it.
                values = [parameter.encode() for parameter in parameters]
                result = connection.pgconn.exec_prepared(name, values, result_format=psycopg.pq.Format.BINARY)
                if connection.closed:  # then the result may name no SQLSTATE, and would be no OperationalError
                    raise psycopg.OperationalError("the connection was lost")
                if result.status != psycopg.pq.ExecStatus.TUPLES_OK:
                    raise psycopg.errors.error_from_result(result)
            else:
                result = _first_result(connection, sql, parameters, timeout_ms)
            return [result.get_value(0, column) for column in range(result.nfields)]

    # --- one round trip each -------------------------------------------------------------------------------------

    def read_person(
        self, user_id: str, at: datetime, timeout_ms: int, *, live: bool = False, audited: bool = False
    ) -> PersonRow:
        """Champion, newest events with their item vectors, and the person's feature views, as of `at`.

        `live` says that `at` is the present: features then come packed, with all that happened until now. Without it
        they come from daily snapshots and single events, which know what was before any instant. `audited`: also which
        transactions a live read saw.
        """
        today = utc_day(at)
        parameters = {"user_id": user_id, "at": at, "limit": MAX_HISTORY}
        parameters |= {"today": today} if live else {"head_since": at - HEAD_MOST}
        views = (*CONTEXT_VIEWS, *CROSS_VIEWS)
        entities = online_sql.entities(views)
        reads = [_entity_sql(entity, audited) for entity in entities] if live else [_person_sql(view) for view in views]
        with self.connection() as connection, span("db read_person", kind="client", attributes=_db(3 + len(reads))):
            with connection.pipeline():
                set_locally(connection, timeout_ms, PLAN_ONCE)
                cursors = [
                    _execute(connection, sql, parameters, prepare=True)
                    for sql in (
                        statement("read_champion"),
                        statement("read_history"),
                        *reads,
                    )
                ]
            rows = [cursor.fetchall() for cursor in cursors]
        champion, wish_template = _released(rows[0][0])
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
            _live(entities, rows[2:], today)
            if live
            else {view.name: snapshot_columns(view, result) for view, result in zip(views, rows[2:], strict=True)},
            wish_template,
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
        live: bool = False,
        audited: bool = False,
    ) -> Candidates:
        """Candidates with titles, vectors and features, at most `limit`, from the sources that apply.

        `user_vector (d,)` searches the champion's item vectors, `wish_text (384,)` the text vectors; `recent` are the person's last items, newest first; `given` replaces all sources; `live` and `audited` as in `read_person`.
        """
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
        )
        with self.connection() as connection, span("db pick_candidates", kind="client", attributes=_db(2)):
            with connection.pipeline():
                set_locally(connection, timeout_ms, _SEARCH | PLAN_ONCE)
                cursor = _execute(connection, sql, parameters, prepare=True)
            rows = cursor.fetchall()
        return candidates_of(rows, dim, utc_day(at) if live else None)

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
        if item_id is not None:
            query = "(SELECT vector FROM text_vectors WHERE item_id = %(item_id)s)"
            filters = replace(filters, exclude=[*filters.exclude, item_id])
        else:
            query = "%(text)s::vector"
        parameters: dict[str, object] = {"at": at, "k": k, "item_id": item_id, **filters.parameters()}
        if item_id is None:
            parameters["text"] = vector_literal(text)
        with self.connection() as connection, span("db similar", kind="client", attributes=_db(3)):
            with connection.pipeline():
                set_locally(connection, timeout_ms, _SEARCH)
                known = _execute(connection, "SELECT 1 FROM text_vectors WHERE item_id = %(item_id)s", parameters)
                found = _execute(
                    connection, statement("similar_items").format(query=query, allowed=filters.allowed("i")), parameters
                )
            if item_id is not None and known.fetchone() is None:
                return None
            return found.fetchall()

    def accept_events(self, events: Sequence[dict[str, object]], timeout_ms: int) -> set[str]:
        """Store events once each; returns the ids that were new. All or none."""
        return {row[0] for row in self.call("accept_events", [json.dumps(events)], timeout_ms)}

    def log_served(self, rows: Sequence[dict[str, object]], timeout_ms: int) -> int:
        """Keep feature vectors as they were served, of people who are not forgotten; drop old ones. Gives how many."""
        return int(self.call("log_served", [json.dumps(rows)], timeout_ms)[0][0])

    def call(self, function: str, arguments: Sequence[str], timeout_ms: int) -> list[tuple[Any, ...]]:
        """The rows of one of the database's own functions (schemas/functions.py), in one round trip."""
        sql = f"SELECT * FROM {function}({', '.join(['%s'] * len(arguments))})"
        with span(f"db {function}", kind="client", attributes=_db(2)):
            return self.rows(sql, arguments, timeout_ms)

    def rows(
        self, sql: str, parameters: Sequence[str] | Mapping[str, object], timeout_ms: int
    ) -> list[tuple[Any, ...]]:
        """The rows of any one statement, in one round trip and one transaction."""
        with self.connection() as connection:
            with connection.pipeline():
                set_locally(connection, timeout_ms)
                cursor = connection.cursor(binary=True).execute(sql, parameters)
            return cursor.fetchall()

    def ping(self, timeout_ms: int) -> Champion | None:
        """The champion, in one round trip: what `/health` measures."""
        with self.connection() as connection, connection.pipeline():
            set_locally(connection, timeout_ms)
            cursor = _execute(connection, statement("read_champion"))
        return _released(cursor.fetchall()[0])[0]


def _released(row: tuple[Any, ...]) -> tuple[Champion | None, str]:
    """A row of `read_champion`."""
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
    # A zone from the environment (PGTZ) would win over one among the connection's options.
    # SET LOCAL would do the same, and warn in the server's log each time that nobody said BEGIN.
    settings = {"statement_timeout": str(timeout_ms), "TimeZone": "UTC", **_PLAN_EACH, **settings}
    local = "false" if stay else "true"
    _execute(
        connection,
        "SELECT " + ", ".join(f"set_config('{name}', '{value}', {local})" for name, value in settings.items()),
    )


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
def _entity_sql(entity: Entity, audited: bool) -> str:
    sql = online_sql.read_entity_sql(entity, _SHOWN_PERSON)
    return f"SELECT r.*, {online_sql.SEEN} FROM ({sql}) AS r" if audited else sql


@cache
def _person_sql(view: FeatureView) -> str:
    return read_sql(view, _SHOWN_PERSON)


def _db(statements: int) -> dict[str, str | int]:
    return {"db.system.name": "postgresql", "db.operation.batch.size": statements}
