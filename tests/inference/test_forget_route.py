"""Being forgotten over HTTP: hidden at once, a receipt to fetch, and Dagster's own code that finishes it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest
from conftest import TODAY, days_ago
from worlds import ListSource, key_header, serving

from inference.http import handle
from inference.links import Links
from inference.runtime import LarderApplication
from orchestration.compute.forget import fulfil, open_requests
from orchestration.compute.ingest import ingest
from orchestration.compute.lake import Lake
from schemas.events import Event, Item

SECRET = "a:" + "s" * 40
USER = "user/ü 1"


@pytest.fixture
def app(database: str, lake: Lake, tmp_path: Path) -> Iterator[LarderApplication]:
    events = [Event(f"{u}{n}", u, f"i{n}", "view", None, days_ago(n)) for u in (USER, "v") for n in range(1, 4)]
    with psycopg.connect(database, options="-c TimeZone=UTC") as connection:
        ingest(ListSource(events, [Item(f"i{n}", f"I{n}") for n in range(4)]), lake, connection, now=TODAY)
    settings = serving(database, tmp_path.as_uri(), link_keys=SECRET)
    made = LarderApplication.from_settings(settings)
    yield made
    made.close()


def ask(
    app: LarderApplication, method: str, path: str, headers: dict[str, str] | None = None, query: str = ""
) -> tuple[int, dict[str, Any]]:
    answer = handle(app, method, path, headers or {}, b"", deadline=None, query=query)
    return answer.status, json.loads(answer.body)


def history(app: LarderApplication, user: str) -> list[str]:
    return app.store.read_person(user, datetime.now(UTC), 5_000, live=True).history.item_ids


def test_a_person_with_a_link_is_hidden_at_once_and_erased_by_the_job(
    app: LarderApplication, database: str, lake: Lake, tmp_path: Path, connection: psycopg.Connection[Any]
) -> None:
    assert history(app, USER)
    query = f"token={Links.read(SECRET).make(USER, 'forget', 1)}"
    status, answer = ask(app, "POST", f"/people/{USER}/forget", query=query)
    assert (status, answer["state"]) == (202, "waiting")
    receipt_id = answer["receipt_id"]
    assert history(app, USER) == []
    assert history(app, "v")
    assert open_requests(database) == [receipt_id]
    # Asking again is the same request.
    assert ask(app, "POST", f"/people/{USER}/forget", query=query) == (202, answer)
    assert ask(app, "GET", f"/people/{USER}/forget/{receipt_id}", query=query) == (200, answer)
    fulfil(receipt_id, url=database, lake=lake, artifacts_url=tmp_path.as_uri())
    status, receipt = ask(app, "GET", f"/people/{USER}/forget/{receipt_id}", query=query)
    assert (status, receipt["state"], receipt["receipt_id"]) == (200, "finished", receipt_id)
    assert receipt["removed"]["events in the lake"] == 3
    assert USER not in json.dumps(receipt)
    # A second time there is nobody left to forget, and nothing is asked for.
    assert ask(app, "POST", f"/people/{USER}/forget", query=query)[0] == 404
    assert open_requests(database) == []


def test_an_admin_may_ask_for_anybody_and_a_stranger_is_no_person(app: LarderApplication, database: str) -> None:
    admin = key_header(database, ["admin"])
    assert ask(app, "POST", "/people/v/forget", admin)[0] == 202
    status, answer = ask(app, "POST", "/people/nobody/forget", admin)
    assert (status, answer["error"]["field"]) == (404, "user_id")
    assert "nobody" not in json.dumps(answer)
    assert ask(app, "POST", f"/people/{'x' * 129}/forget", admin)[0] == 404
    assert ask(app, "GET", f"/people/v/forget/{'0' * 32}", admin)[0] == 404


def test_a_request_of_one_person_is_no_news_of_another(app: LarderApplication, database: str) -> None:
    _, answer = ask(app, "POST", "/people/v/forget", key_header(database, ["admin"]))
    query = f"token={Links.read(SECRET).make(USER, 'forget', 1)}"
    assert ask(app, "GET", f"/people/{USER}/forget/{answer['receipt_id']}", query=query)[0] == 404


def test_a_person_whom_only_the_quarantine_names_is_found(
    app: LarderApplication, database: str, connection: psycopg.Connection[Any]
) -> None:
    connection.execute(
        "INSERT INTO quarantine (source, file, line, reason, row) VALUES ('s', 'f', 1, 'r', 'w-9,i1,bad')"
    )
    connection.commit()
    assert ask(app, "POST", "/people/w-9/forget", key_header(database, ["admin"]))[0] == 202
