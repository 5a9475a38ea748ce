"""The skew audit: feature vectors as they were served against the same vectors made offline, each difference explained.

The offline side is the code that makes training sets (`point_in_time.py`), asked for the instant of the read under what
was known then. Where the two differ, skew_causes.py says why; what it cannot explain is a bug.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from typing import Any

import numpy as np
import psycopg
import pyarrow as pa
import pyarrow.dataset as ds
from numpy.typing import NDArray

from orchestration.compute.lake import EVENT_SCHEMA, Lake
from orchestration.compute.point_in_time import PointInTime
from schemas.features import FeatureView, Merge
from schemas.views import VIEWS, fingerprint

CHANGED_DEFINITION, LATE_DATA, STALE_SNAPSHOT, BUG = "changed_definition", "late_data", "stale_snapshot", "bug"
CAUSES = (CHANGED_DEFINITION, LATE_DATA, STALE_SNAPSHOT, BUG)
MOST_ROWS = 50_000
"""So many rows of the log are audited at most, the newest first."""
_NEAR = 1e-6
"""How far apart decayed counts may be, and ages: the seconds of an instant from DuckDB and from Postgres can differ in a
double's last bit, a quarter of a microsecond."""
_VIEWS = {view.name: view for view in VIEWS}

Key = tuple[str, ...]
Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Served:
    """One key's vector as served: `numbers (f,) float32`, NaN where missing, and what the read knew."""

    view: str
    key: Key
    read_at: datetime
    seen: str | None
    definition_hash: str
    partition_date: date | None
    built_at: datetime | None
    built_seen: str | None
    built_by: int | None
    features: tuple[str, ...]
    numbers: Floats

    @property
    def changed(self) -> bool:
        """True if the view no longer means what it meant when it was read."""
        view = _VIEWS.get(self.view)
        return view is None or fingerprint((view,)) != self.definition_hash


@dataclass(frozen=True, slots=True)
class Mismatch:
    """One value that differs. It names nobody: neither key nor event."""

    view: str
    feature: str
    cause: str
    served: float | None
    recomputed: float | None
    read_at: datetime
    partition_date: date | None


@dataclass(frozen=True, slots=True)
class Audited:
    """The outcome of one audit: values compared, and how many of them differ without a cause, by `view.feature`."""

    audited_at: datetime
    compared: int
    bugs: int
    where: dict[str, int]


@dataclass(slots=True)
class SkewReport:
    """What an audit found: reads, values compared, mismatches by `(view, feature, cause)`, an example of each."""

    since: datetime
    reads: int = 0
    left_out: int = 0
    """Rows of the log beyond `MOST_ROWS`."""
    compared: int = 0
    counts: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    examples: dict[tuple[str, str, str], Mismatch] = field(default_factory=dict)

    def cause(self, cause: str) -> int:
        """How many values differ for that reason."""
        return sum(count for (_, _, found), count in self.counts.items() if found == cause)

    @property
    def bugs(self) -> int:
        return self.cause(BUG)

    def outcome(self) -> Audited:
        """What is kept of it, as of now."""
        where = {f"{view}.{name}": count for (view, name, cause), count in self.counts.items() if cause == BUG}
        return Audited(datetime.now(UTC), self.compared, self.bugs, where)

    def add(self, mismatch: Mismatch) -> None:
        place = (mismatch.view, mismatch.feature, mismatch.cause)
        self.counts[place] += 1
        self.examples.setdefault(place, mismatch)


class KnownEvents(Lake):
    """The lake's events and those that wait to be drained, as one consistent state: whatever the store knows."""

    def __init__(self, lake: Lake) -> None:
        self._lake = lake

    def events(self, connection: psycopg.Connection, first: date | None = None, last: date | None = None) -> ds.Dataset:
        waiting = connection.execute(
            f"SELECT {', '.join(EVENT_SCHEMA.names)} FROM recent_events WHERE NOT drained "
            "AND (occurred_at AT TIME ZONE 'UTC')::date BETWEEN coalesce(%s::date, '-infinity') AND coalesce(%s::date, 'infinity')",
            (first, last),
        ).fetchall()
        table = pa.Table.from_pylist([dict(zip(EVENT_SCHEMA.names, row, strict=True)) for row in waiting], EVENT_SCHEMA)
        return ds.dataset([self._lake.events(connection, first, last), ds.dataset(table)])


def audit(url: str, lake: Lake, since: datetime) -> SkewReport:
    """Recompute what was served since then and record the outcome, which is also given back."""
    from orchestration.compute.skew_causes import Causes

    report = SkewReport(since)
    with psycopg.connect(url, options="-c TimeZone=UTC", application_name="larder-skew-audit") as connection:
        # Log, lake and undrained events of one moment: an event is in exactly one of the last two.
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        rows = _read_log(connection, since, report)
        known = KnownEvents(lake)
        if rows:
            with PointInTime(known, connection) as ask:
                unexplained = [found for view in VIEWS for found in _compare(ask, view, rows, report)]
            for mismatch in Causes(connection, known).explain(unexplained):
                report.add(mismatch)
    with psycopg.connect(url) as connection:
        connection.execute(
            "INSERT INTO skew_audits (since, reads, compared, bugs, mismatches) VALUES (%s, %s, %s, %s, %s)",
            (since, report.reads, report.compared, report.bugs, json.dumps(_listed(report))),
        )
    return report


def newest_audit(connection: psycopg.Connection[Any]) -> Audited | None:
    """The last audit; None before the first."""
    row = connection.execute(
        "SELECT audited_at, compared, bugs, mismatches FROM skew_audits ORDER BY audit_id DESC LIMIT 1"
    ).fetchone()
    if row is None:
        return None
    where = {f"{entry['view']}.{entry['feature']}": entry["values"] for entry in row[3] if entry["cause"] == BUG}
    return Audited(row[0], row[1], row[2], where)


def why_not_released(found: Audited) -> str:
    """Why an audit with bugs blocks a release, and the way out."""
    places = ", ".join(f"{name} ({count:,})" for name, count in sorted(found.where.items()))
    return (
        f"the skew audit of {found.audited_at:%Y-%m-%d %H:%M} UTC found {found.bugs:,} of {found.compared:,} served values "
        f"that differ from training for no known cause: {places}. A model would be fed what it never learned, so none is "
        "released. Look at the examples on the page of skew_audit and at `make explain`; when it is mended, materialise "
        "skew_audit with `since` set to that moment"
    )


@dataclass(frozen=True, slots=True)
class Difference:
    """A vector that differs: `recomputed (f,)` with NaN where missing, `wrong (f,)` True where it is not what was served."""

    served: Served
    view: FeatureView
    recomputed: Floats
    wrong: NDArray[np.bool_]

    def mismatches(self, causes: Sequence[str | None]) -> Iterator[Mismatch]:
        """One for each feature that has a cause."""
        for index, cause in enumerate(causes):
            if cause is not None:
                yield mismatch_of(self.served, index, cause, float(self.recomputed[index]))


def mismatch_of(served: Served, index: int, cause: str, recomputed: float) -> Mismatch:
    """The mismatch of the feature at `index`; NaN stands for a missing value."""
    return Mismatch(
        served.view,
        served.features[index],
        cause,
        _number(float(served.numbers[index])),
        _number(recomputed),
        served.read_at,
        served.partition_date,
    )


def differing(view: FeatureView, served: Floats, recomputed: Floats, ahead: float = 0.0) -> NDArray[np.bool_]:
    """Where two `(n, f)` arrays of features differ: counts, sums and means in any bit, others beyond 1e-6.

    `ahead` is what those others may differ by besides.
    """
    moving = [
        feature.finish == "age" or any(state.merge is Merge.DECAY for state in feature.states)
        for feature in view.features
    ]
    room = np.where(moving, _NEAR + ahead, 0.0)
    left, right = served.astype(np.float64), recomputed.astype(np.float64)
    with np.errstate(invalid="ignore"):
        near = np.abs(left - right) <= room * np.maximum(1.0, np.abs(right))
    return ~(near | (np.isnan(left) & np.isnan(right)))


def vectors(ask: PointInTime, view: FeatureView, keys: Sequence[Key], at: Sequence[datetime]) -> Floats:
    """`(n, f)`: the features of `view` made offline for n keys and instants, NaN where missing."""
    named = {name: np.array([key[place] for key in keys], np.str_) for place, name in enumerate(view.entity.keys)}
    found = ask.features(view, named, np.array([micros(instant) for instant in at], np.int64))
    return np.where(found.mask > 0, found.values, np.float32(np.nan))


def micros(instant: datetime) -> int:
    """Microseconds since 1970."""
    return round(instant.timestamp() * 1_000_000)


def _compare(ask: PointInTime, view: FeatureView, rows: Iterable[Served], report: SkewReport) -> Iterator[Difference]:
    """The vectors of `view` that differ though its definition is the same; what another definition made is counted."""
    mine = [row for row in rows if row.view == view.name]
    if not mine:
        return
    recomputed = vectors(ask, view, [row.key for row in mine], [row.read_at for row in mine])
    place = {feature.name: index for index, feature in enumerate(view.features)}
    for row, values in zip(mine, recomputed, strict=True):
        report.compared += len(row.numbers)
        if not row.changed:
            wrong = differing(view, row.numbers[None], values[None])[0]
            if wrong.any():
                yield Difference(row, view, values, wrong)
            continue
        for index, name in enumerate(row.features):
            value = float(values[place[name]]) if name in place else float("nan")
            if not np.array_equal(row.numbers[index], np.float32(value), equal_nan=True):
                report.add(mismatch_of(row, index, CHANGED_DEFINITION, value))


def _read_log(connection: psycopg.Connection[Any], since: datetime, report: SkewReport) -> list[Served]:
    """The log's rows since then, one per key. What a view that is gone had served is counted as changed."""
    (logged, report.reads) = connection.execute(
        "SELECT count(*), count(DISTINCT read_id) FROM served_features WHERE read_at >= %s", (since,)
    ).fetchone() or (0, 0)
    report.left_out = max(0, logged - MOST_ROWS)
    found: list[Served] = []
    for view, keys, numbers, features, *told in connection.execute(
        "SELECT view, keys, numbers, features, read_at, seen, definition_hash, partition_date, built_at, built_seen, built_by "
        f"FROM served_features WHERE read_at >= %s ORDER BY read_at DESC, read_id, view LIMIT {MOST_ROWS}",
        (since,),
    ):
        block = np.array(numbers, np.float32).reshape(-1, len(features))
        width = len(keys) // len(block)
        for row, values in enumerate(block):
            key = tuple(keys[row * width : (row + 1) * width])
            read_at, seen, definition_hash, partition_date, built_at, built_seen, built_by = told
            build = (partition_date, built_at, built_seen, built_by)
            served = Served(view, key, read_at, seen, definition_hash, *build, tuple(features), values)
            if view in _VIEWS:
                found.append(served)
                continue
            report.compared += len(features)
            for index in range(len(features)):
                report.add(mismatch_of(served, index, CHANGED_DEFINITION, float("nan")))
    return found


def _listed(report: SkewReport) -> list[dict[str, object]]:
    return [
        {"view": view, "feature": feature, "cause": cause, "values": count}
        for (view, feature, cause), count in sorted(report.counts.items())
    ]


def table(report: SkewReport) -> list[list[str]]:
    """Rows `view, feature, cause, values, example` of what differs, bugs first. Names nobody."""
    by_cause: dict[str, int] = defaultdict(int, {cause: place for place, cause in enumerate(reversed(CAUSES))})
    rows = []
    for place, count in sorted(report.counts.items(), key=lambda entry: (by_cause[entry[0][2]], entry[0])):
        example = report.examples[place]
        words = f"served {_shown(example.served)}, recomputed {_shown(example.recomputed)}, read {example.read_at:%Y-%m-%d %H:%M:%S}"
        words += f", partition {example.partition_date}" if example.partition_date else ", no partition in its ttl"
        rows.append([*place, str(count), words])
    return rows


def _number(value: float) -> float | None:
    return None if np.isnan(value) else value


def _shown(value: float | None) -> str:
    return "missing" if value is None else f"{value:.7g}"
