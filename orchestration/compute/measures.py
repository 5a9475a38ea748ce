"""What is measured of a partition while it is built: the numbers that its checks judge and its page shows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import date, timedelta

import duckdb
import psycopg

from orchestration.compute.duck import duck
from orchestration.compute.lake import Lake
from schemas.checks import Check, Measures
from schemas.features import Feature, FeatureView, column


def failed(checks: Iterable[Check], measures: Measures) -> tuple[Check, ...]:
    """The checks that do not hold."""
    return tuple(check for check in checks if not check.holds(measures))


def against_day_before(
    rows: Mapping[date, float], days: Iterable[date], source_first: date | None
) -> dict[date, dict[str, float]]:
    """`rows_day_before` and `rows_over_day_before` of each day; no entry where the day before has no rows or is not known.

    None either where it is the first day that the source has: that one may have begun in the middle, and what looks back
    over a window sees twice as much a day later.
    """
    found: dict[date, dict[str, float]] = {}
    for day in days:
        day_before = day - timedelta(days=1)
        before = rows.get(day_before)
        if day in rows and before and day_before != source_first:
            found[day] = {"rows_day_before": before, "rows_over_day_before": rows[day] / before}
    return found


def first_day(connection: psycopg.Connection) -> date | None:
    """The first day of which the lake has an event."""
    found: tuple[date | None] | None = connection.execute("SELECT min(day) FROM lake_files WHERE rows > 0").fetchone()
    return found[0] if found else None


def measure_snapshot(db: duckdb.DuckDBPyConnection, view: FeatureView) -> dict[date, dict[str, float]]:
    """Of each partition in the relation `snapshot`: `rows`, `null_rate` (the worst column), `out_of_range` (values)."""
    there = ", ".join(f"count({name})" for name, _, _ in view.columns)
    outside = " + ".join(_outside(feature) for feature in view.features) or "0"
    found = db.execute(
        f"SELECT partition_date, count(*), (count(*) - least({there})) / count(*), {outside} FROM snapshot GROUP BY partition_date"
    ).fetchall()
    return {
        day: {"rows": float(rows), "null_rate": float(null_rate), "out_of_range": float(off)}
        for day, rows, null_rate, off in found
    }


def _outside(feature: Feature) -> str:
    """Counts the rows whose finished value is outside the feature's limits, or no number at all."""
    columns = [f"CAST({column(state, feature.window_days)} AS DOUBLE)" for state in feature.states]
    match feature.finish:
        case "state":
            value = columns[0]
        case "ratio":
            value = f"{columns[0]} / NULLIF({columns[1]}, 0)"
        case _:
            # An age exists only at a read.
            return "0"
    # A float sum of exact parts may miss its limit by the last bit.
    limits = [f"{value} < {feature.low} - 1e-9"] if feature.low is not None else []
    limits += [f"{value} > {feature.high} + 1e-9"] if feature.high is not None else []
    return f"count(*) FILTER (WHERE {' OR '.join([f'NOT isfinite({value})', *limits])})"


def measure_events(connection: psycopg.Connection, lake: Lake, first: date, last: date) -> dict[date, dict[str, float]]:
    """Of each day from `first` to `last`: `rows`, `late_rate`, `rows_off` (index against file), and what
    `against_day_before` finds.

    Reads every file of the range, so a file that cannot be read raises here.
    """
    indexed = {
        day: float(rows)
        for day, rows in connection.execute(
            "SELECT day, rows FROM lake_files WHERE day BETWEEN %s AND %s", (first - timedelta(days=1), last)
        )
    }
    paths = lake.paths(connection, first, last).values()
    with lake.named(paths), duck() as db:
        db.register("events", lake.dataset(paths))
        counted = {
            day: (float(rows), float(late))
            for day, rows, late in db.execute(
                "SELECT CAST(occurred_at AS DATE) AS day, count(*), "
                "count(*) FILTER (WHERE CAST(known_at AS DATE) > CAST(occurred_at AS DATE)) FROM events GROUP BY day"
            ).fetchall()
        }
    days = [first + timedelta(days=offset) for offset in range((last - first).days + 1)]
    before = against_day_before(dict.fromkeys(days, 0.0) | indexed, days, first_day(connection))
    # Rows of a file that belong to no day of the range can only be another day's: they count against the first.
    strays = sum(rows for day, (rows, _) in counted.items() if not first <= day <= last)
    measures = {}
    for day in days:
        rows, late = counted.get(day, (0.0, 0.0))
        off = abs(rows - indexed.get(day, 0.0)) + (strays if day == first else 0.0)
        measures[day] = {
            "rows": rows,
            "late_rate": late / rows if rows else 0.0,
            "rows_off": off,
            **before.get(day, {}),
        }
    return measures
