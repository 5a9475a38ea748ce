"""What the feature bench measures on: its own views, a world of events in a lake, a database for each section.

Nothing here may import what reads `schemas.views` before `install` has put the bench's views there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pyarrow as pa
import pyarrow.parquet as pq

from schemas import features as declare
from schemas import views as declared
from schemas.features import ITEM, USER, Entity, FeatureView
from tests.benchmarks.frame import elsewhere

LIKED = "value >= 4"
TODAY = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
BATCH_ROWS = 500_000


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured. `repeats` is of the cheap questions, `rounds` of whole backfills."""

    users: int = 20_000
    items: int = 5_000
    days: int = 90
    events: int = 5_000_000
    history: int = 500_000
    labels: int = 20_000
    many_labels: int = 1_000_000
    prepared: int = 10_000_000
    candidates: int = 500
    hot_events: int = 10_000
    warm_events: int = 100
    repeats: int = 200
    rounds: int = 3
    feast_rows: int = 20_000
    """Entities that Feast materialises of each view; more would only take longer, at the same rate."""


QUICK = Sizes(
    users=300,
    items=120,
    days=12,
    events=12_000,
    history=6_000,
    labels=300,
    many_labels=2_000,
    prepared=20_000,
    candidates=50,
    hot_events=200,
    warm_events=5,
    repeats=10,
    rounds=1,
    feast_rows=300,
)


def ten(name: str, entity: Entity, windows: tuple[int, int, int, int]) -> FeatureView:
    """A view of ten features over four windows."""
    short, middle, long, longest = windows
    features = (
        *(declare.count(f"events_{days}d", days) for days in windows),
        declare.active_days("active_days", middle),
        declare.mean_value("value_mean", long),
        declare.rate("liked_rate", longest, where=LIKED, state="liked"),
        declare.sum_value("value_sum", short),
        declare.last_seen("last_seen_age_seconds", longest),
        declare.decayed_count("decayed", longest, half_life_days=7),
    )
    return FeatureView(name, entity, "team:bench", "Ten features over four windows.", 3, features)


BENCH_VIEWS = (
    ten("user_near", USER, (1, 7, 30, 90)),
    ten("user_far", USER, (2, 14, 45, 60)),
    ten("item_near", ITEM, (1, 7, 30, 90)),
    ten("item_middle", ITEM, (3, 10, 21, 75)),
    ten("item_far", ITEM, (2, 14, 45, 60)),
)
"""5 views × 10 features: what a request with 50 features reads."""


def install(views: tuple[FeatureView, ...]) -> None:
    """Make `views` the views of this process, in place of the deployment's; call it first."""
    declared.VIEWS = views
    declared.CONTEXT_VIEWS = tuple(view for view in views if view.entity == USER)
    declared.CANDIDATE_VIEWS = tuple(view for view in views if view.entity == ITEM)[:1]
    declared.CROSS_VIEWS = ()


@dataclass(frozen=True, slots=True)
class Events:
    """A world's events as columns `(n,)`, ordered by time: numbers of people and items, values (NaN: none), seconds."""

    user: np.ndarray
    item: np.ndarray
    value: np.ndarray
    seconds: np.ndarray

    def __len__(self) -> int:
        return len(self.user)


def events(sizes: Sizes, count: int, seed: int = 0) -> Events:
    """`count` events of the last `days` whole days; people and items by a power law."""
    rng = np.random.default_rng(seed)
    first = int((TODAY - timedelta(days=sizes.days)).timestamp())

    def drawn(of: int) -> np.ndarray:
        return np.minimum((of * rng.power(0.6, count)).astype(np.int64), of - 1)

    seconds = np.sort(rng.integers(first, first + sizes.days * 86_400, count))
    value = np.where(rng.random(count) < 0.5, rng.integers(1, 6, count), np.nan)
    return Events(drawn(sizes.users), drawn(sizes.items), value, seconds)


def names(prefix: str, numbers: np.ndarray) -> pa.Array:
    """`prefix-00042` for each of `numbers`."""
    unique, place = np.unique(numbers, return_inverse=True)
    text = pa.array([f"{prefix}-{number:05d}" for number in unique.tolist()], pa.string())
    return text.take(pa.array(place))


def label_table(sizes: Sizes, rows: int) -> pa.Table:
    """Labels of people and items at instants of the last `days` whole days."""
    rng = np.random.default_rng(7)
    start = int((TODAY - timedelta(days=sizes.days)).timestamp())
    at = rng.integers(start, start + sizes.days * 86_400, rows) * 1_000_000
    return pa.table(
        {
            "user_id": names("user", rng.integers(0, sizes.users, rows)),
            "item_id": names("item", rng.integers(0, sizes.items, rows)),
            "at": pa.array(at, pa.timestamp("us", tz="UTC")),
        }
    )


def stage(made: Events, path: Path) -> Path:
    """The events as a staged Parquet file that `Lake.append` takes."""
    from orchestration.compute.lake import EVENT_SCHEMA

    with pq.ParquetWriter(path, EVENT_SCHEMA, compression="zstd") as out:
        for begin in range(0, len(made), BATCH_ROWS):
            part = slice(begin, begin + BATCH_ROWS)
            at = pa.array(made.seconds[part] * 1_000_000, pa.timestamp("us", tz="UTC"))
            numbers = np.arange(begin, begin + len(made.user[part]))
            columns = [
                names("e", numbers),
                names("user", made.user[part]),
                names("item", made.item[part]),
                pa.array(["rating" if rated else "view" for rated in np.isfinite(made.value[part]).tolist()]),
                pa.array(made.value[part], from_pandas=True),
                at,
                at,
                pa.nulls(len(at), pa.string()),
            ]
            out.write_table(pa.table(columns, schema=EVENT_SCHEMA))
    return path


@dataclass(frozen=True)
class Place:
    """A section's own database, lake and folder."""

    url: str
    folder: Path
    lake: Any

    def connect(self) -> psycopg.Connection[Any]:
        return psycopg.connect(self.url, options="-c TimeZone=UTC")


@contextmanager
def place(server: str, folder: Path, name: str) -> Iterator[Place]:
    """A migrated database `larder_bench_<name>` on `server`, dropped afterwards, and a lake below `folder`."""
    from infra import postgres
    from infra.feature_tables import ensure_view_tables
    from orchestration.compute.lake import Lake

    head, _, options = server.partition("?")
    database = f"larder_bench_{name}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE IF EXISTS {database} WITH (FORCE)")
        connection.execute(f"CREATE DATABASE {database}")
    url = f"{head.rsplit('/', 1)[0]}/{database}?{options}"
    try:
        postgres.migrate(url)
        ensure_view_tables(url)
        (folder / name).mkdir(parents=True, exist_ok=True)
        yield Place(url, folder / name, Lake((folder / name / "lake").as_uri()))
    finally:
        with psycopg.connect(server, autocommit=True) as connection:
            connection.execute(f"DROP DATABASE {database} WITH (FORCE)")


def fill(where: Place, sizes: Sizes, count: int) -> None:
    """Put `events(sizes, count)` into the lake, and nothing else anywhere; what that takes is not this process's memory."""
    with elsewhere() as pool:
        pool.submit(_fill, where.url, where.folder, where.lake.url, sizes, count).result()


def _fill(url: str, folder: Path, lake_url: str, sizes: Sizes, count: int) -> None:
    from orchestration.compute.duck import duck
    from orchestration.compute.lake import Lake

    file = stage(events(sizes, count), folder / "staged.parquet")
    with Place(url, folder, Lake(lake_url)).connect() as connection, duck() as db:
        stored = Lake(lake_url).append(connection, [file], db).stored
    assert stored == count, f"{stored} of {count} events are in the lake"
    file.unlink()


def yesterday() -> date:
    return (TODAY - timedelta(days=1)).date()


def peak_rss_mb() -> float:
    """The most memory this process has ever held, in MB. Unlike getrusage's, it says nothing of the parent."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("/proc/self/status names no VmHWM; the bench needs Linux")


def fingerprint(connection: psycopg.Connection[Any], table: str) -> str:
    """A hash of a table's rows, whatever their order."""
    row = connection.execute(f"SELECT count(*), sum(hashtextextended(t::text, 0)) FROM {table} AS t").fetchone()
    return hashlib.sha256(repr(row).encode()).hexdigest()
