"""Routes, their faults, and what of an accident reaches the caller and the log."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from typing import Any

import pytest
from door_app import SmallApplication

from inference.http import handle
from inference.routes import Response
from schemas.serving import HealthResponse, RecommendationRequest, RecommendationResponse

JSON = {"content-type": "application/json"}


def ask(
    path: str, document: Any = None, *, method: str = "POST", headers: dict[str, str] | None = None, app: Any = None
) -> Response:
    body = b"" if document is None else json.dumps(document).encode()
    return handle(app or SmallApplication(), method, path, JSON if headers is None else headers, body, deadline=None)


def fault(response: Response) -> dict[str, str]:
    assert response.headers["content-type"] == "application/json"
    document = json.loads(response.body)
    assert set(document) == {"error"}
    detail: dict[str, str] = document["error"]
    return detail


def test_every_route_answers() -> None:
    assert len(json.loads(ask("/recommendations", {"user_id": "u1", "k": 3}).body)["items"]) == 3
    assert json.loads(ask("/similar", {"item_id": "i7"}).body)["items"][0]["item_id"] == "like i7"
    event = {"event_id": "e1", "user_id": "u1", "item_id": "i1", "kind": "view"}
    assert json.loads(ask("/events", {"events": [event]}).body)["outcomes"][0]["outcome"] == "stored"
    health = ask("/health", method="GET", headers={})
    assert (health.status, json.loads(health.body)["status"]) == (200, "ok")


def test_health_is_503_when_nothing_can_be_served() -> None:
    class Gone(SmallApplication):
        def health(self) -> HealthResponse:
            return HealthResponse(status="unavailable", version="1")

    assert ask("/health", method="GET", app=Gone()).status == 503


def test_an_unknown_path_is_404_and_names_the_routes() -> None:
    response = ask("/recommendation", {})
    assert response.status == 404
    assert "POST /recommendations" in fault(response)["message"]


@pytest.mark.parametrize(("method", "path", "allow"), [("GET", "/events", "POST"), ("POST", "/health", "GET")])
def test_a_wrong_method_is_405_with_allow(method: str, path: str, allow: str) -> None:
    response = ask(path, {}, method=method)
    assert (response.status, response.headers["allow"]) == (405, allow)
    assert fault(response)["type"] == "method_not_allowed"


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        ("application/json", 200),
        ("Application/JSON; charset=UTF-8", 200),
        ("application/x-www-form-urlencoded", 200),
        ("application/json; charset=latin-1", 415),
        ("text/json", 415),
        ("multipart/form-data", 415),
        ("", 415),
    ],
)
def test_only_json_is_taken(content_type: str, status: int) -> None:
    response = ask("/recommendations", {"user_id": "u1"}, headers={"content-type": content_type})
    assert response.status == status
    if status == 415:
        assert "send 'content-type: application/json'" in fault(response)["message"]


def test_a_fault_of_the_caller_names_the_field() -> None:
    response = ask("/recommendations", {"user_id": "u1", "k": 0})
    assert response.status == 422
    assert fault(response) == {
        "type": "invalid_request",
        "message": "k is 0: it must be at least 1",
        "field": "k",
    }


def test_unavailable_is_503_with_retry_after() -> None:
    response = ask("/recommendations", {"user_id": "nobody-home"})
    assert (response.status, response.headers["retry-after"]) == (503, "7")
    assert fault(response)["type"] == "unavailable"


def test_what_did_not_make_it_within_the_callers_time_names_that_time() -> None:
    class Slow(SmallApplication):
        def recommend(
            self, request: RecommendationRequest, deadline: float | None, carrier: Mapping[str, str]
        ) -> RecommendationResponse:
            time.sleep(0.01)
            return super().recommend(request, deadline, carrier)

    response = ask("/recommendations", {"user_id": "nobody-home", "timeout_ms": 1}, app=Slow())
    assert response.status == 503
    assert fault(response)["message"] == "there was no answer in time (timeout_ms 1); allow more"
    response = ask("/recommendations", {"user_id": "nobody-home", "timeout_ms": 20_000}, app=Slow())
    assert "in time" not in fault(response)["message"]


def test_an_accident_is_500_without_details_and_is_logged_under_the_trace(caplog: pytest.LogCaptureFixture) -> None:
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    headers = {**JSON, "traceparent": f"00-{trace_id}-b7ad6b7169203331-01"}
    with caplog.at_level(logging.ERROR):
        response = ask("/recommendations", {"user_id": "broken", "prompt": "CANARY"}, headers=headers)
    assert response.status == 500
    assert fault(response)["type"] == "internal"
    assert trace_id in fault(response)["message"]
    assert b"ZeroDivision" not in response.body
    assert b"CANARY" not in response.body
    assert trace_id in caplog.text
    assert "ZeroDivisionError" in caplog.text
    assert "door_app.py" in caplog.text
    assert "CANARY" not in caplog.text


def test_the_deadline_is_the_earlier_of_platform_and_request() -> None:
    def remaining(platform_seconds: float | None, timeout_ms: int | None) -> float | None:
        app = SmallApplication()
        deadline = None if platform_seconds is None else time.monotonic() + platform_seconds
        document = {"user_id": "u1", **({} if timeout_ms is None else {"timeout_ms": timeout_ms})}
        handle(app, "POST", "/recommendations", JSON, json.dumps(document).encode(), deadline=deadline)
        return app.remaining_seconds[0]

    assert remaining(None, None) is None
    assert remaining(5, None) == pytest.approx(5, abs=0.5)
    assert remaining(5, 20_000) == pytest.approx(5, abs=0.5)
    assert remaining(20, 5_000) == pytest.approx(5, abs=0.5)


def test_trace_headers_reach_the_core_and_others_do_not() -> None:
    app = SmallApplication()
    headers = {**JSON, "traceparent": "t", "x-amzn-trace-id": "x", "authorization": "Bearer secret"}
    ask("/recommendations", {"user_id": "u1"}, headers=headers, app=app)
    assert app.carriers == [{"traceparent": "t", "x-amzn-trace-id": "x"}]
