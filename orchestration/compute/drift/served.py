"""What a window served, as sketches: features as the ranker got them, scores, what was shown, from where, in what state.

A person, and an item, is one observation of a window, by its newest read: a busy person or a popular item is not a
distribution of its own, and what hangs together is not counted as if it did not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from typing import Any

import numpy as np
import psycopg
from numpy.typing import NDArray

from orchestration.compute.drift.sketches import CATEGORIES, FEATURES, SCORES, Counts, Kept, Name, counts_of, sketch
from schemas.features import FeatureView
from schemas.views import VIEWS, fingerprint

MOST_REQUESTS = 200_000
"""Requests of a window that are looked at, about: more would make nothing clearer."""
_BATCH = 2_000
CONTROL = "control"
"""The arm that gets what everybody gets. Of an experiment without one every arm counts as changed."""


@dataclass(frozen=True, slots=True)
class Window:
    """The whole days (UTC) from `first` to `last`."""

    first: date
    last: date

    @classmethod
    def ending(cls, last: date, span_days: int) -> Window:
        return cls(last - timedelta(days=span_days - 1), last)

    @property
    def since(self) -> datetime:
        return datetime.combine(self.first, time(), UTC)

    @property
    def until(self) -> datetime:
        return datetime.combine(self.last, time(), UTC) + timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Request:
    """One answered request, as it was logged."""

    request_id: str
    user_id: str
    served_at: datetime
    wish: bool
    model_version: str
    item_ids: tuple[str, ...]
    scores: tuple[float, ...]
    sources: dict[str, int]
    degraded: tuple[str, ...]
    arm: str | None = None
    """The arm of the experiment that the person is in; None: they are in none."""

    @property
    def usual(self) -> bool:
        """False for what an experiment changed: that it differs is meant, and its report says by how much."""
        return self.arm is None or self.arm == CONTROL

    @property
    def plain(self) -> bool:
        """True where scores are the ranker's alone: no wish was added, and it did rank."""
        return not self.wish and "ranker" not in self.degraded and "database" not in self.degraded


def read_requests(connection: psycopg.Connection[Any], window: Window, *, most: int = MOST_REQUESTS) -> list[Request]:
    """What was logged of the window, oldest first; of every nth person where there is more than `most`."""
    (logged,) = connection.execute(
        "SELECT count(*) FROM served_requests WHERE served_at >= %s AND served_at < %s", (window.since, window.until)
    ).fetchone() or (0,)
    rows = connection.execute(
        "SELECT request_id, user_id, served_at, wish_hash IS NOT NULL, model_version, item_ids, scores, sources, degraded, arm "
        "FROM served_requests WHERE served_at >= %s AND served_at < %s "
        "AND ('x' || left(md5(user_id), 8))::bit(32)::bigint %% %s = 0 ORDER BY served_at, request_id",
        (window.since, window.until, max(1, -(-logged // most))),
    )
    return [
        Request(
            who, user, at, wish, model, tuple(items), tuple(scores), dict(sources or {}), tuple(degraded or ()), arm
        )
        for who, user, at, wish, model, items, scores, sources, degraded, arm in rows
    ]


def feature_sketches(connection: psycopg.Connection[Any], window: Window) -> dict[Name, Kept]:
    """A sketch of every feature of every view, from reads that were logged under the definitions of today."""
    found: dict[Name, Kept] = {}
    for view in VIEWS:
        newest: dict[tuple[str, ...], NDArray[np.float32]] = {}
        for keys, block in _reads(connection, view, window):
            newest.update(zip(keys, block, strict=True))
        found |= view_sketches(view, list(newest), list(newest.values()))
    return found


def view_sketches(
    view: FeatureView, keys: list[tuple[str, ...]], vectors: list[NDArray[np.float32]]
) -> dict[Name, Kept]:
    """Sketches of the view's features from one vector `(f,)` a key, NaN where missing.

    Keys that share their first column, such as a person's categories, are one cluster.
    """
    if not keys:
        return {}
    clusters = len({key[0] for key in keys})
    values = np.stack(vectors)
    version = fingerprint((view,))
    return {
        Name(FEATURES, f"{view.name}.{feature.name}", version): sketch(values[:, place], clusters)
        for place, feature in enumerate(view.features)
    }


def request_sketches(
    requests: list[Request], champion: str | None, categories: dict[str, list[str]]
) -> dict[Name, Kept]:
    """Scores under the champion, and shares of categories shown, of candidate sources and of degraded answers.

    `categories` gives each item's. A person's newest request stands for their scores, all of them for the shares.
    """
    newest = {one.user_id: one.scores for one in requests if one.model_version == champion and one.plain and one.scores}
    found: dict[Name, Kept] = {}
    if newest and champion:
        lists = [np.array(scores, np.float64) for scores in newest.values()]
        for name, values in (
            ("best", [scores[0] for scores in lists]),
            ("mean", [scores.mean() for scores in lists]),
            ("spread", [scores[0] - scores[-1] for scores in lists]),
        ):
            found[Name(SCORES, name, champion)] = sketch(np.array(values), len(values))
    shown: dict[str, Counter[str]] = {}
    sources: dict[str, Counter[str]] = {}
    degraded: dict[str, Counter[str]] = {}
    for one in requests:
        if one.model_version == champion:
            seen = shown.setdefault(one.user_id, Counter())
            for item_id in one.item_ids:
                names = categories.get(item_id) or ["(none)"]
                for name in names:
                    seen[name] += 1 / len(names)  # type: ignore[assignment]  # a Counter adds fractions as well
        sources.setdefault(one.user_id, Counter()).update(one.sources)
        degraded.setdefault(one.user_id, Counter()).update(one.degraded or ("(full)",))
    for name, by_person, version in (
        ("shown", shown, champion or ""),
        ("sources", sources, ""),
        ("degraded", degraded, ""),
    ):
        kept: Counts = counts_of(by_person.values())
        if kept.shares:
            found[Name(CATEGORIES, name, version)] = kept
    return found


def load_categories(connection: psycopg.Connection[Any]) -> dict[str, list[str]]:
    """Each item's categories."""
    return dict(connection.execute("SELECT item_id, categories FROM items").fetchall())


def _reads(
    connection: psycopg.Connection[Any], view: FeatureView, window: Window
) -> Iterator[tuple[list[tuple[str, ...]], NDArray[np.float32]]]:
    """Keys and vectors `(k, f)` of each read of `view` in the window, oldest first."""
    names = [feature.name for feature in view.features]
    width = len(view.entity.keys)
    with connection.transaction(), connection.cursor(name="drift_reads") as cursor:
        cursor.itersize = _BATCH
        cursor.execute(
            "SELECT keys, numbers FROM served_features WHERE view = %s AND read_at >= %s AND read_at < %s "
            "AND definition_hash = %s AND features = %s "
            # What a changed arm shows has other features by right.
            "AND NOT EXISTS (SELECT FROM served_requests AS r WHERE r.request_id = served_features.request_id AND r.arm <> %s) "
            "ORDER BY read_at, read_id",
            (view.name, window.since, window.until, fingerprint((view,)), names, CONTROL),
        )
        for keys, numbers in cursor:
            block = np.array(numbers, np.float32).reshape(-1, len(names))  # NULL is NaN
            yield [tuple(keys[row * width : (row + 1) * width]) for row in range(len(block))], block
