"""The pictures of docs/monitoring.md, from the simulator's world: `python -m tests.benchmarks.monitoring_pictures docs`."""

from __future__ import annotations

import sys
import tempfile
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import psycopg

from infra import postgres
from infra.feature_tables import ensure_view_tables
from orchestration.compute.drift.judge import judge
from orchestration.compute.drift.plots import draw_distances
from orchestration.compute.drift.served import Window
from orchestration.compute.drift.sketches import DAY, WEEK
from orchestration.compute.fairness.exposure import group_exposure
from orchestration.compute.fairness.plots import draw_exposure
from orchestration.compute.report_files import save_plot
from schemas.views import USER_ACTIVITY
from tests.benchmarks.loop_drift import SHIFT_SIGMA, Watched, first_judged_week, sigma
from tests.quiet_world import Moved, QuietWorld, build

SEED, WEEKS = 1, 9
PLACE = 4
"""Of the feature that moves: user_activity.value_mean_180d, what people's ratings are on average."""
AFTER_DAYS = 3


def main(folder: Path) -> None:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        url = postgres.start_embedded(Path(scratch) / "pg")
        postgres.migrate(url)
        ensure_view_tables(url)
        with psycopg.connect(url, options="-c TimeZone=UTC") as connection:
            world = build(connection, seed=SEED, weeks=WEEKS)
    save_plot(folder / "monitoring-drift.png", partial(draw_distances, _moved(world)))
    save_plot(folder / "monitoring-exposure.png", partial(draw_exposure, _exposure(world)))


def _moved(world: QuietWorld) -> list[Any]:
    """The findings of the report that comes `AFTER_DAYS` after one feature moved by half a standard deviation."""
    watched = Watched(world)
    begin = world.day(first_judged_week(world) + 2, 0)
    day = begin + timedelta(days=AFTER_DAYS - 1)
    onset = world.requests_before(begin)
    moved = Moved(USER_ACTIVITY.name, PLACE, onset, SHIFT_SIGMA * sigma(world, USER_ACTIVITY, PLACE, onset))
    for span_days in (DAY, WEEK):
        shifted = world.features(USER_ACTIVITY, Window.ending(day, span_days), moved)
        watched.kept[span_days, day] = {**watched.window(span_days, day), **shifted}
    return judge(watched.comparisons(day), others=2)


def _exposure(world: QuietWorld) -> list[Any]:
    """Exposure against choices by category, in the last two weeks."""
    window = Window.ending(world.day(world.first_week + WEEKS - 1), 14)
    requests, outcomes = world.requests(window)
    groups = {item: {name: 1 / len(names) for name in names} for item, names in world.categories.items()}
    chosen = [(one.user_id, item) for one in requests for item in outcomes[one.request_id]]
    picked = [(who, item) for (who, item), one in zip(chosen, requests, strict=True) if item in one.item_ids]
    return group_exposure(groups, [(one.user_id, one.item_ids) for one in requests], chosen, picked)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
