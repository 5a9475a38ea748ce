"""Hand-made events for tests: a source that yields what it is given, and a post of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import date, datetime

from inference.store import Store
from orchestration.sources import BadRow
from schemas.events import Event, Item, Person


@dataclass
class ListSource:
    """A `Source` over lists."""

    event_rows: list[Event | BadRow]
    item_rows: list[Item | BadRow] = field(default_factory=list)
    people_rows: list[Person | BadRow] = field(default_factory=list)
    name: str = "list"
    description: str = "a list"
    historical: bool = False
    version: str = "1"

    def fingerprint(self) -> str:
        return self.version

    def time_range(self) -> tuple[datetime, datetime]:
        times = [row.occurred_at for row in self.event_rows if isinstance(row, Event)]
        return min(times), max(times)

    def items(self) -> Iterator[Item | BadRow]:
        yield from self.item_rows

    def people(self) -> Iterator[Person | BadRow]:
        yield from self.people_rows

    def events(self, since: date | None = None) -> Iterator[Event | BadRow]:
        yield from self.event_rows

    def event_count(self) -> int | None:
        return len(self.event_rows)


def post(database: str, events: list[Event]) -> set[str]:
    """Store events as `POST /events` does; the ids that were new."""
    store = Store(database)
    rows = [asdict(event) | {"occurred_at": event.occurred_at.isoformat()} for event in events]
    try:
        return store.accept_events(rows, 10_000)
    finally:
        store.close()
