"""Every rung of the ladder: what breaks, what still answers, and what the answer says of it."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from released import ITEMS, Released, category, publish_pointer, released

from inference import http, models
from inference.candidates import Candidates
from inference.ranker import Ranker
from inference.runtime import LarderApplication
from inference.settings import Settings
from inference.store import Store
from schemas.errors import Unavailable
from schemas.manifest import CHAMPION_POINTER, POPULAR_ITEMS, RANKER_FP32

NOBODY_LISTENS = "postgresql://127.0.0.1:1/none"


@pytest.fixture(scope="module")
def world(postgres_url: str, template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Released]:
    with released(postgres_url, template, tmp_path_factory.mktemp("released")) as made:
        yield made


@pytest.fixture
def connection(world: Released) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(world.url, autocommit=True) as opened:
        yield opened


def application(url: str, artifacts_url: str, **more: Any) -> LarderApplication:
    return LarderApplication.from_settings(
        Settings(url, artifacts_url, timeout_ms=5_000, audit_per_mille=0, **more, access="platform")
    )


@pytest.fixture
def app(world: Released) -> Iterator[LarderApplication]:
    made = application(world.url, world.artifacts_url)
    made.warm()
    yield made
    made.close()


@pytest.fixture
def dark(world: Released) -> Iterator[LarderApplication]:
    """The same function with its database gone."""
    made = application(NOBODY_LISTENS, world.artifacts_url)
    yield made
    made.close()


def ask(app: LarderApplication, **request: Any) -> dict[str, Any]:
    body = json.dumps({"user_id": "u0", "k": 10, **request}).encode()
    response = http.handle(app, "POST", "/recommendations", {"content-type": "application/json"}, body, deadline=None)
    assert response.status == 200, response.body
    answer: dict[str, Any] = json.loads(response.body)
    return answer


def ids(answer: dict[str, Any]) -> list[str]:
    return [item["item_id"] for item in answer["items"]]


def test_with_everything_there_nothing_is_degraded(app: LarderApplication, world: Released) -> None:
    answer = ask(app, explain=True)
    assert (answer["degraded"], answer["model_version"]) == ([], world.versions[0])
    assert len(answer["items"]) == 10
    assert app.health().degraded == ()


def test_features_that_cannot_be_read_leave_the_history(
    app: LarderApplication, world: Released, connection: psycopg.Connection[Any]
) -> None:
    full = ask(app)
    connection.execute("ALTER TABLE online.user_tiles RENAME TO elsewhere")
    try:
        answer = ask(app)
    finally:
        connection.execute("ALTER TABLE online.elsewhere RENAME TO user_tiles")
    assert (answer["degraded"], answer["model_version"]) == (["features"], world.versions[0])
    assert len(answer["items"]) == 10
    # The history was read: nothing that the person had comes back.
    assert not set(ids(answer)) & had(connection)
    assert [item["score"] for item in answer["items"]] != [item["score"] for item in full["items"]]
    assert ask(app)["degraded"] == []


def test_features_of_items_that_cannot_be_read_leave_the_ranker(
    app: LarderApplication, world: Released, connection: psycopg.Connection[Any]
) -> None:
    connection.execute("ALTER TABLE online.item_tiles RENAME TO elsewhere")
    try:
        answer = ask(app)
    finally:
        connection.execute("ALTER TABLE online.elsewhere RENAME TO item_tiles")
    assert (answer["degraded"], answer["model_version"]) == (["features"], world.versions[0])
    assert len(answer["items"]) == 10


def test_candidates_that_take_too_long_by_the_model_leave_co_visitation(
    app: LarderApplication, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Store.pick_candidates

    def slow(self: Store, **asked: Any) -> Candidates:
        if asked["champion"] is not None:
            raise Unavailable("the database did not answer in time")
        return whole(self, **asked)

    monkeypatch.setattr(Store, "pick_candidates", slow)
    answer = ask(app)
    assert (answer["degraded"], answer["model_version"]) == (["ranker"], "co-visitation")
    assert len(answer["items"]) == 10
    assert not set(ids(answer)) & had(connection)


def test_a_statement_that_the_database_refuses_is_a_rung_and_no_500(
    app: LarderApplication, connection: psycopg.Connection[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever the server says to a statement, somebody is waiting for an answer."""
    connection.execute("ALTER TABLE popular_items RENAME TO elsewhere")
    connection.execute("CREATE VIEW popular_items AS SELECT list, rank / (rank - rank) AS rank, item_id FROM elsewhere")
    try:
        answer = ask(app)
        assert answer["degraded"] == ["database"]
        assert len(answer["items"]) == 10
        # What the person had was read before, and holds on the last rung too.
        assert not set(ids(answer)) & had(connection)
    finally:
        connection.execute("DROP VIEW popular_items")
        connection.execute("ALTER TABLE elsewhere RENAME TO popular_items")
    assert "DivisionByZero (SQLSTATE 22012)" in caplog.text
    assert "u0" not in caplog.text
    assert app.store.breaker.state == "closed", "it answered, so it is there"
    assert ask(app)["degraded"] == []


def test_no_item_vectors_leave_the_last_rung(app: LarderApplication, connection: psycopg.Connection[Any]) -> None:
    connection.execute("ALTER TABLE item_vectors RENAME COLUMN vector TO elsewhere")
    try:
        answer = ask(app)
    finally:
        connection.execute("ALTER TABLE item_vectors RENAME COLUMN elsewhere TO vector")
    assert answer["degraded"] == ["database"]
    assert len(answer["items"]) == 10
    assert ask(app)["degraded"] == []


def had(connection: psycopg.Connection[Any]) -> set[str]:
    return {row[0] for row in connection.execute("SELECT item_id FROM user_history WHERE user_id = 'u0'")}


def test_a_ranker_that_raises_leaves_co_visitation_and_is_left_alone(
    app: LarderApplication, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def failing(self: Ranker, inputs: object) -> None:
        asked.append(1)
        raise RuntimeError("onnxruntime raises its own types")

    monkeypatch.setattr(Ranker, "run", failing)
    for _ in range(5):
        answer = ask(app)
        assert (answer["degraded"], answer["model_version"]) == (["ranker"], "co-visitation")
        assert len(answer["items"]) == 10
    assert len(asked) == 3, "the breaker is open"
    monkeypatch.undo()
    app.models.ranker_breaker.reset()
    assert ask(app)["degraded"] == []


def test_a_ranker_that_would_come_too_late_is_not_begun(app: LarderApplication) -> None:
    app.models._rank_pace.took(60_000)
    assert ask(app)["degraded"] == ["ranker"]


def test_a_missing_encoder_costs_the_wish_alone(app: LarderApplication) -> None:
    answer = ask(app, prompt="something quiet")
    assert (answer["degraded"], answer["prompt_version"]) == (["wish"], None)


def test_an_encoder_of_another_space_costs_the_wish_alone(
    app: LarderApplication, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Other:
        version = "another"

        def encode_one(self, text: str) -> None:
            pytest.fail("a vector of another space must not be compared")

    monkeypatch.setattr(models.LoadedModels, "_load_encoder", lambda self: Other())
    app.models._encoder._failed_at = -1e9
    assert ask(app, prompt="something quiet")["degraded"] == ["wish"]


def test_without_a_database_the_shipped_list_answers(dark: LarderApplication) -> None:
    answer = ask(dark, explain=True)
    assert (answer["degraded"], answer["model_version"]) == (["database"], "popular")
    assert ids(answer) == list(ITEMS[:10])
    assert answer["items"][0]["reasons"] == ["popular"]


def test_what_a_request_demands_holds_on_the_last_rung(dark: LarderApplication) -> None:
    odd = ask(dark, filters={"categories": ["odd"]}, exclude=["i01", "i03"])
    assert ids(odd) == [item for item in ITEMS if category(item) == "odd" and item not in ("i01", "i03")][:10]
    even = ask(dark, filters={"exclude_categories": ["odd"]}, k=40)
    assert ids(even) == [item for item in ITEMS if category(item) == "even"]
    assert ids(ask(dark, candidates=["i07", "i02", "no-such-item"])) == ["i02", "i07"]
    assert ids(ask(dark, filters={"categories": ["no-such-category"]})) == []


def test_a_list_from_before_categories_were_shipped_shows_nothing_that_a_filter_might_forbid(
    world: Released, dark: LarderApplication, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tuple(models.PopularItem(item, item, 1.0, None) for item in ITEMS)
    monkeypatch.setattr(models, "read_popular", lambda folder: rows)
    assert len(ids(ask(dark))) == 10
    assert ids(ask(dark, filters={"exclude_categories": ["odd"]})) == []


@pytest.mark.parametrize("what", ["pointer", "list", "manifest", "another version"])
def test_a_shipped_list_that_was_tampered_with_is_not_served(world: Released, tmp_path: Path, what: str) -> None:
    shutil.copytree(world.artifacts, tmp_path / "artifacts")
    version, other = world.versions
    folder = tmp_path / "artifacts" / "models" / "ranker" / version
    publish_pointer(tmp_path / "artifacts", version)
    if what == "pointer":
        (tmp_path / "artifacts" / CHAMPION_POINTER).write_text('{"version": "../../x", "path": "../../etc"}')
    elif what == "list":
        rows = json.loads((folder / POPULAR_ITEMS).read_text())
        rows[0]["title"] = "bought its place"
        (folder / POPULAR_ITEMS).write_text(json.dumps(rows))
    elif what == "manifest":
        text = (folder / "manifest.json").read_text()
        (folder / "manifest.json").write_text(text.replace('"seed": 1', '"seed": 7'))
    else:
        pointer = {"version": version, "path": f"models/ranker/{other}"}
        (tmp_path / "artifacts" / CHAMPION_POINTER).write_text(json.dumps(pointer))
    app = application(NOBODY_LISTENS, (tmp_path / "artifacts").as_uri())
    try:
        body = b'{"user_id": "u0"}'
        response = http.handle(
            app, "POST", "/recommendations", {"content-type": "application/json"}, body, deadline=None
        )
        assert response.status == 503
        assert json.loads(response.body)["error"]["type"] == "unavailable"
    finally:
        app.close()


def test_a_champion_that_was_tampered_with_leaves_the_one_before(
    app: LarderApplication, world: Released, connection: psycopg.Connection[Any]
) -> None:
    first, second = world.versions
    graph = world.folder(second) / RANKER_FP32
    whole = graph.read_bytes()
    graph.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        world.promote(second)
        give_up_at = time.monotonic() + 30
        while not (answer := ask(app))["degraded"]:
            assert time.monotonic() < give_up_at
        assert (answer["degraded"], answer["model_version"]) == (["release"], first)
        assert app.health().degraded == ("release",)
    finally:
        graph.write_bytes(whole)
        world.promote(first)
    assert ask(app)["degraded"] == []


def test_a_process_that_starts_with_a_tampered_champion_answers_by_co_visitation(
    world: Released, tmp_path: Path
) -> None:
    shutil.copytree(world.artifacts, tmp_path / "artifacts")
    (tmp_path / "artifacts" / "models" / "ranker" / world.versions[0] / RANKER_FP32).write_bytes(b"not a graph")
    app = application(world.url, (tmp_path / "artifacts").as_uri())
    try:
        answer = ask(app)
        assert (answer["degraded"], answer["model_version"]) == (["ranker"], "co-visitation")
        assert len(answer["items"]) == 10
    finally:
        app.close()


def test_a_process_that_was_not_warmed_waits_for_its_first_model_within_the_deadline(world: Released) -> None:
    app = application(world.url, world.artifacts_url)
    try:
        assert ask(app)["degraded"] == []
    finally:
        app.close()
