"""The log of what was shown: every answer once, whatever happens to the connection, and nothing that a person wrote."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from conftest import TODAY
from fault_proxy import faulty
from released import Released, released
from worlds import ListSource, serving

from inference.connections import Lost
from inference.experiment import Arm, Assignment, Experiment
from inference.runtime import LarderApplication
from inference.served import ServedLog
from inference.served_request import ServedRequest, Slate, wish_digest
from inference.store import Store
from orchestration.compute.forget import erase, holdings, request_erasure
from orchestration.compute.ingest import drain, ingest
from orchestration.compute.lake import Lake
from schemas.functions import SERVED_REQUESTS_KEPT_DAYS
from schemas.roles import FUNCTION
from schemas.serving import EventsRequest, PostedEvent, RecommendationRequest, RecommendationResponse, RecommendedItem
from schemas.urls import with_user


@pytest.fixture(scope="module")
def world(postgres_url: str, template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Released]:
    with released(postgres_url, template, tmp_path_factory.mktemp("released")) as made:
        yield made


@pytest.fixture
def connection(world: Released) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(world.url, autocommit=True) as opened:
        opened.execute("TRUNCATE served_requests, shadow_requests")
        yield opened


@contextmanager
def application(world: Released, **more: Any) -> Iterator[LarderApplication]:
    settings = serving(world.url, world.artifacts_url, **{"timeout_ms": 10_000, "audit_per_mille": 0, **more})
    made = LarderApplication.from_settings(settings)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def app(world: Released) -> Iterator[LarderApplication]:
    with application(world) as made:
        made.warm()
        yield made


SHADOW = Assignment(Experiment("e", TODAY, (Arm("a", 1), Arm("s", 0))), Arm("s", 0))


def recommend(app: LarderApplication, user_id: str = "u0", **more: Any) -> RecommendationResponse:
    return app.recommend(RecommendationRequest(user_id=user_id, **more))


def rows(
    connection: psycopg.Connection[Any], columns: str = "*", table: str = "served_requests"
) -> list[tuple[Any, ...]]:
    return connection.execute(f"SELECT {columns} FROM {table} ORDER BY served_at, request_id").fetchall()


def entry(request_id: str, user_id: str = "u0", at: datetime | None = None, **more: Any) -> ServedRequest:
    item = RecommendedItem(item_id="i00", score=0.5, title="T")
    answer = RecommendationResponse(request_id=request_id, items=(item,), model_version="m")
    return ServedRequest(user_id, at or datetime.now(UTC), None, answer, Slate(None, 1), **more)


def test_a_row_is_what_was_answered(app: LarderApplication, connection: psycopg.Connection[Any]) -> None:
    before = datetime.now(UTC)
    answer = recommend(app, k=7, prompt="Something  quiet", explain=True)
    assert app.flush(10_000)
    ((request_id, user, at, wish, experiment, arm, share, version, prompt, ids, scores, odds, pool, pool_scores, n, sources, degraded),) = rows(connection)  # fmt: skip
    assert (request_id, user, version, prompt) == (answer.request_id, "u0", answer.model_version, answer.prompt_version)
    assert before <= at <= datetime.now(UTC)
    assert ids == [item.item_id for item in answer.items]
    assert scores == pytest.approx([item.score for item in answer.items], rel=1e-6)
    assert (experiment, arm, share, odds, pool, pool_scores) == (None,) * 6
    assert degraded == list(answer.degraded) == ["wish"]
    assert 7 <= n <= sum(sources.values())
    assert set(sources) <= {"user_vector", "co_visitation", "trending", "fresh"}
    assert wish is not None


def test_requests_of_the_sample_keep_their_pool(world: Released, connection: psycopg.Connection[Any]) -> None:
    with application(world, audit_per_mille=1_000) as app:
        app.warm()
        answer = recommend(app, k=5)
        assert app.flush(10_000)
    ((pool, scores, odds, n),) = rows(connection, "candidate_ids, candidate_scores, propensities, candidates")
    assert pool[:5] == [item.item_id for item in answer.items]
    assert scores == sorted(scores, reverse=True)
    assert scores[:5] == pytest.approx([item.score for item in answer.items], rel=1e-6)
    assert (len(pool), odds) == (n, None)


def test_a_wish_is_kept_as_a_keyed_hash_alone(
    world: Released, app: LarderApplication, connection: psycopg.Connection[Any], database: str
) -> None:
    for wish in ("Quiet CANARY films", " quiet  canary FILMS", "loud films"):
        recommend(app, prompt=wish)
    recommend(app)
    assert app.flush(10_000)
    hashes = [wish for (wish,) in rows(connection, "wish_hash")]
    assert hashes[0] == hashes[1] != hashes[2]
    assert hashes[3] is None
    assert len(hashes[0]) == 64
    assert hashes[0] != wish_digest("quiet canary films"), "without the database's key nobody can try wishes out"
    text = connection.execute("SELECT string_agg(r::text, '') FROM served_requests AS r").fetchone()
    assert text is not None
    assert "canary" not in text[0].lower()
    with psycopg.connect(database) as other:
        other.execute("UPDATE erasure_key SET inner_pad = outer_pad")  # the test's databases are copies of one
        (elsewhere,) = other.execute(
            "SELECT encode(user_hash('wish:' || %s), 'hex')", (wish_digest("quiet canary films"),)
        ).fetchone() or ("",)
    assert elsewhere != hashes[0]


def test_a_question_about_another_instant_is_not_logged(
    app: LarderApplication, connection: psycopg.Connection[Any]
) -> None:
    recommend(app, at=TODAY)
    recommend(app, at=datetime.now(UTC) + timedelta(days=1))
    assert app.flush(10_000)
    assert rows(connection) == []


def test_every_answer_is_logged_once_though_its_connection_is_killed_in_the_middle(
    world: Released, app: LarderApplication, connection: psycopg.Connection[Any]
) -> None:
    recommend(app)
    assert app.flush(10_000)
    answers = []
    with psycopg.connect(world.url) as blocker:
        blocker.execute("LOCK TABLE served_requests IN ACCESS EXCLUSIVE MODE")
        answers += [recommend(app, f"u{n % 6}").request_id for n in range(20)]
        waiting = "datname = current_database() AND wait_event_type = 'Lock' AND query LIKE '%log_served_requests%'"
        give_up_at = time.monotonic() + 20
        while not connection.execute(
            f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {waiting}"
        ).fetchall():
            assert time.monotonic() < give_up_at
            time.sleep(0.01)
        answers += [recommend(app, f"u{n % 6}").request_id for n in range(20)]
    give_up_at = time.monotonic() + 20
    while not app.flush(5_000):
        assert time.monotonic() < give_up_at
    logged = [request_id for (request_id,) in rows(connection, "request_id")]
    assert len(logged) == 41
    assert set(answers) < set(logged)
    requests = app.served.requests
    assert (requests.written, requests.dropped, requests.failed, requests.waiting) == (41, 0, 0, 0)


def test_a_batch_whose_answer_was_lost_is_not_written_twice(
    world: Released, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    write, lost = Store.log_served_requests, [True, True, False]

    def losing(self: Store, batch: list[dict[str, object]], timeout_ms: float) -> int:
        new = write(self, batch, timeout_ms)
        if lost.pop(0):
            raise Lost("the connection went after the commit")
        return new

    monkeypatch.setattr(Store, "log_served_requests", losing)
    log = ServedLog(Store(world.url, 1), 0)
    log.offer(entry("once"))
    give_up_at = time.monotonic() + 10
    while not log.flush(5_000):
        assert time.monotonic() < give_up_at
    log.close()
    assert [request_id for (request_id,) in rows(connection, "request_id")] == ["once"]
    assert lost == []


def test_what_was_shown_while_the_database_was_away_is_written_once_it_is_back(
    world: Released, connection: psycopg.Connection[Any]
) -> None:
    with faulty(world.url) as (url, proxy):
        settings = serving(world.url, world.artifacts_url, timeout_ms=3_000, audit_per_mille=0)
        app = LarderApplication.from_settings(replace(settings, database_url=url, writer_url=url))
        try:
            app.warm()
            proxy.refuse()
            shown = [recommend(app, k=3) for _ in range(5)]
            assert {answer.model_version for answer in shown} == {"popular"}
            assert not app.flush(3_000)
            assert app.served.requests.waiting == 5
            proxy.mend()
            give_up_at = time.monotonic() + 20
            while not app.flush(5_000):
                assert time.monotonic() < give_up_at
                time.sleep(0.05)
        finally:
            app.close()
    logged = rows(connection, "request_id, model_version, item_ids, sources, candidates, degraded")
    assert [row[0] for row in logged] == [answer.request_id for answer in shown]
    for row, answer in zip(logged, shown, strict=True):
        assert row[1:] == ("popular", [item.item_id for item in answer.items], {"shipped": 3}, 3, ["database"])


def test_a_full_queue_drops_counts_and_never_waits(world: Released, connection: psycopg.Connection[Any]) -> None:
    log = ServedLog(Store(world.url, 1), 0, requests=50)
    with psycopg.connect(world.url) as blocker:
        blocker.execute("LOCK TABLE served_requests IN ACCESS EXCLUSIVE MODE")
        log.offer(entry("first"))
        time.sleep(0.2)  # the thread has it and waits for the table
        start = time.perf_counter()
        for number in range(200):
            log.offer(entry(f"r{number}"))
        assert time.perf_counter() - start < 0.2
        assert (log.requests.dropped, log.requests.waiting) == (150, 51)
        assert not log.flush(50)
    assert log.flush(10_000)
    log.close()
    assert [request_id for (request_id,) in rows(connection, "request_id")] == ["first", *(f"r{n}" for n in range(50))]
    assert log.requests.written == 51


def test_a_row_that_the_database_cannot_read_costs_no_other(
    world: Released, connection: psycopg.Connection[Any], caplog: pytest.LogCaptureFixture
) -> None:
    log = ServedLog(Store(world.url, 1), 0)
    with log._changed:  # all of them are one batch
        for name in ("a", "b", "secret\ud800", "c"):
            log.requests.queued.append(entry(name))
            log.requests.waiting += 1
    log.offer(entry("d"))
    assert log.flush(10_000)
    log.close()
    assert sorted(request_id for (request_id,) in rows(connection, "request_id")) == ["a", "b", "c", "d"]
    assert (log.requests.written, log.requests.failed) == (4, 1)
    assert "1 answers were not logged" in caplog.text
    assert "secret" not in caplog.text


def test_a_database_that_has_no_such_table_yet_harms_no_answer(
    app: LarderApplication, connection: psycopg.Connection[Any]
) -> None:
    connection.execute("ALTER TABLE served_requests RENAME TO gone")
    try:
        assert recommend(app).degraded == ()
        assert app.flush(10_000)
        assert (app.served.requests.written, app.served.requests.failed) == (0, 1)
    finally:
        connection.execute("ALTER TABLE gone RENAME TO served_requests")
    recommend(app)
    assert app.flush(10_000)
    assert app.served.requests.written == 1


def test_old_rows_go_with_the_next_write(world: Released, connection: psycopg.Connection[Any]) -> None:
    log = ServedLog(Store(world.url, 1), 0)
    old = datetime.now(UTC) - timedelta(days=SERVED_REQUESTS_KEPT_DAYS, hours=1)
    kept = old + timedelta(hours=2)
    for name, at in (("old", old), ("kept", kept)):
        log.offer(entry(name, at=at))
    assert log.flush(10_000)
    log.offer(entry("new"))
    assert log.flush(10_000)
    log.close()
    assert [request_id for (request_id,) in rows(connection, "request_id")] == ["kept", "new"]


def test_the_function_that_answers_may_not_read_the_log(world: Released) -> None:
    with (
        psycopg.connect(with_user(world.url, FUNCTION)) as function,
        pytest.raises(psycopg.errors.InsufficientPrivilege),
    ):
        function.execute("SELECT * FROM served_requests")


# --- whoever is forgotten ---------------------------------------------------------------------------------------------


def test_a_forgotten_persons_rows_vanish_and_do_not_come_back(database: str, lake: Lake, tmp_path: Path) -> None:
    artifacts = tmp_path.as_uri()
    with psycopg.connect(database, options="-c TimeZone=UTC") as connection:
        ingest(ListSource([]), lake, connection, now=TODAY)
    log = ServedLog(Store(database, 1), 0)
    at = datetime.now(UTC)
    for name in ("anna", "bert"):
        log.offer(entry(f"r-{name}", name, at))
        log.offer(entry(f"r-{name}", name, at, shadow=True, assignment=SHADOW))
    waiting = entry("late", "anna", at)
    assert log.flush(10_000)
    assert log.requests.failed == 0
    with psycopg.connect(database, autocommit=True) as connection:
        assert holdings(database, lake, "anna") == {"public.served_requests": 1, "public.shadow_requests": 1}
        erased: list[str] = []
        # An answer may wait in the queue while its person is being erased.
        with psycopg.connect(database) as other:
            other.execute("SELECT pg_advisory_xact_lock(7205394)")
            log.offer(waiting)
            assert not log.flush(300)
            thread = threading.Thread(
                target=lambda: erased.append(erase("anna", url=database, lake=lake, artifacts_url=artifacts))
            )
            thread.start()
        thread.join(30)
        assert erased
        assert log.flush(10_000)
        log.offer(entry("again", "anna", at))
        assert log.flush(10_000)
        assert rows(connection, "user_id") == [("bert",)]
        assert rows(connection, "user_id", "shadow_requests") == [("bert",)]
        # Who has only asked to be forgotten is not logged either.
        request_erasure(database, lake, "bert")
        log.offer(entry("b2", "bert"))
        assert log.flush(10_000)
        assert rows(connection, "request_id") == [("r-bert",)]
    log.close()


def test_whoever_only_ever_got_recommendations_may_ask_to_be_forgotten(
    world: Released, app: LarderApplication, connection: psycopg.Connection[Any]
) -> None:
    recommend(app, "stranger")
    assert app.flush(10_000)
    assert app.forget("stranger").state == "waiting"
    connection.execute("DELETE FROM erasure_requests WHERE user_id = 'stranger'")


# --- what it led to ---------------------------------------------------------------------------------------------------


def test_an_events_recommendation_goes_with_it_into_the_lake(database: str, lake: Lake, tmp_path: Path) -> None:
    app = LarderApplication.from_settings(serving(database, tmp_path.as_uri(), audit_per_mille=0))
    try:
        answer = recommend(app, "anna")
        posted = [
            PostedEvent(event_id="e1", user_id="anna", item_id="i", kind="view", request_id=answer.request_id),
            PostedEvent(event_id="e2", user_id="anna", item_id="i", kind="view"),
        ]
        app.accept_events(EventsRequest(events=tuple(posted)))
        assert app.flush(10_000)
    finally:
        app.close()
    with psycopg.connect(database, options="-c TimeZone=UTC") as connection:
        drain(connection, lake, None, TODAY.date())
        connection.commit()
        table = lake.events(connection).to_table()
        assert dict(zip(table["event_id"].to_pylist(), table["request_id"].to_pylist(), strict=True)) == {
            "e1": answer.request_id, "e2": None,
        }  # fmt: skip
