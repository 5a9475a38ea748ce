"""The log of what was served, written after the answer: what every recommendation showed, and of a sample of people the
feature vectors that were read for it, for the skew audit.

A request only hands over what it has; one thread makes rows of it and writes them in batches. Both lanes of its queue are
bounded: what does not fit, or cannot be written, is counted and dropped. What was shown waits while the database is away.
No request waits for it or fails because of it.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Generic, TypeVar

import psycopg

from inference.connections import StatementFailed
from inference.features import FeatureBlock, Key, block_of
from inference.live import Columns
from inference.served_request import ServedRequest
from inference.store import Store
from schemas.errors import LarderError, Unavailable
from schemas.features import FeatureView
from schemas.views import CANDIDATE_VIEWS, CONTEXT_VIEWS, CROSS_VIEWS, fingerprint

logger = logging.getLogger(__name__)

Entry = TypeVar("Entry")

READS_WAITING = 256
REQUESTS_WAITING = 2_048
"""So many of each may wait: a read holds a request's features, a request a few kilobytes."""
_BATCH = 32
_WRITE_MS = 5_000
_GATHER_SECONDS = 0.05
_RETRY_SECONDS = (0.2, 0.5, 1.0, 2.0, 5.0)
"""Pauses between tries while the database is away."""
_OF_A_ROW = ("22", "23")
"""Classes of SQLSTATE that one row may be to blame for: data exception, integrity constraint violation."""
_PASSES = ("25", "40", "53", "55")
"""Those that pass by themselves: read-only since a failover, rolled back, out of resources, in use."""


@dataclass(frozen=True, slots=True)
class ServedRead:
    """One request's reads: `views` of the person, `features` of the candidates, and what the answer shows of those."""

    request_id: str
    user_id: str
    at: datetime
    views: dict[str, Columns]
    features: Columns
    item_ids: Sequence[str]
    categories: Sequence[Sequence[str]]

    def rows(self) -> list[dict[str, object]]:
        """One row of `served_features` per view: the vectors of the person and of the items that were shown.

        Of views by person and category, those of the items' categories and all others that there are, before they are
        averaged over an item's categories: that is the same code everywhere (`inference.assemble.crossed`).
        """
        read_id = uuid.uuid4().hex
        asked: list[tuple[FeatureView, Columns, list[Key]]] = []
        asked += [(view, self.views[view.name], [(self.user_id,)]) for view in CONTEXT_VIEWS]
        asked += [(view, self.features, [(item_id,) for item_id in self.item_ids]) for view in CANDIDATE_VIEWS]
        shown = {(self.user_id, category) for categories in self.categories for category in categories}
        asked += [
            (view, self.views[view.name], sorted(shown | set(self.views[view.name].keys))) for view in CROSS_VIEWS
        ]
        rows = []
        for view, columns, keys in asked:
            if keys:
                block = block_of(view, keys, self.at, columns, encoded=True)
                rows.append(self._row(read_id, block, columns))
        return rows

    def _row(self, read_id: str, block: FeatureBlock, columns: Columns) -> dict[str, object]:
        partition = None
        if columns.settled_at is not None:
            partition = (datetime.fromtimestamp(columns.settled_at, UTC) - timedelta(days=1)).date().isoformat()
        return {
            "read_id": read_id,
            "view": block.view.name,
            "request_id": self.request_id,
            "user_id": self.user_id,
            "read_at": self.at.isoformat(),
            "seen": columns.seen,
            "definition_hash": fingerprint((block.view,)),
            "partition_date": partition,
            "features": list(block.names),
            "keys": [part for key in block.keys for part in key],
            "numbers": [
                float(value) if valid else None
                for value, valid in zip(block.values.ravel().tolist(), block.valid.ravel().tolist(), strict=True)
            ],
        }


@dataclass(slots=True)
class Lane(Generic[Entry]):
    """What waits of one kind, and what became of the rest."""

    name: str
    capacity: int
    written: int = 0
    dropped: int = 0
    """What found the queue full."""
    failed: int = 0
    """What could not be written."""
    waiting: int = 0
    """Handed over, and neither written nor failed."""
    queued: deque[Entry] = field(default_factory=deque)

    def take(self) -> list[Entry]:
        """The next batch, out of the queue."""
        return [self.queued.popleft() for _ in range(min(_BATCH, len(self.queued)))]


class ServedLog:
    """Writes what was served to `store`: all requests, and the reads of `per_mille` of 1,000 people. Safe between threads."""

    def __init__(
        self, store: Store, per_mille: int, capacity: int = READS_WAITING, requests: int = REQUESTS_WAITING
    ) -> None:
        self.store = store
        self.per_mille = per_mille
        self.reads: Lane[ServedRead] = Lane("reads were not logged for the skew audit", capacity)
        self.requests: Lane[ServedRequest] = Lane("answers were not logged", requests)
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._hurry = False
        self._tries = 0
        """How often the database was found to be away."""
        self._told = 0

    # What is known of the reads, by the names that their metrics have.
    @property
    def written(self) -> int:
        return self.reads.written

    @property
    def dropped(self) -> int:
        return self.reads.dropped

    @property
    def failed(self) -> int:
        return self.reads.failed

    @property
    def waiting(self) -> int:
        """Reads that are not written yet."""
        return self.reads.waiting

    def samples(self, user_id: str) -> bool:
        """Whether this person's reads are logged: the same people always, whatever process answers."""
        if not self.per_mille:
            return False
        digest = hashlib.blake2b(user_id.encode("utf-8", "surrogatepass"), digest_size=8, person=b"skew-audit").digest()
        return int.from_bytes(digest) % 1_000 < self.per_mille

    def offer(self, entry: ServedRead | ServedRequest) -> None:
        """Hand over a read or an answer to be written; never waits."""
        lane: Lane[Any] = self.requests if isinstance(entry, ServedRequest) else self.reads
        with self._changed:
            if len(lane.queued) >= lane.capacity or self._closed:
                lane.dropped += 1
                return
            lane.queued.append(entry)
            lane.waiting += 1
            self._changed.notify_all()
            # Started with the first entry, not before: a process may be frozen or forked until then.
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._work, name="larder-served-log", daemon=True)
                self._thread.start()

    def flush(self, timeout_ms: float) -> bool:
        """Wait until everything handed over is written, at most `timeout_ms`; False if it takes longer, or if the database
        is found to be away meanwhile."""
        with self._changed:
            tries, self._hurry = self._tries, True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._unwritten() or self._tries > tries, timeout_ms / 1_000)
            return not self._unwritten()

    def close(self, timeout_ms: float = 1_000) -> None:
        """Write what waits, end the thread and let go of the connection."""
        self.flush(timeout_ms)
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self.store.close()

    def _unwritten(self) -> int:
        return self.reads.waiting + self.requests.waiting

    def _work(self) -> None:
        away = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self.reads.queued or self.requests.queued)
                # A little later more have come, and are written with it; unless somebody waits for it.
                self._changed.wait_for(
                    lambda: self._closed or self._hurry or len(self.requests.queued) >= _BATCH, _GATHER_SECONDS
                )
                if self._closed:
                    return
                self._hurry = False
                reads, requests = self.reads.take(), self.requests.take()
            if reads:
                self._write_reads(reads)
            left = self._write_requests(requests)
            away = away + 1 if left else 0
            if left:
                with self._changed:
                    # In their old place: what was shown first is written first.
                    self.requests.queued.extendleft(reversed(left))
                    self._tries += 1
                    self._changed.notify_all()
                    pause = _RETRY_SECONDS[min(away, len(_RETRY_SECONDS)) - 1]
                    self._changed.wait_for(lambda: self._closed or self._hurry, pause)

    def _write_reads(self, batch: list[ServedRead]) -> None:
        before = self.reads.dropped
        try:
            rows = [row for read in batch for row in read.rows()]
            self._twice(lambda: self.store.log_served(rows, _WRITE_MS))
            self._settle(self.reads, written=len(batch))
        except Exception as error:  # noqa: BLE001 - a log must not end with the thread that writes it
            self._settle(self.reads, failed=len(batch), error=error)
        if before:
            logger.warning("%d reads were dropped from the skew audit's log so far: its queue was full", before)

    def _write_requests(self, batch: list[ServedRequest]) -> list[ServedRequest]:
        """What of `batch` is to be tried again, because the database is away. Repeating changes nothing: a row that is
        there, whoever wrote it and whatever became of that answer, stays as it is."""
        if not batch:
            return []
        dropped = self.requests.dropped
        if dropped > self._told:
            logger.warning("%d answers were dropped from the served log so far: its queue was full", dropped)
            self._told = dropped
        try:
            rows = [request.row() for request in batch]
            self._twice(lambda: self.store.log_served_requests(rows, _WRITE_MS))
            self._settle(self.requests, written=len(batch))
        except StatementFailed as error:
            kind = (error.__cause__.sqlstate or "")[:2] if isinstance(error.__cause__, psycopg.Error) else ""
            if kind in _PASSES:
                return batch
            if len(batch) == 1 or kind not in _OF_A_ROW:
                self._settle(self.requests, failed=len(batch), error=error)
                return []
            # One row that the database cannot take must not cost the others.
            middle = len(batch) // 2
            return self._write_requests(batch[:middle]) + self._write_requests(batch[middle:])
        except Unavailable:
            return batch
        except Exception as error:  # noqa: BLE001 - a log must not end with the thread that writes it
            self._settle(self.requests, failed=len(batch), error=error)
        return []

    @staticmethod
    def _twice(write: Callable[[], object]) -> None:
        try:
            write()
        except StatementFailed:
            raise  # it would be refused again
        except Unavailable:
            # A connection may have died while the process was frozen; every row is written once all the same.
            write()

    def _settle(self, lane: Lane[Any], *, written: int = 0, failed: int = 0, error: Exception | None = None) -> None:
        with self._changed:
            lane.written += written
            lane.failed += failed
            lane.waiting -= written + failed
            self._changed.notify_all()
        if error is not None:
            # A driver's message may quote the row: what happened is said by the error's type.
            reason = str(error) if isinstance(error, LarderError) else type(error).__name__
            logger.warning("%d %s: %s", failed, lane.name, reason)
