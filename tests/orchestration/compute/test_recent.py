"""The daily partitions of recent events: made ahead, dropped when passed, and never in the way of who posts."""

from __future__ import annotations

import threading
import time
from datetime import timedelta

import psycopg
import pytest
from conftest import TODAY, days_ago
from worlds import ListSource, post

from orchestration.compute import ingest as module
from orchestration.compute.ingest import drain, ingest
from orchestration.compute.lake import Lake
from orchestration.compute.recent import roll_partitions
from schemas.events import Event
from schemas.personal_data import RECENT_DAYS

NOW = TODAY + timedelta(hours=12)


def event(number: int, back: float) -> Event:
    return Event(f"e{number}", "u", "i", "view", None, days_ago(back))


def partitions(connection: psycopg.Connection) -> list[str]:
    rows = connection.execute(
        "SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = 'recent_events'::regclass ORDER BY 1"
    ).fetchall()
    connection.rollback()
    return [name.removeprefix("recent_events_") for (name,) in rows]


def days(first: int, last: int) -> list[str]:
    return [f"{days_ago(back):%Y%m%d}" for back in range(first, last - 1, -1)]


def held(connection: psycopg.Connection) -> dict[str, str]:
    rows = connection.execute("SELECT event_id, tableoid::regclass::text FROM recent_events").fetchall()
    connection.rollback()
    return {event_id: table.removeprefix("recent_events_") for event_id, table in rows}


def test_a_post_that_waits_for_an_id_of_a_load_does_not_block_it(
    database: str, lake: Lake, connection: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The very first load of a database has partitions to make, and has taken its ids when the events go online."""
    posted: list[set[str]] = []
    poster = threading.Thread(target=lambda: posted.append(post(database, [event(1, 1), event(2, 1)])))
    go_online = module.keep_recent

    def after_the_post_waits(*arguments: object) -> None:
        poster.start()
        with psycopg.connect(database, autocommit=True) as watching:
            waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND locktype = 'transactionid'"
            deadline = time.monotonic() + 20
            while watching.execute(waiting).fetchone() == (0,) and time.monotonic() < deadline:
                time.sleep(0.01)
        go_online(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "keep_recent", after_the_post_waits)
    assert ingest(ListSource([event(1, 1)]), lake, connection, now=NOW).stored == 1
    poster.join(30)
    assert posted == [{"e2"}]
    assert held(connection) == dict.fromkeys(("e1", "e2"), f"{days_ago(1):%Y%m%d}")


def test_partitions_are_made_ahead_and_dropped_once_their_events_are_in_the_lake(
    database: str, lake: Lake, connection: psycopg.Connection
) -> None:
    long_ago = NOW - timedelta(days=40)
    roll_partitions(connection, lake, long_ago)
    assert partitions(connection) == [*days(40 + RECENT_DAYS + 1, 39), "default"]
    post(database, [event(1, 39), event(2, 41), event(3, 20)])
    assert held(connection)["e3"] == "default"
    roll_partitions(connection, lake, NOW)
    # What nobody has drained yet stays, and so does its partition.
    assert partitions(connection) == [*days(41, 41), *days(39, 39), *days(RECENT_DAYS + 1, -1), "default"]
    assert drain(connection, lake, None, TODAY.date()) == 3
    connection.commit()
    roll_partitions(connection, lake, NOW)
    assert partitions(connection) == [*days(RECENT_DAYS + 1, -1), "default"]
    assert held(connection) == {}
    assert lake.events(connection).count_rows() == 3


def test_a_day_that_the_default_partition_holds_stays_there(
    database: str, lake: Lake, connection: psycopg.Connection
) -> None:
    post(database, [event(1, 1)])
    roll_partitions(connection, lake, NOW)
    post(database, [event(2, 1), event(3, 2)])
    assert held(connection) == {"e1": "default", "e2": "default", "e3": f"{days_ago(2):%Y%m%d}"}


def test_nobody_waits_long_for_partitions(database: str, lake: Lake, connection: psycopg.Connection) -> None:
    with psycopg.connect(database) as other:
        lake.hold_writes(other)
        roll_partitions(connection, lake, NOW)
        assert partitions(connection) == ["default"]
    with psycopg.connect(database) as other:
        other.execute("SELECT FROM recent_events")
        roll_partitions(connection, lake, NOW)
        assert partitions(connection) == ["default"]
        # Both load and post go on without.
        assert ingest(ListSource([event(1, 1)]), lake, connection, now=NOW).stored == 1
        assert post(database, [event(2, 1)]) == {"e2"}
    assert set(held(connection).values()) == {"default"}
