"""What a run has to do: which partitions of which assets, and which steps of learning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING

from orchestration.compute import learning_steps
from orchestration.compute.stale import undrained_days
from schemas.views import VIEWS, fingerprint

if TYPE_CHECKING:
    from orchestration.resources import Larder

RETRAIN_AFTER_DAYS = 7

Part = tuple[tuple[str, ...], date, date]
"""Assets, and the first and the last day of which they are built together."""


@dataclass(frozen=True, slots=True)
class Due:
    """What a run has to do."""

    parts: Sequence[Part]
    """Missing and stale partitions, in the order in which they are built."""
    learning: tuple[str, ...]
    """Assets."""
    too_few: str | None
    """Why there is nothing to learn from yet."""
    has_model: bool


def what_is_due(larder: Larder, retrain: bool) -> Due:
    """What is missing, stale or old of a deployment; learning in any case if `retrain`, once there is enough."""
    first, yesterday = larder.record.start_date, datetime.now(UTC).date() - timedelta(days=1)
    with larder.connect() as connection:
        lake = dict(connection.execute("SELECT day, rows FROM lake_files").fetchall())
        built = {
            (view, day): (definition, events, stale)
            for view, day, definition, events, stale in connection.execute(
                "SELECT view, partition_date, definition_hash, events, stale_at IS NOT NULL FROM feature_ledger"
            )
        }
        undrained = undrained_days(connection, yesterday + timedelta(days=1))
        latest = connection.execute(
            "SELECT manifest->>'trained_until', manifest->>'feature_fingerprint' FROM model_versions "
            "ORDER BY created_at DESC LIMIT 1"
        ).fetchone()
        # What an interrupted run left is gone on with, whatever came in since.
        left = learning_steps.left(
            larder.lake, connection, larder.artifacts_url, newest=timedelta(days=RETRAIN_AFTER_DAYS)
        )
        too_few = learning_steps.too_few(connection)
    days = [first + timedelta(days=offset) for offset in range((yesterday - first).days + 1)]
    wanted: dict[str, set[date]] = {"events": {max(day, first) for day in undrained} & set(days)}
    for day in days:
        entries = [built.get((view.name, day)) for view in VIEWS]
        # What a view was built from, and nothing has changed since, had been reported before.
        if not any(entry and entry[1:] == (lake.get(day, 0), False) for entry in entries):
            wanted["events"].add(day)
    for view in VIEWS:
        wanted[view.name] = {
            day
            for day in days
            if built.get((view.name, day)) != (view.definition_hash, lake.get(day, 0), False)
            # What was posted late makes the days after it stale once it is drained, in this very run.
            or any(0 <= (day - posted).days < view.max_window_days for posted in undrained)
        }
    served = yesterday - timedelta(days=max(view.ttl_days for view in VIEWS) - 1)
    # Days that requests read go ahead if one of those is stale, but not of what is drained into their windows.
    ahead = any(stale and day >= served for (_, day), (_, _, stale) in built.items())
    parts = _parts(wanted)
    if ahead and not (undrained and undrained[0] < served):
        parts = _cut(parts, served)
    old = (
        latest is None
        or latest[1] != fingerprint()
        or (datetime.now(UTC) - datetime.fromisoformat(latest[0])) > timedelta(days=2 * RETRAIN_AFTER_DAYS)
    )
    learning = () if too_few else left if retrain or old or left != learning_steps.STEPS else ()
    return Due(parts, learning, too_few, latest is not None)


def _parts(wanted: Mapping[str, set[date]]) -> list[Part]:
    """Days by asset as runs, in order: one for each stretch of days that want the same views, and `events` with them.

    They come one after the other, so that none reads a day before it was drained; runs that may be side by side must be
    as `rebuild_parts` has them.
    """
    stretches: list[tuple[tuple[str, ...], list[date]]] = []
    for day in sorted({day for days in wanted.values() for day in days}):
        views = tuple(view.name for view in VIEWS if day in wanted[view.name])
        if stretches and stretches[-1][0] == views and stretches[-1][1][-1] + timedelta(days=1) == day:
            stretches[-1][1].append(day)
        else:
            stretches.append((views, [day]))
    # A day's events are counted in a moment: for them alone no stretch is cut.
    return [
        (("events", *views) if wanted["events"] & set(days) else views, days[0], days[-1]) for views, days in stretches
    ]


def _cut(parts: Sequence[Part], day: date) -> list[Part]:
    """The parts from `day` on, then those before it."""
    after = [(assets, max(first, day), last) for assets, first, last in parts if last >= day]
    before = [(assets, first, min(last, day - timedelta(days=1))) for assets, first, last in parts if first < day]
    return after + before
