"""DuckDB keeps tiles from one range to the next: each day is read once, and never when it is no longer what it was."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date, timedelta
from pathlib import Path

import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import TODAY
from worlds import ListSource

from orchestration.compute.engines import DuckDB
from orchestration.compute.ingest import ingest
from orchestration.compute.lake import Lake
from orchestration.compute.materialise import materialise
from schemas.events import Event, Item
from schemas.features import FeatureView
from schemas.views import USER_ACTIVITY, USER_AFFINITY

YESTERDAY = (TODAY - timedelta(days=1)).date()
DAYS = 12


def day(ago: int) -> date:
    return (TODAY - timedelta(days=ago)).date()


def events(since: int, first: int = 0) -> list[Event]:
    """An event of one person each day from `since` days ago until yesterday."""
    return [
        Event(f"e{first + ago}", "u", f"i{ago % 2}", "view", None, TODAY - timedelta(days=ago, hours=-9))
        for ago in range(1, since + 1)
    ]


class World:
    """A lake with an event a day; says what was built by one engine over two ranges, and by a new one for each."""

    def __init__(self, url: str, lake: Lake, connection: psycopg.Connection) -> None:
        self.url, self.lake, self.connection = url, lake, connection
        self.load(events(DAYS), [Item("i0", "I", categories=("a",)), Item("i1", "J", categories=("b",))])

    def load(self, made: list[Event], items: list[Item] | None = None) -> None:
        ingest(ListSource(made, items or [], version=str(len(made))), self.lake, self.connection, now=TODAY)
        self.connection.commit()

    def build(self, view: FeatureView, first: date, last: date, engine: DuckDB | None = None) -> None:
        materialise(view, first, last, url=self.url, lake=self.lake, engine=engine)

    def rows(self, view: FeatureView) -> list[tuple[object, ...]]:
        found = self.connection.execute(f"SELECT * FROM features.{view.name} ORDER BY 1, 2, 3").fetchall()
        self.connection.commit()
        return found

    def agrees(self, view: FeatureView) -> bool:
        """What is stored is what an engine without a memory makes of the lake as it is."""
        before = self.rows(view)
        self.build(view, day(DAYS), YESTERDAY)
        return bool(before) and self.rows(view) == before


@pytest.fixture
def world(database: str, lake: Lake, connection: psycopg.Connection) -> World:
    return World(database, lake, connection)


@pytest.fixture
def engine() -> Iterator[DuckDB]:
    with DuckDB() as opened:
        yield opened


def test_each_day_is_read_once(world: World, engine: DuckDB, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    register = Lake.register
    monkeypatch.setattr(
        Lake, "register", lambda lake, db, name, paths: read.extend(paths) or register(lake, db, name, paths)
    )
    for last in (7, 4, 1):
        world.build(USER_ACTIVITY, day(last + 2), day(last), engine)
    assert sorted(read) == sorted(world.lake.paths(world.connection, None, YESTERDAY).values())
    monkeypatch.undo()
    assert len(world.rows(USER_ACTIVITY)) == 9
    world.build(USER_ACTIVITY, day(DAYS), day(10), engine)  # an earlier range needs nothing new
    assert world.agrees(USER_ACTIVITY)


def test_a_day_that_was_rewritten_is_read_again(world: World, engine: DuckDB) -> None:
    world.build(USER_ACTIVITY, day(DAYS), day(6), engine)
    world.load([Event("late", "u", "i0", "view", None, TODAY - timedelta(days=8, hours=-3))])
    world.load([Event("other", "v", "i0", "view", None, TODAY - timedelta(days=9, hours=-3))])
    world.build(USER_ACTIVITY, day(5), YESTERDAY, engine)
    world.build(USER_ACTIVITY, day(DAYS), day(6), engine)
    assert world.agrees(USER_ACTIVITY)


def test_a_catalogue_that_changed_is_joined_again(world: World, engine: DuckDB) -> None:
    world.build(USER_AFFINITY, day(DAYS), day(6), engine)
    world.connection.execute("UPDATE items SET categories = '{c}' WHERE item_id = 'i0'")
    world.connection.commit()
    world.build(USER_AFFINITY, day(DAYS), YESTERDAY, engine)
    assert "c" in {row[2] for row in world.rows(USER_AFFINITY)}
    assert world.agrees(USER_AFFINITY)


def test_views_do_not_share_tiles_and_what_no_window_holds_is_dropped(world: World, engine: DuckDB) -> None:
    world.build(USER_ACTIVITY, day(DAYS), day(11), engine)
    world.build(USER_AFFINITY, day(DAYS), YESTERDAY, engine)
    after = YESTERDAY + timedelta(days=USER_ACTIVITY.max_window_days)
    world.build(USER_ACTIVITY, after, after, engine)
    assert [tiles.files for tiles in engine._tiles[USER_ACTIVITY]] == [{}]
    assert world.agrees(USER_AFFINITY)


def test_columns_of_another_release_are_read_as_the_lake_reads_them(world: World, engine: DuckDB) -> None:
    older, newer = (Path(f"{world.lake.root}/{world.lake.paths(world.connection)[day(n)]}") for n in (3, 2))
    pq.write_table(pq.read_table(older, partitioning=None).drop_columns(["value"]), older)
    table = pq.read_table(newer, partitioning=None)
    pq.write_table(table.append_column("channel", pa.array(["web"] * len(table))), newer)
    world.build(USER_ACTIVITY, day(DAYS), YESTERDAY, engine)
    assert world.rows(USER_ACTIVITY)[-1][2:] == (7, 12, 12, 12, None, 0, *world.rows(USER_ACTIVITY)[-1][8:])
