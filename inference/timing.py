"""How long the steps of a request took, from the core up to the door that tells the caller (header `server-timing`)."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

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
