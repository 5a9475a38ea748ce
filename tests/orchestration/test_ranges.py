"""Ranges of daily partitions on a real lake, database and Dagster instance: what is built, reported, checked, blocked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date, timedelta

import dagster as dg
import psycopg
import pytest
from conftest import Ingested, ingested

from orchestration import ranges
from orchestration.compute.materialise import materialise
from orchestration.compute.measures import against_day_before, failed, measure_events
from orchestration.definitions import build_definitions
from orchestration.resources import Larder
from schemas.checks import EVENT_CHECKS, null_rate, rows_against_day_before, values_in_range
from schemas.errors import DefinitionError
from schemas.views import USER_ACTIVITY

DAYS = 10
DAY = date(2026, 1, 2)
YESTERDAY = date(2026, 1, 1)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ingested]:
    with pytest.MonkeyPatch.context() as patch:
        yield ingested(tmp_path_factory.mktemp("ranges"), patch, DAYS)


@pytest.fixture
def instance(world: Ingested) -> Iterator[dg.DagsterInstance]:
    """A fresh instance, and nothing built yet."""
    with psycopg.connect(world.url) as connection:
        connection.execute("TRUNCATE feature_ledger, features.user_activity, features.item_activity")
    with dg.DagsterInstance.ephemeral() as made:
        yield made


def run(
    world: Ingested, instance: dg.DagsterInstance, *names: str, last: date | None = None
) -> dg.ExecuteInProcessResult:
    job = build_definitions(Larder(deployment="small")).resolve_implicit_global_asset_job_def()
    return job.execute_in_process(
        instance=instance,
        asset_selection=[dg.AssetKey(name) for name in names],
        tags={
            "dagster/asset_partition_range_start": world.first.isoformat(),
            "dagster/asset_partition_range_end": (last or world.last).isoformat(),
        },
        raise_on_error=False,
    )


def days(first: date, count: int) -> list[date]:
    return [first + timedelta(days=offset) for offset in range(count)]


def reported(result: dg.ExecuteInProcessResult, name: str) -> dict[date, int]:
    """The partitions that the run reported materialised, and the rows it said they have."""
    events = [event for event in result.all_events if event.is_step_materialization]
    found = [event.step_materialization_data.materialization for event in events]
    of_asset = [one for one in found if one.asset_key == dg.AssetKey(name)]
    rows = {date.fromisoformat(str(one.partition)): int(one.metadata["rows"].value) for one in of_asset}  # type: ignore[arg-type]
    assert len(rows) == len(of_asset), "a partition was reported twice"
    return rows


def stored(world: Ingested, name: str) -> dict[date, int]:
    with psycopg.connect(world.url) as connection:
        return dict(
            connection.execute(
                f"SELECT partition_date, count(*) FROM features.{name} GROUP BY partition_date"
            ).fetchall()
        )


def counted(world: Ingested) -> dict[date, int]:
    with psycopg.connect(world.url) as connection:
        return dict(connection.execute("SELECT day, rows FROM lake_files").fetchall())


def checks(result: dg.ExecuteInProcessResult, asset: str) -> dict[str, dg.AssetCheckEvaluation]:
    return {one.check_name: one for one in result.get_asset_check_evaluations() if one.asset_key == dg.AssetKey(asset)}


def test_a_good_range_is_reported_with_its_own_counts(world: Ingested, instance: dg.DagsterInstance) -> None:
    result = run(world, instance, "events", "user_activity")
    assert result.success
    assert reported(result, "events") == counted(world)
    assert reported(result, "user_activity") == stored(world, "user_activity")
    assert len(stored(world, "user_activity")) == DAYS
    assert all(one.passed for one in checks(result, "user_activity").values())


def test_a_truncated_day_fails_alone_and_stops_only_what_reads_it(
    world: Ingested, instance: dg.DagsterInstance
) -> None:
    bad = days(world.first, DAYS)[6]
    with world.truncated(bad):
        result = run(world, instance, "events", "user_activity")
    assert not result.success
    assert reported(result, "events") == {day: rows for day, rows in counted(world).items() if day != bad}
    # A view's window reaches back over half a year: every later day of this range would have read the bad one.
    good = days(world.first, 6)
    assert sorted(reported(result, "user_activity")) == sorted(stored(world, "user_activity")) == good
    again = run(world, instance, "events", "user_activity")
    assert again.success
    assert len(reported(again, "user_activity")) == DAYS


def test_a_day_that_postgres_refuses_fails_alone(world: Ingested, instance: dg.DagsterInstance) -> None:
    bad = days(world.first, DAYS)[4]
    with psycopg.connect(world.url, autocommit=True) as connection:
        connection.execute(
            f"ALTER TABLE features.user_activity ADD CONSTRAINT poison CHECK (partition_date <> '{bad}')"
        )
        try:
            result = run(world, instance, "user_activity", "item_activity")
        finally:
            connection.execute("ALTER TABLE features.user_activity DROP CONSTRAINT poison")
    assert not result.success
    good = set(days(world.first, DAYS)) - {bad}
    assert set(reported(result, "user_activity")) == set(stored(world, "user_activity")) == good
    assert len(reported(result, "item_activity")) == DAYS
    with psycopg.connect(world.url) as connection:
        ledger = {
            day
            for (day,) in connection.execute("SELECT partition_date FROM feature_ledger WHERE view = 'user_activity'")
        }
    assert ledger == good
    clean = run(world, instance, "user_activity")
    assert {day: rows for day, rows in reported(clean, "user_activity").items() if day in good} == reported(
        result, "user_activity"
    )


def test_a_blocking_check_stops_what_is_made_from_that_day(world: Ingested, instance: dg.DagsterInstance) -> None:
    bad = days(world.first, DAYS)[5]
    with psycopg.connect(world.url, autocommit=True) as connection:
        connection.execute("UPDATE lake_files SET rows = rows + 1 WHERE day = %s", (bad,))
        try:
            result = run(world, instance, "events", "user_activity")
        finally:
            connection.execute("UPDATE lake_files SET rows = rows - 1 WHERE day = %s", (bad,))
    assert not result.success
    found = checks(result, "events")["lake_agrees"]
    assert (found.passed, found.blocking) == (False, True)
    assert str(bad) in (found.description or "")
    assert len(reported(result, "events")) == DAYS
    assert sorted(reported(result, "user_activity")) == days(world.first, 5)

    # Days before it are checked and pass; the bad day, not looked at again, keeps the check from turning green.
    before = run(world, instance, "events", "user_activity", last=bad - timedelta(days=1))
    assert before.success
    found = checks(before, "events")["lake_agrees"]
    assert not found.passed
    assert found.description == f"failed earlier, not built since: {bad}"
    whole = run(world, instance, "events")
    assert checks(whole, "events")["lake_agrees"].passed


def test_a_cancelled_range_reports_what_it_finished(
    world: Ingested, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cancel_after_the_first_view(context: dg.AssetExecutionContext) -> Callable[[str], None]:
        def say(message: str) -> None:
            if message.startswith("user_activity"):
                instance.report_run_canceling(context.run)

        return say

    monkeypatch.setattr(ranges, "progress", cancel_after_the_first_view)
    result = run(world, instance, "user_activity", "item_activity")
    ended = instance.get_run_by_id(result.run_id)
    assert ended is not None
    assert ended.status == dg.DagsterRunStatus.CANCELED
    assert len(instance.get_materialized_partitions(dg.AssetKey("user_activity"))) == DAYS
    assert not instance.get_materialized_partitions(dg.AssetKey("item_activity"))
    assert not stored(world, "item_activity")


def test_checks_judge_numbers_and_leave_small_partitions_alone() -> None:
    all_checks = (values_in_range(), null_rate(0.5), rows_against_day_before(0.5, 2))
    many = {"rows": 1000.0, "null_rate": 0.6, "out_of_range": 1.0, "rows_over_day_before": 3.0}
    assert [check.name for check in failed(all_checks, many)] == [
        "values_in_range", "null_rates", "rows_against_day_before",
    ]  # fmt: skip
    assert [check.name for check in failed(all_checks, many | {"rows": 5.0})] == ["values_in_range"]
    assert failed(all_checks, {"rows": 1000.0}) == ()


def test_a_day_that_lost_nearly_everything_is_judged_and_what_was_small_before_is_not() -> None:
    one = (rows_against_day_before(0.5, 2),)
    for rows, before in (0, 1_000), (5, 1_000), (1_000, 5):
        assert failed(one, against_day_before({YESTERDAY: before, DAY: rows}, [DAY], None)[DAY] | {"rows": rows}) == one
    assert failed(one, against_day_before({YESTERDAY: 50, DAY: 5}, [DAY], None)[DAY] | {"rows": 5.0}) == ()


def test_a_day_of_which_nothing_came_is_judged(world: Ingested) -> None:
    with psycopg.connect(world.url, options="-c TimeZone=UTC") as connection:
        before = measure_events(connection, world.lake, world.last, world.last)[world.last]
        assert failed(EVENT_CHECKS, before) == ()
        connection.execute("UPDATE lake_files SET rows = 1000 WHERE day = %s", (world.last - timedelta(days=1),))
        connection.execute("DELETE FROM lake_files WHERE day = %s", (world.last,))
        (found,) = measure_events(connection, world.lake, world.last, world.last).values()
        connection.rollback()
    assert [check.name for check in failed(EVENT_CHECKS, found)] == ["rows_against_day_before"]


def test_no_day_is_held_against_the_first_of_its_source() -> None:
    assert DAY not in against_day_before({YESTERDAY: 76.0, DAY: 158.0}, [DAY], YESTERDAY)
    assert DAY not in against_day_before({YESTERDAY: 0.0, DAY: 158.0}, [DAY], None)
    assert against_day_before({YESTERDAY: 76.0, DAY: 158.0}, [DAY], YESTERDAY - timedelta(days=1))[DAY] == {
        "rows_day_before": 76.0, "rows_over_day_before": 158 / 76,
    }  # fmt: skip


def test_values_outside_a_features_limits_are_counted(world: Ingested, instance: dg.DagsterInstance) -> None:
    means = tuple(
        replace(one, low=4.9, high=5) if one.name == "value_mean_180d" else one for one in USER_ACTIVITY.features
    )
    view = replace(USER_ACTIVITY, features=means)
    assert view.definition_hash == USER_ACTIVITY.definition_hash
    (report,) = materialise(view, world.last, world.last, url=world.url, lake=world.lake)
    assert 0 < report.measures["out_of_range"] <= report.rows
    assert failed(view.checks, report.measures)[0].name == "values_in_range"


def test_two_checks_of_one_name_are_refused() -> None:
    with pytest.raises(DefinitionError, match="two checks named 'null_rates'"):
        replace(USER_ACTIVITY, checks=(null_rate(0.1), null_rate(0.2)))
