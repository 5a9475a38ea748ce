"""What a run has to do: the partitions of each asset that are missing or stale, and no others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import date, timedelta

import psycopg
import pytest
from conftest import TODAY, Ingested, ingested

from orchestration.compute.materialise import materialise
from orchestration.compute.stale import DAILY
from orchestration.due import what_is_due
from orchestration.resources import Larder
from schemas.views import VIEWS


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ingested]:
    with pytest.MonkeyPatch.context() as patch:
        yield ingested(tmp_path_factory.mktemp("due"), patch, 10)


@pytest.fixture(scope="module")
def whole(fresh: Ingested) -> Ingested:
    for view in VIEWS:
        materialise(view, fresh.first, fresh.last, url=fresh.url, lake=fresh.lake)
    return fresh


@pytest.fixture
def built(whole: Ingested) -> Iterator[Ingested]:
    """Everything built; the tables are as before when the test has ended."""
    tables = ("feature_ledger", "lake_files", "recent_events")
    with psycopg.connect(whole.url) as connection:
        for table in tables:
            connection.execute(f"CREATE TABLE before_{table} AS TABLE {table}")
    yield whole
    with psycopg.connect(whole.url) as connection:
        for table in tables:
            connection.execute(f"TRUNCATE {table}")
            connection.execute(f"INSERT INTO {table} TABLE before_{table}")
            connection.execute(f"DROP TABLE before_{table}")


def due(world: Ingested) -> object:
    return what_is_due(Larder(deployment="small"), False).parts


def say(world: Ingested, sql: str, *values: object) -> None:
    with psycopg.connect(world.url) as connection:
        connection.execute(sql, values)


def post(world: Ingested, day: date) -> None:
    say(
        world,
        "INSERT INTO recent_events (event_id, user_id, item_id, kind, value, occurred_at, known_at, drained) "
        "VALUES ('late', 'u', 'i', 'click', 1, %s::timestamptz + interval '1 hour', now(), false)",
        day,
    )


def test_where_nothing_was_built_everything_is_together(fresh: Ingested) -> None:
    assert due(fresh) == [(DAILY, fresh.first, fresh.last)]


def test_where_all_was_built_nothing_is(built: Ingested) -> None:
    assert due(built) == []


def test_a_stale_view_is_built_again_alone_and_what_requests_read_first(built: Ingested) -> None:
    cut = built.last - timedelta(days=2)
    say(built, "UPDATE feature_ledger SET stale_at = now() WHERE view = 'item_activity'")
    assert due(built) == [
        (("item_activity",), cut, built.last),
        (("item_activity",), built.first, cut - timedelta(days=1)),
    ]


def test_days_apart_are_runs_apart(built: Ingested) -> None:
    one, other = built.first + timedelta(days=1), built.first + timedelta(days=4)
    say(built, "UPDATE feature_ledger SET stale_at = now() WHERE view = 'item_activity' AND partition_date = %s", one)
    say(built, "DELETE FROM feature_ledger WHERE view = 'user_activity' AND partition_date = %s", other)
    assert due(built) == [(("item_activity",), one, one), (("user_activity",), other, other)]


def test_what_is_stale_of_one_view_is_not_built_with_the_day_that_is_missing_of_all(built: Ingested) -> None:
    say(
        built,
        "UPDATE feature_ledger SET stale_at = now() WHERE view = 'item_activity' AND partition_date < %s",
        built.last,
    )
    say(built, "DELETE FROM feature_ledger WHERE partition_date = %s", built.last)
    cut = built.last - timedelta(days=2)
    assert due(built) == [
        (("item_activity",), cut, built.last - timedelta(days=1)),
        (DAILY, built.last, built.last),
        (("item_activity",), built.first, cut - timedelta(days=1)),
    ]


def test_a_day_whose_file_was_replaced_goes_with_its_events_however_many_there_are(built: Ingested) -> None:
    say(built, "UPDATE feature_ledger SET stale_at = now()")
    cut = built.last - timedelta(days=2)
    assert due(built) == [(DAILY, cut, built.last), (DAILY, built.first, cut - timedelta(days=1))]


def test_what_requests_read_waits_for_what_is_drained_into_it(built: Ingested) -> None:
    say(
        built,
        "UPDATE feature_ledger SET stale_at = now() WHERE view = 'item_activity' AND partition_date = %s",
        built.last,
    )
    post(built, built.first + timedelta(days=2))
    assert due(built) == [(DAILY, built.first + timedelta(days=2), built.last)]


def test_what_was_posted_to_a_deployment_of_today_waits_for_its_first_partition(built: Ingested) -> None:
    post(built, built.last)
    larder = Larder(deployment="small")
    replace(built.record, start_date=TODAY.date()).save()
    try:
        assert what_is_due(larder, False).parts == []
    finally:
        built.record.save()


def test_a_day_with_other_events_than_were_built_goes_with_its_events(built: Ingested) -> None:
    day = built.first + timedelta(days=3)
    say(built, "UPDATE lake_files SET rows = rows + 1 WHERE day = %s", day)
    assert due(built) == [(DAILY, day, day)]


def test_a_view_that_was_changed_is_built_again(built: Ingested, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = [replace(VIEWS[0], features=VIEWS[0].features[:-1]), *VIEWS[1:]]
    assert changed[0].definition_hash != VIEWS[0].definition_hash
    monkeypatch.setattr("orchestration.due.VIEWS", changed)
    assert due(built) == [(("user_activity",), built.first, built.last)]


def test_what_was_posted_late_goes_with_the_days_whose_windows_cover_it(built: Ingested) -> None:
    posted = built.first + timedelta(days=2)
    post(built, posted)
    assert due(built) == [(DAILY, posted, built.last)]
    say(built, "UPDATE recent_events SET occurred_at = %s WHERE event_id = 'late'", date(2020, 1, 1))
    assert due(built) == [(("events",), built.first, built.first)]
