"""Values that take long to make, made beside the requests: whoever needs one waits no longer than they can."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from copy import copy
from typing import Generic, TypeVar

from schemas.errors import ArtifactError, LarderError, StoreUnavailable, Unavailable

logger = logging.getLogger(__name__)

T = TypeVar("T")

REFUSED_SECONDS = 30.0
"""A thing that was refused (changed, of another shape) is looked at again so much later: somebody may have mended it."""
OUTAGE_SECONDS = 1.0
"""A place that could not be reached is tried again so much later."""


class Loading(Generic[T]):
    """One value, called `name`, that `load` makes in a thread of its own when it is first asked for."""

    def __init__(self, name: str, load: Callable[[], T]) -> None:
        self.name = name
        self._load = load
        self._changed = threading.Condition()
        self._value: T | None = None
        self._error: Exception | None = None
        self._failed_at = 0.0
        self._running = False

    def peek(self) -> T | None:
        """The value if it is there; never waits."""
        return self._value

    def error(self) -> Exception | None:
        """What the last attempt ended with, None before one has failed."""
        return self._error

    def start(self) -> None:
        """Begin, unless it is there, under way, or failed a moment ago."""
        with self._changed:
            if self._value is not None or self._running or self._rests():
                return
            self._running = True
        threading.Thread(target=self._work, name=f"larder-load-{self.name}", daemon=True).start()

    def get(self, wait_ms: float) -> T:
        """The value, waited for at most `wait_ms`.

        Raises what the attempt ended with, or Unavailable if it takes longer; the attempt goes on.
        """
        if self._value is not None:
            return self._value
        self.start()
        with self._changed:
            self._changed.wait_for(lambda: not self._running, max(0.0, wait_ms) / 1_000)
            if self._value is not None:
                return self._value
            if self._running or self._error is None:
                raise Unavailable(f"{self.name} is still being loaded")
            # Not that one: each time an exception is raised its traceback grows, by frames that hold a request's arrays.
            raise copy(self._error) from self._error

    def _rests(self) -> bool:
        if self._error is None:
            return False
        outage = isinstance(self._error, StoreUnavailable | Unavailable)
        return time.monotonic() - self._failed_at < (OUTAGE_SECONDS if outage else REFUSED_SECONDS)

    def _work(self) -> None:
        value: T | None = None
        error: Exception | None = None
        try:
            value = self._load()
        except ArtifactError as refused:
            logger.error("%s cannot be used: %s", self.name, refused)
            error = refused
        except Unavailable as later:
            error = later
        except Exception as failed:  # noqa: BLE001 - a thread that dies would leave the waiting ones without a reason
            logger.error("%s cannot be loaded: %s", self.name, _shown(failed))
            error = ArtifactError(f"{self.name} cannot be loaded ({type(failed).__name__}); release again")
        with self._changed:
            self._value, self._error, self._failed_at, self._running = value, error, time.monotonic(), False
            self._changed.notify_all()


def _shown(error: Exception) -> str:
    return str(error) if isinstance(error, LarderError) else type(error).__name__
