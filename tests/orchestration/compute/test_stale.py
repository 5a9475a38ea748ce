"""Late events: what was built before them is stale until it is built again, and no mark is lost on the way."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import date, datetime, timedelta

import numpy as np
import psycopg
import pytest
from conftest import TODAY, days_ago
from worlds import ListSource, post

from orchestration.compute import materialise as module
from orchestration.compute.ingest import drain, ingest
from orchestration.compute.lake import Lake
from orchestration.compute.materialise import materialise
from orchestration.compute.point_in_time import PointInTime
from orchestration.compute.stale import (
    LEDGER_LOCK,
    mark_stale,
    overtaken_days,
    rebuild_parts,
    staleness,
    to_rebuild,
)
from schemas.events import Event, Item
from schemas.online_sql import rows_table
from schemas.views import ITEM_ACTIVITY, USER_ACTIVITY, VIEWS

NOW = TODAY + timedelta(hours=12)
YESTERDAY = (TODAY - timedelta(days=1)).date()
ITEMS = [Item(f"i{n}", f"Item {n}", categories=("a",) if n % 2 else ("a", "b")) for n in range(4)]
WINDOW = USER_ACTIVITY.max_window_days


def day(back: int) -> date:
    return days_ago(back).date()


def event(number: int, back: float, *, known_at: datetime | None = None, user: str = "u") -> Event:
    return Event(f"e{number}", user, f"i{number % 4}", "rating", float(number % 5 + 1), days_ago(back), known_at)


def load(connection: psycopg.Connection, lake: Lake, events: list[Event], version: str) -> None:
    ingest(ListSource(list(events), list(ITEMS), version=version), lake, connection, now=NOW)
    connection.commit()


def build(database: str, lake: Lake, first: date, last: date) -> None:
    for view in VIEWS:
        materialise(view, first, last, url=database, lake=lake)


def stale(connection: psycopg.Connection, view: str) -> list[date]:
    rows = connection.execute(
        "SELECT partition_date FROM feature_ledger WHERE view = %s AND stale_at IS NOT NULL ORDER BY 1", (view,)
    ).fetchall()
    connection.commit()
    return [found for (found,) in rows]


def tables(connection: psycopg.Connection) -> dict[str, list[tuple[object, ...]]]:
    """Every snapshot and every online row, whole, and the ledger but for its instants."""
    found = {
        view.name: connection.execute(f"SELECT * FROM features.{view.name} ORDER BY 1, 2, 3").fetchall()
        for view in VIEWS
    }
    for view in VIEWS:
        name, keys = view.name, ", ".join(view.entity.keys)
        found[f"online {name}"] = connection.execute(
            f"SELECT {keys}, {name}_date, {name} FROM {rows_table(view.entity)} WHERE {name}_date IS NOT NULL ORDER BY {keys}"
        ).fetchall()
    found["ledger"] = connection.execute(
        "SELECT view, partition_date, definition_hash, engine, rows, events, stale_at IS NULL FROM feature_ledger ORDER BY 1, 2"
    ).fetchall()
    connection.commit()
    return found


# --- marks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["a source", "a post"])
def test_a_late_event_marks_the_partitions_that_cover_its_day_until_they_are_rebuilt(
    database: str, lake: Lake, connection: psycopg.Connection, way: str
) -> None:
    load(connection, lake, [event(n, n) for n in range(1, 12)], "1")
    build(database, lake, day(10), YESTERDAY)
    load(connection, lake, [event(50, 0), event(51, -0.01)], "2")  # today: no partition covers it
    assert [stale(connection, view.name) for view in VIEWS] == [[], [], []]
    if way == "a source":
        load(connection, lake, [event(100, 6.5)], "3")
    else:
        assert post(database, [event(100, 6.5)]) == {"e100"}
        assert [stale(connection, view.name) for view in VIEWS] == [[], [], []]  # it is not in the lake yet
        assert to_rebuild(connection, day(10), YESTERDAY) == {
            "events": {day(7)},
            **{view.name: {day(n) for n in range(1, 8)} for view in VIEWS},
        }
        assert drain(connection, lake, None, YESTERDAY) == 1
        connection.commit()
    expected = [day(n) for n in range(7, 0, -1)]
    for view in VIEWS:
        assert stale(connection, view.name) == expected
    assert to_rebuild(connection, day(10), YESTERDAY) == {view.name: set(expected) for view in VIEWS}
    found = staleness(connection, USER_ACTIVITY.name)
    assert (found.partitions, found.first, found.last) == (7, day(7), YESTERDAY)
    connection.commit()
    build(database, lake, day(7), day(4))
    assert stale(connection, USER_ACTIVITY.name) == [day(3), day(2), day(1)]
    build(database, lake, day(3), YESTERDAY)
    assert to_rebuild(connection, day(10), YESTERDAY) == {}
    (seen,) = connection.execute(
        "SELECT sum(n_180d) FROM features.user_activity WHERE partition_date = %s", (YESTERDAY,)
    ).fetchone() or (0,)
    assert seen == 12


def test_a_mark_ends_with_the_longest_window_and_says_since_when(
    database: str, lake: Lake, connection: psycopg.Connection
) -> None:
    load(connection, lake, [event(n, n) for n in (1, WINDOW + 2)], "1")
    for back in (WINDOW + 1, 3, 2, 1):
        build(database, lake, day(back), day(back))
    load(connection, lake, [event(100, WINDOW + 1)], "2")
    # The window of the partition `WINDOW` days later begins with the day after.
    assert stale(connection, USER_ACTIVITY.name) == [day(WINDOW + 1), day(3), day(2)]
    before = staleness(connection, USER_ACTIVITY.name).since
    connection.commit()
    load(connection, lake, [event(101, WINDOW + 1)], "3")
    assert staleness(connection, USER_ACTIVITY.name).since == before


def test_a_repeated_id_with_other_content_changes_nothing_and_marks_nothing(
    database: str, lake: Lake, connection: psycopg.Connection
) -> None:
    load(connection, lake, [event(n, n) for n in range(1, 6)], "1")
    build(database, lake, day(5), YESTERDAY)
    before = tables(connection)
    other = Event("e3", "somebody", "i0", "view", 1.0, days_ago(4))
    load(connection, lake, [other], "2")
    assert post(database, [other]) == set()
    assert to_rebuild(connection, day(10), YESTERDAY) == {}
    build(database, lake, day(5), YESTERDAY)
    assert tables(connection) == before


def test_a_rebuilt_old_snapshot_leaves_newer_online_rows_alone(
    database: str, lake: Lake, connection: psycopg.Connection
) -> None:
    load(connection, lake, [event(n, n) for n in range(1, 6)], "1")
    build(database, lake, day(5), YESTERDAY)
    before = tables(connection)
    load(connection, lake, [event(100, 4)], "2")
    build(database, lake, day(4), day(2))
    after = tables(connection)
    for view in VIEWS:
        assert after[f"online {view.name}"] == before[f"online {view.name}"]
        assert after[view.name] != before[view.name]
    build(database, lake, YESTERDAY, YESTERDAY)
    assert tables(connection)[f"online {USER_ACTIVITY.name}"] != before[f"online {USER_ACTIVITY.name}"]


@pytest.mark.parametrize("built_before", [True, False])
@pytest.mark.parametrize("moment", ["load_item_categories", "_reports"])
def test_an_event_that_comes_while_a_partition_is_built_leaves_it_stale(
    database: str,
    lake: Lake,
    connection: psycopg.Connection,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
    built_before: bool,
) -> None:
    """After the lake was read and before the ledger is written: also where there is no row yet that could be marked."""
    load(connection, lake, [event(n, n) for n in range(1, 9)], "1")
    if built_before:
        build(database, lake, day(8), YESTERDAY)
        load(connection, lake, [event(100, 7)], "2")
    real: Callable[..., object] = getattr(module, moment)

    def late(*arguments: object) -> object:
        found = real(*arguments)
        with psycopg.connect(database, options="-c TimeZone=UTC") as own:
            load(own, lake, [event(101, 4)], "3")
        return found

    monkeypatch.setattr(module, moment, late)
    materialise(USER_ACTIVITY, day(8), YESTERDAY, url=database, lake=lake)
    monkeypatch.undo()
    assert stale(connection, USER_ACTIVITY.name) == [day(n) for n in (4, 3, 2, 1)]
    materialise(USER_ACTIVITY, day(4), YESTERDAY, url=database, lake=lake)
    assert stale(connection, USER_ACTIVITY.name) == []


def test_a_slow_build_that_read_an_older_lake_does_not_clear_what_a_quick_one_repaired(
    database: str, lake: Lake, connection: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(connection, lake, [event(n, n) for n in range(1, 9)], "1")
    real = module._reports

    def overtaken(*arguments: object) -> object:
        monkeypatch.setattr(module, "_reports", real)
        with psycopg.connect(database, options="-c TimeZone=UTC") as own:
            load(own, lake, [event(101, 4)], "3")
        materialise(USER_ACTIVITY, day(8), YESTERDAY, url=database, lake=lake)
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_reports", overtaken)
    materialise(USER_ACTIVITY, day(8), YESTERDAY, url=database, lake=lake)
    assert stale(connection, USER_ACTIVITY.name) == [day(n) for n in (4, 3, 2, 1)]


def test_a_mark_and_a_build_wait_for_each_other(database: str, lake: Lake, connection: psycopg.Connection) -> None:
    load(connection, lake, [event(n, n) for n in range(1, 4)], "1")
    mark_stale(connection, [day(3)])  # an event is being stored
    thread = threading.Thread(
        target=materialise, args=(USER_ACTIVITY, day(3), YESTERDAY), kwargs={"url": database, "lake": lake}
    )
    thread.start()
    waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = %s AND NOT granted"
    end = time.monotonic() + 60
    while connection.execute(waiting, (LEDGER_LOCK,)).fetchone() == (0,):
        assert thread.is_alive(), "the build did not wait"
        assert time.monotonic() < end, "the build does not come to the lock"
        time.sleep(0.05)
    connection.execute(
        "UPDATE lake_files SET path = 'events/another', generation = generation + 1 WHERE day = %s", (day(2),)
    )
    connection.commit()
    thread.join(60)
    assert stale(connection, USER_ACTIVITY.name) == [day(2), day(1)]


def test_days_that_changed_overtake_only_what_covers_them() -> None:
    days = [day(n) for n in (5, 4, 3, 2, 1)]
    read = {day(9): "9", day(4): "4", day(3): "3"}
    assert overtaken_days(days, 3, read, read) == set()
    assert overtaken_days(days, 3, read, read | {day(4): "changed"}) == {day(4), day(3), day(2)}
    assert overtaken_days(days, 3, read, read | {day(6): "new"}) == {day(5), day(4)}
    assert overtaken_days(days, 3, read, {day(9): "9", day(4): "4"}) == {day(3), day(2), day(1)}


def test_what_is_to_be_rebuilt_is_one_run_a_stretch_with_events_first() -> None:
    wanted = {"events": {day(9)}, "user_activity": {day(9), day(8), day(3)}, "item_activity": {day(3), day(2)}}
    assert rebuild_parts(wanted) == [
        (("events", "user_activity"), day(9), day(8)),
        (("user_activity", "item_activity"), day(3), day(2)),
    ]
    assert rebuild_parts({}) == []


# --- training ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["a source", "a post", "a source that says when"])
def test_a_rebuilt_partition_does_not_leak_a_late_event_into_labels_from_before_it_was_known(
    database: str, lake: Lake, connection: psycopg.Connection, way: str
) -> None:
    known_at = days_ago(2)
    load(connection, lake, [event(n, n) for n in range(1, 9)], "1")
    build(database, lake, day(8), YESTERDAY)
    labels = [days_ago(back) + timedelta(hours=1) for back in (4, 3, 1)]

    def at_labels() -> list[float]:
        at = np.array([int(label.timestamp() * 1e6) for label in [*labels, NOW + timedelta(days=3)]])
        with PointInTime(lake, connection) as ask:
            rows = ask.features(USER_ACTIVITY, {"user_id": np.array(["u"] * len(at))}, at)
        connection.commit()
        place = [feature.name for feature in USER_ACTIVITY.features].index("events_180d")
        return [round(float(np.expm1(value)), 3) for value in rows.values[:, place]]

    before = at_labels()
    match way:
        case "a post":
            post(database, [event(100, 6.5)])
            drain(connection, lake, None, YESTERDAY)
        case "a source":
            load(connection, lake, [event(100, 6.5)], "2")
        case _:
            load(connection, lake, [event(100, 6.5, known_at=known_at)], "2")
    connection.commit()
    assert stale(connection, USER_ACTIVITY.name) == [day(n) for n in range(7, 0, -1)]
    build(database, lake, day(8), YESTERDAY)
    assert stale(connection, USER_ACTIVITY.name) == []
    snapshot = connection.execute(
        "SELECT n_180d FROM features.user_activity WHERE partition_date = %s", (day(5),)
    ).fetchone()
    assert snapshot == (5,)  # e5 to e8, and the late one
    later = [0, 0, 1 if way == "a source that says when" else 0, 1]
    assert at_labels() == [value + more for value, more in zip(before, later, strict=True)]


# --- any order, any repetition, at the same time, killed ---------------------------------------------------------

KILLED = """
import os, signal
from datetime import date
from orchestration.compute import materialise as module
from orchestration.compute.lake import Lake
from schemas.views import VIEWS
module.{step} = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
[view] = [view for view in VIEWS if view.name == {view!r}]
module.materialise(view, date.fromisoformat({first!r}), date.fromisoformat({last!r}), url={url!r}, lake=Lake({lake!r}))
"""


def kill_a_build(pick: random.Random, database: str, lake: Lake, first: date, last: date) -> None:
    """A process that is killed while it builds: before it writes, or with everything written and not committed."""
    code = KILLED.format(
        step=pick.choice(["_reports", "put_rows_sql"]),
        view=pick.choice(VIEWS).name,
        first=first.isoformat(),
        last=last.isoformat(),
        url=database,
        lake=lake.url,
    )
    subprocess.run([sys.executable, "-c", code], check=False, env=os.environ)


@pytest.mark.parametrize(
    "seed", [1, pytest.param(2, marks=pytest.mark.prove), pytest.param(3, marks=pytest.mark.prove)]
)
def test_any_order_repetition_concurrency_and_kills_with_late_events_between_give_the_same_tables(
    database: str, lake: Lake, connection: psycopg.Connection, seed: int
) -> None:
    """Against a quiet build of the same events: snapshots, online rows and ledger are equal as whole tables."""
    pick = random.Random(seed)
    events = [
        Event(f"e{n}", f"u{n % 5}", f"i{n % 4}", "rating", float(n % 5 + 1), days_ago(pick.uniform(0.01, 11.9)))
        for n in range(160)
    ]
    first, days = day(12), [day(back) for back in range(12, 0, -1)]
    load(connection, lake, events[:80], "1")
    failed: list[BaseException] = []

    def building(own: random.Random) -> None:
        for _ in range(6):
            start = own.randrange(len(days))
            end = min(start + own.randrange(4), len(days) - 1)
            materialise(own.choice(VIEWS), days[start], days[end], url=database, lake=lake)

    def arriving(own: random.Random) -> None:
        for start in range(80, 160, 20):
            batch = own.sample(events[start : start + 20], 20)
            post(database, batch[:14])
            with psycopg.connect(database, options="-c TimeZone=UTC") as mine:
                ingest(ListSource(batch[8:], list(ITEMS), version=f"{start}"), lake, mine, now=NOW)
                drain(mine, lake, None, YESTERDAY)

    def run(work: Callable[[random.Random], None], number: int) -> None:
        try:
            work(random.Random(seed * 100 + number))
        except BaseException as error:  # noqa: BLE001  # a thread's error is told below
            failed.append(error)

    threads = [
        threading.Thread(target=run, args=(work, number))
        for number, work in enumerate([building, building, building, arriving])
    ]
    for thread in threads:
        thread.start()
    for _ in range(2):
        start = pick.randrange(8)
        kill_a_build(pick, database, lake, days[start], days[start + 3])
    for thread in threads:
        thread.join()
    assert failed == []
    # The next run: what is missing, and what is stale.
    drain(connection, lake, None, YESTERDAY)
    connection.commit()
    for view in VIEWS:
        built = {
            one
            for (one,) in connection.execute("SELECT partition_date FROM feature_ledger WHERE view = %s", (view.name,))
        }
        todo = (set(days) - built) | to_rebuild(connection, first, YESTERDAY).get(view.name, set())
        connection.commit()
        for one in pick.sample(sorted(todo), len(todo)):
            materialise(view, one, one, url=database, lake=lake)
    assert to_rebuild(connection, first, YESTERDAY) == {}
    found = tables(connection)
    assert len(found["ledger"]) == len(VIEWS) * len(days)
    assert sorted(lake.events(connection).to_table()["event_id"].to_pylist()) == sorted(e.event_id for e in events)
    connection.execute(f"TRUNCATE feature_ledger, {', '.join(f'features.{view.name}' for view in VIEWS)}")
    for view in VIEWS:
        connection.execute(f"TRUNCATE {rows_table(view.entity)}")
    connection.commit()
    build(database, lake, first, YESTERDAY)
    quiet = tables(connection)
    for name, rows in quiet.items():
        assert found[name] == rows, name


def test_a_killed_build_leaves_the_mark(database: str, lake: Lake, connection: psycopg.Connection) -> None:
    load(connection, lake, [event(n, n) for n in range(1, 6)], "1")
    build(database, lake, day(5), YESTERDAY)
    load(connection, lake, [event(100, 3)], "2")
    before = tables(connection)
    code = KILLED.format(
        step="put_rows_sql", view=ITEM_ACTIVITY.name, first=day(5).isoformat(), last=YESTERDAY.isoformat(),
        url=database, lake=lake.url,
    )  # fmt: skip
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    assert tables(connection) == before
    assert stale(connection, ITEM_ACTIVITY.name) == [day(3), day(2), day(1)]
