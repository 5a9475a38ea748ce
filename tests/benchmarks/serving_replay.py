"""What a request asks of Postgres and of ONNX Runtime, taken down while it runs and asked again by itself.

The difference to the whole request is our Python's own time, the door and the driver included.
"""

from __future__ import annotations

import select
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import psycopg
from psycopg import pq
from psycopg._queries import PostgresQuery

from inference import store
from inference.ranker import CutEngine, Inputs
from inference.wire import Wire

Statement = tuple[str, dict[str, Any] | None]
Run = Callable[[], Any]


@dataclass(slots=True)
class Taken:
    """One request: its pipelines, each some statements, and the ranker's runs."""

    pipelines: list[list[Statement]] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)


class Recorder:
    """Takes down what the requests in its block ask; call `begin` before each."""

    def __init__(self) -> None:
        self.taken: list[Taken] = []

    def begin(self) -> None:
        self.taken.append(Taken())

    @contextmanager
    def recording(self) -> Iterator[None]:
        execute, set_locally, begin, finish = store._execute, store.set_locally, CutEngine.begin, CutEngine.finish
        open_wire, ask = Wire.__init__, Wire.ask
        asking = threading.get_ident()  # what the log's thread writes after an answer is no part of it

        def setting(connection: Any, *arguments: Any, **more: Any) -> None:
            if threading.get_ident() == asking:
                self.taken[-1].pipelines.append([])  # every pipeline begins with its settings
            set_locally(connection, *arguments, **more)

        def executing(connection: Any, sql: str, parameters: dict[str, Any] | None = None, **more: Any) -> Any:
            if threading.get_ident() == asking:
                self.taken[-1].pipelines[-1].append((sql, parameters))
            return execute(connection, sql, parameters, **more)

        def opening(pipeline: Wire, connection: Any) -> None:
            if threading.get_ident() == asking:
                self.taken[-1].pipelines.append([])
            open_wire(pipeline, connection)

        def sending(pipeline: Wire, sql: str, parameters: Any = None, **more: Any) -> None:
            if threading.get_ident() == asking:
                self.taken[-1].pipelines[-1].append((sql, parameters))
            ask(pipeline, sql, parameters, **more)

        def beginning(engine: CutEngine, person: Inputs) -> Any:
            self.taken[-1].runs.append(lambda: begin(engine, person))
            return begin(engine, person)

        def finishing(engine: CutEngine, states: Inputs, candidates: Inputs) -> Any:
            self.taken[-1].runs.append(lambda: finish(engine, states, candidates))
            return finish(engine, states, candidates)

        with (
            mock.patch.object(store, "set_locally", setting),
            mock.patch.object(store, "_execute", executing),
            mock.patch.object(Wire, "__init__", opening),
            mock.patch.object(Wire, "ask", sending),
            mock.patch.object(CutEngine, "begin", beginning),
            mock.patch.object(CutEngine, "finish", finishing),
        ):
            yield


class BareConnection:
    """libpq and nothing else: statements prepared once, parameters turned into bytes beforehand, results left as they came."""

    def __init__(self, url: str) -> None:
        self._connection = psycopg.connect(url, autocommit=True, options="-c TimeZone=UTC")
        self._prepared: dict[bytes, bytes] = {}

    def ready(self, pipeline: Sequence[Statement]) -> list[tuple[bytes, PostgresQuery]]:
        """`pipeline` as it will be sent, its statements prepared."""
        found = []
        for sql, parameters in pipeline:
            query = PostgresQuery(psycopg.adapt.Transformer(self._connection))
            query.convert(sql, parameters)
            name = self._prepared.get(query.query)
            if name is None:
                name = self._prepared[query.query] = f"bare_{len(self._prepared)}".encode()
                result = self._connection.pgconn.prepare(name, query.query, query.types)
                assert result.status == pq.ExecStatus.COMMAND_OK, result.error_message
            found.append((name, query))
        return found

    def ask(self, pipeline: Sequence[tuple[bytes, PostgresQuery]]) -> float:
        """Seconds until the last byte of the answers is here. One round trip, one transaction, as the function's own."""
        wire = self._connection.pgconn
        wire.enter_pipeline_mode()
        wire.nonblocking = 1
        began = time.perf_counter()
        for name, query in pipeline:
            wire.send_query_prepared(name, query.params, query.formats, result_format=pq.Format.BINARY)
        wire.pipeline_sync()
        poll = select.poll()
        poll.register(wire.socket, select.POLLIN)
        while wire.flush():
            poll.poll(10)
        while True:
            while wire.is_busy():
                poll.poll()
                wire.consume_input()
            result = wire.get_result()
            if result is not None and result.status == pq.ExecStatus.PIPELINE_SYNC:
                break
            assert result is None or result.status == pq.ExecStatus.TUPLES_OK, result.error_message
        took = time.perf_counter() - began
        wire.nonblocking = 0
        wire.exit_pipeline_mode()
        return took

    def close(self) -> None:
        self._connection.close()


@contextmanager
def alone(url: str, taken: Sequence[Taken]) -> Iterator[Callable[[int], tuple[float, ...]]]:
    """What asks request number n of `taken` again part by part, each by itself: milliseconds of its two pipelines, of the
    ranker's first run and of its others."""
    bare = BareConnection(url)
    try:
        asked = [[bare.ready(pipeline) for pipeline in one.pipelines] for one in taken]

        def ask(number: int) -> tuple[float, ...]:
            pipelines = [bare.ask(pipeline) * 1e3 for pipeline in asked[number]]
            first, *others = [milliseconds(run) for run in taken[number].runs]
            return *pipelines, first, sum(others)

        yield ask
    finally:
        bare.close()


def milliseconds(run: Run) -> float:
    """How long it takes."""
    began = time.perf_counter()
    run()
    return (time.perf_counter() - began) * 1e3
