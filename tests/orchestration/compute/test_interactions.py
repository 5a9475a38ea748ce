"""Histories to learn from hold what a request could have seen."""

from __future__ import annotations

from datetime import datetime, timedelta

import psycopg
import pytest
from conftest import TODAY
from worlds import ListSource

from orchestration.compute.ingest import ingest
from orchestration.compute.interactions import load_interactions
from orchestration.compute.lake import Lake
from schemas.events import Event, Item

NOON = TODAY - timedelta(days=5, hours=-12)


def hours(later: float) -> datetime:
    return NOON + timedelta(hours=later)


@pytest.mark.parametrize(
    ("known_at", "kept"),
    [
        pytest.param(hours(0), True, id="at once"),
        pytest.param(hours(3), True, id="the same day, after the next event: a batch of posts"),
        pytest.param(hours(13), False, id="the next day, after the next event"),
    ],
)
def test_a_late_event_is_left_out_where_the_next_one_came_before_it(
    lake: Lake, connection: psycopg.Connection, known_at: datetime, kept: bool
) -> None:
    events = [
        Event("a", "u", "i", "view", None, hours(0), known_at),
        Event("b", "u", "j", "view", None, hours(2), hours(2)),
        Event("c", "v", "j", "view", None, hours(0), hours(40)),  # late, and nothing came between
    ]
    ingest(ListSource(events, [Item("i", "I"), Item("j", "J")]), lake, connection, now=TODAY)
    assert len(load_interactions(lake, connection)) == 3
    served = load_interactions(lake, connection, as_served=True)
    assert ("i" in served.item_ids[served.item].tolist()) == kept
    assert set(served.user_ids[served.user].tolist()) == {"u", "v"}
