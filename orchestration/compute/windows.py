"""From a view's declaration to SQL: tiles, daily snapshots and the parts of point-in-time rows, for DuckDB.

Tiles and snapshots also run on Spark: spark_sql.py carries them over.

    events ─▶ base (one row per event and key) ─▶ tile (key, day) ─▶ snapshot (partition, key)
    events ─▶ parts (what an event gives to each state), which timeline.py merges as of any instant

All statements read two relations that the caller registers: `events` (the lake's columns) and
`items (item_id, categories)`. Instants are UTC; a partition P covers what happened before P + 1 day.
"""

from __future__ import annotations

import re

from schemas.declarations import STATE_COLUMNS
from schemas.errors import DefinitionError
from schemas.feature_sql import base_sql, decay_sql, latest_sql
from schemas.features import FeatureView, Merge, State

_AGGREGATE = re.compile(r"(?P<function>COUNT|SUM|MIN|MAX)\((?P<of>.+)\)")
_LATEST = re.compile(r"(?P<function>MAX)\(ARRAY\[EXTRACT\(EPOCH FROM occurred_at\), (?P<of>.+)\]\)")


def tile_sql(view: FeatureView) -> str:
    """One row per entity and day."""
    keys = ", ".join(view.entity.keys)
    day_end = "CAST(CAST(occurred_at AS DATE) + 1 AS TIMESTAMPTZ)"
    states = ", ".join(
        f"{f'SUM({decay_sql(state, day_end)})' if state.merge is Merge.DECAY else _of_day(state)} AS {state.name}"
        for state in view.states
    )
    return (
        f"SELECT {keys}, CAST(occurred_at AS DATE) AS day, {states} FROM ({base_sql(view.entity)}) GROUP BY {keys}, day"
    )


def _of_day(state: State) -> str:
    """The state of one day's events. A group of a day has one day: counting distinct ones would cost most of a tile."""
    return "CAST(1 AS BIGINT)" if state.merge is Merge.DAYS and "FILTER" not in state.sql else state.sql


def merge_sql(state: State, condition: str, as_of_day: str) -> str:
    """Merge the tiles `t` for which `condition` holds into the state as of the midnight before `as_of_day`."""
    name = f"t.{state.name}"
    if state.merge is Merge.LAST:
        assert state.by is not None
        return latest_sql(f"t.{state.by.name}", name, condition)
    if state.merge is Merge.DECAY:
        assert state.half_life_days is not None
        # DATE_DIFF and the cast say in both engines what `date - date` and a division by a decimal say in DuckDB alone.
        age_days = f"CAST(DATE_DIFF('day', t.day, {as_of_day}) - 1 AS DOUBLE)"
        weighed = f"{name} * POWER(CAST(2 AS DOUBLE), -{age_days} / {state.half_life_days:.6f})"
        return f"COALESCE(CAST(SUM(CAST({weighed} AS DECIMAL(38, 12))) FILTER (WHERE {condition}) AS DOUBLE), 0)"
    function = "SUM" if state.merge is Merge.DAYS else state.merge.upper()
    merged = f"{function}({name}) FILTER (WHERE {condition})"
    if state.is_count:
        return f"COALESCE(CAST({merged} AS BIGINT), 0)"
    if state.merge is Merge.SUM:
        return f"CAST({merged} AS DOUBLE)"
    return merged


def snapshot_sql(view: FeatureView, days: str) -> str:
    """Snapshot rows for every partition in the relation `days (partition_date)`, from the relation `tiles`."""
    keys = ", ".join(f"t.{key}" for key in view.entity.keys)
    columns = ", ".join(
        f"{merge_sql(state, f't.day > d.partition_date - {window}', '(d.partition_date + 1)')} AS {name}"
        for name, state, window in view.columns
    )
    return (
        f"SELECT d.partition_date, {keys}, {columns} FROM {days} AS d JOIN tiles AS t "
        f"ON t.day > d.partition_date - {view.max_window_days} AND t.day <= d.partition_date "
        f"GROUP BY d.partition_date, {keys}"
    )


def parts_sql(view: FeatureView) -> str:
    """What each row of the relation `events (row, <event_columns>)` gives to each state of `view`, with its `row`.

    What is counted, or is an instant, is 1 or 0; a sum is a DECIMAL of six places, everything else a DOUBLE, NULL for
    nothing. States to which every event gives the same have no column.
    """
    listed = ["row", *(f"{part} AS {state.name}" for state in view.states if (part := _part(state)))]
    return f"SELECT {', '.join(listed)} FROM events ORDER BY row"


def categories_sql(view: FeatureView) -> str:
    """Of a view that is keyed by category: a row `(row, category)` for each category of the item of each row of the
    relation `events (row, <keys>, item_id)`."""
    return f"SELECT row, category FROM ({base_sql(view.entity, columns=('row',))}) ORDER BY row, category"


def event_columns(view: FeatureView) -> tuple[str, ...]:
    """The columns of an event, besides its keys, that `parts_sql` reads."""
    used = " ".join(_part(state) for state in view.states)
    return tuple(name for name in STATE_COLUMNS if re.search(rf"\b{name}\b", used, re.IGNORECASE))


def _part(state: State) -> str:
    """What a single event gives to the state; empty where that is the same for every event."""
    found = _LATEST.fullmatch(state.aggregate) or _AGGREGATE.fullmatch(state.aggregate)
    if found is None and state.merge is not Merge.DECAY:
        raise DefinitionError(
            f"state {state.name!r} is {state.aggregate!r}; what one event gives to it is not known: write COUNT, SUM, MIN or "
            "MAX of one expression, or teach orchestration/compute/windows.py the aggregate"
        )
    if found is None or state.is_count or state.is_instant:
        # A day is counted by its events: which of them is the first is found when they are sorted.
        whole = found is None or state.is_instant or found["of"] == "*" or state.merge is Merge.DAYS
        held = [] if whole or found is None else [f"{found['of']} IS NOT NULL"]
        held += [f"({state.where})"] if state.where else []
        return f"CAST(COALESCE({' AND '.join(held)}, false) AS TINYINT)" if held else ""
    part = f"CAST({found['of']} AS {'DECIMAL(18, 6)' if state.merge is Merge.SUM else 'DOUBLE'})"
    return f"CASE WHEN {state.where} THEN {part} END" if state.where else part
