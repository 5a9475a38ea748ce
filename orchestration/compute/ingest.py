"""From a source into the lake and Postgres: streamed, idempotent by event id, every row accounted for."""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import psycopg
import pyarrow as pa
import pyarrow.parquet as pq

from orchestration.compute import online
from orchestration.compute.duck import duck
from orchestration.compute.lake import DAMAGED, EVENT_SCHEMA, Lake
from orchestration.compute.mend import put_aside_days
from orchestration.compute.recent import keep_recent, roll_partitions
from orchestration.compute.telling import Say, silent
from orchestration.compute.tombstones import Tombstones, hold_off_erasures, read_tombstones
from orchestration.sources import BadRow, Source
from schemas.errors import LarderError
from schemas.events import Event, InvalidRow, Item, Person, check_event, check_id

BATCH_ROWS = 50_000
REASONS_TOLD = 5
_REASONS_KEPT = 1000
_VALUES = re.compile(
    r"""'(?:[^'\\]|\\.)*'?|"(?:[^"\\]|\\.)*"?|\d{4}-\d\d-\d\d[^\s;,]*|\(char \d+\)|(?<=column )\d+|-?\d*\.?\d{4,}(?:[.e+-]*\d)*"""
)
"""What differs from row to row in a reason: values, which may tell of a person, and positions."""


@dataclass(frozen=True, slots=True)
class IngestReport:
    """Every row of the source, accounted for: `read = stored + duplicates + quarantined + forgotten`."""

    source: str
    read: int
    stored: int
    duplicates: int
    quarantined: int
    items: int
    people: int
    days: tuple[date, ...]
    skipped: bool = False
    """True if this very state of the source had been loaded before."""
    forgotten: int = 0
    """Rows that were not taken because their people were forgotten since."""
    stale: Mapping[str, int] = field(default_factory=dict)
    """Partitions that had been built before these events came, by view: they are marked, the next run rebuilds them."""


def ingest(
    source: Source,
    lake: Lake,
    connection: psycopg.Connection,
    *,
    shift_days: int = 0,
    since: date | None = None,
    now: datetime | None = None,
    progress: Say = silent,
) -> IngestReport:
    """Load everything new that `source` has, in one transaction.

    `shift_days` is added to every time. Repeating a load stores nothing twice; of two events with one id the first
    stays. An event of a day that has been built is late: unless its source says when it was known, that is now. Those
    of a day that was put aside since the last load, because its file was damaged, come back as they were. If
    anything fails, the database is as before, and files already written to the lake are named by nobody.
    """
    now = now or datetime.now(UTC)
    fingerprint = f"{source.fingerprint()}+{shift_days}"
    with connection.transaction():
        row: tuple[int, int, int, int, int, int, int] | None = connection.execute(
            "SELECT read_rows, stored_rows, duplicate_rows, quarantined_rows, items, people, forgotten_rows FROM ingests "
            # What damage took out of the lake since has to be loaded again.
            "WHERE source = %s AND fingerprint = %s AND NOT EXISTS (SELECT FROM quarantine AS q WHERE q.source = %s "
            "AND q.seen_at > finished_at) ORDER BY ingest_id DESC LIMIT 1",
            (source.name, fingerprint, DAMAGED),
        ).fetchone()
    if row is not None:
        progress(f"{source.description}: already loaded, nothing new")
        return IngestReport(source.name, *row[:6], (), skipped=True, forgotten=row[6])

    roll_partitions(connection, lake, now)
    shift = timedelta(days=shift_days)
    with tempfile.TemporaryDirectory(prefix="larder-ingest-") as folder, duck() as db, connection.transaction():
        # Held until the commit: nobody is forgotten between what is read here and what is written.
        hold_off_erasures(connection)
        tombstones = read_tombstones(connection)
        bad = _Quarantine(connection, source.name, tombstones)
        items = _load_items(connection, source, shift, bad)
        people = _load_people(connection, source, bad, tombstones)
        bad_catalogue, forgotten_catalogue = bad.count, bad.forgotten
        staged = Path(folder) / "staged.parquet"
        built = {day for (day,) in connection.execute("SELECT DISTINCT partition_date FROM feature_ledger")}
        settled = built - put_aside_days(connection)
        read = _stage(source, staged, _Clock(shift, settled, now), since, bad, progress)
        progress(f"{read:,} rows read; sorting them into days")
        with lake.named(lake.paths(connection).values()):
            appended = lake.append(connection, [staged], db)
        keep_recent(connection, db, now)
        report = IngestReport(
            source.name,
            read,
            appended.stored,
            appended.duplicates,
            bad.flush() - bad_catalogue,
            items,
            people,
            appended.days,
            forgotten=appended.forgotten + bad.forgotten - forgotten_catalogue,
            stale=appended.stale,
        )
        counts = (read, report.stored, report.duplicates, report.quarantined)
        connection.execute(
            "INSERT INTO ingests (source, fingerprint, read_rows, stored_rows, duplicate_rows, quarantined_rows, "
            "items, people, forgotten_rows) VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s)",
            (source.name, fingerprint, *counts, items, people, report.forgotten),
        )
    if report.read != report.stored + report.duplicates + report.quarantined + report.forgotten:
        raise LarderError(
            f"rows went missing while loading {source.name}: {report}"
        )  # the table's constraint says so too
    progress(
        f"{report.read:,} rows = {report.stored:,} stored + {report.duplicates:,} duplicates + "
        f"{report.quarantined:,} quarantined{f' + {report.forgotten:,} of forgotten people' if report.forgotten else ''}; "
        f"{items:,} items, {people:,} people{told_stale(report.stale)}"
    )
    bad.tell(progress)
    return report


def drain(
    connection: psycopg.Connection,
    lake: Lake,
    first: date | None,
    last: date,
    *,
    now: datetime | None = None,
    progress: Say = silent,
) -> int:
    """Move posted events that happened from day `first` (None: ever) to `last`, included, into the lake, exactly once.

    The lake's pointer, the `drained` mark and the marks of partitions that are stale now change in one transaction.
    Of the lake only the days that these events belong to are read. What is old is so at `now`. Returns how many were moved.
    """
    now = now or datetime.now(UTC)
    roll_partitions(connection, lake, now)
    with tempfile.TemporaryDirectory(prefix="larder-drain-") as folder, duck() as db, connection.transaction():
        hold_off_erasures(connection)
        # Before our rows are chosen and locked: who holds the lake may mark one of them drained.
        lake.begin_append(connection)
        _drop_forgotten(connection)
        start = datetime(first.year, first.month, first.day, tzinfo=UTC) if first else datetime.min.replace(tzinfo=UTC)
        end = datetime(last.year, last.month, last.day, tzinfo=UTC) + timedelta(days=1)
        rows = connection.execute(
            "SELECT event_id, user_id, item_id, kind, value, occurred_at, known_at, request_id FROM recent_events "
            "WHERE NOT drained AND occurred_at >= %s AND occurred_at < %s FOR UPDATE",
            (start, end),
        ).fetchall()
        if not rows:
            return 0
        staged = Path(folder) / "drained.parquet"
        columns = [list(column) for column in zip(*rows, strict=True)]
        pq.write_table(pa.table(columns, schema=EVENT_SCHEMA), staged)
        with lake.named(lake.paths(connection).values()):
            appended = lake.append(connection, [staged], db, posted=True)
        connection.execute(
            "UPDATE recent_events SET drained = true WHERE NOT drained AND occurred_at >= %s AND occurred_at < %s "
            "AND event_id = ANY(%s)",
            (start, end, columns[0]),
        )
        online.trim_tiles(connection, now)
    progress(f"{len(rows):,} posted events drained into the lake{told_stale(appended.stale)}")
    return len(rows)


def told_stale(stale: Mapping[str, int]) -> str:
    """For a line of progress: what these events made stale, by view; empty if nothing."""
    listed = ", ".join(f"{view} {partitions:,}" for view, partitions in stale.items())
    return f"; late for partitions that were built before, now stale: {listed}" if listed else ""


def _drop_forgotten(connection: psycopg.Connection) -> None:
    """Delete undrained events from before their person was forgotten: a function of an older release stores them."""
    gone = connection.execute(
        "SELECT e.event_id, e.user_id, e.item_id FROM recent_events AS e JOIN tombstones AS t "
        "ON t.user_hash = user_hash(e.user_id) AND e.occurred_at <= t.forgotten_at WHERE NOT e.drained"
    ).fetchall()
    if not gone:
        return
    event_ids, users, items = (list(column) for column in zip(*gone, strict=True))
    # Posts wait here until the commit, as their tiles are counted anew.
    connection.execute("LOCK TABLE event_keys IN SHARE ROW EXCLUSIVE MODE")
    for table in ("recent_events", "user_history", "event_keys"):
        connection.execute(f"DELETE FROM {table} WHERE event_id = ANY(%s)", (event_ids,))
    online.rebuild_tiles(connection, users=users, items=items)


class _Quarantine:
    """Collects bad rows and writes them in batches."""

    def __init__(self, connection: psycopg.Connection, source: str, tombstones: Tombstones) -> None:
        self._connection, self._source, self._tombstones = connection, source, tombstones
        self._rows: list[BadRow] = []
        self.count = 0
        self.forgotten = 0
        """Rows that are not kept, as they may name somebody who was forgotten."""
        self._reasons: Counter[str] = Counter()
        self._examples: dict[str, str] = {}
        """Where a reason was first met."""

    def add(self, row: BadRow) -> None:
        if any(self._tombstones.named_in(_storable(text)) for text in (row.file, row.reason, row.row)):
            self.forgotten += 1
            return
        self.count += 1
        reason = _VALUES.sub("…", row.reason)
        if reason not in self._reasons and len(self._reasons) >= _REASONS_KEPT:
            reason = "other reasons"
        self._reasons[reason] += 1
        self._examples.setdefault(reason, f"{row.file} line {row.line:,}" if row.line else row.file.partition(":")[0])
        self._rows.append(row)
        if len(self._rows) >= 1000:
            self.flush()

    def tell(self, progress: Say) -> None:
        """Say why rows of events and catalogue were refused: the most frequent reasons, without anybody's values."""
        for reason, rows in self._reasons.most_common(REASONS_TOLD):
            progress(f"quarantined {rows:,}: {reason} (first: {self._examples[reason]})")
        if len(self._reasons) > REASONS_TOLD:
            rest = sum(count for _, count in self._reasons.most_common()[REASONS_TOLD:])
            progress(f"quarantined {rest:,} for {len(self._reasons) - REASONS_TOLD} more reasons")
        if self._reasons:
            progress("each with its row, file and line: table `quarantine`")

    def flush(self) -> int:
        with self._connection.cursor() as cursor:
            cursor.executemany(
                "INSERT INTO quarantine (source, file, line, reason, row) VALUES (%s, %s, %s, %s, %s) ON CONFLICT DO NOTHING",
                [(self._source, bad.file, bad.line, bad.reason, _storable(bad.row)) for bad in self._rows],
            )
        self._rows.clear()
        return self.count


def _storable(text: str) -> str:
    """Postgres text holds no NUL and no lone surrogates."""
    return text.replace("\0", "\\0").encode("utf-8", "backslashreplace").decode()[:500]


def _stage(source: Source, staged: Path, clock: _Clock, since: date | None, bad: _Quarantine, progress: Say) -> int:
    expected = source.event_count()
    read = 0
    with pq.ParquetWriter(staged, EVENT_SCHEMA, compression="zstd") as out:
        for batch in _batches(source.events(since)):
            good: list[Event] = []
            for row in batch:
                if isinstance(row, BadRow):
                    bad.add(row)
                    continue
                try:
                    good.append(check_event(row))
                except InvalidRow as reason:
                    bad.add(BadRow(f"event:{row.event_id[:100]}", 0, str(reason), repr(row)))
            read += len(batch)
            out.write_batch(_record_batch(good, clock))
            if read >= BATCH_ROWS:
                progress(f"{read:,}{f' of {expected:,}' if expected else ''} rows read")
    return read


def _batches(rows: Iterator[Event | BadRow]) -> Iterator[list[Event | BadRow]]:
    batch: list[Event | BadRow] = []
    for row in rows:
        batch.append(row)
        if len(batch) >= BATCH_ROWS:
            yield batch
            batch = []
    if batch:
        yield batch


@dataclass(frozen=True, slots=True)
class _Clock:
    """When a source's events happened, and when the store learned of them."""

    shift: timedelta
    settled: Collection[date]
    """Days of which a partition has been built, and read, without these events."""
    now: datetime

    def known_at(self, event: Event) -> datetime:
        if event.known_at is not None:
            return event.known_at + self.shift
        occurred_at = event.occurred_at + self.shift
        late = occurred_at.astimezone(UTC).date() in self.settled
        return max(occurred_at, self.now) if late else occurred_at


def _record_batch(events: list[Event], clock: _Clock) -> pa.RecordBatch:
    return pa.record_batch(
        [
            [event.event_id for event in events],
            [event.user_id for event in events],
            [event.item_id for event in events],
            [event.kind for event in events],
            [event.value for event in events],
            [event.occurred_at + clock.shift for event in events],
            [clock.known_at(event) for event in events],
            [None] * len(events),
        ],
        schema=EVENT_SCHEMA,
    )


def _load_items(connection: psycopg.Connection, source: Source, shift: timedelta, bad: _Quarantine) -> int:
    connection.execute("CREATE TEMP TABLE incoming_items (LIKE items INCLUDING DEFAULTS) ON COMMIT DROP")
    count = 0
    with connection.cursor().copy(
        "COPY incoming_items (item_id, title, description, categories, attributes, available_at) FROM STDIN"
    ) as copy:
        for row in source.items():
            checked = _checked(row, bad)
            if isinstance(checked, Item):
                count += 1
                arrives = checked.available_at + shift if checked.available_at else None
                copy.write_row(
                    (
                        checked.item_id,
                        _storable_text(checked.title),
                        _storable_text(checked.description),
                        [_storable_text(category) for category in dict.fromkeys(checked.categories)],
                        json.dumps(checked.attributes, default=str),
                        arrives,
                    )
                )
    connection.execute(
        "INSERT INTO items (item_id, title, description, categories, attributes, available_at) "
        "SELECT DISTINCT ON (item_id) item_id, title, description, categories, attributes, available_at "
        "FROM incoming_items ORDER BY item_id ON CONFLICT (item_id) DO UPDATE SET title = excluded.title, "
        "description = excluded.description, categories = excluded.categories, attributes = excluded.attributes, "
        "available_at = excluded.available_at, updated_at = now() WHERE "
        "(items.title, items.description, items.categories, items.attributes, items.available_at) IS DISTINCT FROM "
        "(excluded.title, excluded.description, excluded.categories, excluded.attributes, excluded.available_at)"
    )
    connection.execute("DROP TABLE incoming_items")
    return count


def _load_people(connection: psycopg.Connection, source: Source, bad: _Quarantine, tombstones: Tombstones) -> int:
    # A profile says nothing of when it was true: what a source still holds of a forgotten person stays out for good.
    connection.execute("CREATE TEMP TABLE incoming_people (LIKE people INCLUDING DEFAULTS) ON COMMIT DROP")
    count = 0
    with connection.cursor().copy("COPY incoming_people (user_id, profile) FROM STDIN") as copy:
        for row in source.people():
            checked = _checked(row, bad)
            if isinstance(checked, Person) and tombstones.since(checked.user_id) is None:
                count += 1
                copy.write_row((checked.user_id, json.dumps(checked.profile, default=str)))
    connection.execute(
        "INSERT INTO people (user_id, profile) SELECT DISTINCT ON (user_id) user_id, profile FROM incoming_people "
        "ORDER BY user_id ON CONFLICT (user_id) DO UPDATE SET profile = excluded.profile, updated_at = now() "
        "WHERE people.profile IS DISTINCT FROM excluded.profile"
    )
    connection.execute("DROP TABLE incoming_people")
    return count


def _checked(row: Item | Person | BadRow, bad: _Quarantine) -> Item | Person | None:
    if isinstance(row, BadRow):
        bad.add(row)
        return None
    try:
        if isinstance(row, Item):
            check_id("item_id", row.item_id)
            if not row.title.strip():
                raise InvalidRow("title is empty")
        else:
            check_id("user_id", row.user_id)
    except InvalidRow as reason:
        bad.add(BadRow("catalogue", 0, str(reason), repr(row)))
        return None
    return row


def _storable_text(text: str) -> str:
    return text.replace("\0", "").encode("utf-8", "replace").decode()
