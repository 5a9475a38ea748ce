"""What is measured of ours, a function each. Every one checks its answers before it times them, in a process of its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import adbc_driver_postgresql.dbapi
import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from inference.features import FeatureBlock, read_features
from inference.store import Store
from orchestration.compute.duck import duck
from orchestration.compute.engines import DuckDB, SnapshotJob
from orchestration.compute.label_features import write_label_features
from orchestration.compute.materialise import materialise
from orchestration.compute.measures import failed
from orchestration.compute.point_in_time import PointInTime
from orchestration.compute.settle import Built, Settled, chunks, settle
from schemas.features import USER, FeatureView
from schemas.views import VIEWS
from tests.benchmarks.features_world import (
    TODAY,
    Events,
    Place,
    Sizes,
    events,
    fill,
    fingerprint,
    label_table,
    names,
    peak_rss_mb,
    yesterday,
)
from tests.benchmarks.frame import elsewhere, timed

Say = Callable[[str], None]
Numbers = dict[str, float]
_TIMEOUT_MS = 60_000


def posted(first: int, users: np.ndarray, items: np.ndarray, at: np.ndarray) -> list[dict[str, object]]:
    """Events as `POST /events` hands them to the store."""
    return [
        {
            "event_id": f"p{first + number}",
            "user_id": f"user-{user:05d}",
            "item_id": f"item-{item:05d}",
            "kind": "rating",
            "value": 5.0,
            "occurred_at": datetime.fromtimestamp(second, UTC).isoformat(),
            "request_id": None,
        }
        for number, (user, item, second) in enumerate(zip(users.tolist(), items.tolist(), at.tolist(), strict=True))
    ]


class Online:
    """A deployment with yesterday's partitions and whatever was posted today."""

    def __init__(self, where: Place, sizes: Sizes) -> None:
        self.sizes, self.where = sizes, where
        self.made = [events(sizes, sizes.history)]
        fill(where, sizes, sizes.history)
        for view in VIEWS:
            materialise(view, yesterday(), yesterday(), url=where.url, lake=where.lake)
        with where.connect() as connection:
            connection.autocommit = True
            connection.execute("VACUUM ANALYZE")
        self.store = Store(where.url)
        self.count = 0
        # The power law makes the first ones the hottest; the hottest of all leads the candidates.
        self.items = np.arange(sizes.candidates)
        self.users = np.arange(20)

    def post(self, items: np.ndarray, seed: int) -> list[dict[str, object]]:
        """Events of now-ish for `items (n,)`, by random people; they are counted as posted."""
        rng = np.random.default_rng(seed)
        now = int(datetime.now(UTC).timestamp())
        today = int(TODAY.timestamp())
        users = rng.integers(0, self.sizes.users, len(items))
        at = rng.integers(today, max(now, today + 1), len(items))
        made = posted(self.count, users, items, at)
        self.count += len(items)
        self.made.append(Events(users, items, np.full(len(items), 5.0), at))
        return made

    def read(self, user: int, items: np.ndarray) -> dict[str, FeatureBlock]:
        """One request: every view for one person and these items."""
        person, listed = [(f"user-{user:05d}",)], [(f"item-{item:05d}",) for item in items.tolist()]
        keys = {view: person if view.entity == USER else listed for view in VIEWS if len(items) or view.entity == USER}
        return read_features(self.store, keys, timeout_ms=_TIMEOUT_MS)

    def check(self) -> None:
        """Counts, sums and means of a request, against the events themselves."""
        user = int(self.users[0])
        found = self.read(user, self.items)
        for view in VIEWS:
            asked = [user] if view.entity == USER else self.items.tolist()
            block = found[view.name]
            mine = [
                np.concatenate([m.user if view.entity == USER else m.item for m in self.made]),
                np.concatenate([m.seconds for m in self.made]),
                np.concatenate([m.value for m in self.made]),
            ]
            for place, feature in enumerate(view.features):
                if not feature.name.startswith(("events_", "value_sum", "value_mean")):
                    continue
                since = (TODAY - timedelta(days=feature.window_days)).timestamp()
                inside = mine[1] >= since
                counted = np.bincount(mine[0][inside], minlength=max(self.sizes.users, self.sizes.items))
                rated = inside & np.isfinite(mine[2])
                summed = np.bincount(mine[0][rated], mine[2][rated], minlength=len(counted))
                many = np.bincount(mine[0][rated], minlength=len(counted))
                for row, number in enumerate(asked):
                    if feature.name.startswith("events_"):
                        wanted = float(counted[number])
                    elif not many[number]:
                        continue
                    else:
                        wanted = float(summed[number] / (many[number] if feature.name == "value_mean" else 1))
                    got = float(block.values[row, place])
                    assert np.isclose(got, wanted, rtol=1e-5), (
                        f"{view.name}.{feature.name} of {number}: {got}, {wanted}"
                    )

    def round_trips(self) -> int:
        """How often a request waits for the server, seen on the wire: once for each Sync that is sent."""
        path = self.where.folder / "trace"
        with path.open("w") as file:
            with self.store.connection() as connection:
                connection.pgconn.trace(file.fileno())
            self.read(int(self.users[0]), self.items)  # on the connection that was just given back
            connection.pgconn.untrace()
        sent = [line.split("\t") for line in path.read_text().splitlines()]
        return sum(part.strip() in ("Sync", "Query") for line in sent if "F" in line[:2] for part in line)


def online(where: Place, sizes: Sizes, say: Say) -> Numbers:
    """Reads of 1 person + n items, of one person, with a hot head; ingest of 100 events."""
    world = Online(where, sizes)
    for number in range(5):  # a usual day's head
        world.store.accept_events(
            world.post(np.random.default_rng(number).choice(world.items, 100), number), _TIMEOUT_MS
        )
    world.check()
    say("answers hold; timing reads")
    users = np.resize(world.users, sizes.repeats).tolist()
    each = iter(users * 10)
    timed(lambda: world.read(next(each), world.items), min(20, sizes.repeats))
    many = np.array(timed(lambda: world.read(next(each), world.items), sizes.repeats)) * 1e3
    one = np.array(timed(lambda: world.read(next(each), world.items[:0]), sizes.repeats)) * 1e3
    trips = world.round_trips()
    say("timing ingest")
    batches = [
        world.post(np.random.default_rng(n).choice(world.items, 100), 100 + n) for n in range(min(100, sizes.repeats))
    ]
    sent = iter(batches)
    ingest = np.array(timed(lambda: world.store.accept_events(next(sent), _TIMEOUT_MS), len(batches))) * 1e3
    world.check()
    say("heating the heads")
    hot = np.concatenate([np.full(sizes.hot_events, world.items[0]), np.repeat(world.items, sizes.warm_events)])
    for begin in range(0, len(hot), 1_000):
        world.store.accept_events(world.post(hot[begin : begin + 1_000], 1_000 + begin), _TIMEOUT_MS)
    world.check()
    heated = np.array(timed(lambda: world.read(next(each), world.items), sizes.repeats)) * 1e3
    return {
        "read_501x50_p50_ms": float(np.median(many)),
        "read_501x50_p99_ms": float(np.quantile(many, 0.99)),
        "read_1_p50_ms": float(np.median(one)),
        "round_trips": trips,
        "ingest_100_p50_ms": float(np.median(ingest)),
        "hot_head_read_p50_ms": float(np.median(heated)),
        "hot_head_read_p99_ms": float(np.quantile(heated, 0.99)),
    }


def prepared_rows(view: FeatureView, file: Path, rows: int) -> date:
    """A Parquet file with `rows` snapshot rows of `view`, in ten partitions that end yesterday."""
    entities = max(rows // 10, 1)
    first = yesterday() - timedelta(days=9)
    keys = names("user", np.arange(entities))
    rng = np.random.default_rng(0)
    writer: pq.ParquetWriter | None = None
    for offset in range(10):
        columns: dict[str, Any] = {
            "partition_date": pa.array([first + timedelta(days=offset)] * entities, pa.date32()),
            "user_id": keys,
        }
        for name, state, _ in view.columns:
            if state.name.endswith("_at"):
                seconds = rng.integers(1_700_000_000, 1_790_000_000, entities) * 1_000_000
                columns[name] = pa.array(seconds, pa.timestamp("us", tz="UTC"))
            else:
                numbers = rng.integers(0, 100, entities)
                columns[name] = pa.array(numbers if state.is_count else numbers / 4)
        made = pa.table(columns)
        writer = writer or pq.ParquetWriter(file, made.schema)
        writer.write_table(made, row_group_size=100_000)
    assert writer is not None
    writer.close()
    return first


@dataclass(frozen=True, slots=True)
class Prepared:
    """An engine that has nothing to compute: the rows are in a Parquet file."""

    file: Path
    name: str = "prepared"

    @contextmanager
    def snapshot(self, job: SnapshotJob) -> Iterator[duckdb.DuckDBPyConnection]:
        with duck() as db:
            db.execute(f"CREATE TEMP VIEW snapshot AS SELECT * FROM read_parquet('{self.file}')")
            yield db


def load(where: Place, sizes: Sizes, say: Say) -> Numbers:
    """Rows that are computed already, through `materialise`: ledger, checks and online rows included."""
    file = where.folder / "prepared.parquet"
    with elsewhere() as pool:  # what making them takes is none of the load's memory
        first = pool.submit(prepared_rows, VIEWS[0], file, sizes.prepared).result()
    say(f"{sizes.prepared:,} rows prepared; loading them")
    before = peak_rss_mb()
    prepared = Prepared(file)
    (seconds,) = timed(
        lambda: materialise(VIEWS[0], first, yesterday(), url=where.url, lake=where.lake, engine=prepared), 1
    )
    peak = peak_rss_mb()
    rows = sizes.prepared // 10 * 10
    with where.connect() as connection:
        stored = connection.execute(f"SELECT count(*), sum(n_1d) FROM features.{VIEWS[0].name}").fetchone()
        shown = connection.execute(f"SELECT count({VIEWS[0].name}) FROM online.user_rows").fetchone()
    wanted = int(np.sum(pq.read_table(file, columns=["n_1d"])["n_1d"].to_numpy()))
    assert stored is not None, "there is no answer"
    assert (stored[0], int(stored[1])) == (rows, wanted), f"{stored} is stored of {rows} rows, {wanted}"
    assert shown == (rows // 10,), shown
    return {
        "materialise_rows_per_s": rows / seconds,
        "materialise_peak_rss_mb": peak,
        "materialise_rss_before_mb": before,
    }


def _backfill(where: Place, first: date, last: date, days: int = 30) -> None:
    """What the daily assets do of these views for a range, without Dagster: chunks, checks, ledger."""
    with DuckDB() as engine:
        for view in VIEWS:

            def build(begin: date, end: date, view: Any = view) -> dict[date, Built]:
                made = materialise(view, begin, end, url=where.url, lake=where.lake, engine=engine)
                return {r.partition_date: Built({}, r.measures, failed(view.checks, r.measures)) for r in made}

            into = Settled()
            for begin, end in chunks(first, last, days):
                settle([begin + timedelta(days=n) for n in range((end - begin).days + 1)], build, into)
            assert not into.failed, into.failed


def _empty(where: Place) -> None:
    with where.connect() as connection:
        connection.execute(f"TRUNCATE feature_ledger, {', '.join(f'features.{view.name}' for view in VIEWS)}")
        connection.execute("TRUNCATE online.user_rows, online.item_rows")


def _copy(where: Place) -> float:
    """Seconds of a COPY of all result rows into empty, unindexed, logged tables: the fastest way there is."""
    tables = []
    for view in VIEWS:
        with adbc_driver_postgresql.dbapi.connect(where.url) as adbc, adbc.cursor() as cursor:
            cursor.execute(f"SELECT * FROM features.{view.name} ORDER BY 1, 2")
            tables.append((view.name, cursor.fetch_arrow_table()))
    found = []
    for _ in range(3):
        with where.connect() as connection:
            for name, _table in tables:
                connection.execute(f"DROP TABLE IF EXISTS copied_{name}")
                connection.execute(f"CREATE TABLE copied_{name} (LIKE features.{name})")

        def copy() -> None:
            with adbc_driver_postgresql.dbapi.connect(where.url) as adbc, adbc.cursor() as cursor:
                for name, table in tables:
                    cursor.adbc_ingest(f"copied_{name}", table, mode="append")
                adbc.commit()

        found += timed(copy, 1)
    with where.connect() as connection:
        for name, table in tables:
            assert connection.execute(f"SELECT count(*) FROM copied_{name}").fetchone() == (len(table),)
    return float(np.median(found))


def backfill(where: Place, sizes: Sizes, say: Say) -> Numbers:
    """90 days of `user_activity` and `item_activity` from the lake, against a COPY and against one statement."""
    fill(where, sizes, sizes.events)
    first, last = (TODAY - timedelta(days=sizes.days)).date(), yesterday()
    say("one statement for all days")
    single: list[float] = []
    in_chunks: list[float] = []
    tables = [*(f"(SELECT * FROM features.{view.name})" for view in VIEWS), "(SELECT * FROM online.item_rows)"]
    prints: set[tuple[str, ...]] = set()
    # Turn and turn about: what warms up or slows down does so for both.
    for repeat in range(sizes.rounds):
        for into, days in ((single, sizes.days), (in_chunks, 30)):
            _empty(where)
            into += timed(partial(_backfill, where, first, last, days), 1)
            with where.connect() as connection:
                prints.add(tuple(fingerprint(connection, table) for table in tables))
        say(
            f"repeat {repeat + 1} of {sizes.rounds}: {single[-1]:.1f} s in one statement, {in_chunks[-1]:.1f} s in chunks"
        )
    assert len(prints) == 1, "chunks and one statement do not give the same tables"
    copied = _copy(where)
    seconds = float(np.median(in_chunks))
    with where.connect() as connection:
        rows = [connection.execute(f"SELECT count(*) FROM features.{view.name}").fetchone() for view in VIEWS]
    say("the same range as a Dagster run")
    _empty(where)
    ran = _dagster(where, first, last)
    return {
        "backfill_seconds": seconds,
        "backfill_rows": sum(row[0] for row in rows if row),
        "copy_seconds": copied,
        "backfill_over_copy": seconds / copied,
        "backfill_over_single_statement": seconds / float(np.median(single)),
        "dagster_seconds_per_partition": max(ran - seconds, 0.0) / (sizes.days * len(VIEWS)),
        "backfill_peak_rss_mb": peak_rss_mb(),
    }


def _dagster(where: Place, first: date, last: date) -> float:
    """Seconds of the same range as a run of the real assets, with an instance on disk."""
    os.environ |= {"DATABASE_URL": where.url, "LAKE_URL": where.lake.url, "LARDER_HOME": str(where.folder / "home")}
    os.environ["DEPLOYMENT"] = "bench"
    from infra.deployment import Deployment

    Deployment("bench", "simulated", first).save()
    import dagster as dg

    from orchestration.definitions import build_definitions
    from orchestration.resources import Larder

    job = build_definitions(Larder(deployment="bench")).resolve_implicit_global_asset_job_def()
    tags = {
        "dagster/asset_partition_range_start": first.isoformat(),
        "dagster/asset_partition_range_end": last.isoformat(),
    }
    quiet = {"loggers": {"console": {"config": {"log_level": "ERROR"}}}}
    (where.folder / "dagster").mkdir()
    with dg.DagsterInstance.local_temp(str(where.folder / "dagster")) as instance:
        chosen = [dg.AssetKey(view.name) for view in VIEWS]
        (seconds,) = timed(
            lambda: job.execute_in_process(
                instance=instance, asset_selection=chosen, tags=tags, run_config=quiet, raise_on_error=True
            ),
            1,
        )
    return seconds


def growth(where: Place, sizes: Sizes, say: Say) -> Numbers:
    """The backfill of one size: the runner asks for two, in processes of their own."""
    fill(where, sizes, sizes.events)
    before = peak_rss_mb()
    first, last = (TODAY - timedelta(days=sizes.days)).date(), yesterday()
    say(f"{sizes.events:,} events")
    seconds = []
    for _ in range(2):
        _empty(where)
        seconds += timed(lambda: _backfill(where, first, last), 1)
    return {"seconds": min(seconds), "peak_rss_mb": peak_rss_mb(), "rss_before_mb": before}


def _check_labels(made: Events, table: pa.Table, values: np.ndarray) -> None:
    """Counts of some labels against the events themselves."""
    view = VIEWS[0]
    for row in range(0, len(table), max(len(table) // 200, 1)):
        user, at = int(table["user_id"][row].as_py()[5:]), int(table["at"][row].as_py().timestamp())
        mine = made.seconds[(made.user == user) & (made.seconds < at)]
        for place, feature in enumerate(view.features[:4]):
            wanted = float((mine >= at // 86_400 * 86_400 - feature.window_days * 86_400).sum())
            got = values[row, place]
            assert got == wanted or (np.isnan(got) and wanted == 0), f"{feature.name} of label {row}: {got}, {wanted}"


def pit(where: Place, sizes: Sizes, say: Say) -> Numbers:
    """20 thousand labels against 500 thousand events, ten features: from the lake's files to the values."""
    made = events(sizes, sizes.history)
    fill(where, sizes, sizes.history)
    table = label_table(sizes, sizes.labels).combine_chunks()
    keys, at = {"user_id": table["user_id"].combine_chunks()}, table["at"].combine_chunks()

    def ask() -> np.ndarray:
        with where.connect() as connection, PointInTime(where.lake, connection) as opened:
            return opened.values(VIEWS[0], keys, at)

    _check_labels(made, table, ask())
    say("answers hold; timing them")
    cold = timed(ask, 5)
    with where.connect() as connection, PointInTime(where.lake, connection) as opened:
        opened.values(VIEWS[0], keys, at)
        warm = timed(lambda: opened.values(VIEWS[0], keys, at), 5)
    return {"pit_20k_ms": float(np.median(cold)) * 1e3, "pit_20k_again_ms": float(np.median(warm)) * 1e3}


def pit_many(where: Place, sizes: Sizes, say: Say) -> Numbers:
    """A million labels with five views, file to file, and what memory that takes."""
    made = events(sizes, sizes.history)
    fill(where, sizes, sizes.history)
    labels, out = where.folder / "labels.parquet", where.folder / "set.parquet"
    table = label_table(sizes, sizes.many_labels)
    pq.write_table(table, labels)
    before = peak_rss_mb()
    with where.connect() as connection:
        (seconds,) = timed(
            lambda: write_label_features(labels, out, lake=where.lake, connection=connection, progress=say), 1
        )
    peak = peak_rss_mb()
    view = VIEWS[0]
    found = pq.read_table(out, columns=["user_id", "at", *(f"{view.name}.{f.name}" for f in view.features[:4])])
    assert found.select(["user_id", "at"]).equals(table.select(["user_id", "at"]))
    _check_labels(made, table, np.stack([found.column(n).to_numpy() for n in range(2, 6)], 1))
    return {"pit_1m_seconds": seconds, "pit_1m_peak_rss_mb": peak, "pit_1m_rss_before_mb": before}
