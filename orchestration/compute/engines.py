"""What computes a view's snapshot rows from the lake: one contract, so that whatever writes them needs not know who did."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import date
from typing import Protocol

import duckdb
import pyarrow as pa

from orchestration.compute.lake import Lake
from orchestration.compute.snapshots import snapshot_schema, snapshots
from orchestration.compute.windows import tile_sql
from schemas.features import FeatureView


@dataclass(frozen=True, slots=True)
class SnapshotJob:
    """The partitions `days` (a stretch without gaps) of one view, and what they are computed from.

    `files` are the lake's paths of every day that the windows reach; `items` is the relation `items (item_id,
    categories)`; `erasures` counts those that there had been when both were read.
    """

    view: FeatureView
    days: tuple[date, ...]
    lake: Lake
    files: tuple[str, ...]
    items: pa.Table
    erasures: int


class Engine(Protocol):
    """Computes snapshots; `name` is what the ledger says of the partitions that it built."""

    @property
    def name(self) -> str: ...

    def snapshot(self, db: duckdb.DuckDBPyConnection, job: SnapshotJob) -> AbstractContextManager[None]:
        """Make in `db` the relation `snapshot (partition_date, <keys>, <columns>)`; it is there until the exit."""
        ...


class DuckDB:
    """One machine, this process: rows never leave DuckDB before they are written to Postgres."""

    name = "duckdb"

    @contextmanager
    def snapshot(self, db: duckdb.DuckDBPyConnection, job: SnapshotJob) -> Iterator[None]:
        db.register("events", job.lake.dataset(job.files))
        db.register("items", job.items)
        db.execute(f"CREATE TEMP TABLE tiles AS {tile_sql(job.view)}")
        db.register("piece", snapshot_schema(job.view).empty_table())
        db.execute("CREATE TEMP TABLE snapshot AS SELECT * FROM piece")
        for piece in snapshots(db, job.view, job.days):
            db.register("piece", piece)
            db.execute("INSERT INTO snapshot SELECT * FROM piece")
        db.unregister("piece")
        db.execute("DROP TABLE tiles")
        yield
