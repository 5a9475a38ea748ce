"""The built-in source: events of people who pick what they like in a simulated world.

Each person picks, event by event, from a small consideration set by the highest utility plus Gumbel noise (a
multinomial logit, McFadden 1974). A block of people and a week is simulated as a whole, from its own random stream, so
a later `until` continues the same events. The constants are frozen; see `simulator_world`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime, timedelta

import numpy as np
from numpy.typing import NDArray

from orchestration.sources import BadRow
from orchestration.sources.simulator_text import TEXT_DRAWS, category_names, item_texts, unique_titles
from orchestration.sources.simulator_world import (
    AGE_BANDS,
    CASUAL_EVENTS_MAX,
    CHOICE_STREAM,
    DAY,
    ITEM_BLOCK,
    PEOPLE_BLOCK,
    REGIONS,
    SCHEDULE_STREAM,
    SESSION_EVENTS_MEAN,
    TEXT_STREAM,
    WEEK,
    Floats,
    Ints,
    Items,
    K,
    M,
    World,
    exposure_of,
    item_block,
    item_table,
    items_before,
    people_block,
    wants_of,
)
from schemas.errors import SourceError
from schemas.events import Event, Item, Person

WORLD_VERSION = 1
"""Raise when the same parameters give other events: a recorded deployment must not continue another world."""

CONSIDERED = 64
"""Size of the consideration set per event."""
# What the item just consumed adds for items like it; part of the choice, not of `relevance`.
NEXT_TASTE, NEXT_STYLE = 2.0, 0.6
SAME_SESSION_SECONDS = 1800

RATING_RATE, HIDE_RATE = 0.5, 0.015
RATING_NOISE = 0.8
RATING_STEPS = np.array([-0.2, 0.9, 2.2, 3.8], np.float32)
"""Relevance above which the value is 2, 3, 4, 5."""
SESSION_EVENTS_MAX = 24
GAP_MEDIAN_SECONDS, GAP_SIGMA, GAP_MIN_SECONDS = 200, 0.9, 5


@dataclass(frozen=True, slots=True)
class Batch:
    """Events of one block of people in one week, as columns of n rows, ordered by person and time."""

    user: Ints
    """(n,) int64, number of the person"""
    number: Ints
    """(n,) int64, the person's running event number, from 0"""
    item: Ints
    """(n,) int64, number of the item"""
    kind: NDArray[np.int8]
    """(n,) int8, index in BATCH_KINDS"""
    value: Floats
    """(n,) float32, 1–5 for a rating, else NaN"""
    seconds: Ints
    """(n,) int64, seconds since the world's start"""


BATCH_KINDS = ("view", "rating", "hide")


class Simulator:
    """The built-in source: events of `world` before `until`."""

    name = "simulated"
    historical = False

    def __init__(self, world: World, until: datetime) -> None:
        if until.tzinfo is None:
            raise SourceError(f"simulator: until {until.isoformat()} has no time zone; give it in UTC")
        self.world = world
        self.until = until
        self.description = (
            f"Simulated catalogue with known preferences (seed {world.seed}, {world.people} people, "
            f"{world.items} items by day {world.days}) from {world.start} until {until.astimezone(UTC):%Y-%m-%d %H:%M}"
        )
        self._until_seconds = int((until - world.started_at).total_seconds())

    def fingerprint(self) -> str:
        facts = (WORLD_VERSION, sorted(asdict(self.world).items()), self._until_seconds)
        return hashlib.blake2b(repr(facts).encode(), digest_size=16).hexdigest()

    def time_range(self) -> tuple[datetime, datetime]:
        """First and last scheduled event; no choice is simulated for it. Raises SourceError if there is none."""
        weeks = range(self._weeks())
        first = next((low for week in weeks if (low := self._week_range(week)[0]) is not None), None)
        last = next((high for week in reversed(weeks) if (high := self._week_range(week)[1]) is not None), None)
        if first is None or last is None:
            raise SourceError(
                f"simulator: no events between start {self.world.start} and until {self.until}: move start back"
            )
        start = self.world.started_at
        return start + timedelta(seconds=first), start + timedelta(seconds=last)

    def event_count(self) -> int | None:
        return None

    def items(self) -> Iterator[Item | BadRow]:
        """Items available before `until`, in order of arrival; titles are unique."""
        titles = unique_titles(title for _, title, _, _ in self._texts())
        for (number, _, description, form), title in zip(self._texts(), titles, strict=True):
            block = item_block(self.world, number // ITEM_BLOCK)
            row = number % ITEM_BLOCK
            yield Item(
                item_id=item_id(number),
                title=title,
                description=description,
                categories=category_names(block.vector[row, :K]),
                attributes={"format": form, "length_minutes": int(block.length_minutes[row])},
                available_at=self.world.started_at + timedelta(seconds=int(block.available[row])),
            )

    def people(self) -> Iterator[Person | BadRow]:
        """People who arrived before `until`."""
        for block in range(self._people_blocks()):
            people = people_block(self.world, block)
            for row in np.flatnonzero(people.arrives < self._until_seconds).tolist():
                profile: dict[str, object] = {
                    "age_band": AGE_BANDS[people.age_band[row]],
                    "region": REGIONS[people.region[row]],
                }
                yield Person(user_id(block * PEOPLE_BLOCK + row), profile)

    def events(self, since: date | None = None) -> Iterator[Event | BadRow]:
        """Events before `until`, block by block of people; days before `since` are simulated but not given."""
        start = self.world.started_at
        skipped = 0 if since is None else (since - self.world.start).days * DAY
        for batch in self.batches():
            columns = (batch.user, batch.number, batch.item, batch.kind, batch.value, batch.seconds)
            for user, number, item, kind, value, seconds in zip(*(c.tolist() for c in columns), strict=True):
                if seconds >= skipped:
                    yield Event(
                        event_id=f"sim-{self.world.seed}-{user}-{number}",
                        user_id=user_id(user),
                        item_id=item_id(item),
                        kind=BATCH_KINDS[kind],
                        value=value if kind == 1 else None,
                        occurred_at=start + timedelta(seconds=seconds),
                    )

    def relevance(self, user_ids: Sequence[str], item_ids: Sequence[str], at: datetime) -> Floats:
        """True utility of each pair at that instant, (n,) float32: taste, style, quality and season, no noise.

        What the person did a minute before is not in it. Raises SourceError on an id that is not there before `until`.
        """
        users = _numbers(user_ids, "user", self._people_blocks() * PEOPLE_BLOCK)
        items = _numbers(item_ids, "item", items_before(self.world, self._until_seconds))
        day = (at - self.world.started_at).total_seconds() / DAY
        catalogue = item_table(self.world, int(items.max(initial=0)) + 1)
        result = np.empty(len(users), np.float32)
        for block in np.unique(users // PEOPLE_BLOCK).tolist():
            here = np.flatnonzero(users // PEOPLE_BLOCK == block)
            rows = users[here] % PEOPLE_BLOCK
            wants = wants_of(self.world, people_block(self.world, block), rows, np.full(len(rows), day))
            chosen = items[here]
            result[here] = np.einsum("nd,nd->n", wants, catalogue.vector[chosen]) + catalogue.quality[chosen]
        return result

    def batches(self) -> Iterator[Batch]:
        """The same events as columns, for loads of tens of millions: at most one block's week in memory."""
        weeks = self._weeks()
        catalogue = item_table(self.world, items_before(self.world, weeks * WEEK))
        for block in range(self._people_blocks() if weeks else 0):
            memory = _Memory(
                seen=np.zeros((PEOPLE_BLOCK, -(-len(catalogue.quality) // 8)), np.uint8),
                events=np.zeros(PEOPLE_BLOCK, np.int64),
                last_item=np.zeros(PEOPLE_BLOCK, np.int64),
                last_seconds=np.full(PEOPLE_BLOCK, -WEEK, np.int64),
            )
            for week in range(weeks):
                batch = _simulate(self.world, block, week, catalogue, memory)
                keep = np.flatnonzero(batch.seconds < self._until_seconds)
                if len(keep):
                    yield Batch(*(getattr(batch, name)[keep] for name in Batch.__slots__))

    def _weeks(self) -> int:
        return max(0, -(-self._until_seconds // WEEK))

    def _people_blocks(self) -> int:
        blocks = 0
        while self._until_seconds > 0 and people_block(self.world, blocks).arrives.min() < self._until_seconds:
            blocks += 1
        return blocks

    def _week_range(self, week: int) -> tuple[int, int] | tuple[None, None]:
        """First and last scheduled second of one week before `until`."""
        times = [_schedule(self.world, block, week)[1] for block in range(self._people_blocks())]
        seconds = np.concatenate([np.empty(0, np.int64), *times])
        seconds = seconds[seconds < self._until_seconds]
        return (int(seconds.min()), int(seconds.max())) if len(seconds) else (None, None)

    def _texts(self) -> Iterator[tuple[int, str, str, str]]:
        """(number, title, description, format) of each item available before `until`."""
        count = items_before(self.world, self._until_seconds)
        for first in range(0, count, ITEM_BLOCK):
            block = item_block(self.world, first // ITEM_BLOCK)
            draws = self.world.generator(TEXT_STREAM, first // ITEM_BLOCK).random((ITEM_BLOCK, TEXT_DRAWS))
            texts = item_texts(block.vector[:, :K], block.vector[:, K:], draws)
            yield from ((number, *text) for number, text in zip(range(first, count), texts, strict=False))


def user_id(number: int) -> str:
    return f"user-{number:05d}"


def item_id(number: int) -> str:
    return f"item-{number:05d}"


def _numbers(ids: Sequence[str], prefix: str, count: int) -> Ints:
    """(n,) int64 numbers in ids of the form `prefix-00042`, all below `count`."""
    try:
        numbers = np.array([int(value.removeprefix(f"{prefix}-")) for value in ids], np.int64)
    except ValueError as error:
        raise SourceError(f"simulator: expected ids like {prefix}-00042: {error}") from None
    if len(numbers) and not 0 <= numbers.min() <= numbers.max() < count:
        raise SourceError(
            f"simulator: {prefix}-{numbers.max():05d} is not there yet; {count} are until the given moment"
        )
    return numbers


def _gumbel(rng: np.random.Generator, shape: tuple[int, int]) -> Floats:
    """Standard Gumbel noise, float32; the floor keeps the rare exact zero from becoming infinite."""
    return -np.log(np.maximum(rng.standard_exponential(shape, np.float32), 1e-30))


@dataclass
class _Memory:
    """What a block of people carries from week to week."""

    seen: NDArray[np.uint8]
    """(b, ⌈items / 8⌉) uint8, one bit per consumed item"""
    events: Ints
    last_item: Ints
    last_seconds: Ints


def _schedule(world: World, block: int, week: int) -> tuple[Ints, Ints]:
    """(rows, seconds) of the block's events in one week, (n,) int64 each, sorted by row and time."""
    rng = world.generator(SCHEDULE_STREAM, block, week)
    people = people_block(world, block)
    count = rng.poisson(people.sessions_per_week)
    row = np.repeat(np.arange(PEOPLE_BLOCK), count)
    # More sessions on Friday to Sunday; the day comes first, then an hour around the person's own peak.
    weights = np.array([1.3 if (world.start.weekday() + day) % 7 >= 4 else 0.85 for day in range(7)])
    day = rng.choice(7, len(row), p=weights / weights.sum())
    begin = (
        week * WEEK + day * DAY + ((people.peak_hour[row] + rng.normal(0, 3.5, len(row))) % 24 * 3600).astype(np.int64)
    )
    length = np.minimum(rng.geometric(1 / SESSION_EVENTS_MEAN, len(row)), SESSION_EVENTS_MAX)
    present = (begin >= people.arrives[row]) & (begin < people.leaves[row])

    new = np.flatnonzero(people.arrives // WEEK == week)
    first_length = np.where(
        people.sessions_per_week[new] > 0,
        np.minimum(rng.geometric(1 / SESSION_EVENTS_MEAN, len(new)), SESSION_EVENTS_MAX),
        rng.integers(1, CASUAL_EVENTS_MAX + 1, len(new)),
    )
    row = np.concatenate([row[present], new])
    begin = np.concatenate([begin[present], people.arrives[new]])
    length = np.concatenate([length[present], first_length])

    session = np.repeat(np.arange(len(row)), length)
    step = np.arange(len(session)) - np.repeat(np.cumsum(length) - length, length)
    gap = np.where(
        step == 0, 0, GAP_MIN_SECONDS + np.exp(rng.normal(np.log(GAP_MEDIAN_SECONDS), GAP_SIGMA, len(session)))
    )
    total = np.cumsum(gap)
    offset = total - np.repeat(total[np.cumsum(length) - length], length)
    seconds = begin[session] + offset.astype(np.int64)
    # A week's events end with the week: each week can then be simulated on its own.
    inside = seconds < (week + 1) * WEEK
    rows, seconds = row[session][inside], seconds[inside]
    order = np.lexsort((seconds, rows))
    return rows[order], seconds[order]


def _simulate(world: World, block: int, week: int, catalogue: Items, memory: _Memory) -> Batch:
    """One week of one block: round r lets everybody with more than r events this week take their r-th one."""
    rng = world.generator(CHOICE_STREAM, block, week)
    people = people_block(world, block)
    rows, seconds = _schedule(world, block, week)
    exposure = exposure_of(world, week)
    items_count = len(exposure) // 7
    first = np.searchsorted(rows, rows, side="left")
    turn = np.arange(len(rows)) - first
    number, item = np.zeros(len(rows), np.int64), np.full(len(rows), -1, np.int64)
    kind, value = np.zeros(len(rows), np.int8), np.full(len(rows), np.nan, np.float32)

    by_turn = np.argsort(turn, kind="stable")
    for here in np.split(by_turn, np.flatnonzero(np.diff(turn[by_turn])) + 1) if len(rows) else []:
        row, now = rows[here], seconds[here]
        n = len(here)
        key = (now // DAY - week * 7)[:, None] + rng.random((n, CONSIDERED))
        considered = np.minimum(np.searchsorted(exposure, key, side="right") % items_count, items_count - 1)
        vectors = catalogue.vector[considered]  # (n, CONSIDERED, K + M)
        wants = wants_of(world, people, row, now / DAY)
        continues = (now - memory.last_seconds[row] < SAME_SESSION_SECONDS)[:, None]
        echo = catalogue.vector[memory.last_item[row]] * continues
        echo = echo * np.repeat(np.array([NEXT_TASTE, NEXT_STYLE / M], np.float32), (K, M))
        hides = rng.random(n) < HIDE_RATE
        utility = np.einsum("nrd,nd->nr", vectors, wants + echo) + catalogue.quality[considered]
        score = np.where(hides[:, None], -utility, utility) + _gumbel(rng, (n, CONSIDERED))
        seen = (memory.seen[row[:, None], considered >> 3] >> (considered & 7).astype(np.uint8)) & 1
        score[(seen == 1) | (catalogue.available[considered] > now[:, None])] = -np.inf
        pick = score.argmax(axis=1)
        chosen = considered[np.arange(n), pick]

        relevance = np.einsum("nd,nd->n", catalogue.vector[chosen], wants) + catalogue.quality[chosen]
        felt = relevance + people.generosity[row] + rng.normal(0, RATING_NOISE, n)
        rates = (rng.random(n) < RATING_RATE) & ~hides
        kind[here] = np.where(hides, 2, rates)
        value[here] = np.where(rates, 1 + np.searchsorted(RATING_STEPS, felt), np.nan)
        # With everything considered already consumed nothing happens: no event, no number.
        done = np.isfinite(score[np.arange(n), pick])
        item[here] = np.where(done, chosen, -1)
        row, chosen = row[done], chosen[done]
        number[here[done]] = memory.events[row]
        memory.events[row] += 1
        memory.last_item[row] = chosen
        memory.last_seconds[row] = now[done]
        memory.seen[row, chosen >> 3] |= np.left_shift(1, chosen & 7).astype(np.uint8)

    keep = np.flatnonzero(item >= 0)
    user = block * PEOPLE_BLOCK + rows
    return Batch(user[keep], number[keep], item[keep], kind[keep], value[keep], seconds[keep])
