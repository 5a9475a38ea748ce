"""Daily snapshots from tiles: keys beside one another, days below one another, a window the difference of two totals.

It gives what `windows.snapshot_sql` gives, which meets every tile with every partition that reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from orchestration.compute.exact import MICRO, millionths, summable
from schemas.features import FeatureView, Merge, State

_CELLS = 300_000
"""So many keys times days are held at once, once for every state."""

Array = NDArray[Any]
OfWindow = Callable[[int], Array]
"""Takes a window in days, gives `(d, k)`: what a state is over the window that ends with each of d partitions, of k keys."""


def snapshot_schema(view: FeatureView) -> pa.Schema:
    """The columns of the view's snapshots, and of its table."""

    def kind(state: State) -> pa.DataType:
        return pa.timestamp("us", tz="UTC") if state.is_instant else pa.int64() if state.is_count else pa.float64()

    keys = [(key, pa.string()) for key in view.entity.keys]
    return pa.schema(
        [("partition_date", pa.date32()), *keys, *((name, kind(state)) for name, state, _ in view.columns)]
    )


def snapshots(db: duckdb.DuckDBPyConnection, view: FeatureView, days: Sequence[date]) -> Iterator[pa.Table]:
    """The snapshot rows of the partitions `days`, a stretch without gaps, from the relation `tiles`; a piece at a time."""
    keys = ", ".join(view.entity.keys)
    oldest = days[0] - timedelta(days=view.max_window_days - 1)
    [(first, many)] = db.execute(
        f"SELECT (SELECT min(day) FROM tiles WHERE day >= ?), (SELECT count(*) FROM (SELECT DISTINCT {keys} FROM tiles))",
        [oldest],
    ).fetchall()
    if first is None or first > days[-1]:
        return
    first = min(first, days[0])
    span = (days[-1] - first).days + 1
    pieces = -(-many * span // _CELLS)
    states = ", ".join(f"{_plain(state)} AS {state.name}" for state in view.states)
    for piece in range(pieces):
        tiles = db.sql(
            f"SELECT {keys}, CAST(day - DATE '{first}' AS BIGINT) AS day, {states} FROM tiles "
            f"WHERE day BETWEEN DATE '{first}' AND DATE '{days[-1]}' AND hash({keys}) % {pieces} = {piece}"
        ).to_arrow_table()
        if len(tiles):
            yield _rows(view, tiles, span, days)


def _plain(state: State) -> str:
    """A tile's state as numpy takes it: instants in microseconds; sums stay decimals."""
    if state.is_instant:
        return f"epoch_us({state.name})"
    whole = state.is_count or state.merge is Merge.SUM
    return state.name if whole else f"CAST({state.name} AS DOUBLE)"


@dataclass(frozen=True, slots=True)
class _Grid:
    """Where t tiles of k keys lie in `span` days below one another, of which the last `d` are the partitions."""

    cell: Array
    """`(t,)`: each tile's place in a grid `(span, k)` that is laid out flat."""
    keys: int
    span: int
    d: int

    def filled(self, values: Array, none: float) -> Array:
        """`values (t,)` in their places, `none` in all others: `(span, k)`."""
        found = np.full((self.span, self.keys), none)
        found.reshape(-1)[self.cell] = values
        return found

    def sums(self, values: Array) -> OfWindow:
        """What `values (t,)` add up to."""
        totals = np.zeros((self.span + 1, self.keys), values.dtype)
        totals[1:].reshape(-1)[self.cell] = values
        np.cumsum(totals, axis=0, out=totals)
        return lambda window: totals[-self.d :] - totals[self._before(window)]

    def best(self, best: np.ufunc, values: Array) -> OfWindow:
        """The smallest or the largest of `values (t,)`, NaN for none."""
        held = self.filled(values, np.nan)

        def of(window: int) -> Array:
            # Each step looks at twice as many days; what is left is covered by two that overlap.
            days, found = 1, held
            while 2 * days <= window:
                found, days = _with_earlier(best, found, days), 2 * days
            return _with_earlier(best, found, window - days)[-self.d :]

        return of

    def latest(self, values: Array) -> OfWindow:
        """Of `values (t,)`, in which NaN is none, that of the latest day."""
        held = self.filled(values, np.nan)
        day = np.where(np.isnan(held), -1, np.arange(self.span)[:, None])
        newest = np.maximum.accumulate(day, axis=0)[-self.d :]
        found = held[np.maximum(newest, 0), np.arange(self.keys)]
        end = np.arange(self.span - self.d, self.span)[:, None]
        return lambda window: np.where(newest > end - window, found, np.nan)

    def decayed(self, values: Array, half_life_days: float) -> OfWindow:
        """The weights `values (t,)`, each less by half for every half life since its day; NaN is none."""
        held = self.filled(np.nan_to_num(values), 0.0)

        def of(window: int) -> Array:
            found = np.zeros((self.d, self.keys))
            # Day by day in one order, so that a partition does not depend on those that are built with it.
            for age in range(min(window, self.span)):
                first = self.span - self.d - age
                found[max(-first, 0) :] += held[max(first, 0) : self.span - age] * 2.0 ** (-age / half_life_days)
            return found

        return of

    def _before(self, window: int) -> Array:
        """Of each partition, the row of running totals from before its window began."""
        return np.maximum(np.arange(self.span - self.d, self.span) + 1 - window, 0)


def _rows(view: FeatureView, tiles: pa.Table, span: int, days: Sequence[date]) -> pa.Table:
    """The rows of all keys in `tiles`, whose `day` counts from the first of `span` days: those with one in the longest window."""
    names, number = _keys(view, tiles)
    grid = _Grid(tiles["day"].to_numpy() * len(names[0]) + number, len(names[0]), span, len(days))
    there = grid.sums(np.ones(len(tiles), np.int64))(view.max_window_days) > 0
    day, key = (pa.array(places) for places in np.nonzero(there))
    columns = {"partition_date": pa.array(days, pa.date32()).take(day)}
    columns |= {column: values.take(key) for column, values in zip(view.entity.keys, names, strict=True)}
    schema = snapshot_schema(view)
    for state in view.states:
        over = _over(state, tiles[state.name].combine_chunks(), grid)
        for name, window in ((name, window) for name, of, window in view.columns if of == state):
            columns[name] = _array(over(window)[there], schema.field(name).type)
    return pa.table([columns[name] for name in schema.names], schema=schema)


def _over(state: State, part: pa.Array, grid: _Grid) -> OfWindow:
    """The state over a window that ends with each partition, `(d, k)`: NaN for none."""
    if state.merge is Merge.SUM and not state.is_count:
        exact = millionths(part)
        sums, given = grid.sums(summable(exact)), grid.sums((~np.ma.getmaskarray(exact)).astype(np.int64))
        return lambda window: np.where(given(window) > 0, sums(window).astype(np.float64) / MICRO, np.nan)
    values = part.to_numpy(zero_copy_only=False)
    match state.merge:
        case Merge.SUM | Merge.DAYS:
            return grid.sums(values)
        case Merge.DECAY:
            assert state.half_life_days is not None
            return grid.decayed(values, state.half_life_days)
        case Merge.LAST:
            return grid.latest(values)
        case Merge.MIN:
            return grid.best(np.fmin, values)
        case Merge.MAX:
            return grid.best(np.fmax, values)


def _keys(view: FeatureView, tiles: pa.Table) -> tuple[list[pa.Array], Array]:
    """The k keys, one text array per key column, and which of them each tile is of, `(t,)`."""
    codes = [tiles[key].combine_chunks().dictionary_encode() for key in view.entity.keys]
    number = codes[0].indices.to_numpy().astype(np.int64)
    if len(codes) == 1:
        return [codes[0].dictionary], number
    for code in codes[1:]:
        number = number * len(code.dictionary) + code.indices.to_numpy()
    _, first, number = np.unique(number, return_index=True, return_inverse=True)
    return [code.dictionary.take(code.indices.take(pa.array(first))) for code in codes], number


def _with_earlier(best: np.ufunc, held: Array, days: int) -> Array:
    """`held (span, k)`, each day's value with that of so many days before."""
    if not days:
        return held
    found = held.copy()
    best(held[days:], held[:-days], out=found[days:])
    return found


def _array(values: Array, kind: pa.DataType) -> pa.Array:
    """`values (n,)` as a column, NaN as NULL; instants are in microseconds."""
    if not pa.types.is_timestamp(kind):
        return pa.array(values, kind, from_pandas=True)
    none = np.isnan(values)
    return pa.array(np.where(none, 0, values).astype(np.int64), mask=none).cast(kind)
