"""Fixtures every test may use: a real Postgres with a fresh migrated database per test, a lake, a small world."""

from __future__ import annotations

import gc
import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
import pytest

from infra import postgres
from infra.deployment import Deployment
from infra.feature_tables import ensure_view_tables
from orchestration.compute.ingest import ingest
from orchestration.compute.lake import Lake
from orchestration.sources.open import open_source

SHARED = Path(__file__).parents[1].parent / "shared" / "data"
TODAY = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
_numbers = itertools.count()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests on MovieLens are skipped, visibly, where the files are not there."""
    if (SHARED / "ml-100k" / "u.data").exists():
        return
    for item in items:
        if item.get_closest_marker("shared"):
            item.add_marker(pytest.mark.skip(reason="needs ../shared/data/ml-100k"))


def pytest_collection_finish() -> None:
    """What a suite imports, Dagster and all, is looked through by the collector once, not every now and then: that takes
    half a second on a busy machine, a function's own heap 15 ms, and a test with a deadline would be the one to wait."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # bindings complain at the exit of what nobody freed


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What fails because midnight (UTC) passed is said to be so: tests take the day that they were started on for today."""
    if terminalreporter.stats.get("failed") and datetime.now(UTC) >= TODAY + timedelta(days=1):
        terminalreporter.write_line("midnight UTC passed while these tests ran; run what failed again", yellow=True)


def replace_database(url: str, name: str) -> str:
    """`url` with another database of the same server."""
    head, _, options = url.partition("?")
    return f"{head.rsplit('/', 1)[0]}/{name}?{options}"


@pytest.fixture(scope="session")
def postgres_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The URL of a server for this session: DATABASE_URL's if set, else an embedded one that ends with the tests."""
    given = os.environ.get("LARDER_TEST_DATABASE_URL")
    return given or postgres.start_embedded(tmp_path_factory.mktemp("pg") / "data")


@pytest.fixture(scope="session")
def template(postgres_url: str) -> str:
    """A migrated database that every test's own is copied from."""
    name = f"larder_template_{os.getpid()}"
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    url = replace_database(postgres_url, name)
    postgres.migrate(url)
    ensure_view_tables(url)
    return name


@pytest.fixture
def database(postgres_url: str, template: str) -> Iterator[str]:
    """The URL of a migrated, empty database of this test's own."""
    name = f"larder_test_{os.getpid()}_{next(_numbers)}"
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
    yield replace_database(postgres_url, name)
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def connection(database: str) -> Iterator[psycopg.Connection]:
    """A connection in UTC to the test's database."""
    with psycopg.connect(database, options="-c TimeZone=UTC") as opened:
        yield opened


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    """An empty lake in the test's folder."""
    return Lake((tmp_path / "lake").as_uri())


@pytest.fixture
def s3_bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of an empty bucket of this test's own, behind moto's HTTP server, with the environment to reach it."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name, value in (
            ("AWS_ENDPOINT_URL", f"http://{host}:{port}"),
            ("AWS_ACCESS_KEY_ID", "test"),
            ("AWS_SECRET_ACCESS_KEY", "test"),
            ("AWS_DEFAULT_REGION", "us-east-1"),
        ):
            monkeypatch.setenv(name, value)
        # The servers of one process share their buckets.
        bucket = f"bucket-{os.getpid()}-{next(_numbers)}"
        boto3.client("s3").create_bucket(Bucket=bucket)
        yield f"s3://{bucket}"
    finally:
        server.stop()


@pytest.fixture
def larder_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Deployments of this test live in its own folder; nothing of the machine's environment leaks in."""
    for name in ("DATABASE_URL", "LAKE_URL", "ARTIFACTS_URL", "DEPLOYMENT", "DAGSTER_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LARDER_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def days_ago(days: float) -> datetime:
    """Midnight today (UTC) less `days`."""
    return TODAY - timedelta(days=days)


@dataclass(frozen=True)
class Ingested:
    """A deployment with events in its lake and nothing built from them."""

    record: Deployment
    url: str
    lake: Lake
    first: date
    last: date

    def file(self, day: date) -> Path:
        """The lake's current file of `day`."""
        with psycopg.connect(self.url) as connection:
            row = connection.execute("SELECT path FROM lake_files WHERE day = %s", (day,)).fetchone()
        assert row is not None
        return Path(urlsplit(self.record.lake_url).path) / row[0]

    @contextmanager
    def truncated(self, day: date) -> Iterator[None]:
        """That day's file cut off in the middle, as a full disk leaves it; whole again afterwards."""
        file = self.file(day)
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        yield
        file.write_bytes(whole)


def ingested(
    home: Path, patch: pytest.MonkeyPatch, days: int, *, events_per_person: int = 20, people: int = 60, items: int = 100
) -> Ingested:
    """A small simulated deployment `small` below `home` over the last `days` whole days; it is the current one."""
    for name in ("DATABASE_URL", "LAKE_URL", "ARTIFACTS_URL", "DAGSTER_HOME"):
        patch.delenv(name, raising=False)
    patch.setenv("LARDER_HOME", str(home))
    patch.setenv("DEPLOYMENT", "small")
    first = (TODAY - timedelta(days=days)).date()
    world = f"simulated?people={people}&items={items}&days={days}&events_per_person={events_per_person}"
    record = Deployment("small", world, first)
    record.save()
    url = postgres.prepare(record)
    ensure_view_tables(url)
    made = Ingested(record, url, Lake(record.lake_url), first, (TODAY - timedelta(days=1)).date())
    with psycopg.connect(url, options="-c TimeZone=UTC") as connection:
        ingest(open_source(world, start=first, until=TODAY), made.lake, connection)
    return made
