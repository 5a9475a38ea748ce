"""What crosses a door about one person: what is held of them, what they say, and what is asked of them."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import Field

from schemas.serving_fields import Key, Model

MAX_HISTORY_SHOWN = 200
QUESTIONS = ("satisfied", "trust")
"""What the page may ask about a list."""


class PersonEvent(Model):
    """One event of a person's history; `title` None: the item is not in the catalogue."""

    item_id: str
    title: str | None = None
    kind: str
    value: float | None = None
    occurred_at: datetime


class HistoryResponse(Model):
    """A person's newest events, newest first; none of somebody unknown."""

    events: tuple[PersonEvent, ...]


class PeopleResponse(Model):
    """Some people to look at, by id, for an admin key; none for any other."""

    people: tuple[str, ...] = ()


class SurveyQuestions(Model):
    """What to ask a person now; mostly nothing."""

    questions: tuple[str, ...] = ()


class SurveyAnswer(Model):
    """One answer, from 1 (not at all) to 5 (very much)."""

    question: Literal["satisfied", "trust"]
    answer: Annotated[int, Field(ge=1, le=5)]


class SurveyRequest(Model):
    """What a person answered about the list `request_id`."""

    user_id: Key
    request_id: Key
    answers: Annotated[tuple[SurveyAnswer, ...], Field(min_length=1, max_length=2)]


class SurveyOutcome(Model):
    """How many answers were kept; fewer than were sent of somebody who is forgotten."""

    stored: int


class ErasureResponse(Model):
    """An erasure that was asked for: `waiting` (the person is hidden already), `erased` (files are left to delete),
    `finished`. `removed` are rows by place; the receipt names nobody."""

    receipt_id: str
    state: Literal["waiting", "erased", "finished"]
    forgotten_at: datetime | None = None
    removed: dict[str, int] | None = None


class ConsentRequest(Model):
    """What a person says to being personalised."""

    personalise: bool


class ConsentResponse(Model):
    """What holds from now on, and since when."""

    personalise: bool
    decided_at: datetime


class ExportResponse(Model):
    """What is held of a person, rows by place. `waiting`: what lies under their id in the database's own tables, at once;
    `ready`: all of it, the lake and what was computed included. `not_included` names what is left out, and why."""

    receipt_id: str
    state: Literal["waiting", "ready"]
    ready_at: datetime | None = None
    held: dict[str, list[dict[str, Any]]]
    not_included: tuple[str, ...] = ()
