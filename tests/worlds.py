"""Hand-made events for tests, a post of them, and how a test serves: by which roles, with which key."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date, datetime
from typing import Any

import psycopg

from inference.settings import Settings
from inference.store import Store
from infra import keys, roles
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


def serving(url: str, artifacts_url: str, **more: Any) -> Settings:
    """Settings of a function on the database of a test as it should run: reading and writing by the roles made for it."""
    reader, writer = roles.serving_urls(url)
    assert reader != url, "the roles were not made"
    return Settings(reader, artifacts_url, writer_url=writer, **more)


def key_header(url: str, scopes: Sequence[str] = ("recommend", "write", "admin"), **more: Any) -> dict[str, str]:
    """The header with a new key of the database at `url`."""
    with psycopg.connect(url) as connection:
        return {"authorization": f"Bearer {keys.create(connection, 'a test', scopes, **more)}"}
