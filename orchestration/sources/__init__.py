"""Where events, items and people come from: one small interface, one module per kind of source."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, datetime
from typing import Protocol

from schemas.events import Event, Item, Person


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be stored: which file, which line (1-based), why, and the row cut to 500 characters."""

    file: str
    line: int
    reason: str
    row: str


class Source(Protocol):
    """What ingest needs to know. A source never holds more than a bounded number of rows in memory."""

    name: str
    """Short name for tables and pages, e.g. `movielens-100k`."""

    description: str
    """One sentence for people, e.g. `MovieLens-100K in /data/ml-100k`."""

    historical: bool
    """True if the events lie in the past as a finished set and may be shifted in time (MovieLens)."""

    def fingerprint(self) -> str:
        """Changes whenever a new load could bring something new; equal means ingest has nothing to do."""

    def time_range(self) -> tuple[datetime, datetime]:
        """First and last `occurred_at` (UTC) in the source. Raises SourceError if there are no events."""

    def items(self) -> Iterator[Item | BadRow]:
        """The catalogue."""

    def people(self) -> Iterator[Person | BadRow]:
        """Profiles; may be empty."""

    def events(self, since: date | None = None) -> Iterator[Event | BadRow]:
        """All events in any order; `since` lets a source skip events known to lie before that day (a hint)."""

    def event_count(self) -> int | None:
        """How many rows `events()` will yield, where that is cheap to say (for progress)."""
