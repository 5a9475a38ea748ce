"""A request without its transport: let in or not, answered by its route, seen by traces and log; and what each fault looks like."""

from __future__ import annotations

import logging
import secrets
import time
import traceback
from collections.abc import Callable, Mapping

from inference import metrics, request_log, telemetry
from inference.propagation import CARRIER_HEADERS
from inference.request_log import Notes
from inference.routes import JSON_TYPE, LINKED, ROUTES, SCOPES, Application, Call, Carrier, Response, route_of
from schemas.errors import LarderError, RequestError, TooManyRequests, Unauthorized, Unavailable
from schemas.events import InvalidRow, check_id
from schemas.json_body import cut, render_json

logger = logging.getLogger(__name__)

ACCEPTED_TYPES = frozenset({JSON_TYPE, "application/x-www-form-urlencoded"})
"""The second is what `curl -d` says of any body it is not told about; whether it is JSON the parser decides."""


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
            Call(
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


def _respond(app: Application, method: str, path: str, headers: Mapping[str, str], call: Call) -> Response:
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


def _check_access(route: str, call: Call) -> None:
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


def _error(
    status: int, kind: str, message: str, *, field_name: str | None = None, headers: Mapping[str, str] | None = None
) -> Response:
    detail = {"type": kind, "message": message}
    if field_name is not None:
        detail["field"] = field_name
    return Response(status, {"content-type": JSON_TYPE, **(headers or {})}, render_json({"error": detail}))
