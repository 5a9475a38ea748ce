"""Views built by Spark through Dagster Pipes: the values of DuckDB in the same tables, and runs that fail or are stopped."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import date, timedelta
from pathlib import Path

import dagster as dg
import psycopg
import pyspark
import pytest
from conftest import Ingested, ingested

from orchestration.compute.materialise import materialise
from orchestration.definitions import build_definitions
from orchestration.resources import Larder
from orchestration.spark.java import java_home
from orchestration.spark.launch import open_engine
from schemas.errors import SettingsError
from schemas.features import FeatureView, Merge
from schemas.views import ITEM_ACTIVITY, VIEWS

DAYS = 10
MILLION_PEOPLE = 12_000
Rows = dict[tuple[object, ...], tuple[object, ...]]


@pytest.fixture(scope="module", autouse=True)
def small_spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Spark as an operator sets it up, by spark-defaults.conf: here for jobs of seconds on a busy machine."""
    folder = tmp_path_factory.mktemp("conf")
    options = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"
    (folder / "spark-defaults.conf").write_text(
        f"spark.sql.shuffle.partitions 4\nspark.driver.extraJavaOptions {options}\n"
        f"spark.executor.extraJavaOptions {options}\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARK_CONF_DIR", str(folder))
        patch.delenv("JAVA_HOME", raising=False)
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ingested]:
    with pytest.MonkeyPatch.context() as patch:
        yield ingested(tmp_path_factory.mktemp("spark"), patch, DAYS, people=1_000, events_per_person=20)


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as made:
        yield made


def run(
    world: Ingested,
    instance: dg.DagsterInstance,
    *names: str,
    first: date | None = None,
    master: str = "local[2]",
) -> dg.ExecuteInProcessResult:
    larder = Larder(deployment="small", engine="spark", spark_master=master)
    return (
        build_definitions(larder)
        .resolve_implicit_global_asset_job_def()
        .execute_in_process(
            instance=instance,
            asset_selection=[dg.AssetKey(name) for name in names],
            tags={
                "dagster/asset_partition_range_start": (first or world.first).isoformat(),
                "dagster/asset_partition_range_end": world.last.isoformat(),
            },
            raise_on_error=False,
        )
    )


def stored(world: Ingested, view: FeatureView) -> Rows:
    """The snapshot rows of `view`, by partition and key."""
    keys = ["partition_date", *view.entity.keys]
    names = ", ".join([*keys, *(name for name, _, _ in view.columns)])
    with psycopg.connect(world.url, options="-c TimeZone=UTC") as connection:
        rows = connection.execute(f"SELECT {names} FROM features.{view.name}").fetchall()
    found = {row[: len(keys)]: row[len(keys) :] for row in rows}
    assert len(found) == len(rows)
    return found


def online(world: Ingested) -> dict[str, list[tuple[object, ...]]]:
    """What requests read, but for the instants of writing."""
    with psycopg.connect(world.url, options="-c TimeZone=UTC") as connection:
        tables = connection.execute(
            "SELECT table_name FROM information_schema.tables WHERE table_schema = 'online' AND table_name LIKE '%\\_rows'"
        ).fetchall()
        return {name: connection.execute(f"SELECT * FROM online.{name} ORDER BY 1, 2").fetchall() for (name,) in tables}


def assert_equal(view: FeatureView, ours: Rows, expected: Rows) -> None:
    """The same rows; every value exactly, decayed ones to 1e-6."""
    assert ours.keys() == expected.keys()
    assert ours
    for place, (name, state, _) in enumerate(view.columns):
        for key, row in expected.items():
            value = ours[key][place]
            if state.merge is Merge.DECAY:
                assert value == pytest.approx(row[place], rel=1e-6, abs=1e-6), (name, key)
            else:
                assert value == row[place], (name, key)


def ledger(world: Ingested) -> set[tuple[str, str]]:
    with psycopg.connect(world.url) as connection:
        return set(connection.execute("SELECT view, engine FROM feature_ledger").fetchall())


def scratch(world: Ingested) -> list[Path]:
    return list((world.record.folder / "lake" / "scratch").glob("*"))


def truncate(world: Ingested) -> None:
    with psycopg.connect(world.url) as connection:
        connection.execute("TRUNCATE feature_ledger, " + ", ".join(f"features.{view.name}" for view in VIEWS))


def compare(world: Ingested, instance: dg.DagsterInstance, master: str) -> list[str]:
    """Build all views by DuckDB, then by Spark in the same tables, and compare; returns what the run logged."""
    for view in VIEWS:
        materialise(view, world.first, world.last, url=world.url, lake=world.lake)
    expected = {view.name: stored(world, view) for view in VIEWS}
    read = online(world)
    truncate(world)
    result = run(world, instance, *(view.name for view in VIEWS), master=master)
    assert result.success
    for view in VIEWS:
        assert_equal(view, stored(world, view), expected[view.name])
    assert ledger(world) == {(view.name, "spark") for view in VIEWS}
    assert {table: [row[:1] for row in rows] for table, rows in online(world).items()} == {
        table: [row[:1] for row in rows] for table, rows in read.items()
    }
    assert not scratch(world)
    return [event.user_message for event in instance.all_logs(result.run_id)]


@pytest.mark.timeout(600)
def test_spark_fills_the_same_tables_with_the_values_of_duckdb(world: Ingested, instance: dg.DagsterInstance) -> None:
    said = compare(world, instance, "local[2]")
    assert any("Spark 4" in line and "is up on local[2]" in line for line in said)


@pytest.mark.timeout(600)
def test_a_job_that_fails_fails_only_its_days_and_says_why(world: Ingested, instance: dg.DagsterInstance) -> None:
    truncate(world)
    first = world.last - timedelta(days=1)
    with world.truncated(world.last):
        result = run(world, instance, "item_activity", first=first)
    assert not result.success
    assert {key[0] for key in stored(world, ITEM_ACTIVITY)} == {first}
    failure = next(event for event in result.all_events if event.is_step_failure)
    story = failure.step_failure_data.error_display_string
    assert f"item_activity: {world.last} failed: the Spark job" in story
    assert f"day={world.last}/000001-" in story
    assert not scratch(world)


def test_a_cluster_that_is_not_there_fails_the_days_at_once(world: Ingested, instance: dg.DagsterInstance) -> None:
    truncate(world)
    result = run(world, instance, "item_activity", master="local[nonsense]")
    failure = next(event for event in result.all_events if event.is_step_failure)
    story = failure.step_failure_data.error_display_string
    assert "Spark did not start on 'local[nonsense]'" in story
    assert "Could not parse Master URL" in story
    started = [event for event in instance.all_logs(result.run_id) if "opened dagster pipes" in event.user_message]
    assert len(started) == 1  # no smaller piece was tried
    assert not stored(world, ITEM_ACTIVITY)


def test_a_run_that_is_stopped_ends_its_job(world: Ingested, instance: dg.DagsterInstance) -> None:
    truncate(world)
    jobs: list[int] = []

    def stop() -> None:
        while not jobs:
            time.sleep(0.2)
            jobs.extend(_jobs())
        os.kill(os.getpid(), signal.SIGINT)

    stopper = threading.Thread(target=stop)
    stopper.start()
    result = run(world, instance, "item_activity")
    stopper.join()
    assert not result.success
    assert not _jobs()
    assert not stored(world, ITEM_ACTIVITY)
    assert not scratch(world)


def _jobs() -> list[int]:
    """The Spark jobs that this process started and that have not ended."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = status.read_text().rsplit(")", 1)[1].split()[:2]
            command = (status.parent / "cmdline").read_bytes()
        except OSError:
            continue
        if int(parent) == os.getpid() and state != "Z" and b"spark/job.py" in command:
            found.append(int(status.parent.name))
    return found


@pytest.mark.parametrize(
    ("engine", "master", "message"),
    [
        ("flink", "", "LARDER_ENGINE is 'flink'; give duckdb or spark"),
        ("spark", "cluster:7077", "LARDER_SPARK_MASTER is 'cluster:7077'; give"),
    ],
)
def test_an_engine_that_cannot_be_is_refused_before_anything_is_built(
    monkeypatch: pytest.MonkeyPatch, engine: str, master: str, message: str
) -> None:
    monkeypatch.setenv("LARDER_ENGINE", engine)
    monkeypatch.setenv("LARDER_SPARK_MASTER", master)
    with pytest.raises(SettingsError, match=message.replace("[", "\\[")):
        open_engine(dg.build_asset_context()).__enter__()


@contextmanager
def cluster(folder: Path, workers: int) -> Iterator[str]:
    """A standalone Spark cluster: a master and `workers` worker processes of one core and 1 GB each; yields its URL."""
    environment = os.environ | {
        "JAVA_HOME": java_home(folder / "java"),
        "SPARK_LOCAL_IP": "127.0.0.1",
        "SPARK_LOCAL_DIRS": str(folder / "local"),
    }
    spark_class = Path(pyspark.__file__).parent / "bin" / "spark-class"
    log = folder / "cluster.log"

    def start(*arguments: str) -> subprocess.Popen[bytes]:
        with log.open("ab") as out:
            command = [str(spark_class), *arguments]
            return subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)

    def wait_for(pattern: str, times: int) -> re.Match[str]:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            found = list(re.finditer(pattern, log.read_text()))
            if len(found) >= times:
                return found[-1]
            time.sleep(0.5)
        raise AssertionError(f"{pattern} was not said {times} times within 120 s:\n{log.read_text()[-2000:]}")

    with ExitStack() as running:

        def keep(process: subprocess.Popen[bytes]) -> None:
            running.callback(process.wait)
            running.callback(os.killpg, process.pid, signal.SIGTERM)

        keep(start("org.apache.spark.deploy.master.Master", "--host", "127.0.0.1", "--port", "0", "--webui-port", "0"))
        url = wait_for(r"Starting Spark master at (spark://\S+)", 1)[1]
        for number in range(workers):
            offer = [
                "--cores",
                "1",
                "--memory",
                "1g",
                "--work-dir",
                str(folder / f"worker-{number}"),
                "--webui-port",
                "0",
            ]
            keep(start("org.apache.spark.deploy.worker.Worker", *offer, url))
        wait_for("Registering worker", workers)
        yield url


@pytest.mark.prove
@pytest.mark.timeout(1800)
def test_two_workers_give_the_values_of_duckdb_on_a_million_events(
    tmp_path: Path, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = ingested(tmp_path / "home", monkeypatch, 28, people=MILLION_PEOPLE, events_per_person=100, items=2_000)
    with psycopg.connect(world.url) as connection:
        (events,) = connection.execute("SELECT sum(rows) FROM lake_files").fetchone() or (0,)
    assert events >= 1_000_000
    with cluster(tmp_path, 2) as url:
        compare(world, instance, url)
    for number in range(2):
        ran = list((tmp_path / f"worker-{number}").glob("app-*/*"))
        assert len(ran) == len(VIEWS), f"worker {number} had an executor in {len(ran)} of {len(VIEWS)} jobs"
