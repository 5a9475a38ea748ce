"""The online tables of features: made from the declarations, filled again when those change, trimmed day by day."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Any

import psycopg

from schemas import online_sql
from schemas.errors import DefinitionError
from schemas.features import FeatureView


def ensure_online_tables(connection: psycopg.Connection[Any]) -> None:
    """Create the rows and tiles of every entity; where a changed declaration changes a table, make it anew.

    What is made anew is filled from the recent events and the newest partitions, so no read sees less than before.
    """
    connection.execute("CREATE SCHEMA IF NOT EXISTS online")
    for entity in online_sql.entities():
        rows, tiles = online_sql.tables_sql(entity)
        if _renew(connection, online_sql.tiles_table(entity), tiles):
            since = tiles_since(datetime.now(UTC))
            events = f"(SELECT * FROM recent_events WHERE occurred_at >= '{since.isoformat()}')"
            connection.execute(online_sql.add_to_tiles_sql(entity, events))
        if _renew(connection, online_sql.rows_table(entity), rows):
            for view in online_sql.views_of(entity):
                newest = newest_partition(connection, view)
                if newest is not None:
                    connection.execute(online_sql.put_rows_sql(view, f"'{newest}'::date")[0])


def newest_partition(connection: psycopg.Connection[Any], view: FeatureView) -> date | None:
    """The last partition of `view` that was built by its present definition."""
    row = connection.execute(
        "SELECT max(partition_date) FROM feature_ledger WHERE view = %s AND definition_hash = %s",
        (view.name, view.definition_hash),
    ).fetchone()
    return row[0] if row else None


def tiles_since(now: datetime) -> datetime:
    """The first instant that tiles are kept of."""
    midnight = now.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    return midnight - timedelta(days=online_sql.KEPT_DAYS)


def trim_tiles(connection: psycopg.Connection[Any], now: datetime) -> None:
    """Drop the tiles of days that no read reaches any more."""
    for entity in online_sql.entities():
        connection.execute(f"DELETE FROM {online_sql.tiles_table(entity)} WHERE day < %s", (tiles_since(now).date(),))


def rebuild_tiles(connection: psycopg.Connection[Any], *, users: Sequence[str], items: Sequence[str]) -> None:
    """Count the tiles of these people and items anew from the recent events, after some of those were taken out.

    The caller sees to it that no event arrives before the transaction ends.
    """
    since = tiles_since(datetime.now(UTC))
    for entity in online_sql.entities():
        if "user_id" in entity.keys:
            column, chosen = "user_id", list(users)
        elif "item_id" in entity.keys:
            column, chosen = "item_id", list(items)
        else:
            raise DefinitionError(
                f"entity {entity.name!r} is keyed by neither user_id nor item_id; say in rebuild_tiles which of its tiles "
                "an erased event was counted in"
            )
        connection.execute(
            f"DELETE FROM {online_sql.tiles_table(entity)} WHERE {column} = ANY(%s) AND day >= %s",
            (chosen, since.date()),
        )
        events = f"(SELECT * FROM recent_events WHERE {column} = ANY(%(chosen)s) AND occurred_at >= %(since)s)"
        connection.execute(online_sql.add_to_tiles_sql(entity, events), {"chosen": chosen, "since": since})


def _renew(connection: psycopg.Connection[Any], table: str, create: str) -> bool:
    """Make `table` by the statement `create` unless it stands as that made it; True if it is new and empty."""
    made_by = hashlib.sha256(create.encode()).hexdigest()[:16]
    held = connection.execute("SELECT obj_description(to_regclass(%s), 'pg_class')", (table,)).fetchone()
    if held is not None and held[0] == made_by:
        return False
    connection.execute(f"DROP TABLE IF EXISTS {table}")
    connection.execute(create)
    connection.execute(f"COMMENT ON TABLE {table} IS '{made_by}'")
    return True
