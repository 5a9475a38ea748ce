"""The lake: one file a day whatever happens, what is read to drain, what killed runs leave, columns that come and go."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from datetime import date, datetime, timedelta
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from conftest import TODAY, days_ago
from worlds import ListSource, post

from orchestration.compute.file_roots import list_files
from orchestration.compute.ingest import drain, ingest
from orchestration.compute.lake import EVENT_SCHEMA, Lake
from orchestration.compute.vacuum import vacuum
from schemas.errors import LarderError, SettingsError
from schemas.events import Event

NOW = TODAY + timedelta(hours=12)


def event(number: int, at: datetime, user: str = "u") -> Event:
    return Event(f"e{number}", user, "i", "view", None, at)


def stored(lake: Lake, connection: psycopg.Connection) -> list[str]:
    ids = sorted(lake.events(connection).to_table()["event_id"].to_pylist())
    connection.rollback()
    return ids


def files(lake: Lake) -> list[Path]:
    return sorted(path for path in Path(urlsplit(lake.url).path).rglob("*") if path.is_file())


def named(lake: Lake, connection: psycopg.Connection) -> dict[date, Path]:
    rows = connection.execute("SELECT day, path FROM lake_files ORDER BY day").fetchall()
    connection.rollback()
    return {day: Path(urlsplit(lake.url).path) / path for day, path in rows}


@pytest.fixture(params=["file", "s3"])
def any_lake(request: pytest.FixtureRequest, tmp_path: Path) -> Lake:
    """A lake in a folder, and one behind moto's HTTP server."""
    if request.param == "file":
        return Lake((tmp_path / "lake").as_uri())
    return Lake(f"{request.getfixturevalue('s3_bucket')}/some/lake")


# --- draining ----------------------------------------------------------------------------------------------------


def test_a_drain_reads_only_the_days_it_writes_to(database: str, lake: Lake, connection: psycopg.Connection) -> None:
    ingest(ListSource([event(n, days_ago(n)) for n in range(1, 9)]), lake, connection, now=NOW)
    connection.commit()
    for day, file in named(lake, connection).items():
        if day != days_ago(3).date():
            file.unlink()  # reading it would fail
    assert post(database, [event(20, days_ago(3)), event(21, days_ago(3))]) == {"e20", "e21"}
    assert drain(connection, lake, None, TODAY.date()) == 2
    assert pq.read_table(named(lake, connection)[days_ago(3).date()])["event_id"].to_pylist() == ["e20", "e21", "e3"]


def test_an_id_that_any_day_of_the_lake_has_is_a_repeat_when_posted(
    database: str, lake: Lake, connection: psycopg.Connection
) -> None:
    """Also of a day long ago, for another day, and by a source that brings what was posted before."""
    ingest(ListSource([event(1, days_ago(300))]), lake, connection, now=NOW)
    connection.commit()
    assert post(database, [event(1, days_ago(1)), event(2, days_ago(1))]) == {"e2"}
    report = ingest(ListSource([event(2, days_ago(5)), event(3, days_ago(5))], version="2"), lake, connection, now=NOW)
    connection.commit()
    assert report.stored == 2
    assert connection.execute("SELECT n FROM online.user_tiles WHERE day = %s", (days_ago(1).date(),)).fetchall() == [
        (1,)
    ]
    assert drain(connection, lake, None, TODAY.date()) == 0  # it came into the lake by the source
    assert stored(lake, connection) == ["e1", "e2", "e3"]


def test_days_from_before_the_index_are_indexed_with_the_next_write(
    database: str, lake: Lake, connection: psycopg.Connection
) -> None:
    ingest(ListSource([event(1, days_ago(300)), event(2, days_ago(2))]), lake, connection, now=NOW)
    connection.execute("DELETE FROM event_keys")  # what a database of an older release holds
    connection.execute("UPDATE lake_files SET keyed = false")
    connection.commit()
    assert post(database, [event(1, days_ago(1)), event(3, days_ago(1))]) == {"e1", "e3"}
    assert drain(connection, lake, None, TODAY.date()) == 1
    assert stored(lake, connection) == ["e1", "e2", "e3"]
    assert connection.execute("SELECT count(*) FROM lake_files WHERE NOT keyed").fetchone() == (0,)
    assert connection.execute("SELECT count(*) FROM recent_events WHERE NOT drained").fetchone() == (0,)
    connection.commit()
    assert post(database, [event(2, days_ago(1))]) == set()


KILLED = """
import os, signal, psycopg
from datetime import date
from orchestration.compute import ingest as module
from orchestration.compute.lake import Lake
{stop}
with psycopg.connect({url!r}, options='-c TimeZone=UTC') as connection:
    module.drain(connection, Lake({lake!r}), None, date.fromisoformat({last!r}))
    os.kill(os.getpid(), signal.SIGKILL)
"""
DIE = "lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)"


@pytest.mark.parametrize(
    ("stop", "left"),
    [
        # In the middle of a file; between the files and the commit; after the commit.
        (
            "def die(self, path, tables):\n"
            "    with self._fs.open_output_stream(f'{self.root}/{path}') as stream:\n"
            "        stream.write(b'PAR1')\n"
            "        stream.flush()\n"
            "        os.kill(os.getpid(), signal.SIGKILL)\n"
            "Lake._write = die",
            1,
        ),
        (f"module.online.trim_tiles = {DIE}", 2),
        ("", 2),
    ],
)
def test_a_killed_drain_loses_nothing_and_doubles_nothing(
    database: str, lake: Lake, connection: psycopg.Connection, stop: str, left: int
) -> None:
    ingest(ListSource([event(1, days_ago(2))]), lake, connection, now=NOW)
    connection.commit()
    before = named(lake, connection)
    post(database, [event(2, days_ago(2)), event(3, days_ago(1))])
    code = KILLED.format(stop=stop, url=database, lake=lake.url, last=TODAY.date().isoformat())
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    if stop:
        assert named(lake, connection) == before
        assert stored(lake, connection) == ["e1"]
        assert len(files(lake)) == len(before) + left
    assert drain(connection, lake, None, TODAY.date()) == (2 if stop else 0)
    connection.commit()
    assert stored(lake, connection) == ["e1", "e2", "e3"]
    assert drain(connection, lake, None, TODAY.date()) == 0


def test_posts_loads_and_drains_at_the_same_time_store_every_id_once(
    database: str, lake: Lake, connection: psycopg.Connection
) -> None:
    failed: list[Exception] = []
    events = [event(n, days_ago(1 + n % 5) + timedelta(seconds=n)) for n in range(120)]

    def run(work: object) -> None:
        try:
            work()  # type: ignore[operator]
        except Exception as error:  # noqa: BLE001  # a thread's error is told below
            failed.append(error)

    def posting(seed: int) -> None:
        order = random.Random(seed).sample(events, len(events))
        for start in range(0, len(order), 15):
            post(database, order[start : start + 15])

    def loading(number: int) -> None:
        with psycopg.connect(database, options="-c TimeZone=UTC") as own:
            ingest(ListSource(events[number::4], version=str(number)), lake, own, now=NOW)

    def draining() -> None:
        for _ in range(6):
            with psycopg.connect(database, options="-c TimeZone=UTC") as own:
                drain(own, lake, None, TODAY.date())

    jobs = [lambda: posting(1), lambda: posting(2), lambda: loading(0), lambda: loading(3), draining, draining]
    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    drain(connection, lake, None, TODAY.date())
    connection.commit()
    assert stored(lake, connection) == sorted(one.event_id for one in events)
    counted = connection.execute("SELECT sum(n) FROM online.item_tiles").fetchone()
    recent = connection.execute("SELECT count(*) FROM recent_events WHERE occurred_at >= %s", (days_ago(4),)).fetchone()
    assert counted == recent
    assert connection.execute("SELECT count(*), count(DISTINCT event_id) FROM recent_events").fetchone() == (120, 120)


# --- one file a day, and what is left over -----------------------------------------------------------------------


def test_a_day_is_one_file_however_often_something_is_added(
    database: str, any_lake: Lake, connection: psycopg.Connection
) -> None:
    for number in range(6):
        post(database, [event(number, days_ago(1) + timedelta(seconds=number))])
        assert drain(connection, any_lake, None, TODAY.date()) == 1
        connection.commit()
    assert connection.execute("SELECT count(*), sum(rows), max(generation) FROM lake_files").fetchone() == (1, 6, 6)
    connection.commit()
    # The current file, and the one before for who began to read earlier.
    assert len(list_files(any_lake._fs, f"{any_lake.root}/events")) == 2
    assert stored(any_lake, connection) == [f"e{n}" for n in range(6)]


def test_a_reader_that_began_before_a_rewrite_reads_the_old_day_to_its_end(
    lake: Lake, connection: psycopg.Connection
) -> None:
    ingest(ListSource([event(1, days_ago(2))]), lake, connection, now=NOW)
    reader = lake.events(connection)
    ingest(ListSource([event(2, days_ago(2))], version="2"), lake, connection, now=NOW)
    connection.commit()
    assert vacuum(lake, connection, hours=24, dry_run=False) == []
    assert reader.to_table()["event_id"].to_pylist() == ["e1"]
    assert stored(lake, connection) == ["e1", "e2"]


def test_the_vacuum_takes_what_is_old_and_nobodys_and_nothing_else(lake: Lake, connection: psycopg.Connection) -> None:
    for number in (1, 2):
        ingest(ListSource([event(number, days_ago(2))], version=str(number)), lake, connection, now=NOW)
    connection.commit()
    (current,) = named(lake, connection).values()
    (previous,) = set(files(lake)) - {current}
    folder = current.parent
    old_crash, young_crash, foreign = (
        folder / "000003-0123abcd.parquet",
        folder / "000003.parquet",
        folder / "notes.txt",
    )
    another_day = folder.parent / "day=1999-01-01" / "000001-0123abcd.parquet"
    another_day.parent.mkdir()
    for file in (old_crash, young_crash, foreign, another_day):
        file.write_bytes(b"half a file")
    two_days_ago = time.time() - 2 * 86_400
    for file in (current, previous, old_crash, foreign, another_day):
        os.utime(file, (two_days_ago, two_days_ago))

    def gone(hours: float, dry_run: bool) -> set[str]:
        found = vacuum(lake, connection, hours=hours, dry_run=dry_run)
        connection.commit()
        return {Path(orphan.path).name for orphan in found}

    assert gone(24, True) == gone(24, True) == {old_crash.name, another_day.name}
    assert old_crash.exists()
    assert gone(24, False) == {old_crash.name, another_day.name}
    assert set(files(lake)) == {current, previous, young_crash, foreign}
    # The file before the current one has been old for long, but was replaced a moment ago.
    connection.execute("UPDATE lake_files SET written_at = now() - INTERVAL '25 hours'")
    assert gone(24, False) == {previous.name}
    assert stored(lake, connection) == ["e1", "e2"]
    ingest(ListSource([event(3, days_ago(2))], version="3"), lake, connection, now=NOW)
    connection.commit()
    assert stored(lake, connection) == ["e1", "e2", "e3"]


def test_the_vacuum_waits_for_writers(database: str, lake: Lake, connection: psycopg.Connection) -> None:
    ingest(ListSource([event(1, days_ago(2))]), lake, connection, now=NOW)
    connection.commit()
    removed: list[object] = []

    def clean() -> None:
        with psycopg.connect(database) as own:
            removed.append(vacuum(lake, own, hours=1, dry_run=False))

    lake.hold_writes(connection)
    thread = threading.Thread(target=clean)
    thread.start()
    thread.join(1)
    assert thread.is_alive()
    connection.rollback()
    thread.join(10)
    assert removed == [[]]


def test_the_vacuum_refuses_a_lake_that_is_not_this_databases_and_a_short_time(
    lake: Lake, connection: psycopg.Connection
) -> None:
    ingest(ListSource([event(1, days_ago(2))]), lake, connection, now=NOW)
    connection.commit()
    for hours in (0, 0.5, float("nan")):
        with pytest.raises(SettingsError, match="a reader may still be at a file; give 1 or more"):
            vacuum(lake, connection, hours=hours, dry_run=False)
    connection.execute("DELETE FROM lake_files")
    with pytest.raises(LarderError, match="check that LAKE_URL and DATABASE_URL belong to one deployment"):
        vacuum(lake, connection, hours=24, dry_run=False)


# --- columns that come and go ------------------------------------------------------------------------------------


def rewritten(lake: Lake, connection: psycopg.Connection, day: date, table: pa.Table) -> None:
    """Put `table` in place of the day's file, as another release would have written it."""
    path = connection.execute("SELECT path FROM lake_files WHERE day = %s", (day,)).fetchone()
    assert path is not None
    with lake._fs.open_output_stream(f"{lake.root}/{path[0]}") as stream:
        pq.write_table(table, stream)


def test_days_with_fewer_and_more_columns_are_read_together_and_can_be_added_to(
    any_lake: Lake, connection: psycopg.Connection
) -> None:
    days = [days_ago(n).date() for n in (4, 3, 2)]
    events = [Event(f"e{n}", "u", "i", "rating", float(n), days_ago(n)) for n in (4, 3, 2)]
    ingest(ListSource(list(events)), any_lake, connection, now=NOW)
    tables = [any_lake.events(connection, day, day).to_table() for day in days]
    older = (
        tables[0].drop_columns(["value"]).select(["user_id", "event_id", "item_id", "kind", "known_at", "occurred_at"])
    )
    newer = tables[1].append_column("device", pa.array(["phone"]))
    narrower = tables[2].set_column(4, "value", pc.cast(tables[2]["value"], pa.float32()))
    for day, table in zip(days, (older, newer, narrower), strict=True):
        rewritten(any_lake, connection, day, table)
    read = any_lake.events(connection).to_table()
    assert read.schema.names == EVENT_SCHEMA.names
    assert dict(zip(read["event_id"].to_pylist(), read["value"].to_pylist(), strict=True)) == {
        "e4": None, "e3": 3.0, "e2": 2.0,
    }  # fmt: skip
    more = [Event(f"f{n}", "u", "i", "rating", 1.0, days_ago(n)) for n in (4, 3, 2)]
    assert ingest(ListSource(list(more), version="2"), any_lake, connection, now=NOW).stored == 3
    assert stored(any_lake, connection) == ["e2", "e3", "e4", "f2", "f3", "f4"]
