"""Routing without a transport: what each method and path means, and what each fault looks like."""

from __future__ import annotations

import logging
import re
import secrets
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol
from urllib.parse import parse_qs

from inference import metrics, page, request_log, telemetry, timing
from inference.access import Access, Platform
from inference.propagation import CARRIER_HEADERS
from inference.request_log import Notes
from schemas.errors import Forbidden, LarderError, RequestError, TooManyRequests, Unauthorized, Unavailable
from schemas.events import InvalidRow, check_id
from schemas.serving import (
    MAX_HISTORY_SHOWN,
    ConsentRequest,
    ConsentResponse,
    ErasureResponse,
    EventsRequest,
    EventsResponse,
    ExportResponse,
    HealthResponse,
    HealthStatus,
    HistoryResponse,
    PeopleResponse,
    RecommendationRequest,
    RecommendationResponse,
    SimilarRequest,
    SimilarResponse,
    SurveyOutcome,
    SurveyQuestions,
    SurveyRequest,
    cut,
    parse,
    render,
    render_json,
)

logger = logging.getLogger(__name__)

JSON_TYPE = "application/json"
HISTORY_SHOWN = 20
"""Events of a person's history that are given when nobody says how many."""
ACCEPTED_TYPES = frozenset({JSON_TYPE, "application/x-www-form-urlencoded"})
"""The second is what `curl -d` says of any body it is not told about; whether it is JSON the parser decides."""

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
class _Call:
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


def _recommendations(call: _Call) -> Response:
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
    return _answer(render(answer), headers={"server-timing": timing.header(ms, took_ms)} if ms else {})


def _similar(call: _Call) -> Response:
    return _answer(render(call.app.similar(parse(SimilarRequest, call.body), call.deadline, call.carrier)))


def _events(call: _Call) -> Response:
    return _answer(render(call.app.accept_events(parse(EventsRequest, call.body), call.deadline, call.carrier)))


def _health(call: _Call) -> Response:
    health = call.app.health()
    call.notes.model_version, call.notes.degraded = health.model_version, health.degraded
    status = 503 if health.status == "unavailable" else 200
    try:
        call.app.access.check(call.headers, None, direct=call.direct)
    except (RequestError, Unavailable):
        # Whoever comes without a good key learns whether this answers, and no more.
        return _answer(render(HealthStatus(status=health.status)), status=status)
    return _answer(render(health), status=status)


def _forget(call: _Call) -> Response:
    return _answer(render(call.app.forget(call.names["user_id"], call.deadline)), status=202)


def _erasure(call: _Call) -> Response:
    return _answer(render(call.app.erasure(call.names["user_id"], call.names["receipt_id"], call.deadline)))


def _history(call: _Call) -> Response:
    given = parse_qs(call.query, keep_blank_values=True).get("limit", [str(HISTORY_SHOWN)])[-1]
    if not re.fullmatch(r"[0-9]{1,4}", given) or not 1 <= int(given) <= MAX_HISTORY_SHOWN:
        raise RequestError(f"limit is {cut(given)}; give a whole number from 1 to {MAX_HISTORY_SHOWN}", field="limit")
    return _answer(render(call.app.history(call.names["user_id"], int(given), call.deadline)))


def _people(call: _Call) -> Response:
    try:
        call.app.access.check(call.headers, "admin", direct=call.direct)
    except Forbidden:
        return _answer(render(PeopleResponse()))
    # Where keys are not checked nobody has shown that they may see who is here.
    known = not isinstance(call.app.access, Platform)
    return _answer(render(call.app.some_people(call.deadline) if known else PeopleResponse()))


def _survey_questions(call: _Call) -> Response:
    return _answer(render(call.app.survey_questions(call.names["user_id"], call.deadline)))


def _survey(call: _Call) -> Response:
    return _answer(render(call.app.answer_survey(parse(SurveyRequest, call.body), call.deadline)))


def _page(call: _Call) -> Response:
    found = page.answer(call.names.get("file", page.INDEX), call.headers)
    if found is None:
        raise RequestError(f"the page has no such file; it has {', '.join(page.names())}", status=404, field="file")
    return Response(*found)


def _consent(call: _Call) -> Response:
    request = parse(ConsentRequest, call.body)
    return _answer(render(call.app.consent(call.names["user_id"], request, call.deadline)))


def _export(call: _Call) -> Response:
    return _answer(render(call.app.export(call.names["user_id"], None, call.deadline)), status=202)


def _exported(call: _Call) -> Response:
    return _answer(render(call.app.export(call.names["user_id"], call.names["receipt_id"], call.deadline)))


def _openapi(_: _Call) -> Response:
    from inference import openapi  # made for who asks, not at every start

    return _answer(openapi.text().encode())


ROUTES: dict[str, tuple[str, Callable[[_Call], Response]]] = {
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


def handle(
    app: Application,
    method: str,
    path: str,
    headers: Mapping[str, str],
    body: bytes,
    *,
    deadline: float | None,
    attributes: Mapping[str, telemetry.Value] | None = None,
    arrived: float | None = None,
    query: str = "",
    direct: bool = False,
) -> Response:
    """The answer to one request; never raises.

    `headers` have names in lower case, `path` comes unescaped and without its query, `deadline` is an instant of
    `time.monotonic()`. `attributes` are the door's own, for the request's span. `arrived` is the instant from which the
    caller's `timeout_ms` counts, now by default: a request may have waited for its turn. `direct` says that the platform
    invoked the function itself.
    """
    return _observed(
        method,
        path,
        headers,
        attributes,
        lambda carrier, notes: _respond(
            app,
            method,
            path,
            headers,
            _Call(
                app,
                body,
                deadline,
                carrier,
                notes,
                time.monotonic() if arrived is None else arrived,
                headers,
                query,
                direct,
                route_of(path)[1],
            ),
        ),
    )


def refused(
    error: Exception,
    method: str,
    path: str,
    headers: Mapping[str, str],
    attributes: Mapping[str, telemetry.Value] | None = None,
) -> Response:
    """The answer to a request that a door cannot hand on because of `error`: traced, counted and logged like any other."""
    return _observed(method, path, headers, attributes, lambda _, notes: _error_of(error, notes))


def _observed(
    method: str,
    path: str,
    headers: Mapping[str, str],
    attributes: Mapping[str, telemetry.Value] | None,
    respond: Callable[[Carrier, Notes], Response],
) -> Response:
    """What `respond` gives, under the request's span, measured and logged."""
    began = time.perf_counter()
    carrier = {name: headers[name] for name in CARRIER_HEADERS if name in headers}
    method = method if method in metrics.METHODS else metrics.OTHER_METHOD
    route, _ = route_of(path)
    said = attributes or {}
    with telemetry.server_span(f"{method} {route}" if route else "unknown route", carrier, said) as span:
        context = telemetry.current()
        notes = Notes(context.trace_id if context else secrets.token_hex(16))
        response = respond(carrier, notes)
        if route:
            span.set("http.route", route)
            span.set("http.request.method", method)
        span.set("http.response.status_code", response.status)
        if response.status >= 500:
            span.fail(str(response.status))
        seconds = time.perf_counter() - began
        metrics.request_ended(method, route, response.status, seconds, scheme=str(said.get("url.scheme", "http")))
    trigger = str(said.get("faas.trigger", "http"))
    request_log.write(notes, context, method, route, response.status, seconds, trigger=trigger)
    return response


def error_response(error: RequestError | Unavailable) -> Response:
    """`error` in the one shape that faults have."""
    if isinstance(error, Unavailable):
        return _error(503, error.type, str(error), headers={"retry-after": str(error.retry_after_seconds)})
    headers = {}
    if isinstance(error, TooManyRequests):
        headers["retry-after"] = str(error.retry_after_seconds)
    elif isinstance(error, Unauthorized):
        headers["www-authenticate"] = "Bearer"
    return _error(error.status, error.type, str(error), field_name=error.field, headers=headers)


def _respond(app: Application, method: str, path: str, headers: Mapping[str, str], call: _Call) -> Response:
    try:
        route, _ = route_of(path)
        if route is None:
            call.notes.error = "not_found"
            return _error(404, "not_found", f"there is no route {cut(path)}; known: {', '.join(_route_names())}")
        allowed, answer = ROUTES[route]
        if method != allowed:
            call.notes.error = "method_not_allowed"
            message = f"{route} does not take {cut(method)}; use {allowed}"
            return _error(405, "method_not_allowed", message, headers={"allow": allowed})
        _check_access(route, call)
        if allowed == "POST" and (call.body or route not in LINKED):
            _check_content_type(headers)
        return answer(call)
    except Exception as error:  # noqa: BLE001 - the edge: whatever went wrong, the caller gets an answer
        return _error_of(error, call.notes)


def _error_of(error: Exception, notes: Notes) -> Response:
    if isinstance(error, RequestError | Unavailable):
        notes.error = error.type
        return error_response(error)
    notes.error = type(error).__name__
    return internal_error(error, notes.trace_id)


def internal_error(error: BaseException, trace_id: str) -> Response:
    """Answer 500 for an unforeseen `error`, and log where it happened under the id that the caller is given."""
    # An exception's text may quote what a person sent, so only types and places are logged.
    causes: list[str] = []
    cause: BaseException | None = error
    while cause is not None and len(causes) < 5:
        kind = cause.type if isinstance(cause, LarderError) else type(cause).__name__
        causes.append(f"{kind}\n{''.join(traceback.format_tb(cause.__traceback__))}")
        cause = cause.__cause__ or cause.__context__
    logger.error("internal error, trace %s: %s", trace_id, "caused by ".join(causes))
    return _error(500, "internal", f"an unexpected error; it is logged under trace {trace_id}")


def _check_access(route: str, call: _Call) -> None:
    """Let the request in, or raise what is answered instead; before its body is looked at."""
    scope, access = SCOPES[route], call.app.access
    user_id = call.names.get("user_id")
    if user_id is not None:
        call.notes.user_id = user_id
        try:
            check_id("user_id", user_id)
        except InvalidRow as error:
            raise RequestError(f"the path names no person: {error}", status=404, field="user_id") from None
    if user_id is not None and route in LINKED:
        access.check_person(
            call.headers, call.query, user_id, LINKED[route], scope=scope or "admin", direct=call.direct
        )
    elif scope is not None:
        access.check(call.headers, scope, direct=call.direct)


def _check_content_type(headers: Mapping[str, str]) -> None:
    given = headers.get("content-type", "")
    kind, _, parameters = given.partition(";")
    charset = parameters.strip().lower().removeprefix("charset=").strip('"')
    if kind.strip().lower() not in ACCEPTED_TYPES or charset not in ("", "utf-8"):
        shown = cut(given) if given else "missing"
        raise _UnsupportedType(f"content-type is {shown}; send 'content-type: {JSON_TYPE}'", status=415)


class _UnsupportedType(RequestError):
    type = "unsupported_media_type"


def _route_names() -> list[str]:
    return [f"{method} {path}" for path, (method, _) in ROUTES.items()]


def _answer(body: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(status, {"content-type": JSON_TYPE, **(headers or {})}, body)


def _error(
    status: int, kind: str, message: str, *, field_name: str | None = None, headers: Mapping[str, str] | None = None
) -> Response:
    detail = {"type": kind, "message": message}
    if field_name is not None:
        detail["field"] = field_name
    return Response(status, {"content-type": JSON_TYPE, **(headers or {})}, render_json({"error": detail}))
