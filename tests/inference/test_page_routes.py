"""What the page asks beside recommendations: a history, a few people, the two questions; who may, and who is told nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from conftest import TODAY, days_ago
from worlds import ListSource, key_header, serving

from inference import survey
from inference.access import Platform
from inference.http import handle
from inference.links import Links
from inference.people import PEOPLE_SHOWN
from inference.runtime import LarderApplication
from inference.settings import read_settings
from orchestration.compute.forget import forget
from orchestration.compute.ingest import ingest
from orchestration.compute.lake import Lake
from schemas.errors import SettingsError
from schemas.events import Event, Item

SECRET = "a:" + "s" * 40
USER = "user/ü 1"
JSON = {"content-type": "application/json"}


@pytest.fixture
def app(database: str, lake: Lake, tmp_path: Path) -> Iterator[LarderApplication]:
    events = [Event(f"{u}{n}", u, f"i{n}", "rating", 4.0, days_ago(n)) for u in (USER, "v") for n in range(1, 6)]
    with psycopg.connect(database, options="-c TimeZone=UTC") as connection:
        ingest(ListSource(events, [Item(f"i{n}", f"Title {n}") for n in range(5)]), lake, connection, now=TODAY)
    settings = serving(database, tmp_path.as_uri(), link_keys=SECRET, survey_per_mille=1_000)
    made = LarderApplication.from_settings(settings)
    yield made
    made.close()


def ask(
    app: LarderApplication, method: str, path: str, headers: dict[str, str], query: str = "", document: object = None
) -> tuple[int, dict[str, Any]]:
    body = b"" if document is None else json.dumps(document).encode()
    answer = handle(app, method, path, JSON | headers, body, deadline=None, query=query)
    return answer.status, json.loads(answer.body)


# --- history --------------------------------------------------------------------------------------------------------


def test_a_history_is_the_newest_events_with_titles(app: LarderApplication, database: str) -> None:
    key = key_header(database, ["recommend"])
    status, answer = ask(app, "GET", f"/people/{USER}/history", key, "limit=2")
    assert status == 200
    assert answer["events"] == [
        {"item_id": f"i{n}", "title": f"Title {n}", "kind": "rating", "value": 4.0, "occurred_at": instant}
        for n, instant in ((n, days_ago(n).isoformat().replace("+00:00", "Z")) for n in (1, 2))
    ]
    events = ask(app, "GET", f"/people/{USER}/history", key)[1]["events"]
    assert [event["title"] for event in events] == ["Title 1", "Title 2", "Title 3", "Title 4", None]
    assert ask(app, "GET", "/people/nobody/history", key) == (200, {"events": []})
    for limit in ("0", "201", "x", "", "-1", "1e2", "٣"):
        status, answer = ask(app, "GET", f"/people/{USER}/history", key, f"limit={limit}")
        assert (status, answer["error"]["field"]) == (422, "limit"), limit


def test_a_history_is_for_a_key_that_recommends_or_the_persons_own_link(app: LarderApplication, database: str) -> None:
    path = f"/people/{USER}/history"
    assert ask(app, "GET", path, {})[0] == 401
    assert ask(app, "GET", path, key_header(database, ["write"]))[0] == 403
    links = Links.read(SECRET)
    assert ask(app, "GET", path, {}, f"token={links.make(USER, 'export', 1)}")[0] == 200
    assert ask(app, "GET", path, {}, f"token={links.make(USER, 'forget', 1)}")[0] == 401
    assert ask(app, "GET", path, {}, f"token={links.make('v', 'export', 1)}")[0] == 401
    # A link stays what only an admin key can stand in for, where it was so before.
    assert ask(app, "POST", f"/people/{USER}/forget", key_header(database, ["recommend"]))[0] == 403


def test_who_asked_to_be_forgotten_has_no_history_and_is_not_shown(app: LarderApplication, database: str) -> None:
    admin = key_header(database)
    assert ask(app, "GET", "/people", admin)[1] == {"people": [USER, "v"]}
    assert ask(app, "POST", f"/people/{USER}/forget", admin)[0] == 202
    assert ask(app, "GET", f"/people/{USER}/history", admin)[1] == {"events": []}
    assert ask(app, "GET", "/people", admin)[1] == {"people": ["v"]}
    assert ask(app, "GET", f"/people/{USER}/survey", admin)[1] == {"questions": []}


# --- people ---------------------------------------------------------------------------------------------------------


def test_people_are_listed_to_an_admin_alone(app: LarderApplication, database: str) -> None:
    assert ask(app, "GET", "/people", {})[0] == 401
    assert ask(app, "GET", "/people", key_header(database, ["write"]))[0] == 403
    assert ask(app, "GET", "/people", key_header(database, ["recommend", "write"])) == (200, {"people": []})
    # Where somebody in front checks, nobody has shown here that they may see who is there.
    app.access = Platform()
    assert ask(app, "GET", "/people", {}) == (200, {"people": []})


def test_a_few_people_are_found_without_reading_all(app: LarderApplication, database: str) -> None:
    with psycopg.connect(database) as connection:
        connection.execute(
            "INSERT INTO user_history (user_id, occurred_at, event_id, item_id, kind) "
            "SELECT 'p' || lpad((n / 10)::text, 5, '0'), now(), n::text, 'i1', 'view' FROM generate_series(0, 49999) AS n"
        )
    people = ask(app, "GET", "/people", key_header(database))[1]["people"]
    assert people == [f"p{n:05}" for n in range(PEOPLE_SHOWN)]


# --- survey ---------------------------------------------------------------------------------------------------------


def answers(connection: psycopg.Connection[Any]) -> list[tuple[Any, ...]]:
    return connection.execute("SELECT user_id, request_id, question, answer FROM survey_answers ORDER BY 3").fetchall()


def test_answers_are_kept_once_and_who_answered_is_not_asked_again(
    app: LarderApplication, database: str, connection: psycopg.Connection[Any]
) -> None:
    key = key_header(database, ["recommend", "write"])
    path = f"/people/{USER}/survey"
    assert ask(app, "GET", path, key) == (200, {"questions": ["satisfied", "trust"]})
    said = [{"question": "trust", "answer": 2}, {"question": "satisfied", "answer": 5}]
    document = {"user_id": USER, "request_id": "r1", "answers": said}
    assert ask(app, "POST", "/survey", key, document=document) == (200, {"stored": 2})
    assert ask(app, "POST", "/survey", key, document=document | {"answers": [said[0] | {"answer": 3}]})[0] == 200
    assert answers(connection) == [(USER, "r1", "satisfied", 5), (USER, "r1", "trust", 3)]
    assert ask(app, "GET", path, key) == (200, {"questions": []})
    connection.execute("UPDATE survey_answers SET answered_at = now() - INTERVAL '7 days'")
    connection.commit()
    assert ask(app, "GET", path, key)[1]["questions"]
    # They are no events: nothing of them enters a history.
    assert "r1" not in json.dumps(ask(app, "GET", f"/people/{USER}/history", key)[1])


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"answers": [{"question": "trust", "answer": 6}]}, "answers.0.answer"),
        ({"answers": [{"question": "trust", "answer": True}]}, "answers.0.answer"),
        ({"answers": [{"question": "hungry", "answer": 1}]}, "answers.0.question"),
        ({"answers": []}, "answers"),
        ({"request_id": ""}, "request_id"),
    ],
)
def test_other_answers_are_refused(app: LarderApplication, database: str, change: dict[str, Any], field: str) -> None:
    document = {"user_id": "u", "request_id": "r", "answers": [{"question": "trust", "answer": 1}]} | change
    status, answer = ask(app, "POST", "/survey", key_header(database), document=document)
    assert (status, answer["error"]["field"]) == (422, field)
    assert ask(app, "POST", "/survey", key_header(database, ["recommend"]), document=document)[0] == 403


def test_a_forgotten_persons_answers_go_and_none_are_taken_meanwhile(
    app: LarderApplication, database: str, lake: Lake, tmp_path: Path, connection: psycopg.Connection[Any]
) -> None:
    key = key_header(database)
    document = {"user_id": "w", "request_id": "r", "answers": [{"question": "trust", "answer": 1}]}
    ask(app, "POST", "/survey", key, document=document)
    # Their answer is all that is held of them, and enough to be found by.
    assert ask(app, "POST", "/people/w/forget", key)[0] == 202
    assert ask(app, "POST", "/survey", key, document=document | {"request_id": "r2"}) == (200, {"stored": 0})
    forget("w", url=database, lake=lake, artifacts_url=tmp_path.as_uri())
    assert answers(connection) == []


def test_a_share_of_people_is_asked_the_same_all_week_and_others_the_next() -> None:
    monday = datetime(2026, 3, 2, tzinfo=UTC)
    people = [f"u{n}" for n in range(4_000)]

    def asked(at: datetime, per_mille: int = 100) -> set[str]:
        return {user for user in people if survey.asks(user, at, per_mille)}

    first = asked(monday)
    assert 320 < len(first) < 480
    assert asked(monday + timedelta(days=6, hours=23)) == first
    next_week = asked(monday + timedelta(days=7))
    assert len(first & next_week) < 80
    assert asked(monday, 0) == set()
    assert asked(monday, 1_000) == set(people)
    assert asked(monday, 200) >= first


def test_the_rate_is_a_setting() -> None:
    needed = {"DATABASE_URL": "postgresql://h/d", "ARTIFACTS_URL": "file:///a"}
    assert read_settings(needed).survey_per_mille == 0
    assert read_settings({**needed, "LARDER_SURVEY_PER_MILLE": "20"}).survey_per_mille == 20
    with pytest.raises(SettingsError, match="LARDER_SURVEY_PER_MILLE is '1001'; give a whole number from 0 to 1000"):
        read_settings({**needed, "LARDER_SURVEY_PER_MILLE": "1001"})
