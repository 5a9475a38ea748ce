"""From a view's declaration to SQL: tiles, daily snapshots and point-in-time rows, for DuckDB.

Tiles and snapshots also run on Spark: spark_sql.py carries them over.

    events ─▶ base (one row per event and key) ─▶ tile (key, day) ─▶ snapshot (partition, key)
                       └────────── head (events of the label's own day before the label) ──┘ merged at a label

All statements read two relations that the caller registers: `events` (the lake's columns) and
`items (item_id, categories)`. Instants are UTC; a partition P covers what happened before P + 1 day.
"""

from __future__ import annotations

from schemas.feature_sql import base_sql, decay_sql, events_sql, latest_sql, merged_sql
from schemas.features import FeatureView, Merge, State, column


def tile_sql(view: FeatureView, *, on_time: bool = False) -> str:
    """One row per entity and day. `on_time` leaves out events that were learned of after their day had ended."""
    keys = ", ".join(view.entity.keys)
    day_end = "CAST(CAST(occurred_at AS DATE) + 1 AS TIMESTAMPTZ)"
    states = ", ".join(
        f"{f'SUM({decay_sql(state, day_end)})' if state.merge is Merge.DECAY else _of_day(state)} AS {state.name}"
        for state in view.states
    )
    where = " WHERE CAST(known_at AS DATE) <= CAST(occurred_at AS DATE)" if on_time else ""
    return f"SELECT {keys}, CAST(occurred_at AS DATE) AS day, {states} FROM ({base_sql(view.entity)}){where} GROUP BY {keys}, day"


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


_MIDNIGHT = "CAST(l.day AS TIMESTAMPTZ)"


def _left_edge(window_days: int) -> str:
    return f"{_MIDNIGHT} - INTERVAL '{window_days} days'"


def _of_single_events(state: State, window_days: int) -> str:
    """The state over single events, to be merged with that over tiles."""
    if state.merge is Merge.DAYS:
        # A late event of a day that has a tile is of a day that is counted already.
        return state.sql_over(f"occurred_at >= {_left_edge(window_days)}", "NOT in_tile")
    return events_sql(state, _left_edge(window_days), _MIDNIGHT)


def _merged(state: State, window_days: int) -> str:
    """The state of the label's snapshot `s` and of its single events `h` as one."""
    return merged_sql(
        state, lambda part: f"s.{column(part, window_days)}", lambda part: f"h.{column(part, window_days)}"
    )


def point_in_time_sql(view: FeatureView, labels: str = "labels", tiles: str = "tiles") -> str:
    """States of `view` as they were known at each row of `labels (label_id, <keys>, read_at)`; one row per label.

    Three parts merge: tiles of days before the label's own, made of events known by their day's end; events of
    those days that were learned of later, if known at the label; and the label's own day, strictly before it.
    `tiles` was made with `on_time=True`. Labels without any event get no row.
    """
    keys = view.entity.keys
    matches = " AND ".join(f"{{left}}.{key} = {{right}}.{key}" for key in keys)
    listed = ", ".join(keys)
    snap = ", ".join(
        f"{merge_sql(state, f't.day >= l.day - {window}', 'l.day')} AS {name}" for name, state, window in view.columns
    )
    single = ", ".join(f"{_of_single_events(state, window)} AS {name}" for name, state, window in view.columns)
    merged = ", ".join(f"{_merged(state, window)} AS {name}" for name, state, window in view.columns)
    return f"""
        WITH l AS (SELECT label_id, {listed}, read_at, CAST(read_at AS DATE) AS day FROM {labels}),
        points AS (SELECT DISTINCT {listed}, day FROM l),
        snap AS (
            SELECT {", ".join(f"l.{key}" for key in keys)}, l.day, {snap} FROM points AS l JOIN {tiles} AS t
            ON {matches.format(left="t", right="l")} AND t.day < l.day AND t.day >= l.day - {view.max_window_days}
            GROUP BY {", ".join(f"l.{key}" for key in keys)}, l.day
        ),
        base AS (SELECT *, CAST(occurred_at AS DATE) AS day FROM ({base_sql(view.entity)})),
        single AS (
            SELECT l.label_id, l.day, e.* EXCLUDE (day), false AS in_tile FROM l
            JOIN base AS e ON {matches.format(left="e", right="l")}
            AND e.day = l.day AND e.occurred_at < l.read_at AND e.known_at <= l.read_at
            UNION ALL
            SELECT l.label_id, l.day, e.* EXCLUDE (day), t.day IS NOT NULL AS in_tile FROM l
            JOIN (SELECT * FROM base WHERE CAST(known_at AS DATE) > day) AS e ON {matches.format(left="e", right="l")}
            AND e.day < l.day AND e.day >= l.day - {view.max_window_days} AND e.known_at <= l.read_at
            LEFT JOIN {tiles} AS t ON {matches.format(left="t", right="e")} AND t.day = e.day
        ),
        loose AS (SELECT label_id, {single} FROM single AS l GROUP BY label_id, day)
        SELECT l.label_id, {merged} FROM l
        LEFT JOIN snap AS s ON {matches.format(left="s", right="l")} AND s.day = l.day
        LEFT JOIN loose AS h ON h.label_id = l.label_id
        WHERE s.day IS NOT NULL OR h.label_id IS NOT NULL
    """
