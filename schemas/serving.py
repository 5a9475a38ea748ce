"""What crosses a door: requests, answers, their limits, and one way to read and write them as JSON."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    SerializerFunctionWrapHandler,
    Strict,
    ValidationError,
    WithJsonSchema,
    model_serializer,
    model_validator,
)
from pydantic.config import JsonDict
from pydantic_core import ErrorDetails, from_json

from schemas.errors import RequestError
from schemas.events import KINDS, MAX_ID_BYTES, InvalidRow, check_id
from schemas.ranker import MAX_CANDIDATES

MAX_BODY_BYTES = 256 * 1024
MAX_K = 500
MAX_PROMPT_CHARS = 2_000
MAX_EVENTS = 500
MAX_TIMEOUT_MS = 30_000
MAX_HISTORY_SHOWN = 200
QUESTIONS = ("satisfied", "trust")
"""What the page may ask about a list."""
MAX_CONTEXT_ENTRIES = 64
MAX_CATEGORIES = 100
MAX_WHERE = 20
MAX_VALUES = 100
MAX_SHOWN_CHARS = 80
"""So much of an offending value is quoted back, never more."""

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
        raise ValueError(f"it is no known kind of event{_did_you_mean(value, KINDS)}; known: {', '.join(KINDS)}")
    return value


def _check_text(value: str | None) -> str | None:
    """Blank text is no text: an empty search box sends an empty string."""
    if value is None:
        return None
    # First: Python counts some of them as blank.
    if any(ord(char) < 32 and char not in "\t\n\r" for char in value):
        raise ValueError("it holds a control character; remove it")
    return value if value.strip() else None


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


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class AttributeFilter(_Model):
    """What one attribute of an item must be: within the bounds, which it may equal, one of `one_of` and none of `none_of`.

    Numbers are compared as numbers, also where the catalogue holds them as text; texts as they are. An item without the
    attribute may not appear; without any bound it must merely have it.
    """

    attribute: Key
    at_least: Bound | None = None
    at_most: Bound | None = None
    one_of: Values = ()
    none_of: Values = ()


class Filters(_Model):
    """Which items may appear: in one of `categories` (none given: any), in none of `exclude_categories`, and holding all of
    `where`. Filters only tighten what the deployment's own rules allow."""

    categories: Categories = ()
    exclude_categories: Categories = ()
    where: Annotated[tuple[AttributeFilter, ...], Field(max_length=MAX_WHERE)] = ()


class RecommendationRequest(_Model):
    """One wish for a slate. `at` None means now; `candidates` None means: larder finds them itself.

    An empty `candidates` is a choice from nothing and gets an empty slate. Repeated ids count once.
    """

    user_id: Key
    k: Annotated[int, Field(ge=1, le=MAX_K)] = 10
    prompt: Text = None
    context: Context = Field(default_factory=dict)
    candidates: ItemIds | None = None
    exclude: ItemIds = ()
    filters: Filters = Filters()
    diversity: Annotated[float, Field(ge=0, le=1)] | None = None
    explain: bool = False
    at: Instant | None = None
    timeout_ms: Annotated[int, Field(ge=1, le=MAX_TIMEOUT_MS)] | None = None
    request_id: Key | None = None


class Because(_Model):
    """One thing that moved an item's score, and by how much; fields that do not apply to its kind are absent.

    kind            what was left out                             fields beside the score's
    event           all that the person did with one item         item_id, title, people_both
    wish            a clause of the wish, or all of it            words
    features        one feature view                              view
    co_visitation   nothing: people who had the last items        people_both
                    went on to this one
    trending, new, popular,   nothing: the list it comes from (ahead: what was scored for
    ahead                     the person some time before)

    `score_without` is the score that the model gives the item when that is left out and nothing else; `effect` is the score
    less that, in the same units (logits): above 0 it speaks for the item, below 0 against it. `places` is how many places lower
    the item would stand among the items shown and the best that are not. All three are absent where nothing was tried.
    `people_both` is how many people had both items.
    """

    kind: Literal["event", "wish", "features", "co_visitation", "trending", "new", "popular", "ahead"]
    item_id: str | None = None
    title: str | None = None
    words: str | None = None
    view: str | None = None
    score_without: float | None = None
    effect: float | None = None
    places: int | None = None
    people_both: int | None = None

    @model_serializer(mode="wrap")
    def _without_absent(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = serialise(self)
        return {name: value for name, value in fields.items() if value is not None}


class RecommendedItem(_Model):
    """One place in a slate. `reasons` and `because` are there exactly when the request said `explain`: the first in words, the
    second with figures, first that without which the item would lose most places, then score. `explanations` in
    `degraded` says that nothing could be tried in time: then both say what is alike and where the item comes from, without
    figures."""

    item_id: str
    score: float
    title: str
    reasons: tuple[str, ...] | None = None
    because: tuple[Because, ...] | None = None

    @model_serializer(mode="wrap")
    def _without_absent_reasons(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = serialise(self)
        for name in ("reasons", "because"):
            if fields[name] is None:
                fields.pop(name)
        return fields


class RuleNote(_Model):
    """A rule of the deployment that shaped a slate, by its name in `rules.toml`, and how many slots that concerns.

    fewer      it leaves items out, and the slate is that much shorter than what was asked for
    missed     a floor or an `at_least` that the candidates could not meet: so many slots are lacking
    unchecked  the database could not be asked what was shown before: `not_again_days` is not looked at
    """

    rule: str
    outcome: Literal["fewer", "missed", "unchecked"]
    slots: int


class ExperimentArm(_Model):
    """The experiment a person is in, and the arm they were given."""

    name: str
    arm: str


class RecommendationResponse(_Model):
    """A slate and what made it. `degraded` names each rung of the ladder that had to be taken; empty is best.

    `personalised` is there, and false, exactly for a person who has not agreed to it: nothing of them was read.
    `rules` is there only where a rule of the deployment left the slate short of what was asked for, or was not met.
    """

    request_id: str
    items: tuple[RecommendedItem, ...]
    model_version: str | None = None
    prompt_version: str | None = None
    experiment: ExperimentArm | None = None
    degraded: tuple[str, ...] = ()
    personalised: bool = True
    rules: tuple[RuleNote, ...] = ()

    @model_serializer(mode="wrap")
    def _without_the_usual(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = serialise(self)
        if self.personalised:
            fields.pop("personalised", None)
        if not self.rules:
            fields.pop("rules", None)
        return fields


def _anchored_by(name: str) -> JsonDict:
    """The condition that of the two anchors of a SimilarRequest `name` is given and the other is not."""
    item_id: JsonDict = {"type": "string"} if name == "item_id" else {"type": "null"}
    given: JsonDict = {"type": "string", "pattern": r"\S"}
    blank: JsonDict = {"anyOf": [{"type": "null"}, {"pattern": r"^\s*$"}]}
    return {"required": [name], "properties": {"item_id": item_id, "text": given if name == "text" else blank}}


class SimilarRequest(_Model):
    """Neighbours of one item, or of a text: exactly one of the two."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [_anchored_by("item_id"), _anchored_by("text")]})

    item_id: Key | None = None
    text: Text = None
    k: Annotated[int, Field(ge=1, le=MAX_K)] = 10
    filters: Filters = Filters()

    @model_validator(mode="after")
    def _one_anchor(self) -> Self:
        if (self.item_id is None) == (self.text is None):
            given = "neither" if self.item_id is None else "both"
            raise ValueError(f"item_id and text: {given} given; give exactly one of them")
        return self


class SimilarResponse(_Model):
    """Neighbours, nearest first; `score` is the cosine."""

    items: tuple[RecommendedItem, ...]
    model_version: str | None = None
    degraded: tuple[str, ...] = ()


class PostedEvent(_Model):
    """One event as an application posts it. `occurred_at` None means: when it arrives."""

    event_id: Key
    user_id: Key
    item_id: Key
    kind: Kind
    value: Annotated[float, Field(gt=-1e9, lt=1e9)] | None = None
    occurred_at: Instant | None = None
    request_id: Key | None = None


class EventsRequest(_Model):
    """A batch of events; one that cannot be read refuses the batch, one the store refuses only itself."""

    events: Annotated[tuple[PostedEvent, ...], Field(min_length=1, max_length=MAX_EVENTS)]


class EventOutcome(_Model):
    """What became of one event; `reason` says why it was not stored: `refused` is for the sender to mend, `declined` is for
    nobody to send again, as its person does not agree to being personalised."""

    event_id: str
    outcome: Literal["stored", "duplicate", "refused", "declined"]
    reason: str | None = None


class Fault(_Model):
    """What was wrong: the thing, the value and the way out; `field` is the offending field's dotted path."""

    type: str
    message: str
    field: str | None = None


class ErrorResponse(_Model):
    """The one shape of every error."""

    error: Fault


class EventsResponse(_Model):
    """Outcomes in the order of the request."""

    outcomes: tuple[EventOutcome, ...]


class HealthResponse(_Model):
    """What runs here. `unavailable` means that not even the popular list can be served (HTTP 503)."""

    status: Literal["ok", "degraded", "unavailable"]
    version: str
    model_version: str | None = None
    model_age_seconds: float | None = None
    encoder_version: str | None = None
    provider: str | None = None
    database_round_trip_ms: float | None = None
    degraded: tuple[str, ...] = ()


class HealthStatus(_Model):
    """What whoever comes to `GET /health` without a good key is told."""

    status: Literal["ok", "degraded", "unavailable"]


class PersonEvent(_Model):
    """One event of a person's history; `title` None: the item is not in the catalogue."""

    item_id: str
    title: str | None = None
    kind: str
    value: float | None = None
    occurred_at: datetime


class HistoryResponse(_Model):
    """A person's newest events, newest first; none of somebody unknown."""

    events: tuple[PersonEvent, ...]


class PeopleResponse(_Model):
    """Some people to look at, by id, for an admin key; none for any other."""

    people: tuple[str, ...] = ()


class SurveyQuestions(_Model):
    """What to ask a person now; mostly nothing."""

    questions: tuple[str, ...] = ()


class SurveyAnswer(_Model):
    """One answer, from 1 (not at all) to 5 (very much)."""

    question: Literal["satisfied", "trust"]
    answer: Annotated[int, Field(ge=1, le=5)]


class SurveyRequest(_Model):
    """What a person answered about the list `request_id`."""

    user_id: Key
    request_id: Key
    answers: Annotated[tuple[SurveyAnswer, ...], Field(min_length=1, max_length=2)]


class SurveyOutcome(_Model):
    """How many answers were kept; fewer than were sent of somebody who is forgotten."""

    stored: int


class ErasureResponse(_Model):
    """An erasure that was asked for: `waiting` (the person is hidden already), `erased` (files are left to delete),
    `finished`. `removed` are rows by place; the receipt names nobody."""

    receipt_id: str
    state: Literal["waiting", "erased", "finished"]
    forgotten_at: datetime | None = None
    removed: dict[str, int] | None = None


class ConsentRequest(_Model):
    """What a person says to being personalised."""

    personalise: bool


class ConsentResponse(_Model):
    """What holds from now on, and since when."""

    personalise: bool
    decided_at: datetime


class ExportResponse(_Model):
    """What is held of a person, rows by place. `waiting`: what lies under their id in the database's own tables, at once;
    `ready`: all of it, the lake and what was computed included. `not_included` names what is left out, and why."""

    receipt_id: str
    state: Literal["waiting", "ready"]
    ready_at: datetime | None = None
    held: dict[str, list[dict[str, Any]]]
    not_included: tuple[str, ...] = ()


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


def _did_you_mean(name: str, known: tuple[str, ...]) -> str:
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
    also = f" ({more} more like this)" if more else ""
    if error["type"] == "extra_forbidden":
        known = tuple(_model_at(model, location[:-1]).model_fields)
        return RequestError(
            f"there is no field {cut(location[-1])}{_did_you_mean(location[-1], known)}; known: {', '.join(known)}{also}",
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
