"""Retention: what is older than its table's days goes, what is not stays, and a repeat finds nothing."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest

from orchestration.compute import retention
from orchestration.compute.lake import Lake
from schemas.personal_data import DAMAGED_SOURCE, places

NOW = datetime.now(UTC)
WITH_AN_END = {place.table: place.expiry for place in places() if place.expiry is not None}


def fill(connection: psycopg.Connection[Any], name: str, at: dict[str, datetime]) -> None:
    """A row called `name` in every table that has an end, as old as `at` says."""
    connection.execute(
        "INSERT INTO user_history VALUES (%s, %s, %s, 'i', 'view', NULL)", (name, at["public.user_history"], name)
    )
    for source in ("list", DAMAGED_SOURCE):
        connection.execute(
            "INSERT INTO quarantine (source, file, line, reason, row, seen_at) VALUES (%s, %s, 1, 'r', 'w', %s)",
            (source, name, at["public.quarantine"]),
        )
    connection.execute(
        "INSERT INTO served_features (read_id, view, request_id, user_id, read_at, definition_hash, features, keys, numbers) "
        "VALUES (%s, 'v', 'r', 'u', %s, 'h', '{n}', '{u}', '{1}')",
        (name, at["public.served_features"]),
    )
    shown = "model_version, item_ids, scores, candidates, sources, degraded"
    values = "'m', '{i}', '{1}', 1, '{}', '{}'"
    connection.execute(
        f"INSERT INTO served_requests (request_id, user_id, served_at, {shown}) VALUES (%s, %s, %s, {values})",
        (name, name, at["public.served_requests"]),
    )
    connection.execute(
        f"INSERT INTO shadow_requests (request_id, arm, experiment, user_id, served_at, {shown}) "
        f"VALUES (%s, 'a', 'e', %s, %s, {values})",
        (name, name, at["public.shadow_requests"]),
    )
    connection.execute(
        "INSERT INTO user_scores VALUES (%s, 1, 'm', %s, '{i}', '{1}')", (name, at["public.user_scores"])
    )
    connection.execute(
        "INSERT INTO survey_answers VALUES (%s, %s, 'trust', 5, %s)", (name, name, at["public.survey_answers"])
    )
    connection.execute(
        "INSERT INTO exports (request_id, user_id, requested_at) VALUES (%s, %s, %s)",
        (name, name, at["public.exports"]),
    )


def left(connection: psycopg.Connection[Any]) -> dict[str, list[Any]]:
    named = {
        "user_history": "event_id",
        "quarantine": "file || source",
        "served_features": "read_id",
        "exports": "user_id",
        "served_requests": "request_id",
        "shadow_requests": "request_id",
        "user_scores": "user_id",
        "survey_answers": "user_id",
    }
    return {
        table: [name for (name,) in connection.execute(f"SELECT {column} FROM {table} ORDER BY 1").fetchall()]
        for table, column in named.items()
    }


def test_what_is_too_old_goes_and_a_repeat_finds_nothing(
    connection: psycopg.Connection[Any], lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "BATCH_ROWS", 1)  # several batches, each a transaction of its own
    assert set(WITH_AN_END) == {f"public.{table}" for table in left(connection)}
    for number in range(3):
        fill(connection, f"old {number}", {t: NOW - timedelta(days=e.days, seconds=1) for t, e in WITH_AN_END.items()})
    fill(connection, "young", {t: NOW - timedelta(days=e.days) + timedelta(minutes=5) for t, e in WITH_AN_END.items()})
    connection.commit()
    counted = retention.expired(connection, NOW)
    assert {ended.table: ended.rows for ended in counted} == dict.fromkeys(WITH_AN_END, 3)
    assert retention.end(connection, lake, NOW) == counted
    assert left(connection) == {
        "user_history": ["young"],
        # What stands for a damaged file of the lake names nobody, and the next load needs it.
        "quarantine": [*(f"old {n}{DAMAGED_SOURCE}" for n in range(3)), f"young{DAMAGED_SOURCE}", "younglist"],
        "served_features": ["young"],
        "exports": ["young"],
        "served_requests": ["young"],
        "shadow_requests": ["young"],
        "user_scores": ["young"],
        "survey_answers": ["young"],
    }
    assert all(ended.rows == 0 for ended in retention.end(connection, lake, NOW))


def test_partitions_of_recent_events_roll(connection: psycopg.Connection[Any], lake: Lake) -> None:
    retention.end(connection, lake, NOW - timedelta(days=30))
    retention.end(connection, lake, NOW)
    rows = connection.execute(
        "SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = 'recent_events'::regclass ORDER BY 1"
    ).fetchall()
    days = [name.removeprefix("recent_events_") for (name,) in rows if not name.endswith("default")]
    assert min(days) == f"{NOW - timedelta(days=15):%Y%m%d}"
    assert max(days) == f"{NOW + timedelta(days=1):%Y%m%d}"
