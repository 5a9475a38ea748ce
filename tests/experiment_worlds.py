"""Simulated experiments whose truth is known: people and items of the built-in simulator, and how they click on a list.

The click model is a dynamic Bayesian network (Chapelle & Zhang 2009) on the simulator's true utility: the first item is
looked at; an item that is looked at is clicked with probability σ(utility − OFFSET); after a click a person looks on with
probability AFTER_CLICK, else with AFTER_SKIP. What is clicked at a place so depends on the items before it and on none after.
The expected clicks of any list are computed, not sampled. The constants were set before anything was judged on this world:
OFFSET so that about one item in six of those shown is clicked (`click_world().rate`).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, timedelta
from functools import cache

import numpy as np
from numpy.typing import NDArray

from orchestration.compute.experiments.metrics import COUNTS
from orchestration.compute.experiments.panel import Panel
from orchestration.compute.experiments.ratios import Lift, lift_of, moments, person_variance, products
from orchestration.compute.off_policy import Logged
from orchestration.sources.simulator_world import PEOPLE_BLOCK, World, item_table, people_block, wants_of

Array = NDArray[np.float64]

OFFSET = 2.5
AFTER_CLICK, AFTER_SKIP = 0.6, 0.9
LIST_ITEMS = 10
REQUESTS_A_WEEK = 1.5
"""Requests per simulated session."""


@dataclass(frozen=True, slots=True)
class ClickWorld:
    """`click (p, i)`: the chance that person and item click once looked at; `weekly (p,)`: requests a week;
    `rate (p,)`: clicks per shown item on lists drawn by popularity."""

    click: Array
    popularity: Array
    weekly: Array
    rate: Array


@cache
def click_world(seed: int = 41, people: int = 2000, items: int = 400, day: float = 30.0) -> ClickWorld:
    """The world at one moment. Another `seed` than the simulator's own default: nothing was trained or tuned on it."""
    world = World(start=date(2026, 1, 5), seed=seed, people=people, items=items)
    catalogue = item_table(world, items)
    utility, weekly = [], []
    for block in range(-(-people // PEOPLE_BLOCK)):
        rows = np.arange(min(PEOPLE_BLOCK, people - block * PEOPLE_BLOCK))
        members = people_block(world, block)
        wants = wants_of(world, members, rows, np.full(len(rows), day))
        utility.append(wants @ catalogue.vector.T + catalogue.quality)
        weekly.append(np.maximum(members.sessions_per_week[rows], 0.1) * REQUESTS_A_WEEK)
    click = 1 / (1 + np.exp(OFFSET - np.concatenate(utility).astype(np.float64)))
    popularity = np.exp(catalogue.log_popularity.astype(np.float64))
    popularity /= popularity.sum()
    rng = np.random.default_rng(seed)
    lists = np.stack([rng.choice(items, LIST_ITEMS, replace=False, p=popularity) for _ in range(30)])
    seen = np.stack([expected_clicks(click[:, one]).sum(1) for one in lists])
    return ClickWorld(click, popularity, np.concatenate(weekly).astype(np.float64), seen.mean(0) / LIST_ITEMS)


def examined(click: Array) -> Array:
    """`(n, k)`: the chance that each place of a list is looked at, from `click (n, k)`."""
    on = click * AFTER_CLICK + (1 - click) * AFTER_SKIP
    return np.cumprod(np.concatenate([np.ones_like(on[:, :1]), on[:, :-1]], axis=1), axis=1)


def expected_clicks(click: Array) -> Array:
    """`(n, k)`: expected clicks at each place."""
    return np.asarray(examined(click) * click)


def draw_clicks(rng: np.random.Generator, click: Array) -> Array:
    """`(n, k)` 0 or 1: one visit to each list."""
    clicked = rng.random(click.shape) < click
    goes_on = rng.random(click.shape) < np.where(clicked, AFTER_CLICK, AFTER_SKIP)
    looks = np.cumprod(np.concatenate([np.ones_like(click[:, :1]), goes_on[:, :-1]], axis=1), axis=1)
    return np.asarray(clicked * looks)


def _people(rng: np.random.Generator, n: int) -> tuple[Array, Array, Array]:
    """`(rate, weekly, covariate)` of n people of the world: the covariate is their clicks in four weeks before, less what
    the average person would have had of as many shown items."""
    world = click_world()
    who = rng.integers(0, len(world.rate), n)
    rate, weekly = world.rate[who], world.weekly[who]
    shown = LIST_ITEMS * rng.poisson(weekly * 4)
    return rate, weekly, rng.binomial(shown, rate) - world.rate.mean() * shown


def one_visit_each(rng: np.random.Generator, people: int, lift: float = 0.0, looks: int | None = None) -> Lift:
    """An experiment in which people come one after the other and each is looked at once; a look after each (or `looks`)."""
    rate, weekly, covariate = _people(rng, people)
    treated = rng.random(people) < 0.5
    shown = LIST_ITEMS * (1 + rng.poisson(weekly))
    clicks = rng.binomial(shown, np.minimum(rate * (1 + lift * treated), 1.0))
    made = products(clicks, shown, covariate[:, None])
    if looks is not None:
        ends = np.linspace(0, people, looks + 1).astype(int)[:-1]
        return lift_of(
            *(np.cumsum(np.add.reduceat(made * mine[:, None, None], ends), axis=0) for mine in (~treated, treated))
        )
    return lift_of(*(np.cumsum(made * mine[:, None, None], axis=0) for mine in (~treated, treated)))


def returning_people(rng: np.random.Generator, people: int, days: int = 28, lift: float = 0.0) -> Lift:
    """An experiment in which the same people come again and again, each with habits of their own; a look each day."""
    rate, weekly, covariate = _people(rng, people)
    treated = rng.random(people) < 0.5
    # A person's mood of the week moves all their clicks: days of one person are anything but independent.
    mood = np.repeat(rng.gamma(8, 1 / 8, (people, -(-days // 7))), 7, axis=1)[:, :days]
    shown = LIST_ITEMS * rng.poisson(np.repeat(weekly[:, None] / 7, days, axis=1))
    clicks = rng.binomial(shown, np.minimum(rate[:, None] * mood * (1 + lift * treated[:, None]), 1.0))
    there = shown.cumsum(1) > 0
    arms = []
    for mine in (~treated, treated):
        here = there[mine].T
        known = np.broadcast_to(covariate[mine], here.shape) * here
        sums = moments(clicks[mine].cumsum(1).T, shown[mine].cumsum(1).T, known[..., None])
        # Whoever has not come yet is in no arm yet.
        sums[:, 0, 0] = here.sum(1)
        arms.append(sums)
    return lift_of(*arms)


POOL_ITEMS, PLACES = 10, 3
CONTEXTS = 8_000
TEMPERATURE = 0.5


@dataclass(frozen=True, slots=True)
class RankingWorld:
    """A population of requests, each a person and a pool of candidates, and two rankers with scores for them: `old` shows
    lists, `new` is the candidate. `value (c,)` is what each request is worth to the candidate: its expected clicks."""

    person: NDArray[np.int64]
    click: Array
    old: Array
    new: Array
    value: Array

    @property
    def truth(self) -> float:
        """Expected clicks of the candidate's list, over the population."""
        return float(self.value.mean())


@cache
def ranking_world(seed: int = 43, places: int = PLACES) -> RankingWorld:
    """Both rankers know a person's utility with an error; the candidate's is smaller."""
    world = click_world()
    rng = np.random.default_rng(seed)
    people, items = world.click.shape
    person = np.sort(rng.integers(0, people, CONTEXTS))
    # Half of a pool is popular, half suits the person: as candidate sources give it.
    popular = rng.gumbel(size=(CONTEXTS, items)) + np.log(world.popularity)
    suits = rng.gumbel(size=(CONTEXTS, items)) + np.log(world.click[person])
    half = POOL_ITEMS // 2
    chosen = np.argpartition(-popular, half, axis=1)[:, :half]
    np.put_along_axis(suits, chosen, -np.inf, axis=1)
    pool = np.concatenate([chosen, np.argpartition(-suits, half, axis=1)[:, :half]], axis=1)
    click = np.take_along_axis(world.click[person], pool, axis=1)
    utility = np.log(click / (1 - click))
    # Scores are logits of a ranker's opinion. The candidate is the old one after more training: it shares most of its error.
    shared = utility + rng.normal(0, 0.6, utility.shape)
    old = 0.8 * (shared + rng.normal(0, 0.5, utility.shape))
    new = 0.8 * (shared + rng.normal(0, 0.2, utility.shape))
    best = np.argsort(-new, axis=1)[:, :places]
    value = expected_clicks(np.take_along_axis(click, best, axis=1)).sum(1)
    return RankingWorld(person, click, old, new, value)


def explored_lists(rng: np.random.Generator, people: int, places: int = PLACES) -> tuple[Logged, Array]:
    """The log of so many people drawn from the population, with all their requests, explored; and the candidate's scores."""
    world = ranking_world(places=places)
    first = np.searchsorted(world.person, np.arange(world.person.max() + 2))
    drawn = rng.choice(np.unique(world.person), people)
    count = (first[drawn + 1] - first[drawn]).astype(np.int64)
    rows = np.repeat(first[drawn] - (np.cumsum(count) - count), count) + np.arange(count.sum())
    old = world.old[rows] / TEMPERATURE
    # Plackett-Luce: the order of scores with Gumbel noise (Yellott 1977).
    shown = np.argsort(-(old + rng.gumbel(size=old.shape)), axis=1)[:, :places]
    weight = np.exp(old - old.max(axis=1, keepdims=True))
    taken = np.take_along_axis(weight, shown, axis=1)
    left = weight.sum(1, keepdims=True) - np.concatenate([np.zeros_like(taken[:, :1]), taken.cumsum(1)[:, :-1]], axis=1)
    clicks = draw_clicks(rng, np.take_along_axis(world.click[rows], shown, axis=1))
    there = np.ones(old.shape, bool)
    who = np.repeat(np.arange(people), count)
    return Logged(shown, taken / left, there, world.old[rows], clicks, who), world.new[rows]


def pilot_variance(rng: np.random.Generator, people: int = 20_000) -> float:
    """What a planner takes from people who were looked at before: the variance of one person's share in the metric."""
    rate, weekly, covariate = _people(rng, people)
    shown = LIST_ITEMS * (1 + rng.poisson(weekly))
    return person_variance(moments(rng.binomial(shown, rate), shown, covariate[:, None]))


def simulated_panel(rng: np.random.Generator, people: int, days: int, *, lift: float, hide_lift: float = 0.0) -> Panel:
    """An experiment of the world as `reading` gives it: people come in one by one, return by their habits, and one in two is
    treated; clicks rise by `lift` and hides, 3 in 100 shown items, by `hide_lift`."""
    rate, weekly, _ = _people(rng, people)
    arm = (rng.random(people) < 0.5).astype(np.int64)
    first = rng.integers(0, days, people)
    requests = rng.poisson(np.repeat(weekly[:, None] / 7, days, axis=1))
    requests[np.arange(people), first] += 1
    requests *= np.arange(days) >= first[:, None]
    person, day = np.nonzero(requests)
    shown = LIST_ITEMS * requests[person, day]
    before = LIST_ITEMS * rng.poisson(weekly * 4)
    counts = {name: np.zeros(len(person)) for name in COUNTS} | {
        "requests": requests[person, day].astype(np.float64),
        "shown": shown.astype(np.float64),
        "clicks": rng.binomial(shown, np.minimum(rate * (1 + lift * arm), 1.0)[person]).astype(np.float64),
        "hides": rng.binomial(shown, (0.03 * (1 + hide_lift * arm))[person]).astype(np.float64),
    }
    earlier = {name: np.zeros(people) for name in COUNTS} | {
        "shown": before.astype(np.float64),
        "clicks": rng.binomial(before, rate).astype(np.float64),
        "hides": rng.binomial(before, 0.03).astype(np.float64),
    }
    events = earlier["clicks"]
    return Panel(
        days=tuple(date(2026, 2, 2) + timedelta(days=n) for n in range(days)),
        arms=("control", "new"),
        arm=arm,
        first_day=first,
        person=person,
        day=day,
        counts=counts,
        before=earlier,
        events_before=events,
        segments={
            "new people": events == 0,
            "1–20 events before": (events > 0) & (events <= 20),
            "more than 20 events before": events > 20,
        },
    )
