"""A broken network between the function and Postgres: an answer in time during each fault, full service right after it."""

from __future__ import annotations

import gc
import json
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
from fault_proxy import FaultProxy, faulty
from released import Released, released
from worlds import key_header

from inference import connections, http
from inference.breaker import FAILURES, REST_SECONDS
from inference.links import Links
from inference.routes import Response
from inference.runtime import LarderApplication
from inference.settings import Settings
from inference.store import Store
from schemas.errors import Unavailable
from schemas.serving import EventsRequest, PostedEvent

DEADLINE_MS = 400
LATE_MS = 20
"""How much later than its deadline an answer may come."""
BUSY_MS = 150
"""What a machine that does something else may add to a single one of them."""
ASKED = 7


@pytest.fixture(scope="module")
def world(postgres_url: str, template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Released]:
    with released(postgres_url, template, tmp_path_factory.mktemp("released")) as made:
        # As tests/conftest.py does: what the tests before have left takes as long to look through.
        gc.collect()
        gc.freeze()
        yield made


@pytest.fixture
def proxied(world: Released) -> Iterator[tuple[LarderApplication, FaultProxy]]:
    with faulty(world.url) as (url, proxy):
        app = LarderApplication.from_settings(Settings(url, world.artifacts_url, audit_per_mille=0, access="platform"))
        app.warm()
        yield app, proxy
        app.close()


def ask(app: LarderApplication, timeout_ms: int = DEADLINE_MS) -> tuple[dict[str, Any], float]:
    """The answer, and the milliseconds it took."""
    body = json.dumps({"user_id": "u0", "k": 10, "timeout_ms": timeout_ms}).encode()
    started = time.perf_counter()
    response = http.handle(app, "POST", "/recommendations", {"content-type": "application/json"}, body, deadline=None)
    took_ms = (time.perf_counter() - started) * 1_000
    assert response.status == 200, response.body
    return json.loads(response.body), took_ms


def slow(proxy: FaultProxy) -> None:
    proxy.latency_seconds = 1.0


def silent(proxy: FaultProxy) -> None:
    proxy.silent = True


def truncating(proxy: FaultProxy) -> None:
    proxy.truncate_after = 40


FAULTS: dict[str, Callable[[FaultProxy], None]] = {
    "latency beyond the deadline": slow,
    "half-open": silent,
    "reset": FaultProxy.reset,
    "truncation in the middle of a message": truncating,
    "nobody listens": FaultProxy.refuse,
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("timeout_ms", [DEADLINE_MS, 60])
def test_each_fault_is_answered_in_time_and_forgotten_after_one_probe(
    proxied: tuple[LarderApplication, FaultProxy], fault: str, timeout_ms: int
) -> None:
    app, proxy = proxied
    assert ask(app)[0]["degraded"] == []
    FAULTS[fault](proxy)
    late: list[float] = []
    for _ in range(ASKED):
        answer, took_ms = ask(app, timeout_ms)
        assert answer["degraded"] == ["database"]
        assert len(answer["items"]) == 10
        late.append(took_ms - timeout_ms)
    assert statistics.median(late) <= LATE_MS, late
    assert max(late) <= LATE_MS + BUSY_MS, late
    proxy.mend()
    time.sleep(REST_SECONDS)
    assert ask(app)[0]["degraded"] == []


def test_who_starts_while_the_database_is_away_lets_nobody_in_unchecked_and_serves_after_one_probe(
    world: Released,
) -> None:
    key = key_header(world.url)
    link_keys = f"a:{'0' * 64}"
    with faulty(world.url) as (url, proxy):
        proxy.refuse()
        settings = Settings(url, world.artifacts_url, audit_per_mille=0, access="keys", link_keys=link_keys)
        app = LarderApplication.from_settings(settings)
        try:
            app.warm()

            def send(path: str, headers: dict[str, str], query: str = "", method: str = "POST") -> Response:
                sent = {"content-type": "application/json", **headers}
                body = b'{"user_id": "u0", "k": 10}' if path == "/recommendations" else b""
                return http.handle(app, method, path, sent, body, deadline=None, query=query)

            for _ in range(2 * FAILURES):
                refused = send("/recommendations", key)
                assert (refused.status, refused.headers["retry-after"]) == (503, "1")
                error = json.loads(refused.body)["error"]
                assert error["type"] == "unavailable"
                assert error["message"] == "this key cannot be checked while the database is away; try again"
            # What needs no look-up says what it is, and a platform's probe that the process is of use.
            assert send("/recommendations", {}).status == 401
            assert json.loads(send("/health", {}, method="GET").body) == {"status": "degraded"}
            token = f"token={Links.read(link_keys).make('u0', 'forget', 1)}"
            forged = send("/people/u1/forget", {}, token)
            assert forged.status == 401
            # The link is good; what it asks for has to be written down, and cannot be.
            unwritten = send("/people/u0/forget", {}, token)
            assert unwritten.status == 503
            assert "key" not in json.loads(unwritten.body)["error"]["message"]
            proxy.mend()
            time.sleep(REST_SECONDS)
            served = send("/recommendations", key)
            assert served.status == 200, served.body
            assert json.loads(served.body)["degraded"] == []
        finally:
            app.close()


def test_once_the_breaker_is_open_nobody_waits(proxied: tuple[LarderApplication, FaultProxy]) -> None:
    app, proxy = proxied
    proxy.silent = True
    for _ in range(3):
        ask(app)
    took = [ask(app)[1] for _ in range(9)]
    assert statistics.median(took) < 20, took
    assert app.store.breaker.state == "open"


def test_latency_within_the_deadline_costs_time_alone(proxied: tuple[LarderApplication, FaultProxy]) -> None:
    app, proxy = proxied
    proxy.latency_seconds = 0.03
    answer, took_ms = ask(app)
    assert answer["degraded"] == []
    assert took_ms >= 60, "two round trips"


def test_a_restart_in_the_middle_costs_no_request(proxied: tuple[LarderApplication, FaultProxy]) -> None:
    app, proxy = proxied
    for _ in range(5):
        ask(app)
        proxy.cut()
        answer, took_ms = ask(app)
        assert (answer["degraded"], took_ms < DEADLINE_MS + LATE_MS + BUSY_MS) == ([], True)


def test_connections_that_a_router_forgot_are_found_by_the_request_itself(
    proxied: tuple[LarderApplication, FaultProxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They look open and stay silent for ever: no error, no end of file."""
    app, proxy = proxied
    ask(app)
    monkeypatch.setattr(connections, "SUSPECT_SECONDS", 0.05)
    time.sleep(0.1)
    proxy.forget()
    answer, took_ms = ask(app, 2_000)
    assert answer["degraded"] == []
    assert took_ms < 2_000
    assert ask(app)[0]["degraded"] == []


def test_hasty_callers_do_not_close_the_database_to_others(proxied: tuple[LarderApplication, FaultProxy]) -> None:
    app, proxy = proxied
    assert ask(app)[0]["degraded"] == []
    assert app.flush(5_000)  # the log has its connection
    made = proxy.accepted
    for _ in range(50):
        assert ask(app, 1)[0]["degraded"] == ["database"]
    assert proxy.accepted == made, "nor does each of them cost a connection"
    proxy.latency_seconds = 0.02
    for _ in range(10):
        ask(app, 10)
    assert app.store.breaker.state == "closed"
    assert ask(app)[0]["degraded"] == []


def test_with_one_connection_only_a_handshake_that_hangs_does_not_keep_the_next_from_trying(world: Released) -> None:
    with faulty(world.url) as (url, proxy):
        app = LarderApplication.from_settings(
            Settings(url, world.artifacts_url, concurrency=1, audit_per_mille=0, access="platform")
        )
        app.warm()
        proxy.silent = True
        for _ in range(3):
            ask(app)
        proxy.mend()
        time.sleep(REST_SECONDS)
        assert ask(app)[0]["degraded"] == []
        app.close()


def test_no_more_connections_than_its_size(world: Released) -> None:
    with faulty(world.url) as (url, proxy):
        store = Store(url, size=2)
        threads = [threading.Thread(target=lambda: [store.ping(5_000) for _ in range(20)]) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert proxy.accepted <= 2
        with store.connection(), store.connection(), pytest.raises(Unavailable, match="all 2 connections"):
            store.ping(100)
        assert store.breaker.state == "closed", "it is not the database that was busy"
        store.close()


def test_events_are_stored_once_although_their_connection_died(
    proxied: tuple[LarderApplication, FaultProxy], world: Released
) -> None:
    app, proxy = proxied
    post = EventsRequest(events=(PostedEvent(event_id="once", user_id="u9", item_id="i01", kind="view"),))
    app.accept_events(EventsRequest(events=(PostedEvent(event_id="zero", user_id="u9", item_id="i01", kind="view"),)))
    proxy.cut()
    assert app.accept_events(post).outcomes[0].outcome == "stored"
    # The answer to the write is lost after it was committed.
    proxy.truncate_after = 3
    with pytest.raises(Unavailable):
        app.accept_events(
            EventsRequest(events=(PostedEvent(event_id="twice", user_id="u9", item_id="i01", kind="view"),))
        )
    proxy.mend()
    assert app.accept_events(post).outcomes[0].outcome == "duplicate"
    with psycopg.connect(world.url) as connection:
        found = connection.execute("SELECT event_id FROM recent_events WHERE user_id = 'u9' ORDER BY 1").fetchall()
    assert found in ([("once",), ("twice",), ("zero",)], [("once",), ("zero",)])


def test_writes_that_fail_leave_reads_alone(proxied: tuple[LarderApplication, FaultProxy], world: Released) -> None:
    app, _ = proxied
    broken = Store("postgresql://127.0.0.1:1/none", 1, "the database (writes)")
    app.writer = broken
    for number in range(4):
        with pytest.raises(Unavailable):
            app.accept_events(
                EventsRequest(events=(PostedEvent(event_id=f"e{number}", user_id="u8", item_id="i01", kind="view"),))
            )
    assert broken.breaker.state == "open"
    assert ask(app)[0]["degraded"] == []


def test_a_server_that_crashes_under_load_costs_no_answer(world: Released, request: pytest.FixtureRequest) -> None:
    """A killed backend makes Postgres drop every connection, refuse new ones while it recovers, and come back."""
    app = LarderApplication.from_settings(
        Settings(world.url, world.artifacts_url, audit_per_mille=0, access="platform")
    )
    request.addfinalizer(app.close)
    app.warm()
    stopping, answers, late = threading.Event(), [0], []

    def call() -> None:
        while not stopping.is_set():
            answer, took_ms = ask(app, 1_000)  # fails on anything but 200
            assert len(answer["items"]) == 10
            answers[0] += 1
            # A list that ships answers thousands of times a second: without a pause this would measure who gets the lock.
            time.sleep(0.003)
            if took_ms > 1_000 + LATE_MS + BUSY_MS:
                late.append(took_ms)

    with ThreadPoolExecutor(3) as callers:
        calls = [callers.submit(call) for _ in range(3)]
        try:
            for _ in range(2):
                time.sleep(0.3)
                with psycopg.connect(world.url) as victim:
                    os.kill(victim.info.backend_pid, signal.SIGKILL)
                give_up_at = time.monotonic() + 30
                time.sleep(0.2)
                while ask(app, 1_000)[0]["degraded"]:
                    assert time.monotonic() < give_up_at, "it never came back"
                    time.sleep(0.05)
        finally:
            stopping.set()
        for one in calls:
            one.result(30)
    assert answers[0] > 50
    assert late == []
