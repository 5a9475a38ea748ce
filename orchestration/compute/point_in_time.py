"""Training rows that cannot leak: the features of any label table as they were known at each label."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import psycopg
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from inference.assemble import finish, natural
from orchestration.compute.duck import shared_duck
from orchestration.compute.exact import millionths
from orchestration.compute.lake import Lake
from orchestration.compute.materialise import load_item_categories
from orchestration.compute.timeline import DAY, Timeline
from orchestration.compute.variants import variants
from orchestration.compute.windows import categories_sql, event_columns, parts_sql
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

    Use as a context manager. A view's events are read and sorted on first use, and kept: some 60 bytes for each event and
    view. With `known_at=False` an event counts from when it happened, whenever it was learned of.
    """

    def __init__(self, lake: Lake, connection: psycopg.Connection, *, known_at: bool = True) -> None:
        self._events = lake.events(connection)
        self._items = load_item_categories(connection)
        self._by_known_at = known_at
        self._views: dict[FeatureView, tuple[_Keys, Timeline]] = {}

    def __enter__(self) -> PointInTime:
        self._db = shared_duck()
        return self

    def __exit__(self, *error: object) -> None:
        self._db.close()
        del self._db  # whoever still holds this holds no connection

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
        self._db.register("lake_events", self._events)
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
        if view not in self._views:
            self._views[view] = self._load(view)
        known, timeline = self._views[view]
        key, instants = known.find([keys[name] for name in view.entity.keys]), np.asarray(at.cast(pa.int64()))
        place = np.flatnonzero(key >= 0)
        states, present = timeline.read(key[place], instants[place])
        columns = {name: np.full(len(at), np.nan) for name in states}
        for name, values in states.items():
            columns[name][place] = values
        answered = np.zeros(len(at), bool)
        answered[place] = present
        return _Read(columns, instants / 1e6, (instants // DAY * DAY) / 1e6, answered)

    def _load(self, view: FeatureView) -> tuple[_Keys, Timeline]:
        """The events of `view`, by key and time, and the keys they are of."""
        numbered = [key for key in view.entity.keys if key != "category"]
        states = event_columns(view)
        ids = [*numbered, *(["item_id"] if view.entity.by_category and "item_id" not in numbered else [])]
        events = self._events.to_table(columns=list(dict.fromkeys([*ids, *states, "occurred_at", "known_at"])))
        if not self._by_known_at:
            events = events.set_column(events.schema.get_field_index("known_at"), "known_at", events["occurred_at"])
        occurred, known = (np.asarray(events[name].cast(pa.int64())) for name in ("occurred_at", "known_at"))
        variant, example = variants([events[name].combine_chunks() for name in states], len(events))
        codes = {key: events[key].combine_chunks().dictionary_encode() for key in numbered}
        numbers = {key: np.asarray(code.indices).astype(np.int64) for key, code in codes.items()}
        if view.entity.by_category:
            # An item is of any number of categories: as many rows for each of its events.
            pairs = self._ask(categories_sql(view), events.select(ids))
            row = pairs["row"].to_numpy()
            occurred, known, variant = occurred[row], known[row], variant[row]
            numbers = {key: number[row] for key, number in numbers.items()}
            codes["category"] = pairs["category"].combine_chunks().dictionary_encode()
            numbers["category"] = np.asarray(codes["category"].indices).astype(np.int64)
        listed = view.entity.keys
        keys, key = _Keys.of([codes[name].dictionary for name in listed], [numbers[name] for name in listed])
        parts = self._ask(parts_sql(view), events.select(states).take(pa.array(example)))
        return keys, Timeline(view, key, occurred, known, variant, _by_state(view, parts))

    def _ask(self, sql: str, events: pa.Table) -> pa.Table:
        """What `sql` gives for `events`, whose rows it knows by their number `row`."""
        self._db.register("items", self._items)
        self._db.register("events", events.append_column("row", pa.array(np.arange(len(events)))))
        found: pa.Table = self._db.sql(sql).to_arrow_table().combine_chunks()
        self._db.unregister("events")
        return found


@dataclass(frozen=True, slots=True)
class _Keys:
    """Which number a key has: `names` are the values of each key column, `codes (k,)` the pairs of them that there are."""

    names: list[pa.Array]
    codes: NDArray[np.int64] | None

    @staticmethod
    def of(names: list[pa.Array], numbers: list[NDArray[np.int64]]) -> tuple[_Keys, NDArray[np.int64]]:
        """The keys of n events, whose key columns hold the names of these `numbers (n,)`, and the number of each `(n,)`."""
        if len(names) == 1:
            return _Keys(names, None), numbers[0]
        codes, key = np.unique(_Keys._code(names, numbers), return_inverse=True)
        return _Keys(names, codes), key

    def find(self, columns: list[pa.Array]) -> NDArray[np.int64]:
        """The number of each of m keys, `columns` one text array `(m,)` per key column; below 0 where no event has it."""
        numbers = [
            np.asarray(pc.index_in(column, value_set=names).fill_null(-1)).astype(np.int64)
            for column, names in zip(columns, self.names, strict=True)
        ]
        if self.codes is None:
            return numbers[0]
        code = self._code(self.names, numbers)
        place = np.minimum(np.searchsorted(self.codes, code), max(len(self.codes) - 1, 0))
        there = np.all([number >= 0 for number in numbers], axis=0) & np.isin(code, self.codes)
        return np.where(there, place, -1)

    @staticmethod
    def _code(names: list[pa.Array], numbers: list[NDArray[np.int64]]) -> NDArray[np.int64]:
        code = numbers[0]
        for values, number in zip(names[1:], numbers[1:], strict=True):
            code = code * max(len(values), 1) + number
        return code


def _by_state(view: FeatureView, parts: pa.Table) -> dict[str, NDArray[Any]]:
    """The columns of `parts` as a `Timeline` takes them."""
    there = set(parts.schema.names)
    return {state.name: _part(parts[state.name].combine_chunks()) for state in view.states if state.name in there}


def _part(values: pa.Array) -> NDArray[Any]:
    """A part as a `Timeline` takes it."""
    if not pa.types.is_decimal(values.type):
        found: NDArray[Any] = values.to_numpy(zero_copy_only=False)
        return found.view(bool) if found.dtype == np.int8 else found
    return millionths(values)
