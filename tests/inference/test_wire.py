"""A pipeline whose answers are taken one by one: in order, while the server works on; what fails leaves nothing behind."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, date, datetime

import psycopg
import pytest

from inference.connections import Connections, Lost, StatementFailed, StoreConnection
from inference.wire import wire

SLEEP = "SELECT 'late'::text, pg_sleep(%(seconds)s::float8)::text"


@pytest.fixture
def connections(database: str) -> Iterator[Connections]:
    made = Connections(database, 1, "the database")
    yield made
    made.close()


def backend(connection: StoreConnection) -> int:
    return connection.info.backend_pid


def test_an_answer_is_there_while_the_next_is_made(connections: Connections) -> None:
    def question(connection: StoreConnection) -> tuple[list[bytes | None], float, list[bytes | None], float]:
        with wire(connection) as pipeline:
            pipeline.ask("SELECT set_config('work_mem', '2MB', true)", wanted=False)
            pipeline.ask("SELECT %(a)s::text, %(b)s::text, %(a)s::text", {"a": "x", "b": None})
            pipeline.flush()
            began = time.perf_counter()
            pipeline.ask(SLEEP, {"seconds": 0.4})
            pipeline.flush()
            first = pipeline.row()
            soon = time.perf_counter() - began
            second = pipeline.row()
            return first, soon, second, time.perf_counter() - began

    first, soon, second, late = connections.run(question, 5_000)
    assert first == [b"x", None, b"x"]
    assert second[0] == b"late"
    assert soon < 0.3 < late


def test_it_is_one_transaction_and_its_settings_end_with_it(connections: Connections) -> None:
    ask = "SELECT pg_current_xact_id()::text, current_setting('work_mem')"

    def question(connection: StoreConnection) -> list[list[bytes | None]]:
        with wire(connection) as pipeline:
            pipeline.ask("SELECT set_config('work_mem', '2MB', true)", wanted=False)
            pipeline.ask(ask)
            pipeline.flush()
            pipeline.ask(ask)
            return [pipeline.row(), pipeline.row()]

    (one, other), (after, _) = (connections.run(question, 5_000) for _ in range(2))
    assert one == other
    assert one[1] == b"2MB"
    assert after[0] != one[0]
    with connections.connection() as connection:
        assert connection.execute("SHOW work_mem").fetchone() != ("2MB",)


def test_parameters_are_of_the_type_that_the_statement_wants(connections: Connections) -> None:
    at = datetime(2026, 3, 1, 12, 30, 1, 250, tzinfo=UTC)

    def question(connection: StoreConnection) -> list[bytes | None]:
        with wire(connection) as pipeline:
            pipeline.ask(
                "SELECT (%(at)s::timestamptz = timestamptz '2026-03-01 12:30:01.00025+00')::text, "
                "(%(day)s::date - 3)::text, (%(many)s::text[])[2], (%(n)s::int + 1)::text",
                {"at": at, "day": date(2026, 3, 1), "many": '{"a","b"}', "n": 4, "more": object()},
            )
            return pipeline.row()

    assert connections.run(question, 5_000) == [b"true", b"2026-02-26", b"b", b"5"]
    with pytest.raises(TypeError, match="a parameter is a list"):
        connections.run(lambda c: _ask(c, "SELECT %(a)s::text[]", {"a": ["x"]}), 5_000)


def _ask(connection: StoreConnection, sql: str, parameters: dict[str, object]) -> list[bytes | None]:
    with wire(connection) as pipeline:
        pipeline.ask(sql, parameters)
        return pipeline.row()


def test_statements_are_prepared_once_in_a_session_of_our_own_and_never_behind_a_pooler(
    connections: Connections,
) -> None:
    for _ in range(3):
        connections.run(lambda c: _ask(c, "SELECT %(a)s::text", {"a": "1"}), 5_000)
    with connections.connection() as connection:
        prepared = "SELECT name, statement FROM pg_prepared_statements"
        assert connection.execute(prepared).fetchall() == [("wire_0", "SELECT $1::text")]
        connection.pooled = True
    connections.run(lambda c: _ask(c, "SELECT %(b)s::text", {"b": "1"}), 5_000)
    with connections.connection() as connection:
        assert len(connection.execute(prepared).fetchall()) == 1


@pytest.mark.parametrize("taken", [True, False])
@pytest.mark.parametrize("known", [True, False])
def test_a_refused_statement_is_told_and_the_next_question_is_answered(
    connections: Connections, taken: bool, known: bool
) -> None:
    sql = "SELECT 1 / %(n)s::int"

    def question(connection: StoreConnection) -> object:
        with wire(connection) as pipeline:
            pipeline.ask(sql, {"n": 0})
            pipeline.flush()
            pipeline.ask("SELECT %(a)s::text", {"a": "behind it"})
            return pipeline.row() if taken else None

    if known:
        connections.run(lambda c: _ask(c, sql, {"n": 1}), 5_000)
        connections.run(lambda c: _ask(c, "SELECT %(a)s::text", {"a": ""}), 5_000)
    before = connections.run(backend, 5_000)
    with pytest.raises(StatementFailed, match="SQLSTATE 22012"):
        connections.run(question, 5_000)
    assert connections.run(lambda c: _ask(c, "SELECT %(a)s::text", {"a": "x"}), 5_000) == [b"x"]
    # A session in which statements were to be prepared and may not have been is not used any more.
    assert (connections.run(backend, 5_000) == before) == known


def test_a_block_that_fails_leaves_no_answer_for_the_next_question(connections: Connections) -> None:
    def question(connection: StoreConnection) -> None:
        with wire(connection) as pipeline:
            pipeline.ask("SELECT %(a)s::text", {"a": "of the block that failed"})
            raise KeyError("a fault of ours")

    with pytest.raises(KeyError):
        connections.run(question, 5_000)
    assert connections.run(lambda c: _ask(c, "SELECT %(a)s::text", {"a": "x"}), 5_000) == [b"x"]


def test_a_parameter_that_cannot_be_sent_leaves_no_pipeline_open(connections: Connections) -> None:
    with pytest.raises(StatementFailed):
        connections.run(lambda c: _ask(c, "SELECT %(a)s::text", {"a": "x\0y"}), 5_000)
    with connections.connection() as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)


def test_what_is_not_there_in_time_is_given_up(connections: Connections) -> None:
    began = time.perf_counter()
    with pytest.raises(Lost, match="did not answer in time"):
        connections.run(lambda c: _ask(c, SLEEP, {"seconds": 5}), 150)
    assert time.perf_counter() - began < 1.0
    assert connections.run(lambda c: _ask(c, "SELECT %(a)s::text", {"a": "x"}), 5_000) == [b"x"]


def test_a_server_that_ends_the_session_is_lost_and_asked_anew(connections: Connections, database: str) -> None:
    connections.run(backend, 5_000)
    tried = []

    def question(connection: StoreConnection) -> list[bytes | None]:
        tried.append(backend(connection))
        with wire(connection) as pipeline:
            pipeline.ask("SELECT %(a)s::text", {"a": "x"})
            pipeline.flush()
            if len(tried) == 1:
                with psycopg.connect(database, autocommit=True) as other:
                    other.execute("SELECT pg_terminate_backend(%s, 5000)", (tried[0],))
            pipeline.ask("SELECT %(a)s::text", {"a": "y"})
            pipeline.row()
            return pipeline.row()

    assert connections.run(question, 5_000) == [b"y"]
    assert len(set(tried)) == 2
