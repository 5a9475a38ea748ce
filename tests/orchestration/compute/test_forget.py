"""Forgetting: after it no table, no file and no later load names the person, and nobody else loses anything."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import TODAY, days_ago
from psycopg import sql
from worlds import ListSource

from inference.store import Store
from orchestration.compute import forget as module
from orchestration.compute.forget import finish, forget, fulfil, holdings, open_requests, request_erasure
from orchestration.compute.ingest import drain, ingest
from orchestration.compute.lake import Lake
from orchestration.compute.materialise import materialise
from schemas.errors import LarderError, UnknownPerson
from schemas.events import Event, Item, Person
from schemas.online_sql import KEPT_DAYS
from schemas.views import ITEM_ACTIVITY, VIEWS

ANNA = "anna.o'hara@example.org"
OTHERS = ("bo", "anna", "anna.o")
NOW = TODAY + timedelta(hours=12)
YESTERDAY = (TODAY - timedelta(days=1)).date()


def world(version: str = "1") -> ListSource:
    """200 events of four people over 40 days; every tenth row cannot be stored, and some of those name Anna."""
    pick = random.Random(7)
    events = []
    for number in range(200):
        user = pick.choice((ANNA, *OTHERS))
        kind = "sniff" if number % 10 == 0 else "rating"
        at = days_ago(pick.randint(0, 40)) + timedelta(minutes=pick.randint(0, 600))
        events.append(Event(f"{user}/{number}", user, f"item-{number % 7}", kind, float(number % 5 + 1), at))
    items = [Item(f"item-{n}", f"Item {n}", categories=("a", "b") if n % 2 else ("a",)) for n in range(7)]
    people = [Person(user, {"mail": user, "region": "north"}) for user in (ANNA, *OTHERS)]
    return ListSource(events, list(items), list(people), version=version)


@pytest.fixture
def artifacts(tmp_path: Path) -> str:
    """Artefacts with a training set that names Anna, one that does not, and a model."""
    folder = tmp_path / "artifacts" / "training"
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"user_id": [ANNA, "bo"]}), folder / "training_set.parquet")
    pq.write_table(pa.table({"user_id": ["bo"]}), folder / "other.parquet")
    (folder / "ranker.pt").write_bytes(b"weights")
    # What a process left that died while it wrote.
    (folder / ".training_set.parquet.17").write_bytes(b"PAR1" + ANNA.encode())
    return (tmp_path / "artifacts").as_uri()


@pytest.fixture
def filled(database: str, lake: Lake, connection: psycopg.Connection) -> str:
    """The URL of a database that has been loaded, with every view's last ten partitions."""
    ingest(world(), lake, connection, now=NOW)
    connection.execute(
        "CREATE SCHEMA later; CREATE TABLE later.letters (user_id text, words text); "
        "CREATE TABLE later.seen (event_id text PRIMARY KEY, place int)"
    )
    connection.execute("INSERT INTO later.letters SELECT DISTINCT user_id, 'dear ' || user_id FROM user_history")
    connection.execute(
        "INSERT INTO served_features (read_id, view, request_id, user_id, read_at, definition_hash, features, keys, numbers) "
        "SELECT user_id, 'user_affinity', 'r', user_id, now(), 'h', '{n}', ARRAY[user_id, 'a'], '{1}' FROM people"
    )
    connection.execute("INSERT INTO later.seen SELECT event_id, 1 FROM recent_events")
    connection.commit()
    for view in VIEWS:
        materialise(view, YESTERDAY - timedelta(days=9), YESTERDAY, url=database, lake=lake)
    return database


def mentions(url: str, lake: Lake, word: str) -> list[str]:
    """Where `word` stands: every column of every table that can hold text, read as text, and every file of the lake."""
    found = []
    with psycopg.connect(url) as connection:
        columns = connection.execute(
            "SELECT table_schema, table_name, column_name FROM information_schema.columns JOIN information_schema.tables "
            "USING (table_schema, table_name) WHERE table_type = 'BASE TABLE' "
            "AND table_schema NOT IN ('pg_catalog', 'information_schema') "
            "AND data_type IN ('text', 'character varying', 'json', 'jsonb', 'ARRAY', 'bytea', 'USER-DEFINED')"
        ).fetchall()
        assert len(columns) > 40
        for schema, table, column in columns:
            statement = sql.SQL(
                "SELECT count(*) FROM {} WHERE strpos({}::text, %s) > 0 OR strpos({}::text, %s) > 0"
            ).format(sql.Identifier(schema, table), sql.Identifier(column), sql.Identifier(column))
            (rows,) = connection.execute(statement, (word, word.encode().hex())).fetchone() or (0,)
            if rows:
                found.append(f"{schema}.{table}.{column}: {rows}")
    folder = Path(lake.url.removeprefix("file://"))
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            table = pq.read_table(file)
            if any(word in str(value) for name in table.column_names for value in table[name].to_pylist()):
                found.append(str(file.relative_to(folder)))
    return found


def everything_of_others(url: str, lake: Lake) -> list[object]:
    """All that is held of the other three people."""
    with psycopg.connect(url) as connection:
        held: list[object] = [
            connection.execute(
                sql.SQL("SELECT * FROM {} WHERE user_id <> %s ORDER BY 1, 2").format(sql.Identifier(*name)), (ANNA,)
            ).fetchall()
            for name in module.tables_with(connection, "user_id")
            if name[1] != "people"  # a load touches nothing of a person but their profile's row
        ]
        table = lake.events(connection).to_table()
        rows = [row for row in table.to_pylist() if row["user_id"] != ANNA]
        return [*held, sorted(rows, key=lambda row: str(row["event_id"]))]


def test_nothing_names_the_person_after_it_nor_after_a_repeated_load_and_a_backfill(
    filled: str, lake: Lake, artifacts: str
) -> None:
    assert len(mentions(filled, lake, ANNA)) > 40  # the search finds what is there
    before = everything_of_others(filled, lake)
    held = holdings(filled, lake, ANNA)
    receipt = forget(ANNA, url=filled, lake=lake, artifacts_url=artifacts)
    assert mentions(filled, lake, ANNA) == []
    assert everything_of_others(filled, lake) == before
    assert receipt.finished
    for place, rows in held.items():
        assert receipt.removed[place] == rows, place
    assert receipt.removed["later.letters"] == receipt.removed["online.user_rows"] == 1
    assert receipt.removed["later.seen"] == receipt.removed["public.recent_events"] > 0
    assert receipt.removed["public.event_keys"] == receipt.removed["events in the lake"]
    assert sorted(path.name for path in (Path(artifacts.removeprefix("file://")) / "training").iterdir()) == [
        "other.parquet",
        "ranker.pt",
    ]

    with psycopg.connect(filled, options="-c TimeZone=UTC") as connection:
        report = ingest(world("2"), lake, connection, now=NOW)
    assert report.forgotten > 30
    assert report.read == report.duplicates + report.quarantined + report.forgotten
    for view in VIEWS:
        materialise(view, YESTERDAY - timedelta(days=9), YESTERDAY, url=filled, lake=lake)
    assert mentions(filled, lake, ANNA) == []
    # Others whose ids are parts of hers lost nothing, not even what could not be stored.
    with psycopg.connect(filled) as connection:
        assert connection.execute("SELECT count(*) FROM quarantine WHERE row LIKE '%''anna''%'").fetchone() != (0,)


def test_a_posted_event_from_before_is_a_repeat_and_one_from_after_is_a_new_beginning(
    filled: str, lake: Lake, artifacts: str
) -> None:
    receipt = forget(ANNA, url=filled, lake=lake, artifacts_url=artifacts)
    store = Store(filled)
    event = {"item_id": "item-1", "kind": "view", "value": None, "request_id": None}
    early = event | {"event_id": "p1", "user_id": ANNA, "occurred_at": receipt.forgotten_at.isoformat()}
    late = event | {
        "event_id": "p2",
        "user_id": ANNA,
        "occurred_at": (receipt.forgotten_at + timedelta(milliseconds=1)).isoformat(),
    }
    other = early | {"event_id": "p3", "user_id": "bo"}
    assert store.accept_events([early, other], 5000) == {"p3"}
    assert mentions(filled, lake, ANNA) == []
    assert store.accept_events([early, late], 5000) == {"p2"}
    person = store.read_person(ANNA, receipt.forgotten_at + timedelta(seconds=1), 5000)
    assert person.history.item_ids == ["item-1"]
    # Forgotten again, the new beginning goes, too.
    again = forget(ANNA, url=filled, lake=lake, artifacts_url=artifacts)
    assert again.forgotten_at > receipt.forgotten_at
    assert again.removed == {
        "files deleted": 0, "public.event_keys": 1, "public.recent_events": 1, "public.user_history": 1,
        "online.user_tiles": 1, "online.user_category_tiles": 2,
    }  # fmt: skip
    assert store.accept_events([late], 5000) == set()
    store.close()


def test_a_drain_leaves_out_what_a_function_of_an_older_release_stored(
    filled: str, lake: Lake, artifacts: str, connection: psycopg.Connection
) -> None:
    forget(ANNA, url=filled, lake=lake, artifacts_url=artifacts)
    at = days_ago(1) + timedelta(hours=3)
    for table in ("recent_events", "user_history"):
        connection.execute(
            f"INSERT INTO {table} (event_id, occurred_at, user_id, item_id, kind) VALUES ('p1', %s, %s, 'item-1', 'view')",
            (at, ANNA),
        )
    connection.execute("INSERT INTO event_keys VALUES ('p1', %s)", (at,))
    connection.commit()
    assert drain(connection, lake, at.date(), at.date()) == 0
    connection.commit()
    assert mentions(filled, lake, ANNA) == []
    assert connection.execute("SELECT count(*) FROM event_keys WHERE event_id = 'p1'").fetchone() == (0,)


def test_an_unknown_person_is_named_and_nothing_is_written(filled: str, lake: Lake, artifacts: str) -> None:
    files = sorted(Path(lake.url.removeprefix("file://")).rglob("*"))
    with pytest.raises(UnknownPerson, match="nothing is held of a person 'nobody'"):
        forget("nobody", url=filled, lake=lake, artifacts_url=artifacts)
    with pytest.raises(UnknownPerson, match="check the id"):
        request_erasure(filled, lake, "nobody")
    with psycopg.connect(filled) as connection:
        for table in ("tombstones", "erasure_receipts", "erasure_requests"):
            assert connection.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,)
    assert sorted(Path(lake.url.removeprefix("file://")).rglob("*")) == files


def test_killed_between_database_and_files_a_repeat_finishes(filled: str, lake: Lake, artifacts: str) -> None:
    code = (
        "import os, signal; from orchestration.compute import forget as f; from orchestration.compute.lake import Lake; "
        "f.finish = lambda **_: os.kill(os.getpid(), signal.SIGKILL); "
        f"f.forget({ANNA!r}, url={filled!r}, lake=Lake({lake.url!r}), artifacts_url={artifacts!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -signal.SIGKILL
    left = mentions(filled, lake, ANNA)
    assert left
    assert all(place.startswith("events/day=") for place in left)  # the database is through, old files are there
    with psycopg.connect(filled) as connection:
        assert ANNA not in lake.events(connection).to_table()["user_id"].to_pylist()  # and nobody reads them
    with pytest.raises(UnknownPerson, match=r"they were forgotten on \d{4}-"):
        forget(ANNA, url=filled, lake=lake, artifacts_url=artifacts)
    assert finish(url=filled, lake=lake, artifacts_url=artifacts) == 1
    assert mentions(filled, lake, ANNA) == []
    assert finish(url=filled, lake=lake, artifacts_url=artifacts) == 0


def test_killed_before_the_commit_nothing_has_happened(filled: str, lake: Lake, artifacts: str) -> None:
    before = everything_of_others(filled, lake), holdings(filled, lake, ANNA)
    code = (
        "import os, signal; from orchestration.compute import forget as f; from orchestration.compute.lake import Lake; "
        "f._collect_event_ids = lambda *_: os.kill(os.getpid(), signal.SIGKILL); "
        f"f.forget({ANNA!r}, url={filled!r}, lake=Lake({lake.url!r}), artifacts_url={artifacts!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    assert (everything_of_others(filled, lake), holdings(filled, lake, ANNA)) == before
    forget(ANNA, url=filled, lake=lake, artifacts_url=artifacts)
    assert mentions(filled, lake, ANNA) == []


def test_partitions_that_counted_the_person_are_stale_until_rebuilt_and_served_meanwhile(
    filled: str, lake: Lake, artifacts: str
) -> None:
    receipt = forget(ANNA, url=filled, lake=lake, artifacts_url=artifacts)
    assert receipt.stale == {"item_activity": 10}
    with psycopg.connect(filled) as connection:
        stale = "SELECT view, count(*) FROM feature_ledger WHERE stale_at IS NOT NULL GROUP BY view"
        assert connection.execute(stale).fetchall() == [("item_activity", 10)]
        # The person's own views are as a rebuild would leave them, and the ledger knows it.
        for view in VIEWS:
            off = connection.execute(
                f"SELECT l.partition_date FROM feature_ledger AS l LEFT JOIN (SELECT partition_date, count(*) AS rows "
                f"FROM features.{view.name} GROUP BY 1) AS t USING (partition_date) "
                "LEFT JOIN lake_files AS f ON f.day = l.partition_date WHERE l.view = %s "
                "AND (l.rows <> coalesce(t.rows, 0) OR (l.events <> coalesce(f.rows, 0) AND l.stale_at IS NULL))",
                (view.name,),
            ).fetchall()
            assert off == [], view.name
        own = "SELECT * FROM features.user_activity ORDER BY 1, 2"
        before = connection.execute(own).fetchall()
    materialise(ITEM_ACTIVITY, YESTERDAY - timedelta(days=9), YESTERDAY, url=filled, lake=lake)
    materialise(VIEWS[0], YESTERDAY - timedelta(days=9), YESTERDAY, url=filled, lake=lake)
    with psycopg.connect(filled) as connection:
        assert connection.execute(stale).fetchall() == []
        assert connection.execute(own).fetchall() == before
        item, lake_rows = (
            connection.execute(
                "SELECT sum(n_180d) FROM features.item_activity WHERE partition_date = %s", (YESTERDAY,)
            ).fetchone()
            or (0,),
            connection.execute("SELECT sum(rows) FROM lake_files WHERE day <= %s", (YESTERDAY,)).fetchone(),
        )
        assert item == lake_rows


def test_what_was_counted_of_the_person_since_the_snapshots_is_counted_anew(
    filled: str, lake: Lake, artifacts: str, connection: psycopg.Connection
) -> None:
    counted = (
        "SELECT item_id, (occurred_at AT TIME ZONE 'UTC')::date AS day, count(*), sum(value::numeric(38, 6)) "
        "FROM recent_events WHERE occurred_at >= %s GROUP BY 1, 2 ORDER BY 1, 2"
    )
    tiles = "SELECT item_id, day, n, value_sum FROM online.item_tiles WHERE day >= %s ORDER BY 1, 2"
    since = days_ago(KEPT_DAYS)
    before = connection.execute(tiles, (since.date(),)).fetchall()
    assert before == connection.execute(counted, (since,)).fetchall()
    connection.commit()
    forget(ANNA, url=filled, lake=lake, artifacts_url=artifacts)
    after = connection.execute(tiles, (since.date(),)).fetchall()
    assert after == connection.execute(counted, (since,)).fetchall()
    assert after != before


@pytest.mark.parametrize("step", ["load_item_categories", "_reports"])
def test_what_is_being_built_when_somebody_is_forgotten_is_built_again_without_them(
    filled: str, lake: Lake, artifacts: str, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Once when the lake's files are chosen and none is read yet, once when everything is read and nothing written."""
    from orchestration.compute import materialise as building

    as_it_is = getattr(building, step)
    calls: list[int] = []

    def forget_then(*given: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            forget(ANNA, url=filled, lake=lake, artifacts_url=artifacts)
        return as_it_is(*given)

    monkeypatch.setattr(building, step, forget_then)
    materialise(VIEWS[0], YESTERDAY - timedelta(days=9), YESTERDAY, url=filled, lake=lake)
    assert len(calls) == 2
    assert mentions(filled, lake, ANNA) == []


def test_events_that_arrive_while_somebody_is_forgotten_are_gone_or_refused(
    filled: str, lake: Lake, artifacts: str
) -> None:
    store, stop = Store(filled), threading.Event()
    sent: list[int] = []

    def post() -> None:
        while not stop.is_set():
            sent.append(1)
            row = {"event_id": f"{ANNA}#{len(sent)}", "user_id": ANNA, "item_id": "item-1", "kind": "view"}
            store.accept_events([row | {"occurred_at": days_ago(1).isoformat()}], 5000)

    thread = threading.Thread(target=post)
    thread.start()
    try:
        receipt = forget(ANNA, url=filled, lake=lake, artifacts_url=artifacts)
    finally:
        stop.set()
        thread.join()
    assert len(sent) > 5
    assert receipt.removed["public.recent_events"] > 5
    assert mentions(filled, lake, ANNA) == []
    store.close()


def test_a_request_hides_at_once_and_goes_with_everything_else(filled: str, lake: Lake, artifacts: str) -> None:
    store, at = Store(filled), NOW
    assert store.read_person(ANNA, at, 5000).history.item_ids
    request_id = request_erasure(filled, lake, ANNA)
    assert request_erasure(filled, lake, ANNA) == request_id
    hidden = store.read_person(ANNA, at, 5000)
    assert hidden.history.item_ids == []
    assert all(columns.keys == [] for columns in hidden.views.values())
    assert store.read_person("bo", at, 5000).history.item_ids
    assert open_requests(filled) == [request_id]
    receipt = fulfil(request_id, url=filled, lake=lake, artifacts_url=artifacts)
    assert receipt.receipt_id == request_id
    assert fulfil(request_id, url=filled, lake=lake, artifacts_url=artifacts) == receipt
    assert open_requests(filled) == []
    assert mentions(filled, lake, ANNA) == []
    with pytest.raises(LarderError, match="there is no erasure request 'x'"):
        fulfil("x", url=filled, lake=lake, artifacts_url=artifacts)
    store.close()


def test_a_request_that_names_nobody_does_not_stay(filled: str, lake: Lake, artifacts: str) -> None:
    with psycopg.connect(filled) as connection:
        connection.execute("INSERT INTO erasure_requests VALUES ('r', 'gone-already')")
    with pytest.raises(LarderError, match="of whom nothing is held") as error:
        fulfil("r", url=filled, lake=lake, artifacts_url=artifacts)
    assert "gone-already" not in str(error.value)
    assert mentions(filled, lake, "gone-already") == []


def test_files_that_nobody_names_are_swept_from_the_lake(
    filled: str, lake: Lake, artifacts: str, connection: psycopg.Connection
) -> None:
    """What a crashed load left behind may name the person in a file of any day."""
    folder = Path(lake.url.removeprefix("file://")) / "events"
    table = lake.events(connection).to_table().slice(0, 1)
    left = folder / "day=1999-01-01" / "000001.parquet"
    left.parent.mkdir()
    pq.write_table(table, left)
    forget(ANNA, url=filled, lake=lake, artifacts_url=artifacts)
    assert not left.exists()
    named = {path for (path,) in connection.execute("SELECT path FROM lake_files")}
    assert named <= {str(file.relative_to(folder.parent)) for file in folder.rglob("*.parquet")}
