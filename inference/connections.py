"""Connections to Postgres whose every wait ends: opened aside, watched by a deadline, replaced once when found dead."""

from __future__ import annotations

import logging
import math
import select
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import psycopg
from psycopg.abc import PQGen
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.waiting import Ready, Wait

from inference.breaker import Breaker
from schemas.errors import Unavailable

logger = logging.getLogger(__name__)

T = TypeVar("T")

_NEVER = 1 << 30
"""Executions before psycopg prepares a statement by itself."""
_CONNECT_SECONDS = 2
"""libpq knows no shorter limit than this. No request waits for it: see `Connections._open`."""
_SETTINGS: dict[str, str | int] = {
    "connect_timeout": _CONNECT_SECONDS,
    # A peer that is gone is noticed by the system too, in half a minute instead of two hours.
    "keepalives_idle": 20,
    "keepalives_interval": 5,
    "keepalives_count": 2,
    "tcp_user_timeout": 10_000,
}
"""What holds unless the URL says otherwise."""
LEAST_MS = 2.0
"""With less time than this nothing is asked: no answer comes that soon, and each try would cost a connection."""
PATIENCE_MS = 50
"""Whoever gives the database less time than this learns nothing about it from getting no answer."""
SUSPECT_SECONDS = 5.0
"""A connection that lay idle for so long may be dead without a sign: a frozen process, a router that forgot it."""
_SUSPECT_SHARE = 0.4
"""Such a one gets so much of the time; what is left is for a new connection."""
_LATE_MS = 5.0
"""The server is told to give up so much earlier than we do: then its refusal arrives, and the connection is kept."""

_EVENTS = {
    Wait.R: select.POLLIN,
    Wait.W: select.POLLOUT,
    Wait.RW: select.POLLIN | select.POLLOUT,
}


class StatementFailed(Unavailable):
    """The database is there and refused this statement; another rung asks less of it."""


class Busy(Unavailable):
    """Nothing was asked: all connections were in use for as long as the request could wait, or it could not wait at all."""


class Lost(Unavailable):
    """The connection went, or gave no sign of life in time."""


class NoAnswer(psycopg.OperationalError):
    """The deadline passed while the socket was silent; the connection is closed."""


class StoreConnection(psycopg.Connection[Any]):
    """A connection that knows what its session holds, so that nothing is set or prepared twice, and until when it may wait."""

    pooled = False
    """Whether a pooler stands between: the next transaction may then meet another session."""
    timeout_ms: int | None = None
    """The statement timeout of a session that is set for `Store.read_row`; None: it is not."""
    until: float = math.inf
    """Instant of `time.monotonic()` at which whatever is waited for is given up."""
    used_at: float = 0.0
    generation = 0

    def __init__(self, pgconn: psycopg.pq.abc.PGconn) -> None:
        super().__init__(pgconn)
        self.prepared: dict[str, bytes] = {}
        """Names of the statements that `Store.read_row` has asked in this session."""

    def server_ms(self) -> int:
        """The statement timeout to set: what is left, less the way back."""
        left = (self.until - time.monotonic()) * 1_000
        return max(1, int(min(left - min(_LATE_MS, left / 4), 2**31 - 1)))

    def wait(self, gen: PQGen[T], interval: float = 0.1, timeout: float | None = None) -> T:
        """Drive `gen`, as psycopg does for everything that it sends and receives, and not past `until`.

        The driver itself would wait for as long as TCP does. Raises NoAnswer, and closes the connection: what comes over
        it later would be taken for the answer to another question.
        """
        until = self.until if timeout is None else min(self.until, time.monotonic() + timeout)
        try:
            wanted = next(gen)
            descriptor = self.pgconn.socket
            poll = select.poll()
            poll.register(descriptor, _EVENTS[wanted])
            while True:
                left = until - time.monotonic()
                if left <= 0:
                    raise NoAnswer("the deadline passed")
                found = poll.poll(None if left == math.inf else math.ceil(left * 1_000))
                if not found:
                    continue
                event, ready = found[0][1], 0
                # An error or a hang-up is found by reading.
                if event & ~select.POLLOUT:
                    ready |= Ready.R
                if event & ~select.POLLIN:
                    ready |= Ready.W
                wanted = gen.send(Ready(ready))
                poll.modify(descriptor, _EVENTS[wanted])
        except StopIteration as end:
            result: T = end.value
            return result
        except BaseException as error:
            if isinstance(error, NoAnswer) or not isinstance(error, psycopg.Error):
                self.pgconn.finish()  # stopped in the middle of a message
            with suppress(psycopg.Error):  # what it still wants to tell a server that is gone
                gen.close()
            raise

    def gone(self) -> bool:
        """Whether the other side has closed, or said something that nobody asked for: seen without a round trip."""
        if self.closed:
            return True
        poll = select.poll()
        poll.register(self.pgconn.socket, select.POLLIN)
        return bool(poll.poll(0))


class _Opening:
    """A connection that a thread is opening for somebody who may stop waiting for it."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.abandoned = False
        self.connection: StoreConnection | None = None


class Connections:
    """At most `size` connections to `url`, opened when needed. Safe between threads."""

    def __init__(self, url: str, size: int, name: str) -> None:
        self.url, self.size = url, size
        self.breaker = Breaker(name, judge=_judge)
        self._changed = threading.Condition()
        self._idle: list[StoreConnection] = []
        self._open_now = 0
        self._generation = 0

    def run(self, question: Callable[[StoreConnection], T], timeout_ms: float) -> T:
        """What `question` reads, within `timeout_ms`, whatever the socket does.

        If a connection that was open before turns out to be dead, the question is asked once more on a new one: it must
        be one that can be asked twice. Raises StatementFailed if the database refuses the statement, Unavailable if it
        cannot be reached or does not answer in time.
        """
        until = time.monotonic() + timeout_ms / 1_000
        if timeout_ms < LEAST_MS:
            raise Busy(f"{timeout_ms:.1f} ms are too little to ask the database anything")
        with self.breaker.call(conclusive=timeout_ms >= PATIENCE_MS):
            connection, reused = self._take(until)
            first_until = until
            if reused and time.monotonic() - connection.used_at > SUSPECT_SECONDS:
                first_until -= (until - time.monotonic()) * (1 - _SUSPECT_SHARE)
            try:
                return self._ask(connection, question, first_until)
            except Lost:
                if not reused or time.monotonic() >= until:
                    raise
            # What killed this one has most likely killed the others.
            self.close()
            connection, _ = self._take(until)
            return self._ask(connection, question, until)

    @property
    def in_use(self) -> int:
        """How many connections somebody holds at this moment, or is opening."""
        return self._open_now - len(self._idle)

    @contextmanager
    def connection(self, timeout_ms: float | None = None) -> Iterator[StoreConnection]:
        """A connection in autocommit for whatever the block asks, within `timeout_ms` if given.

        For commands and tests, not for requests: the breaker has no say. Raises as `run` does.
        """
        until = math.inf if timeout_ms is None else time.monotonic() + timeout_ms / 1_000
        with self._lent(self._take(until)[0], until) as connection:
            yield connection

    def close(self) -> None:
        """Close every idle connection, and those in use when they come back."""
        with self._changed:
            idle, self._idle = self._idle, []
            self._open_now -= len(idle)
            self._generation += 1
            self._changed.notify_all()
        for connection in idle:
            connection.close()

    def _ask(self, connection: StoreConnection, question: Callable[[StoreConnection], T], until: float) -> T:
        with self._lent(connection, until):
            return question(connection)

    @contextmanager
    def _lent(self, connection: StoreConnection, until: float) -> Iterator[StoreConnection]:
        connection.until = until
        try:
            yield connection
        except psycopg.Error as error:
            raise _said(error, connection) from error
        except BaseException:
            connection.close()  # the block ended in the middle of something
            raise
        finally:
            connection.until = math.inf
            self._give_back(connection)

    def _take(self, until: float) -> tuple[StoreConnection, bool]:
        """A connection, and whether it was open before. Raises Lost, or Busy if none is free in time."""
        with self._changed:
            while True:
                while self._idle:
                    connection = self._idle.pop()
                    if not connection.gone():
                        return connection, True
                    connection.close()
                    self._open_now -= 1
                if self._open_now < self.size:
                    self._open_now += 1
                    break
                left = until - time.monotonic()
                if left <= 0 or not self._changed.wait(None if left == math.inf else left):
                    raise Busy(f"all {self.size} connections to the database are in use")
        return self._open(until), False

    def _open(self, until: float) -> StoreConnection:
        """A new connection. Looking up a name, a handshake or a log-in may take longer than a request has: a thread waits
        for them, and what comes too late for this request is there for the next one."""
        opening = _Opening()
        # A process that was restored from a snapshot has no thread waiting here: one is started when it is needed.
        threading.Thread(target=self._connect, args=(opening,), name="larder-connect", daemon=True).start()
        left = until - time.monotonic()
        if not opening.done.wait(None if left == math.inf else max(0.0, left)):
            with self._changed:
                if not opening.done.is_set():
                    # It does not count any more: one that never comes must not keep others from trying.
                    opening.abandoned = True
                    self._open_now -= 1
                    self._changed.notify()
                    raise Lost("the database cannot be reached in time")
        if opening.connection is None:
            raise Lost("the database cannot be reached")
        return opening.connection

    def _connect(self, opening: _Opening) -> None:
        with self._changed:
            generation = self._generation
        connection = None
        try:
            connection = _connected(self.url)
            connection.generation = generation
        except Exception as error:  # noqa: BLE001 - whoever waits must be told, whatever it was
            # A driver's message may quote the URL.
            logger.warning("no connection to %s: %s", self.breaker.name, type(error).__name__)
        with self._changed:
            if not opening.abandoned:
                opening.connection = connection
                if connection is None:
                    self._open_now -= 1
                    self._changed.notify()
                opening.done.set()
                return
            room = connection is not None and self._open_now < self.size
            self._open_now += room
        if connection is not None and room:
            self._give_back(connection)
        elif connection is not None:
            connection.close()

    def _give_back(self, connection: StoreConnection) -> None:
        idle = connection.pgconn.transaction_status == psycopg.pq.TransactionStatus.IDLE
        connection.used_at = time.monotonic()
        with self._changed:
            if connection.closed or not idle or connection.generation != self._generation:
                connection.close()
                self._open_now -= 1
            else:
                self._idle.append(connection)
            self._changed.notify()


def _connected(url: str) -> StoreConnection:
    settings = {name: value for name, value in _SETTINGS.items() if name not in conninfo_to_dict(url)}
    connection = StoreConnection.connect(
        make_conninfo(url, **settings),
        autocommit=True,
        # Nothing is prepared by itself: only what every request asks is worth it, and says so in `Store`.
        prepare_threshold=_NEVER,
        application_name="larder",
        client_encoding="UTF8",
    )
    try:
        connection.until = time.monotonic() + _CONNECT_SECONDS
        answering = connection.execute("SELECT pg_backend_pid()").fetchone()
        connection.until = math.inf
        if answering is None or answering[0] != connection.info.backend_pid:
            # A pooler stands between: the next transaction may meet a server that prepared something else.
            connection.prepare_threshold = None
            connection.pooled = True
    except BaseException:
        connection.close()
        raise
    return connection


def _said(error: psycopg.Error, connection: StoreConnection) -> Unavailable:
    """`error` as what the caller can do about it."""
    if isinstance(error, NoAnswer):
        return Lost("the database did not answer in time")
    if isinstance(error, psycopg.errors.QueryCanceled):
        return Unavailable("the database did not answer in time")
    if isinstance(error, psycopg.errors.UndefinedColumn | psycopg.errors.UndefinedTable):
        # This code was deployed before the database was: a feature was added and its tables are not made yet.
        message = (
            f"the database does not have the tables of this version's features yet ({error.diag.message_primary}); "
            "`make run` or `make serve` with this version makes them"
        )
        # A recommendation goes down a rung, and its answer names the rung alone.
        logger.error(message)
        return StatementFailed(message)
    if isinstance(error, psycopg.errors.InsufficientPrivilege | psycopg.errors.UndefinedFunction):
        message = (
            f"the database does not let this role do that ({error.diag.message_primary}); `make run`, `make serve` or "
            "`python -m infra.postgres migrate` with this version gives each role its rights"
        )
        logger.error(message)
        return StatementFailed(message)
    state = error.sqlstate
    if state is None and isinstance(error, psycopg.OperationalError | psycopg.InterfaceError | psycopg.InternalError):
        if not isinstance(error, psycopg.errors.PipelineAborted):
            connection.close()  # nothing that comes over it can be trusted any more
            return Lost("the database cannot be reached")
    elif state is not None and state[:2] in ("08", "57"):  # connection exception, operator intervention
        connection.close()
        return Lost("the database cannot be reached")
    # The text may quote what a person sent.
    logger.error("the database refused a statement: %s (SQLSTATE %s)", type(error).__name__, state)
    return StatementFailed(f"the database refused a statement (SQLSTATE {state}); the function's log names it")


def _judge(error: Exception) -> bool | None:
    if isinstance(error, StatementFailed):
        return True
    return False if isinstance(error, Unavailable) and not isinstance(error, Busy) else None
