"""An export holds all that is held of a person and nothing of anybody else, from the same places that an erasure empties."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import TODAY, days_ago
from worlds import ListSource, key_header, post, serving

from inference.http import handle
from inference.links import Links
from inference.runtime import LarderApplication
from orchestration.compute import person_export
from orchestration.compute.forget import forget, holdings
from orchestration.compute.ingest import ingest
from orchestration.compute.lake import Lake
from orchestration.compute.materialise import materialise
from schemas.errors import LarderError, UnknownPerson
from schemas.events import Event, Item, Person
from schemas.personal_data import places
from schemas.views import VIEWS

ANNA = "anna.ü@example.org"
SECRET = "a:" + "s" * 40
YESTERDAY = (TODAY - timedelta(days=1)).date()
NO_TABLE_OF_ROWS = {"public.erasure_requests", "public.exports", "public.tombstones"}
"""Places of an export or an erasure itself, which is what an export is not about."""


@pytest.fixture
def artifacts(tmp_path: Path) -> str:
    folder = tmp_path / "artifacts" / "training"
    folder.mkdir(parents=True)
    rows = {"user_id": ["bo", ANNA], "label": [0, 1], "at": [days_ago(2), days_ago(1)], "x": [1.0, float("nan")]}
    pq.write_table(pa.table(rows), folder / "training_set.parquet")
    return (tmp_path / "artifacts").as_uri()


@pytest.fixture
def filled(database: str, lake: Lake, connection: psycopg.Connection[Any]) -> str:
    """Anna and Bo in every place that can hold them."""
    events: list[Any] = [
        Event(f"{user}/{n}", user, f"i{n % 3}", "rating", float(n % 5 + 1), days_ago(n))
        for user in (ANNA, "bo")
        for n in range(1, 21)
    ]
    events.append(Event("bad", ANNA, "i1", "sniff", None, days_ago(1)))
    items: list[Any] = [Item(f"i{n}", f"I{n}", categories=("a",)) for n in range(3)]
    people: list[Any] = [Person(user, {"mail": user}) for user in (ANNA, "bo")]
    ingest(ListSource(events, items, people), lake, connection, now=TODAY)
    connection.execute(
        "INSERT INTO served_features (read_id, view, request_id, user_id, read_at, definition_hash, features, keys, numbers) "
        "SELECT user_id, 'v', 'r', user_id, now(), 'h', '{n}', ARRAY[user_id], '{1}' FROM people"
    )
    shown = "model_version, item_ids, scores, candidates, sources, degraded"
    values = "'m', '{i1}', '{1}', 1, '{}', '{}'"
    connection.execute(
        f"INSERT INTO served_requests (request_id, user_id, served_at, {shown}) SELECT user_id, user_id, now(), {values} "
        "FROM people"
    )
    connection.execute(
        f"INSERT INTO shadow_requests (request_id, arm, experiment, user_id, served_at, {shown}) "
        f"SELECT user_id, 'a', 'e', user_id, now(), {values} FROM people"
    )
    connection.execute("INSERT INTO user_scores SELECT user_id, 1, 'm', now(), '{i1}', '{1}' FROM people")
    connection.execute("INSERT INTO survey_answers SELECT user_id, user_id, 'trust', 5, now() FROM people")
    connection.execute("INSERT INTO consents (user_id, personalise) SELECT user_id, true FROM people")
    connection.commit()
    for view in VIEWS:
        materialise(view, YESTERDAY, YESTERDAY, url=database, lake=lake)
    post(database, [Event(f"posted {user}", user, "i1", "view", None, TODAY) for user in (ANNA, "bo")])
    return database


def gather(url: str, lake: Lake, artifacts: str, user: str = ANNA) -> dict[str, Any]:
    document = person_export.gather(user, url=url, lake=lake, artifacts_url=artifacts)
    parsed: dict[str, Any] = json.loads(person_export.to_json(document))
    return parsed


def test_it_covers_what_is_held_what_is_erased_and_what_the_data_map_says(
    filled: str, lake: Lake, artifacts: str
) -> None:
    document = gather(filled, lake, artifacts)
    held = {place: len(rows) for place, rows in document["held"].items()}
    assert {place: rows for place, rows in held.items() if place != person_export.TRAINING} == {
        **holdings(filled, lake, ANNA),
        "public.event_keys": 21,
    }
    mapped = {place.table or place.name for place in places()}
    assert set(held) <= mapped
    # And the other way round: of every table of the map there is a row, as this world fills them all.
    assert {place.table for place in places() if place.table} - set(held) == NO_TABLE_OF_ROWS
    receipt = forget(ANNA, url=filled, lake=lake, artifacts_url=artifacts)
    assert set(held) - {person_export.TRAINING} <= set(receipt.removed)


def test_it_is_about_one_person(filled: str, lake: Lake, artifacts: str) -> None:
    document = gather(filled, lake, artifacts)
    assert '"bo' not in json.dumps(document)
    assert len(document["held"][person_export.LAKE]) == 20
    assert document["held"][person_export.LAKE][0]["occurred_at"].endswith("+00:00")
    assert document["held"]["public.people"][0]["profile"] == {"mail": ANNA}
    assert [row["label"] for row in document["held"][person_export.TRAINING]] == [1]
    assert document["held"][person_export.TRAINING][0]["x"] == "nan"
    with pytest.raises(UnknownPerson, match="nothing is held of a person 'nobody'"):
        gather(filled, lake, artifacts, "nobody")


def test_over_http_what_lies_here_comes_at_once_and_the_whole_by_its_receipt(
    filled: str, lake: Lake, artifacts: str, tmp_path: Path
) -> None:
    app = LarderApplication.from_settings(serving(filled, tmp_path.as_uri(), link_keys=SECRET))
    query = f"token={Links.read(SECRET).make(ANNA, 'export', 1)}"

    def ask(method: str, path: str, query: str = query, headers: dict[str, str] | None = None) -> tuple[int, Any]:
        answer = handle(app, method, f"/people/{path}", headers or {}, b"", deadline=None, query=query)
        return answer.status, json.loads(answer.body)

    try:
        status, first = ask("POST", f"{ANNA}/export")
        assert (status, first["state"]) == (202, "waiting")
        assert set(first["held"]) == {
            "public.consents", "public.people", "public.recent_events", "public.served_features", "public.served_requests",
            "public.shadow_requests", "public.survey_answers", "public.user_history", "public.user_scores",
        }  # fmt: skip
        assert any("the lake" in said for said in first["not_included"])
        assert "bo" not in {row["user_id"] for rows in first["held"].values() for row in rows}
        receipt = first["receipt_id"]
        assert ask("POST", f"{ANNA}/export")[1]["receipt_id"] == receipt
        assert ask("GET", f"{ANNA}/export/{receipt}")[1]["state"] == "waiting"
        assert person_export.open_requests(filled) == [receipt]
        person_export.fulfil(receipt, url=filled, lake=lake, artifacts_url=artifacts)
        assert person_export.open_requests(filled) == []
        status, whole = ask("GET", f"{ANNA}/export/{receipt}")
        assert (status, whole["state"]) == (200, "ready")
        assert len(whole["held"][person_export.LAKE]) == 20
        assert "public.exports" not in whole["held"]
        # It is nobody else's, and a link for something else does not open it.
        assert ask("GET", f"bo/export/{receipt}", "", key_header(filled, ["admin"]))[0] == 404
        assert ask("GET", f"{ANNA}/export/{receipt}", f"token={Links.read(SECRET).make(ANNA, 'forget', 1)}")[0] == 401
        assert ask("POST", "bo/export", "", key_header(filled, ["write"]))[0] == 403
        assert ask("POST", "nobody/export", "", key_header(filled, ["admin"]))[0] == 404
        # Asked for again, it is made anew; erased, the copy goes with the rest.
        assert ask("POST", f"{ANNA}/export")[1]["receipt_id"] != receipt
        again = person_export.open_requests(filled)
        forget(ANNA, url=filled, lake=lake, artifacts_url=artifacts)
        assert ask("GET", f"{ANNA}/export/{again[0]}")[0] == 404
        with pytest.raises(LarderError, match="there is no export request"):
            person_export.fulfil(again[0], url=filled, lake=lake, artifacts_url=artifacts)
    finally:
        app.close()


def test_who_only_the_lake_knows_can_be_exported(
    filled: str, lake: Lake, artifacts: str, connection: psycopg.Connection[Any]
) -> None:
    for table in ("people", "recent_events", "user_history", "served_features", "consents"):
        connection.execute(f"DELETE FROM {table} WHERE user_id = %s", (ANNA,))
    connection.commit()
    receipt = person_export.request(filled, ANNA)
    assert person_export.request(filled, ANNA) == receipt
    held = person_export.fulfil(receipt, url=filled, lake=lake, artifacts_url=artifacts)
    assert held[person_export.LAKE] == 20
    unknown = person_export.request(filled, "nobody")
    with pytest.raises(LarderError, match="of whom nothing is held"):
        person_export.fulfil(unknown, url=filled, lake=lake, artifacts_url=artifacts)
    assert person_export.open_requests(filled) == []
