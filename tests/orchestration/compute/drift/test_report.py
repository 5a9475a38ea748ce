"""The report on a real database: quiet weeks are quiet, what moves is named, and what is kept names nobody."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import psycopg
import pytest
from conftest import TODAY, days_ago
from served_log import MODEL, prepare, serve_day
from worlds import ListSource

from orchestration.compute.drift import sketches
from orchestration.compute.drift.judge import ALARM, WAITING
from orchestration.compute.drift.report import DriftReport, drift_report
from orchestration.compute.drift.served import Window, feature_sketches, read_requests
from orchestration.compute.drift.sketches import DAY, WEEK, Counts, Mean, Name, Sketch, days_before
from orchestration.compute.drift.statistics import ks, psi
from orchestration.compute.ingest import ingest
from orchestration.compute.lake import Lake
from orchestration.compute.report_files import write_report
from schemas.events import Event
from schemas.views import USER_ACTIVITY, fingerprint

YESTERDAY = (TODAY - timedelta(days=1)).date()
WEEKS = 2


@pytest.fixture
def served(database: str, lake: Lake) -> Iterator[psycopg.Connection]:
    """A database whose last weeks, all but the newest, were served and reported on."""
    with psycopg.connect(database, options="-c TimeZone=UTC") as connection:
        ingest(ListSource([Event("e", "p000", "i000", "click", None, days_ago(30))]), lake, connection)
        prepare(connection, days_ago(60))
        for back in range(7 * WEEKS + 6, 6, -1):
            serve_day(connection, YESTERDAY - timedelta(days=back))
        connection.commit()
        for day in days_before(YESTERDAY, WEEKS):
            drift_report(database, lake, "file:///nothing", day)
        yield connection


def newest_week(connection: psycopg.Connection, url: str, lake: Lake, **how: float) -> DriftReport:
    for back in range(7):
        serve_day(connection, YESTERDAY - timedelta(days=back), **how)  # type: ignore[arg-type]
    connection.commit()
    return drift_report(url, lake, "file:///nothing", YESTERDAY)


def names(report: DriftReport, state: str = ALARM) -> set[tuple[str, str]]:
    return {(one.kind, one.name) for one in report.findings if one.state == state}


def test_a_quiet_week_is_quiet_and_a_moved_feature_is_named(
    served: psycopg.Connection, database: str, lake: Lake, tmp_path: Path
) -> None:
    report = newest_week(served, database, lake)
    assert names(report) == set()
    assert report.requests == 7 * 120
    compared = names(report, "quiet")
    assert ("features", "user_activity.events_7d") in compared
    assert ("features", "item_activity.events_1d") in compared
    assert {("scores", "best"), ("categories", "shown"), ("categories", "sources"), ("labels", "pick_rate")} <= compared
    assert {("labels", "reciprocal_rank"), ("calibration", "picks_over_expected")} <= compared
    # No items have texts, and the champion's time lies before anything was served.
    assert {("vectors", "taken"), ("vectors", "shown")} <= names(report, WAITING)
    assert report.curve is not None
    assert sum(row[0] for row in report.curve.curve.bins) > 3_000
    place = write_report(tmp_path, "drift", report.day, report.to_dict(), report.plots())
    assert {file.name for file in place.glob("*.png")} == {"distances.png", "picks.png", "reliability.png"}
    assert "p00" not in (place / "report.json").read_text()

    with served.transaction():
        served.execute(
            "UPDATE served_features SET numbers[1] = numbers[1] + 1.0 WHERE view = 'user_activity' AND read_at >= %s",
            (TODAY - timedelta(days=7),),
        )
    served.commit()
    moved = drift_report(database, lake, "file:///nothing", YESTERDAY)
    assert names(moved) == {("features", "user_activity.events_7d")}
    assert {one.against for one in moved.alarms} == {"day", "week"}
    assert moved.severe
    assert moved.to_dict()["severe"]


def test_picks_that_fall_alarm(served: psycopg.Connection, database: str, lake: Lake) -> None:
    report = newest_week(served, database, lake, pick_rate=0.25)
    assert ("labels", "pick_rate") in names(report)
    assert ("calibration", "picks_over_expected") in names(report)
    [found] = [one for one in report.alarms if one.name == "pick_rate" and one.against == "week"]
    assert found.distance == pytest.approx(-0.5, abs=0.08)
    assert not {kind for kind, _ in names(report)} & {"features", "scores", "categories"}


def test_what_is_kept_comes_back_as_it_was(connection: psycopg.Connection) -> None:
    values = np.random.default_rng(3).normal(0, 1, 500)
    window = {
        Name("features", "v.f", "1"): sketches.sketch(values, 500),
        Name("categories", "shown", ""): Counts(200, 412.5, {"a": 0.25, "b": 0.75}),
        Name("labels", "pick_rate", "m"): Mean(300, 0.5, 0.01),
        Name("features", "v.few", "1"): sketches.sketch(values[:99], 99),
    }
    assert sketches.keep(connection, date(2026, 5, 4), WEEK, window) == 3
    assert sketches.keep(connection, date(2026, 5, 4), WEEK, window) == 3
    empty, found = sketches.kept_windows(connection, [date(2026, 5, 3), date(2026, 5, 4)], WEEK)
    assert empty == {}
    # What is of few people is not kept: it would be near to saying something of one of them.
    assert set(found) == set(list(window)[:3])
    assert found[Name("categories", "shown", "")] == window[Name("categories", "shown", "")]
    assert found[Name("labels", "pick_rate", "m")] == window[Name("labels", "pick_rate", "m")]
    back = found[Name("features", "v.f", "1")]
    assert isinstance(back, Sketch)
    points = np.linspace(-3, 3, 50)
    share = (values[:, None] <= points).mean(axis=0)
    assert np.abs(back.below(points) - share).max() <= 0.5 / sketches.QUANTILES + 1 / 500
    assert sketches.kept_windows(connection, [date(2026, 5, 4)], DAY) == [{}]
    # Made again when the log is half gone: what was known in time stays.
    late: dict[Name, sketches.Kept] = {Name("labels", "pick_rate", "m"): Mean(150, 0.1, 0.01)}
    sketches.keep(connection, date(2026, 5, 4), WEEK, late)
    [same] = sketches.kept_windows(connection, [date(2026, 5, 4)], WEEK)
    assert same[Name("labels", "pick_rate", "m")] == found[Name("labels", "pick_rate", "m")]
    more: dict[Name, sketches.Kept] = {Name("labels", "pick_rate", "m"): Mean(301, 0.4, 0.01)}
    sketches.keep(connection, date(2026, 5, 4), WEEK, more)
    [after] = sketches.kept_windows(connection, [date(2026, 5, 4)], WEEK)
    assert set(after) == set(found)
    assert after[Name("labels", "pick_rate", "m")] == Mean(301, 0.4, 0.01)


def test_what_was_kept_of_counts_is_like_the_same_counts_again(connection: psycopg.Connection) -> None:
    """The logs of counts have many digits and few values; what is kept has six digits."""
    name, counts = Name("features", "v.f", "1"), np.log1p(np.random.default_rng(4).poisson(2.0, 400))
    now = sketches.sketch(counts, 400)
    sketches.keep(connection, date(2026, 5, 4), DAY, {name: now})
    [before] = sketches.kept_windows(connection, [date(2026, 5, 4)], DAY)
    kept = before[name]
    assert isinstance(kept, Sketch)
    assert ks(now, [kept])[0] == 0
    assert psi(now, [kept])[0] == pytest.approx(0)


def test_a_person_counts_once_by_their_newest_read(connection: psycopg.Connection) -> None:
    names = [feature.name for feature in USER_ACTIVITY.features]
    rows = [("a", hour, 1.0) for hour in range(9)] + [("a", 9, 5.0), ("b", 3, 2.0)]
    with connection.cursor() as cursor:
        cursor.executemany(
            "INSERT INTO served_features (read_id, view, request_id, user_id, read_at, definition_hash, features, keys, "
            "numbers) VALUES (%s, 'user_activity', 'r', %s, %s, %s, %s, %s, %s)",
            [
                (
                    f"{who}{hour}",
                    who,
                    days_ago(1) + timedelta(hours=hour),
                    fingerprint((USER_ACTIVITY,)),
                    names,
                    [who],
                    [value, *([None] * (len(names) - 1))],
                )
                for who, hour, value in rows
            ]
            # Of another definition, and of another day: neither counts.
            + [
                ("x", "c", days_ago(1), "other", names, ["c"], [9.0] * len(names)),
                ("y", "d", days_ago(2), fingerprint((USER_ACTIVITY,)), names, ["d"], [9.0] * len(names)),
            ],
        )
    found = feature_sketches(connection, Window(YESTERDAY, YESTERDAY))
    first = found[Name("features", "user_activity.events_7d", fingerprint((USER_ACTIVITY,)))]
    assert isinstance(first, Sketch)
    assert first.clusters == 2
    assert set(first.quantiles.tolist()) == {2.0, 5.0}
    second = found[Name("features", "user_activity.events_30d", fingerprint((USER_ACTIVITY,)))]
    assert isinstance(second, Sketch)
    assert second.missing == 1.0


def test_more_requests_than_are_looked_at_are_thinned_by_person(connection: psycopg.Connection) -> None:
    prepare(connection, days_ago(60))
    for back in range(4):
        serve_day(connection, YESTERDAY - timedelta(days=back))
    window = Window.ending(YESTERDAY, WEEK)
    everything, some = read_requests(connection, window), read_requests(connection, window, most=120)
    assert len(everything) == 4 * 120
    assert 0 < len(some) < len(everything) / 2
    people = {one.user_id for one in some}
    assert len(some) == sum(one.user_id in people for one in everything)
    assert everything[0].model_version == MODEL


def test_picks_of_days_that_are_gone_are_not_taken_for_none(
    served: psycopg.Connection, database: str, lake: Lake
) -> None:
    last = YESTERDAY - timedelta(days=7)
    before = sketches.kept_windows(served, [last], WEEK)
    served.execute("DELETE FROM recent_events WHERE request_id IS NOT NULL")
    served.commit()
    report = drift_report(database, lake, "file:///nothing", last)
    assert report.waits("labels") == "nothing was logged of it"
    assert not report.alarms
    assert sketches.kept_windows(served, [last], WEEK)[0].keys() == before[0].keys()
    assert any(name.kind == "labels" for name in before[0])


def test_a_deployment_that_served_nothing_waits_for_it(database: str, lake: Lake) -> None:
    with psycopg.connect(database, options="-c TimeZone=UTC") as connection:
        ingest(ListSource([Event("e", "p000", "i000", "click", None, days_ago(30))]), lake, connection)
    report = drift_report(database, lake, "file:///nothing", YESTERDAY)
    assert report.champion is None
    assert not report.alarms
    assert report.waits("features") == "nothing was logged of it"
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["requests"] == 0


def test_what_an_experiment_changes_is_no_drift(served: psycopg.Connection, database: str, lake: Lake) -> None:
    for back in range(7):
        serve_day(served, YESTERDAY - timedelta(days=back))
        serve_day(served, YESTERDAY - timedelta(days=back), seed=1, pick_rate=0.0, moved=2.0)
    # Half of what was served is an arm's in which nobody picks anything, and a feature is another.
    served.execute(
        "UPDATE served_requests SET experiment = 'e', arm = CASE WHEN request_id LIKE '%%-1' THEN 'new' ELSE 'control' END "
        "WHERE served_at >= %s",
        (TODAY - timedelta(days=7),),
    )
    served.commit()
    report = drift_report(database, lake, "file:///nothing", YESTERDAY)
    assert names(report) == set()
    assert report.requests == 2 * 7 * 120
    assert ("labels", "pick_rate") in names(report, "quiet")
    served.execute("UPDATE served_requests SET experiment = NULL, arm = NULL")
    served.commit()
    found = names(drift_report(database, lake, "file:///nothing", YESTERDAY))
    assert {("labels", "pick_rate"), ("features", "user_activity.events_7d")} <= found


def test_a_week_in_which_serving_began_is_compared_with_nothing(
    served: psycopg.Connection, database: str, lake: Lake
) -> None:
    """Reports were made for the weeks that ended 13 and 6 days ago; of the older one's days the first is taken away."""
    assert not newest_week(served, database, lake).waits("features")
    began = YESTERDAY - timedelta(days=19)
    served.execute("DELETE FROM served_requests WHERE served_at < %s", (began,))
    served.commit()
    report = drift_report(database, lake, "file:///nothing", YESTERDAY)
    weekly = [one for one in report.findings if one.kind == "features" and one.against == "week"]
    assert {one.state for one in weekly} == {WAITING}
    assert {one.words for one in weekly} == {"1 windows before with 100 people or items; 2 are needed"}
    # What was served before the log's own memory is known by its sketches.
    served.execute(
        "INSERT INTO drift_sketches (day, span_days, kind, name, version, clusters, body) VALUES (%s, 1, 'labels', 'x', '', 100, '{}')",
        (YESTERDAY - timedelta(days=40),),
    )
    served.commit()
    again = drift_report(database, lake, "file:///nothing", YESTERDAY)
    assert not [
        one for one in again.findings if one.against == "week" and one.state == WAITING and one.kind == "features"
    ]
