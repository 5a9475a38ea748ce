"""Removing files of the lake that nobody reads any more."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import psycopg

from orchestration.compute.lake import Lake, Orphan
from schemas.errors import SettingsError

LEAST_HOURS = 1.0


def vacuum(lake: Lake, connection: psycopg.Connection[Any], *, hours: float, dry_run: bool) -> list[Orphan]:
    """Delete the files that nobody has read for `hours`, unless `dry_run`; returns them.

    Safe beside readers and writers, and when killed: what is left is found again. Raises SettingsError for less than an
    hour, in which a reader that opened the day before it was rewritten may still be at it.
    """
    if not hours >= LEAST_HOURS:
        raise SettingsError(
            f"hours={hours:g} is too short: a reader may still be at a file; give {LEAST_HOURS:g} or more"
        )
    age = timedelta(hours=hours)
    with connection.transaction():
        return lake.orphans(connection, age) if dry_run else lake.remove_orphans(connection, age)
