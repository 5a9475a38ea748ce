"""The simulated world itself: its items, its people, what they want and what they come across, as functions of time.

Everything is a function of (seed, block), so the world does not depend on how far it is simulated. The constants were
frozen before any ranker was trained on this world; do not tune them on one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from orchestration.sources.simulator_text import STYLES, THEMES
from schemas.errors import SettingsError

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

K, M = len(THEMES), len(STYLES)
DAY, WEEK = 86_400, 7 * 86_400
PEOPLE_BLOCK, ITEM_BLOCK = 1000, 256

# Utility, in units of the Gumbel noise's scale.
TASTE, STYLE, QUALITY = 4.0, 0.8, 0.5
YEARLY, WEEKLY = 0.35, 0.25

INITIAL_ITEMS_RATE, INITIAL_PEOPLE_RATE = 0.6, 0.4
CASUAL_RATE = 0.22
"""Share of people with one short session and no more."""
ACTIVITY_MAX, ACTIVITY_MEAN = 4.0, 1.403
"""Where the log-normal activity (σ = 1) is cut, and its mean then."""
CASUAL_EVENTS_MAX = 4
SESSION_EVENTS_MEAN = 4.2
DRIFT_RAMP_DAYS = 3.0

AGE_BANDS = ("under-25", "25-34", "35-49", "50-64", "65-plus")
REGIONS = ("north", "south", "east", "west", "islands")

# First element of each generator's key: streams never overlap.
ITEMS_STREAM, TEXT_STREAM, PEOPLE_STREAM, TILT_STREAM, SCHEDULE_STREAM, CHOICE_STREAM = range(6)


@dataclass(frozen=True)
class World:
    """Parameters of a world. `people` and `items` are reached after `days`; both keep growing at the same pace after.

    events_per_person: mean over those `people` within the first `days` (heavy-tailed; should stay well below `items`).
    drift_at: day from which everybody's taste moves to other themes within three days; drift_strength: 0–1, how far.
    """

    start: date
    seed: int = 7
    people: int = 2000
    items: int = 1200
    days: int = 120
    events_per_person: float = 68.0
    drift_at: int | None = None
    drift_strength: float = 0.0

    def __post_init__(self) -> None:
        for name, least in (("seed", 0), ("people", 1), ("items", 100), ("days", 1), ("events_per_person", 4)):
            if getattr(self, name) < least:
                raise SettingsError(f"simulated world: {name} is {getattr(self, name)}; it must be at least {least}")
        if not 0 <= self.drift_strength <= 1:
            raise SettingsError(f"simulated world: drift_strength is {self.drift_strength}; it must lie within 0–1")

    @property
    def started_at(self) -> datetime:
        return datetime(self.start.year, self.start.month, self.start.day, tzinfo=UTC)

    def generator(self, *key: int) -> np.random.Generator:
        """The random stream of this key: counter-based, independent of every other key."""
        return np.random.Generator(np.random.Philox(np.random.SeedSequence(self.seed, spawn_key=key)))


@dataclass(frozen=True)
class Items:
    """n items; arrays of n rows."""

    vector: Floats
    """(n, K + M) float32: theme weights of length 1, then styles"""
    quality: Floats
    """(n,) float32, utility for everybody"""
    log_popularity: Floats
    """(n,) float32, log of how often it is considered"""
    available: Ints
    """(n,) int64, seconds since start; negative for what was there before"""
    burst_day: Floats
    """(n,) float32, first day of its one burst of popularity; infinite without one"""
    burst_days: Floats
    """(n,) float32, how long the burst lasts"""
    burst_gain: Floats
    """(n,) float32, added to log_popularity during the burst"""
    length_minutes: NDArray[np.int64]
    """(n,) int64"""


@dataclass(frozen=True)
class People:
    """A block of people; arrays of PEOPLE_BLOCK rows."""

    taste: Floats
    """(b, K) float32, length 1"""
    next_taste: Floats
    """(b, K) float32, length 1: where the slow drift leads"""
    drift: Floats
    """(b,) float32, radians per day from `taste` towards `next_taste`"""
    style: Floats
    """(b, M) float32"""
    generosity: Floats
    """(b,) float32, added to relevance before rating"""
    arrives: Ints
    """(b,) int64, seconds since start: the first session"""
    leaves: Ints
    """(b,) int64, seconds since start"""
    sessions_per_week: Floats
    """(b,) float32, after the first session; 0 for casual people"""
    peak_hour: Floats
    """(b,) float32, hour of the day (UTC)"""
    age_band: NDArray[np.int64]
    region: NDArray[np.int64]


def _sparse_mix(rng: np.random.Generator, log_prior: Floats, counts: Sequence[float]) -> Floats:
    """(n, K) float32 rows of length 1 with a few themes each; counts: probability of 1, 2, … themes."""
    n = len(log_prior)
    keys = log_prior + rng.gumbel(size=(n, K))
    rank = np.argsort(np.argsort(-keys, axis=1), axis=1)
    how_many = 1 + rng.choice(len(counts), size=n, p=counts)
    weight = np.exp(-0.5 * rank + rng.normal(0, 0.25, (n, K))) * (rank < how_many[:, None])
    return np.asarray(weight / np.linalg.norm(weight, axis=1, keepdims=True), np.float32)


@lru_cache(maxsize=4096)
def item_block(world: World, block: int) -> Items:
    rng = world.generator(ITEMS_STREAM, block)
    n = ITEM_BLOCK
    number = block * n + np.arange(n)
    initial = round(world.items * INITIAL_ITEMS_RATE)
    # The catalogue is a little richer in the first themes, as genres are.
    themes = _sparse_mix(rng, np.tile(np.linspace(0.5, -0.5, K, dtype=np.float32), (n, 1)), (0.4, 0.45, 0.15))
    styles = rng.normal(0, 1, (n, M))
    quality = rng.normal(0, 1, n)
    popularity = 1.2 * (0.5 * quality + np.sqrt(0.75) * rng.normal(0, 1, n))
    age_days = 1 + rng.exponential(300, n)
    arrival_day = (number - initial + rng.random(n)) * world.days / (world.items - initial)
    available = np.floor(np.where(number < initial, -age_days, arrival_day) * DAY).astype(np.int64)
    burst_day = np.maximum(available / DAY, 0) + rng.uniform(0, world.days, n)
    return Items(
        vector=np.hstack([themes, styles]).astype(np.float32),
        quality=(QUALITY * quality).astype(np.float32),
        log_popularity=popularity.astype(np.float32),
        available=available,
        burst_day=np.where(rng.random(n) < 0.2, burst_day, np.inf).astype(np.float32),
        burst_days=rng.uniform(4, 14, n).astype(np.float32),
        burst_gain=rng.uniform(1.0, 2.5, n).astype(np.float32),
        length_minutes=np.clip(np.round(95 + 20 * styles[:, 2] + rng.normal(0, 12, n)), 12, 240).astype(np.int64),
    )


@lru_cache(maxsize=4)
def item_table(world: World, count: int) -> Items:
    """The first `count` items as one table."""
    blocks = [item_block(world, block) for block in range(-(-count // ITEM_BLOCK))]
    names = Items.__dataclass_fields__
    return Items(**{name: np.concatenate([getattr(block, name) for block in blocks])[:count] for name in names})


def items_before(world: World, seconds: int) -> int:
    """How many items are available before that second; they are numbered in order of arrival."""
    initial = round(world.items * INITIAL_ITEMS_RATE)
    upper = initial + 1 + max(0, -(-seconds * (world.items - initial) // (DAY * world.days)))
    arrivals = item_table(world, upper).available[initial:]
    return initial + int(np.searchsorted(arrivals, seconds, side="left"))


@lru_cache(maxsize=256)
def people_block(world: World, block: int) -> People:
    rng = world.generator(PEOPLE_STREAM, block)
    n = PEOPLE_BLOCK
    number = block * n + np.arange(n)
    age_band = rng.choice(len(AGE_BANDS), n, p=(0.22, 0.27, 0.26, 0.16, 0.09))
    region = rng.choice(len(REGIONS), n, p=(0.3, 0.25, 0.2, 0.17, 0.08))
    tilt = world.generator(TILT_STREAM).normal(0, 1, (len(AGE_BANDS) + len(REGIONS), K))
    # Profile explains a little of taste: enough to help a new person, far too little to replace events.
    log_prior = np.asarray(0.5 * tilt[age_band] + 0.25 * tilt[len(AGE_BANDS) + region], np.float32)
    counts = (0.2, 0.35, 0.3, 0.15)
    tastes = [_sparse_mix(rng, log_prior, counts) + np.abs(rng.normal(0, 0.1, (n, K))) for _ in range(2)]
    tastes = [taste / np.linalg.norm(taste, axis=1, keepdims=True) for taste in tastes]

    initial = max(1, round(world.people * INITIAL_PEOPLE_RATE))
    later_day = (number - initial + rng.random(n)) * world.days / max(1, world.people - initial)
    # Those who are there from the beginning show up within the first tenth of the period.
    arrive_day = np.where(number < initial, rng.uniform(0, world.days / 10, n), later_day)
    stay_day = rng.exponential(world.days, n)
    casual = rng.random(n) < CASUAL_RATE
    # Log-normal, clipped so that nobody reads the whole catalogue; the divisor makes the mean 1 again.
    activity = np.minimum(np.exp(rng.normal(0, 1, n)), ACTIVITY_MAX) / ACTIVITY_MEAN
    return People(
        taste=tastes[0].astype(np.float32),
        next_taste=tastes[1].astype(np.float32),
        drift=(np.pi / 2 / 365 * rng.exponential(1, n)).astype(np.float32),
        style=rng.normal(0, 1, (n, M)).astype(np.float32),
        generosity=rng.normal(0, 0.35, n).astype(np.float32),
        arrives=np.floor(arrive_day * DAY).astype(np.int64),
        leaves=np.floor((arrive_day + stay_day) * DAY).astype(np.int64),
        sessions_per_week=np.where(casual, 0, activity * _mean_sessions_per_week(world)).astype(np.float32),
        peak_hour=(rng.normal(19, 3, n) % 24).astype(np.float32),
        age_band=age_band,
        region=region,
    )


def _mean_sessions_per_week(world: World) -> float:
    """The rate that gives `events_per_person` on average, given how long people are there within `days`."""
    days = float(world.days)
    left = np.concatenate([days - np.linspace(0, days / 10, 400), days - np.linspace(0, days, 600)])
    present_weeks = float(np.mean(days * (1 - np.exp(-left / days)))) / 7
    regular = (world.events_per_person - (1 + CASUAL_EVENTS_MAX) / 2 * CASUAL_RATE) / (1 - CASUAL_RATE)
    return max(0.0, regular / SESSION_EVENTS_MEAN - 1) / present_weeks


def season_of(world: World, day: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n, K) float64: what each theme gains at that time (n,) of the year and the week."""
    year_day = day + (world.start - date(world.start.year, 1, 1)).days
    peak = np.arange(K) * 365.25 / K
    yearly = YEARLY * np.cos(2 * np.pi * (year_day[:, None] - peak) / 365.25)
    weekend = (np.floor(day) + world.start.weekday()) % 7 >= 5
    return np.asarray(yearly + WEEKLY * np.where(weekend, 1, -0.4)[:, None] * np.where(np.arange(K) % 2, 1, -1))


def wants_of(world: World, people: People, rows: Ints, day: NDArray[np.float64]) -> Floats:
    """(n, K + M) float32: the vector whose product with an item's is that item's utility less its quality."""
    angle = np.minimum(people.drift[rows] * day, np.pi / 2)[:, None]
    taste = np.cos(angle) * people.taste[rows] + np.sin(angle) * people.next_taste[rows]
    if world.drift_at is not None:
        moved = world.drift_strength * np.clip((day - world.drift_at) / DRIFT_RAMP_DAYS, 0, 1)[:, None]
        taste = (1 - moved) * taste + moved * np.roll(taste, 5, axis=1)
    taste = taste / np.linalg.norm(taste, axis=1, keepdims=True)
    style = people.style[rows] * (STYLE / np.sqrt(M))
    return np.hstack([TASTE * taste + season_of(world, day), style]).astype(np.float32)


@lru_cache(maxsize=32)
def exposure_of(world: World, week: int) -> NDArray[np.float64]:
    """(7 n,) float64: for each day d of the week, d plus the cumulative chance of items 0 … n−1 to be considered."""
    count = items_before(world, (week + 1) * WEEK)
    catalogue = item_table(world, count)
    rows = []
    for day in range(week * 7, week * 7 + 7):
        age_days = (day + 1) - catalogue.available / DAY
        season = catalogue.vector[:, :K] @ season_of(world, np.array([day + 0.5]))[0]
        since_burst = day - catalogue.burst_day
        burst = np.where((since_burst >= 0) & (since_burst < catalogue.burst_days), catalogue.burst_gain, 0)
        fresh = np.log1p(2 * np.exp(-np.maximum(age_days, 0) / 7))
        weight = np.where(age_days > 0, np.exp(catalogue.log_popularity + season + burst + fresh), 0)
        cumulative = np.cumsum(weight)
        rows.append(day - week * 7 + cumulative / cumulative[-1])
    return np.concatenate(rows)
