"""From stored states to the ranker's arrays: one code path for training and for serving.

Everything here is numpy on whole columns; nothing knows where the columns came from.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from schemas.features import FeatureView, Merge, Transform, column

Floats = NDArray[np.float64]


def finish(
    view: FeatureView,
    columns: Mapping[str, Floats],
    *,
    at: Floats,
    as_of: Floats,
    present: NDArray[np.bool_],
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Finish merged states into features and encode them for the ranker.

    `columns` holds one `(n,)` array per snapshot column (NaN: NULL; instants as seconds since 1970), `at (n,)` the
    instant of each read, `as_of (n,)` the instant at which decayed states were weighed, both in seconds; `present`
    `(n,)` is False for rows that must read as MISSING. Returns `values (n, f)` and `mask (n, f)` float32; a missing
    value is 0 with mask 0.
    """
    raw = natural(view, columns, at=at, as_of=as_of, present=present)
    mask = np.isfinite(raw)
    raw[~mask] = 0.0
    for index, feature in enumerate(view.features):
        if feature.transform is Transform.LOG1P:
            raw[:, index] = np.log1p(np.maximum(raw[:, index], 0.0))
    return raw.astype(np.float32), mask.astype(np.float32)


def natural(
    view: FeatureView,
    columns: Mapping[str, Floats],
    *,
    at: Floats,
    as_of: Floats,
    present: NDArray[np.bool_],
) -> Floats:
    """Features in their own units, as people read them: arguments as for `finish`; `(n, f)`, NaN where there is none."""
    raw = np.stack([_value(view, index, columns, at, as_of) for index in range(len(view.features))], axis=1)
    raw[~(np.isfinite(raw) & present[:, None])] = np.nan
    return raw


def _value(view: FeatureView, index: int, columns: Mapping[str, Floats], at: Floats, as_of: Floats) -> Floats:
    feature = view.features[index]
    states = [columns[column(state, feature.window_days)] for state in feature.states]
    match feature.finish:
        case "ratio":
            with np.errstate(divide="ignore", invalid="ignore"):
                # Nothing to divide by is no value, not infinity. Sums are multiples of 1e-6: less is what is left of
                # parts that cancel out.
                return np.where(np.abs(states[1]) > 5e-7, states[0] / states[1], np.nan)
        case "age":
            return at - states[0]
        case _:
            state = feature.states[0]
            if state.merge is Merge.DECAY and state.half_life_days is not None:
                return states[0] * np.exp2(-(at - as_of) / (state.half_life_days * 86_400.0))
            return states[0]


def crossed(
    values: NDArray[np.float32], mask: NDArray[np.float32], membership: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Features by category, carried over to items: the mean over an item's categories of those present.

    `values`, `mask` `(c, f)`; `membership (n, c)` is 1 where item n has category c. Returns `(n, f)` values and mask.
    """
    weight = membership @ mask
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = np.where(weight > 0, (membership @ (values * mask)) / weight, 0.0)
    return mean.astype(np.float32), (weight > 0).astype(np.float32)


def history_gaps(occurred_at: Floats, at: float) -> NDArray[np.float32]:
    """Seconds from each event `(h,)`, oldest first, to the next one; the last one's to the request's instant `at`."""
    return np.maximum(np.diff(occurred_at, append=at), 0.0).astype(np.float32)
