"""Reads go where DATABASE_READ_URL says and write nothing there; writes go to the database itself."""

from __future__ import annotations

import json
from collections.abc import Iterator

import psycopg
import pytest
from released import Released, released

from inference import http
from inference.runtime import LarderApplication
from inference.settings import Settings, read_settings
from schemas.errors import RequestError, Unavailable
from schemas.serving import EventsRequest, PostedEvent, SimilarRequest

POST = EventsRequest(events=(PostedEvent(event_id="e1", user_id="u9", item_id="i01", kind="view"),))


@pytest.fixture(scope="module")
def world(postgres_url: str, template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Released]:
    with released(postgres_url, template, tmp_path_factory.mktemp("released")) as made:
        yield made


def standby(url: str) -> str:
    """A URL under which the server refuses every write, as a hot standby does."""
    return f"{url}&options=-c%20default_transaction_read_only%3Don"


def test_every_read_works_where_nothing_may_be_written(world: Released) -> None:
    app = LarderApplication.from_settings(
        Settings(
            world.url,
            world.artifacts_url,
            audit_per_mille=1_000,
            database_read_url=standby(world.url),
            access="platform",
        )
    )
    app.warm()
    with app.store.connection() as connection, pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
        connection.execute("CREATE TABLE forbidden ()")
    for more in ({}, {"at": "2026-01-01T00:00:00Z"}, {"filters": {"categories": ["odd"]}}, {"candidates": ["i01"]}):
        body = json.dumps({"user_id": "u0", **more}).encode()
        response = http.handle(
            app, "POST", "/recommendations", {"content-type": "application/json"}, body, deadline=None
        )
        assert response.status == 200
        assert "database" not in json.loads(response.body)["degraded"]
    with pytest.raises(RequestError, match="no item 'i01' with a text"):
        app.similar(SimilarRequest(item_id="i01"))
    assert app.health().database_round_trip_ms is not None
    assert app.accept_events(POST).outcomes[0].outcome == "stored"
    assert app.flush(10_000)
    assert (app.served.written, app.served.failed) == (3, 0)
    app.close()


def test_without_the_database_itself_a_replica_still_answers(world: Released) -> None:
    app = LarderApplication.from_settings(
        Settings("postgresql://127.0.0.1:1/none", world.artifacts_url, database_read_url=world.url, access="platform")
    )
    app.warm()
    body = b'{"user_id": "u0"}'
    response = http.handle(app, "POST", "/recommendations", {"content-type": "application/json"}, body, deadline=None)
    assert json.loads(response.body)["degraded"] == []
    with pytest.raises(Unavailable):
        app.accept_events(POST)
    app.close()


def test_the_setting_is_read() -> None:
    needed = {"DATABASE_URL": "postgresql://localhost/y", "ARTIFACTS_URL": "file:///a"}
    assert read_settings(needed).database_read_url is None
    assert read_settings({**needed, "DATABASE_READ_URL": "postgresql://localhost/z"}).database_read_url == (
        "postgresql://localhost/z"
    )
