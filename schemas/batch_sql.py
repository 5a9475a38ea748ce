"""Any number of feature views and keys in one statement: the single reads put one under the other.

Every part selects its own number, its keys, and what the single read gives, padded with NULL to the width of the widest
part. A part's keys come as one array per key column: the parameters `k<part>_<column>`.
"""

from __future__ import annotations

from collections.abc import Sequence

from schemas import online_sql
from schemas.feature_sql import read_sql
from schemas.features import Entity, FeatureView


def live_sql(entities: Sequence[Entity]) -> str:
    """Rows `(part, keys, edges, packed rows, tiles, expired days)` of `entities` at the present; see `online_sql`.

    `expired days`, one per view: when a packed row of the newest partition ended, in days before `today`, if that
    partition is out of its ttl. Parameters: `today` and the keys.
    """
    widest = max(len(entity.keys) for entity in entities)
    most = max(len(online_sql.views_of(entity)) for entity in entities)
    return " UNION ALL ".join(_live_part(part, entity, widest, most) for part, entity in enumerate(entities))


def past_sql(views: Sequence[FeatureView]) -> str:
    """Rows `(part, keys, as_of, settled_at, expired_at, states)` of `views` at the instant `at`; see `read_sql`.

    `expired_at`: the midnight (seconds) that ended the newest partition, for keys in it, if that is out of its ttl.
    Parameters: `at`, `head_since` and the keys.
    """
    widest = max(len(view.entity.keys) for view in views)
    most = max(len(view.columns) for view in views)
    return " UNION ALL ".join(_past_part(part, view, widest, most) for part, view in enumerate(views))


def _live_part(part: int, entity: Entity, widest: int, most: int) -> str:
    views = online_sql.views_of(entity)
    same = " AND ".join(f"r.{key} = k.{key}" for key in entity.keys)
    edges, rows = online_sql.output_columns(entity)
    expired = [_expired_days(view) for view in views]
    columns = [
        *_padded([f"k.{key}" for key in entity.keys], widest, "text"),
        *_padded(edges, most, "int"),
        *_padded(rows, most, "bytea"),
        "t.tiles",
        *_padded(expired, most, "int"),
    ]
    return (
        f"(WITH edge AS MATERIALIZED ({online_sql.edge_sql(views)}), "
        f"k AS ({_asked(part, entity)}) SELECT {part} AS part, {', '.join(columns)} FROM edge LEFT JOIN "
        f"(k LEFT JOIN {online_sql.rows_table(entity)} AS r ON {same} "
        # Key by key: a plan that is made once expects few keys, and would compare each of them with every tile of today.
        f"LEFT JOIN LATERAL ({online_sql.tiles_sql(entity, ' AND '.join(f'{key} = k.{key}' for key in entity.keys))}) AS t "
        f"ON true) ON r.{entity.keys[0]} IS NOT NULL OR t.tiles IS NOT NULL)"
    )


def _expired_days(view: FeatureView) -> str:
    newest = (
        f"(SELECT max(partition_date) FROM feature_ledger WHERE view = '{view.name}' "
        f"AND definition_hash = '{view.definition_hash}' AND partition_date < %(today)s::date)"
    )
    # A query of its own runs only where it is asked: nothing is looked up while the newest partition is fresh.
    return (
        f"CASE WHEN edge.{view.name} IS NULL AND r.{view.name}_date = {newest} AND substring(r.{view.name} FROM 1 FOR 8) "
        f"= decode('{view.definition_hash}', 'hex') THEN r.{view.name}_date - %(today)s::date END"
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
    """The keys asked for, each once; who asked to be forgotten reads as unknown."""
    arrays = ", ".join(f"%(k{part}_{place})s::text[]" for place in range(len(entity.keys)))
    hidden = ""
    if "user_id" in entity.keys:
        hidden = " WHERE NOT EXISTS (SELECT FROM erasure_requests AS h WHERE h.user_id = a.user_id)"
    return f"SELECT DISTINCT a.* FROM unnest({arrays}) AS a ({', '.join(entity.keys)}){hidden}"


def _padded(columns: list[str], count: int, type_: str) -> list[str]:
    return columns + [f"NULL::{type_}"] * (count - len(columns))
