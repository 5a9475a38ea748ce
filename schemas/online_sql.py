"""The online side of features as SQL: what Postgres keeps per entity so that a read costs one look-up a key.

    online.<entity>_rows    per key: of each view, the newest partition's states, packed into one value
    online.<entity>_tiles   per key and day: what happened that day as mergeable states, kept up by every write of events

A read is a row and the tiles of the days since its partition; inference/live.py merges the two. Views of one entity
share its tables, so that any number of them costs the same look-up.
"""

from __future__ import annotations

from collections.abc import Iterable

from schemas.declarations import check_states
from schemas.feature_sql import base_sql, decay_sql, merged_sql
from schemas.features import Entity, FeatureView, Merge, State
from schemas.views import VIEWS

KEPT_DAYS = max(view.ttl_days for view in VIEWS) + 1
"""Days of tiles: no read reaches further back than a snapshot may be old."""
ERASURE_LOCK = 7_205_394
"""The advisory lock that an erasure holds alone, and whoever writes about people shares until the end of the transaction."""
SEEN = "pg_current_snapshot()::text"
"""Which transactions a statement sees: tells later what a read could know."""
UTC_DAY = "CAST(occurred_at AT TIME ZONE 'UTC' AS DATE)"
_DAY_END = f"(CAST({UTC_DAY} + 1 AS TIMESTAMP) AT TIME ZONE 'UTC')"


def entities(views: Iterable[FeatureView] = VIEWS) -> tuple[Entity, ...]:
    """The entities that have views, in order of first use."""
    return tuple({view.entity.name: view.entity for view in views}.values())


def views_of(entity: Entity, views: Iterable[FeatureView] = VIEWS) -> tuple[FeatureView, ...]:
    """The views of one entity, in order."""
    return tuple(view for view in views if view.entity == entity)


def tile_states(entity: Entity, views: Iterable[FeatureView] = VIEWS) -> tuple[State, ...]:
    """The states of an entity's tiles: those of its views, each once.

    Raises DefinitionError if two views mean different things by one state's name.
    """
    check_states(views_of(entity, views))
    return tuple({state.name: state for view in views_of(entity, views) for state in view.states}.values())


def rows_table(entity: Entity) -> str:
    """Where the newest packed states of an entity's keys are."""
    return f"online.{entity.name}_rows"


def tiles_table(entity: Entity) -> str:
    """Where an entity's days are."""
    return f"online.{entity.name}_tiles"


def tables_sql(entity: Entity) -> tuple[str, str]:
    """`CREATE TABLE` of an entity's rows and of its tiles."""
    keys = ", ".join(f"{key} text NOT NULL" for key in entity.keys)
    listed = ", ".join(entity.keys)
    packed = ", ".join(f"{view.name}_date date, {view.name} bytea" for view in views_of(entity))
    states = ", ".join(f"{state.name} {_type(state)}" for state in tile_states(entity))
    return (
        f"CREATE TABLE {rows_table(entity)} ({keys}, {packed}, PRIMARY KEY ({listed}))",
        # Tiles of hot items are updated with every event: room on the page keeps the indexes out of it.
        f"CREATE TABLE {tiles_table(entity)} ({keys}, day date NOT NULL, {states}, PRIMARY KEY ({listed}, day)) "
        "WITH (fillfactor = 70)",
    )


def tile_steps_sql(stored: str, since: str) -> str:
    """`WITH` queries that merge what the query `stored` gives into every entity's tiles, from the day `since` on."""
    events = f"(SELECT * FROM {stored} WHERE occurred_at >= {since})"
    return ", ".join(f"{entity.name}_tiles AS ({add_to_tiles_sql(entity, events)})" for entity in entities())


def add_to_tiles_sql(entity: Entity, events: str) -> str:
    """Merge the events in the relation `events` into the tiles of their days.

    Keys are locked in order, so that two writers wait for each other and never block each other.
    """
    keys = ", ".join(entity.keys)
    states = tile_states(entity)
    aggregates = ", ".join(f"{_aggregate(state)} AS {state.name}" for state in states)
    merged = ", ".join(f"{state.name} = {_same_day(state)}" for state in states)
    return (
        f"INSERT INTO {tiles_table(entity)} AS t ({keys}, day, {', '.join(state.name for state in states)}) "
        f"SELECT {keys}, {UTC_DAY} AS day, {aggregates} FROM ({base_sql(entity, events)}) AS e "
        f"GROUP BY {keys}, day ORDER BY {keys}, day ON CONFLICT ({keys}, day) DO UPDATE SET {merged}"
    )


def put_rows_sql(view: FeatureView, day: str) -> tuple[str, str]:
    """Two statements that make the partition `day`, an SQL expression, the newest of `view` online.

    The first packs the partition's rows into place, where no newer one is held; the second empties what an earlier
    build of the same partition left for keys that it no longer has. In one transaction it looks only at rows that the
    first did not write: planned with statistics from before the load, a join with all of 20,000 rows took 43 s.
    """
    table, name = rows_table(view.entity), view.name
    keys = ", ".join(view.entity.keys)
    same = " AND ".join(f"f.{key} = r.{key}" for key in view.entity.keys)
    packed = " || ".join(
        [
            f"decode('{view.definition_hash}', 'hex')",
            *(packed_state(column, state) for column, state, _ in view.columns),
        ]
    )
    return (
        f"INSERT INTO {table} AS r ({keys}, {name}_date, {name}) "
        f"SELECT {keys}, partition_date, {packed} FROM features.{name} WHERE partition_date = {day} ORDER BY {keys} "
        f"ON CONFLICT ({keys}) DO UPDATE SET {name}_date = excluded.{name}_date, {name} = excluded.{name} "
        f"WHERE r.{name}_date IS NULL OR r.{name}_date <= excluded.{name}_date",
        f"UPDATE {table} AS r SET {name}_date = NULL, {name} = NULL WHERE r.{name}_date = {day} "
        f"AND r.xmin <> pg_current_xact_id()::xid AND NOT EXISTS "
        f"(SELECT FROM features.{name} AS f WHERE f.partition_date = {day} AND {same})",
    )


def edge_sql(views: Iterable[FeatureView]) -> str:
    """One row: for each view, the newest partition fit to be read on the day `today` (NULL without one)."""
    views = tuple(views)
    newest = ", ".join(
        f"max(partition_date) FILTER (WHERE view = '{view.name}' AND definition_hash = '{view.definition_hash}' "
        f"AND partition_date >= %(today)s::date - {view.ttl_days}) AS {view.name}"
        for view in views
    )
    names = ", ".join(f"'{view.name}'" for view in views)
    return (
        f"SELECT {newest} FROM feature_ledger WHERE view IN ({names}) AND partition_date < %(today)s::date "
        f"AND partition_date >= %(today)s::date - {max(view.ttl_days for view in views)}"
    )


def tiles_sql(entity: Entity, where: str) -> str:
    """Per key, `tiles`: the packed days since the oldest edge in the relation `edge`, one after the other."""
    keys = ", ".join(entity.keys)
    oldest = f"LEAST({', '.join(view.name for view in views_of(entity))})"
    packed = " || ".join(
        [
            "float8send((day - %(today)s::date)::float8)",
            *(packed_state(state.name, state) for state in tile_states(entity)),
        ]
    )
    return (
        f"SELECT {keys}, string_agg({packed}, ''::bytea) AS tiles FROM {tiles_table(entity)} WHERE {where} "
        f"AND day <= %(today)s::date AND day > COALESCE((SELECT {oldest} FROM edge), %(today)s::date - 1) GROUP BY {keys}"
    )


def outputs_sql(entity: Entity) -> str:
    """What a read selects beside its keys, from `edge`, rows `r` and tiles `t`: see `inference.live.Live`."""
    edges, rows = output_columns(entity)
    return f"{', '.join(edges)}, {', '.join(rows)}, t.tiles"


def output_columns(entity: Entity) -> tuple[list[str], list[str]]:
    """Per view of `entity`: its edge in days before today, and the packed row of that partition."""
    views = views_of(entity)
    return (
        [f"edge.{view.name} - %(today)s::date" for view in views],
        [f"CASE WHEN r.{view.name}_date = edge.{view.name} THEN r.{view.name} END" for view in views],
    )


def read_entity_sql(entity: Entity, where: str) -> str:
    """Rows and tiles of the keys for which `where` holds; at least one row, with NULL keys if there are none."""
    keys = ", ".join(entity.keys)
    return (
        f"WITH edge AS MATERIALIZED ({edge_sql(views_of(entity))}), "
        f"r AS (SELECT * FROM {rows_table(entity)} WHERE {where}), t AS ({tiles_sql(entity, where)}) "
        f"SELECT {keys}, {outputs_sql(entity)} FROM edge LEFT JOIN (r FULL JOIN t USING ({keys})) ON true"
    )


def packed_state(column: str, state: State) -> str:
    """A column that holds `state` as the 8 bytes of a double: instants in seconds since 1970, NULL as NaN."""
    # EXTRACT would go through NUMERIC, whose cast to a double costs more than all the rest; the double is the same.
    value = f"date_part('epoch', {column})" if state.is_instant else column
    return f"float8send(COALESCE({value}::float8, 'NaN'))"


def packed_bytes(view: FeatureView) -> int:
    """How long a packed row of `view` is: the hash of its definition and its states, 8 bytes each."""
    return 8 * (1 + len(view.columns))


def _type(state: State) -> str:
    if state.is_instant:
        return "timestamptz"
    if state.merge is Merge.DECAY:
        return "numeric(38, 12)"
    if state.is_count:
        return "bigint"
    return "numeric(38, 6)" if "DECIMAL" in state.aggregate else "double precision"


def _aggregate(state: State) -> str:
    return f"SUM({decay_sql(state, _DAY_END)})" if state.merge is Merge.DECAY else state.sql


def _same_day(state: State) -> str:
    """What a tile holds and what is added to it as one. A day is counted once, however many parts its events come in."""
    if state.merge is Merge.DAYS:
        return f"GREATEST(t.{state.name}, excluded.{state.name})"
    return merged_sql(state, lambda part: f"t.{part.name}", lambda part: f"excluded.{part.name}")
