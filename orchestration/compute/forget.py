"""Erasing a person: the database in one transaction, the files right after, a tombstone and a receipt.

    request ─▶ erase: lake rewritten, rows deleted, tombstone, receipt ─▶ finish: files nobody names any more
               └───────────── one transaction ─────────────────────┘     └─ repeated until it is through ─┘

What names a person is found, not listed: every table with a column `user_id`, and every other one that refers to their
events by `event_id`. A table that is added later is covered.
"""

from __future__ import annotations

import json
import secrets
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any

import duckdb
import psycopg
import pyarrow.compute as pc
import pyarrow.parquet as pq
from psycopg import sql

from orchestration.compute.duck import duck
from orchestration.compute.file_roots import list_files, open_root
from orchestration.compute.lake import Lake
from orchestration.compute.online import rebuild_tiles
from orchestration.compute.scratch import remove_scratch
from orchestration.compute.stale import mark_stale
from orchestration.compute.tombstones import count_erasures, erase_alone, names
from schemas.errors import LarderError, UnknownPerson

TRAINING_FOLDER = "training"
EVENTS_REMOVED, FILES_DELETED = "events in the lake", "files deleted"
_REQUESTS = ("public", "erasure_requests")
_PARQUET = b"PAR1"

Table = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Receipt:
    """What an erasure removed, by place, and the partitions it made stale, by view; names nobody.

    `finished` is False while files wait to be deleted.
    """

    receipt_id: str
    forgotten_at: datetime
    removed: dict[str, int]
    stale: dict[str, int]
    finished: bool


def holdings(url: str, lake: Lake, user_id: str) -> dict[str, int]:
    """What is held of `user_id`, by place: rows by table, events in the lake. Places that hold nothing are left out."""
    with connect(url) as connection, duck() as db:
        found = Counter(
            {
                _name(table): _count(connection, table, user_id)
                for table in tables_with(connection, "user_id")
                if table != _REQUESTS
            }
        )
        found["public.quarantine"] += len(quarantined(connection, user_id))
        paths = lake.paths(connection).values()
        with lake.named(paths):
            db.register("lake_events", lake.dataset(paths))
            (found[EVENTS_REMOVED],) = db.execute(
                "SELECT count(*) FROM lake_events WHERE user_id = ?", [user_id]
            ).fetchone() or (0,)
    return {place: rows for place, rows in sorted(found.items()) if rows}


def request_erasure(url: str, lake: Lake, user_id: str) -> str:
    """Ask for `user_id` to be forgotten, and hide them from recommendations at once; returns the request's id.

    Asking again gives the same id. Raises UnknownPerson, before anything is written, if nothing is held of them.
    """
    if not holdings(url, lake, user_id):
        with connect(url) as connection:
            raise _unknown(connection, user_id)
    with connect(url) as connection:
        (request_id,) = connection.execute(
            "INSERT INTO erasure_requests (request_id, user_id) VALUES (%s, %s) "
            "ON CONFLICT (user_id) DO UPDATE SET user_id = excluded.user_id RETURNING request_id",
            (secrets.token_hex(16), user_id),
        ).fetchone() or ("",)
    return str(request_id)


def fulfil(request_id: str, *, url: str, lake: Lake, artifacts_url: str) -> Receipt:
    """Do what was asked for by `request_erasure`; if that was done or begun before, the rest of it.

    Raises LarderError for a request that does not exist; messages do not name the person.
    """
    finish(url=url, lake=lake, artifacts_url=artifacts_url)
    done = read_receipt(url, request_id)
    if done is not None:
        return done
    with connect(url) as connection:
        row = connection.execute("SELECT user_id FROM erasure_requests WHERE request_id = %s", (request_id,)).fetchone()
    if row is None:
        raise LarderError(
            f"there is no erasure request {request_id!r}; `python -m orchestration.forget --request` makes one"
        )
    try:
        return forget(row[0], url=url, lake=lake, artifacts_url=artifacts_url, receipt_id=request_id)
    except UnknownPerson:
        # The id must not stay in the table because there is nothing else of it.
        with connect(url) as connection:
            connection.execute("DELETE FROM erasure_requests WHERE request_id = %s", (request_id,))
        raise LarderError(
            f"erasure request {request_id} names somebody of whom nothing is held; it was removed, nothing else was"
        ) from None


def open_requests(url: str) -> list[str]:
    """Ids of the requests that wait, the oldest first."""
    with connect(url) as connection:
        rows = connection.execute("SELECT request_id FROM erasure_requests ORDER BY requested_at").fetchall()
    return [request_id for (request_id,) in rows]


def forget(user_id: str, *, url: str, lake: Lake, artifacts_url: str, receipt_id: str | None = None) -> Receipt:
    """Erase everything held of `user_id` and keep their events up to now from coming back.

    If it dies before the transaction is committed, nothing has happened; if after, `finish` deletes the files that are
    left. Raises UnknownPerson, with nothing written, if nothing is held of them.
    """
    receipt_id = erase(user_id, url=url, lake=lake, artifacts_url=artifacts_url, receipt_id=receipt_id)
    finish(url=url, lake=lake, artifacts_url=artifacts_url)
    receipt = read_receipt(url, receipt_id)
    assert receipt is not None
    return receipt


def erase(user_id: str, *, url: str, lake: Lake, artifacts_url: str, receipt_id: str | None = None) -> str:
    """The transaction of `forget`: when it is committed no read, online or offline, finds the person. Gives the receipt's id."""
    receipt_id = receipt_id or secrets.token_hex(16)
    removed: Counter[str] = Counter()
    with duck() as db, connect(url) as connection:
        erase_alone(connection)
        with lake.named(lake.paths(connection).values()):
            erased = lake.erase(connection, user_id, db)
        removed[EVENTS_REMOVED] = sum(erased.events.values())
        artifacts = training_files(artifacts_url, user_id)
        tables = tables_with(connection, "user_id")
        for table in tables:
            if table[0] == "features":
                removed[_name(table)] = _delete_snapshots(connection, table, user_id)
        # People's own views are put right here; those that counted the person for others, items say, are to be rebuilt.
        own = [name for schema, name in tables if schema == "features"]
        stale = mark_stale(connection, erased.events, except_views=own)
        _settle_ledger(connection, erased.events, own)
        bad = quarantined(connection, user_id)
        removed["public.quarantine"] = connection.execute(
            "DELETE FROM quarantine WHERE quarantine_id = ANY(%s)", (bad,)
        ).rowcount
        # From here to the commit `POST /events` waits: its first write is here. It then sees the tombstone.
        connection.execute("LOCK TABLE event_keys IN SHARE ROW EXCLUSIVE MODE")
        _collect_event_ids(connection, db, user_id)
        items = connection.execute(
            "SELECT DISTINCT item_id FROM recent_events WHERE user_id = %s", (user_id,)
        ).fetchall()
        for table in tables:
            if table[0] != "features":
                removed[_name(table)] += _delete(connection, table, "user_id = %s", [user_id])
        for table in tables_with(connection, "event_id", without="user_id"):
            removed[_name(table)] += _delete(connection, table, "event_id IN (SELECT event_id FROM erased_ids)", [])
        rebuild_tiles(connection, users=[], items=[item_id for (item_id,) in items])
        del removed[_name(_REQUESTS)]
        if not any(removed.values()):
            raise _unknown(connection, user_id)
        (forgotten_at,) = connection.execute(
            # An event may lie a little ahead of this server's clock; it must not come back either.
            "SELECT greatest(clock_timestamp(), max(occurred_at)) FROM erased_ids"
        ).fetchone() or (datetime.now(UTC),)
        connection.execute(
            "INSERT INTO tombstones (user_hash, user_chars, forgotten_at) VALUES (user_hash(%s), %s, %s) "
            "ON CONFLICT (user_hash) DO UPDATE SET forgotten_at = greatest(tombstones.forgotten_at, excluded.forgotten_at)",
            (user_id, len(user_id), forgotten_at),
        )
        connection.execute(
            "INSERT INTO erasure_receipts (receipt_id, forgotten_at, removed, stale, pending_days, pending_artifacts) "
            "VALUES (%s, %s, %s, %s, %s, %s)",
            (
                receipt_id,
                forgotten_at,
                json.dumps({place: rows for place, rows in sorted(removed.items()) if rows}),
                json.dumps(stale),
                list(erased.events),
                artifacts,
            ),
        )
    return receipt_id


def finish(*, url: str, lake: Lake, artifacts_url: str) -> int:
    """Delete the files that erasures left to delete; returns how many erasures were finished.

    Repeating it is safe: a receipt is finished when its files are gone, so a crash in between leaves it to the next.
    """
    with connect(url) as connection:
        waiting = connection.execute(
            "SELECT receipt_id, pending_days, pending_artifacts FROM erasure_receipts WHERE finished_at IS NULL "
            "ORDER BY forgotten_at FOR UPDATE"
        ).fetchall()
        if not waiting:
            return 0
        root, files = open_root(artifacts_url.rstrip("/"))
        for receipt_id, days, paths in waiting:
            there = {path for path in paths if files.get_file_info(f"{root}/{path}").is_file}
            for path in sorted(there):
                files.delete_file(f"{root}/{path}")
            gone = lake.remove_superseded(connection, set(days)) + len(there)
            gone += remove_scratch(lake.url, count_erasures(connection))
            connection.execute(
                "UPDATE erasure_receipts SET finished_at = now(), pending_days = '{}', pending_artifacts = '{}', "
                "removed = removed || jsonb_build_object(%s::text, %s::bigint) WHERE receipt_id = %s",
                (FILES_DELETED, gone, receipt_id),
            )
    return len(waiting)


def read_receipt(url: str, receipt_id: str) -> Receipt | None:
    """The receipt of that id, or None."""
    with connect(url) as connection:
        row = connection.execute(
            "SELECT receipt_id, forgotten_at, removed, stale, finished_at IS NOT NULL FROM erasure_receipts "
            "WHERE receipt_id = %s",
            (receipt_id,),
        ).fetchone()
    return Receipt(*row) if row else None


def tables_with(connection: psycopg.Connection[Any], column: str, *, without: str = "") -> list[Table]:
    """`(schema, table)` of every table that has `column` and not the column `without`; a partitioned one counts once."""
    # Not information_schema: that hides tables this role has no rights to, where deleting from one must fail aloud.
    return connection.execute(
        """
        SELECT n.nspname, c.relname FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
        WHERE c.relkind IN ('r', 'p') AND NOT c.relispartition AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
        AND EXISTS (SELECT FROM pg_attribute AS a WHERE a.attrelid = c.oid AND a.attname = %s AND NOT a.attisdropped)
        AND NOT EXISTS (SELECT FROM pg_attribute AS a WHERE a.attrelid = c.oid AND a.attname = %s AND NOT a.attisdropped)
        ORDER BY n.nspname, c.relname
        """,
        (column, without),
    ).fetchall()


def connect(url: str) -> psycopg.Connection[Any]:
    return psycopg.connect(url, options="-c TimeZone=UTC", application_name="larder-forget")


def _name(table: Table) -> str:
    return ".".join(table)


def _unknown(connection: psycopg.Connection[Any], user_id: str) -> UnknownPerson:
    row = connection.execute(
        "SELECT forgotten_at FROM tombstones WHERE user_hash = user_hash(%s)", (user_id,)
    ).fetchone()
    if row is not None:
        return UnknownPerson(
            f"nothing is held of {user_id!r}: they were forgotten on {row[0]:%Y-%m-%d %H:%M} UTC", row[0]
        )
    return UnknownPerson(
        f"nothing is held of a person {user_id!r}: no table and no file of the lake names them; "
        "check the id, and the deployment (DEPLOYMENT=<name> picks another)"
    )


def _count(connection: psycopg.Connection[Any], table: Table, user_id: str) -> int:
    statement = sql.SQL("SELECT count(*) FROM {} WHERE user_id = %s").format(sql.Identifier(*table))
    (rows,) = connection.execute(statement, (user_id,)).fetchone() or (0,)
    return int(rows)


def _delete(connection: psycopg.Connection[Any], table: Table, where: str, parameters: list[str]) -> int:
    statement = sql.SQL("DELETE FROM {} WHERE " + where).format(sql.Identifier(*table))
    return connection.execute(statement, parameters).rowcount


def _delete_snapshots(connection: psycopg.Connection[Any], table: Table, user_id: str) -> int:
    """Delete a person's rows of one view; the ledger's counts follow, as the rest is what a rebuild would give."""
    statement = sql.SQL(
        "WITH gone AS (DELETE FROM {} WHERE user_id = %s RETURNING partition_date), "
        "counted AS (SELECT partition_date, count(*) AS rows FROM gone GROUP BY partition_date), "
        "told AS (UPDATE feature_ledger AS l SET rows = l.rows - c.rows FROM counted AS c "
        "WHERE l.view = %s AND l.partition_date = c.partition_date) SELECT count(*) FROM gone"
    ).format(sql.Identifier(*table))
    (rows,) = connection.execute(statement, (user_id, table[1])).fetchone() or (0,)
    return int(rows)


def _settle_ledger(connection: psycopg.Connection[Any], events: dict[date, int], views: list[str]) -> None:
    """Partitions of people's own views were built from the days as they are now, less what was taken out of both."""
    with connection.cursor() as cursor:
        cursor.executemany(
            "UPDATE feature_ledger SET events = events - %s WHERE view = ANY(%s) AND partition_date = %s",
            [(rows, views, day) for day, rows in events.items()],
        )


def _collect_event_ids(connection: psycopg.Connection[Any], db: duckdb.DuckDBPyConnection, user_id: str) -> None:
    """A temporary table `erased_ids` of the person's events, from the lake and from every table that has them."""
    connection.execute("CREATE TEMP TABLE erased_ids (event_id text, occurred_at timestamptz) ON COMMIT DROP")
    found = db.execute("SELECT event_id, occurred_at FROM erased_events")
    with connection.cursor().copy("COPY erased_ids (event_id, occurred_at) FROM STDIN") as copy:
        while rows := found.fetchmany(10_000):
            for row in rows:
                copy.write_row(row)
    for table in ("recent_events", "user_history"):
        connection.execute(
            f"INSERT INTO erased_ids SELECT event_id, occurred_at FROM {table} WHERE user_id = %s", (user_id,)
        )
    connection.execute("ANALYZE erased_ids")


def quarantined(connection: psycopg.Connection[Any], user_id: str) -> list[int]:
    """Rows of the quarantine that may name the person. What is kept there is only cut text: in doubt it goes."""
    rows = connection.execute(
        "SELECT quarantine_id, file, reason, row FROM quarantine WHERE strpos(file || ' ' || reason || ' ' || row, %s) > 0 "
        "OR strpos(file || ' ' || reason || ' ' || row, chr(92)) > 0",
        (user_id,),
    )
    return [number for number, *texts in rows if any(names(text, user_id) for text in texts)]


def training_files(artifacts_url: str, user_id: str) -> list[str]:
    """Training sets that name the person, below ARTIFACTS_URL: told by what is in them, not by what they are called."""
    root, files = open_root(artifacts_url.rstrip("/"))
    found: list[str] = []
    for path in list_files(files, f"{root}/{TRAINING_FOLDER}"):
        with files.open_input_file(path) as stream:
            head = stream.read(len(_PARQUET))
            if head != _PARQUET:
                continue
            try:
                people = pq.ParquetFile(stream)
                held = "user_id" in people.schema_arrow.names and any(
                    pc.any(pc.equal(batch["user_id"], user_id)).as_py()
                    for batch in people.iter_batches(columns=["user_id"])
                )
            except (OSError, ValueError):
                held = True  # half written by a process that died: nobody reads it, and it may name anybody
        if held:
            found.append(path.removeprefix(f"{root}/"))
    return found
