"""The time a request has: one instant, spent step by step, so that what comes after a slow step still has some left."""

from __future__ import annotations

import time
from dataclasses import dataclass

from schemas.errors import Unavailable

READ_SHARE = 0.5
"""Of the time left, what the first question to the database may take. A healthy one needs a few milliseconds of it."""
MODEL_SHARE = 0.5
"""What a request may wait for a model, an encoder or a list that is being loaded and has never been there."""
CANDIDATES_SHARE = 0.6
"""What the candidates may take; the rest is for the rung below them."""
FLOOR_SHARE = 0.9
"""What the last question to the database may take: a list in memory needs no more than the rest."""


@dataclass(frozen=True, slots=True)
class Deadline:
    """An instant of `time.monotonic()` by which the answer must be there."""

    end: float

    @classmethod
    def after(cls, milliseconds: float) -> Deadline:
        """The deadline so far ahead; one that is not is over at once."""
        return cls(time.monotonic() + milliseconds / 1_000)

    def left_ms(self) -> float:
        """Milliseconds that are left, negative once it has passed."""
        return (self.end - time.monotonic()) * 1_000

    def share_ms(self, share: float) -> float:
        """Milliseconds that one step may take, `share` of what is left. Raises Unavailable if nothing is left."""
        left = self.left_ms()
        if left <= 0:
            raise Unavailable("the deadline passed before the database could be asked")
        return left * share


class Pace:
    """How long a step that cannot be interrupted has lately taken, so that it is not begun when it would come too late."""

    __slots__ = ("_ms",)

    def __init__(self) -> None:
        self._ms = 0.0

    def took(self, milliseconds: float) -> None:
        """Learn from one run."""
        self._ms += (milliseconds - self._ms) * (0.2 if self._ms else 1.0)

    def fits(self, left_ms: float) -> bool:
        """Whether it would be done within `left_ms`. Each refusal lowers what is believed: one slow run must not
        keep it from ever being tried again."""
        if self._ms < left_ms:
            return True
        self._ms *= 0.9
        return False
