"""Rows sorted by key and by instant, for finding windows among them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


class Order:
    """`n` rows sorted by key and by instant, for finding a place among them. `rows (n,)` says which row is where.

    A row's code holds its key above its instant, counted from the first; where both do not fit into one number, above the
    instant's rank.
    """

    def __init__(self, key: Ints, instant: Ints) -> None:
        self._low, self._last = (int(instant.min()), int(instant.max())) if len(key) else (0, 0)
        self._bits = (self._last - self._low + 1).bit_length()
        self._instants: Ints | None = None
        if self._bits + int(key.max(initial=0)).bit_length() > 62:
            self._instants, self._bits = np.sort(instant), len(key).bit_length()
        code = key << self._bits
        code += instant - self._low if self._instants is None else np.searchsorted(self._instants, instant)
        self.rows: Ints = np.argsort(code)
        self._codes = code[self.rows]

    def rank(self, instant: Ints) -> Ints:
        """What is above the rows of any key that are at `instant (m,)` or before it, and not above later ones."""
        if self._instants is not None:
            return np.searchsorted(self._instants, instant, side="right")
        return np.clip(instant, self._low - 1, self._last) - (self._low - 1)

    def place(self, key: Ints, rank: Ints) -> Ints:
        """For `key (m,)`: how many rows are of a lower key, or of this one and below `rank (m,)`."""
        return np.searchsorted(self._codes, (key << self._bits) + rank)

    def in_order(self, key: Ints, instant: Ints) -> tuple[Ints, Ints]:
        """`(m,)` the numbers of `key`, `instant (m,)` by key and `rank`, and in that order `place` of each."""
        codes = (key << self._bits) + self.rank(instant)
        order = np.argsort(codes)
        return order, np.searchsorted(self._codes, codes[order])

    @property
    def keys(self) -> Ints:
        """`(n,)`: the keys of the rows."""
        found: Ints = self._codes >> self._bits
        return found

    @property
    def starts(self) -> NDArray[np.bool_]:
        """`(n,)`: True where a key's rows begin."""
        return changes(self.keys)


def changes(values: Ints) -> NDArray[np.bool_]:
    """`(n,)`: True for the first of a run of equal values."""
    found = np.ones(len(values), bool)
    np.not_equal(values[1:], values[:-1], out=found[1:])
    return found
