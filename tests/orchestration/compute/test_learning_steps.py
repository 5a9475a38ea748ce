"""An interrupted way to a model is gone on with: from the same events, whatever came in since."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import psycopg
import pytest
from conftest import TODAY, days_ago
from worlds import ListSource

from orchestration.compute import learning_steps
from orchestration.compute.ingest import ingest
from orchestration.compute.lake import Lake
from orchestration.compute.learning_steps import STEPS
from orchestration.compute.training_set import build_training_set, load_training_set
from schemas.events import Event, Item

WEEK = timedelta(days=7)


def events(prefix: str, days_back: float, count: int) -> list[Event]:
    return [
        Event(
            f"{prefix}/{user}/{n}",
            f"person-{user}",
            f"item-{(n * 7 + user) % 40}",
            "view",
            None,
            days_ago(days_back) + timedelta(minutes=n, seconds=user),
        )
        for user in range(25)
        for n in range(count)
    ]


@pytest.fixture
def artifacts(tmp_path: Path, lake: Lake, connection: psycopg.Connection) -> str:
    """Artefacts of a deployment whose training set is made and whose training was not begun."""
    load(lake, connection, events("early", 10, 45))
    url = (tmp_path / "artifacts").as_uri()
    build_training_set(lake, connection, url)
    return url


def load(lake: Lake, connection: psycopg.Connection, given: list[Event]) -> None:
    catalogue = [Item(f"item-{n}", f"Item {n}") for n in range(40)]
    ingest(ListSource(given, catalogue, version=given[0].event_id), lake, connection, now=TODAY)
    connection.commit()


def test_without_a_training_set_every_step_is_left(lake: Lake, connection: psycopg.Connection, tmp_path: Path) -> None:
    assert learning_steps.left(lake, connection, (tmp_path / "none").as_uri(), newest=WEEK) == STEPS


def test_events_known_later_leave_the_training_set_as_it_was(
    lake: Lake, connection: psycopg.Connection, artifacts: str
) -> None:
    before = load_training_set(lake, connection, artifacts)
    load(lake, connection, events("late", 2, 5))
    after = load_training_set(lake, connection, artifacts)
    assert after.version == before.version
    assert len(after.split.train) == len(before.split.train)
    assert learning_steps.left(lake, connection, artifacts, newest=WEEK) == STEPS[1:]
    learning_steps.done(artifacts, after.version, "ranker")
    assert learning_steps.left(lake, connection, artifacts, newest=WEEK) == STEPS[2:]
    build_training_set(lake, connection, artifacts)
    assert len(load_training_set(lake, connection, artifacts).split.train) > len(before.split.train)
    assert learning_steps.left(lake, connection, artifacts, newest=WEEK) == STEPS[1:]


def test_a_finished_or_an_old_way_begins_anew(lake: Lake, connection: psycopg.Connection, artifacts: str) -> None:
    assert learning_steps.left(lake, connection, artifacts, newest=timedelta(0)) == STEPS
    learning_steps.done(artifacts, load_training_set(lake, connection, artifacts).version, STEPS[-1])
    assert learning_steps.left(lake, connection, artifacts, newest=WEEK) == STEPS


def test_other_events_of_the_time_before_begin_anew(lake: Lake, connection: psycopg.Connection, artifacts: str) -> None:
    load(lake, connection, events("missed", 11, 1))
    assert learning_steps.left(lake, connection, artifacts, newest=WEEK) == STEPS
