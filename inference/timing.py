"""How long the steps of a request took, from the core up to the door that tells the caller (header `server-timing`)."""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

_collected: ContextVar[dict[str, float] | None] = ContextVar("larder_step_ms", default=None)


@contextmanager
def collected() -> Generator[dict[str, float]]:
    """Milliseconds by step of what is answered inside, in the order of the steps; empty where nothing is told."""
    ms: dict[str, float] = {}
    token = _collected.set(ms)
    try:
        yield ms
    finally:
        _collected.reset(token)


def tell(ms: Mapping[str, float]) -> None:
    """The core's side: what the steps took; dropped where nobody collects."""
    kept = _collected.get()
    if kept is not None:
        kept.update(ms)


def header(ms: Mapping[str, float], total_ms: float) -> str:
    """The value of `server-timing` (W3C Server Timing): each step and the whole; a name may hold no space."""
    steps = [f"{name.replace(' ', '_')};dur={value:.2f}" for name, value in ms.items()]
    return ", ".join([*steps, f"total;dur={total_ms:.2f}"])


@dataclass(slots=True)
class Steps:
    """Where a request's time went: milliseconds per step, in order. What is done within another step counts for itself alone."""

    ms: dict[str, float] = field(default_factory=dict)
    _inside: float = 0.0
    """Milliseconds of the steps within the present one."""

    @contextmanager
    def step(self, name: str) -> Generator[None]:
        start, before, self._inside = time.perf_counter(), self._inside, 0.0
        try:
            yield
        finally:
            took = (time.perf_counter() - start) * 1000
            self.ms[name] = self.ms.get(name, 0.0) + took - self._inside
            self._inside = before + took
