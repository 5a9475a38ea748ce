"""All that is held of a person, as one JSON document: the same places that an erasure goes through, read instead of deleted.

request (route or command) ─▶ table `exports` ─▶ fulfil: gathered here ─▶ fetched by the receipt, gone after some days
"""

from __future__ import annotations

import json
import secrets
from datetime import UTC, date, datetime
from typing import Any

import psycopg
import pyarrow.compute as pc
import pyarrow.parquet as pq
from psycopg import sql

from orchestration.compute import forget as erasure
from orchestration.compute.duck import duck
from orchestration.compute.file_roots import open_root
from orchestration.compute.lake import Lake
from schemas.errors import LarderError, UnknownPerson

LAKE, TRAINING = "events in the lake", "training sets"
_OWN = ("public", "exports")
"""The table of the exports themselves: a copy of the copy is nobody's gain."""
NOT_INCLUDED = (
    "trained models: they hold no row of anybody; what they learned goes with the next training",
    "tombstones: whether a person was forgotten is kept as a keyed hash, which says nothing that is not in the receipt",
)

Document = dict[str, Any]


def gather(user_id: str, *, url: str, lake: Lake, artifacts_url: str) -> Document:
    """`{"user_id", "exported_at", "held": {place: [rows]}, "not_included": […]}`, places that hold nothing left out.

    Instants are ISO 8601 in UTC, bytes hexadecimal. Raises UnknownPerson if nothing is held of them.
    """
    held: dict[str, list[dict[str, Any]]] = {}
    with erasure.connect(url) as connection, duck() as db:
        for table in erasure.tables_with(connection, "user_id"):
            if table != _OWN:
                held[".".join(table)] = _rows(connection, table, "user_id = %s", [user_id])
        bad = erasure.quarantined(connection, user_id)
        held["public.quarantine"] = _rows(connection, ("public", "quarantine"), "quarantine_id = ANY(%s)", [bad])
        paths = lake.paths(connection).values()
        with lake.named(paths):
            db.register("lake_events", lake.dataset(paths))
            found = db.execute("SELECT * FROM lake_events WHERE user_id = ? ORDER BY occurred_at, event_id", [user_id])
            names = [column[0] for column in found.description or ()]
            held[LAKE] = [dict(zip(names, row, strict=True)) for row in found.fetchall()]
        ids = {row["event_id"] for rows in held.values() for row in rows if row.get("event_id")}
        for table in erasure.tables_with(connection, "event_id", without="user_id"):
            held[".".join(table)] = _rows(connection, table, "event_id = ANY(%s)", [sorted(ids)])
    held[TRAINING] = _training_rows(artifacts_url, user_id)
    held = {place: rows for place, rows in sorted(held.items()) if rows}
    if not set(held) - {"public.erasure_requests"}:
        raise UnknownPerson(
            f"nothing is held of a person {user_id!r}: no table and no file of the lake names them; "
            "check the id, and the deployment (DEPLOYMENT=<name> picks another)"
        )
    document = {"user_id": user_id, "exported_at": datetime.now(UTC), "held": held, "not_included": list(NOT_INCLUDED)}
    return {name: _plain(value) for name, value in document.items()}


def request(url: str, user_id: str) -> str:
    """Ask for an export of `user_id` to be made by Dagster; the receipt's id, the same while one waits."""
    with erasure.connect(url) as connection:
        row = connection.execute("SELECT request_export(%s, %s)", (user_id, secrets.token_hex(16))).fetchone()
        if row is None or row[0] is None:
            # Of whom only the lake knows, the database's own function knows nothing.
            row = connection.execute(
                "INSERT INTO exports (request_id, user_id) VALUES (%s, %s) ON CONFLICT (user_id) DO UPDATE "
                "SET user_id = excluded.user_id RETURNING jsonb_build_object('receipt_id', request_id)",
                (secrets.token_hex(16), user_id),
            ).fetchone()
    assert row is not None
    return str(row[0]["receipt_id"])


def open_requests(url: str) -> list[str]:
    """Ids of the exports that wait, the oldest first."""
    with erasure.connect(url) as connection:
        rows = connection.execute("SELECT request_id FROM exports WHERE ready_at IS NULL ORDER BY requested_at")
        return [request_id for (request_id,) in rows.fetchall()]


def fulfil(request_id: str, *, url: str, lake: Lake, artifacts_url: str) -> dict[str, int]:
    """Make the export of that request and keep it for whoever has the receipt; gives its rows by place.

    Whoever is forgotten meanwhile has no request any more, and nothing is kept. Raises LarderError, which names nobody, if
    there is no such request.
    """
    with erasure.connect(url) as connection:
        row = connection.execute("SELECT user_id FROM exports WHERE request_id = %s", (request_id,)).fetchone()
    if row is None:
        raise LarderError(f"there is no export request {request_id!r}; POST /people/{{user_id}}/export makes one")
    try:
        document = gather(row[0], url=url, lake=lake, artifacts_url=artifacts_url)
    except UnknownPerson:
        with erasure.connect(url) as connection:
            connection.execute("DELETE FROM exports WHERE request_id = %s", (request_id,))
        raise LarderError(
            f"export request {request_id} names somebody of whom nothing is held; it was removed"
        ) from None
    with erasure.connect(url) as connection:
        connection.execute(
            "UPDATE exports SET document = %s, ready_at = now() WHERE request_id = %s", (to_json(document), request_id)
        )
    return {place: len(rows) for place, rows in document["held"].items()}


def to_json(document: Document, *, indent: int | None = None) -> str:
    """`document` as JSON text, readable in any language."""
    return json.dumps(document, ensure_ascii=False, indent=indent)


def _rows(
    connection: psycopg.Connection[Any], table: erasure.Table, where: str, parameters: list[Any]
) -> list[dict[str, Any]]:
    statement = sql.SQL("SELECT to_jsonb(t) FROM {} AS t WHERE " + where).format(sql.Identifier(*table))
    return [row for (row,) in connection.execute(statement, parameters).fetchall()]


def _training_rows(artifacts_url: str, user_id: str) -> list[dict[str, Any]]:
    """The person's rows of every training set, each with the file it is from."""
    root, files = open_root(artifacts_url.rstrip("/"))
    found: list[dict[str, Any]] = []
    for path in erasure.training_files(artifacts_url, user_id):
        with files.open_input_file(f"{root}/{path}") as stream:
            try:
                batches = pq.ParquetFile(stream).iter_batches()
                for batch in batches:
                    mine = batch.filter(pc.equal(batch["user_id"], user_id))
                    found += [{"file": path, **row} for row in mine.to_pylist()]
            except (OSError, ValueError):  # half written by a process that died: nobody can read it
                found.append({"file": path, "unreadable": True})
    return found


def _plain(value: Any) -> Any:
    """`value` as JSON knows it."""
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat()
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, float) and value - value != 0:  # NaN and infinities, which JSON has no word for
        return str(value)
    if isinstance(value, dict):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value
