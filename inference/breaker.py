"""A breaker: what failed several times in a row is left alone for a moment, then tried by one request at a time.

Nygard, Release It!, 2nd ed., "Circuit Breaker". Closed: everybody asks. Open: nobody does, the answer is a refusal at once.
Half-open, when it has rested: the next request is the probe; its success closes the breaker, its failure lets it rest again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from schemas.errors import Unavailable

State = Literal["closed", "open", "half-open"]

FAILURES = 3
"""So many in a row open a breaker."""
REST_SECONDS = 1.0
"""So long an open one rests; no request waits longer than this for the first probe after a fault has ended."""


class Resting(Unavailable):
    """The breaker is open: nothing was asked."""


@dataclass(slots=True)
class Breaker:
    """Guards one dependency, called `name` in messages and metrics. Safe between threads.

    `judge` says of an error whether the dependency is well all the same (True), is not (False), or was not asked (None).
    """

    name: str
    judge: Callable[[Exception], bool | None] = lambda error: False
    failures: int = FAILURES
    rest_seconds: float = REST_SECONDS
    clock: Callable[[], float] = time.monotonic
    _failed: int = 0
    _rests_until: float | None = None
    _probing: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def state(self) -> State:
        """Where it stands now."""
        with self._lock:
            if self._rests_until is None:
                return "closed"
            return "open" if self.clock() < self._rests_until else "half-open"

    @contextmanager
    def call(self, *, conclusive: bool = True) -> Iterator[None]:
        """Around one call. Raises Resting, and the block is not run, while the dependency is left alone.

        A fault of a call that is not `conclusive`, because it had less time than any answer takes, proves nothing.
        """
        probe = self._enter()
        good: bool | None = None
        try:
            yield
            good = True
        except Exception as error:
            good = self.judge(error)
            if good is False and not conclusive:
                good = None
            raise
        finally:
            self._leave(probe, good)

    def reset(self) -> None:
        """Forget what was, as after a restore from a snapshot: it was learned from another machine's network."""
        with self._lock:
            self._failed, self._rests_until, self._probing = 0, None, False

    def _enter(self) -> bool:
        """Whether this call is the probe."""
        with self._lock:
            if self._rests_until is None:
                return False
            if self._probing or self.clock() < self._rests_until:
                raise Resting(f"{self.name} failed {self._failed} times in a row and is left alone for a moment")
            self._probing = True
            return True

    def _leave(self, probe: bool, good: bool | None) -> None:
        with self._lock:
            if probe:
                self._probing = False
            if good:
                self._failed, self._rests_until = 0, None
            elif good is False:
                self._failed += 1
                if probe or self._failed >= self.failures:
                    self._rests_until = self.clock() + self.rest_seconds
