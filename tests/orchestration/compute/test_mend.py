"""A damaged lake: the error names day, file and way out, and the way out brings back what there still is."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
import pytest
from conftest import TODAY, days_ago
from worlds import ListSource, post

from orchestration.compute.explain import explain
from orchestration.compute.forget import holdings
from orchestration.compute.ingest import drain, ingest
from orchestration.compute.lake import Lake
from orchestration.compute.materialise import materialise
from orchestration.compute.measures import measure_events
from orchestration.compute.mend import mend
from schemas.errors import LakeError
from schemas.events import Event, Item
from schemas.views import USER_ACTIVITY

NOW = TODAY + timedelta(hours=12)
DAY = days_ago(3).date()
FIRST, LAST = days_ago(4).date(), days_ago(1).date()
SOURCE = [
    Event(f"e{n}", f"u{n % 5}", "i0", "rating", 3.0, days_ago(4 - n % 4) + timedelta(hours=1)) for n in range(400)
]


def load(connection: psycopg.Connection, lake: Lake, events: list[Event], version: str = "1") -> int:
    stored = ingest(ListSource(list(events), [Item("i0", "Item")], version=version), lake, connection, now=NOW).stored
    connection.commit()
    return stored


def file(connection: psycopg.Connection, lake: Lake, day: date) -> Path:
    (path,) = connection.execute("SELECT path FROM lake_files WHERE day = %s", (day,)).fetchone() or ("",)
    connection.commit()
    return Path(urlsplit(lake.url).path) / path


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def spoil(path: Path) -> None:
    """Every column is lost, while the footer is whole."""
    whole = path.read_bytes()
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    path.write_bytes(whole[:4] + bytes(footer - 4) + whole[footer:])


DAMAGE: list[Callable[[Path], None]] = [cut, spoil, Path.unlink]


def everything(connection: psycopg.Connection, lake: Lake) -> list[tuple[object, ...]]:
    """The lake's events, whole, and the ids that are taken."""
    rows = lake.events(connection).to_table().sort_by("event_id").to_pylist()
    keys = connection.execute("SELECT event_id FROM event_keys ORDER BY 1").fetchall()
    connection.commit()
    return [tuple(row.values()) for row in rows] + keys


@pytest.mark.parametrize("damage", DAMAGE)
def test_whoever_reads_a_damaged_file_says_which_day_and_the_way_out(
    damage: Callable[[Path], None], lake: Lake, connection: psycopg.Connection, database: str
) -> None:
    load(connection, lake, SOURCE)
    path = file(connection, lake, DAY)
    damage(path)
    words = rf"file of {DAY} cannot be used, .*{path.name}: it is (missing|damaged).*`make mend-lake`"
    with pytest.raises(LakeError, match=words):
        load(connection, lake, [*SOURCE, Event("new", "u", "i0", "rating", 3.0, days_ago(3))], "2")
    connection.rollback()
    post(database, [Event("posted", "u1", "i0", "rating", 3.0, days_ago(3) + timedelta(hours=2))])
    readers: list[Callable[[], object]] = [
        lambda: materialise(USER_ACTIVITY, FIRST, LAST, url=database, lake=lake),
        lambda: measure_events(connection, lake, FIRST, LAST),
        lambda: drain(connection, lake, None, LAST),
        lambda: holdings(database, lake, "u1"),
        lambda: explain(USER_ACTIVITY, ("u1",), days_ago(0), url=database, lake=lake),
    ]
    for read in readers:
        with pytest.raises(LakeError, match=words):
            read()
        connection.rollback()


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_day_is_put_aside_and_the_next_load_fills_it_with_the_very_same(
    damage: Callable[[Path], None], lake: Lake, connection: psycopg.Connection, database: str
) -> None:
    load(connection, lake, SOURCE)
    materialise(USER_ACTIVITY, FIRST, LAST, url=database, lake=lake)
    before = everything(connection, lake)
    damaged = file(connection, lake, DAY)
    damage(damaged)
    # Out of the window that Postgres keeps, all has to come from the source.
    connection.execute("DELETE FROM recent_events")
    connection.commit()

    (told,) = mend(lake, connection, dry_run=True)
    connection.commit()
    assert file(connection, lake, DAY) == damaged
    assert mend(lake, connection) == [told]
    connection.commit()
    assert (told.damage.day, told.damage.rows, told.restored, told.recent, told.waiting) == (DAY, 100, 0, 0, 100)
    assert mend(lake, connection) == []
    connection.commit()
    stale = connection.execute("SELECT count(*) FROM feature_ledger WHERE stale_at IS NOT NULL").fetchone()
    assert stale == ((LAST - DAY).days + 1,)
    row = connection.execute("SELECT file, reason, row FROM quarantine WHERE source = 'lake'").fetchone()
    assert row == (told.damage.path, told.damage.reason, f"100 events of {DAY}")
    connection.commit()

    # The very source that was loaded before; and nothing that comes back of that day is late.
    assert load(connection, lake, SOURCE) == 100
    assert everything(connection, lake) == before
    assert load(connection, lake, SOURCE) == 100  # what that load told, and not loaded again
    late = Event("late", "u1", "i0", "rating", 3.0, days_ago(3))
    assert load(connection, lake, [*SOURCE, late], "2") == 1
    (known,) = [row["known_at"] for row in lake.events(connection).to_table().to_pylist() if row["event_id"] == "late"]
    assert known == NOW


def test_the_file_before_and_what_postgres_still_has_come_back_without_the_source(
    lake: Lake, connection: psycopg.Connection, database: str
) -> None:
    load(connection, lake, SOURCE)
    post(database, [Event("posted", "u1", "i0", "rating", 3.0, days_ago(3) + timedelta(hours=2))])
    assert drain(connection, lake, None, LAST) == 1
    connection.commit()
    before = everything(connection, lake)
    cut(file(connection, lake, DAY))
    (told,) = mend(lake, connection)
    connection.commit()
    assert (told.damage.rows, told.restored, told.recent, told.waiting) == (101, 100, 1, 0)
    assert drain(connection, lake, None, LAST) == 1
    connection.commit()
    assert everything(connection, lake) == before
    # The same without a file before: then Postgres has it all.
    cut(file(connection, lake, DAY))
    (_, previous) = connection.execute("SELECT path, previous FROM lake_files WHERE day = %s", (DAY,)).fetchone() or (
        "",
        "",
    )
    (Path(urlsplit(lake.url).path) / previous).unlink()
    connection.commit()
    (told,) = mend(lake, connection)
    connection.commit()
    assert (told.restored, told.recent, told.waiting) == (0, 101, 0)
    assert drain(connection, lake, None, LAST) == 101
    connection.commit()
    assert everything(connection, lake) == before
    # Nothing comes twice when the source is loaded again.
    assert load(connection, lake, SOURCE) == 0


def test_an_id_of_a_day_that_was_put_aside_can_be_posted_again(
    lake: Lake, connection: psycopg.Connection, database: str
) -> None:
    load(connection, lake, SOURCE)
    connection.execute("DELETE FROM recent_events")
    connection.commit()
    file(connection, lake, DAY).unlink()
    mend(lake, connection)
    connection.commit()
    assert post(database, [next(one for one in SOURCE if one.event_id == "e1")]) == {"e1"}  # it was of that day
    assert load(connection, lake, SOURCE) == 100
    assert drain(connection, lake, None, LAST) == 0
    assert len(lake.events(connection).to_table()) == len(SOURCE)
