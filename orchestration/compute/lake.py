"""The lake: events as Parquet, one file per day under LAKE_URL, read by DuckDB.

`lake_files` in Postgres names each day's current file. A day is rewritten by writing a new file of the next
generation and swapping that row, so a reader sees the old day or the new one, and a crash leaves only a file
that nobody names. The file before the current one is kept for readers that began earlier; older ones are removed.
A day never has more than one current file, so there is nothing to compact; `remove_orphans` deletes what crashes left.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from itertools import groupby
from pathlib import Path

import duckdb
import psycopg
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from orchestration.compute.event_keys import take_keys
from orchestration.compute.file_roots import list_infos, open_root
from orchestration.compute.stale import mark_stale
from orchestration.compute.tombstones import leave_out_forgotten, read_tombstones
from schemas.errors import LakeError, LarderError, SettingsError
from schemas.personal_data import DAMAGED_SOURCE

EVENT_SCHEMA = pa.schema(
    [
        pa.field("event_id", pa.string(), nullable=False),
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("item_id", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("value", pa.float64()),
        pa.field("occurred_at", pa.timestamp("us", tz="UTC"), nullable=False),
        pa.field("known_at", pa.timestamp("us", tz="UTC"), nullable=False),
        # The recommendation that led to the event, if one did; files from before it was kept read as NULL.
        pa.field("request_id", pa.string()),
    ]
)
_COLUMNS = ", ".join(EVENT_SCHEMA.names)
_REPEATED = ["user_id", "item_id", "kind", "value"]
"""What a dictionary makes smaller. With it LZ4 needs a twentieth more room than zstd with one for everything, and is read in
three quarters of the time."""
_WRITE_LOCK = 7_205_392
_UNREADABLE = (duckdb.Error, pa.ArrowException, OSError)
"""What a damaged file makes its readers raise: for one that is spoiled within, DuckDB has no type of its own."""
DAMAGED = DAMAGED_SOURCE
"""The source of quarantined rows that stand for a damaged file of the lake."""
_FILE_NAME = re.compile(r"/day=(?P<day>\d{4}-\d{2}-\d{2})/(?P<generation>\d{6})(-[0-9a-f]{8})?\.parquet$")


@dataclass(frozen=True, slots=True)
class Appended:
    """What an append did: rows stored, rows whose event id was there already, and the days rewritten."""

    stored: int
    duplicates: int
    days: tuple[date, ...]
    forgotten: int = 0
    """Events left out because their people were forgotten since."""
    stale: Mapping[str, int] = field(default_factory=dict)
    """Partitions that had been built without these events and are marked for it, by view."""


@dataclass(frozen=True, slots=True)
class Erased:
    """What an erasure took out: events by day. Their ids are in DuckDB's table `erased_events`."""

    events: dict[date, int]


@dataclass(frozen=True, slots=True)
class Orphan:
    """A file of the lake that nobody reads any more."""

    path: str
    size_bytes: int
    written_at: datetime


@dataclass(frozen=True, slots=True)
class LakeFile:
    """A file of one day that can be read, relative to the lake."""

    path: str
    rows: int


@dataclass(frozen=True, slots=True)
class Damage:
    """A day whose file is missing or cannot be read; `rows` it had, `previous` is the file before if that can be read."""

    day: date
    path: str
    rows: int
    reason: str
    previous: LakeFile | None


class Lake:
    """The events below one URL (`file://…` or `s3://bucket/prefix`)."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        try:
            if not url.startswith(("file://", "s3://")):
                raise ValueError("a lake lies under file:// or s3://")
            self.root, self._fs = open_root(url)
        except (ValueError, OSError) as error:
            raise SettingsError(f"LAKE_URL {url!r} cannot be used: {error}") from error

    def days(self, connection: psycopg.Connection) -> list[tuple[date, int]]:
        """`(day, rows)` of every day that has a file, in order."""
        return connection.execute("SELECT day, rows FROM lake_files ORDER BY day").fetchall()

    def events(self, connection: psycopg.Connection, first: date | None = None, last: date | None = None) -> ds.Dataset:
        """The events from day `first` to day `last`, both included, as an Arrow dataset that DuckDB can scan."""
        return self.dataset(self.paths(connection, first, last).values())

    def paths(
        self, connection: psycopg.Connection, first: date | None = None, last: date | None = None
    ) -> dict[date, str]:
        """The current file of each day from `first` to `last`, both included, in order, relative to the lake.

        A file never changes: a day that is rewritten gets one of another name.
        """
        rows = connection.execute(
            "SELECT day, path FROM lake_files WHERE day >= coalesce(%s::date, '-infinity') AND day <= coalesce(%s::date, 'infinity') "
            "ORDER BY day",
            (first, last),
        ).fetchall()
        return dict(rows)

    def dataset(self, paths: Collection[str]) -> ds.Dataset:
        """The events in the files at `paths`, as `paths` returns them."""
        if not paths:
            return ds.dataset(EVENT_SCHEMA.empty_table())
        # Made of single files, none of them is asked for before it is read: on S3 each question is a request.
        parquet = ds.ParquetFileFormat()
        files = [parquet.make_fragment(f"{self.root}/{path}", filesystem=self._fs) for path in paths]
        # The schema is ours, not the files': a column added later reads as NULL in older days.
        return ds.FileSystemDataset(files, EVENT_SCHEMA, parquet, self._fs)

    def register(self, db: duckdb.DuckDBPyConnection, name: str, paths: Collection[str]) -> None:
        """Make the events in the files at `paths` the relation `name` of `db`."""
        if not paths or not isinstance(self._fs, pafs.LocalFileSystem):
            db.execute(f"DROP VIEW IF EXISTS {name}")
            db.register(name, self.dataset(paths))
            return
        # DuckDB reads its own files in half the memory that it takes to be handed them as Arrow.
        db.from_parquet([f"{self.root}/{path}" for path in paths], union_by_name=True).create_view(
            f"{name}_files", replace=True
        )
        # As in `dataset`, the columns are ours.
        db.register(f"no_{name}", EVENT_SCHEMA.empty_table())
        db.execute(
            f"CREATE OR REPLACE TEMP VIEW {name} AS SELECT {_COLUMNS} FROM "
            f"(SELECT * FROM no_{name} UNION ALL BY NAME SELECT * FROM {name}_files)"
        )

    def damages(self, connection: psycopg.Connection) -> list[Damage]:
        """The days whose file is missing or cannot be read, in order. Reads every file to its end."""
        found = []
        rows = connection.execute("SELECT day, path, rows, previous FROM lake_files ORDER BY day").fetchall()
        for day, path, count, previous in rows:
            held, reason = self._read(path, thorough=True)
            if held == count:
                continue
            before = None if previous is None else self._read(previous, thorough=True)[0]
            file = None if before is None else LakeFile(previous, before)
            found.append(Damage(day, path, count, reason or f"it has {held} events, {count} were written", file))
        return found

    @contextmanager
    def named(self, paths: Collection[str]) -> Iterator[None]:
        """Work that reads the files at `paths`: raises LakeError, with day, file and way out, where one is damaged."""
        try:
            yield
        except duckdb.OutOfMemoryException:
            raise
        except _UNREADABLE as error:
            # Footers first: they are quickly read, and mostly show it.
            for path, thorough in [(path, thorough) for thorough in (False, True) for path in paths]:
                _, reason = self._read(path, thorough=thorough)
                if reason is not None:
                    name = _FILE_NAME.search(f"/{path}")
                    raise LakeError(
                        f"the lake's file of {name['day'] if name else 'a day'} cannot be used, {self.url}/{path}: "
                        f"{reason}; `make mend-lake` puts such days aside, and `make run` then loads them again"
                    ) from error
            raise

    def _read(self, path: str, *, thorough: bool = False) -> tuple[int | None, str | None]:
        """`(rows, None)` of the file at `path`, or `(None, why it cannot be read)`. Thorough: to its end."""
        full = f"{self.root}/{path}"
        try:
            if not self._fs.get_file_info(full).is_file:
                return None, "it is missing"
            with self._fs.open_input_file(full) as stream, pq.ParquetFile(stream) as file:
                if thorough:
                    return sum(batch.num_rows for batch in file.iter_batches(65_536)), None
                return file.metadata.num_rows, None
        except (pa.ArrowException, OSError) as error:
            return None, f"it is damaged ({' '.join(str(error).split())[:200]})"

    def hold_writes(self, connection: psycopg.Connection) -> None:
        """Nobody else writes to the lake until the transaction ends; waits for who does."""
        connection.execute("SELECT pg_advisory_xact_lock(%s)", (_WRITE_LOCK,))

    def try_hold_writes(self, connection: psycopg.Connection) -> bool:
        """`hold_writes` where nobody else writes to the lake, False where somebody does."""
        return connection.execute("SELECT pg_try_advisory_xact_lock(%s)", (_WRITE_LOCK,)).fetchone() == (True,)

    def begin_append(self, connection: psycopg.Connection) -> None:
        """`hold_writes`, and see to it that `event_keys` has the ids of days that were written before it had all."""
        self.hold_writes(connection)
        rows = connection.execute("SELECT path FROM lake_files WHERE NOT keyed ORDER BY day").fetchall()
        if rows:
            paths = [path for (path,) in rows]
            with self.named(paths):
                batches = self.dataset(paths).to_batches(columns=["event_id", "occurred_at"], batch_size=65_536)
                take_keys(connection, batches)
            connection.execute("UPDATE lake_files SET keyed = true WHERE NOT keyed")

    def append(
        self,
        connection: psycopg.Connection,
        staged: Sequence[Path],
        duck: duckdb.DuckDBPyConnection,
        *,
        posted: bool = False,
    ) -> Appended:
        """Add the events in the `staged` Parquet files, each event id once, inside the caller's transaction.

        `posted` says that `event_keys` has had their ids since they arrived: only the days that they belong to are
        read then, otherwise all. Memory is bounded: DuckDB sorts with spilling, days are written one row group at a
        time. Leaves in `duck` a table `new_events` of what was stored. Concurrent appends wait for each other. Events
        from before their person was forgotten are left out. Partitions that were built from these days become stale.
        """
        self.begin_append(connection)
        duck.from_parquet([str(path) for path in staged]).create_view("offered_events", replace=True)
        [(offered,)] = duck.execute("SELECT count(*) FROM offered_events").fetchall()
        if posted:
            touched = duck.execute("SELECT DISTINCT CAST(occurred_at AS DATE) FROM offered_events").fetchall()
            duck.register("lake_events", self.dataset(self._paths(connection, [day for (day,) in touched])))
        else:
            duck.register("lake_events", self.events(connection))
        read = leave_out_forgotten(read_tombstones(connection), duck, "offered_events", "staged_events")
        # In this direction only the offered ids are held in memory; the lake's stream past them.
        duck.execute(
            "CREATE OR REPLACE TEMP TABLE held_ids AS SELECT event_id FROM lake_events "
            "WHERE event_id IN (SELECT event_id FROM staged_events)"
        )
        duck.execute(
            f"""
            CREATE OR REPLACE TEMP TABLE new_events AS
            SELECT {_COLUMNS} FROM staged_events
            WHERE event_id NOT IN (SELECT event_id FROM held_ids)
            QUALIFY row_number() OVER (PARTITION BY event_id ORDER BY known_at, occurred_at, user_id, item_id) = 1
            """
        )
        counts = duck.execute(
            "SELECT CAST(occurred_at AS DATE) AS day, count(*) FROM new_events GROUP BY day ORDER BY day"
        ).fetchall()
        days = tuple(day for day, _ in counts)
        stale: Mapping[str, int] = {}
        if days:
            self._rewrite(connection, duck, days)
            if not posted:
                ids = duck.sql("SELECT event_id, occurred_at FROM new_events").to_arrow_reader(65_536)
                take_keys(connection, ids)
            stale = mark_stale(connection, days)
        stored = sum(rows for _, rows in counts)
        return Appended(stored, read - stored, days, offered - read, stale)

    def erase(self, connection: psycopg.Connection, user_id: str, duck: duckdb.DuckDBPyConnection) -> Erased:
        """Rewrite every day that holds events of `user_id` without them, inside the caller's transaction.

        The files before stay, named by nobody once the transaction is committed: `remove_superseded` deletes them.
        """
        self.hold_writes(connection)
        duck.register("lake_events", self.events(connection))
        duck.execute(
            "CREATE OR REPLACE TEMP TABLE erased_events AS "
            "SELECT event_id, occurred_at FROM lake_events WHERE user_id = ?",
            [user_id],
        )
        events: dict[date, int] = dict(
            duck.execute(
                "SELECT CAST(occurred_at AS DATE) AS day, count(*) FROM erased_events GROUP BY day ORDER BY day"
            ).fetchall()
        )
        named = connection.execute(
            "SELECT day, path, generation, rows FROM lake_files WHERE day = ANY(%s)", (list(events),)
        )
        for day, path, generation, rows in named.fetchall():
            kept = self.dataset([path]).scanner(filter=pc.field("user_id") != user_id, use_threads=False)
            after = _file_name(day, generation + 1)
            # A day that held nobody else keeps an empty file: generations of a day only ever grow.
            written = self._write(after, (pa.Table.from_batches([batch]) for batch in kept.to_batches()))
            if written != rows - events[day]:
                # Raised inside the transaction: no pointer moves.
                raise LarderError(f"{rows - events[day]} events of {day} had to be kept in the lake, {written} were")
            connection.execute(
                "UPDATE lake_files SET path = %s, rows = %s, generation = %s, written_at = now(), previous = NULL "
                "WHERE day = %s",
                (after, written, generation + 1, day),
            )
        return Erased(events)

    def remove_superseded(self, connection: psycopg.Connection, days: Collection[date]) -> int:
        """Delete the files of `days` that are not current, and of all days what a crash left; returns how many.

        Appends wait until the caller's transaction ends, so that no file is on its way to being named.
        """
        self.hold_writes(connection)
        gone = [info for day, info, previous in self._unnamed(connection) if not previous or day in days]
        for info in gone:
            self._fs.delete_file(info.path)
        return len(gone)

    def orphans(self, connection: psycopg.Connection, older_than: timedelta) -> list[Orphan]:
        """The files that nobody has read for `older_than`: left by crashes, or replaced that long ago.

        Raises LarderError where the database names no file at all: then this is not its lake.
        """
        before = datetime.now(UTC) - older_than
        unnamed = self._unnamed(connection)
        replaced: dict[date, datetime] = dict(connection.execute("SELECT day, written_at FROM lake_files").fetchall())
        if unnamed and not replaced:
            raise LarderError(
                f"{len(unnamed)} files lie below {self.url}, and the database names none of them; "
                "check that LAKE_URL and DATABASE_URL belong to one deployment"
            )
        return [
            Orphan(info.path.removeprefix(f"{self.root}/"), info.size, info.mtime)
            for day, info, previous in unnamed
            if info.mtime < before and (not previous or replaced[day] < before)
        ]

    def remove_orphans(self, connection: psycopg.Connection, older_than: timedelta) -> list[Orphan]:
        """Delete the `orphans`, inside the caller's transaction, and return them. Writers wait meanwhile."""
        self.hold_writes(connection)
        gone = self.orphans(connection, older_than)
        for orphan in gone:
            self._fs.delete_file(f"{self.root}/{orphan.path}")
        return gone

    def _unnamed(self, connection: psycopg.Connection) -> list[tuple[date, pafs.FileInfo, bool]]:
        """`(day, file, whether it is the one before the current)` of every file of events that is not current.

        A file whose name is not one that a lake gives is somebody else's.
        """
        named: dict[str, bool] = {}
        for path, previous in connection.execute("SELECT path, previous FROM lake_files"):
            named |= {f"{self.root}/{path}": True} | ({f"{self.root}/{previous}": False} if previous else {})
        found = []
        for info in list_infos(self._fs, f"{self.root}/events"):
            name = _FILE_NAME.search(info.path)
            if name is not None and not named.get(info.path, False):
                found.append((date.fromisoformat(name["day"]), info, info.path in named))
        return found

    def _paths(self, connection: psycopg.Connection, days: Sequence[date]) -> list[str]:
        rows = connection.execute("SELECT path FROM lake_files WHERE day = ANY(%s) ORDER BY day", (list(days),))
        return [path for (path,) in rows.fetchall()]

    def _rewrite(self, connection: psycopg.Connection, duck: duckdb.DuckDBPyConnection, days: Sequence[date]) -> None:
        known: dict[date, tuple[str, int, str | None]] = {
            day: (path, generation, previous)
            for day, path, generation, previous in connection.execute(
                "SELECT day, path, generation, previous FROM lake_files WHERE day = ANY(%s)", (list(days),)
            )
        }
        duck.register("kept_events", self.dataset([path for path, _, _ in known.values()]))
        reader = duck.sql(
            f"""
            SELECT {_COLUMNS} FROM (SELECT {_COLUMNS} FROM new_events UNION ALL SELECT {_COLUMNS} FROM kept_events)
            ORDER BY CAST(occurred_at AS DATE), user_id, occurred_at, event_id
            """
        ).to_arrow_reader(65_536)
        written = 0
        for day, tables in groupby(_split_days(reader), key=lambda pair: pair[0]):
            current, generation, before = known.get(day, (None, 0, None))
            path = _file_name(day, generation + 1)
            rows = self._write(path, (table for _, table in tables))
            written += rows
            connection.execute(
                "INSERT INTO lake_files (day, path, rows, generation, keyed) VALUES (%s, %s, %s, %s, true) "
                "ON CONFLICT (day) DO UPDATE SET path = excluded.path, rows = excluded.rows, "
                "generation = excluded.generation, previous = %s, written_at = now()",
                (day, path, rows, generation + 1, current),
            )
            if before is not None and self._fs.get_file_info(f"{self.root}/{before}").is_file:
                self._fs.delete_file(f"{self.root}/{before}")

        [(wanted,)] = duck.execute(
            "SELECT (SELECT count(*) FROM new_events) + (SELECT count(*) FROM kept_events)"
        ).fetchall()
        (kept,) = connection.execute(
            "SELECT sum(rows) FROM lake_files WHERE day = ANY(%s)", (list(days),)
        ).fetchone() or (0,)
        if not wanted == written == kept:
            # Raised inside the transaction: no pointer moves.
            raise LarderError(f"{wanted} events had to be written to the lake, {written} were, {kept} would be named")

    def _write(self, path: str, tables: Iterator[pa.Table]) -> int:
        full = f"{self.root}/{path}"
        self._fs.create_dir(full.rsplit("/", 1)[0], recursive=True)
        rows = 0
        # A crash in the middle leaves a file that no row names.
        with (
            self._fs.open_output_stream(full) as stream,
            pq.ParquetWriter(stream, EVENT_SCHEMA, compression="lz4", use_dictionary=_REPEATED) as out,
        ):
            for table in tables:
                out.write_table(table)
                rows += table.num_rows
        return rows


def _split_days(reader: pa.RecordBatchReader) -> Iterator[tuple[date, pa.Table]]:
    """Batches sorted by day, cut where the day changes."""
    for batch in reader:
        table = pa.Table.from_batches([batch])
        days = table["occurred_at"].cast(pa.date32()).to_pylist()
        start = 0
        for end in range(1, len(days) + 1):
            if end == len(days) or days[end] != days[start]:
                yield days[start], table.slice(start, end - start).cast(EVENT_SCHEMA)
                start = end


def _file_name(day: date, generation: int) -> str:
    # Never the same name twice: a writer that lost its database but still lives must not write into another's file.
    return f"events/day={day.isoformat()}/{generation:06d}-{secrets.token_hex(4)}.parquet"
