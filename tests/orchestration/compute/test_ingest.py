"""Ingest: every row accounted for, nothing stored twice, nothing half stored."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import psycopg
import pytest
from conftest import TODAY, days_ago
from worlds import ListSource

from orchestration.compute import ingest as module
from orchestration.compute.ingest import drain, ingest
from orchestration.compute.lake import Lake
from orchestration.sources import BadRow
from schemas.events import Event, Item, Person

NOW = TODAY + timedelta(hours=12)


def event(number: int, at: datetime, user: str = "u", item: str = "i") -> Event:
    return Event(f"e{number}", user, item, "view", None, at)


def stored(lake: Lake, connection: psycopg.Connection) -> list[str]:
    return sorted(lake.events(connection).to_table()["event_id"].to_pylist())


def test_counts_add_up_with_duplicates_and_bad_rows(lake: Lake, connection: psycopg.Connection) -> None:
    source = ListSource(
        [
            event(1, days_ago(3)),
            event(1, days_ago(3)),
            BadRow("events.csv", 4, "value is not a number", "x,y,z"),
            event(2, days_ago(1)),
            Event("e3", "u" * 200, "i", "view", None, days_ago(1)),
            Event("e4", "u", "i", "view", float("nan"), days_ago(1)),
        ],
        [Item("i", "An item"), Item("", "No id")],
        [Person("u", {"age": 3})],
    )
    report = ingest(source, lake, connection, now=NOW)
    assert (report.read, report.stored, report.duplicates, report.quarantined) == (6, 2, 1, 3)
    assert (report.items, report.people) == (1, 1)
    assert stored(lake, connection) == ["e1", "e2"]
    rows = connection.execute("SELECT file, line, reason FROM quarantine ORDER BY quarantine_id").fetchall()
    assert ("events.csv", 4, "value is not a number") in rows
    assert any("200 bytes long; at most 128" in reason for _, _, reason in rows)
    assert len(rows) == 4


def test_the_most_frequent_reasons_are_told_without_anybodys_values(lake: Lake, connection: psycopg.Connection) -> None:
    said: list[str] = []
    late = [
        BadRow("e.csv", line, f"occurred_at '{line} ann@x' is not a time (iso): Invalid isoformat string: '{line}'", "")
        for line in (7, 8, 9)
    ]
    early = [BadRow("e.csv", 10 + n, f"occurred_at {17e8 + n:.0f} is not a time (seconds): …", "") for n in (1, 2)]
    unknown = Event("ann@x", "ann@x", "i", "stare", None, days_ago(1))
    source = ListSource([event(1, days_ago(3)), *late, *early, unknown], [Item("", "No id")], [])
    ingest(source, lake, connection, now=NOW, progress=said.append)
    told = [line for line in said if line.startswith("quarantined")]
    assert told[0] == (
        "quarantined 3: occurred_at … is not a time (iso): Invalid isoformat string: … (first: e.csv line 7)"
    )
    assert told[1] == "quarantined 2: occurred_at … is not a time (seconds): … (first: e.csv line 11)"
    assert any(line.startswith("quarantined 1: item_id is empty (first: catalogue") for line in told)
    assert "ann@x" not in "".join(said)
    assert "table `quarantine`" in said[-1]


def test_a_second_load_stores_only_what_is_new(lake: Lake, connection: psycopg.Connection) -> None:
    ingest(ListSource([event(1, days_ago(3)), event(2, days_ago(2))]), lake, connection, now=NOW)
    again = ingest(ListSource([event(1, days_ago(3)), event(2, days_ago(2))]), lake, connection, now=NOW)
    assert again.skipped
    more = ListSource([event(1, days_ago(3)), event(3, days_ago(3))], version="2")
    report = ingest(more, lake, connection, now=NOW)
    assert (report.stored, report.duplicates) == (1, 1)
    assert stored(lake, connection) == ["e1", "e2", "e3"]
    assert dict(lake.days(connection)) == {days_ago(3).date(): 2, days_ago(2).date(): 1}


def test_many_days_across_many_batches_lose_nothing(
    lake: Lake, connection: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH_ROWS", 1000)
    events = [event(n, days_ago(200) + timedelta(minutes=(n * 7919) % 280_000)) for n in range(150_000)]
    report = ingest(ListSource(events), lake, connection, now=NOW)
    assert report.stored == 150_000
    assert lake.events(connection).count_rows() == 150_000
    table = lake.events(connection).to_table(columns=["event_id"])
    assert len(set(table["event_id"].to_pylist())) == 150_000


def test_a_load_that_dies_leaves_nothing_and_can_be_repeated(lake: Lake, connection: psycopg.Connection) -> None:
    class Dying(ListSource):
        def events(self, since: date | None = None):  # type: ignore[no-untyped-def]
            yield from self.event_rows
            raise OSError("the disk is gone")

    with pytest.raises(OSError, match="disk"):
        ingest(Dying([event(1, days_ago(2))], [Item("i", "An item")]), lake, connection, now=NOW)
    counts = [
        connection.execute(f"SELECT count(*) FROM {table}").fetchone()
        for table in ("items", "lake_files", "ingests", "user_history", "recent_events")
    ]
    assert counts == [(0,)] * 5
    assert ingest(ListSource([event(1, days_ago(2))]), lake, connection, now=NOW).stored == 1


def test_a_file_that_disappears_between_write_and_commit_is_noticed_by_count(
    lake: Lake, connection: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Lake, "_write", lambda self, path, tables: sum(table.num_rows for table in tables) - 1)
    with pytest.raises(Exception, match="events had to be written"):
        ingest(ListSource([event(1, days_ago(2))]), lake, connection, now=NOW)


def test_times_are_shifted_by_whole_days(lake: Lake, connection: psycopg.Connection) -> None:
    ingest(ListSource([event(1, datetime(1998, 1, 1, 5, tzinfo=UTC))]), lake, connection, shift_days=7, now=NOW)
    assert dict(lake.days(connection)) == {date(1998, 1, 8): 1}


def test_online_tables_get_recent_events_and_the_last_200_of_each_person(
    lake: Lake, connection: psycopg.Connection
) -> None:
    old = [event(n, days_ago(100) + timedelta(minutes=n)) for n in range(250)]
    ingest(ListSource([*old, event(999, days_ago(1))]), lake, connection, now=NOW)
    assert connection.execute("SELECT event_id FROM recent_events").fetchall() == [("e999",)]
    history = connection.execute("SELECT event_id FROM user_history ORDER BY occurred_at").fetchall()
    assert [row[0] for row in history] == [f"e{n}" for n in range(51, 250)] + ["e999"]


def test_posted_events_are_drained_exactly_once(lake: Lake, connection: psycopg.Connection) -> None:
    at = days_ago(1) + timedelta(hours=3)
    connection.execute("INSERT INTO event_keys VALUES ('p1', %s)", (at,))
    connection.execute(
        "INSERT INTO recent_events (event_id, occurred_at, user_id, item_id, kind) VALUES ('p1', %s, 'u', 'i', 'like')",
        (at,),
    )
    connection.commit()
    day = at.date()
    assert drain(connection, lake, day - timedelta(days=5), day - timedelta(days=1)) == 0
    assert drain(connection, lake, day, day) == 1
    assert drain(connection, lake, day, day) == 0
    assert stored(lake, connection) == ["p1"]


def test_a_lake_in_s3_holds_the_same(connection: psycopg.Connection, s3_bucket: str) -> None:
    lake = Lake(f"{s3_bucket}/some/lake")
    ingest(ListSource([event(1, days_ago(3)), event(2, days_ago(2))]), lake, connection, now=NOW)
    ingest(ListSource([event(3, days_ago(2))], version="2"), lake, connection, now=NOW)
    assert stored(lake, connection) == ["e1", "e2", "e3"]


def test_an_unusable_lake_url_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"LAKE_URL 'ftp://x' cannot be used: a lake lies under file:// or s3://"):
        Lake("ftp://x")
