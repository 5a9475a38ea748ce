"""Words about long work while it goes on."""

from __future__ import annotations

import time
from collections.abc import Callable

Say = Callable[[str], None]

PAUSE_SECONDS = 15.0


def silent(_: str) -> None:
    """For whoever wants no words."""


def now_and_then(say: Say, pause_seconds: float = PAUSE_SECONDS) -> Say:
    """`say` for a loop: the first line so long after now, and none sooner than that after another."""
    told = time.monotonic()

    def tell(message: str) -> None:
        nonlocal told
        if (now := time.monotonic()) - told >= pause_seconds:
            told = now
            say(message)

    return tell
