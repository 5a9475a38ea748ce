"""What a door accepts and refuses, at the border and one past it, and what it says then."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from schemas.errors import RequestError
from schemas.json_body import MAX_BODY_BYTES, cut, parse, render
from schemas.serving import (
    EventOutcome,
    EventsRequest,
    EventsResponse,
    Filters,
    RecommendationRequest,
    RecommendationResponse,
    RecommendedItem,
    SimilarRequest,
)


def body(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def recommendation(**fields: Any) -> RecommendationRequest:
    return parse(RecommendationRequest, body(**{"user_id": "u1", **fields}))


def refused(model: type[Any], raw: bytes) -> RequestError:
    with pytest.raises(RequestError) as caught:
        parse(model, raw)
    return caught.value


def event(**fields: Any) -> dict[str, Any]:
    return {"event_id": "e1", "user_id": "u1", "item_id": "i1", "kind": "view", **fields}


def test_only_the_person_is_required() -> None:
    assert recommendation() == RecommendationRequest(user_id="u1")
    assert recommendation().k == 10
    assert recommendation().candidates is None


def test_every_field_arrives() -> None:
    request = recommendation(
        k=500,
        prompt="quiet",
        context={"device": "tv", "hour": 21, "share": 0.5, "guest": False, "note": None},
        candidates=["a", "b", "a"],
        exclude=["c"],
        filters={"categories": ["Drama"], "exclude_categories": ["Horror"]},
        diversity=0.3,
        explain=True,
        at="2030-01-31T13:00:00+01:00",
        timeout_ms=30_000,
        request_id="r1",
    )
    assert request.candidates == ("a", "b")
    assert request.filters == Filters(categories=("Drama",), exclude_categories=("Horror",))
    assert request.at == datetime(2030, 1, 31, 12, tzinfo=UTC)
    assert request.at.tzinfo is UTC
    assert request.context == {"device": "tv", "hour": 21, "share": 0.5, "guest": False, "note": None}


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        ("user_id", "é" * 64, "é" * 64 + "x"),
        ("user_id", "x", ""),
        ("user_id", "x", "a\nb"),
        ("user_id", "x", 7),
        ("k", 1, 0),
        ("k", 500, 501),
        ("k", 5, 5.0),
        ("k", 5, "5"),
        ("k", 5, True),
        ("prompt", "x" * 2000, "x" * 2001),
        ("prompt", "a\tb", "a\x00b"),
        ("prompt", " \t\n", "\x1d"),
        ("candidates", [f"i{n}" for n in range(1000)], [f"i{n}" for n in range(1001)]),
        ("exclude", [f"i{n}" for n in range(1000)], [f"i{n}" for n in range(1001)]),
        ("exclude", [], None),
        ("context", {str(n): n for n in range(64)}, {str(n): n for n in range(65)}),
        ("context", {"a": 2**53}, {"a": 2**53 + 1}),
        ("context", {"a": -(2**53)}, {"a": 10**400}),
        ("context", {"a": 1}, {"a": [1]}),
        ("context", {"a": "x" * 2000}, {"a": "x" * 2001}),
        ("context", {"a": 1}, {"": 1}),
        ("diversity", 0, -0.01),
        ("diversity", 1.0, 1.01),
        ("diversity", 0.5, True),
        ("diversity", 0.5, "0.5"),
        ("explain", True, 1),
        ("at", "2030-01-31T12:00:00Z", "2030-01-31T12:00:00"),
        ("at", "2030-01-31T12:00:00Z", "2030-01-31"),
        ("at", "2030-01-31T12:00:00Z", "yesterday"),
        ("at", "2030-01-31T12:00:00Z", "1900000000"),
        ("at", "2030-01-31T12:00:00Z", 1_900_000_000),
        ("at", "1969-12-31T00:00:00Z", "1969-12-30T23:59:59.999999Z"),
        ("timeout_ms", 1, 0),
        ("timeout_ms", 30_000, 30_001),
        ("filters", {"categories": ["x"] * 100}, {"categories": ["x"] * 101}),
        ("request_id", "r" * 128, "r" * 129),
    ],
)
def test_limits_hold_at_the_border_and_one_past_it(field: str, good: Any, bad: Any) -> None:
    recommendation(**{field: good})
    error = refused(RecommendationRequest, body(**{"user_id": "u1", field: bad}))
    assert error.status == 422
    assert (error.field or "").split(".")[0] == field
    assert str(error).startswith(field)


def test_a_message_names_the_field_the_value_and_the_way_out() -> None:
    error = refused(RecommendationRequest, body(user_id="u1", k=501))
    assert str(error) == "k is 501: it must be at most 500"
    error = refused(EventsRequest, body(events=[event(), event(occurred_at="2030-01-31T12:00:00")]))
    assert error.field == "events.1.occurred_at"
    assert 'write for example "2030-01-31T12:00:00Z"' in str(error)


@pytest.mark.parametrize("value", ["ß" * 100_000, "\x00" * 100_000, list(range(50_000)), {"k": 1}, 10**4000])
def test_a_value_is_quoted_back_in_at_most_80_characters(value: Any) -> None:
    assert len(cut(value)) <= 80
    error = refused(RecommendationRequest, body(user_id=value))
    assert len(str(error)) < 250


def test_an_unknown_field_is_refused_with_its_near_matches() -> None:
    error = refused(RecommendationRequest, body(user_id="u1", canditates=["a"]))
    assert error.field == "canditates"
    assert "did you mean candidates?" in str(error)
    error = refused(RecommendationRequest, body(user_id="u1", filters={"category": ["a"]}))
    assert error.field == "filters.category"
    assert "did you mean categories" in str(error)
    error = refused(EventsRequest, body(events=[event(user="u2")]))
    assert error.field == "events.0.user"
    assert "did you mean user_id" in str(error)
    assert len(str(refused(RecommendationRequest, body(user_id="u1", **{"z" * 100_000: 1})))) < 500


def test_a_missing_field_is_named() -> None:
    error = refused(RecommendationRequest, b"{}")
    assert (error.field, str(error)) == ("user_id", "user_id is missing; it is required")


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b"null",
        b'{"user_id": "u1"} trailing',
        b'{"user_id": "u1", "diversity": NaN}',
        b'{"user_id": "u1", "diversity": -Infinity}',
        b'{"user_id": "u1", "prompt": "\xff"}',
        b'{"user_id": "u1", "prompt": "\\ud800"}',
        b'{"user_id": "u1", "context": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a":' * 40_000,
        b'{"user_id": "u1", "k": ' + b"9" * 100_000 + b"}",
    ],
)
def test_what_is_not_a_json_object_is_400(raw: bytes) -> None:
    assert refused(RecommendationRequest, raw).status == 400


def test_a_number_too_large_for_a_float_is_refused() -> None:
    assert refused(RecommendationRequest, b'{"user_id":"u1","diversity":1e999}').field == "diversity"
    assert refused(RecommendationRequest, b'{"user_id":"u1","context":{"a":1e999}}').field == "context.a"
    assert refused(EventsRequest, b'{"events":[{"value":-1e999}]}').status == 422


def test_the_body_limit_is_exact() -> None:
    start = b'{"user_id":"u1"'
    fitting = start + b" " * (MAX_BODY_BYTES - len(start) - 1) + b"}"
    assert len(fitting) == MAX_BODY_BYTES
    assert parse(RecommendationRequest, fitting).user_id == "u1"
    assert refused(RecommendationRequest, fitting + b" ").status == 413


@pytest.mark.parametrize("text", ["", " \n ", "\u00a0", "\x85", "\ufeff", "\u3000\t"])
def test_blank_text_is_no_text(text: str) -> None:
    assert recommendation(prompt=text).prompt is None
    assert recommendation(prompt=f"{text}boats").prompt == f"{text}boats"


def test_similar_takes_an_item_or_a_text_and_not_both() -> None:
    assert parse(SimilarRequest, body(item_id="i1")).k == 10
    assert parse(SimilarRequest, body(text="boats")).text == "boats"
    assert "neither given" in str(refused(SimilarRequest, b"{}"))
    assert "neither given" in str(refused(SimilarRequest, body(text="  ")))
    assert "both given" in str(refused(SimilarRequest, body(item_id="i1", text="boats")))


def test_events_are_counted_and_checked_one_by_one() -> None:
    batch = parse(EventsRequest, body(events=[event(event_id=str(n), value=4.5) for n in range(500)]))
    assert batch.events[499].event_id == "499"
    assert refused(EventsRequest, body(events=[event()] * 501)).field == "events"
    assert refused(EventsRequest, body(events=[])).field == "events"
    assert refused(EventsRequest, body(events=[event(value=1e9)])).field == "events.0.value"
    error = refused(EventsRequest, body(events=[event(kind="like"), event(kind="liked")]))
    assert error.field == "events.1.kind"
    assert "did you mean like" in str(error)


def test_rendering_is_the_same_bytes_and_rounds_to_six_digits() -> None:
    answer = RecommendationResponse(
        request_id="r1",
        items=(
            RecommendedItem(item_id="i1", score=0.1 + 0.2, title="Amélie"),
            RecommendedItem(item_id="i2", score=-1e-9, title="x", reasons=("because",)),
        ),
    )
    assert (
        render(answer)
        == (
            '{"request_id":"r1","items":[{"item_id":"i1","score":0.3,"title":"Amélie"},'
            '{"item_id":"i2","score":0.0,"title":"x","reasons":["because"]}],'
            '"model_version":null,"prompt_version":null,"experiment":null,"degraded":[]}'
        ).encode()
    )


def test_an_answer_holds_no_infinity() -> None:
    with pytest.raises(ValueError, match="finite"):
        RecommendedItem(item_id="i", score=float("inf"), title="x")


def test_outcomes_keep_the_requests_order() -> None:
    outcomes = EventsResponse(
        outcomes=(
            EventOutcome(event_id="b", outcome="duplicate"),
            EventOutcome(event_id="a", outcome="refused", reason="no such item"),
        )
    )
    assert json.loads(render(outcomes))["outcomes"] == [
        {"event_id": "b", "outcome": "duplicate", "reason": None},
        {"event_id": "a", "outcome": "refused", "reason": "no such item"},
    ]
