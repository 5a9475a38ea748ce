"""The tables of the declared features, offline (schema `features`) and online: made from the declarations, without a migration.

Whoever is about to read or write features calls `ensure_view_tables`; with nothing to do it costs a few look-ups.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from datetime import UTC, date, datetime, timedelta
from typing import Any

import psycopg
from sqlalchemy import text
from sqlalchemy.schema import CreateColumn, CreateTable

from infra import roles
from infra.postgres import engine_for
from schemas import catalogue_sql, online_sql
from schemas.declarations import STATE_COLUMNS, near
from schemas.errors import DefinitionError
from schemas.feature_sql import base_sql
from schemas.features import FeatureView, Merge
from schemas.tables import view_table
from schemas.views import VIEWS

_TABLES_LOCK = 7205393


def ensure_view_tables(url: str) -> None:
    """Create the tables of every declared view, and add the columns that a changed declaration brought.

    Old columns stay: rows of an earlier definition are told apart by the ledger's definition hash. Safe to call from
    several processes at once. Raises DefinitionError for a condition that Postgres does not take.
    """
    engine = engine_for(url)
    with engine.begin() as connection:
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_TABLES_LOCK})")
        driver = connection.connection.driver_connection
        assert isinstance(driver, psycopg.Connection)
        check_conditions(driver, VIEWS)
        for view in VIEWS:
            table = view_table(view)
            connection.execute(CreateTable(table, if_not_exists=True))
            have = set(
                connection.execute(
                    text(
                        "SELECT column_name FROM information_schema.columns "
                        "WHERE table_schema = 'features' AND table_name = :name"
                    ),
                    {"name": view.name},
                ).scalars()
            )
            for column in table.columns:
                if column.name not in have:
                    definition = CreateColumn(column).compile(engine)
                    connection.exec_driver_sql(f"ALTER TABLE features.{view.name} ADD COLUMN {definition}")
        ensure_online_tables(driver)
        roles.ensure_view_rights(driver)


def check_conditions(connection: psycopg.Connection[Any], views: Iterable[FeatureView]) -> None:
    """Raise DefinitionError unless Postgres takes the SQL of every state: it keeps the tiles of what is posted."""
    for view in views:
        base = base_sql(view.entity, "recent_events")
        for feature in view.features:
            wanted = ", ".join(state.sql for state in feature.states if state.merge is not Merge.DECAY)
            try:
                with connection.transaction():
                    connection.execute(f"EXPLAIN SELECT {wanted or 1} FROM ({base}) AS e")
            except psycopg.errors.UndefinedColumn as error:
                name = (error.diag.message_primary or "").split('"')[1::2]
                known = (*STATE_COLUMNS, *view.entity.keys)
                hint = near(name[0], known) if name else ""
                raise _refused(view, feature.name, error, hint) from error
            except psycopg.ProgrammingError as error:
                raise _refused(
                    view, feature.name, error, "; write it in words that DuckDB and Postgres share"
                ) from error


def _refused(view: FeatureView, feature: str, error: psycopg.Error, hint: str) -> DefinitionError:
    return DefinitionError(
        f"feature {feature!r} of view {view.name!r} cannot be counted by Postgres: {error.diag.message_primary}{hint}"
    )


def ensure_online_tables(connection: psycopg.Connection[Any]) -> None:
    """Create the rows and tiles of every entity; where a changed declaration changes a table, make it anew.

    What is made anew is filled from the recent events and the newest partitions, so no read sees less than before.
    """
    # Asked first: whoever may make tables in it need not be allowed to make schemas.
    if connection.execute("SELECT to_regnamespace('online')").fetchone() == (None,):
        connection.execute("CREATE SCHEMA online")
    for entity in online_sql.entities():
        rows, tiles = online_sql.tables_sql(entity)
        if _renew(connection, online_sql.tiles_table(entity), tiles):
            since = tiles_since(datetime.now(UTC))
            events = f"(SELECT * FROM recent_events WHERE occurred_at >= '{since.isoformat()}')"
            connection.execute(online_sql.add_to_tiles_sql(entity, events))
        made = _renew(connection, online_sql.rows_table(entity), rows)
        catalogue_sql.watch(connection, catalogue_sql.VECTORS, catalogue_sql.ROWS)
        if made:
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
