"""Shadows: what arms with share 0 would have answered, computed after the answer and shown to nobody.

One thread works them off, over a connection of its own. Its queue is short: under load shadows are dropped and counted,
requests are not slowed down.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from schemas.errors import LarderError

logger = logging.getLogger(__name__)

WAITING = 16
"""So many may wait; each holds a request."""


@dataclass(slots=True)
class Shadows:
    """A bounded queue of shadows to compute and the thread that does. Safe between threads."""

    capacity: int = WAITING
    done: int = 0
    dropped: int = 0
    """What found the queue full."""
    failed: int = 0
    _queued: deque[Callable[[], None]] = field(default_factory=deque)
    _waiting: int = 0
    _closed: bool = False
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _thread: threading.Thread | None = None

    def offer(self, compute: Callable[[], None]) -> None:
        """Call `compute` later; never waits."""
        with self._changed:
            if self._closed or len(self._queued) >= self.capacity:
                self.dropped += 1
                return
            self._queued.append(compute)
            self._waiting += 1
            self._changed.notify_all()
            # Started with the first shadow, not before: a process may be frozen or forked until then.
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._work, name="larder-shadows", daemon=True)
                self._thread.start()

    def flush(self, timeout_ms: float) -> bool:
        """Wait until all are computed, at most `timeout_ms`; False if it takes longer."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting, timeout_ms / 1_000)

    def close(self) -> None:
        """Drop what waits and end the thread."""
        with self._changed:
            self._closed = True
            self.dropped += len(self._queued)
            self._waiting -= len(self._queued)
            self._queued.clear()
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._queued)
                if self._closed:
                    return
                compute = self._queued.popleft()
            failed = True
            try:
                compute()
                failed = False
            except Exception as error:  # noqa: BLE001 - one that fails must not end the thread
                reason = str(error) if isinstance(error, LarderError) else type(error).__name__
                logger.warning("a shadow was not computed: %s", reason)
            with self._changed:
                self.failed += failed
                self.done += not failed
                self._waiting -= 1
                self._changed.notify_all()
