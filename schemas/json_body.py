"""One way to read a body of JSON as a checked model, to say what is wrong with one, and to write an answer."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, from_json

from schemas.errors import RequestError

MAX_BODY_BYTES = 256 * 1024
MAX_SHOWN_CHARS = 80
"""So much of an offending value is quoted back, never more."""

RequestModel = TypeVar("RequestModel", bound=BaseModel)


def parse(model: type[RequestModel], body: bytes) -> RequestModel:
    """`body` as a checked `model`.

    Raises RequestError: 413 for a body over the limit, 400 for one that is not a JSON object,
    422 for a field that will not do.
    """
    if len(body) > MAX_BODY_BYTES:
        raise body_too_large()
    try:
        # Two passes of a fast parser: only this one tells the literal NaN from a number out of range.
        document = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise RequestError(f"the body is not JSON: {error}; send one JSON object in UTF-8", status=400) from None
    if not isinstance(document, dict):
        raise RequestError(f"the body is {cut(document)}; send one JSON object", status=400)
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        first, *more = error.errors(include_url=False)
        raise _request_error(model, first, len(more)) from None


def body_too_large() -> RequestError:
    """The refusal of a body over the limit; a door that counts while reading raises the same one."""
    return RequestError(
        f"the body is larger than {MAX_BODY_BYTES} bytes; send fewer candidates or events per request", status=413
    )


def render(model: BaseModel) -> bytes:
    """`model` as JSON, the same bytes on every machine: fields in declared order, floats to 6 digits."""
    return render_json(model.model_dump(mode="json"))


def render_json(document: object) -> bytes:
    """`document` as compact UTF-8 JSON with floats to 6 digits. Raises ValueError for NaN and infinities."""
    text = json.dumps(_rounded(document), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode("utf-8", "replace")


def cut(value: object) -> str:
    """`value` as a caller recognises it, at most 80 characters; a collection as its kind and length."""
    if isinstance(value, dict):
        return f"an object of {len(value)} entries"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)} values"
    if isinstance(value, str):
        text = json.dumps(value[:MAX_SHOWN_CHARS], ensure_ascii=False)
        if len(value) <= MAX_SHOWN_CHARS and len(text) <= MAX_SHOWN_CHARS:
            return text
        return text[: MAX_SHOWN_CHARS - 2] + '…"'
    text = json.dumps(value, default=str)
    return text if len(text) <= MAX_SHOWN_CHARS else text[: MAX_SHOWN_CHARS - 1] + "…"


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 6) + 0.0  # + 0.0 turns -0.0 into 0.0
    if isinstance(value, dict):
        return {name: _rounded(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(entry) for entry in value]
    return value


def did_you_mean(name: str, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(name[:MAX_SHOWN_CHARS], known, n=2, cutoff=0.6)
    return f" (did you mean {' or '.join(near)}?)" if near else ""


_REASONS: dict[str, Callable[[dict[str, Any]], str]] = {
    "greater_than_equal": lambda limits: f"it must be at least {limits['ge']}",
    "less_than_equal": lambda limits: f"it must be at most {limits['le']}",
    "greater_than": lambda limits: f"it must be above {limits['gt']:g}",
    "less_than": lambda limits: f"it must be below {limits['lt']:g}",
    "string_too_long": lambda limits: f"at most {limits['max_length']} characters are allowed",
    "too_long": lambda limits: f"at most {limits['max_length']} are allowed",
    "too_short": lambda limits: f"at least {limits['min_length']} is needed",
    "int_type": lambda _: "it must be a whole number, written without a point or quotes",
    "float_type": lambda _: "it must be a number, written without quotes",
    "finite_number": lambda _: "it must be a finite number",
    "string_type": lambda _: "it must be text in quotes",
    "bool_type": lambda _: "it must be true or false",
    "tuple_type": lambda _: "it must be a list",
    "dict_type": lambda _: "it must be an object",
    "model_type": lambda _: "it must be an object",
    "timezone_aware": lambda _: 'it has no time zone; write for example "2030-01-31T12:00:00Z"',
    "datetime_type": lambda _: 'it must be a time in quotes, for example "2030-01-31T12:00:00Z"',
    "datetime_parsing": lambda _: 'it is not a time; write for example "2030-01-31T12:00:00Z"',
    "datetime_from_date_parsing": lambda _: 'it is not a time; write for example "2030-01-31T12:00:00Z"',
    "value_error": lambda context: str(context["error"]),
}


def _request_error(model: type[BaseModel], error: ErrorDetails, more: int) -> RequestError:
    location = [str(part) for part in error["loc"] if part != "[key]"]
    field = ".".join(part if len(part) <= MAX_SHOWN_CHARS else part[: MAX_SHOWN_CHARS - 1] + "…" for part in location)
    also = f" ({more} more to correct)" if more else ""
    if error["type"] == "extra_forbidden":
        known = tuple(_model_at(model, location[:-1]).model_fields)
        return RequestError(
            f"there is no field {cut(location[-1])}{did_you_mean(location[-1], known)}; known: {', '.join(known)}{also}",
            field=field,
        )
    if error["type"] == "missing":
        return RequestError(f"{field} is missing; it is required{also}", field=field)
    say = _REASONS.get(error["type"])
    reason = say(error.get("ctx", {})) if say else error["msg"]
    if not location:  # a rule about several fields names them itself
        return RequestError(f"{reason}{also}")
    return RequestError(f"{field} is {cut(error['input'])}: {reason}{also}", field=field)


def _model_at(model: type[BaseModel], location: list[str]) -> type[BaseModel]:
    """The model that `location` leads to; list positions in it are skipped."""
    for part in location:
        if part in model.model_fields:
            model = next(_models_in(model.model_fields[part].annotation), model)
    return model


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)
