"""Events as an application posts them: what is stored, refused and repeated, on a real database."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest
from worlds import serving

from inference.runtime import CLOCK_SKEW, LarderApplication
from schemas.serving import EventsRequest, PostedEvent


@pytest.fixture
def application(database: str, tmp_path: Path) -> Iterator[LarderApplication]:
    made = LarderApplication.from_settings(serving(database, tmp_path.as_uri()))
    yield made
    made.close()


def event(event_id: str, at: datetime | None) -> PostedEvent:
    return PostedEvent(event_id=event_id, user_id="u", item_id="i", kind="view", occurred_at=at)


def test_an_event_from_the_future_is_refused_for_itself_with_the_way_out(
    application: LarderApplication, connection: psycopg.Connection
) -> None:
    now = datetime.now(UTC)
    future = now + timedelta(hours=2)
    answer = application.accept_events(EventsRequest(events=(event("e1", now), event("e2", future), event("e3", None))))
    assert [one.outcome for one in answer.outcomes] == ["stored", "refused", "stored"]
    reason = answer.outcomes[1].reason or ""
    assert future.isoformat() in reason
    assert "s ahead of this server's clock, at most 300 s are allowed; set the sender's clock, or leave" in reason
    for table in ("event_keys", "recent_events", "user_history"):
        found = connection.execute(f"SELECT event_id FROM {table} ORDER BY 1").fetchall()
        assert found == [("e1",), ("e3",)], table
    connection.rollback()
    # Refusing it has not used up its id.
    (again,) = application.accept_events(EventsRequest(events=(event("e2", now),))).outcomes
    assert again.outcome == "stored"


def test_a_clock_a_little_ahead_puts_no_event_into_a_time_that_has_not_come(
    application: LarderApplication, connection: psycopg.Connection
) -> None:
    ahead = datetime.now(UTC) + CLOCK_SKEW - timedelta(seconds=5)
    (outcome,) = application.accept_events(EventsRequest(events=(event("e1", ahead),))).outcomes
    assert outcome.outcome == "stored"
    row = connection.execute(
        "SELECT r.occurred_at <= now(), h.occurred_at = r.occurred_at, t.day = (r.occurred_at AT TIME ZONE 'UTC')::date "
        "FROM recent_events AS r JOIN user_history AS h USING (event_id) JOIN online.user_tiles AS t ON t.user_id = r.user_id"
    ).fetchone()
    assert row == (True, True, True)
    connection.rollback()
    # A read at once counts it: it has happened.
    person = application.store.read_person("u", datetime.now(UTC), 5000, live=True)
    assert person.history.item_ids == ["i"]
    assert application.accept_events(EventsRequest(events=(event("e1", ahead),))).outcomes[0].outcome == "duplicate"
