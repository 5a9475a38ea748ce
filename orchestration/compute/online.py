"""The online tiles of features: trimmed day by day, counted anew after events were taken out."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import psycopg

from infra.feature_tables import tiles_since as tiles_since
from schemas import online_sql
from schemas.errors import DefinitionError


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
