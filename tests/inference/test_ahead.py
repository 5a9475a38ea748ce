"""The rung below the ranker: a person's list that was scored ahead, while it is young and its model may speak."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import psycopg
import pytest
from released import ITEMS, Released, category, released
from worlds import serving

from inference import http
from inference.ahead import ranked
from inference.ranker import Ranker
from inference.runtime import LarderApplication
from inference.store import Store

LIST = [item for item in ITEMS[::-1] if int(item[1:]) % 3][:20]


@pytest.fixture(scope="module")
def world(postgres_url: str, template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Released]:
    with released(postgres_url, template, tmp_path_factory.mktemp("released")) as made:
        yield made


@pytest.fixture
def connection(world: Released) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(world.url, autocommit=True) as opened:
        yield opened
        opened.execute("DELETE FROM user_scores")
        opened.execute("DELETE FROM erasure_requests")


@pytest.fixture
def app(world: Released, monkeypatch: pytest.MonkeyPatch) -> Iterator[LarderApplication]:
    """A function whose model fails, under the roles that functions have."""
    made = application(world)
    monkeypatch.setattr(Ranker, "run", failing)
    yield made
    made.close()


def application(world: Released, **more: Any) -> LarderApplication:
    settings = serving(world.url, world.artifacts_url, timeout_ms=20_000, audit_per_mille=0, access="platform", **more)
    made = LarderApplication.from_settings(settings)
    made.warm()
    return made


def failing(self: Ranker, inputs: object) -> None:
    raise RuntimeError("onnxruntime raises its own types")


def put(connection: psycopg.Connection[Any], version: str, hours: float = 1, user: str = "u0") -> None:
    connection.execute(
        "INSERT INTO user_scores (user_id, run_id, model_version, scored_at, item_ids, scores) VALUES (%s, 1, %s, %s, %s, %s)",
        (user, version, datetime.now(UTC) - timedelta(hours=hours), LIST, [3.0 - n / 4 for n in range(len(LIST))]),
    )


def ask(app: LarderApplication, **request: Any) -> dict[str, Any]:
    body = json.dumps({"user_id": "u0", "k": 10, **request}).encode()
    response = http.handle(app, "POST", "/recommendations", {"content-type": "application/json"}, body, deadline=None)
    assert response.status == 200, response.body
    answer: dict[str, Any] = json.loads(response.body)
    return answer


def ids(answer: dict[str, Any]) -> list[str]:
    return [item["item_id"] for item in answer["items"]]


def had(connection: psycopg.Connection[Any]) -> set[str]:
    return {row[0] for row in connection.execute("SELECT item_id FROM user_history WHERE user_id = 'u0'")}


def without_seen(connection: psycopg.Connection[Any]) -> list[str]:
    return [item for item in LIST if item not in had(connection)]


def test_where_no_model_can_rank_the_list_scored_ahead_answers(
    app: LarderApplication, world: Released, connection: psycopg.Connection[Any]
) -> None:
    put(connection, world.versions[0])
    answer = ask(app, explain=True)
    assert (answer["degraded"], answer["model_version"]) == (["ranker", "scores"], world.versions[0])
    assert ids(answer) == without_seen(connection)[:10]
    assert [item["score"] for item in answer["items"]] == [3.0 - LIST.index(item) / 4 for item in ids(answer)]
    assert all(item["reasons"] for item in answer["items"])


def test_what_the_request_demands_and_what_was_seen_since_hold(
    app: LarderApplication, world: Released, connection: psycopg.Connection[Any]
) -> None:
    put(connection, world.versions[0])
    first, second, *rest = without_seen(connection)
    connection.execute(
        "INSERT INTO user_history (user_id, occurred_at, event_id, item_id, kind) VALUES ('u0', now(), 'since', %s, 'view')",
        (first,),
    )
    try:
        answer = ask(app, exclude=[second], filters={"categories": ["even"]})
    finally:
        connection.execute("DELETE FROM user_history WHERE event_id = 'since'")
    assert answer["degraded"] == ["ranker", "scores"]
    wanted = [item for item in rest if category(item) == "even"]
    assert ids(answer)[: len(wanted)] == wanted[:10]
    # What the list does not have comes behind it, from the floor.
    assert len(answer["items"]) == 10
    scores = [item["score"] for item in answer["items"]]
    assert scores == sorted(scores, reverse=True)
    assert {category(item) for item in ids(answer)} == {"even"}
    assert not set(ids(answer)) & {first, second}


def test_an_old_list_is_left_alone(
    app: LarderApplication, world: Released, connection: psycopg.Connection[Any]
) -> None:
    put(connection, world.versions[0], hours=49)
    answer = ask(app)
    assert (answer["degraded"], answer["model_version"]) == (["ranker"], "co-visitation")
    off = application(world, scores_hours=0)
    connection.execute("UPDATE user_scores SET scored_at = now()")
    assert ask(app)["degraded"] == ["ranker", "scores"]
    assert ask(off)["degraded"] == ["ranker"]
    off.close()


def test_a_list_of_the_model_before_counts_and_one_that_was_rolled_back_does_not(
    app: LarderApplication, world: Released, connection: psycopg.Connection[Any]
) -> None:
    older, newer = world.versions
    # Registered after the one that serves, as a version is that served and was rolled back.
    connection.execute(
        "INSERT INTO model_versions (version, name, path, manifest) VALUES ('rolled-back', 'ranker', 'nowhere', '{}')"
    )
    put(connection, "rolled-back")
    assert ask(app)["degraded"] == ["ranker"]
    world.promote(newer)
    try:
        connection.execute("UPDATE user_scores SET model_version = %s", (older,))
        answer = ask(app)
    finally:
        world.promote(older)
    assert (answer["degraded"][-1], answer["model_version"]) == ("scores", older)


def test_whoever_asked_to_be_forgotten_has_no_list(
    app: LarderApplication, world: Released, connection: psycopg.Connection[Any]
) -> None:
    put(connection, world.versions[0])
    connection.execute("INSERT INTO erasure_requests (request_id, user_id) VALUES ('r', 'u0')")
    assert ask(app)["degraded"] == ["ranker"]


@pytest.mark.parametrize("asked", [{"candidates": list(ITEMS[:12])}, {"at": "2100-01-01T00:00:00Z"}])
def test_what_a_list_knows_nothing_of_is_answered_without(
    app: LarderApplication, world: Released, connection: psycopg.Connection[Any], asked: dict[str, Any]
) -> None:
    put(connection, world.versions[0])
    assert "scores" not in ask(app, **asked)["degraded"]


def test_it_costs_no_round_trip_and_is_read_only_when_needed(
    world: Released, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    put(connection, world.versions[0])
    trips: list[bool] = []
    whole, pick = Store.ask, Store.pick_candidates

    def counted(self: Store, *rest: Any) -> Any:
        trips.append(False)
        return whole(self, *rest)

    def picked(self: Store, **asked: Any) -> Any:
        found = pick(self, **asked)
        trips[-1] = asked["ahead"] is not None
        return found

    app = application(world)
    monkeypatch.setattr(Store, "ask", counted)
    monkeypatch.setattr(Store, "pick_candidates", picked)
    assert ask(app)["degraded"] == []
    assert trips == [False, False]
    app.close()
    trips.clear()
    # Its files are nowhere: nothing can be loaded.
    lost = LarderApplication.from_settings(
        serving(
            world.url, (world.artifacts / "nowhere").as_uri(), timeout_ms=20_000, audit_per_mille=0, access="platform"
        )
    )
    assert ask(lost)["degraded"] == ["ranker", "scores"]
    assert trips == [False, True]
    lost.close()


def test_a_database_without_the_table_is_asked_for_the_floor(
    app: LarderApplication, connection: psycopg.Connection[Any]
) -> None:
    connection.execute("ALTER TABLE user_scores RENAME TO elsewhere")
    try:
        answer = ask(app)
    finally:
        connection.execute("ALTER TABLE elsewhere RENAME TO user_scores")
    assert (answer["degraded"], answer["model_version"]) == (["ranker"], "co-visitation")
    assert len(answer["items"]) == 10


def test_the_list_comes_first_in_its_own_order_and_the_rest_in_the_floors() -> None:
    listed = np.array([np.nan, -2.0, np.nan, 1.5], np.float32)
    floor = np.array([0.2, 9.0, 7.0, 0.0], np.float32)
    assert np.argsort(-ranked(listed, floor)).tolist() == [3, 1, 2, 0]
    assert ranked(np.full(4, np.nan, np.float32), floor).tolist() == floor.tolist()
