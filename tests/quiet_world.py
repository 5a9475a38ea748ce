"""Weeks of requests in the simulator's world in which nothing changes but what always does: seasons, fashions, growth.

The world is the built-in one, frozen before any ranker saw it. A request is made where a person is about to take something;
the list holds what the person comes across by the world's own law, ordered by true relevance and some noise. Features are
those of the declared views, made by the point-in-time code of training from all of the world's events.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta

import numpy as np
import psycopg
import pyarrow as pa
import pyarrow.dataset as ds
from numpy.typing import NDArray

from orchestration.compute.drift.outcomes import calibrated, label_means
from orchestration.compute.drift.served import Request, Window, request_sketches, view_sketches
from orchestration.compute.drift.sketches import Kept, Name
from orchestration.compute.lake import EVENT_SCHEMA, Lake
from orchestration.compute.point_in_time import PointInTime
from orchestration.sources.simulator import BATCH_KINDS, Simulator, item_id, user_id
from orchestration.sources.simulator_text import category_names
from orchestration.sources.simulator_world import (
    PEOPLE_BLOCK,
    K,
    World,
    exposure_of,
    item_table,
    items_before,
    people_block,
    wants_of,
)
from schemas.features import FeatureView
from schemas.views import VIEWS

LONGEST_WINDOW_WEEKS = 26
"""Features count up to 180 days: before so many weeks a world is still filling them."""
SHOWN, CONSIDERED = 10, 64
NOISE = 0.7
MODEL = "quiet"
START = date(2024, 1, 1)  # a Monday


class EventsInMemory(Lake):
    """A lake that is a table."""

    def __init__(self, table: pa.Table) -> None:
        super().__init__("file:///nowhere")
        self.table = table

    def events(self, connection: psycopg.Connection, first: date | None = None, last: date | None = None) -> ds.Dataset:
        return ds.dataset(self.table)


@dataclass
class QuietWorld:
    """Requests of whole weeks, in order of time. Arrays have a row per request, r in all.

    `blocks` holds for each view the request `(n,)`, key `(n,)` and vector `(n, f)` of every read, in order of time; `keys`
    the texts of the keys.
    """

    start: date
    first_week: int
    weeks: int
    seconds: NDArray[np.int64]
    user: NDArray[np.int64]
    shown: NDArray[np.int64]
    scores: NDArray[np.float64]
    taken: NDArray[np.int64]
    categories: dict[str, list[str]]
    vectors: NDArray[np.float32]
    blocks: dict[str, tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]]
    keys: dict[str, list[tuple[str, ...]]]
    calibration: tuple[float, float] = (1.0, -4.0)
    _bounds: dict[date, int] = field(default_factory=dict)
    _days: dict[date, tuple[list[Request], dict[str, set[str]]]] = field(default_factory=dict)

    def day(self, week: int, weekday: int = 6) -> date:
        return self.start + timedelta(days=week * 7 + weekday)

    def requests_before(self, day: date) -> int:
        """How many requests were made before midnight of `day`."""
        if day not in self._bounds:
            seconds = int((day - self.start).days) * 86_400
            self._bounds[day] = int(np.searchsorted(self.seconds, seconds))
        return self._bounds[day]

    def rows(self, window: Window) -> slice:
        return slice(self.requests_before(window.first), self.requests_before(window.last + timedelta(days=1)))

    def requests(self, window: Window) -> tuple[list[Request], dict[str, set[str]]]:
        """What would have been logged of the window, and what was picked."""
        found: list[Request] = []
        outcomes: dict[str, set[str]] = {}
        for number in range((window.last - window.first).days + 1):
            requests, picked = self._day(window.first + timedelta(days=number))
            found += requests
            outcomes |= picked
        return found, outcomes

    def _day(self, day: date) -> tuple[list[Request], dict[str, set[str]]]:
        if day not in self._days:
            begin = datetime.combine(self.start, time(), UTC)
            rows = self.rows(Window(day, day))
            found, outcomes = [], {}
            for row in range(rows.start, rows.stop):
                items = tuple(item_id(number) for number in self.shown[row].tolist())
                at = begin + timedelta(seconds=int(self.seconds[row]))
                scores = tuple(self.scores[row].tolist())
                found.append(Request(str(row), user_id(int(self.user[row])), at, False, MODEL, items, scores, {}, ()))
                outcomes[str(row)] = {item_id(int(self.taken[row]))}
            self._days[day] = found, outcomes
        return self._days[day]

    def features(self, view: FeatureView, window: Window, moved: Moved | None = None) -> dict[Name, Kept]:
        """Sketches of the view's features, as `feature_sketches` makes them of the log."""
        request, key, values = self.blocks[view.name]
        rows = self.rows(window)
        here = slice(int(np.searchsorted(request, rows.start)), int(np.searchsorted(request, rows.stop)))
        newest = here.stop - 1 - np.unique(key[here][::-1], return_index=True)[1]
        vectors = values[newest]
        if moved is not None and moved.view == view.name:
            vectors = vectors.copy()
            vectors[request[newest] >= moved.onset, moved.place] += moved.by
        names = self.keys[view.name]
        return view_sketches(view, [names[number] for number in key[newest].tolist()], list(vectors))

    def window(self, day: date, span_days: int) -> dict[Name, Kept]:
        """Everything that a report compares, but vectors."""
        window = Window.ending(day, span_days)
        requests, outcomes = self.requests(window)
        kept: dict[Name, Kept] = {}
        for view in VIEWS:
            kept |= self.features(view, window)
        kept |= request_sketches(requests, MODEL, self.categories)
        kept |= label_means(requests, outcomes, MODEL)
        return kept | calibrated(requests, outcomes, MODEL, self.calibration)[0]

    def people_vectors(self, window: Window, what: str) -> NDArray[np.float32]:
        """`(people, d)`: the mean vector of what each person took or was shown."""
        rows = self.rows(window)
        items = self.taken[rows, None] if what == "taken" else self.shown[rows]
        people, place = np.unique(self.user[rows], return_inverse=True)
        total = np.zeros((len(people), self.vectors.shape[1]), np.float32)
        np.add.at(total, place, self.vectors[items].mean(axis=1))
        return np.asarray(total / np.bincount(place)[:, None], np.float32)


@dataclass(frozen=True)
class Moved:
    """A feature that is `by` larger in every read from request `onset` on."""

    view: str
    place: int
    onset: int
    by: float


def build(
    connection: psycopg.Connection,
    *,
    seed: int,
    weeks: int,
    requests_per_week: int = 5_000,
    items: int = 2_000,
) -> QuietWorld:
    """The world `seed` with requests in its last `weeks` weeks, after those that fill the longest window.

    The catalogue goes into the empty database behind `connection`.
    """
    total = LONGEST_WINDOW_WEEKS + weeks
    # As many events a week as requests, about: events_per_person is a mean over all who come by then.
    people = round(requests_per_week * total / 68)
    world = World(start=START, seed=seed, people=people, items=items, days=total * 7)
    simulator = Simulator(world, world.started_at + timedelta(weeks=total))
    batches = list(simulator.batches())
    columns = {name: np.concatenate([getattr(one, name) for one in batches]) for name in batches[0].__slots__}
    catalogue = item_table(world, items_before(world, total * 7 * 86_400))
    names = {item_id(number): list(category_names(row[:K])) for number, row in enumerate(catalogue.vector)}
    with connection.transaction(), connection.cursor() as cursor:
        cursor.executemany(
            "INSERT INTO items (item_id, title, categories) VALUES (%s, '', %s) ON CONFLICT DO NOTHING",
            list(names.items()),
        )
    order = np.argsort(columns["seconds"], kind="stable")
    columns = {name: values[order] for name, values in columns.items()}
    lake = EventsInMemory(_events(world, columns))
    asked = np.flatnonzero((columns["seconds"] >= LONGEST_WINDOW_WEEKS * 7 * 86_400) & (columns["kind"] != 2))
    user, seconds, taken = (columns[name][asked] for name in ("user", "seconds", "item"))
    shown, scores = _lists(world, catalogue, user, seconds, taken)
    blocks, keys = _features(lake, connection, world, user, seconds, shown, names)
    return QuietWorld(
        START, LONGEST_WINDOW_WEEKS, weeks, seconds, user, shown, scores, taken, names, catalogue.vector, blocks, keys
    )


def _events(world: World, columns: dict[str, NDArray[np.int64]]) -> pa.Table:
    start = int(world.started_at.timestamp()) * 1_000_000
    at = pa.array(start + columns["seconds"] * 1_000_000, pa.timestamp("us", tz="UTC"))
    value = np.where(columns["kind"] == 1, columns["value"], np.nan).astype(np.float64)
    return pa.table(
        {
            "event_id": pa.array([str(row) for row in range(len(at))]),
            "user_id": pa.array([user_id(number) for number in columns["user"].tolist()]),
            "item_id": pa.array([item_id(number) for number in columns["item"].tolist()]),
            "kind": pa.array([BATCH_KINDS[kind] for kind in columns["kind"].tolist()]),
            "value": pa.array(value, from_pandas=True),
            "occurred_at": at,
            "known_at": at,
            "request_id": pa.nulls(len(at), pa.string()),
        },
        schema=EVENT_SCHEMA,
    )


def _lists(
    world: World, catalogue: object, user: NDArray[np.int64], seconds: NDArray[np.int64], taken: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """What each request shows `(r, SHOWN)`, best first, and the scores: noisy true relevance."""
    vector, quality, available = catalogue.vector, catalogue.quality, catalogue.available  # type: ignore[attr-defined]
    generator = np.random.default_rng(world.seed)
    shown = np.zeros((len(user), SHOWN), np.int64)
    scores = np.zeros((len(user), SHOWN))
    for week in np.unique(seconds // (7 * 86_400)).tolist():
        exposure = exposure_of(world, week)
        items = len(exposure) // 7
        in_week = np.flatnonzero(seconds // (7 * 86_400) == week)
        for block in np.unique(user[in_week] // PEOPLE_BLOCK).tolist():
            here = in_week[user[in_week] // PEOPLE_BLOCK == block]
            day = seconds[here] / 86_400
            drawn = (np.floor(day) - week * 7)[:, None] + generator.random((len(here), CONSIDERED - 1))
            considered = np.minimum(np.searchsorted(exposure, drawn, side="right") % items, items - 1)
            considered = np.concatenate([considered, taken[here, None]], axis=1)
            wants = wants_of(world, people_block(world, block), user[here] % PEOPLE_BLOCK, day)
            utility = np.einsum("nrd,nd->nr", vector[considered], wants) + quality[considered]
            noisy = utility + NOISE * generator.standard_normal(utility.shape)
            noisy[available[considered] > seconds[here, None]] = -np.inf
            # An item that was drawn twice is shown once.
            ordered = np.sort(considered, axis=1)
            place = np.argsort(considered, axis=1, kind="stable")
            again = np.zeros_like(considered, bool)
            np.put_along_axis(again, place[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
            noisy[again] = -np.inf
            best = np.argsort(-noisy, axis=1)[:, :SHOWN]
            shown[here] = np.take_along_axis(considered, best, axis=1)
            scores[here] = np.take_along_axis(noisy, best, axis=1)
    return shown, scores


def _features(
    lake: Lake,
    connection: psycopg.Connection,
    world: World,
    user: NDArray[np.int64],
    seconds: NDArray[np.int64],
    shown: NDArray[np.int64],
    categories: dict[str, list[str]],
) -> tuple[
    dict[str, tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]], dict[str, list[tuple[str, ...]]]
]:
    at = int(world.started_at.timestamp()) * 1_000_000 + seconds * 1_000_000
    listed = sorted({name for names in categories.values() for name in names})
    member = np.zeros((len(categories), len(listed)), bool)
    for row, names in enumerate(categories.values()):
        member[row, [listed.index(name) for name in names]] = True
    blocks: dict[str, tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]] = {}
    keys: dict[str, list[tuple[str, ...]]] = {}
    with PointInTime(lake, connection) as ask:
        for view in VIEWS:
            if view.entity.keys == ("user_id",):
                request, number = np.arange(len(user), dtype=np.int64), user
                texts: list[tuple[str, ...]] = [(user_id(one),) for one in range(int(user.max()) + 1)]
            elif view.entity.keys == ("item_id",):
                request, number = np.repeat(np.arange(len(user)), SHOWN), shown.ravel()
                texts = [(item_id(one),) for one in range(len(categories))]
            else:
                request, category = np.nonzero(member[shown].any(axis=1))
                number = user[request] * len(listed) + category
                texts = [(user_id(one), name) for one in range(int(user.max()) + 1) for name in listed]
            values = np.concatenate(list(_vectors(ask, view, texts, request, number, at)))
            blocks[view.name], keys[view.name] = (request, number, values), texts
    return blocks, keys


def _vectors(
    ask: PointInTime,
    view: FeatureView,
    texts: list[tuple[str, ...]],
    request: NDArray[np.int64],
    number: NDArray[np.int64],
    at: NDArray[np.int64],
) -> Iterator[NDArray[np.float32]]:
    columns = [np.array([text[place] for text in texts], np.str_) for place in range(len(view.entity.keys))]
    for begin in range(0, len(request), 200_000):
        rows = slice(begin, begin + 200_000)
        keys = {name: column[number[rows]] for name, column in zip(view.entity.keys, columns, strict=True)}
        found = ask.features(view, keys, at[request[rows]])
        yield np.where(found.mask > 0, found.values, np.float32(np.nan))
