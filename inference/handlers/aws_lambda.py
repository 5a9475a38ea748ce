"""The AWS Lambda door: API Gateway HTTP API v2, function URLs, direct invocation, and batches of an SQS queue.

A direct invocation's event is the recommendation request itself, its answer the same bytes as over
HTTP; a fault comes back in the one error shape. Its key, if one is asked for (LARDER_ACCESS), comes as `authorization` in
the client context's `custom`. A batch of an SQS queue holds events, see inference/handlers/sqs.py.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol
from urllib.parse import unquote

from inference import telemetry
from inference.handlers import sqs
from inference.http import handle, refused
from inference.propagation import CARRIER_HEADERS
from inference.routes import JSON_TYPE, Application, Response
from schemas.errors import RequestError

logger = logging.getLogger(__name__)

RESERVE_MS = 50
"""Kept back from the platform's deadline to render, send and flush."""
START_SECONDS = 8.0
"""Lambda ends a start after ten seconds and begins anew, in the time of the first request."""
FLUSH_MS = 200
"""Spans, and what the application writes after an answer, get so long to leave before the platform freezes the process."""


class LambdaContext(Protocol):
    """What is used of the context that `awslambdaric` passes."""

    aws_request_id: str
    client_context: Any

    def get_remaining_time_in_millis(self) -> int: ...


Handler = Callable[[dict[str, Any], LambdaContext], dict[str, Any] | bytes]


def create_handler(
    app_factory: Callable[[], Application], *, snapshots: bool = False, at_start: bool = False
) -> Handler:
    """A handler around what `app_factory` builds once per process: at the first invocation, or `at_start`.

    A factory that fails is tried again by the next invocation; this one gets the error. With `snapshots` the platform
    (Lambda SnapStart) is told what to do before it takes one, when the application is built, and after it restored one.
    """
    lock = threading.Lock()
    built: list[Application] = []

    def application() -> Application:
        if not built:
            with lock:
                if not built:
                    built.append(app_factory())
        return built[0]

    def handler(event: dict[str, Any], context: LambdaContext) -> dict[str, Any] | bytes:
        remaining_ms = context.get_remaining_time_in_millis()
        deadline = time.monotonic() + max(0, remaining_ms - RESERVE_MS) / 1000
        over_http = isinstance(event, dict) and "requestContext" in event
        try:
            if sqs.is_batch(event):
                return _answer_batch(application, event, deadline)
            response = _answer(application, event, context, deadline, over_http)
        finally:
            flush_by = (
                time.monotonic() + max(0, min(FLUSH_MS, context.get_remaining_time_in_millis() - RESERVE_MS)) / 1000
            )
            # An application that writes after its answers may say how to wait for that.
            flush = getattr(built[0], "flush", None) if built else None
            telemetry.flush(_left_ms(flush_by))
            if callable(flush):
                flush(_left_ms(flush_by))
        return _gateway(response) if over_http else response.body

    def before_snapshot() -> None:
        _tell(application(), "before_snapshot")

    def after_restore() -> None:
        _tell(application(), "after_restore")

    if at_start:
        _within_start(application)
    if snapshots:
        with contextlib.suppress(ImportError):  # no runtime of Lambda's
            import snapshot_restore_py

            snapshot_restore_py.register_before_snapshot(before_snapshot)
            snapshot_restore_py.register_after_restore(after_restore)
    return handler


def _within_start(build: Callable[[], Application]) -> None:
    """Build before the platform is asked for work: it gives a start more of the processor, and freezes the process after."""

    def try_to() -> None:
        try:
            build()
        except Exception as error:  # noqa: BLE001 - the first invocation tries again, and answers with what is wrong
            logger.warning("the application could not be built at the start: %s", type(error).__name__)

    thread = threading.Thread(target=try_to, name="larder-start", daemon=True)
    thread.start()
    thread.join(START_SECONDS)


def _tell(app: Application, what: str) -> None:
    """An application that holds something which must not be in a snapshot may say how to let go of it."""
    tell = getattr(app, what, None)
    if callable(tell):
        tell()


def _answer_batch(application: Callable[[], Application], event: dict[str, Any], deadline: float) -> dict[str, Any]:
    try:
        app = application()
    except Exception as error:  # noqa: BLE001 - the edge: without an application every message goes back
        refused(error, "POST", "/events", {}, {"faas.trigger": "pubsub"})
        return sqs.all_failed(event)
    return sqs.answer_batch(app, event, deadline)


def _left_ms(until: float) -> int:
    return max(0, int((until - time.monotonic()) * 1000))


def _answer(
    application: Callable[[], Application],
    event: dict[str, Any],
    context: LambdaContext,
    deadline: float,
    over_http: bool,
) -> Response:
    attributes: dict[str, telemetry.Value] = {
        "faas.trigger": "http" if over_http else "other",
        "faas.invocation_id": context.aws_request_id,
        "url.scheme": "https",
    }
    method, path, headers = "POST", "", dict[str, str]()
    try:
        method, path, headers, body = _from_gateway(event) if over_http else _from_invocation(event, context)
        app = application()
    except Exception as error:  # noqa: BLE001 - the edge: an application that cannot be built is an answer too
        return refused(error, method, path, headers, attributes)
    if not any(name in headers for name in CARRIER_HEADERS) and "_X_AMZN_TRACE_ID" in os.environ:
        headers["x-amzn-trace-id"] = os.environ["_X_AMZN_TRACE_ID"]
    query = event.get("rawQueryString") or "" if over_http else ""
    return handle(
        app, method, path, headers, body, deadline=deadline, attributes=attributes, query=query, direct=not over_http
    )


def _from_gateway(event: dict[str, Any]) -> tuple[str, str, dict[str, str], bytes]:
    """Method, path, headers, body of a payload in format 2.0. Raises RequestError for another format."""
    request = event["requestContext"].get("http")
    if request is None:
        raise RequestError("the gateway sent a payload that is not format 2.0; set the integration to it", status=400)
    path = event.get("rawPath") or "/"
    stage = event["requestContext"].get("stage", "$default")
    if stage != "$default" and path.startswith(f"/{stage}/"):  # a named stage is part of the raw path
        path = path[len(stage) + 1 :]
    path = unquote(path)
    headers = {name.lower(): value for name, value in (event.get("headers") or {}).items()}
    text = event.get("body") or ""
    if not event.get("isBase64Encoded", False):
        return request["method"], path, headers, text.encode("utf-8", "surrogatepass")
    try:
        return request["method"], path, headers, base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise RequestError("the body says it is base64 and is not", status=400) from None


def _from_invocation(event: object, context: LambdaContext) -> tuple[str, str, dict[str, str], bytes]:
    """A direct invocation as the HTTP request it stands for; trace context and key come in the client context."""
    custom = getattr(context.client_context, "custom", None)
    sent: Mapping[str, object] = custom if isinstance(custom, Mapping) else {}
    headers = {name: str(sent[name]) for name in (*CARRIER_HEADERS, "authorization") if name in sent}
    body = json.dumps(event, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return "POST", "/recommendations", {**headers, "content-type": JSON_TYPE}, body


def _gateway(response: Response) -> dict[str, Any]:
    return {
        "statusCode": response.status,
        "headers": dict(response.headers),
        "body": response.body.decode(),
        "isBase64Encoded": False,
    }


def _create_application() -> Application:
    from inference.runtime import create_application

    return create_application()


# Without a runtime's address this was only imported.
handler = create_handler(_create_application, snapshots=True, at_start="AWS_LAMBDA_RUNTIME_API" in os.environ)
