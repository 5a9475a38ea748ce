"""Quality by segment of people: how often a request led to a pick, and how high up, with intervals over people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from orchestration.compute.fairness.exposure import LEAST_PEOPLE, RESAMPLES, bootstrap_weights, level_of_each


@dataclass(frozen=True, slots=True)
class SegmentQuality:
    """A segment's figures; `low` to `high` is the interval of `ratio`, its pick rate over that of everybody else.

    `reciprocal_rank` is 0 for a request without a pick. A segment of too few people has no figures, and `words` say so.
    """

    segment: str
    requests: int
    people: int
    pick_rate: float | None
    reciprocal_rank: float | None
    ratio: float | None
    low: float | None
    high: float | None
    words: str = ""


def segment_quality(
    segments: Mapping[str, NDArray[np.bool_]],
    people: Sequence[str],
    ranks: NDArray[np.float64],
    *,
    level: float = 0.95,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> list[SegmentQuality]:
    """Figures of each segment `(r,)` of the requests; `ranks (r,)` is the place of the first pick from 1, inf without one.

    The intervals hold for all segments together at `level` (Bonferroni).
    """
    names = list(dict.fromkeys(people))
    number = {person: place for place, person in enumerate(names)}
    who = np.array([number[person] for person in people], np.int64)
    hits = np.isfinite(ranks).astype(np.float64)
    share = level_of_each(level, len(segments))
    found = []
    for segment, member in segments.items():
        inside = len(np.unique(who[member]))
        if inside < LEAST_PEOPLE:
            words = f"fewer than {LEAST_PEOPLE} people"
            found.append(SegmentQuality(segment, int(member.sum()), inside, *(None,) * 5, words))
            continue
        # Per person: requests and picks in the segment, and out of it.
        sums = np.stack(
            [
                np.bincount(who, values, minlength=len(names))
                for values in (member, member * hits, ~member, ~member * hits)
            ]
        )
        rate = float(hits[member].mean())
        ratio = low = high = None
        if sums[3].sum():
            drawn = np.concatenate([weight @ sums.T for weight in bootstrap_weights(len(names), seed, resamples)])
            ratios = _ratio(drawn)
            low, high = (float(value) for value in np.quantile(ratios, [(1 - share) / 2, (1 + share) / 2]))
            ratio = float(_ratio(sums.sum(axis=1)[None])[0])
        found.append(
            SegmentQuality(
                segment, int(member.sum()), inside, rate, float((1 / ranks[member]).mean()), ratio, low, high
            )
        )
    return found


def _ratio(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """`(b,)` of `sums (b, 4)`: picks per request inside over picks per request outside."""
    inside = sums[:, 1] / np.maximum(sums[:, 0], 1)
    outside = sums[:, 3] / np.maximum(sums[:, 2], 1)
    return np.asarray(inside / np.maximum(outside, 1e-12))
