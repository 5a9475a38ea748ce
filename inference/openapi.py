"""The OpenAPI document of the function, made from the models that read and write its bodies: `python -m inference.openapi`.

What a request may hold, what an answer holds and which statuses a route gives stand here once; the routes themselves are
those of inference/routes.py.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import models_json_schema

from inference import page
from inference.otel import version
from inference.routes import HISTORY_SHOWN, LINKED, SCOPES
from schemas.json_body import MAX_BODY_BYTES
from schemas.serving import (
    ErrorResponse,
    EventsRequest,
    EventsResponse,
    HealthResponse,
    HealthStatus,
    RecommendationRequest,
    RecommendationResponse,
    SimilarRequest,
    SimilarResponse,
)
from schemas.serving_fields import Key
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

OPENAPI_VERSION = "3.1.0"
DOCUMENT = Path(__file__).parents[1] / "docs" / "openapi.json"
_REF = "#/components/schemas/{model}"
_RETRY_AFTER = {"retry-after": {"description": "Seconds to wait.", "schema": {"type": "integer", "minimum": 0}}}
_SERVER_TIMING = {
    "server-timing": {
        "description": "Milliseconds by step, and in all (W3C Server Timing).",
        "schema": {"type": "string"},
    }
}

FAULTS: dict[int, str] = {
    400: "The body is not a JSON object.",
    401: "No key came with the request, or none that is known.",
    403: "The key is not for this.",
    404: "What the request asks about is not there.",
    408: "The body did not arrive in time; send it at once.",
    413: f"The body is larger than {MAX_BODY_BYTES} bytes.",
    415: "The content type is not application/json.",
    422: "A field will not do; the message says why and what would.",
    429: "More requests than the key allows; wait and try again.",
    500: "An error that nobody foresaw; it is logged under the trace that the message names.",
    503: "Nothing can answer right now; try again later.",
}
"""What each status means, where a route gives it."""
_BODY_FAULTS = (400, 408, 413, 415, 422, 500, 503)
_KEY_FAULTS = (401, 403, 429)
_LINK = {
    "type": "apiKey",
    "in": "query",
    "name": "token",
    "description": "A signed link of the person, for this purpose.",
}
_KEY = {"type": "http", "scheme": "bearer", "description": "A key with the scope that the operation names."}


@dataclass(frozen=True, slots=True)
class Operation:
    """What one route takes and gives. `faults` are the statuses it may answer with when it does not answer."""

    method: str
    path: str
    summary: str
    answer: tuple[type[BaseModel], ...]
    request: type[BaseModel] | None = None
    faults: tuple[int, ...] = ()
    also: tuple[int, ...] = ()
    """Other statuses that come with an answer instead of an error."""
    success: int = 200
    query: tuple[tuple[str, dict[str, Any]], ...] = ()
    """Parameters after the question mark, each with its schema."""
    text: tuple[str, ...] = ()
    """Content types of an answer that is no JSON."""


OPERATIONS = (
    Operation(
        "POST",
        "/recommendations",
        "Items for a person, each with a score and, on demand, reasons",
        (RecommendationResponse,),
        RecommendationRequest,
        _BODY_FAULTS,
    ),
    Operation(
        "POST",
        "/similar",
        "Neighbours of an item or of a text",
        (SimilarResponse,),
        SimilarRequest,
        (*_BODY_FAULTS, 404),
    ),
    Operation("POST", "/events", "Store events, each once", (EventsResponse,), EventsRequest, _BODY_FAULTS),
    Operation(
        "GET",
        "/health",
        "Versions, age of the model, round trip to the database, what is degraded",
        (HealthResponse, HealthStatus),
        faults=(500,),
        also=(503,),
    ),
    Operation(
        "POST",
        "/people/{user_id}/forget",
        "Have a person forgotten: they read as unknown from now on",
        (ErasureResponse,),
        faults=(404, 408, 413, 415, 500, 503),
        success=202,
    ),
    Operation(
        "GET",
        "/people/{user_id}/forget/{receipt_id}",
        "How far forgetting a person is",
        (ErasureResponse,),
        faults=(404, 500, 503),
    ),
    Operation(
        "GET",
        "/people",
        "Some people's ids to look at, for an admin key; none for another",
        (PeopleResponse,),
        faults=(500, 503),
    ),
    Operation(
        "GET",
        "/people/{user_id}/history",
        "A person's newest events with titles",
        (HistoryResponse,),
        faults=(404, 422, 500, 503),
        query=(("limit", {"type": "integer", "minimum": 1, "maximum": MAX_HISTORY_SHOWN, "default": HISTORY_SHOWN}),),
    ),
    Operation(
        "GET",
        "/people/{user_id}/survey",
        "What to ask a person about their list; mostly nothing",
        (SurveyQuestions,),
        faults=(404, 500, 503),
    ),
    Operation(
        "POST", "/survey", "Answers to those questions, each kept once", (SurveyOutcome,), SurveyRequest, _BODY_FAULTS
    ),
    Operation("GET", "/", "The page for people", (), faults=(500,), text=(page.TYPES["html"],)),
    Operation(
        "GET",
        "/web/{file}",
        "A file of the page",
        (),
        faults=(404, 500),
        text=tuple(dict.fromkeys(page.files()[name].content_type for name in page.names())),
    ),
    Operation(
        "POST",
        "/people/{user_id}/consent",
        "Say whether a person may be personalised: it holds from the next request on",
        (ConsentResponse,),
        ConsentRequest,
        (*_BODY_FAULTS, 404),
    ),
    Operation(
        "POST",
        "/people/{user_id}/export",
        "What is held of a person, and the receipt of the whole, which takes longer to gather",
        (ExportResponse,),
        faults=(404, 408, 413, 415, 500, 503),
        success=202,
    ),
    Operation(
        "GET",
        "/people/{user_id}/export/{receipt_id}",
        "The whole of what is held of a person, once it is gathered",
        (ExportResponse,),
        faults=(404, 500, 503),
    ),
    Operation("GET", "/openapi.json", "This document", (), faults=(500,)),
)


@cache
def document() -> dict[str, Any]:
    """The document; equal for every process of a version."""
    models: list[type[BaseModel]] = [ErrorResponse]
    models += [model for each in OPERATIONS for model in (each.request, *each.answer) if model is not None]
    # An answer is described by how it would be read: its serialiser leaves `reasons` out, which validation knows as a default.
    _, schemas = models_json_schema([(model, "validation") for model in dict.fromkeys(models)], ref_template=_REF)
    paths: dict[str, Any] = {}
    for each in OPERATIONS:
        paths.setdefault(each.path, {})[each.method.lower()] = _operation(each)
    return {
        "openapi": OPENAPI_VERSION,
        "info": {
            "title": "Larder",
            "summary": "Recommendations, neighbours and events over HTTP",
            "version": version(),
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {"schemas": schemas["$defs"], "securitySchemes": {"key": _KEY, "link": _LINK}},
    }


def text() -> str:
    """The document as the file that is kept."""
    return json.dumps(document(), indent=1, ensure_ascii=False) + "\n"


def _operation(each: Operation) -> dict[str, Any]:
    said: dict[str, Any] = {
        "operationId": re.sub(r"\W+", "_", f"{each.method.lower()}{each.path}").strip("_"),
        "summary": each.summary,
    }
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": _named_schema(name)}
        for name in re.findall(r"{(\w+)}", each.path)
    ]
    parameters += [{"name": name, "in": "query", "required": False, "schema": schema} for name, schema in each.query]
    if parameters:
        said["parameters"] = parameters
    scope = SCOPES[each.path]
    if scope is not None:
        said["security"] = [{"key": [scope]}, *([{"link": []}] if each.path in LINKED else [])]
    if each.request is not None:
        said["requestBody"] = {"required": True, "content": _content(each.request)}
    content = {kind: {"schema": {"type": "string"}} for kind in each.text} or _content(*each.answer)
    responses: dict[int, Any] = {each.success: {"description": "The answer.", "content": content}}
    if each.path == "/recommendations":
        responses[each.success]["headers"] = _SERVER_TIMING
    for status in each.also:
        responses[status] = {"description": FAULTS[status], "content": _content(*each.answer)}
    for status in (*each.faults, *(_KEY_FAULTS if scope is not None else ())):
        responses[status] = {"description": FAULTS[status], "content": _content(ErrorResponse)}
        if status in (429, 503):
            responses[status]["headers"] = _RETRY_AFTER
    said["responses"] = {str(status): responses[status] for status in sorted(responses)}
    return said


def _named_schema(name: str) -> dict[str, Any]:
    """What may stand in a path where it names `name`."""
    if name == "file":
        return {"type": "string", "enum": page.names()}
    return TypeAdapter(Key).json_schema()


def _content(*models: type[BaseModel]) -> dict[str, Any]:
    """One of `models` as JSON; without any, whatever object."""
    listed: list[dict[str, Any]] = [{"$ref": _REF.format(model=model.__name__)} for model in models]
    schema = {"anyOf": listed} if len(listed) > 1 else listed[0] if listed else {"type": "object"}
    return {"application/json": {"schema": schema}}


def main() -> int:
    parser = argparse.ArgumentParser(prog="make openapi", description=__doc__)
    parser.add_argument("--out", type=Path, default=DOCUMENT, help="file to write (default: docs/openapi.json)")
    options = parser.parse_args()
    options.out.write_text(text(), encoding="utf-8")
    print(f"written: {options.out.name}, {len(document()['paths'])} routes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
