"""What crosses a door: requests, answers and their limits. What concerns one person is in schemas/serving_people.py."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import (
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)
from pydantic.config import JsonDict

from schemas.serving_fields import BLANK, Bound, Categories, Context, Instant, ItemIds, Key, Kind, Model, Text, Values

MAX_K = 500
MAX_EVENTS = 500
MAX_TIMEOUT_MS = 30_000
MAX_WHERE = 20


class AttributeFilter(Model):
    """What one attribute of an item must be: within the bounds, which it may equal, one of `one_of` and none of `none_of`.

    Numbers are compared as numbers, also where the catalogue holds them as text; texts as they are. An item without the
    attribute may not appear; without any bound it must merely have it.
    """

    attribute: Key
    at_least: Bound | None = None
    at_most: Bound | None = None
    one_of: Values = ()
    none_of: Values = ()


class Filters(Model):
    """Which items may appear: in one of `categories` (none given: any), in none of `exclude_categories`, and holding all of
    `where`. Filters only tighten what the deployment's own rules allow."""

    categories: Categories = ()
    exclude_categories: Categories = ()
    where: Annotated[tuple[AttributeFilter, ...], Field(max_length=MAX_WHERE)] = ()


class RecommendationRequest(Model):
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


class Because(Model):
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


class RecommendedItem(Model):
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


class RuleNote(Model):
    """A rule of the deployment that shaped a slate, by its name in `rules.toml`, and how many slots that concerns.

    fewer      it leaves items out, and the slate is that much shorter than what was asked for
    missed     a floor or an `at_least` that the candidates could not meet: so many slots are lacking
    unchecked  the database could not be asked what was shown before: `not_again_days` is not looked at
    """

    rule: str
    outcome: Literal["fewer", "missed", "unchecked"]
    slots: int


class ExperimentArm(Model):
    """The experiment a person is in, and the arm they were given."""

    name: str
    arm: str


class RecommendationResponse(Model):
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
    given: JsonDict = {"type": "string", "pattern": f"[^{BLANK}]"}
    blank: JsonDict = {"anyOf": [{"type": "null"}, {"pattern": f"^[{BLANK}]*$"}]}
    return {"required": [name], "properties": {"item_id": item_id, "text": given if name == "text" else blank}}


class SimilarRequest(Model):
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


class SimilarResponse(Model):
    """Neighbours, nearest first; `score` is the cosine."""

    items: tuple[RecommendedItem, ...]
    model_version: str | None = None
    degraded: tuple[str, ...] = ()


class PostedEvent(Model):
    """One event as an application posts it. `occurred_at` None means: when it arrives."""

    event_id: Key
    user_id: Key
    item_id: Key
    kind: Kind
    value: Annotated[float, Field(gt=-1e9, lt=1e9)] | None = None
    occurred_at: Instant | None = None
    request_id: Key | None = None


class EventsRequest(Model):
    """A batch of events; one that cannot be read refuses the batch, one the store refuses only itself."""

    events: Annotated[tuple[PostedEvent, ...], Field(min_length=1, max_length=MAX_EVENTS)]


class EventOutcome(Model):
    """What became of one event; `reason` says why it was not stored: `refused` is for the sender to mend, `declined` is for
    nobody to send again, as its person does not agree to being personalised."""

    event_id: str
    outcome: Literal["stored", "duplicate", "refused", "declined"]
    reason: str | None = None


class Fault(Model):
    """What was wrong: the thing, the value and the way out; `field` is the offending field's dotted path."""

    type: str
    message: str
    field: str | None = None


class ErrorResponse(Model):
    """The one shape of every error."""

    error: Fault


class EventsResponse(Model):
    """Outcomes in the order of the request."""

    outcomes: tuple[EventOutcome, ...]


class HealthResponse(Model):
    """What runs here. `unavailable` means that not even the popular list can be served (HTTP 503)."""

    status: Literal["ok", "degraded", "unavailable"]
    version: str
    model_version: str | None = None
    model_age_seconds: float | None = None
    encoder_version: str | None = None
    provider: str | None = None
    database_round_trip_ms: float | None = None
    degraded: tuple[str, ...] = ()


class HealthStatus(Model):
    """What whoever comes to `GET /health` without a good key is told."""

    status: Literal["ok", "degraded", "unavailable"]
