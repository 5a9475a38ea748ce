"""What each route does: from a request that was let in to its answer, by the core behind the doors."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol
from urllib.parse import parse_qs

from inference import page, timing
from inference.access import Access, Platform
from inference.request_log import Notes
from schemas.errors import Forbidden, RequestError, Unavailable
from schemas.json_body import cut, parse, render
from schemas.serving import (
    EventsRequest,
    EventsResponse,
    HealthResponse,
    HealthStatus,
    RecommendationRequest,
    RecommendationResponse,
    SimilarRequest,
    SimilarResponse,
)
from schemas.serving_people import (
    MAX_HISTORY_SHOWN,
    ConsentRequest,
    ConsentResponse,
    ErasureResponse,
    ExportResponse,
    HistoryResponse,
    PeopleResponse,
    SurveyOutcome,
    SurveyQuestions,
    SurveyRequest,
)

JSON_TYPE = "application/json"
HISTORY_SHOWN = 20
"""Events of a person's history that are given when nobody says how many."""

Carrier = Mapping[str, str]
"""Trace context as it came in: header names in lower case."""


class Application(Protocol):
    """The core behind the doors. `deadline` is an instant of `time.monotonic()`, None for no limit.

    `carrier` holds the trace headers; a span is already open under them when the core is called.
    Raises RequestError for what the caller can mend and Unavailable when no rung can answer.
    """

    def recommend(
        self, request: RecommendationRequest, deadline: float | None, carrier: Carrier
    ) -> RecommendationResponse: ...

    def similar(self, request: SimilarRequest, deadline: float | None, carrier: Carrier) -> SimilarResponse: ...

    def accept_events(self, request: EventsRequest, deadline: float | None, carrier: Carrier) -> EventsResponse: ...

    def forget(self, user_id: str, deadline: float | None) -> ErasureResponse: ...

    def erasure(self, user_id: str, receipt_id: str, deadline: float | None) -> ErasureResponse: ...

    def history(self, user_id: str, limit: int, deadline: float | None) -> HistoryResponse: ...

    def some_people(self, deadline: float | None) -> PeopleResponse: ...

    def survey_questions(self, user_id: str, deadline: float | None) -> SurveyQuestions: ...

    def answer_survey(self, request: SurveyRequest, deadline: float | None) -> SurveyOutcome: ...

    def consent(self, user_id: str, request: ConsentRequest, deadline: float | None) -> ConsentResponse: ...

    def export(self, user_id: str, receipt_id: str | None, deadline: float | None) -> ExportResponse: ...

    def health(self) -> HealthResponse: ...

    @property
    def access(self) -> Access:
        """Who decides whether a request is let in."""


@dataclass(frozen=True, slots=True)
class Response:
    """What a door sends. Header names are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class Call:
    """A request on its way to its route."""

    app: Application
    body: bytes
    deadline: float | None
    carrier: Carrier = field(default_factory=dict)
    notes: Notes = field(default_factory=Notes)
    arrived: float = field(default_factory=time.monotonic)
    headers: Mapping[str, str] = field(default_factory=dict)
    query: str = ""
    direct: bool = False
    names: Mapping[str, str] = field(default_factory=dict)
    """What the path names: `user_id` and the like."""


def _recommendations(call: Call) -> Response:
    request = parse(RecommendationRequest, call.body)
    deadline = call.deadline
    if request.timeout_ms is not None:
        asked = call.arrived + request.timeout_ms / 1000
        deadline = asked if deadline is None else min(asked, deadline)
    began = time.perf_counter()
    try:
        with timing.collected() as ms:
            answer = call.app.recommend(request, deadline, call.carrier)
    except Unavailable as error:
        if deadline is None or time.monotonic() < deadline:
            raise
        limit = "the platform's limit" if request.timeout_ms is None else f"timeout_ms {request.timeout_ms}"
        message = f"there was no answer in time ({limit}); allow more"
        raise Unavailable(message, retry_after_seconds=error.retry_after_seconds) from error
    call.notes.model_version, call.notes.prompt_version = answer.model_version, answer.prompt_version
    call.notes.degraded = answer.degraded
    # Of who has not agreed to being personalised not even a pseudonym is kept, nor while nobody can be asked for it.
    agreed = answer.personalised and "database" not in answer.degraded
    call.notes.user_id = request.user_id if agreed else ""
    took_ms = (time.perf_counter() - began) * 1_000
    return json_answer(render(answer), headers={"server-timing": timing.header(ms, took_ms)} if ms else {})


def _similar(call: Call) -> Response:
    return json_answer(render(call.app.similar(parse(SimilarRequest, call.body), call.deadline, call.carrier)))


def _events(call: Call) -> Response:
    return json_answer(render(call.app.accept_events(parse(EventsRequest, call.body), call.deadline, call.carrier)))


def _health(call: Call) -> Response:
    health = call.app.health()
    call.notes.model_version, call.notes.degraded = health.model_version, health.degraded
    status = 503 if health.status == "unavailable" else 200
    try:
        call.app.access.check(call.headers, None, direct=call.direct)
    except (RequestError, Unavailable):
        # Whoever comes without a good key learns whether this answers, and no more.
        return json_answer(render(HealthStatus(status=health.status)), status=status)
    return json_answer(render(health), status=status)


def _forget(call: Call) -> Response:
    return json_answer(render(call.app.forget(call.names["user_id"], call.deadline)), status=202)


def _erasure(call: Call) -> Response:
    return json_answer(render(call.app.erasure(call.names["user_id"], call.names["receipt_id"], call.deadline)))


def _history(call: Call) -> Response:
    given = parse_qs(call.query, keep_blank_values=True).get("limit", [str(HISTORY_SHOWN)])[-1]
    if not re.fullmatch(r"[0-9]{1,4}", given) or not 1 <= int(given) <= MAX_HISTORY_SHOWN:
        raise RequestError(f"limit is {cut(given)}; give a whole number from 1 to {MAX_HISTORY_SHOWN}", field="limit")
    return json_answer(render(call.app.history(call.names["user_id"], int(given), call.deadline)))


def _people(call: Call) -> Response:
    try:
        call.app.access.check(call.headers, "admin", direct=call.direct)
    except Forbidden:
        return json_answer(render(PeopleResponse()))
    # Where keys are not checked nobody has shown that they may see who is here.
    known = not isinstance(call.app.access, Platform)
    return json_answer(render(call.app.some_people(call.deadline) if known else PeopleResponse()))


def _survey_questions(call: Call) -> Response:
    return json_answer(render(call.app.survey_questions(call.names["user_id"], call.deadline)))


def _survey(call: Call) -> Response:
    return json_answer(render(call.app.answer_survey(parse(SurveyRequest, call.body), call.deadline)))


def _page(call: Call) -> Response:
    found = page.answer(call.names.get("file", page.INDEX), call.headers)
    if found is None:
        raise RequestError(f"the page has no such file; it has {', '.join(page.names())}", status=404, field="file")
    return Response(*found)


def _consent(call: Call) -> Response:
    request = parse(ConsentRequest, call.body)
    return json_answer(render(call.app.consent(call.names["user_id"], request, call.deadline)))


def _export(call: Call) -> Response:
    return json_answer(render(call.app.export(call.names["user_id"], None, call.deadline)), status=202)


def _exported(call: Call) -> Response:
    return json_answer(render(call.app.export(call.names["user_id"], call.names["receipt_id"], call.deadline)))


def _openapi(_: Call) -> Response:
    from inference import openapi  # made for who asks, not at every start

    return json_answer(openapi.text().encode())


ROUTES: dict[str, tuple[str, Callable[[Call], Response]]] = {
    "/recommendations": ("POST", _recommendations),
    "/similar": ("POST", _similar),
    "/events": ("POST", _events),
    "/people/{user_id}/forget": ("POST", _forget),
    "/people/{user_id}/forget/{receipt_id}": ("GET", _erasure),
    "/people/{user_id}/consent": ("POST", _consent),
    "/people/{user_id}/export": ("POST", _export),
    "/people/{user_id}/export/{receipt_id}": ("GET", _exported),
    "/health": ("GET", _health),
    "/openapi.json": ("GET", _openapi),
    "/people": ("GET", _people),
    "/people/{user_id}/history": ("GET", _history),
    "/people/{user_id}/survey": ("GET", _survey_questions),
    "/survey": ("POST", _survey),
    "/": ("GET", _page),
    "/web/{file}": ("GET", _page),
}
SCOPES: dict[str, str | None] = {
    "/recommendations": "recommend",
    "/similar": "recommend",
    "/events": "write",
    "/people/{user_id}/forget": "admin",
    "/people/{user_id}/forget/{receipt_id}": "admin",
    "/people/{user_id}/consent": "write",
    "/people/{user_id}/export": "admin",
    "/people/{user_id}/export/{receipt_id}": "admin",
    "/health": None,
    "/openapi.json": None,
    "/people": "recommend",
    "/people/{user_id}/history": "recommend",
    "/people/{user_id}/survey": "recommend",
    "/survey": "write",
    "/": None,
    "/web/{file}": None,
}
"""What a key must be for; None: open to all."""
LINKED: dict[str, str] = {
    "/people/{user_id}/forget": "forget",
    "/people/{user_id}/forget/{receipt_id}": "forget",
    "/people/{user_id}/consent": "consent",
    "/people/{user_id}/export": "export",
    "/people/{user_id}/export/{receipt_id}": "export",
    # Who may take away all that is held of a person may look at some of it.
    "/people/{user_id}/history": "export",
}
"""Where a signed link of the person does as well, and for which purpose it must be."""
_NAMED = {
    "{user_id}": "(?P<user_id>.+)",
    "{receipt_id}": "(?P<receipt_id>[0-9a-f]{32})",
    "{file}": "(?P<file>[^/]+)",
}
_PATTERNS = [
    # An id may hold a slash, so the words around it decide: the route with the most of them first.
    (re.compile(re.sub(r"{\w+}", lambda found: _NAMED[found[0]], route)), route)
    for route in sorted((route for route in ROUTES if "{" in route), key=lambda route: -route.count("/"))
]


def route_of(path: str) -> tuple[str | None, Mapping[str, str]]:
    """The route of ROUTES that `path` takes, None for no route, and what the path names."""
    if path in SCOPES and "{" not in path:
        return path, {}
    for pattern, route in _PATTERNS:
        if found := pattern.fullmatch(path):
            return route, found.groupdict()
    return None, {}


def json_answer(body: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(status, {"content-type": JSON_TYPE, **(headers or {})}, body)
