"""A pipeline over libpq itself: statements whose answers are taken one by one, while the server works on those behind them.

A driver's pipeline gives everything at its end. Here `flush` asks the server to hand over what it has, and whoever waits for
an answer waits for that one alone: in between there is time to compute. One Sync at the end makes one transaction, and
nobody waits for it twice.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import date, datetime
from functools import lru_cache

import psycopg
from psycopg import generators, pq

from inference.connections import StoreConnection

_NAMED = re.compile(r"%\((\w+)\)s")
_STATEMENTS = 256
"""Distinct statements whose placeholders are kept as numbers; a process asks a few dozen."""


@contextmanager
def wire(connection: StoreConnection) -> Iterator[Wire]:
    """A pipeline on `connection` for as long as the block runs.

    A statement that the database refuses leaves the connection fit for use; a block that ends in another error closes it,
    because what is still to come would be taken for another answer.
    """
    connection.pgconn.enter_pipeline_mode()
    opened = Wire(connection)
    try:
        yield opened
        opened._end()
    except psycopg.Error:
        # Statements that were to be prepared on the way may not have been: the next one would not find them. And one that
        # could not be sent leaves the pipeline open.
        if opened._prepares or connection.pgconn.pipeline_status != pq.PipelineStatus.OFF:
            connection.close()
        raise
    except BaseException:
        connection.close()
        raise


class Wire:
    """An open pipeline; see `wire`. Answers come in the order of the questions."""

    def __init__(self, connection: StoreConnection) -> None:
        self._connection = connection
        self._pgconn = connection.pgconn
        self._coming: deque[bool] = deque()
        """Of each answer that is still to come, whether somebody wants it."""
        self._prepares = False
        self._held_back = False
        """Whether the server may keep answers to itself."""

    def ask(self, sql: str, parameters: Mapping[str, object] | None = None, *, wanted: bool = True) -> None:
        """Send a statement with placeholders by name; `row` gives the answer if it is `wanted`.

        One with parameters is prepared in the session that is ours alone, and from then on sent by its name.
        """
        text, names = _numbered(sql)
        values = [_as_text((parameters or {})[name]) for name in names]
        if parameters is None or self._connection.pooled:
            self._pgconn.send_query_params(text, values, result_format=pq.Format.BINARY)
        else:
            name = self._connection.prepared.get(sql)
            if name is None:
                name = self._connection.prepared[sql] = f"wire_{len(self._connection.prepared)}".encode()
                self._prepares = True
                self._pgconn.send_prepare(name, text)
                self._coming.append(False)
            self._pgconn.send_query_prepared(name, values, result_format=pq.Format.BINARY)
        self._coming.append(wanted)
        self._held_back = True

    def flush(self) -> None:
        """Have the server give what it has, as soon as it has it; does not wait for that."""
        self._pgconn.send_flush_request()
        self._connection.wait(generators.send(self._pgconn))
        self._held_back = False

    def row(self) -> list[bytes | None]:
        """The one row of the next wanted answer, every value in binary. Raises what the database says instead."""
        if self._held_back:
            self.flush()
        while True:
            wanted, result = self._coming.popleft(), self._next()
            if result.status not in (pq.ExecStatus.TUPLES_OK, pq.ExecStatus.COMMAND_OK):
                self._end()
                raise psycopg.errors.error_from_result(result)
            if wanted:
                return [result.get_value(0, column) for column in range(result.nfields)]

    def _next(self) -> pq.abc.PGresult:
        results = self._connection.wait(generators.fetch_many(self._pgconn))
        if self._connection.closed or not results:  # then there may be no SQLSTATE
            raise psycopg.OperationalError("the connection was lost")
        last: pq.abc.PGresult = results[-1]
        return last

    def _end(self) -> None:
        """Wait for the end of the transaction. Raises the first error among answers that nobody has taken."""
        if self._pgconn.pipeline_status == pq.PipelineStatus.OFF:
            return
        self._pgconn.pipeline_sync()
        self._connection.wait(generators.send(self._pgconn))
        failed: pq.abc.PGresult | None = None
        while (result := self._next()).status != pq.ExecStatus.PIPELINE_SYNC:
            if failed is None and result.status not in (pq.ExecStatus.TUPLES_OK, pq.ExecStatus.COMMAND_OK):
                failed = result
        self._coming.clear()
        self._pgconn.exit_pipeline_mode()
        if failed is not None and failed.status != pq.ExecStatus.PIPELINE_ABORTED:
            raise psycopg.errors.error_from_result(failed)


@lru_cache(_STATEMENTS)
def _numbered(sql: str) -> tuple[bytes, tuple[str, ...]]:
    """`sql` with numbers for its placeholders, and the names in the order of the numbers."""
    names: dict[str, int] = {}

    def number(found: re.Match[str]) -> str:
        return f"${names.setdefault(found[1], len(names) + 1)}"

    return _NAMED.sub(number, sql).encode(), tuple(names)


def _as_text(value: object) -> bytes | None:
    """A parameter as text, whose type the statement tells."""
    if value is None:
        return None
    if isinstance(value, datetime | date):
        return value.isoformat().encode()
    if isinstance(value, str | int | float):
        text = str(value).encode()
        if b"\0" in text:  # libpq would send what stands before it
            raise psycopg.DataError("a parameter holds a zero byte, which no text in Postgres can")
        return text
    raise TypeError(f"a parameter is a {type(value).__name__}, which this pipeline does not send")
