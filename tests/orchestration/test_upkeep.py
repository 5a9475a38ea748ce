"""Late events on a real Dagster instance: what shows them, what rebuilds them; and the vacuum as job and command."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta

import dagster as dg
import psycopg
import pytest
from conftest import Ingested, ingested

from inference.store import Store
from orchestration.automation import daily_job
from orchestration.backfill import plan
from orchestration.compute.ingest import drain
from orchestration.compute.stale import DAILY, to_rebuild
from orchestration.definitions import build_definitions
from orchestration.due import what_is_due
from orchestration.instance_api import RANGE_END_TAG, RANGE_START_TAG, DailyAsset
from orchestration.resources import Larder
from orchestration.upkeep import REBUILD_TAG, rebuild_stale_partitions, vacuum_lake

DAYS = 8


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ingested]:
    with pytest.MonkeyPatch.context() as patch:
        made = ingested(tmp_path_factory.mktemp("upkeep"), patch, DAYS)
        with dg.DagsterInstance.ephemeral() as instance:
            assert execute(instance, DAILY, made.first, made.last).success
        yield made


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as made:
        yield made


def execute(instance: dg.DagsterInstance, names: tuple[str, ...], first: date, last: date) -> dg.ExecuteInProcessResult:
    job = build_definitions(Larder(deployment="small")).resolve_implicit_global_asset_job_def()
    return job.execute_in_process(
        instance=instance,
        asset_selection=[dg.AssetKey(name) for name in names],
        tags={RANGE_START_TAG: first.isoformat(), RANGE_END_TAG: last.isoformat()},
        raise_on_error=False,
    )


def post(world: Ingested, event_id: str, day: date) -> None:
    """What POST /events stores of an event at noon of `day`."""
    store = Store(world.url)
    at = datetime(day.year, day.month, day.day, 12, tzinfo=UTC).isoformat()
    event = {"event_id": event_id, "user_id": "u", "item_id": "i", "kind": "view", "value": None, "request_id": None}
    try:
        assert store.accept_events([event | {"occurred_at": at}], 5000) == {event_id}
    finally:
        store.close()


def outstanding(world: Ingested) -> dict[str, set[date]]:
    with psycopg.connect(world.url) as connection:
        return to_rebuild(connection, world.first, world.last)


def requests(instance: dg.DagsterInstance) -> list[dg.RunRequest]:
    larder = Larder(deployment="small")
    found = rebuild_stale_partitions(dg.build_sensor_context(instance=instance, resources={"larder": larder}))
    return list(found.run_requests or ()) if isinstance(found, dg.SensorResult) else []


def since(world: Ingested, day: int) -> set[date]:
    return {world.first + timedelta(days=offset) for offset in range(day, DAYS)}


def test_the_sensor_drains_and_rebuilds_what_a_late_post_made_stale_in_one_run(
    world: Ingested, instance: dg.DagsterInstance
) -> None:
    assert requests(instance) == []
    post(world, "late-1", world.first + timedelta(days=3))
    (request,) = requests(instance)
    assert {key.to_user_string() for key in request.asset_selection or ()} == set(DAILY)
    first, last = (date.fromisoformat(request.tags[tag]) for tag in (RANGE_START_TAG, RANGE_END_TAG))
    assert (first, last) == (world.first + timedelta(days=3), world.last)
    result = execute(instance, DAILY, first, last)
    assert result.success
    assert outstanding(world) == {}
    assert requests(instance) == []
    (check,) = [
        one
        for one in result.get_asset_check_evaluations()
        if one.check_name == "none_stale" and one.asset_key == dg.AssetKey("user_activity")
    ]
    assert check.passed
    with psycopg.connect(world.url) as connection:
        row = connection.execute(
            "SELECT count(*) FROM features.user_activity WHERE user_id = 'u' AND partition_date = %s", (world.last,)
        ).fetchone()
    assert row == (1,)


def test_the_sensors_request_is_one_that_its_job_can_run(world: Ingested, instance: dg.DagsterInstance) -> None:
    post(world, "late-2", world.first + timedelta(days=5))
    (request,) = requests(instance)
    assert request.run_key == requests(instance)[0].run_key
    job = build_definitions(Larder(deployment="small")).resolve_job_def(daily_job.name)
    result = job.execute_in_process(
        instance=instance, asset_selection=list(request.asset_selection or ()), tags=dict(request.tags)
    )
    assert result.success
    assert outstanding(world) == {}


def test_the_sensor_waits_for_its_own_run(world: Ingested, instance: dg.DagsterInstance) -> None:
    post(world, "late-3", world.first + timedelta(days=6))
    assert requests(instance)
    job = build_definitions(Larder(deployment="small")).resolve_job_def(daily_job.name)
    instance.create_run_for_job(job, status=dg.DagsterRunStatus.STARTED, tags={REBUILD_TAG: "1"})
    assert requests(instance) == []
    assert execute(instance, DAILY, world.first + timedelta(days=6), world.last).success


def test_the_page_of_a_view_says_how_many_partitions_are_stale(world: Ingested, instance: dg.DagsterInstance) -> None:
    post(world, "late-4", world.first + timedelta(days=2))
    result = execute(instance, ("events",), world.first, world.last)
    stale = 3 * len(since(world, 2))
    events = [
        event.step_materialization_data.materialization for event in result.all_events if event.is_step_materialization
    ]
    assert {one.metadata["stale_partitions"].value for one in events} == {stale}
    # One view is rebuilt, another in part.
    result = execute(instance, ("user_activity",), world.first, world.last)
    found = {
        one.asset_key.to_user_string(): one
        for one in result.get_asset_check_evaluations()
        if one.check_name == "none_stale"
    }
    assert found["user_activity"].passed
    half = world.first + timedelta(days=4)
    result = execute(instance, ("item_activity",), world.first, half)
    (check,) = [one for one in result.get_asset_check_evaluations() if one.check_name == "none_stale"]
    assert (check.passed, check.severity) == (False, dg.AssetCheckSeverity.WARN)
    assert check.metadata["stale_partitions"].value == DAYS - 5
    assert "ONLY=stale" in (check.description or "")
    assert execute(instance, DAILY, world.first, world.last).success


def test_only_stale_takes_the_ledgers_word_and_drains_first(world: Ingested, instance: dg.DagsterInstance) -> None:
    assets = [DailyAsset(name, world.first, world.last, {}, ("repository", "location")) for name in DAILY]
    assert plan(assets, world.first, world.last, "stale", outstanding(world)) == []
    post(world, "late-5", world.first + timedelta(days=5))
    (part,) = plan(assets, world.first, world.last, "stale", outstanding(world))
    assert (part.assets, part.first, part.last) == (DAILY, world.first + timedelta(days=5), world.last)
    (part,) = plan(assets[1:2], world.first, world.last, "stale", outstanding(world))
    assert part.assets == ("user_activity",)
    assert execute(instance, DAILY, part.first, part.last).success
    assert plan(assets, world.first, world.last, "stale", outstanding(world)) == []


def test_the_road_builds_every_day_that_a_late_post_reaches(world: Ingested, instance: dg.DagsterInstance) -> None:
    def due() -> object:
        return what_is_due(Larder(deployment="small"), retrain=False).parts

    assert due() == []
    post(world, "late-6", world.first + timedelta(days=4))
    # What requests read is not built ahead of the drain that reaches it.
    assert due() == [(DAILY, world.first + timedelta(days=4), world.last)]
    assert execute(instance, DAILY, world.first + timedelta(days=4), world.last).success
    assert due() == []
    # Drained by somebody else: then it is the ledger that says so.
    post(world, "late-7", world.first + timedelta(days=1))
    with psycopg.connect(world.url, options="-c TimeZone=UTC") as connection:
        drain(connection, world.lake, None, world.last)
    served = world.last - timedelta(days=2)
    assert due() == [(DAILY, served, world.last), (DAILY, world.first + timedelta(days=1), served - timedelta(days=1))]
    assert execute(instance, DAILY, world.first, world.last).success
    assert due() == []


def test_what_was_posted_for_a_day_before_the_first_partition_is_drained_with_it(
    world: Ingested, instance: dg.DagsterInstance
) -> None:
    post(world, "early", world.first - timedelta(days=30))
    assert what_is_due(Larder(deployment="small"), retrain=False).parts == [(DAILY, world.first, world.last)]
    assert outstanding(world)["events"] == {world.first}
    assert execute(instance, DAILY, world.first, world.last).success
    assert outstanding(world) == {}
    with psycopg.connect(world.url) as connection:
        assert "early" in world.lake.events(connection).to_table()["event_id"].to_pylist()


def test_the_vacuum_as_a_job_and_as_a_command(world: Ingested, instance: dg.DagsterInstance) -> None:
    left = world.file(world.first).parent / "000009-0123abcd.parquet"
    left.write_bytes(b"half a file")
    os.utime(left, (time.time() - 7200, time.time() - 7200))

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "orchestration.vacuum", *arguments], capture_output=True, text=True, check=False
        )

    refused = command("--hours", "0.1")
    assert (refused.returncode, "give 1 or more" in refused.stderr) == (1, True)
    listed = command("--hours", "1", "--dry-run")
    assert listed.returncode == 0, listed.stderr
    assert f"events/day={world.first}/{left.name}  11 bytes" in listed.stdout
    assert "1 files, 11 bytes would be deleted" in listed.stdout
    assert left.exists()
    result = vacuum_lake.execute_in_process(
        instance=instance,
        resources={"larder": Larder(deployment="small")},
        run_config={"ops": {"remove_orphans": {"config": {"hours": 1}}}},
    )
    assert result.success
    assert not left.exists()
    assert "0 files, 0 bytes were deleted" in command("--hours", "1").stdout
