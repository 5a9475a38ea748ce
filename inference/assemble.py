"""From stored states to the ranker's arrays: one code path for training and for serving.

Everything here is numpy on whole columns, features of a kind all at once; nothing knows where the columns came from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from schemas.features import FeatureView, Merge, Transform, column
from schemas.ranker import ZERO_VALUE

Floats = NDArray[np.float64]
Places = NDArray[np.intp]

_DAY_SECONDS = 86_400.0


@dataclass(frozen=True, slots=True, eq=False)
class Recipe:
    """How the f features of some views come out of their c snapshot columns, both side by side in the views' order.

    They are made in another order, in which those of a kind lie together: ratios, ages, decayed counts, all others.
    """

    state: Places
    """`(f,)`: the column that a feature begins with, in the order of making."""
    under: Places
    """Of each ratio, the column to divide by."""
    ratios: slice
    ages: slice
    decays: slice
    half_lives: Floats
    """Of each decayed count, in seconds."""
    order: Places
    """`(f,)`: where a feature is in the order of making."""
    logs: Places
    """The features that the ranker gets as log1p."""


@cache
def recipe(views: tuple[FeatureView, ...]) -> Recipe:
    """The recipe of `views`, made once."""
    kinds: tuple[list[int], ...] = ([], [], [], [])
    state: list[int] = []
    under: list[int] = []
    half_lives: list[float] = []
    logs: list[int] = []
    begin = 0
    for view in views:
        place = {name: begin + number for number, (name, _, _) in enumerate(view.columns)}
        for feature in view.features:
            number = len(state)
            columns = [place[column(held, feature.window_days)] for held in feature.states]
            half_life_days = feature.states[0].half_life_days
            state.append(columns[0])
            if feature.finish == "ratio":
                kinds[0].append(number)
                under.append(columns[1])
            elif feature.finish == "age":
                kinds[1].append(number)
            elif feature.states[0].merge is Merge.DECAY and half_life_days is not None:
                kinds[2].append(number)
                half_lives.append(half_life_days * _DAY_SECONDS)
            else:
                kinds[3].append(number)
            if feature.transform is Transform.LOG1P:
                logs.append(number)
        begin += len(place)
    made = [number for kind in kinds for number in kind]
    ratios, ages, decays = len(kinds[0]), len(kinds[0]) + len(kinds[1]), len(made) - len(kinds[3])
    return Recipe(
        state=np.array([state[number] for number in made], np.intp),
        under=np.array(under, np.intp),
        ratios=slice(0, ratios),
        ages=slice(ratios, ages),
        decays=slice(ages, decays),
        half_lives=np.array(half_lives, np.float64),
        order=np.argsort(np.array(made, np.intp)),
        logs=np.array(logs, np.intp),
    )


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
    values, valid = encode(recipe((view,)), natural(view, columns, at=at, as_of=as_of, present=present), log1p=True)
    return values, valid.astype(np.float32)


def natural(
    view: FeatureView,
    columns: Mapping[str, Floats],
    *,
    at: Floats,
    as_of: Floats,
    present: NDArray[np.bool_],
) -> Floats:
    """Features in their own units, as people read them: arguments as for `finish`; `(n, f)`, NaN where there is none."""
    states = np.stack([columns[name] for name, _, _ in view.columns], axis=1)
    raw = finished(recipe((view,)), states, at=at[:, None], as_of=as_of[:, None])
    raw[~(np.isfinite(raw) & present[:, None])] = np.nan
    return raw


def finished(made: Recipe, states: Floats, *, at: Floats | float, as_of: Floats | float) -> Floats:
    """Features `(n, f)` in their own units from `states (n, c)`; `at` and `as_of`, in seconds, one or `(n, 1)`.

    What has no value is NaN or infinite; a row of NaN gives none.
    """
    raw = states.take(made.state, axis=1)
    if len(made.under):
        ratios, under = raw[:, made.ratios], states.take(made.under, axis=1)
        # Nothing to divide by is no value, not infinity. Sums are multiples of 1e-6: less is what is left of parts that
        # cancel out.
        some = np.abs(under) > 5e-7
        np.divide(ratios, under, out=ratios, where=some)
        np.copyto(ratios, np.nan, where=~some)
    ages = raw[:, made.ages]
    np.subtract(at, ages, out=ages)
    if len(made.half_lives):
        raw[:, made.decays] *= np.exp2(-(at - as_of) / made.half_lives)
    return raw.take(made.order, axis=1)


def encode(made: Recipe, raw: Floats, *, log1p: bool) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """`raw (n, f)`, which it changes, as `values` float32, 0 where there is none, and `valid` bool.

    `log1p`: counts and ages as the ranker gets them; without it everything stays in its own unit.
    """
    # What float32 cannot hold is no value either: it would be infinite behind the cast below.
    valid = np.abs(raw) <= np.finfo(np.float32).max
    np.copyto(raw, 0.0, where=~valid)
    if log1p:
        raw[:, made.logs] = np.log1p(np.maximum(raw.take(made.logs, axis=1), 0.0))
    return raw.astype(np.float32), valid


def crossed(
    values: NDArray[np.float32], mask: NDArray[np.float32], membership: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Features by category, carried over to items: the mean over an item's categories of those present.

    `values`, `mask` `(c, f)`, values of anything where the mask is 0; `membership (n, c)` is 1 where item n has category c.
    Returns `(n, f)` values and mask.
    """
    weight = membership @ mask
    values = np.where(mask > 0, values, np.float32(0))  # 0 times NaN would be NaN for every item
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = np.where(weight > 0, (membership @ (values * mask)) / weight, 0.0)
    return mean.astype(np.float32), (weight > 0).astype(np.float32)


def graph_values(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Event values of any shape as the ranker's graph takes them: 0 where there is none, a value of 0 as `ZERO_VALUE`."""
    given = np.where(values == 0, np.float32(ZERO_VALUE), values)
    return np.where(np.isfinite(given), given, 0).astype(np.float32)


def history_gaps(occurred_at: Floats, at: float) -> NDArray[np.float32]:
    """Seconds from each event `(h,)`, oldest first, to the next one; the last one's to the request's instant `at`."""
    return np.maximum(np.diff(occurred_at, append=at), 0.0).astype(np.float32)
