"""The world's own events, those that no list led to, as a source that has a day at a time."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime

from orchestration.sources import BadRow
from orchestration.sources.simulator import SAME_SESSION_SECONDS, Simulator
from orchestration.sources.simulator_world import World
from schemas.errors import SourceError
from schemas.events import Event, Item, Person


@dataclass(slots=True)
class Part:
    """What is new from `since` on (None: everything before) until `until`; a Source of orchestration/sources."""

    since: datetime | None
    until: datetime
    catalogue: tuple[Item, ...]
    profiles: tuple[Person, ...]
    happened: tuple[Event, ...]
    name: str = "simulated"
    historical: bool = False
    description: str = "the simulated world"

    def fingerprint(self) -> str:
        return f"month {self.since} {self.until}"

    def time_range(self) -> tuple[datetime, datetime]:
        if not self.happened:
            raise SourceError(f"the simulated world has no events until {self.until}")
        times = [event.occurred_at for event in self.happened]
        return min(times), max(times)

    def items(self) -> Iterator[Item | BadRow]:
        return iter(self.catalogue)

    def people(self) -> Iterator[Person | BadRow]:
        return iter(self.profiles)

    def events(self, since: date | None = None) -> Iterator[Event | BadRow]:
        return iter(self.happened)

    def event_count(self) -> int | None:
        return len(self.happened)


class Organic:
    """Everything that happens in a world before `until` without any list, simulated once."""

    def __init__(self, world: World, until: datetime) -> None:
        source = Simulator(world, until)
        self._items = [item for item in source.items() if isinstance(item, Item)]
        self._people = {person.user_id: person for person in source.people() if isinstance(person, Person)}
        self._events: dict[date, list[Event]] = defaultdict(list)
        first: dict[str, datetime] = {}
        for event in source.events():
            if isinstance(event, Event):
                self._events[event.occurred_at.astimezone(UTC).date()].append(event)
                first[event.user_id] = min(first.get(event.user_id, event.occurred_at), event.occurred_at)
        self.first_event = first
        """When each person was seen first."""

    def sessions(self, day: date) -> list[tuple[datetime, str]]:
        """When somebody begins to look around on that day, and who, in order; nobody on the day they are first seen."""
        last: dict[str, datetime] = {}
        found = []
        for event in sorted(self._events.get(day, ()), key=lambda event: event.occurred_at):
            at, who = event.occurred_at, event.user_id
            before = last.get(who)
            if (before is None or (at - before).total_seconds() >= SAME_SESSION_SECONDS) and self.first_event[
                who
            ].astimezone(UTC).date() < day:
                found.append((at, who))
            last[who] = at
        return found

    def part(self, since: datetime | None, until: datetime, instead: Mapping[str, int] | None = None) -> Part:
        """What became known from midnight `since` to midnight `until`; of each of `instead` as many of the last events did not
        happen."""

        def new(at: datetime | None) -> bool:
            return (since is None or (at is not None and at >= since)) and (at is None or at < until)

        left_out = Counter(instead or {})
        happened = []
        days = sorted(day for day in self._events if day < until.date() and (since is None or day >= since.date()))
        for event in (event for day in reversed(days) for event in reversed(self._events[day])):
            if left_out[event.user_id] > 0:
                left_out[event.user_id] -= 1
            else:
                happened.append(event)
        return Part(
            since,
            until,
            tuple(item for item in self._items if new(item.available_at)),
            tuple(self._people[user_id] for user_id, at in self.first_event.items() if new(at)),
            tuple(reversed(happened)),
        )

    def profile(self, user_id: str) -> dict[str, object]:
        return dict(self._people[user_id].profile)

    def available(self, before: datetime) -> list[str]:
        """Ids of the items that are there at an instant."""
        return [item.item_id for item in self._items if item.available_at is None or item.available_at <= before]
