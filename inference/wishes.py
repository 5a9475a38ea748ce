"""A wish as it was understood, and what it does to one request: the text that is encoded, and filters that narrow it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from inference.candidates import Filters
from schemas.errors import Unavailable

logger = logging.getLogger(__name__)

DEGRADED = "wish-parser"
AVOID_WEIGHT = 0.25
"""Rocchio's weight of what is not wanted (Rocchio 1971; Manning et al. 2008, 9.1.1: 0.15 to 0.25 of that of what is)."""
FIRST_YEAR, LAST_YEAR = 1000, 9999

Vector = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class ParsedWish:
    """What a wish asks of the catalogue. `years` are the first and the last, either None for open; `by` names the template
    that a language model read it with, empty for a wish as it was said."""

    look_for: str
    avoid: tuple[str, ...] = ()
    years: tuple[int | None, int | None] | None = None
    genres: tuple[str, ...] = ()
    negations: tuple[str, ...] = ()
    by: str = ""


class Parser(Protocol):
    """What reads wishes; see inference/wish_parser.py."""

    def parse(self, wish: str, left_ms: float) -> ParsedWish:
        """Raises Unavailable where the plain path is to be taken."""


def understood(
    parser: Parser | None,
    wish: str | None,
    left_ms: float,
    degraded: list[str],
    step: Callable[[str], AbstractContextManager[None]] = lambda _: nullcontext(),
) -> ParsedWish | None:
    """`wish` as `parser` reads it, timed as a `step`; without one, or where it does not manage, as it was said."""
    if wish is None:
        return None
    if parser is not None:
        try:
            with step("read wish"):
                return parser.parse(wish, left_ms)
        except Unavailable as error:
            logger.info("a wish is taken as it was said: %s", error)
            degraded.append(DEGRADED)
    return ParsedWish(wish)


def vector_of(wish: ParsedWish, encode: Callable[[str], Vector]) -> Vector | None:
    """The wish `(384,)`, moved away from what it is to avoid and again of length 1; None if it looks for nothing."""
    if not wish.look_for:
        return None
    wanted = encode(wish.look_for)
    if not wish.avoid:
        return wanted
    moved = wanted - AVOID_WEIGHT * np.mean([encode(text) for text in wish.avoid], axis=0)
    length = float(np.linalg.norm(moved))
    return (moved / length).astype(np.float32) if length > 1e-6 else wanted


def narrowed(filters: Filters, wish: ParsedWish | None) -> Filters:
    """The caller's `filters`, narrowed by the wish: it never lets in what the caller keeps out."""
    if wish is None:
        return filters
    categories: Sequence[str] | None = filters.categories
    if wish.genres:
        # A wish for what the caller has ruled out cannot be followed; what the caller rules stays.
        both = [name for name in wish.genres if categories is None or name in categories]
        categories = both or categories
    return replace(
        filters,
        categories=categories,
        exclude_categories=list(dict.fromkeys([*filters.exclude_categories, *wish.negations])),
        years=wish.years,
    )


def version_of(template: str, wish: ParsedWish | None, encoded: bool) -> str | None:
    """What an answer names as its prompt's version: the wording that was encoded, and the one it was read with."""
    if wish is None:
        return None
    return "+".join(filter(None, [template if encoded else "", wish.by])) or None
