"""Events that give the same to every state are one variant: what is asked of an event is then asked of a few rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

_MOST = 4096
"""With more variants than this an event is its own: telling them apart costs as much as it saves."""


def variants(columns: Sequence[pa.Array], n: int) -> tuple[NDArray[np.integer], NDArray[np.int64]]:
    """Which variant each of n events is of `(n,)`, numbered from 0, and an event of each variant `(v,)`.

    Events are of one variant where all `columns (n,)` are equal; NULL is a value of its own.
    """
    variant, many = np.zeros(n, np.uint16), min(n, 1)
    for column in columns:
        coded = column.dictionary_encode(null_encoding="encode")
        values = len(coded.dictionary)
        if many * values > _MOST:
            return np.arange(n), np.arange(n)
        code = np.asarray(coded.indices).astype(np.uint16)
        if many > 1:
            # Of the pairs that there could be, those that there are.
            pair = variant * np.uint16(values) + code
            there = np.flatnonzero(np.bincount(pair))
            number = np.zeros(int(there[-1]) + 1, np.uint16)
            number[there] = np.arange(len(there))
            code, values = number[pair], len(there)
        variant, many = code, values
    example = np.zeros(many, np.int64)
    example[variant] = np.arange(n)
    return variant, example
