"""The kinds of fields that requests and answers are made of, with what is checked of each and how OpenAPI says it."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Annotated

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    Strict,
    WithJsonSchema,
)

from schemas.events import KINDS, MAX_ID_BYTES, InvalidRow, check_id
from schemas.json_body import did_you_mean
from schemas.ranker import MAX_CANDIDATES

MAX_PROMPT_CHARS = 2_000
MAX_CONTEXT_ENTRIES = 64
MAX_CATEGORIES = 100
MAX_VALUES = 100
BLANK = r"\s\x85\ufeff"
"""What blank text is made of, between the brackets of a pattern: Python's white space has the first of the two, that of
JSON Schema (ECMA-262) the second."""
_BLANK_TEXT = re.compile(f"[{BLANK}]*")

_DATE = re.compile(r"\d{4}-\d\d-\d\d")
_FIRST_INSTANT = datetime(1969, 12, 31, tzinfo=UTC)

Scalar = str | int | float | bool | None


def _check_key(value: str) -> str:
    try:
        return check_id("it", value)
    except InvalidRow as error:
        raise ValueError(str(error)) from None


def _check_kind(value: str) -> str:
    if value not in KINDS:
        raise ValueError(f"it is no known kind of event{did_you_mean(value, KINDS)}; known: {', '.join(KINDS)}")
    return value


def _check_text(value: str | None) -> str | None:
    """Blank text is no text: an empty search box sends an empty string."""
    if value is None:
        return None
    # First: Python counts some of them as blank.
    if any(ord(char) < 32 and char not in "\t\n\r" for char in value):
        raise ValueError("it holds a control character; remove it")
    return None if _BLANK_TEXT.fullmatch(value) else value


def _check_scalar(value: object) -> Scalar:
    if isinstance(value, str):
        if len(value) > MAX_PROMPT_CHARS:
            raise ValueError(f"it has {len(value)} characters; at most {MAX_PROMPT_CHARS} are allowed")
        return value
    if value is None or isinstance(value, bool):
        return value
    # A number beyond 2**53 is not the same number in every language that reads this JSON.
    # The comparison also refuses NaN and infinities; `math.isfinite` cannot take a whole number that no float holds.
    if isinstance(value, int | float) and abs(value) <= 2**53:
        return value
    raise ValueError("context is flat: give text, a finite number up to 2**53, true, false or null")


def _no_number(value: object) -> object:
    """Pydantic takes "0" for the beginning of 1970."""
    if not isinstance(value, str | datetime):
        raise ValueError('it must be a time in quotes, for example "2030-01-31T12:00:00Z"')
    if isinstance(value, str) and not _DATE.match(value):
        raise ValueError('it is not a time; write for example "2030-01-31T12:00:00Z"')
    return value


def _to_utc(value: datetime) -> datetime:
    try:
        instant = value.astimezone(UTC)
    except OverflowError:
        raise ValueError("it lies outside the years 1970 to 9999 in UTC") from None
    # Windows reach back from an instant, and days before 1970 have no place in a partition. What is 1970 somewhere may
    # still be 1969 in UTC.
    if instant < _FIRST_INSTANT:
        raise ValueError("it lies outside the years 1970 to 9999 in UTC")
    return instant


def _unique(values: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(values))


# What a validator of ours checks, pydantic cannot tell the OpenAPI document: it is said beside it.
KEY_FORMAT = "larder-key"
_KEY_SCHEMA = {
    "type": "string",
    "format": KEY_FORMAT,
    "minLength": 1,
    "maxLength": MAX_ID_BYTES,
    "pattern": r"^[^\x00-\x1f\x7f]*$",
    "description": f"At most {MAX_ID_BYTES} bytes in UTF-8, no control characters.",
}
_TEXT_SCHEMA = {
    "anyOf": [
        {"type": "string", "maxLength": MAX_PROMPT_CHARS, "pattern": r"^[^\x00-\x08\x0b\x0c\x0e-\x1f]*$"},
        {"type": "null"},
    ],
    "description": "Blank text counts as none.",
}
_SCALAR_SCHEMA = {
    "type": ["string", "number", "boolean", "null"],
    "maxLength": MAX_PROMPT_CHARS,
    "minimum": -(2**53),
    "maximum": 2**53,
}
_INSTANT_SCHEMA = {
    "type": "string",
    "format": "date-time",
    "pattern": r"^(19[7-9]|[2-9]\d\d)\d-",
    "description": "With a time zone, from 1970 on.",
}

Key = Annotated[str, AfterValidator(_check_key), WithJsonSchema(_KEY_SCHEMA)]
Kind = Annotated[str, AfterValidator(_check_kind), WithJsonSchema({"type": "string", "enum": list(KINDS)})]
Text = Annotated[
    str | None, Field(max_length=MAX_PROMPT_CHARS), AfterValidator(_check_text), WithJsonSchema(_TEXT_SCHEMA)
]
Instant = Annotated[
    # Not strict: a value that a validator has seen is no JSON any more, of which strict takes text for a time.
    AwareDatetime,
    Strict(False),
    BeforeValidator(_no_number),
    AfterValidator(_to_utc),
    WithJsonSchema(_INSTANT_SCHEMA),
]
ItemIds = Annotated[tuple[Key, ...], Field(max_length=MAX_CANDIDATES), AfterValidator(_unique)]
Categories = Annotated[tuple[Key, ...], Field(max_length=MAX_CATEGORIES), AfterValidator(_unique)]
Bound = Annotated[float, Field(gt=-1e15, lt=1e15)]
Values = Annotated[tuple[Key | Bound, ...], Field(max_length=MAX_VALUES)]
ContextValue = Annotated[Scalar, PlainValidator(_check_scalar), WithJsonSchema(_SCALAR_SCHEMA)]
Context = Annotated[
    dict[Key, ContextValue],
    Field(max_length=MAX_CONTEXT_ENTRIES),
    WithJsonSchema(
        {
            "type": "object",
            "maxProperties": MAX_CONTEXT_ENTRIES,
            "propertyNames": _KEY_SCHEMA,
            "additionalProperties": _SCALAR_SCHEMA,
        }
    ),
]


class Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
