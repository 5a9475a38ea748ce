"""What the page says of an item, over real HTTP: in the next answer within a second, negative where it is meant so; and how
long the steps of an answer took, beside the body and not in it."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from released import Released, released
from test_asgi_door import ask, served
from worlds import key_header, serving

from inference.handlers.asgi import create_app
from inference.http import handle
from inference.runtime import LarderApplication
from schemas.events import LIKED_VALUE, NEGATIVE_KINDS

FEEDBACK_JS = (Path(__file__).parents[2] / "inference" / "web" / "feedback.js").read_text()
MEANS = {name: (kind, value) for name, kind, value in re.findall(r'(\w+): \["(\w+)", (\w+)\]', FEEDBACK_JS)}
"""Kind and value of what the page posts, as the page has them."""


@pytest.fixture(scope="module")
def world(postgres_url: str, template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Released]:
    with released(postgres_url, template, tmp_path_factory.mktemp("feedback")) as made:
        yield made


@pytest.fixture(scope="module")
def app(world: Released) -> Iterator[LarderApplication]:
    made = LarderApplication.from_settings(serving(world.url, world.artifacts_url, timeout_ms=20_000))
    made.warm()
    yield made
    made.close()


@pytest.fixture(scope="module")
def key(world: Released) -> dict[str, str]:
    return {"content-type": "application/json", **key_header(world.url, per_minute=100_000)}


@pytest.fixture(scope="module")
def port(world: Released) -> Iterator[int]:
    def application() -> LarderApplication:
        made = LarderApplication.from_settings(serving(world.url, world.artifacts_url, timeout_ms=20_000))
        made.warm()
        return made

    with served(create_app(application)) as number:
        yield number


def post(port: int, path: str, document: object, key: dict[str, str]) -> dict[str, Any]:
    status, _, body = ask(port, path, document, headers=key)
    assert status == 200, body
    answer: dict[str, Any] = json.loads(body)
    return answer


def test_what_the_page_means_is_what_training_and_serving_take_it_for() -> None:
    assert set(MEANS) == {"up", "down", "hide"}
    assert MEANS["up"][0] == "rating"
    assert float(MEANS["up"][1]) >= LIKED_VALUE
    for negative in ("down", "hide"):
        assert MEANS[negative][0] in NEGATIVE_KINDS
    assert float(MEANS["down"][1]) < LIKED_VALUE
    assert MEANS["hide"][1] == "null"


@pytest.mark.parametrize("said", ["up", "down", "hide", "click"])
def test_the_next_answer_has_it_within_a_second(port: int, key: dict[str, str], said: str) -> None:
    kind, value = MEANS.get(said, (said, "null"))
    asked = {"user_id": f"newcomer-{said}", "k": 10, "explain": True}
    before = post(port, "/recommendations", asked, key)
    item = before["items"][0]
    event = {"event_id": f"page-{said}", "user_id": asked["user_id"], "item_id": item["item_id"], "kind": kind}
    event |= {"request_id": before["request_id"]} | ({} if value == "null" else {"value": float(value)})
    assert post(port, "/events", {"events": [event]}, key)["outcomes"][0]["outcome"] == "stored"
    returned_at = time.monotonic()
    after = post(port, "/recommendations", asked, key)
    took_seconds = time.monotonic() - returned_at
    assert item["item_id"] not in [one["item_id"] for one in after["items"]]
    assert took_seconds < 1.0
    history = json.loads(ask(port, f"/people/{asked['user_id']}/history", method="GET", headers=key)[2])["events"]
    assert [(one["item_id"], one["kind"]) for one in history] == [(item["item_id"], kind)]
    reasons = [reason for one in after["items"] for reason in one["reasons"]]
    # Of somebody who did nothing else: nothing is shown for being like what was refused, or for what people went on to after
    # it, though the refusal may have moved it; what was liked or opened leads on.
    by_item = [one for one in reasons if one.startswith("people who had") or f"like “{item['title']}”" in one]
    assert bool(by_item) == (said in ("up", "click")), reasons


def test_an_answer_says_beside_its_body_how_long_its_steps_took(app: LarderApplication, key: dict[str, str]) -> None:
    body = json.dumps({"user_id": "u1", "k": 5, "diversity": 0.5, "request_id": "r", "explain": True}).encode()
    answer = handle(app, "POST", "/recommendations", key, body, deadline=None)
    told = {
        name: float(ms) for name, ms in (part.split(";dur=") for part in answer.headers["server-timing"].split(", "))
    }
    assert list(told) == ["read", "user_vector", "candidates", "rank", "re-rank", "explain", "total"]
    assert all(ms >= 0 for ms in told.values())
    assert 0 < sum(told.values()) - told["total"] <= told["total"] + 0.1
    assert b"dur" not in answer.body
    refused = handle(app, "POST", "/recommendations", key, b"{}", deadline=None)
    assert "server-timing" not in refused.headers
