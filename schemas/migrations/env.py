"""Alembic's entry: runs migrations on the connection it is handed (see infra/postgres.py)."""

from __future__ import annotations

from alembic import context

from schemas.tables import metadata

connection = context.config.attributes.get("connection")
if connection is None:
    raise SystemExit("run migrations with `python -m infra.postgres migrate`, which chooses the database")

context.configure(connection=connection, target_metadata=metadata, transaction_per_migration=False)
with context.begin_transaction():
    context.run_migrations()
