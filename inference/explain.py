"""Reasons in plain words: which past events, which wish and which source brought an item into the list."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from inference.candidates import SOURCES
from inference.store import History

MOST_REASONS = 3
LIKE_ENOUGH = 0.3
"""Below this cosine in item space two items have nothing to do with each other."""


def reasons(
    vector: NDArray[np.float32],
    sources: int,
    history: History,
    wish: float,
    *,
    past: NDArray[np.float32],
    past_rows: list[int],
) -> tuple[str, ...]:
    """Up to three reasons for one item, the most telling first.

    `vector (d,)` is the item's; `past (m, d)` the vectors of the history rows `past_rows`; `wish` the cosine of
    the wish's text and the item's, 0 without one.
    """
    found: list[tuple[float, str]] = []
    if wish >= LIKE_ENOUGH:
        found.append((wish + 0.2, f"fits your wish ({wish:.0%})"))
    if len(past_rows) and vector.any():
        likeness = past @ vector
        nearest = int(np.argmax(likeness))
        if (match := float(likeness[nearest])) >= LIKE_ENOUGH:
            row = past_rows[nearest]
            found.append((match, f"like “{history.titles[row]}”{_said(history.kinds[row], history.values[row])}"))
    if sources & SOURCES["co_visitation"]:
        found.append((0.35, "people who had your last items went on to it"))
    if sources & SOURCES["trending"]:
        found.append((0.1, "trending this week"))
    if sources & SOURCES["fresh"]:
        found.append((0.15, "new"))
    if sources & SOURCES["ahead"]:
        found.append((0.05, "chosen for you a while ago"))
    found.sort(key=lambda entry: -entry[0])
    return tuple(text for _, text in found[:MOST_REASONS]) or ("popular",)


def _said(kind: str, value: float | None) -> str:
    if kind == "rating" and value is not None:
        return f", which you gave {value:g}"
    return {"like": ", which you liked", "purchase": ", which you bought"}.get(kind, ", which you had")
