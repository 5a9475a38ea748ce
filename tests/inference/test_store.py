"""The store: events once each, two round trips a recommendation, errors that say so."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from urllib.parse import parse_qs, urlsplit

import numpy as np
import psycopg
import pytest
from conftest import TODAY

from inference import store as store_module
from inference.candidates import Filters
from inference.sql_files import vector_literal
from inference.store import Store
from schemas.errors import Unavailable


@pytest.fixture
def store(database: str) -> Iterator[Store]:
    opened = Store(database)
    yield opened
    opened.close()


def posted(number: int, **changes: object) -> dict[str, object]:
    base = {"event_id": f"e{number}", "user_id": "u", "item_id": "i", "kind": "view", "value": None, "request_id": None}
    return base | {"occurred_at": (TODAY + timedelta(seconds=number)).isoformat()} | changes


def test_a_repeated_event_changes_nothing(store: Store, connection: psycopg.Connection) -> None:
    assert store.accept_events([posted(1), posted(2)], 1000) == {"e1", "e2"}
    assert store.accept_events([posted(2, occurred_at=TODAY.isoformat()), posted(3), posted(3)], 1000) == {"e3"}
    for table in ("event_keys", "recent_events", "user_history"):
        assert connection.execute(f"SELECT count(*) FROM {table}").fetchone() == (3,), table


def test_history_keeps_the_newest_200(store: Store, connection: psycopg.Connection) -> None:
    store.accept_events([posted(n) for n in range(250)], 5000)
    rows = connection.execute("SELECT event_id FROM user_history ORDER BY occurred_at").fetchall()
    assert [event_id for (event_id,) in rows] == [f"e{n}" for n in range(50, 250)]


def test_writers_of_the_same_events_do_not_block_each_other(database: str, connection: psycopg.Connection) -> None:
    stores = [Store(database) for _ in range(4)]
    new: list[set[str]] = []

    def write(store: Store, order: int) -> None:
        for start in range(0, 100, 20):
            batch = [posted(n) for n in range(start, start + 20)]
            new.append(store.accept_events(batch[::order], 10_000))

    threads = [threading.Thread(target=write, args=(store, 1 if n % 2 else -1)) for n, store in enumerate(stores)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for store in stores:
        store.close()
    assert sum(len(ids) for ids in new) == 100
    assert connection.execute("SELECT count(*) FROM recent_events").fetchone() == (100,)


def test_an_unreachable_database_is_unavailable() -> None:
    with pytest.raises(Unavailable, match="cannot be reached"):
        Store("postgresql://127.0.0.1:1/x").ping(100)


def test_a_slow_statement_ends_at_its_timeout(store: Store, database: str) -> None:
    with psycopg.connect(database) as other:
        other.execute("LOCK TABLE model_aliases IN ACCESS EXCLUSIVE MODE")
        with pytest.raises(Unavailable, match="did not answer in time"):
            store.ping(50)
    assert store.ping(1000) is None  # the connection is still good


def test_settings_of_one_question_end_with_it_and_the_server_has_nothing_to_warn_of(store: Store) -> None:
    warned: list[str] = []
    with store.connection() as connection:
        connection.add_notice_handler(lambda notice: warned.append(notice.message_primary or ""))

        def shown(settings: Mapping[str, str] | None) -> tuple[str, ...]:
            with connection.pipeline():
                if settings is not None:
                    store_module.set_locally(connection, 1234, settings)
                names = ("statement_timeout", "plan_cache_mode", "hnsw.ef_search")
                cursors = [connection.execute("SELECT current_setting(%s, true)", [name]) for name in names]
            return tuple(cursor.fetchone()[0] for cursor in cursors)  # type: ignore[index]  # each has one row

        before = shown(None)
        during = shown(store_module.SEARCH | store_module.PLAN_ONCE)
        after = shown(None)
    assert during == ("1234ms", "force_generic_plan", store_module.SEARCH["hnsw.ef_search"])
    assert after[:2] == before[:2]
    assert after[2] != store_module.SEARCH["hnsw.ef_search"]
    assert warned == []


def test_a_filter_that_leaves_few_items_still_finds_the_nearest_of_them(
    database: str, connection: psycopg.Connection
) -> None:
    """An index that filters what it found would find nothing: the wanted items are the farthest of all."""
    connection.execute(
        "INSERT INTO items (item_id, title, categories) "
        "SELECT 'i' || n, 'Item ' || n, CASE WHEN n <= 20 THEN '{rare}' ELSE '{common}' END::text[] FROM generate_series(1, 2000) AS n"
    )
    generator = np.random.default_rng(0)
    vectors = generator.standard_normal((2000, 384)).astype(np.float32) * 0.1
    vectors[:, 0] = 1
    vectors[:20, 0] = -1
    with connection.cursor().copy("COPY text_vectors (item_id, vector, text_hash) FROM STDIN") as copy:
        for number, vector in enumerate(vectors, start=1):
            copy.write_row((f"i{number}", vector_literal(vector), "h"))
    connection.commit()
    # The planner reads so few rows one by one, unless it may not.
    for setting in ("enable_seqscan", "enable_sort", "enable_bitmapscan"):
        connection.execute(f"ALTER DATABASE {connection.info.dbname} SET {setting} = off")
    connection.commit()
    wanted = np.zeros(384, np.float32)
    wanted[0] = 1
    store = Store(database)
    try:
        found = store.similar(
            at=TODAY, k=10, filters=Filters(categories=["rare"]), item_id=None, text=wanted, timeout_ms=5000
        )
    finally:
        store.close()
    assert found is not None
    cosine = vectors[:20] @ wanted / np.linalg.norm(vectors[:20], axis=1)
    assert [item_id for item_id, _, _ in found] == [f"i{n + 1}" for n in np.argsort(-cosine)[:10]]


def test_a_connection_that_died_is_replaced_by_the_question_that_finds_it(store: Store, database: str) -> None:
    store.ping(1000)
    with psycopg.connect(database, autocommit=True) as other:
        other.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'larder' AND datname = current_database()"
        )
    assert store.ping(1000) is None


@pytest.mark.parametrize("live", [True, False])
def test_a_recommendation_takes_two_round_trips(database: str, live: bool) -> None:
    with counting_proxy(database) as (url, waits):
        store = Store(url)
        store.ping(1000)
        for _ in range(8):  # past the threshold at which statements become prepared
            before = len(waits)
            store.read_person("u", TODAY, 1000, live=live)
            store.pick_candidates(at=TODAY, filters=Filters(), limit=500, timeout_ms=1000, recent=["i"], live=live)
            assert len(waits) - before == 2
        store.close()


@contextmanager
def counting_proxy(url: str) -> Iterator[tuple[str, list[int]]]:
    """A server in front of Postgres that counts round trips: the messages (Sync, Query) after which a client must wait."""
    target = f"{parse_qs(urlsplit(url).query)['host'][0]}/.s.PGSQL.5432"
    waits: list[int] = []
    listener = socket.create_server(("127.0.0.1", 0))
    threads: list[threading.Thread] = []

    def count(source: socket.socket, sink: socket.socket) -> None:
        stream, started = b"", False
        while data := source.recv(1 << 20):
            # Counted before it is passed on: the answer may be back before this thread runs again.
            stream += data
            while len(stream) >= 5:
                # The start-up message alone has no type byte before its length.
                size = int.from_bytes(stream[1:5] if started else stream[:4], "big") + started
                if len(stream) < size:
                    break
                if started and stream[:1] in b"SQ":
                    waits.append(size)
                stream, started = stream[size:], True
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)

    def copy(source: socket.socket, sink: socket.socket) -> None:
        while data := source.recv(1 << 20):
            sink.sendall(data)

    def serve() -> None:
        client, _ = listener.accept()
        server = socket.socket(socket.AF_UNIX)
        with client, server:
            server.connect(target)
            back = threading.Thread(target=copy, args=(server, client), daemon=True)
            back.start()
            count(client, server)
            back.join()

    threads.append(threading.Thread(target=serve, daemon=True))
    threads[0].start()
    parts = urlsplit(url)
    port = listener.getsockname()[1]
    try:
        yield f"postgresql://postgres@127.0.0.1:{port}{parts.path}?sslmode=disable&gssencmode=disable", waits
    finally:
        listener.close()
        threads[0].join(10)


def test_a_persons_look_ups_are_planned_once_but_not_behind_a_pooler(
    store: Store, connection: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pooler shows itself: the process that answers is not the one that greeted."""

    def prepared() -> tuple[object, ...] | None:
        store.read_person("u", TODAY, 1000)
        with store.connection() as open_connection:
            return open_connection.execute("SELECT count(*) FROM pg_prepared_statements").fetchone()

    assert prepared() == (3,)  # history with the champion, two views
    store.close()
    monkeypatch.setattr(psycopg.ConnectionInfo, "backend_pid", property(lambda _: 1))
    assert prepared() == (0,)
