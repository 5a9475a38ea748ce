"""Training rows that cannot leak: the features of any label table as they were known at each label."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

import duckdb
import numpy as np
import psycopg
import pyarrow as pa
from numpy.typing import NDArray

from inference.assemble import finish, natural
from orchestration.compute.lake import Lake, duck
from orchestration.compute.materialise import load_item_categories
from orchestration.compute.windows import point_in_time_sql, tile_sql
from schemas.errors import DefinitionError
from schemas.features import FeatureView


@dataclass(frozen=True, slots=True)
class FeatureRows:
    """`values (n, f) float32` and `mask (n, f) float32` (1 where present), in the order of the view's features."""

    values: NDArray[np.float32]
    mask: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class _Read:
    """Merged states of n labels, as `finish` and `natural` take them."""

    columns: dict[str, NDArray[np.float64]]
    at: NDArray[np.float64]
    as_of: NDArray[np.float64]
    present: NDArray[np.bool_]


class PointInTime:
    """Answers point-in-time questions on one state of the lake; open it once, ask many times.

    Use as a context manager. Tiles of a view are built on first use. With `known_at=False` an event counts from when it
    happened, whenever it was learned of. `memory_limit` is DuckDB's, which spills what is more.
    """

    def __init__(
        self, lake: Lake, connection: psycopg.Connection, *, known_at: bool = True, memory_limit: str | None = None
    ) -> None:
        self._events = lake.events(connection)
        self._items = load_item_categories(connection)
        self._known = "known_at" if known_at else "occurred_at AS known_at"
        self._tiled: set[str] = set()
        self._duck = duck(memory_limit) if memory_limit else duck()

    def __enter__(self) -> PointInTime:
        self._db: duckdb.DuckDBPyConnection = self._duck.__enter__()
        self._db.register("lake_events", self._events)
        self._db.execute(f"CREATE TEMP TABLE events AS SELECT * EXCLUDE (known_at), {self._known} FROM lake_events")
        self._db.register("items", self._items)
        return self

    def __exit__(self, *error: object) -> None:
        self._duck.__exit__(None, None, None)

    def features(self, view: FeatureView, keys: dict[str, NDArray[np.str_]], at: NDArray[np.int64]) -> FeatureRows:
        """Features of `view` for n labels: `keys` one array `(n,)` per key column, `at (n,)` microseconds UTC.

        As many rows come out as labels go in, in their order. The label's own instant is never inside.
        """
        instants = pa.array(at, pa.timestamp("us", tz="UTC"))
        read = self._read(
            view, {name: pa.array(key.astype(object), pa.string()) for name, key in keys.items()}, instants
        )
        values, mask = finish(view, read.columns, at=read.at, as_of=read.as_of, present=read.present)
        return FeatureRows(values, mask)

    def values(self, view: FeatureView, keys: dict[str, pa.Array], at: pa.Array) -> NDArray[np.float64]:
        """Features of `view` in their own units, `(n, f)`, NaN where there is none.

        `keys` holds one text array `(n,)` per key column, in which NULL matches nothing; `at (n,)` is
        `timestamp("us", tz="UTC")`.
        """
        read = self._read(view, keys, at)
        return natural(view, read.columns, at=read.at, as_of=read.as_of, present=read.present)

    @property
    def files(self) -> tuple[str, ...]:
        """The lake's files that the events come from."""
        return tuple(getattr(self._events, "files", ()))

    def lake_state(self) -> tuple[int, int, datetime | None]:
        """Of the lake that is asked: its events, the days they happened on, and when the newest was learned of."""
        [(rows, days, newest)] = self._db.execute(
            "SELECT count(*), count(DISTINCT CAST(occurred_at AS DATE)), max(known_at) FROM lake_events"
        ).fetchall()
        return int(rows), int(days), newest

    def _read(self, view: FeatureView, keys: dict[str, pa.Array], at: pa.Array) -> _Read:
        missing = [key for key in view.entity.keys if key not in keys]
        if missing:
            raise DefinitionError(
                f"view {view.name!r} is keyed by {', '.join(view.entity.keys)}; the label table lacks {', '.join(missing)}"
            )
        if view.name not in self._tiled:
            self._db.execute(f"CREATE TEMP TABLE tiles_{view.name} AS {tile_sql(view, on_time=True)}")
            self._tiled.add(view.name)
        labels = pa.table(
            {"label_id": pa.array(np.arange(len(at))), "read_at": at} | {key: keys[key] for key in view.entity.keys}
        )
        # Many labels ask the same question (an item at one instant): each is answered once.
        self._db.register("all_labels", labels)
        listed = ", ".join(view.entity.keys)
        self._db.execute(
            f"CREATE OR REPLACE TEMP TABLE labels AS SELECT min(label_id) AS label_id, {listed}, read_at "
            f"FROM all_labels GROUP BY {listed}, read_at"
        )
        sql = point_in_time_sql(view, tiles=f"tiles_{view.name}")
        names = ", ".join(f"epoch({name}) AS {name}" if state.is_instant else name for name, state, _ in view.columns)
        same = " AND ".join(f"a.{key} = l.{key}" for key in view.entity.keys)
        result = self._db.execute(
            f"SELECT a.label_id AS label_id, {names} FROM ({sql}) AS r JOIN labels AS l ON l.label_id = r.label_id "
            f"JOIN all_labels AS a ON {same} AND a.read_at = l.read_at"
        ).fetchnumpy()
        place = np.asarray(result["label_id"])
        columns: dict[str, NDArray[np.float64]] = {}
        for name, _, _ in view.columns:
            column = np.full(len(at), np.nan)
            column[place] = np.ma.filled(np.ma.asarray(result[name]).astype(np.float64), np.nan)
            columns[name] = column
        present = np.zeros(len(at), bool)
        present[place] = True
        seconds = np.asarray(at.cast(pa.int64())) / 1e6
        return _Read(columns, seconds, np.floor(seconds / 86_400) * 86_400, present)
