"""What people did with what they were shown is found however old it is, each event once."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
import pyarrow.parquet as pq
import pytest
from conftest import TODAY
from experiment_log import Answer, Outcome, log

from orchestration.compute.drift.outcomes import outcomes_known, read_outcomes
from orchestration.compute.drift.served import Window
from orchestration.compute.duck import duck
from orchestration.compute.experiments.declared import Arm, Experiment
from orchestration.compute.experiments.metrics import metrics
from orchestration.compute.experiments.reading import read_panel
from orchestration.compute.ingest import drain
from orchestration.compute.lake import Lake
from orchestration.compute.off_policy_log import read_explored
from orchestration.compute.outcomes import load_outcomes, outcomes_kept
from orchestration.compute.recent import roll_partitions
from schemas.errors import LakeError
from schemas.personal_data import RECENT_DAYS

DAY, HOUR = timedelta(days=1), timedelta(hours=1)
START = TODAY - 20 * DAY
EARLY, LATE, TODAYS = START + 12 * HOUR, TODAY - DAY + 12 * HOUR, TODAY - DAY + 20 * HOUR


@pytest.fixture
def shown(connection: psycopg.Connection, lake: Lake) -> None:
    """Lists of twenty days and what came of them: early events are in the lake alone, late ones in both, the last posted."""
    explored = {"propensities": [0.6, 0.7], "candidate_ids": ["a", "b", "c"], "candidate_scores": [2.0, 1.0, 0.0]}
    log(
        connection,
        [
            Answer("early", "u1", EARLY, ["a", "b"], "control", 0.5, **explored),  # type: ignore[arg-type]
            Answer("late", "u2", LATE, ["a", "b"], "new", 0.5, **explored),  # type: ignore[arg-type]
            Answer("last", "u3", TODAYS, ["b", "a"], "new", 0.5, **explored),  # type: ignore[arg-type]
        ],
        [
            Outcome("e1", "u1", "a", "click", EARLY + HOUR, "early"),
            Outcome("e2", "u1", "b", "hide", EARLY + HOUR, "early"),
            Outcome("e3", "u1", "b", "click", EARLY + HOUR, None),
            # Somebody else, who was shown nothing by it.
            Outcome("e4", "u9", "b", "click", EARLY + HOUR, "early"),
            Outcome("e5", "u2", "b", "click", LATE + HOUR, "late"),
        ],
    )
    assert drain(connection, lake, None, TODAY.date(), now=TODAY) == 5
    log(connection, [], [Outcome("e6", "u3", "b", "click", TODAYS + HOUR, "last")])
    roll_partitions(connection, lake, TODAY)
    held = connection.execute("SELECT event_id FROM recent_events ORDER BY 1").fetchall()
    assert [one for (one,) in held] == ["e5", "e6"], "the early events must have left Postgres"


def file_of(lake: Lake, connection: psycopg.Connection) -> Path:
    (path,) = lake.paths(connection, EARLY.date(), EARLY.date()).values()
    return Path(urlsplit(lake.url).path) / path


@pytest.mark.usefixtures("shown")
def test_each_event_of_the_span_is_there_once(connection: psycopg.Connection, lake: Lake) -> None:
    def found(since: int, until: int) -> list[str]:
        with duck() as db:
            load_outcomes(db, connection, lake, START + since * DAY, START + until * DAY)
            return [one for (one,) in db.execute("SELECT event_id FROM outcomes ORDER BY 1").fetchall()]

    assert found(0, 21) == ["e1", "e2", "e4", "e5", "e6"]
    assert found(1, 21) == ["e5", "e6"]
    assert found(0, 19) == ["e1", "e2", "e4"]
    assert found(30, 40) == []


@pytest.mark.usefixtures("shown")
def test_the_early_outcomes_of_an_experiment_of_twenty_days_count(connection: psycopg.Connection, lake: Lake) -> None:
    assert RECENT_DAYS < 20
    trial = Experiment(
        "trial", START, None, (Arm("control", 0.5), Arm("new", 0.5)), (), metrics(["click_rate", "hide_rate"]), ()
    )
    panel = read_panel(connection, lake, trial, TODAY)
    assert (len(panel.days), panel.counts["requests"].sum()) == (20, 3)
    assert panel.counts["clicks"].sum() == 3
    assert panel.counts["hides"].sum() == 1
    early = panel.day == 0
    assert (panel.counts["clicks"][early].sum(), panel.counts["hides"][early].sum()) == (1, 1)


@pytest.mark.usefixtures("shown")
def test_explored_lists_older_than_two_weeks_have_their_clicks(connection: psycopg.Connection, lake: Lake) -> None:
    logged, requests, _ = read_explored(connection, lake, START, TODAY)
    rewards = {request: logged.rewards[row].tolist() for row, request in enumerate(requests)}
    assert rewards == {"early": [1, 0], "late": [0, 1], "last": [1, 0]}
    logged, requests, _ = read_explored(connection, lake, START, TODAY, asked=["early"])
    assert (requests, logged.rewards.tolist()) == (["early"], [[1, 0]])
    assert read_explored(connection, lake, START - 9 * DAY, START)[1] == []


@pytest.mark.usefixtures("shown")
def test_a_report_on_a_day_long_past_knows_what_was_picked(connection: psycopg.Connection, lake: Lake) -> None:
    window = Window.ending(EARLY.date(), 1)
    assert outcomes_known(connection, lake, window)
    assert read_outcomes(connection, lake, window) == {"early": {"a", "b"}}
    assert outcomes_known(connection, lake, Window.ending(LATE.date(), 1))
    assert not outcomes_known(connection, lake, Window.ending(EARLY.date() - 5 * DAY, 1))


@pytest.mark.usefixtures("shown")
def test_a_file_of_an_older_release_tells_nothing_of_requests(connection: psycopg.Connection, lake: Lake) -> None:
    file = file_of(lake, connection)
    pq.write_table(pq.read_table(file, partitioning=None).drop_columns(["request_id"]), file)
    assert not outcomes_kept(connection, lake, EARLY.date())
    with duck() as db:
        load_outcomes(db, connection, lake, START, TODAY)
        assert db.execute("SELECT count(*) FROM outcomes").fetchone() == (2,)


@pytest.mark.usefixtures("shown")
def test_a_damaged_file_is_named(connection: psycopg.Connection, lake: Lake) -> None:
    file = file_of(lake, connection)
    file.write_bytes(file.read_bytes()[:100])
    with duck() as db, pytest.raises(LakeError, match=f"the lake's file of {EARLY.date()} cannot be used"):
        load_outcomes(db, connection, lake, START, TODAY)
