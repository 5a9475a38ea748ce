"""Consent: without it nothing of a person is read, kept or logged, and the answer says so; with it all is as before."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from conftest import TODAY, days_ago, replace_database
from served_world import ServedWorld, build
from worlds import ListSource, key_header, serving

from inference.http import handle
from inference.links import Links
from inference.runtime import LarderApplication
from inference.settings import read_settings
from orchestration.compute.ingest import ingest
from orchestration.compute.interactions import load_interactions
from orchestration.compute.lake import Lake
from schemas.errors import SettingsError
from schemas.events import Event, Item
from schemas.serving import RecommendationRequest

SECRET = "a:" + "s" * 40
JSON = {"content-type": "application/json"}
NEEDED = {"DATABASE_URL": "postgresql://nobody@nowhere/none", "ARTIFACTS_URL": "file:///nothing"}


@pytest.fixture(scope="module")
def world(postgres_url: str, template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedWorld]:
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE consenting TEMPLATE {template}")
    yield build(
        replace_database(postgres_url, "consenting"), tmp_path_factory.mktemp("consenting"), people=12, items=100
    )
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute("DROP DATABASE consenting WITH (FORCE)")


@pytest.fixture(scope="module")
def app(world: ServedWorld) -> Iterator[LarderApplication]:
    made = world.application(audit_per_mille=1_000, link_keys=SECRET)
    yield made
    made.close()


def say(app: LarderApplication, user: str, personalise: object, headers: dict[str, str], query: str = "") -> Any:
    body = json.dumps({"personalise": personalise}).encode()
    answer = handle(app, "POST", f"/people/{user}/consent", JSON | headers, body, deadline=None, query=query)
    return answer.status, json.loads(answer.body)


def post(app: LarderApplication, key: dict[str, str], *events: dict[str, Any]) -> list[dict[str, Any]]:
    body = json.dumps({"events": events}).encode()
    answer = handle(app, "POST", "/events", JSON | key, body, deadline=None)
    assert answer.status == 200, answer.body
    outcomes: list[dict[str, Any]] = json.loads(answer.body)["outcomes"]
    return outcomes


def test_who_refuses_gets_what_a_stranger_would_and_nothing_of_it_is_kept(
    app: LarderApplication, world: ServedWorld
) -> None:
    anna, bo = world.people[0], world.people[1]
    key = key_header(world.url, ["write", "recommend"])

    def ask(user: str, **more: Any) -> dict[str, Any]:
        body = json.dumps({"user_id": user, "k": 20, "explain": True, **more}).encode()
        answer = handle(app, "POST", "/recommendations", JSON | key, body, deadline=None)
        assert answer.status == 200
        parsed: dict[str, Any] = json.loads(answer.body)
        return parsed

    before = ask(anna)
    assert before["model_version"] == world.version
    assert "personalised" not in before
    assert say(app, anna, False, key)[0] == say(app, bo, False, key)[0] == 200
    app.served.flush(5_000)
    with psycopg.connect(world.url) as connection:
        connection.execute("DELETE FROM served_features")
    row = app.store.read_person(anna, datetime.now(UTC), 5_000, live=True)
    assert (row.personalise, row.history.item_ids) == (False, [])
    assert all(not columns.keys for columns in row.views.values())
    assert all(not columns.keys for columns in app.store.read_person(anna, TODAY, 5_000).views.values())
    mine, others = ask(anna), ask(bo)
    assert mine["personalised"] is False
    assert (mine["model_version"], mine["degraded"]) == ("popular", [])
    assert mine["items"] == others["items"] != before["items"]
    # What is asked in so many words is no knowledge of the person: a wish and filters hold.
    assert ask(anna, prompt="a quiet story of the sea")["items"] != mine["items"]
    app.served.flush(5_000)
    with psycopg.connect(world.url) as connection:
        assert connection.execute("SELECT count(*) FROM served_features").fetchone() == (0,)
    say(app, anna, True, key)
    assert [item["item_id"] for item in ask(anna)["items"]] == [item["item_id"] for item in before["items"]]


def test_an_event_of_who_refuses_is_declined_and_stored_once_they_agree(
    app: LarderApplication, world: ServedWorld
) -> None:
    key, (anna, bo) = key_header(world.url, ["write"]), world.people[2:4]
    say(app, anna, False, key)
    events = [
        {"event_id": f"consent-{user}", "user_id": user, "item_id": world.items[0], "kind": "view"}
        for user in (anna, bo)
    ]
    declined, stored = post(app, key, *events)
    assert (declined["outcome"], stored["outcome"]) == ("declined", "stored")
    assert "has not agreed to being personalised" in declined["reason"]
    with psycopg.connect(world.url) as connection:
        for table in ("event_keys", "recent_events", "user_history"):
            rows = connection.execute(f"SELECT event_id FROM {table} WHERE event_id LIKE 'consent-%'").fetchall()
            assert rows == [(f"consent-{bo}",)], table
    say(app, anna, True, key)
    assert [made["outcome"] for made in post(app, key, *events)] == ["stored", "duplicate"]


def test_the_default_holds_for_who_has_said_nothing(world: ServedWorld) -> None:
    app = world.application(consent_default=False)
    key, anna = key_header(world.url, ["write"]), world.people[4]
    try:
        request = RecommendationRequest(user_id=anna, k=5)
        assert not app.recommend(request).personalised
        event = {"event_id": "default-1", "user_id": anna, "item_id": world.items[0], "kind": "view"}
        assert post(app, key, event)[0]["outcome"] == "declined"
        say(app, anna, True, key)
        assert app.recommend(request).model_version == world.version
        assert post(app, key, event)[0]["outcome"] == "stored"
    finally:
        app.close()


def test_the_setting_is_yes_or_no() -> None:
    assert read_settings(NEEDED).consent_default
    assert not read_settings(NEEDED | {"LARDER_CONSENT_DEFAULT": " No "}).consent_default
    with pytest.raises(SettingsError, match="LARDER_CONSENT_DEFAULT is 'maybe'; give yes or no"):
        read_settings(NEEDED | {"LARDER_CONSENT_DEFAULT": "maybe"})


def test_who_may_say_it(app: LarderApplication, world: ServedWorld) -> None:
    anna = world.people[5]
    assert say(app, anna, True, key_header(world.url, ["recommend"]))[0] == 403
    assert say(app, anna, True, {})[0] == 401
    assert say(app, anna, True, key_header(world.url, ["admin"]))[0] == 200
    links = Links.read(SECRET)
    assert say(app, anna, True, {}, f"token={links.make(anna, 'consent', 1)}")[0] == 200
    assert say(app, anna, True, {}, f"token={links.make(anna, 'forget', 1)}")[0] == 401
    assert say(app, anna, True, {}, f"token={links.make(world.people[6], 'consent', 1)}")[0] == 401
    assert say(app, anna, "yes", key_header(world.url, ["write"]))[0] == 422
    # The same word again keeps the day on which it was first said.
    write = key_header(world.url, ["write"])
    first, again, other = (say(app, anna, word, write)[1]["decided_at"] for word in (True, True, False))
    assert first == again < other


def test_who_refuses_is_not_trained_on(
    database: str, lake: Lake, connection: psycopg.Connection[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = [Event(f"{u}{n}", u, f"i{n}", "view", None, days_ago(n)) for u in ("a", "b", "c") for n in range(1, 4)]
    ingest(ListSource(events, [Item(f"i{n}", f"I{n}") for n in range(4)]), lake, connection, now=TODAY)
    connection.commit()
    app = LarderApplication.from_settings(serving(database, tmp_path.as_uri()))
    try:
        key = key_header(database, ["write"])
        say(app, "a", False, key)
        say(app, "b", True, key)
    finally:
        app.close()

    def people() -> list[str]:
        found = load_interactions(lake, connection)
        assert len(found) == 3 * len(found.user_ids)
        return found.user_ids.tolist()

    assert people() == ["b", "c"]
    monkeypatch.setenv("LARDER_CONSENT_DEFAULT", "no")
    assert people() == ["b"]


def test_a_word_is_kept_of_somebody_of_whom_nothing_else_is(database: str, tmp_path: Path) -> None:
    app = LarderApplication.from_settings(serving(database, tmp_path.as_uri()))
    try:
        key = key_header(database, ["write"])
        status, answer = say(app, "new/one", False, key)
        assert (status, answer["personalise"]) == (200, False)
        assert datetime.now(UTC) - datetime.fromisoformat(answer["decided_at"]) < timedelta(minutes=1)
        assert not app.store.read_person("new/one", datetime.now(UTC), 5_000).personalise
        event = {"event_id": "e", "user_id": "new/one", "item_id": "i", "kind": "view"}
        assert post(app, key, event)[0]["outcome"] == "declined"
    finally:
        app.close()
