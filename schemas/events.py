"""What an event, an item and a person are, before any store: plain records and their limits."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from datetime import datetime

from schemas.errors import LarderError

KINDS: tuple[str, ...] = ("view", "click", "rating", "like", "purchase", "hide")
"""Event kinds, in the order in which the ranker's graph numbers them (index + 1; 0 is padding)."""

NEGATIVE_KINDS: frozenset[str] = frozenset({"hide"})
LIKED_VALUE = 4.0
"""A `value` from here on counts as liked (ratings run from 1 to 5)."""

MAX_ID_BYTES = 128
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True, slots=True)
class Event:
    """One thing a person did with an item.

    `occurred_at` is when it happened (aware, UTC); `known_at` when the store learned of it
    (None: the same moment, as for historical loads).
    """

    event_id: str
    user_id: str
    item_id: str
    kind: str
    value: float | None
    occurred_at: datetime
    known_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Item:
    """One catalogue entry. `available_at` None means: always been there."""

    item_id: str
    title: str
    description: str = ""
    categories: tuple[str, ...] = ()
    attributes: dict[str, object] = field(default_factory=dict)
    available_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Person:
    """One person's profile; everything about them that is not an event."""

    user_id: str
    profile: dict[str, object] = field(default_factory=dict)


class InvalidRow(LarderError):
    """A row that cannot be stored; the reason goes to quarantine with file and line."""

    type = "invalid_row"


def check_id(name: str, value: object) -> str:
    """Return `value` if it can be a key: non-empty text, at most 128 bytes, no control characters."""
    if not isinstance(value, str) or not value:
        raise InvalidRow(f"{name} is empty")
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        raise InvalidRow(f"{name} holds a lone surrogate, which no store can keep") from None
    if size > MAX_ID_BYTES:
        raise InvalidRow(f"{name} is {size} bytes long; at most {MAX_ID_BYTES} are allowed")
    if _CONTROL.search(value):
        raise InvalidRow(f"{name} holds a control character")
    return value


def check_event(event: Event) -> Event:
    """Return `event` if it can be stored, else raise InvalidRow with the reason."""
    check_id("event_id", event.event_id)
    check_id("user_id", event.user_id)
    check_id("item_id", event.item_id)
    if event.kind not in KINDS:
        raise InvalidRow(f"kind {event.kind!r} is unknown; known kinds: {', '.join(KINDS)}")
    if event.value is not None and not (math.isfinite(event.value) and abs(event.value) < 1e9):
        raise InvalidRow(f"value {event.value!r} is not a finite number below 1e9")
    if event.occurred_at.tzinfo is None:
        raise InvalidRow(f"occurred_at {event.occurred_at.isoformat()} has no time zone")
    return event
