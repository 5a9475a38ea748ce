"""The lists as they are kept: which run wrote what, where it stopped, and rows as binary COPY takes them.

    score_runs    one row a run: model, sizes, when it began and ended. It names nobody.
    user_scores   one row a person: the run, the model, the instant, items and scores, best first

A list is one row, so whoever reads one has it whole. Where a run stopped is read off the rows it wrote: a key kept in the
ledger would outlive the person it belongs to.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import psycopg
from numpy.typing import NDArray

from inference.sql_files import statement
from schemas.consent import consent_default
from schemas.errors import ScoresError
from schemas.online_sql import ERASURE_LOCK

RUN_LOCK = 7_205_396
"""The advisory lock that a run holds: two would write over each other's lists."""
_HEADER, _TRAILER = b"PGCOPY\n\xff\r\n\0" + bytes(8), b"\xff\xff"
_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
_TEXT, _REAL = 25, 700  # object ids of the elements' types, fixed in every Postgres
_REALS = np.dtype([("bytes", ">i4"), ("value", ">f4")])


@dataclass(frozen=True, slots=True)
class Run:
    """A run of the ledger: `scored` people by earlier starts of it, the last of them `after` ('' for none)."""

    run_id: int
    version: str
    started_at: datetime
    scored: int = 0
    after: str = ""
    resumed: bool = False
    """Whether an earlier start of it was stopped."""
    follows: bool = True
    """Whether it ends when another model serves: not one that was asked for by its version."""


def lock(connection: psycopg.Connection) -> None:
    """Hold the lock until the connection closes. Raises ScoresError if another run holds it."""
    (free,) = connection.execute("SELECT pg_try_advisory_lock(%s)", (RUN_LOCK,)).fetchone() or (False,)
    if not free:
        raise ScoresError("people are being scored already, by another process; wait for it, or end it")


def champion(connection: psycopg.Connection) -> tuple[str, str] | None:
    """Version and path of what serves, or None."""
    row = connection.execute(statement("read_champion")).fetchone()
    return None if row is None or row[0] is None else (row[0], row[2])


def begin(
    connection: psycopg.Connection, version: str, candidates: int, kept: int, *, restart: bool, now: datetime
) -> Run:
    """The last run, if it was of this model and these sizes and did not finish; else a new one, which the ledger then has."""
    row = connection.execute(
        "SELECT run_id, started_at, finished_at, (model_version, candidates, kept) = (%s, %s, %s) FROM score_runs "
        "ORDER BY run_id DESC LIMIT 1",
        (version, candidates, kept),
    ).fetchone()
    if row is not None and row[2] is None and row[3] and not restart:
        scored, after = connection.execute(
            "SELECT count(*), max(user_id) FROM user_scores WHERE run_id = %s", (row[0],)
        ).fetchone() or (0, None)
        return Run(row[0], version, row[1], scored, after or "", resumed=True)
    made = connection.execute(
        "INSERT INTO score_runs (model_version, candidates, kept, started_at) VALUES (%s, %s, %s, %s) RETURNING run_id",
        (version, candidates, kept, now),
    ).fetchone()
    connection.commit()
    assert made is not None
    return Run(made[0], version, now)


def write(
    connection: psycopg.Connection, run: Run, at: datetime, users: Sequence[str], lists: Sequence[tuple[bytes, bytes]]
) -> int:
    """The lists of `users` as of `at`, each `packed`, in place of those before, in one transaction; gives how many.

    Whoever was forgotten, or asked to be, since they were read is left out. Raises ScoresError if another model serves
    by now: what this one says is not what people are shown.
    """
    with connection.transaction():
        # An erasure that is under way ends first, and its tombstone is seen by the next statement.
        connection.execute("SELECT pg_advisory_xact_lock_shared(%s)", (ERASURE_LOCK,))
        serving = champion(connection)
        if run.follows and (serving is None or serving[0] != run.version):
            raise ScoresError(
                f"model {run.version} no longer serves, {serving[0] if serving else 'none'} does; score again: what is "
                "there stays until it is written anew"
            )
        asked = {"users": list(users), "at": at, "unless_said": consent_default()}
        hidden = {row[0] for row in connection.execute(statement("hidden_people"), asked)}
        connection.execute("DELETE FROM user_scores WHERE user_id = ANY(%s::text[])", (list(users),))
        head = struct.pack(">h", 6)
        run_id, version = _field(struct.pack(">q", run.run_id)), _field(run.version.encode())
        instant = _field(struct.pack(">q", round((at - _EPOCH).total_seconds() * 1e6)))
        rows = [
            b"".join((head, _field(user.encode()), run_id, version, instant, *packed_lists))
            for user, packed_lists in zip(users, lists, strict=True)
            if user not in hidden
        ]
        with connection.cursor().copy(
            "COPY user_scores (user_id, run_id, model_version, scored_at, item_ids, scores) FROM STDIN (FORMAT binary)"
        ) as copy:
            copy.write(b"".join((_HEADER, *rows, _TRAILER)))
    return len(rows)


def finish(connection: psycopg.Connection, run: Run, scored: int, seconds: float, now: datetime) -> int:
    """Say in the ledger that the run is done, and drop the lists of those who are not there any more; gives how many."""
    with connection.transaction():
        gone = connection.execute("DELETE FROM user_scores WHERE run_id <> %s", (run.run_id,)).rowcount
        connection.execute(
            "UPDATE score_runs SET finished_at = %s, people = %s, seconds = %s WHERE run_id = %s",
            (now, scored, seconds, run.run_id),
        )
    return gone


def packed_ids(item_ids: Sequence[str]) -> list[bytes]:
    """Each id as an element of an array in binary."""
    return [struct.pack(">i", len(raw)) + raw for raw in (item.encode() for item in item_ids)]


def packed(items: list[int], scores: NDArray[np.float32], ids: Sequence[bytes]) -> tuple[bytes, bytes]:
    """The fields `item_ids` and `scores` of one person, `k` items by their numbers, `ids` from `packed_ids`."""
    reals = np.empty(len(items), _REALS)
    reals["bytes"], reals["value"] = 4, scores
    return (
        _field(_array(_TEXT, len(items)) + b"".join([ids[item] for item in items])),
        _field(_array(_REAL, len(items)) + reals.tobytes()),
    )


def _array(element: int, length: int) -> bytes:
    """The head of an array of one dimension; of none if it is empty, as Postgres has it."""
    return struct.pack(">iiiii", 1, 0, element, length, 1) if length else struct.pack(">iii", 0, 0, element)


def _field(value: bytes) -> bytes:
    return struct.pack(">i", len(value)) + value
