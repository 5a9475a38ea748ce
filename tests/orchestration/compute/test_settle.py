"""Settling a range: which days are built in which transactions, and that exactly the bad ones fail."""

from __future__ import annotations

from datetime import date, timedelta

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestration.compute.settle import Built, Settled, chunks, kept_from, settle, shown, stretches
from schemas.checks import values_in_range
from schemas.errors import DefinitionError

START = date(2026, 1, 1)


def day(number: int) -> date:
    return START + timedelta(days=number)


class Builder:
    """Builds what it is asked to, unless a bad day is among it; remembers every transaction."""

    def __init__(self, bad: set[date], error: Exception | None = None) -> None:
        self.bad, self.error = bad, error or ValueError("cannot  be\nbuilt")
        self.asked: list[tuple[date, date]] = []

    def __call__(self, first: date, last: date) -> dict[date, Built]:
        self.asked.append((first, last))
        days = [first + timedelta(days=offset) for offset in range((last - first).days + 1)]
        if self.bad & set(days):
            raise self.error
        return {one: Built({"rows": 1}) for one in days}


def test_a_good_stretch_is_one_transaction() -> None:
    build, into = Builder(set()), Settled()
    settle([day(n) for n in range(30)], build, into)
    assert build.asked == [(day(0), day(29))]
    assert len(into.built) == 30
    assert not into.failed


@given(st.sets(st.integers(0, 40), min_size=1), st.sets(st.integers(0, 40)))
def test_exactly_the_bad_days_fail_whatever_they_are(wanted: set[int], bad: set[int]) -> None:
    build, into = Builder({day(n) for n in bad}), Settled()
    settle([day(n) for n in wanted], build, into)
    assert set(into.built) == {day(n) for n in wanted - bad}
    assert into.failed == {day(n): "cannot be built" for n in wanted & bad}


def test_one_bad_day_among_thirty_costs_few_more_transactions() -> None:
    build = Builder({day(17)})
    settle([day(n) for n in range(30)], build, Settled())
    assert len(build.asked) <= 11


def test_a_database_that_cannot_be_reached_is_not_asked_day_by_day() -> None:
    build, into = Builder({day(3)}, psycopg.OperationalError("connection refused")), Settled()
    settle([day(n) for n in range(30)], build, into)
    assert len(build.asked) == 1
    assert len(into.failed) == 30


def test_being_told_to_stop_settles_nothing_more_and_keeps_what_is_done() -> None:
    build, into = Builder(set()), Settled()

    def go_on(error: Exception | None) -> None:
        if build.asked:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        settle([day(0), day(5)], build, into, go_on)
    assert set(into.built) == {day(0)}
    assert not into.failed


def test_a_window_reads_the_days_that_end_with_its_own() -> None:
    unfit = {day(3)}
    assert [n for n in range(12) if kept_from(day(n), 7, unfit)] == list(range(3, 10))
    assert [n for n in range(12) if kept_from(day(n), 1, unfit)] == [3]


def test_a_failed_blocking_check_makes_a_built_day_unfit_and_a_warning_does_not() -> None:
    stops, warns = values_in_range(), values_in_range(blocking=False)
    into = Settled({day(0): Built({}, {}, (stops,)), day(1): Built({}, {}, (warns,)), day(2): Built({})}, {day(3): "x"})
    assert into.unfit == {day(0), day(3)}


def test_days_are_shown_as_stretches() -> None:
    days = [day(n) for n in (5, 1, 2, 3, 9)]
    assert stretches(days) == [(day(1), day(3)), (day(5), day(5)), (day(9), day(9))]
    assert shown(days) == "2026-01-02 to 2026-01-04, 2026-01-06, 2026-01-10"


def test_a_range_that_ends_before_it_starts_is_refused() -> None:
    with pytest.raises(DefinitionError, match="ends before it starts: 2026-01-02 to 2026-01-01"):
        list(chunks(day(1), day(0)))
