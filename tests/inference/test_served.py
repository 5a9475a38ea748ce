"""The log of what was served: the vectors as they were fed, of a stable sample, in nobody's way."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import psycopg
import pytest
from conftest import TODAY, days_ago
from door_app import SmallApplication
from worlds import ListSource, serving

from inference.candidates import Filters
from inference.features import block_of
from inference.handlers.aws_lambda import FLUSH_MS, create_handler
from inference.ranker_inputs import candidate_inputs, person_inputs
from inference.runtime import LarderApplication
from inference.served import ServedLog, ServedRead
from inference.settings import read_settings
from inference.store import SERVED_KEPT, Store
from orchestration.compute.forget import erase, request_erasure
from orchestration.compute.ingest import ingest
from orchestration.compute.lake import Lake
from orchestration.compute.materialise import materialise
from schemas.errors import SettingsError
from schemas.events import Event, Item
from schemas.serving import RecommendationRequest
from schemas.views import ITEM_ACTIVITY, USER_AFFINITY, VIEWS

YESTERDAY = (TODAY - timedelta(days=1)).date()
BOTH = ("i0", "i1")
"""Named, because each person has had them both."""


@pytest.fixture
def filled(database: str, lake: Lake) -> str:
    """A database with two people and two items, yesterday built."""
    events = [
        Event(f"{u}{n}", u, f"i{n % 2}", "rating", float(n), days_ago(n)) for u in ("u", "v") for n in range(1, 6)
    ]
    items = [Item("i0", "I", categories=("a", "b")), Item("i1", "J", categories=("a",))]
    with psycopg.connect(database, options="-c TimeZone=UTC") as connection:
        ingest(ListSource(events, list(items)), lake, connection, now=TODAY)
    for view in VIEWS:
        materialise(view, YESTERDAY, YESTERDAY, url=database, lake=lake)
    return database


def application(url: str, per_mille: int = 1_000) -> LarderApplication:
    settings = serving(url, "file:///nothing", timeout_ms=20_000, audit_per_mille=per_mille)
    return LarderApplication.from_settings(settings)


@pytest.fixture
def app(filled: str) -> Iterator[LarderApplication]:
    made = application(filled)
    yield made
    made.close()


def logged(connection: psycopg.Connection[Any]) -> list[tuple[Any, ...]]:
    rows = connection.execute("SELECT user_id, view, keys, numbers, seen FROM served_features ORDER BY read_at, view")
    found = rows.fetchall()
    connection.commit()
    return found


def read_of(user: str, store: Store, at: datetime) -> ServedRead:
    person = store.read_person(user, at, 5_000, live=True, audited=True)
    candidates = store.pick_candidates(
        at=at, filters=Filters(), limit=10, timeout_ms=5_000, given=["i1", "i0"], live=True, audited=True
    )
    return ServedRead("r", user, at, person.views, candidates.features, candidates.item_ids, candidates.categories)


def test_what_is_logged_is_what_the_ranker_is_fed(filled: str) -> None:
    store, at = Store(filled), datetime.now(UTC)
    person = store.read_person("u", at, 5_000, live=True, audited=True)
    candidates = store.pick_candidates(
        at=at, filters=Filters(), limit=10, timeout_ms=5_000, given=["i1", "i0", "gone"], live=True, audited=True
    )
    store.close()
    read = ServedRead("r", "u", at, person.views, candidates.features, candidates.item_ids, candidates.categories)
    people, items, affinity = ({**row, "numbers": _array(row["numbers"])} for row in read.rows())
    fed = person_inputs(person, at, None, 8)
    np.testing.assert_array_equal(people["numbers"], _nan(fed["context_features"], fed["context_mask"]).ravel())
    rows = candidate_inputs(candidates, person.views, at)
    width = len(ITEM_ACTIVITY.features)
    own = _nan(rows["candidate_features"][0, :, :width], rows["candidate_mask"][0, :, :width])
    np.testing.assert_array_equal(items["numbers"], own.ravel())
    assert (items["keys"], affinity["keys"]) == (candidates.item_ids, ["u", "a", "u", "b"])
    categories = block_of(USER_AFFINITY, [("u", "a"), ("u", "b")], at, person.views["user_affinity"], encoded=True)
    np.testing.assert_array_equal(affinity["numbers"], _nan(categories.values, categories.valid).ravel())
    assert {row["seen"] is not None for row in (people, items, affinity)} == {True}


def _array(numbers: object) -> np.ndarray:
    return np.array(numbers, np.float32)


def _nan(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return np.where(mask > 0, values, np.float32(np.nan))


def test_a_live_request_is_logged_after_its_answer(app: LarderApplication, connection: psycopg.Connection) -> None:
    app.recommend(RecommendationRequest(user_id="u", request_id="r1", candidates=BOTH))
    app.recommend(RecommendationRequest(user_id="u", at=datetime.now(UTC)))
    assert app.flush(5_000)
    rows = logged(connection)
    assert [view for _, view, *_ in rows] == ["item_activity", "user_activity", "user_affinity"]
    assert (app.served.written, app.served.dropped, app.served.failed) == (1, 0, 0)
    assert connection.execute(
        "SELECT DISTINCT request_id, partition_date, built_at IS NULL, built_seen IS NULL FROM served_features"
    ).fetchall() == [("r1", YESTERDAY, False, False)]


def test_the_sample_is_the_same_people_everywhere(filled: str) -> None:
    people = [f"person-{n}" for n in range(20_000)]
    some, others, none, everybody = (ServedLog(Store(filled), rate) for rate in (10, 10, 0, 1_000))
    sampled = [person for person in people if some.samples(person)]
    assert 120 < len(sampled) < 290, "one in a hundred"
    assert sampled == [person for person in people if others.samples(person)]
    assert not any(none.samples(person) for person in people)
    assert all(everybody.samples(person) for person in people)
    start = time.perf_counter()
    for person in people:
        some.samples(person)
    assert (time.perf_counter() - start) / len(people) < 1e-4, "all that a request pays that is not sampled"


def test_a_person_who_is_not_sampled_costs_nothing_and_is_not_logged(
    filled: str, connection: psycopg.Connection
) -> None:
    app = application(filled, 0)
    app.recommend(RecommendationRequest(user_id="u", candidates=BOTH))
    assert app.served.waiting == 0
    assert app.flush(5_000)
    app.close()
    assert app.served.written == 0
    assert not logged(connection)


def test_a_log_that_cannot_be_written_harms_no_answer(
    app: LarderApplication, connection: psycopg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    connection.execute("ALTER TABLE served_features RENAME TO gone")
    connection.commit()
    answer = app.recommend(RecommendationRequest(user_id="u", candidates=BOTH))
    assert answer.items
    assert "database" not in answer.degraded
    assert app.flush(10_000)
    assert (app.served.written, app.served.failed) == (0, 1)
    assert "1 reads were not logged for the skew audit: the database does not have the tables" in caplog.text
    assert "'u'" not in caplog.text
    connection.execute("ALTER TABLE gone RENAME TO served_features")
    connection.commit()
    app.recommend(RecommendationRequest(user_id="u", candidates=BOTH))
    assert app.flush(10_000)
    assert app.served.written == 1, "the thread goes on"


def test_a_full_queue_drops_counts_and_never_waits(filled: str, connection: psycopg.Connection) -> None:
    log = ServedLog(Store(filled, size=1), 1_000, capacity=4)
    store = Store(filled)
    read = read_of("u", store, datetime.now(UTC))
    with psycopg.connect(filled) as blocker:
        blocker.execute("LOCK TABLE served_features IN ACCESS EXCLUSIVE MODE")
        log.offer(read)
        time.sleep(0.2)  # the thread has it and waits for the table
        start = time.perf_counter()
        for _ in range(100):
            log.offer(read)
        assert time.perf_counter() - start < 0.1
        assert log.dropped == 96
        assert not log.flush(50)
    assert log.flush(10_000)
    assert log.written == 5
    log.close()
    store.close()


def test_a_dead_connection_is_replaced(app: LarderApplication, connection: psycopg.Connection) -> None:
    app.recommend(RecommendationRequest(user_id="u", candidates=BOTH))
    assert app.flush(5_000)
    connection.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'larder' "
        "AND datname = current_database() AND query LIKE '%served_features%'"
    )
    connection.commit()
    app.recommend(RecommendationRequest(user_id="u", candidates=BOTH))
    assert app.flush(5_000)
    assert (app.served.written, app.served.failed) == (2, 0)


def test_old_rows_go_with_the_next_write(app: LarderApplication, connection: psycopg.Connection) -> None:
    app.recommend(RecommendationRequest(user_id="u", candidates=BOTH))
    assert app.flush(5_000)
    connection.execute("UPDATE served_features SET read_at = now() - %s", (SERVED_KEPT + timedelta(hours=1),))
    connection.commit()
    app.recommend(RecommendationRequest(user_id="v"))
    assert app.flush(5_000)
    assert {user for user, *_ in logged(connection)} == {"v"}


def test_nobody_who_is_forgotten_is_logged(
    filled: str, lake: Lake, connection: psycopg.Connection, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A read may wait in the queue while its person is being erased; what is written then must not bring them back."""
    artifacts = tmp_path_factory.mktemp("artifacts").as_uri()
    log, store = ServedLog(Store(filled, size=1), 1_000), Store(filled)
    at = datetime.now(UTC)
    waiting, hidden = read_of("u", store, at), read_of("v", store, at)
    log.offer(waiting)
    assert log.flush(5_000)
    assert {user for user, *_ in logged(connection)} == {"u"}
    erased: list[str] = []
    with psycopg.connect(filled) as other:
        # An erasure that has begun and not ended holds the lock alone.
        other.execute("SELECT pg_advisory_xact_lock(7205394)")
        log.offer(waiting)
        assert not log.flush(300)
        thread = threading.Thread(
            target=lambda: erased.append(erase("u", url=filled, lake=lake, artifacts_url=artifacts))
        )
        thread.start()
    thread.join(30)
    assert erased
    assert log.flush(10_000)
    log.offer(waiting)
    request_erasure(filled, lake, "v")
    log.offer(hidden)
    assert log.flush(10_000)
    assert not log.failed
    assert not logged(connection)
    log.close()
    store.close()


def test_the_setting_is_checked() -> None:
    needed = {"DATABASE_URL": "postgresql://x/y", "ARTIFACTS_URL": "file:///a"}
    assert read_settings(needed).audit_per_mille == 10
    assert read_settings({**needed, "LARDER_AUDIT_PER_MILLE": "0"}).audit_per_mille == 0
    with pytest.raises(SettingsError, match="LARDER_AUDIT_PER_MILLE is '1001'; give a whole number from 0 to 1000"):
        read_settings({**needed, "LARDER_AUDIT_PER_MILLE": "1001"})


def test_the_lambda_door_waits_for_what_is_written_after_the_answer() -> None:
    class Context:
        aws_request_id = "r"
        client_context = None

        def get_remaining_time_in_millis(self) -> int:
            return 10_000

    flushed: list[int] = []

    class Writing(SmallApplication):
        def flush(self, timeout_ms: int) -> bool:
            flushed.append(timeout_ms)
            return True

    create_handler(Writing)({"user_id": "u1"}, Context())
    assert len(flushed) == 1
    assert 0 < flushed[0] <= FLUSH_MS
