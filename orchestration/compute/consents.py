"""Who may be learned from: people who have not agreed to being personalised are left out of what is trained and counted."""

from __future__ import annotations

from typing import Any

import duckdb
import psycopg
import pyarrow as pa

from schemas.consent import consent_default


def agreed(connection: psycopg.Connection[Any], db: duckdb.DuckDBPyConnection) -> str:
    """The condition on `user_id`, in DuckDB's words, that holds for people who may be learned from.

    Registers the table `consents_said`: those whose word is not what holds for who has said nothing.
    """
    default = consent_default()
    rows = connection.execute("SELECT user_id FROM consents WHERE personalise <> %s", (default,)).fetchall()
    db.register("consents_said", pa.table({"user_id": pa.array([user_id for (user_id,) in rows], pa.string())}))
    return f"user_id {'NOT ' if default else ''}IN (SELECT user_id FROM consents_said)"
