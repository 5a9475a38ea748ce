"""The fairness and diversity report of a day: the two weeks until then."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, date, datetime, timedelta
from functools import partial
from typing import Any

import numpy as np
import psycopg
from numpy.typing import NDArray
from pgvector.psycopg import register_vector

from orchestration.compute.beyond_accuracy import BeyondAccuracy, beyond_accuracy
from orchestration.compute.drift.outcomes import picked, read_outcomes
from orchestration.compute.drift.served import Request, Window, read_requests
from orchestration.compute.drift.vectors import taken
from orchestration.compute.fairness import plots
from orchestration.compute.fairness.exposure import GroupExposure, group_exposure
from orchestration.compute.fairness.groups import item_groups, people_segments
from orchestration.compute.fairness.people import SegmentQuality, segment_quality
from orchestration.compute.interactions import Interactions, load_interactions
from orchestration.compute.lake import Lake
from orchestration.compute.report_files import Draw
from orchestration.compute.telling import Say, silent
from orchestration.compute.vectors import plain
from schemas.personal_data import RECENT_DAYS
from schemas.ranker import TEXT_DIM

WINDOW_DAYS = 2 * 7
"""Whole weeks, and no more than `recent_events` keeps: there outcomes are read from."""
assert WINDOW_DAYS <= RECENT_DAYS
MOST_CHOOSERS = 100_000
"""People whose choices are counted at most."""
MOST_UNEVEN = 2.0
"""A group that gets more than twice, or less than half, of what its relevance earns is told: Europe's and America's courts
ask for reasons at four fifths; lists that put the best first are steeper than that by design."""
LEAST_OF_OTHERS = 0.5
"""A segment that picks half as often as everybody else is told."""
PROVIDER_ATTRIBUTE = "provider"


@dataclass(slots=True)
class FairnessReport:
    """Figures of the window that ended with `day`. `diversity` has a row per day that served something."""

    day: date
    requests: int
    people: int
    exposure: dict[str, list[GroupExposure]] = field(default_factory=dict)
    segments: list[SegmentQuality] = field(default_factory=list)
    diversity: dict[date, BeyondAccuracy] = field(default_factory=dict)

    @property
    def uneven(self) -> list[str]:
        """Groups whose whole interval lies beyond `MOST_UNEVEN`, in words."""
        return [
            f"{kind} {one.group} gets {one.ratio:.2f} times the exposure that its relevance earns ({one.low:.2f}–{one.high:.2f})"
            for kind, found in self.exposure.items()
            for one in found
            if one.ratio is not None
            and one.low is not None
            and one.high is not None
            and (one.high < 1 / MOST_UNEVEN or one.low > MOST_UNEVEN)
        ]

    @property
    def left_behind(self) -> list[str]:
        """Segments whose whole interval lies below `LEAST_OF_OTHERS`, in words."""
        return [
            f"{one.segment}: {one.ratio:.2f} times the picks per request of everybody else ({one.low:.2f}–{one.high:.2f})"
            for one in self.segments
            if one.ratio is not None and one.low is not None and one.high is not None and one.high < LEAST_OF_OTHERS
        ]

    @property
    def whole(self) -> BeyondAccuracy | None:
        """The newest day's figures."""
        return self.diversity[max(self.diversity)] if self.diversity else None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; names nobody."""
        return {
            "day": self.day.isoformat(),
            "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "window_days": WINDOW_DAYS,
            "requests": self.requests,
            "people": self.people,
            "uneven": self.uneven,
            "left_behind": self.left_behind,
            "exposure": {kind: [asdict(one) for one in found] for kind, found in self.exposure.items()},
            "segments": [asdict(one) for one in self.segments],
            "diversity": {day.isoformat(): asdict(one) for day, one in sorted(self.diversity.items())},
        }

    def plots(self) -> dict[str, Draw]:
        found: dict[str, Draw] = {
            f"exposure-{kind}": partial(plots.draw_exposure, rows) for kind, rows in self.exposure.items()
        }
        found["segments"] = partial(plots.draw_segments, self.segments)
        found["diversity"] = partial(plots.draw_diversity, self.diversity)
        return found


def fairness_report(
    url: str,
    lake: Lake,
    day: date,
    *,
    provider: str = PROVIDER_ATTRIBUTE,
    profile_columns: Sequence[str] = (),
    progress: Say = silent,
) -> FairnessReport:
    """Look at what was served in the two weeks until the end of `day` (UTC), and what came of it.

    `provider` names the items' attribute that says whose one is; `profile_columns` are those of people's profiles by which
    they may be told apart here, none by default.
    """
    window = Window.ending(day, WINDOW_DAYS)
    with psycopg.connect(url, options="-c TimeZone=UTC", application_name="larder-fairness") as connection:
        requests = [one for one in read_requests(connection, window) if one.item_ids]
        report = FairnessReport(day, len(requests), len({one.user_id for one in requests}))
        if not requests:
            return report
        outcomes = read_outcomes(connection, lake, window)
        hits = [picked(one, outcomes) for one in requests]
        interactions = load_interactions(lake, connection)
        progress(f"{window.first} to {window.last}: {len(requests):,} requests of {report.people:,} people")
        chosen = [
            (who, item) for who, items in taken(lake, connection, window, most=MOST_CHOOSERS).items() for item in items
        ]
        led = [(one.user_id, one.item_ids[place]) for one, hit in zip(requests, hits, strict=True) for place in np.flatnonzero(hit)]  # fmt: skip
        shown = [(one.user_id, one.item_ids) for one in requests]
        for kind, groups in item_groups(connection, interactions, window.since, provider).items():
            report.exposure[kind] = group_exposure(groups, shown, chosen, led)
        people = [one.user_id for one in requests]
        profiles = _profiles(connection, people) if profile_columns else {}
        report.segments = segment_quality(
            people_segments(interactions, people, [one.served_at for one in requests], profiles, profile_columns),
            people,
            np.array([1 + int(hit.argmax()) if hit.any() else np.inf for hit in hits]),
        )
        report.diversity = _diversity(connection, interactions, window, requests)
    return report


def _diversity(
    connection: psycopg.Connection[Any], interactions: Interactions, window: Window, requests: Sequence[Request]
) -> dict[date, BeyondAccuracy]:
    """What each day's lists were like; how common an item is counts what happened before the window."""
    before = interactions.take(interactions.occurred_at < round(window.since.timestamp() * 1_000_000))
    place = {item_id: number for number, item_id in enumerate(interactions.item_ids.tolist())}
    texts = _text_vectors(connection, place)
    found = {}
    for number in range(WINDOW_DAYS):
        day = window.first + timedelta(days=number)
        rows = [[place.get(item, -1) for item in one.item_ids] for one in requests if one.served_at.date() == day]
        if rows:
            found[day] = beyond_accuracy(_padded(rows), None, before, text_vectors=texts)
    return found


def _padded(rows: Sequence[Sequence[int]]) -> NDArray[np.int32]:
    """`(r, k)`, −1 where a list is shorter."""
    lists = np.full((len(rows), max(len(row) for row in rows)), -1, np.int32)
    for number, row in enumerate(rows):
        lists[number, : len(row)] = row
    return lists


def _text_vectors(connection: psycopg.Connection[Any], place: dict[str, int]) -> NDArray[np.float32] | None:
    """`(items, 384)`, zeros for items without text; None where no item has a vector."""
    register_vector(connection)
    vectors = np.zeros((len(place), TEXT_DIM), np.float32)
    some = False
    with connection.transaction(), connection.cursor(name="fairness_texts") as cursor:
        cursor.execute("SELECT item_id, vector FROM text_vectors")
        for item_id, vector in cursor:
            if item_id in place:
                vectors[place[item_id]] = plain(vector)
                some = True
    return vectors if some else None


def _profiles(connection: psycopg.Connection[Any], people: Sequence[str]) -> dict[str, dict[str, Any]]:
    return dict(
        connection.execute(
            "SELECT user_id, profile FROM people WHERE user_id = ANY(%s)", (sorted(set(people)),)
        ).fetchall()
    )
