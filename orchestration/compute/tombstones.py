"""Who was forgotten, known only by a keyed hash: what keeps their events from coming back, and the erasure lock.

Everything that could bring a person back holds the lock shared while it writes; an erasure holds it alone. What was
computed from the lake before an erasure and is written after it is refused by `no_erasure_since`.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import duckdb
import psycopg
import pyarrow as pa

from schemas.errors import LarderError
from schemas.online_sql import ERASURE_LOCK

_ESCAPE = re.compile(r'\\(?:u([0-9a-fA-F]{4})|x([0-9a-fA-F]{2})|([\\/"\']))')


class Overtaken(LarderError):
    """Somebody was forgotten while this was being computed: compute it again."""

    type = "overtaken"


@dataclass(frozen=True, slots=True)
class Tombstones:
    """The people who were forgotten, by HMAC of their ids."""

    key: bytes
    forgotten_at: dict[bytes, datetime]
    lengths: frozenset[int]
    """How many characters their ids have."""

    def __bool__(self) -> bool:
        return bool(self.forgotten_at)

    def since(self, user_id: str) -> datetime | None:
        """The moment up to which nothing of `user_id` is taken; None if they were not forgotten."""
        return self.forgotten_at.get(hmac.digest(self.key, user_id.encode(), "sha256")) if self else None

    def named_in(self, text: str) -> bool:
        """Whether a piece of `text` that stands by itself is the id of somebody who was forgotten."""
        return any(
            self.since(piece) is not None
            for reading in readings(text)
            for length in self.lengths
            for piece in _pieces(reading, length)
        )


def read_tombstones(connection: psycopg.Connection[Any]) -> Tombstones:
    """All tombstones, as of now."""
    rows = connection.execute("SELECT user_hash, user_chars, forgotten_at FROM tombstones").fetchall()
    if not rows:
        return Tombstones(b"", {}, frozenset())
    (inner,) = connection.execute("SELECT inner_pad FROM erasure_key").fetchone() or (b"",)
    key = bytes(byte ^ 0x36 for byte in inner)
    return Tombstones(key, {bytes(found): at for found, _, at in rows}, frozenset(chars for _, chars, _ in rows))


def leave_out_forgotten(tombstones: Tombstones, duck: duckdb.DuckDBPyConnection, events: str, kept: str) -> int:
    """Make `kept` a view of the relation `events` without what was forgotten; returns how many rows it has."""
    blocked: list[tuple[str, datetime]] = []
    if tombstones:
        for (user_id,) in duck.execute(f"SELECT DISTINCT user_id FROM {events}").fetchall():
            if (since := tombstones.since(user_id)) is not None:
                blocked.append((user_id, since))
    duck.register(
        "forgotten_people",
        pa.table(
            {
                "user_id": pa.array([user_id for user_id, _ in blocked], pa.string()),
                "forgotten_at": pa.array([since for _, since in blocked], pa.timestamp("us", tz="UTC")),
            }
        ),
    )
    duck.execute(
        f"CREATE OR REPLACE TEMP VIEW {kept} AS SELECT e.* FROM {events} AS e ANTI JOIN forgotten_people AS f "
        "ON f.user_id = e.user_id AND e.occurred_at <= f.forgotten_at"
    )
    [(rows,)] = duck.execute(f"SELECT count(*) FROM {kept}").fetchall()
    return int(rows)


def names(text: str, user_id: str) -> bool:
    """Whether `user_id` stands in `text` by itself, also with its characters escaped as JSON or Python write them."""
    return any(user_id in _pieces(reading, len(user_id)) for reading in readings(text))


def readings(text: str) -> set[str]:
    """`text`, and what it says once backslash escapes are resolved."""

    def resolve(found: re.Match[str]) -> str:
        code = found[1] or found[2]
        return chr(int(code, 16)) if code else str(found[3])

    return {text, _ESCAPE.sub(resolve, text)}


def hold_off_erasures(connection: psycopg.Connection[Any]) -> None:
    """No erasure until the transaction ends; waits for one that is under way."""
    connection.execute("SELECT pg_advisory_xact_lock_shared(%s)", (ERASURE_LOCK,))


def erase_alone(connection: psycopg.Connection[Any]) -> None:
    """Until the transaction ends nothing that could bring a person back is written; waits for what is."""
    connection.execute("SELECT pg_advisory_xact_lock(%s)", (ERASURE_LOCK,))


def count_erasures(connection: psycopg.Connection[Any]) -> int:
    """How many erasures there have been: grows with each."""
    (count,) = connection.execute("SELECT count(*) FROM erasure_receipts").fetchone() or (0,)
    return int(count)


@contextmanager
def no_erasure_since(connection: psycopg.Connection[Any], seen: int) -> Iterator[None]:
    """Write here what was read when there had been `seen` erasures. Raises Overtaken if there was another since."""
    with connection.transaction():
        hold_off_erasures(connection)
        if count_erasures(connection) != seen:
            raise Overtaken("somebody was forgotten while this was computed from what was there before; run it again")
        yield


def _pieces(text: str, length: int) -> Iterator[str]:
    """Pieces of `length` characters with no letter or digit right before or after them."""
    for start in range(len(text) - length + 1):
        end = start + length
        if (start == 0 or not text[start - 1].isalnum()) and (end == len(text) or not text[end].isalnum()):
            yield text[start:end]
