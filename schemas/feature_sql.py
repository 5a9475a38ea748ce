"""SQL of states that DuckDB (training, snapshots) and Postgres (heads) share, written once so that they cannot differ.

Relations: `e` is a view's base (one row per event and entity key); `midnight` is the SQL expression of the instant at
which decayed states are weighed: the midnight (UTC) that began the read's day.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from schemas.declarations import STATE_COLUMNS
from schemas.features import Entity, FeatureView, Merge, State, column

_DAY_SECONDS = 86_400


def base_sql(entity: Entity, events: str = "events", where: str = "", *, columns: Sequence[str] = STATE_COLUMNS) -> str:
    """One row per event and entity key, with `columns` of the event: by default all that states use."""
    keys = ", ".join(f"c.{key}" if key == "category" else f"e.{key}" for key in entity.keys)
    categories = ""
    if entity.by_category:
        categories = " JOIN (SELECT item_id, unnest(categories) AS category FROM items) AS c ON c.item_id = e.item_id"
    filtered = f" WHERE {where}" if where else ""
    held = ", ".join(f"e.{name}" for name in columns)
    return f"SELECT {keys}, {held} FROM {events} AS e{categories}{filtered}"


def decay_sql(state: State, instant: str) -> str:
    """The weight of one event at `instant`, as an exact decimal so that sums do not depend on the rows' order."""
    assert state.half_life_days is not None
    half_life = state.half_life_days * _DAY_SECONDS
    age = f"CAST(EXTRACT(EPOCH FROM {instant}) - EXTRACT(EPOCH FROM occurred_at) AS DOUBLE PRECISION)"
    return f"CAST(POWER(CAST(2 AS DOUBLE PRECISION), -{age} / {half_life:.1f}) AS DECIMAL(38, 12))"


def latest_sql(instant: str, value: str, condition: str) -> str:
    """The `value` with the latest `instant` among the rows for which `condition` holds; NULL values do not count."""
    found = f"MAX(ARRAY[EXTRACT(EPOCH FROM {instant}), {value}]) FILTER (WHERE {condition} AND {value} IS NOT NULL)"
    return f"({found})[2]"


def events_sql(state: State, since: str | None, midnight: str) -> str:
    """The state over the single events of `e` from the instant `since` on; None: over all of them."""
    if state.merge is Merge.DECAY:
        state = replace(state, aggregate=f"SUM({decay_sql(state, midnight)})")
    sql = state.sql_over(*([f"occurred_at >= {since}"] if since else []))
    if state.merge is Merge.DECAY:
        sql = f"COALESCE({sql}, 0)"  # like a count: an entity whose events all lie before the window has 0
    return f"CAST({sql} AS DOUBLE PRECISION)" if "DECIMAL" in state.aggregate else sql


def merged_sql(state: State, one: Callable[[State], str], other: Callable[[State], str]) -> str:
    """Two states of one kind, either of which may be NULL, as one.

    `one` and `other` give the SQL of a state of either side, as one state may need another beside it.
    """
    a, b = one(state), other(state)
    match state.merge:
        case Merge.MIN:
            return f"LEAST({a}, {b})"
        case Merge.MAX:
            return f"GREATEST({a}, {b})"
        case Merge.LAST:
            assert state.by is not None
            a_at, b_at = one(state.by), other(state.by)
            return (
                f"CASE WHEN {b_at} IS NULL OR {a_at} > {b_at} THEN {a} "
                f"WHEN {a_at} IS NULL OR {b_at} > {a_at} THEN {b} ELSE GREATEST({a}, {b}) END"
            )
        case _:
            # A sum over no values stays NULL; a count is never NULL where its row exists.
            return f"CASE WHEN {a} IS NULL AND {b} IS NULL THEN NULL ELSE COALESCE({a}, 0) + COALESCE({b}, 0) END"


def read_sql(view: FeatureView, entities: str, at: str = "%(at)s") -> str:
    """One Postgres statement that reads `view`, snapshot and head merged, as of the instant `at`.

    `entities` is the condition that picks the rows by key column, e.g. `user_id = %(user_id)s`. Parameters: `at`, and
    `head_since`, `ttl_days` before it or earlier: an older snapshot is not read, so no head reaches further back.
    Gives one row per entity that has anything, or one with NULL keys: keys, `as_of` (seconds; when decayed states were weighed),
    `settled_at` (seconds; the snapshot's midnight, NULL without one), then the snapshot columns (instants in seconds).
    """
    keys = ", ".join(view.entity.keys)
    # A head begins at most `ttl_days` ago, so that it lies in every longer window.
    head = ", ".join(
        f"{events_sql(state, None if window >= view.ttl_days else _left_edge(window), '(SELECT midnight FROM edge)')} AS {name}"
        for name, state, window in view.columns
    )
    merged = ", ".join(
        f"CAST({_seconds(state, _with_head(view, state, window))} AS DOUBLE PRECISION) AS {name}"
        for name, state, window in view.columns
    )
    names = ", ".join(name for name, _, _ in view.columns)
    base = base_sql(
        view.entity,
        "recent_events",
        # The second bound follows from the first and is there for the planner: a value, not a query's result, lets it
        # forget the partitions of other days before it weighs any plan.
        f"e.occurred_at >= (SELECT settled FROM edge) AND e.occurred_at >= %(head_since)s AND e.occurred_at < {at} "
        f"AND {_of_event(entities)}",
    )
    return f"""
        WITH newest AS (
            SELECT max(partition_date) AS p FROM feature_ledger
            WHERE view = '{view.name}' AND definition_hash = '{view.definition_hash}'
            AND partition_date < CAST({at} AS DATE) AND partition_date >= CAST({at} AS DATE) - {view.ttl_days}
        ), edge AS MATERIALIZED (
            SELECT p, CAST(CAST({at} AS DATE) AS TIMESTAMPTZ) AS midnight,
            CAST(COALESCE(p + 1, CAST({at} AS DATE)) AS TIMESTAMPTZ) AS settled FROM newest
        ), s AS (
            SELECT * FROM features.{view.name} WHERE partition_date = (SELECT p FROM edge) AND {entities}
        ), h AS (
            SELECT {keys}, {head} FROM ({base}) AS e GROUP BY {keys}
        )
        SELECT {keys}, EXTRACT(EPOCH FROM edge.midnight)::float8 AS as_of,
        EXTRACT(EPOCH FROM CASE WHEN edge.p IS NULL THEN NULL ELSE edge.settled END)::float8 AS settled_at, {names}
        FROM edge LEFT JOIN (SELECT {keys}, {merged} FROM s FULL JOIN h USING ({keys})) AS r ON true
    """


def _of_event(entities: str) -> str:
    return entities.replace("user_id", "e.user_id", 1).replace("item_id", "e.item_id", 1)


def _left_edge(window_days: int) -> str:
    # A query of its own is answered once; the subtraction beside a column would be done for every row.
    return f"(SELECT midnight - INTERVAL '{window_days} days' FROM edge)"


def _with_head(view: FeatureView, state: State, window_days: int) -> str:
    return merged_sql(
        state,
        lambda part: _aged(view, part, window_days),
        lambda part: f"h.{column(part, window_days)}",
    )


def _aged(view: FeatureView, state: State, window_days: int) -> str:
    """A snapshot's state for a read that comes late, the newest snapshot being days old.

    Decayed states are weighed again. A window that began after the snapshot ended has nothing of it; longer ones keep
    what should have left them meanwhile: nobody can take it out of a sum.
    """
    held = f"s.{column(state, window_days)}"
    if state.merge is Merge.DECAY:
        late = "CAST(EXTRACT(EPOCH FROM (SELECT midnight - settled FROM edge)) AS DOUBLE PRECISION)"
        half_life = (state.half_life_days or 1) * _DAY_SECONDS
        held = f"({held} * POWER(CAST(2 AS DOUBLE PRECISION), -{late} / {half_life:.1f}))"
    if window_days >= view.ttl_days:
        return held
    nothing = "0" if state.is_count or state.merge is Merge.DECAY else "NULL"
    return f"CASE WHEN (SELECT settled FROM edge) <= {_left_edge(window_days)} THEN {nothing} ELSE {held} END"


def _seconds(state: State, sql: str) -> str:
    return f"EXTRACT(EPOCH FROM {sql})" if state.is_instant else sql
