"""Answers by arm: whose list was asked about decides, and a person counts once."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from test_impressions import serve

from orchestration.compute.survey import survey_by_arm

NOW = datetime.now(UTC)
SPAN = (NOW - timedelta(days=7), NOW + timedelta(days=1))


def answer(
    connection: psycopg.Connection[Any], user: str, request_id: str, value: int, question: str = "trust"
) -> None:
    connection.execute(
        "INSERT INTO survey_answers (user_id, request_id, question, answer) VALUES (%s, %s, %s, %s)",
        (user, request_id, question, value),
    )


def test_means_by_arm_with_intervals(connection: psycopg.Connection[Any]) -> None:
    for number, (arm, value) in enumerate([("a", 5), ("a", 4), ("a", 5), ("b", 1), ("b", 3), ("b", 2)]):
        serve(connection, f"r{number}", f"u{number}", NOW, "i1", experiment="e", arm=arm)
        answer(connection, f"u{number}", f"r{number}", value)
    serve(connection, "again", "u0", NOW, "i1", experiment="e", arm="a")
    answer(connection, "u0", "again", 1)  # u0 now says 3 on average
    answer(connection, "u9", "r0", 5, "satisfied")  # about another's list: no arm of theirs
    rows = {(row.experiment, row.arm, row.question): row for row in survey_by_arm(connection, *SPAN)}
    assert set(rows) == {("e", "a", "trust"), ("e", "b", "trust"), ("none", "none", "satisfied")}
    first, second = rows["e", "a", "trust"], rows["e", "b", "trust"]
    assert (first.people, first.answers, first.mean) == (3, 4, 4.0)
    assert (second.people, second.mean) == (3, 2.0)
    # By hand: sd 1, n 3, t(0.975, 2) = 4.3027, so 4.3027 / √3 each way.
    assert second.low == pytest.approx(2 - 4.3027 / 3**0.5, abs=1e-3)
    assert second.high == pytest.approx(2 + 4.3027 / 3**0.5, abs=1e-3)
    alone = rows["none", "none", "satisfied"]
    assert (alone.people, alone.low, alone.high) == (1, None, None)
    assert survey_by_arm(connection, NOW - timedelta(days=9), NOW - timedelta(days=8)) == []


def test_without_a_served_log_there_are_no_arms(connection: psycopg.Connection[Any]) -> None:
    connection.execute("DROP TABLE IF EXISTS served_requests CASCADE")
    answer(connection, "u", "r", 4)
    assert [(row.experiment, row.arm, row.mean) for row in survey_by_arm(connection, *SPAN)] == [("none", "none", 4.0)]
