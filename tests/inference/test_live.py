"""What is kept online per entity: tiles that lose nothing, rows that only newer partitions replace."""

from __future__ import annotations

import threading
from datetime import timedelta

import numpy as np
import psycopg
import pytest
from conftest import TODAY
from worlds import ListSource

from inference.candidates import Filters
from inference.store import Store
from infra.feature_tables import ensure_view_tables
from orchestration.compute.ingest import ingest
from orchestration.compute.lake import Lake
from orchestration.compute.materialise import materialise
from schemas.errors import DefinitionError
from schemas.events import Event, Item
from schemas.features import ITEM, USER, FeatureView, count
from schemas.online_sql import entities, tile_states, tiles_table
from schemas.views import ITEM_ACTIVITY, VIEWS

NOW = TODAY + timedelta(hours=20)
YESTERDAY = (TODAY - timedelta(days=1)).date()


def event(number: int, *, item: str = "i", days: int = 0, value: float | None = 5.0) -> Event:
    return Event(f"e{number}", "u", item, "rating", value, TODAY - timedelta(days=days) + timedelta(seconds=number))


def posted(made: Event) -> dict[str, object]:
    return {
        "event_id": made.event_id,
        "user_id": made.user_id,
        "item_id": made.item_id,
        "kind": made.kind,
        "value": made.value,
        "occurred_at": made.occurred_at.isoformat(),
        "request_id": None,
    }


def load(database: str, lake: Lake, events: list[Event], *days_back: int) -> None:
    """Ingest `events` with two items and build the partitions of so many days ago."""
    with psycopg.connect(database, options="-c TimeZone=UTC") as connection:
        ingest(ListSource(events, [Item("i", "I", categories=("a",)), Item("j", "J")]), lake, connection, now=TODAY)
    for back in days_back:
        day = (TODAY - timedelta(days=back)).date()
        for view in VIEWS:
            materialise(view, day, day, url=database, lake=lake)


def item_counts(database: str, name: str = "n_7d") -> dict[str, float]:
    store = Store(database)
    try:
        features = store.pick_candidates(
            at=NOW, filters=Filters(), limit=10, timeout_ms=5000, given=["i", "j"], live=True
        ).features
    finally:
        store.close()
    values = features.states[name]
    return {key: float(values[row]) for row, (key,) in enumerate(features.keys) if np.isfinite(values[row])}


def test_eight_writers_of_one_hot_item_lose_nothing(database: str, lake: Lake, connection: psycopg.Connection) -> None:
    load(database, lake, [event(0, days=3)], 1)
    stores = [Store(database) for _ in range(8)]
    failed: list[Exception] = []

    def write(writer: int) -> None:
        try:
            for start in range(0, 100, 10):
                numbers = [1 + writer * 100 + n for n in range(start, start + 10)]
                stores[writer].accept_events([posted(event(n)) for n in numbers], 30_000)
        except Exception as error:  # noqa: BLE001  # a thread's error is told below
            failed.append(error)

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for store in stores:
        store.close()
    assert not failed
    today = connection.execute(
        "SELECT n, value_sum, days FROM online.user_tiles WHERE user_id = 'u' AND day = %s", (TODAY.date(),)
    ).fetchall()
    assert today == [(800, 4000, 1)]
    assert item_counts(database) == {"i": 801.0}


def test_an_old_day_built_again_leaves_what_is_served_untouched(
    database: str, lake: Lake, connection: psycopg.Connection
) -> None:
    load(database, lake, [event(n, days=n) for n in range(1, 9)], 1)
    before = connection.execute("SELECT * FROM online.item_rows ORDER BY 1").fetchall()
    connection.commit()
    assert before
    for view in VIEWS:
        materialise(view, YESTERDAY - timedelta(days=6), YESTERDAY - timedelta(days=2), url=database, lake=lake)
    assert connection.execute("SELECT * FROM online.item_rows ORDER BY 1").fetchall() == before


def test_an_entity_that_left_its_windows_does_not_keep_its_old_counts(database: str, lake: Lake) -> None:
    # On the eve of its last day the item was in the longest window; the day after it was not.
    load(database, lake, [event(1, days=181), event(2, item="j", days=2)], 2, 1)
    assert item_counts(database, "n_180d") == {"j": 1.0}


def test_a_partition_built_again_forgets_the_keys_that_it_lost(
    database: str, lake: Lake, connection: psycopg.Connection
) -> None:
    load(database, lake, [event(1, days=2), event(2, item="j", days=2)], 1)
    assert item_counts(database) == {"i": 1.0, "j": 1.0}
    empty = Lake(lake.url + "-empty")
    connection.execute("DELETE FROM lake_files")
    connection.execute("DELETE FROM ingests")
    connection.commit()
    load(database, empty, [event(3, item="j", days=2)], 1)
    assert item_counts(database) == {"j": 1.0}


def test_a_row_of_another_definition_counts_as_missing(
    database: str, lake: Lake, connection: psycopg.Connection
) -> None:
    load(database, lake, [event(1, days=2)], 1)
    assert item_counts(database) == {"i": 1.0}
    connection.execute("UPDATE online.item_rows SET item_activity = overlay(item_activity PLACING '\\x00' FROM 1)")
    connection.commit()
    assert item_counts(database) == {}


def test_a_changed_declaration_fills_the_online_tables_again(
    database: str, lake: Lake, connection: psycopg.Connection
) -> None:
    load(database, lake, [event(n, days=n % 4) for n in range(8)], 1)
    tables = [tiles_table(entity) for entity in entities()] + ["online.item_rows", "online.user_rows"]

    def held() -> list[list[tuple[object, ...]]]:
        rows = [connection.execute(f"SELECT * FROM {table} ORDER BY 1, 2, 3").fetchall() for table in tables]
        connection.commit()
        return rows

    before = held()
    for table in tables:
        connection.execute(f"COMMENT ON TABLE {table} IS 'made by another declaration'")
        connection.execute(f"ALTER TABLE {table} ADD COLUMN gone int")
    connection.commit()
    ensure_view_tables(database)
    assert held() == before
    assert all(rows for rows in before)


def test_two_views_of_an_entity_may_not_mean_different_things_by_one_state() -> None:
    def view(name: str, where: str) -> FeatureView:
        return FeatureView(name, USER, "team:x", "", 3, (count("good", 7, where=where, state="good"),))

    with pytest.raises(DefinitionError, match=r"'second'.*'good'"):
        tile_states(USER, [view("first", "value > 3"), view("second", "value > 4")])
    assert next(state.name for state in tile_states(ITEM, [ITEM_ACTIVITY])) == "n"
