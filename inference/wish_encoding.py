"""The vector of a request's wish, begun before the person is read: the encoder works while the database does."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import copy_context
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from inference import wishes
from inference.deadline import MODEL_SHARE, Deadline
from inference.telemetry import span
from schemas import prompts
from schemas.errors import ArtifactError, DefinitionError, Unavailable

logger = logging.getLogger(__name__)

DEGRADED = "wish"
Vector = NDArray[np.float32]


class Encoder(Protocol):
    """What makes vectors of texts; see `inference.models.LoadedModels`."""

    def encode(self, text: str, left_ms: float, space: str | None = None) -> Vector: ...


class WishEncoding:
    """Encodes the wish of one request that `ends` some time."""

    def __init__(self, encoder: Encoder, ends: Deadline) -> None:
        self._encoder, self._ends = encoder, ends
        self._begun: tuple[tuple[str, str, str | None], _Begun] | None = None

    def begin(self, said: str, template: str, space: str | None) -> None:
        """Encode what was `said`, worded by `template`, in a thread of its own: most likely it is what will be wanted."""
        self._begun = (said, template, space), _Begun(lambda: self._encode(said, template, space))

    def vector(
        self,
        wish: wishes.ParsedWish | None,
        template: str,
        space: str | None,
        degraded: list[str],
        step: Callable[[str], AbstractContextManager[None]],
    ) -> Vector | None:
        """The wish `(384,)` as `template` words it, by the encoder of version `space`; timed as a `step`.

        None without one, and where it cannot be encoded in time, which `degraded` then names.
        """
        if wish is None:
            return None

        def encode(said: str) -> Vector:
            if self._begun is not None and self._begun[0] == (said, template, space):
                return self._begun[1].result(self._ends.share_ms(MODEL_SHARE))
            return self._encode(said, template, space)

        try:
            with step("encode wish"):
                return wishes.vector_of(wish, encode)
        except (ArtifactError, DefinitionError, Unavailable) as error:
            logger.error("a wish was not followed: %s", error)
            degraded.append(DEGRADED)
            return None

    def _encode(self, said: str, template: str, space: str | None) -> Vector:
        text = prompts.render_wish(prompts.load(template), said)
        with span("encode wish"):
            return self._encoder.encode(text, self._ends.share_ms(MODEL_SHARE), space)


class _Begun:
    """A vector that a thread is making, under the trace of whoever began it."""

    def __init__(self, make: Callable[[], Vector]) -> None:
        self._make = make
        self._vector: Vector | None = None
        self._error: Exception | None = None
        self._thread = threading.Thread(target=copy_context().run, args=(self._work,), name="larder-wish", daemon=True)
        self._thread.start()

    def result(self, wait_ms: float) -> Vector:
        """What was made, or what making it ended with; Unavailable if it takes longer."""
        self._thread.join(max(0.0, wait_ms) / 1_000)
        if self._error is not None:
            raise self._error
        if self._vector is None:
            raise Unavailable(f"encoding takes longer than the {wait_ms:.0f} ms that are left")
        return self._vector

    def _work(self) -> None:
        try:
            self._vector = self._make()
        except Exception as error:  # noqa: BLE001 - told to whoever asks for the result
            self._error = error
