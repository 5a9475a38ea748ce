"""What computes a view's snapshot rows from the lake: one contract, so that whatever writes them needs not know who did."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from datetime import date, timedelta
from itertools import count
from typing import Protocol, Self

import duckdb
import pyarrow as pa

from orchestration.compute.duck import duck
from orchestration.compute.lake import Lake
from orchestration.compute.snapshots import snapshot_schema, snapshots
from orchestration.compute.windows import tile_sql
from schemas.features import FeatureView


def oldest_day(view: FeatureView, first: date) -> date:
    """The earliest day that the longest window of the partition `first` covers: a file before it must not matter."""
    return first - timedelta(days=view.max_window_days - 1)


@dataclass(frozen=True, slots=True)
class SnapshotJob:
    """The partitions `days` (a stretch without gaps) of one view, and what they are computed from.

    `files` has the lake's path of every day that the windows reach and that has one; `items` is the relation `items
    (item_id, categories)`; `erasures` counts those that there had been when both were read.
    """

    view: FeatureView
    days: tuple[date, ...]
    lake: Lake
    files: dict[date, str]
    items: pa.Table
    erasures: int


class Engine(Protocol):
    """Computes snapshots; `name` is what the ledger says of the partitions that it built."""

    @property
    def name(self) -> str: ...

    def snapshot(self, job: SnapshotJob) -> AbstractContextManager[duckdb.DuckDBPyConnection]:
        """A DuckDB with the relation `snapshot (partition_date, <keys>, <columns>)`; it is there until the exit."""
        ...


_MEMORY_LIMIT = "256MB"
"""What DuckDB asks for two threads; what is more goes to the disk, so that memory does not grow with the events."""


@dataclass(frozen=True, slots=True)
class _Tiles:
    """A table of tiles, and the files of the days that they are of."""

    table: str
    files: dict[date, str]


class DuckDB:
    """One machine, this process: rows never leave DuckDB before they are written to Postgres. Use as a context manager.

    Tiles are kept from one job of a view to the next: a walk over a range reads each day of the lake once, however many
    chunks have it in their windows. Files of the lake never change, a day that did has another one.
    """

    name = "duckdb"

    def __init__(self) -> None:
        self._open = ExitStack()
        self._number = count()
        self._tiles: dict[FeatureView, list[_Tiles]] = {}
        self._items: pa.Table | None = None

    def __enter__(self) -> Self:
        self._db = self._open.enter_context(duck(_MEMORY_LIMIT))
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    @contextmanager
    def snapshot(self, job: SnapshotJob) -> Iterator[duckdb.DuckDBPyConnection]:
        db = self._db
        tables = " UNION ALL ".join(f"SELECT * FROM {tiles.table}" for tiles in self._ready(job))
        db.execute(f"CREATE OR REPLACE TEMP VIEW tiles AS {tables}")
        db.register("piece", snapshot_schema(job.view).empty_table())
        db.execute("CREATE OR REPLACE TEMP TABLE snapshot AS SELECT * FROM piece")
        try:
            for piece in snapshots(db, job.view, job.days):
                db.register("piece", piece)
                db.execute("INSERT INTO snapshot SELECT * FROM piece")
            db.unregister("piece")
            yield db
        finally:
            db.execute("DROP TABLE snapshot")

    def _ready(self, job: SnapshotJob) -> list[_Tiles]:
        """The tiles of all days that the job reads, and perhaps of others; what none of its days needs is dropped."""
        oldest, last = oldest_day(job.view, job.days[0]), job.days[-1]
        if self._items is None or not self._items.equals(job.items):
            self._items = job.items
            for view in self._tiles:
                self._drop(view, self._tiles[view])
        held = self._tiles.setdefault(job.view, [])
        read = {day: path for tiles in held for day, path in tiles.files.items() if oldest <= day <= last}
        if any(job.files.get(day) != path for day, path in read.items()):
            self._drop(job.view, held)
            read = {}
        self._drop(job.view, [tiles for tiles in held if max(tiles.files, default=oldest) < oldest])
        held = self._tiles[job.view]
        missing = {day: path for day, path in job.files.items() if day not in read}
        if missing or not held:
            table = f"tiles_{next(self._number)}"
            job.lake.register(self._db, "events", missing.values())
            self._db.register("items", job.items)
            self._db.execute(f"CREATE TEMP TABLE {table} AS {tile_sql(job.view)}")
            held.append(_Tiles(table, missing))
        return held

    def _drop(self, view: FeatureView, gone: list[_Tiles]) -> None:
        for tiles in gone:
            self._db.execute(f"DROP TABLE {tiles.table}")
        self._tiles[view] = [tiles for tiles in self._tiles[view] if tiles not in gone]
