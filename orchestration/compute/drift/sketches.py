"""What is kept of a day or a week that was served: distributions, shares and means, no row of anybody.

Reads as served are kept for a few days only, a comparison needs weeks. A sketch holds 200 quantiles of a feature, so a
distance between two of them is right to 0.005.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any

import numpy as np
import psycopg
from numpy.typing import NDArray

FEATURES, SCORES, CATEGORIES, LABELS, CALIBRATION = "features", "scores", "categories", "labels", "calibration"
"""Kinds of what is kept."""
QUANTILES = 200
DAY, WEEK = 1, 7
"""Days that a window spans: it is compared with windows that hold the same days of the week."""
REFERENCES = 4
"""So many windows before, a week apart, are what a window is compared with."""
KEPT_DAYS = 400
"""A year and a month: a champion that old is compared with its own time."""
LEAST_CLUSTERS = 100
"""People or items in a window below which nothing is compared, nor kept: a distribution of fewer is mostly chance, and
near to saying something of one of them."""


@dataclass(frozen=True, slots=True)
class Sketch:
    """A distribution: `quantiles (q,) float64` ascending, of the values that are there; `missing` is the share of the others.

    `clusters` is how many people or items the values are of: what belongs to one of them is one observation.
    """

    clusters: int
    missing: float
    quantiles: NDArray[np.float64]

    def below(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """`(p,)`: the share of the values at or below each of `points (p,)`; a missing one is below all."""
        if not len(self.quantiles):
            return np.full(len(points), self.missing)
        rank = np.searchsorted(self.quantiles, points, side="right") / len(self.quantiles)
        return np.asarray(self.missing + (1 - self.missing) * rank)

    def to_body(self) -> dict[str, Any]:
        return {"missing": self.missing, "quantiles": _rounded(self.quantiles).tolist()}


@dataclass(frozen=True, slots=True)
class Counts:
    """Shares by name; `effective` is the number of independent draws that would be as certain."""

    clusters: int
    effective: float
    shares: dict[str, float]

    def to_body(self) -> dict[str, Any]:
        return {"effective": self.effective, "shares": self.shares}


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean over people and its standard error."""

    clusters: int
    mean: float
    error: float

    def to_body(self) -> dict[str, Any]:
        return {"mean": self.mean, "error": self.error}


Kept = Sketch | Counts | Mean


@dataclass(frozen=True, slots=True)
class Name:
    """Of what a sketch is: its kind (features, scores, categories, …) and name. Only equal `version`s are compared."""

    kind: str
    name: str
    version: str


Window = Mapping[Name, Kept]
"""Everything that is kept of one window."""


def sketch(values: NDArray[np.floating[Any]], clusters: int) -> Sketch:
    """The sketch of `values (n,)`, NaN where there is none."""
    there = np.sort(values[np.isfinite(values)].astype(np.float64))
    missing = 1 - len(there) / max(len(values), 1)
    if not len(there):
        return Sketch(clusters, missing, there)
    place = ((np.arange(QUANTILES) + 0.5) / QUANTILES * len(there)).astype(np.int64)
    return Sketch(clusters, missing, _rounded(there[np.minimum(place, len(there) - 1)]))


def _rounded(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """With as many digits as are kept: values that many share, such as the log of a count, must meet their own kind in a
    sketch that was read back, or each lies beside it and all of them have moved."""
    return np.array([float(f"{value:.6g}") for value in values.tolist()], np.float64)


def counts_of(by_cluster: Iterable[Mapping[str, float]]) -> Counts:
    """The mean of people's shares, each person once. Their differences tell how many draws that is worth."""
    people = 0
    sums: dict[str, list[float]] = {}
    for counts in by_cluster:
        total = sum(counts.values())
        if not total:
            continue
        people += 1
        for name, count in counts.items():
            entry = sums.setdefault(name, [0.0, 0.0])
            entry[0] += count / total
            entry[1] += (count / total) ** 2
    shares = {name: entry[0] / people for name, entry in sorted(sums.items())}
    # A draw of one name has p·(1 − p); people who have a little of everything differ less than that.
    drawn = sum(share * (1 - share) for share in shares.values())
    spread = sum(sums[name][1] - people * share**2 for name, share in shares.items()) / max(people - 1, 1)
    effective = people * drawn / max(spread, 1e-12) if drawn > 1e-12 and people > 1 else float(people)
    return Counts(people, effective, shares)


def mean_of(values: NDArray[np.float64], clusters: Sequence[Hashable]) -> Mean:
    """The mean of people's means of `values (n,)`; `clusters` says whose each is."""
    sums: dict[Hashable, list[float]] = {}
    for value, cluster in zip(values.tolist(), clusters, strict=True):
        entry = sums.setdefault(cluster, [0.0, 0.0])
        entry[0] += value
        entry[1] += 1
    means = np.array([total / count for total, count in sums.values()])
    if len(means) < 2:
        return Mean(len(means), float(means.mean()) if len(means) else 0.0, float("inf"))
    return Mean(len(means), float(means.mean()), float(means.std(ddof=1) / np.sqrt(len(means))))


def keep(connection: psycopg.Connection[Any], day: date, span_days: int, window: Window) -> int:
    """Write what is kept of the window of `span_days` days that ends with `day`; how many.

    Repeating it replaces them, unless there is less by now: a report that is made again late, when the log is half gone,
    does not spoil what was known in time.
    """
    rows = [
        (day, span_days, name.kind, name.name, name.version, kept.clusters, json.dumps(kept.to_body()))
        for name, kept in window.items()
        if kept.clusters >= LEAST_CLUSTERS
    ]
    with connection.transaction(), connection.cursor() as cursor:
        cursor.execute("DELETE FROM drift_sketches WHERE day < %s", (day - timedelta(days=KEPT_DAYS),))
        cursor.executemany(
            "INSERT INTO drift_sketches (day, span_days, kind, name, version, clusters, body) "
            "VALUES (%s, %s, %s, %s, %s, %s, %s) ON CONFLICT (day, span_days, kind, name, version) DO UPDATE "
            "SET clusters = excluded.clusters, body = excluded.body WHERE excluded.clusters >= drift_sketches.clusters",
            rows,
        )
    return len(rows)


def kept_windows(connection: psycopg.Connection[Any], days: Sequence[date], span_days: int) -> list[Window]:
    """What is kept of the windows that end with these days, in their order; empty where nothing is."""
    found: dict[date, dict[Name, Kept]] = {day: {} for day in days}
    for day, kind, name, version, clusters, body in connection.execute(
        "SELECT day, kind, name, version, clusters, body FROM drift_sketches WHERE span_days = %s AND day = ANY(%s)",
        (span_days, list(days)),
    ):
        found[day][Name(kind, name, version)] = _read(clusters, body)
    return [found[day] for day in days]


def days_before(day: date, weeks: int = REFERENCES) -> list[date]:
    """The same day of the week in the weeks before, the oldest first."""
    return [day - timedelta(days=7 * back) for back in range(weeks, 0, -1)]


def _read(clusters: int, body: dict[str, Any]) -> Kept:
    if "quantiles" in body:
        return Sketch(clusters, body["missing"], np.array(body["quantiles"], np.float64))
    if "shares" in body:
        return Counts(clusters, body["effective"], body["shares"])
    return Mean(clusters, body["mean"], body["error"])
