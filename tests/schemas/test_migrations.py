"""The migrated database is exactly what the metadata says."""

from __future__ import annotations

from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from infra.postgres import engine_for, migrate
from schemas.tables import metadata


def test_a_migrated_database_equals_the_metadata(database: str) -> None:
    with engine_for(database).connect() as connection:
        context = MigrationContext.configure(
            connection,
            opts={
                "compare_type": True,
                "compare_server_default": True,
                "include_object": lambda thing, name, kind, reflected, other: (
                    not (reflected and str(name).startswith(("recent_events_", "alembic_version")))
                ),
            },
        )
        assert compare_metadata(context, metadata) == []


def test_migrating_twice_changes_nothing(database: str) -> None:
    migrate(database)
    migrate(database)
