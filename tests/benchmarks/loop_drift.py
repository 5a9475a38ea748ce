"""How soon drift is told, and how often a quiet week is taken for one, in the simulator's world.

    python -m tests.benchmarks.loop_drift [--quick]

Quiet weeks come from `tests/quiet_world.py`: real feature vectors, lists, scores and picks, 5,000 requests a week, in worlds
of different seeds, judged every day as the asset does it; vectors are compared on Sundays alone, as a day changes a seventh
of them. Worlds are worked through in as many processes as there are processors. A week counts as a false alarm if anything at all alarmed on one of its days.

For the shift, one feature at a time grows by half its standard deviation in every read from a random request on; what is
counted are the requests from there to the end of the day whose report alarms for that feature.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from datetime import date, timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from scipy import stats
from threadpoolctl import threadpool_limits

from infra import postgres
from infra.feature_tables import ensure_view_tables
from orchestration.compute.drift.judge import (
    ALARM,
    Comparison,
    Finding,
    comparison,
    days_of_training,
    judge,
    level,
    since_training,
    tests_of,
)
from orchestration.compute.drift.served import Window
from orchestration.compute.drift.sketches import DAY, REFERENCES, WEEK, Kept, Name, days_before
from orchestration.compute.drift.vectors import compare_vectors
from schemas.features import FeatureView
from schemas.views import VIEWS
from tests.benchmarks.frame import machine, note
from tests.quiet_world import Moved, QuietWorld, build

SHIFT_SIGMA = 0.5
WITHIN_REQUESTS = 5_000
RETRAINED_WEEKS = 8
"""A champion learns anew so often; what it learned from is compared with as well."""
SEEDS = (11, 12, 13, 14, 15, 16, 17, 18)
"""Of the worlds that are measured. Thresholds were looked at on world 1, which is not among them."""


@dataclass
class Watched:
    """A world with the sketches of all its windows, made once."""

    world: QuietWorld
    kept: dict[tuple[int, date], dict[Name, Kept]] = field(default_factory=dict)

    def window(self, span_days: int, day: date) -> dict[Name, Kept]:
        if day < self.world.day(self.world.first_week, 0) + timedelta(days=span_days - 1):
            return {}
        if (span_days, day) not in self.kept:
            self.kept[span_days, day] = self.world.window(day, span_days)
        return self.kept[span_days, day]

    def comparisons(self, day: date) -> list[Comparison]:
        """What the report of `day` compares."""
        made = [
            comparison(span, self.window(span, day), [self.window(span, before) for before in days_before(day)])
            for span in (DAY, WEEK)
        ]
        week = (day - self.world.start).days // 7
        trained = self.world.day(week // RETRAINED_WEEKS * RETRAINED_WEEKS, 0)
        until = _midnight(trained)
        before = [self.window(WEEK, end) for end in days_of_training(day, until)]
        made.append(since_training(self.window(WEEK, day), before))
        return made

    def findings(self, day: date) -> list[Finding]:
        """What the report of `day` finds, with vectors on Sundays."""
        made = self.comparisons(day)
        found = judge(made, others=2)
        if day.weekday() == 6:
            alpha = level(sum(len(tests_of(kept)) for one in made for kept in one.current.values()) + 2)
            for what in ("taken", "shown"):
                *references, current = (
                    self.world.people_vectors(Window.ending(last, WEEK), what) for last in (*days_before(day), day)
                )
                found.append(compare_vectors(what, current, references, alpha))
        return found


def first_judged_week(world: QuietWorld) -> int:
    """The first week all of whose days have the windows before them that they are compared with."""
    return world.first_week + REFERENCES + 1


def false_alarms(watched: Watched, most: int) -> dict[int, list[Finding]]:
    """The alarms of every quiet week, of `most` weeks at most."""
    world = watched.world
    weeks = range(first_judged_week(world), world.first_week + world.weeks)[:most]
    return {
        week: [one for weekday in range(7) for one in watched.findings(world.day(week, weekday)) if one.state == ALARM]
        for week in weeks
    }


def requests_until_found(watched: Watched, view: FeatureView, place: int, onset: int, sign: float = 1.0) -> int | None:
    """Requests from `onset` until a report alarms for the feature that has moved since; None: not within two weeks."""
    world = watched.world
    name = f"{view.name}.{view.features[place].name}"
    moved = Moved(view.name, place, onset, sign * SHIFT_SIGMA * sigma(world, view, place, onset))
    first = next(day for week in range(world.first_week, world.first_week + world.weeks) for weekday in range(7)
                 if world.requests_before((day := world.day(week, weekday)) + timedelta(days=1)) > onset)  # fmt: skip
    for day in (first + timedelta(days=number) for number in range(14)):
        made = watched.comparisons(day)
        asked = sum(len(tests_of(kept)) for one in made for kept in one.current.values()) + 2
        mine = []
        for one, span in zip(made, (DAY, WEEK, WEEK), strict=True):
            shifted = world.features(view, Window.ending(day, span), moved)
            current = {key: kept for key, kept in shifted.items() if key.name == name}
            mine.append(Comparison(one.against, current, one.references, one.least))
        own = sum(len(tests_of(kept)) for one in mine for kept in one.current.values())
        if any(found.state == ALARM for found in judge(mine, others=asked - own)):
            return world.requests_before(day + timedelta(days=1)) - onset
    return None


def sigma(world: QuietWorld, view: FeatureView, place: int, onset: int) -> float:
    """The feature's standard deviation over the people or items of the four weeks before `onset`."""
    request, key, values = world.blocks[view.name]
    here = slice(*np.searchsorted(request, [onset - REFERENCES * WITHIN_REQUESTS, onset]))
    newest = here.stop - 1 - np.unique(key[here][::-1], return_index=True)[1]
    return float(np.nanstd(values[newest, place]))


def shifts(watched: Watched, times: int, seed: int, every: int = 1) -> dict[str, list[int | None]]:
    """Requests until the shift of each feature (each `every`th) is found, up or down, from `times` random requests on."""
    world = watched.world
    generator = np.random.default_rng(seed)
    first = world.requests_before(world.day(first_judged_week(world), 0))
    last = world.requests_before(world.day(world.first_week + world.weeks - 3, 0))
    features = [(view, place) for view in VIEWS for place in range(len(view.features))]
    found: dict[str, list[int | None]] = {}
    for view, place in features[::every]:
        found[f"{view.name}.{view.features[place].name}"] = [
            requests_until_found(
                watched, view, place, int(generator.integers(first, last)), float(generator.choice([-1, 1]))
            )
            for _ in range(times)
        ]
    return found


def measure(quick: bool) -> dict[str, Any]:
    """`drift_detected_after`: requests until nine of ten shifts of the feature that takes longest are found (None: they
    are not); `drift_false_alarms`: the share of quiet weeks with an alarm. What they are made of stands beside them."""
    seeds, weeks, times, every, size = (SEEDS[:1], 9, 1, 7, 2_500) if quick else (SEEDS, 34, 3, 1, 5_000)
    alarmed: dict[str, list[str]] = {}
    quiet_weeks = 0
    after: dict[str, list[int | None]] = {}
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        ProcessPoolExecutor(
            min(len(seeds), os.cpu_count() or 1), get_context("spawn"), threadpool_limits, (1,)
        ) as pool,
    ):
        url = postgres.start_embedded(Path(folder) / "pg")
        postgres.migrate(url)
        ensure_view_tables(url)
        worlds = [
            pool.submit(_in_world, _database(url, seed), seed, weeks, size, 2 if quick else weeks, times, every)
            for seed in seeds
        ]
        for seed, world in zip(seeds, worlds, strict=True):
            requests, found, took = world.result()
            for week, names in found.items():
                quiet_weeks += 1
                if names:
                    alarmed[f"{seed}/{week}"] = names
            for name, one in took.items():
                after.setdefault(name, []).extend(one)
            note(
                f"world {seed}: {requests:,} requests; {len(alarmed)} of {quiet_weeks} quiet weeks with an alarm so far"
            )
    return summary(alarmed, quiet_weeks, after)


def _database(url: str, seed: int) -> str:
    """A database for one world, made from the migrated one at `url`."""
    made = make_conninfo(url, dbname=f"drift_{seed}")
    with psycopg.connect(make_conninfo(url, dbname="template1"), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE drift_{seed} TEMPLATE {conninfo_to_dict(url)['dbname']}")
    return made


def _in_world(
    url: str, seed: int, weeks: int, size: int, judged: int, times: int, every: int
) -> tuple[int, dict[int, list[str]], dict[str, list[int | None]]]:
    """Of one world, in a process of its own: its requests, what alarmed by week, and requests until shifts were found."""
    with psycopg.connect(url, options="-c TimeZone=UTC") as connection:
        watched = Watched(build(connection, seed=seed, weeks=weeks, requests_per_week=size))
    found = {
        week: sorted({f"{one.name} ({one.test}, {one.against})" for one in alarms})
        for week, alarms in false_alarms(watched, judged).items()
    }
    return len(watched.world.user), found, shifts(watched, times, seed, every)


def summary(alarmed: dict[str, list[str]], quiet_weeks: int, after: dict[str, list[int | None]]) -> dict[str, Any]:
    """The figures of a measurement, as plain values."""
    ninth = {name: _ninth(took) for name, took in after.items()}
    within = [took is not None and took <= WITHIN_REQUESTS for found in after.values() for took in found]
    slowest = max(ninth, key=lambda name: float("inf") if (took := ninth[name]) is None else took)
    interval = stats.binomtest(len(alarmed), quiet_weeks).proportion_ci(0.95)
    return {
        "drift_detected_after": ninth[slowest],
        "drift_false_alarms": round(len(alarmed) / quiet_weeks, 4),
        "quiet_weeks": quiet_weeks,
        "false_alarms_95": [round(float(interval.low), 4), round(float(interval.high), 4)],
        "weeks_with_alarm": alarmed,
        "shifts": len(within),
        "found_within_5000_rate": round(float(np.mean(within)), 4),
        "slowest_feature": slowest,
        "median_by_feature": {
            name: int(np.median([took for took in found if took is not None])) if any(found) else None
            for name, found in after.items()
        },
        "worst_by_feature": {
            name: None if None in found else max(took or 0 for took in found) for name, found in after.items()
        },
    }


def _ninth(took: list[int | None]) -> int | None:
    """The time by which nine of ten are found."""
    ordered = sorted(float("inf") if one is None else one for one in took)
    value = ordered[int(np.ceil(0.9 * len(ordered))) - 1]
    return None if value == float("inf") else int(value)


def _midnight(day: date) -> Any:
    return Window(day, day).since


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short world: proves that it runs, measures little")
    quick = parser.parse_args(arguments).quick
    report = measure(quick) | {"quick": quick, "machine": machine()}
    print(json.dumps(report))
    return report


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
