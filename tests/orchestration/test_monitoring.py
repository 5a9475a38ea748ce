"""The watching assets through Dagster: their pages, checks and files, and what a severe drift sets off."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import dagster as dg
import psycopg
import pytest
from conftest import TODAY, Ingested, days_ago, ingested
from served_log import prepare, serve_day
from worlds import ListSource

from orchestration.assets.monitoring import PROFILE_VARIABLE, SEVERE, Day
from orchestration.automation import training_job
from orchestration.compute.ingest import ingest
from orchestration.definitions import build_definitions
from orchestration.monitoring import MONITORING_SCHEDULE, RETRAIN_TAG, retrain_on_drift
from orchestration.resources import Larder
from schemas.events import Event

YESTERDAY = (TODAY - timedelta(days=1)).date()


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ingested:
    """A deployment that served for three weeks; in the newest, one feature and the lists are another's."""
    made = ingested(tmp_path / "home", monkeypatch, 10)
    with psycopg.connect(made.url, options="-c TimeZone=UTC") as connection:
        prepare(connection, days_ago(60))
        for back in range(20, 6, -1):
            serve_day(connection, YESTERDAY - timedelta(days=back))
        for back in range(6, -1, -1):
            serve_day(connection, YESTERDAY - timedelta(days=back), moved=1.5)
    return made


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as made:
        yield made


def run(instance: dg.DagsterInstance, name: str, day: date | str = "") -> dg.ExecuteInProcessResult:
    job = build_definitions(Larder(deployment="small")).resolve_implicit_global_asset_job_def()
    return job.execute_in_process(
        instance=instance,
        asset_selection=[dg.AssetKey(name)],
        run_config={"ops": {name: {"config": {"day": str(day)}}}} if day else {},
        raise_on_error=False,
    )


def checks(result: dg.ExecuteInProcessResult) -> dict[str, dg.AssetCheckEvaluation]:
    return {one.check_name: one for one in result.get_asset_check_evaluations()}


def tick(instance: dg.DagsterInstance) -> dg.RunRequest | str:
    """What the sensor makes of the newest report: a run that it asks for, or why it does not."""
    context = dg.build_sensor_context(instance=instance, definitions=build_definitions(Larder(deployment="small")))
    found = retrain_on_drift.evaluate_tick(context)
    if found.run_requests:
        [asked] = found.run_requests
        return asked
    return str(found.skip_message)


def test_drift_is_told_on_the_page_by_checks_in_files_and_asks_for_training(
    served: Ingested, instance: dg.DagsterInstance
) -> None:
    for back in (14, 7):
        earlier = run(instance, "drift_report", YESTERDAY - timedelta(days=back))
        assert earlier.success
        assert all(one.passed for one in checks(earlier).values())
    assert "no severe finding" in str(tick(instance))

    result = run(instance, "drift_report")
    assert result.success
    page = result.asset_materializations_for_node("drift_report")[0].metadata
    assert page["alarms_features"].value >= 2
    assert page[SEVERE].value >= 1
    assert "| features | user_activity.events_7d | ks | week |" in str(page["findings"].value)
    assert str(page["plot_distances"].value).startswith("![distances](data:image/png;base64,")
    assert page["events_days_behind"].value == 0
    found = checks(result)
    assert found["features_as_before"].severity == dg.AssetCheckSeverity.ERROR
    assert not found["features_as_before"].passed
    assert "user_activity.events_7d (ks" in str(found["features_as_before"].description)
    assert {name for name, one in found.items() if not one.passed} == {"features_as_before"}
    assert "needed" in str(found["vectors_as_before"].description)

    home = served.record.folder / "reports" / "drift"
    latest = json.loads((home / "latest.json").read_text())
    assert latest["day"] == YESTERDAY.isoformat()
    assert latest["alarms"]
    assert {file.name for file in home.glob("*.png")} == set(latest["plots"])
    assert (home / (YESTERDAY - timedelta(days=7)).isoformat() / "report.json").exists()

    asked = tick(instance)
    assert isinstance(asked, dg.RunRequest)
    assert asked.run_key == f"drift/{datetime.now(UTC).date()}"
    assert RETRAIN_TAG in asked.tags
    instance.create_run_for_job(
        build_definitions(Larder(deployment="small")).resolve_job_def(training_job.name), tags=asked.tags
    )
    assert "has trained within a day" in str(tick(instance))


def test_an_old_day_that_was_severe_trains_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, instance: dg.DagsterInstance
) -> None:
    monkeypatch.setenv("LARDER_HOME", str(tmp_path))
    for day, words in ((YESTERDAY - timedelta(days=3), "an old day that was looked at again"), (YESTERDAY, "")):
        instance.report_runless_asset_event(
            dg.AssetMaterialization("drift_report", metadata={SEVERE: 2, "day": day.isoformat()})
        )
        asked = tick(instance)
        assert words in asked if words else isinstance(asked, dg.RunRequest)


def test_nothing_runs_by_itself_until_it_is_switched_on() -> None:
    assert retrain_on_drift.default_status == dg.DefaultSensorStatus.STOPPED
    assert MONITORING_SCHEDULE.default_status == dg.DefaultScheduleStatus.STOPPED
    assert MONITORING_SCHEDULE.cron_schedule == "45 2 * * *"


def test_fairness_is_told_on_the_page_by_checks_and_in_files(
    served: Ingested, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PROFILE_VARIABLE, "region")
    with psycopg.connect(served.url, options="-c TimeZone=UTC") as connection:
        connection.execute(
            "INSERT INTO people (user_id, profile) SELECT DISTINCT user_id, jsonb_build_object('region', "
            "CASE WHEN user_id < 'p075' THEN 'north' ELSE 'south' END) FROM served_requests"
        )
        # Houses 1 and 2 have four of five places, and most of what people choose is house 0's.
        connection.execute(
            "UPDATE served_requests SET item_ids = ARRAY['i001', 'i002', 'i004', 'i005', 'i000'] WHERE served_at >= %s",
            (TODAY - timedelta(days=14),),
        )
        connection.execute(
            "UPDATE recent_events SET item_id = 'i000' WHERE request_id IS NOT NULL AND user_id < 'p075'"
        )
        connection.commit()
        rows = connection.execute(
            "SELECT event_id, user_id, item_id, occurred_at FROM recent_events WHERE request_id IS NOT NULL"
        ).fetchall()
        events = [Event(f"l{event_id}", user, item, "click", None, at) for event_id, user, item, at in rows]
        ingest(ListSource(list(events)), served.lake, connection)
    result = run(instance, "fairness_report")
    assert result.success
    page = result.asset_materializations_for_node("fairness_report")[0].metadata
    assert "| house 0 | 40 |" in str(page["provider"].value)
    assert "region: south" in str(page["segments"].value)
    assert page["coverage_rate"].value > 0
    assert 0 <= page["exposure_gini"].value <= 1
    found = checks(result)
    assert not found["exposure_follows_relevance"].passed
    assert found["exposure_follows_relevance"].severity == dg.AssetCheckSeverity.WARN
    assert "provider house 1 gets" in str(found["exposure_follows_relevance"].description)
    assert not found["no_segment_left_behind"].passed
    assert "region: south" in str(found["no_segment_left_behind"].description)
    home = served.record.folder / "reports" / "fairness"
    latest = json.loads((home / "latest.json").read_text())
    assert {"exposure-provider.png", "exposure-category.png", "segments.png", "diversity.png"} <= set(latest["plots"])
    assert all((home / name).stat().st_size > 2_000 for name in latest["plots"])
    assert "p07" not in (home / "latest.json").read_text()


@pytest.mark.parametrize(
    ("day", "words"),
    [("soon", "day is 'soon', which is no day"), (str(TODAY.date()), "which is not over yet")],
)
def test_a_day_that_is_none_is_named(day: str, words: str) -> None:
    with pytest.raises(dg.Failure, match=words):
        Day(day=day).chosen()
