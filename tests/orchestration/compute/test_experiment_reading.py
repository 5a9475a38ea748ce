"""The served log joined to outcomes: what counts, for whom, on which day."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest
from conftest import TODAY
from experiment_log import Answer, Outcome, log
from worlds import ListSource

from orchestration.compute.experiments.declared import Arm, Experiment, read_declared
from orchestration.compute.experiments.metrics import METRICS, metrics
from orchestration.compute.experiments.panel import Panel
from orchestration.compute.experiments.reading import read_panel
from orchestration.compute.ingest import ingest
from orchestration.compute.lake import Lake
from schemas.errors import DefinitionError
from schemas.events import Event, Item, Person

START = TODAY - timedelta(days=3)
NOON = START + timedelta(hours=12)
HOUR = timedelta(hours=1)
DAY = timedelta(days=1)


def trial(shares: tuple[float, float] = (0.5, 0.5)) -> Experiment:
    return Experiment(
        "trial", START, None, (Arm("control", shares[0]), Arm("new", shares[1])), (), metrics(["click_rate"]), ()
    )


def read(connection: psycopg.Connection, lake: Lake, experiment: Experiment | None = None) -> Panel:
    return read_panel(connection, lake, experiment or trial(), TODAY)


def rows(panel: Panel, *names: str) -> list[tuple[float, ...]]:
    """(person, day, counts…) of every row, in order."""
    columns = [panel.person, panel.day, *(panel.counts[name] for name in names)]
    return sorted(tuple(float(value) for value in row) for row in zip(*columns, strict=True))


def test_what_is_done_with_a_shown_item_counts_once_on_its_day(connection: psycopg.Connection, lake: Lake) -> None:
    log(
        connection,
        [
            Answer("r1", "u1", NOON, ["a", "b", "c"], "control", 0.5),
            Answer("r2", "u2", NOON, ["a", "b"], "new", 0.5, degraded=["features"]),
            Answer("r3", "u2", NOON + DAY, ["c"], "new", 0.5),
            Answer("other", "u3", NOON, ["a"], "control", 0.5, experiment="another"),
            Answer("none", "u4", NOON, ["a"], None, None, experiment=None),
        ],
        [
            Outcome("e1", "u1", "a", "view", NOON + HOUR, "r1"),
            Outcome("e2", "u1", "a", "like", NOON + DAY, "r1"),
            Outcome("e3", "u1", "b", "rating", NOON + HOUR, "r1", 2.0),
            Outcome("e4", "u1", "c", "hide", NOON + HOUR, "r1"),
            Outcome("not shown", "u1", "z", "click", NOON + HOUR, "r1"),
            Outcome("no request", "u1", "a", "click", NOON + HOUR, None),
            Outcome("somebody else's", "u2", "a", "click", NOON + HOUR, "r1"),
            Outcome("before it was shown", "u2", "c", "click", NOON + HOUR, "r3"),
            Outcome("rated well", "u2", "b", "rating", NOON + DAY, "r2", 5.0),
        ],
    )
    panel = read(connection, lake)
    assert (panel.people, panel.arm.tolist(), panel.first_day.tolist()) == (2, [0, 1], [0, 0])
    assert [day.isoformat() for day in panel.days] == [(START + n * DAY).date().isoformat() for n in range(3)]
    assert rows(panel, "requests", "shown", "degraded", "clicks", "clicked_requests", "likes", "hides") == [
        (0, 0, 1, 3, 0, 2, 1, 0, 1),
        (0, 1, 0, 0, 0, 0, 0, 1, 0),
        (1, 0, 1, 2, 1, 0, 0, 0, 0),
        (1, 1, 1, 1, 0, 1, 1, 1, 0),
    ]
    assert panel.arrivals().tolist() == [[1, 1]] * 3
    # Sums over people at the end of each day: clicks and shown items.
    new = panel.moments(METRICS["click_rate"])[1]
    assert new[:, 0, 1].tolist() == [0, 1, 1]
    assert new[:, 0, 2].tolist() == [2, 3, 3]


def test_an_outcome_that_comes_after_a_week_does_not_count(connection: psycopg.Connection, lake: Lake) -> None:
    early = TODAY - timedelta(days=9)
    long = Experiment("trial", early, None, trial().arms, (), metrics(["click_rate"]), ())
    log(
        connection,
        [Answer("r1", "u1", early, ["a", "b"], "control", 0.5)],
        [
            Outcome("e1", "u1", "a", "click", early + 7 * DAY - HOUR, "r1"),
            Outcome("e2", "u1", "b", "click", early + 7 * DAY, "r1"),
        ],
    )
    assert read(connection, lake, long).counts["clicks"].sum() == 1


def test_outcomes_of_the_last_lists_come_in_after_the_end(connection: psycopg.Connection, lake: Lake) -> None:
    log(
        connection,
        [
            Answer("r1", "u1", NOON, ["a", "b"], "control", 0.5),
            Answer("after the end", "u1", NOON + 2 * DAY, ["a"], "control", 0.5),
        ],
        [
            Outcome("e1", "u1", "a", "click", NOON + 2 * DAY, "r1"),
            Outcome("e2", "u1", "a", "click", NOON + 2 * DAY, "after the end"),
        ],
    )
    end = NOON + DAY
    assert read_panel(connection, lake, trial(), end).counts["clicks"].sum() == 0
    panel = read_panel(connection, lake, trial(), end, TODAY)
    assert (panel.counts["clicks"].sum(), panel.counts["requests"].sum(), len(panel.days)) == (1, 1, 3)


def test_habits_and_segments_are_from_before_the_start(connection: psycopg.Connection, lake: Lake) -> None:
    events = [Event(f"h{n}", "u1", "a", "view", None, START - (n + 1) * DAY) for n in range(5)]
    events += [
        Event("long ago", "u1", "a", "view", None, START - 40 * DAY),
        Event("during", "u2", "a", "view", None, NOON),
    ]
    source = ListSource(
        events, [Item("a", "A")], [Person("u1", {"region": "north"}), Person("u2", {"region": "south"})]
    )  # type: ignore[arg-type]
    ingest(source, lake, connection)
    log(
        connection,
        [
            Answer("r1", "u1", NOON, ["a"], "control", 0.5),
            Answer("r2", "u2", NOON, ["a"], "new", 0.5),
            Answer("before", "u1", START - DAY, ["a", "b"], None, None, experiment=None),
        ],
        [
            Outcome("e", "u1", "b", "click", START - DAY + HOUR, "before"),
            # The arm may have moved this one.
            Outcome("since", "u1", "a", "click", NOON, "before"),
        ],
    )
    panel = read(connection, lake)
    assert panel.events_before.tolist() == [5, 0]
    assert (panel.before["clicks"].tolist(), panel.before["shown"].tolist()) == ([1, 0], [2, 0])
    assert panel.counts["clicks"].sum() == 0
    assert panel.segments["new people"].tolist() == [False, True]
    assert panel.segments["1–20 events before"].tolist() == [True, False]
    assert panel.segments["region: north"].tolist() == [True, False]


def test_a_person_in_two_arms_counts_in_the_first(connection: psycopg.Connection, lake: Lake) -> None:
    log(
        connection,
        [
            Answer("r1", "u1", NOON + DAY, ["a"], "control", 0.5),
            Answer("r2", "u1", NOON, ["a"], "new", 0.5),
            Answer("r3", "u2", NOON, ["a"], "control", 0.5),
        ],
    )
    panel = read(connection, lake)
    assert (panel.arm.tolist(), panel.in_two_arms) == ([1, 0], 1)


def test_answers_under_other_shares_are_left_out(connection: psycopg.Connection, lake: Lake) -> None:
    log(
        connection,
        [
            Answer("r1", "u1", NOON, ["a"], "control", 0.9),
            Answer("r2", "u2", NOON + HOUR, ["a"], "control", 0.5),
            Answer("r3", "u3", NOON + HOUR, ["a"], "new", 0.5),
        ],
    )
    panel = read(connection, lake)
    assert panel.people == 2
    assert panel.shares_changed == NOON.strftime("%Y-%m-%d %H:%M UTC")


def test_answers_to_the_survey_are_read_where_there_is_one(connection: psycopg.Connection, lake: Lake) -> None:
    log(connection, [Answer("r1", "u1", NOON, ["a"], "control", 0.5)])
    assert not read(connection, lake).has(METRICS["satisfaction"])
    connection.execute(
        "INSERT INTO survey_answers VALUES ('u1', 'r1', 'satisfied', 4, %(at)s), ('u1', 'r1', 'trust', 2, %(at)s)",
        {"at": NOON + HOUR},
    )
    panel = read(connection, lake)
    assert rows(panel, "satisfaction", "satisfaction_answers", "trust") == [(0, 0, 4, 1, 2)]
    assert panel.has(METRICS["satisfaction"])


def test_an_experiment_without_answers_says_where_to_look(connection: psycopg.Connection, lake: Lake) -> None:
    log(connection, [])
    with pytest.raises(DefinitionError, match="nobody was served by it"):
        read(connection, lake)


# --- the declarations ---------------------------------------------------------------------------------------------

FILE = """
[experiments.ranker]
start = 2030-01-01T00:00:00Z
unit = "user"
metrics = ["click_rate", "like_rate"]
guardrails = ["hide_rate"]
[experiments.ranker.arms.new]
share = 0.25
model_version = "0123456789abcdef"
[experiments.ranker.arms.control]
share = 0.75
[experiments.ranker.arms.next]
share = 0.0
"""


def test_control_comes_first_and_shadows_apart(tmp_path: Path) -> None:
    file = tmp_path / "experiments.toml"
    assert read_declared(str(file)) == {}
    file.write_text(FILE)
    found = read_declared(str(file))["ranker"]
    assert isinstance(found, Experiment)
    assert [arm.name for arm in found.arms] == ["control", "new"]
    assert found.shares == (0.75, 0.25)
    assert [arm.name for arm in found.shadows] == ["next"]
    assert found.start == datetime(2030, 1, 1, tzinfo=UTC)
    assert [metric.name for metric in found.metrics] == ["click_rate", "like_rate"]


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("click_rate", "clik_rate", "did you mean click_rate"),
        ("hide_rate", "happiness", "no metric 'happiness'"),
    ],
)
def test_a_fault_is_named_and_keeps_no_other_from_being_read(tmp_path: Path, old: str, new: str, named: str) -> None:
    file = tmp_path / "experiments.toml"
    first = FILE.replace(old, new, 1).replace("[experiments.ranker]", "[experiments.ranker]\ntraffic = 0.5")
    file.write_text(first + FILE.replace("experiments.ranker", "experiments.other"))
    found = read_declared(str(file))
    assert isinstance(found["ranker"], DefinitionError)
    assert named in str(found["ranker"])
    assert isinstance(found["other"], Experiment)


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("share = 0.25", "share = 2", "share is 2; give a number from 0 to 1"),
        ("start = 2030-01-01T00:00:00Z", "", "start is missing"),
        ("2030-01-01T00:00:00Z", '"soon"', "start is 'soon'; give an instant"),
        ("[experiments.ranker]", "[[", "is no TOML"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, old: str, new: str, named: str) -> None:
    file = tmp_path / "experiments.toml"
    file.write_text(FILE.replace(old, new))
    with pytest.raises(DefinitionError, match=named):
        read_declared(str(file))
