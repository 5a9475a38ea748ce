"""Decimals of six places as whole millionths: sums of them are the same in any order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

MICRO = 1_000_000
_SAFE_SUM = 2.0**62
_LOWER = 2**64


def millionths(values: pa.Array) -> np.ma.MaskedArray[Any, Any]:
    """A DECIMAL(…, 6) array `(n,)` as whole millionths, masked where NULL: int64, Python's own numbers where they must."""
    halves = np.frombuffer(values.buffers()[1], np.int64)[2 * values.offset :][: 2 * len(values)]
    lower, upper = halves[::2], halves[1::2]
    missing = values.is_null().to_numpy(zero_copy_only=False)
    if ((upper == lower >> 63) | missing).all():
        return np.ma.masked_array(lower, missing)
    return np.ma.masked_array(upper.astype(object) * _LOWER + lower.view(np.uint64).astype(object), missing)


def summable(values: np.ma.MaskedArray[Any, Any], added: NDArray[np.integer] | None = None) -> NDArray[Any]:
    """The millionths `(n,)`, 0 where masked, as numbers that hold any sum of them: of `added (m,)`, rows of them; None: of each
    once."""
    filled: NDArray[Any] = np.ma.filled(values, 0)
    addends = len(filled if added is None else added)
    # Where a running total could leave 64 bits, Python's own numbers hold it.
    if filled.dtype == np.int64 and addends * float(np.abs(filled).max(initial=0)) < _SAFE_SUM:
        return filled
    sizes = np.abs(filled.astype(np.float64))
    fits = (sizes if added is None else sizes[added]).sum() < _SAFE_SUM
    return filled.astype(np.int64 if fits else object)
