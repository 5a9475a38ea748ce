"""Any number of feature views and keys in one statement.

A read at the present gives one row, in which everything of an entity is one packed value: rows for each key would cost
more to send and to take apart than to look up. A read at an earlier instant puts the single reads one under the other;
every part selects its own number, its keys, and what the single read gives, padded with NULL to the width of the widest.

A part's keys come as one array per key column, each key once.
"""

from __future__ import annotations

from collections.abc import Sequence

from schemas import online_sql
from schemas.feature_sql import read_sql
from schemas.features import Entity, FeatureView

_TODAY = "$1::date"


def live_sql(entities: Sequence[Entity]) -> str:
    """One row of `entities` at the present: for each view its newest partition, then each entity's rows and tiles.

    A partition is in days before today; out of its ttl or not, but for `today` and later. Rows, of the keys that have
    one: the key's place (from 1), then of each view the packed value of that partition, or as many zeros. Tiles, of the
    days that no partition within its ttl holds: the key's place, the day before today, its states. Everything is 8 bytes
    wide, places whole numbers and all else doubles. Parameters: today, then the arrays of keys.
    """
    views = [view for entity in entities for view in online_sql.views_of(entity)]
    parts, columns = [f"edge AS MATERIALIZED ({_newest(views)})"], [f"edge.{view.name} - {_TODAY}" for view in views]
    parameter = 2
    for part, entity in enumerate(entities):
        arrays = ", ".join(f"${parameter + place}::text[]" for place in range(len(entity.keys)))
        parameter += len(entity.keys)
        listed = f"unnest({arrays}) WITH ORDINALITY AS a ({', '.join(entity.keys)}, place)"
        parts.append(f"k{part} AS MATERIALIZED (SELECT * FROM {listed}{_hidden(entity)})")
        columns += [_packed_rows(part, entity), _packed_tiles(part, entity)]
    return f"WITH {', '.join(parts)} SELECT {', '.join(columns)} FROM edge"


def past_sql(views: Sequence[FeatureView]) -> str:
    """Rows `(part, keys, as_of, settled_at, expired_at, states)` of `views` at the instant `at`; see `read_sql`.

    `expired_at`: the midnight (seconds) that ended the newest partition, for keys in it, if that is out of its ttl.
    Parameters: `at`, `head_since` and the keys, `k<part>_<column>`.
    """
    widest = max(len(view.entity.keys) for view in views)
    most = max(len(view.columns) for view in views)
    return " UNION ALL ".join(_past_part(part, view, widest, most) for part, view in enumerate(views))


def _newest(views: Sequence[FeatureView]) -> str:
    """One row: of each view the newest partition before today, NULL without one."""
    newest = []
    for view in views:
        mine = f"view = '{view.name}' AND definition_hash = '{view.definition_hash}'"
        newest.append(
            f"COALESCE(max(partition_date) FILTER (WHERE {mine} AND partition_date >= {_TODAY} - {view.ttl_days}), "
            # A query of its own runs only where it is asked: nothing more is looked up while partitions are fresh.
            f"(SELECT max(partition_date) FROM feature_ledger WHERE {mine} AND partition_date < {_TODAY})) AS {view.name}"
        )
    names = ", ".join(f"'{view.name}'" for view in views)
    return (
        f"SELECT {', '.join(newest)} FROM feature_ledger WHERE view IN ({names}) AND partition_date < {_TODAY} "
        f"AND partition_date >= {_TODAY} - {max(view.ttl_days for view in views)}"
    )


def _packed_rows(part: int, entity: Entity) -> str:
    packed = ["int8send(k.place)"]
    for view in online_sql.views_of(entity):
        width = online_sql.packed_bytes(view)
        # As wide as it should be, whatever is stored: the reader takes the bytes apart by their places.
        packed.append(
            f"CASE WHEN r.{view.name}_date = edge.{view.name} AND octet_length(r.{view.name}) = {width} "
            f"THEN r.{view.name} ELSE decode(repeat('00', {width}), 'hex') END"
        )
    same = " AND ".join(f"r.{key} = k.{key}" for key in entity.keys)
    return (
        f"(SELECT string_agg({' || '.join(packed)}, ''::bytea) "
        f"FROM k{part} AS k JOIN {online_sql.rows_table(entity)} AS r ON {same})"
    )


def _packed_tiles(part: int, entity: Entity) -> str:
    packed = [
        "int8send(k.place)",
        f"float8send((t.day - {_TODAY})::float8)",
        *(online_sql.packed_state(f"t.{state.name}", state) for state in online_sql.tile_states(entity)),
    ]
    fresh = ", ".join(
        f"CASE WHEN {view.name} >= {_TODAY} - {view.ttl_days} THEN {view.name} END"
        for view in online_sql.views_of(entity)
    )
    same = " AND ".join(f"{key} = k.{key}" for key in entity.keys)
    return (
        f"(SELECT string_agg({' || '.join(packed)}, ''::bytea) FROM k{part} AS k "
        # Key by key (OFFSET 0 keeps it so): a plan that is made once expects few tiles, and would read all of today's.
        f"CROSS JOIN LATERAL (SELECT * FROM {online_sql.tiles_table(entity)} WHERE {same} AND day <= {_TODAY} "
        f"AND day > COALESCE((SELECT LEAST({fresh}) FROM edge), {_TODAY} - 1) OFFSET 0) AS t)"
    )


def _past_part(part: int, view: FeatureView, widest: int, most: int) -> str:
    where = _chosen(part, view.entity)
    keys = _padded([f"q.{key}" for key in view.entity.keys], widest, "text")
    states = _padded([f"q.{name}" for name, _, _ in view.columns], most, "float8")
    nothing = ", ".join(["NULL::float8"] * most)
    ended = "EXTRACT(EPOCH FROM CAST(q.partition_date + 1 AS TIMESTAMPTZ))::float8"
    return (
        f"(SELECT {part} AS part, {', '.join(keys)}, q.as_of, q.settled_at, NULL::float8, {', '.join(states)} "
        f"FROM ({read_sql(view, where)}) AS q) UNION ALL "
        f"(SELECT {part}, {', '.join(keys)}, NULL::float8, NULL::float8, {ended}, {nothing} FROM features.{view.name} AS q "
        f"WHERE {where} AND partition_date = (SELECT max(partition_date) FROM feature_ledger "
        f"WHERE view = '{view.name}' AND definition_hash = '{view.definition_hash}' "
        f"AND partition_date < CAST(%(at)s AS DATE)) AND partition_date < CAST(%(at)s AS DATE) - {view.ttl_days})"
    )


def _chosen(part: int, entity: Entity) -> str:
    """The condition that a row's keys are among those asked for."""
    return f"({', '.join(entity.keys)}) IN ({_asked(part, entity)})"


def _asked(part: int, entity: Entity) -> str:
    """The keys asked for; who asked to be forgotten reads as unknown."""
    arrays = ", ".join(f"%(k{part}_{place})s::text[]" for place in range(len(entity.keys)))
    return f"SELECT DISTINCT a.* FROM unnest({arrays}) AS a ({', '.join(entity.keys)}){_hidden(entity)}"


def _hidden(entity: Entity) -> str:
    """The condition that the person of a key `a` is not to be forgotten."""
    if "user_id" not in entity.keys:
        return ""
    return " WHERE NOT EXISTS (SELECT FROM erasure_requests AS h WHERE h.user_id = a.user_id)"


def _padded(columns: list[str], count: int, type_: str) -> list[str]:
    return columns + [f"NULL::{type_}"] * (count - len(columns))
