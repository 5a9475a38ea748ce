"""What was served to a sample of people: their feature vectors, written after the answer, for the skew audit.

A request only hands over what it has read; a thread makes rows of it and writes them in batches. The queue is bounded:
what does not fit, or cannot be written, is counted and dropped. No request waits for it or fails because of it.
"""

from __future__ import annotations

import hashlib
import logging
import queue
import threading
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from inference.features import FeatureBlock, Key, block_of
from inference.live import Columns
from inference.store import Store
from schemas.errors import LarderError, Unavailable
from schemas.features import FeatureView
from schemas.views import CANDIDATE_VIEWS, CONTEXT_VIEWS, CROSS_VIEWS, fingerprint

logger = logging.getLogger(__name__)

_BATCH = 32
_WRITE_MS = 5_000


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
class ServedLog:
    """Writes reads to `store`, those of `per_mille` of 1,000 people, at most `capacity` waiting. Safe between threads."""

    store: Store
    per_mille: int
    capacity: int = 256
    written: int = 0
    dropped: int = 0
    """Reads that found the queue full."""
    failed: int = 0
    """Reads that could not be written."""
    _queue: queue.Queue[ServedRead] = field(init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _thread: threading.Thread | None = None

    def __post_init__(self) -> None:
        self._queue = queue.Queue(self.capacity)

    @property
    def waiting(self) -> int:
        """Reads that are not written yet."""
        return self._queue.unfinished_tasks

    def samples(self, user_id: str) -> bool:
        """Whether this person's reads are logged: the same people always, whatever process answers."""
        if not self.per_mille:
            return False
        digest = hashlib.blake2b(user_id.encode("utf-8", "surrogatepass"), digest_size=8, person=b"skew-audit").digest()
        return int.from_bytes(digest) % 1_000 < self.per_mille

    def offer(self, read: ServedRead) -> None:
        """Hand over a read to be written; never waits."""
        try:
            self._queue.put_nowait(read)
        except queue.Full:
            with self._lock:
                self.dropped += 1
            return
        # Started with the first read, not before: a process may be frozen or forked until then.
        if self._thread is None or not self._thread.is_alive():
            with self._lock:
                if self._thread is None or not self._thread.is_alive():
                    self._thread = threading.Thread(target=self._work, name="larder-served-log", daemon=True)
                    self._thread.start()

    def flush(self, timeout_ms: float) -> bool:
        """Wait until everything handed over is written, at most `timeout_ms`; False if it takes longer."""
        done = self._queue.all_tasks_done
        with done:
            return done.wait_for(lambda: not self._queue.unfinished_tasks, timeout_ms / 1_000)

    def close(self, timeout_ms: float = 1_000) -> None:
        """Write what waits and let go of the connection."""
        self.flush(timeout_ms)
        self.store.close()

    def _work(self) -> None:
        while True:
            batch = [self._queue.get()]
            while len(batch) < _BATCH:
                try:
                    batch.append(self._queue.get_nowait())
                except queue.Empty:
                    break
            try:
                self._write(batch)
            finally:
                for _ in batch:
                    self._queue.task_done()

    def _write(self, batch: list[ServedRead]) -> None:
        before = self.dropped
        try:
            rows = [row for read in batch for row in read.rows()]
            try:
                self.store.log_served(rows, _WRITE_MS)
            except Unavailable:
                # A connection may have died while the process was frozen; every row is written once all the same.
                self.store.log_served(rows, _WRITE_MS)
            self.written += len(batch)
        except Exception as error:  # noqa: BLE001 - a log must not end with the thread that writes it
            self.failed += len(batch)
            # A driver's message may quote the row: what happened is said by the error's type.
            reason = str(error) if isinstance(error, LarderError) else type(error).__name__
            logger.warning("%d reads were not logged for the skew audit: %s", len(batch), reason)
        if before:
            logger.warning("%d reads were dropped from the skew audit's log so far: its queue was full", before)
