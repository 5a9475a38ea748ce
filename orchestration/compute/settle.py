"""Settling a range of days: one transaction per chunk, and after a failure exactly the days that cannot be built.

Nothing here knows what is built: `build(first, last)` builds these days in one transaction or raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date, timedelta
from typing import Any

import psycopg

from schemas.checks import Check, Measures
from schemas.errors import DatabaseError, DefinitionError, EngineError

CHUNK_DAYS = 30


@dataclass(frozen=True, slots=True)
class Built:
    """One finished partition: what its page shows, what was measured of it, and the checks that failed."""

    metadata: dict[str, Any]
    measures: Measures = field(default_factory=dict)
    failed_checks: tuple[Check, ...] = ()

    @property
    def blocking(self) -> tuple[Check, ...]:
        """The failed checks that nothing may be built upon."""
        return tuple(check for check in self.failed_checks if check.blocking)


Build = Callable[[date, date], dict[date, Built]]
GoOn = Callable[[Exception | None], None]
"""Raises something that is no Exception if the work was told to stop; asked before each transaction, and after one
failed, with its error: what looks like a bad day may be a query that was cancelled."""


@dataclass(slots=True)
class Settled:
    """How each day ended: built, or failed and why. A day is in exactly one of the two."""

    built: dict[date, Built] = field(default_factory=dict)
    failed: dict[date, str] = field(default_factory=dict)

    @property
    def unfit(self) -> set[date]:
        """The days that nothing may be built upon: failed, or built with a blocking check that failed."""
        return {*self.failed, *(day for day, built in self.built.items() if built.blocking)}


def chunks(first: date, last: date, days: int = CHUNK_DAYS) -> Iterator[tuple[date, date]]:
    """The range cut into pieces of at most `days` days, both ends included."""
    if last < first:
        raise DefinitionError(f"the range ends before it starts: {first} to {last}")
    while first <= last:
        end = min(first + timedelta(days=days - 1), last)
        yield first, end
        first = end + timedelta(days=1)


def stretches(days: Iterable[date]) -> list[tuple[date, date]]:
    """The days as stretches without gaps `(first, last)`, in order."""
    found: list[tuple[date, date]] = []
    for day in sorted(set(days)):
        if found and found[-1][1] + timedelta(days=1) == day:
            found[-1] = (found[-1][0], day)
        else:
            found.append((day, day))
    return found


def shown(days: Iterable[date]) -> str:
    """The days for a message: `2026-01-03, 2026-01-07 to 2026-01-09`."""
    return ", ".join(f"{first}" if first == last else f"{first} to {last}" for first, last in stretches(days))


def settle(days: Sequence[date], build: Build, into: Settled, go_on: GoOn = lambda error: None) -> None:
    """Build `days`, stretch by stretch, and note in `into` how each ended, as soon as it is known.

    A stretch that cannot be built as one is halved until the days that cannot be built stand alone: `n` bad days
    among `m` cost about `2 n log2(m)` further transactions, and none as long as everything works. Only Exceptions
    settle a day: being told to stop leaves the rest open and goes on to the caller.
    """
    for first, last in stretches(days):
        _settle(first, last, build, into, go_on)


def _settle(first: date, last: date, build: Build, into: Settled, go_on: GoOn) -> None:
    go_on(None)
    try:
        into.built |= build(first, last)
    except Exception as error:  # noqa: BLE001  # whatever it is, it is this stretch's outcome and is reported as such
        go_on(error)
        if first == last or _outage(error):
            reason = " ".join(str(error).split()) or type(error).__name__
            into.failed |= dict.fromkeys(_days(first, last), reason)
            return
        middle = first + (last - first) // 2
        _settle(first, middle, build, into, go_on)
        _settle(middle + timedelta(days=1), last, build, into, go_on)


def _outage(error: Exception) -> bool:
    """True where no day is to blame: a database or cluster that cannot be reached fails every smaller piece as well."""
    return isinstance(error, DatabaseError | EngineError) or (
        isinstance(error, psycopg.OperationalError) and error.sqlstate is None
    )


def _days(first: date, last: date) -> list[date]:
    return [first + timedelta(days=offset) for offset in range((last - first).days + 1)]


def kept_from(day: date, window_days: int, unfit: set[date]) -> list[date]:
    """The unfit days that a window of `window_days` days ending with `day` would read."""
    return sorted(other for other in unfit if day - timedelta(days=window_days) < other <= day)
