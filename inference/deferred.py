"""Work that may wait until the answer is out: handed over in a microsecond, done in order by one thread."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)

CAPACITY = 20_000
"""So many pieces may wait; what comes then is dropped and counted."""
PAUSE_SECONDS = 0.5
"""The thread lets work gather before it begins: at one go it costs the requests beside it less than in many small ones."""
CROWD = 2_000
"""With so many pieces waiting it begins at once."""
_SLICE = 8
"""So many pieces at a time, then whoever waits for the interpreter gets it."""


class Deferred:
    """A bounded queue of calls and the thread that makes them. Safe between threads, and after a fork."""

    def __init__(self) -> None:
        self._queue: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._draining = threading.Lock()
        self._starting = threading.Lock()
        self._wake = threading.Event()
        self._crowded = threading.Event()
        self._thread: threading.Thread | None = None
        self.dropped = 0

    def add(self, work: Callable[..., None], *arguments: Any) -> None:
        """Call `work(*arguments)` a little later; never waits."""
        if len(self._queue) >= CAPACITY:
            self.dropped += 1
            return
        self._queue.append((work, arguments))
        if len(self._queue) == CROWD:
            self._crowded.set()
        if not self._wake.is_set():
            self._wake.set()
            # Started with the first piece, not before: a process may be frozen or forked until then.
            if self._thread is None or not self._thread.is_alive():
                self._start()

    def drain(self) -> None:
        """Do what waits now."""
        done = 0
        with self._draining:
            while True:
                try:
                    work, arguments = self._queue.popleft()
                except IndexError:
                    break
                try:
                    work(*arguments)
                except Exception as error:  # noqa: BLE001 - one that fails must not end the thread or the flush
                    logger.warning("a piece of telemetry was lost: %s", type(error).__name__)
                done += 1
                if done % _SLICE == 0:
                    time.sleep(0)
            if self.dropped:
                logger.warning("%d pieces of telemetry were lost: more came than could be worked off", self.dropped)
                self.dropped = 0

    def _start(self) -> None:
        with self._starting:
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._work, name="larder-telemetry", daemon=True)
                self._thread.start()

    def _work(self) -> None:
        while True:
            self._wake.wait()
            self._crowded.wait(PAUSE_SECONDS)
            self._wake.clear()
            self._crowded.clear()
            self.drain()
