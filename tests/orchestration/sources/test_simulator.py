"""The simulated world: repeatable, prefix-stable, and with preferences that events, ratings and texts really show."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, date, datetime, timedelta
from itertools import pairwise

import numpy as np
import pytest

from orchestration.sources.simulator import Simulator
from orchestration.sources.simulator_text import STYLES, THEMES, unique_titles
from orchestration.sources.simulator_world import World
from schemas.errors import SettingsError, SourceError
from schemas.events import Event, Item, Person, check_event

START = date(2026, 1, 5)
SMALL = World(START, people=300, items=400, days=60, events_per_person=40)


def until(day: float) -> datetime:
    return datetime(2026, 1, 5, tzinfo=UTC) + timedelta(days=day)


def events_of(world: World, day: float, since: date | None = None) -> list[Event]:
    return [check_event(row) for row in Simulator(world, until(day)).events(since) if isinstance(row, Event)]


@pytest.fixture(scope="module")
def source() -> Simulator:
    return Simulator(SMALL, until(60))


@pytest.fixture(scope="module")
def events() -> list[Event]:
    return events_of(SMALL, 60)


@pytest.fixture(scope="module")
def catalogue(source: Simulator) -> dict[str, Item]:
    return {item.item_id: item for item in source.items() if isinstance(item, Item)}


def relevance_of(source: Simulator, pairs: list[tuple[str, str]], day: float = 30) -> np.ndarray:
    return source.relevance([user for user, _ in pairs], [item for _, item in pairs], until(day))


def test_a_later_until_keeps_every_earlier_event_and_item(events: list[Event], catalogue: dict[str, Item]) -> None:
    cut = until(33.4)
    assert events_of(SMALL, 33.4) == [event for event in events if event.occurred_at < cut]
    assert list(Simulator(SMALL, cut).items()) == [
        i for i in catalogue.values() if i.available_at and i.available_at < cut
    ]


def test_the_world_goes_on_after_its_days(events: list[Event]) -> None:
    longer = events_of(SMALL, 90)
    assert [event for event in longer if event.occurred_at < until(60)] == events
    assert len({e.item_id for e in longer}) > SMALL.items > len({e.item_id for e in events_of(SMALL, 20)})


def test_since_only_leaves_out(events: list[Event]) -> None:
    day = date(2026, 2, 10)
    assert events_of(SMALL, 60, day) == [event for event in events if event.occurred_at.date() >= day]


def test_another_seed_is_another_world(events: list[Event], source: Simulator) -> None:
    other = World(START, seed=8, people=300, items=400, days=60, events_per_person=40)
    assert {(e.user_id, e.item_id) for e in events} != {(e.user_id, e.item_id) for e in events_of(other, 60)}
    assert (
        Simulator(other, until(60)).fingerprint() != source.fingerprint() == Simulator(SMALL, until(60)).fingerprint()
    )


def test_ids_are_unique_and_nothing_is_consumed_twice(events: list[Event]) -> None:
    assert len({event.event_id for event in events}) == len(events)
    assert len({(event.user_id, event.item_id) for event in events}) == len(events)


def test_numbers_follow_time_within_a_person(events: list[Event]) -> None:
    for one, two in pairwise(events):
        if one.user_id == two.user_id and one.occurred_at < two.occurred_at:
            assert int(one.event_id.rpartition("-")[2]) < int(two.event_id.rpartition("-")[2])


def test_nothing_happens_before_an_item_is_available(events: list[Event], catalogue: dict[str, Item]) -> None:
    ages = [event.occurred_at - (catalogue[event.item_id].available_at or event.occurred_at) for event in events]
    assert min(ages) >= timedelta(0)


def test_items_and_people_arrive_during_the_whole_period(catalogue: dict[str, Item], source: Simulator) -> None:
    days = [(item.available_at - until(0)).days for item in catalogue.values() if item.available_at]
    for first in range(0, 60, 10):
        assert sum(first <= day < first + 10 for day in days) > 15
    assert len(list(Simulator(SMALL, until(20)).people())) < len(list(source.people()))


def test_range_is_that_of_the_events(source: Simulator, events: list[Event]) -> None:
    moments = [event.occurred_at for event in events]
    assert source.time_range() == (min(moments), max(moments))


def test_size_kinds_and_heavy_tails(events: list[Event]) -> None:
    assert 0.75 < len(events) / (SMALL.people * SMALL.events_per_person) < 1.25
    kinds = Counter(event.kind for event in events)
    assert 0.45 < kinds["rating"] / len(events) < 0.55
    assert 0 < kinds["hide"] < 0.03 * len(events)
    assert {event.value for event in events if event.kind == "rating"} == {1, 2, 3, 4, 5}
    assert all(event.value is None for event in events if event.kind != "rating")
    per_person = sorted(Counter(event.user_id for event in events).values())
    assert sum(count <= 4 for count in per_person) > 0.15 * len(per_person)
    assert per_person[-1] > 8 * per_person[len(per_person) // 2]
    per_item = sorted(Counter(event.item_id for event in events).values(), reverse=True)
    assert sum(per_item[: len(per_item) // 10]) > 0.25 * len(events)


def test_people_choose_what_is_relevant_and_hide_what_is_not(source: Simulator, events: list[Event]) -> None:
    rng = np.random.default_rng(0)
    seen = [event for event in events if event.kind != "hide"]
    items = [seen[i].item_id for i in rng.permutation(len(seen))]
    chosen = relevance_of(source, [(e.user_id, e.item_id) for e in seen])
    # Shuffled items keep each item's popularity: only the match of person and item is left.
    swapped = relevance_of(source, [(e.user_id, item) for e, item in zip(seen, items, strict=True)])
    assert np.mean(chosen > swapped) > 0.6
    hidden = relevance_of(source, [(e.user_id, e.item_id) for e in events if e.kind == "hide"])
    assert hidden.mean() < swapped.mean()


def test_ratings_follow_relevance(source: Simulator, events: list[Event]) -> None:
    rated = [event for event in events if event.value is not None]
    relevance = relevance_of(source, [(e.user_id, e.item_id) for e in rated])
    assert np.corrcoef(relevance, [event.value for event in rated])[0, 1] > 0.6  # type: ignore[list-item]


def test_order_tells_more_than_taste(events: list[Event], catalogue: dict[str, Item]) -> None:
    def share(pairs: list[tuple[Event, Event]]) -> float:
        return float(np.mean([catalogue[a.item_id].categories[0] in catalogue[b.item_id].categories for a, b in pairs]))

    same_person = [(a, b) for a, b in zip(events, events[6:], strict=False) if a.user_id == b.user_id]
    in_session = [
        (a, b)
        for a, b in pairwise(events)
        if a.user_id == b.user_id and b.occurred_at - a.occurred_at < timedelta(minutes=20)
    ]
    assert share(in_session) > share(same_person) + 0.05


def test_texts_tell_the_themes_and_styles(catalogue: dict[str, Item]) -> None:
    items = list(catalogue.values())
    words = sorted({word for item in items for word in f"{item.title} {item.description}".lower().split()})
    column = {word: i for i, word in enumerate(words)}
    bag = np.zeros((len(items), len(words)), np.float32)
    for row, item in enumerate(items):
        for word in f"{item.title} {item.description}".lower().split():
            bag[row, column[word]] = 1
    bag *= np.log(len(items) / bag.sum(0))
    bag /= np.linalg.norm(bag, axis=1, keepdims=True)
    similarity = bag @ bag.T
    np.fill_diagonal(similarity, -1)
    shares = np.array([[a.categories[0] in b.categories for b in items] for a in items])
    nearest = shares[np.arange(len(items)), similarity.argmax(1)].mean()
    assert nearest > 0.7 > 3 * shares.mean()
    # The second theme shows too: its words are more frequent than those of a theme the item lacks.
    roles = {theme.name: theme.roles for theme in THEMES}
    second = [any(role in i.description for role in roles[i.categories[1]]) for i in items if len(i.categories) > 1]
    absent = [any(role in i.description for role in roles[n]) for i in items for n in roles if n not in i.categories]
    assert np.mean(second) > 0.2 > 10 * np.mean(absent)
    styles = {word for pair in STYLES for word in pair}
    assert all(styles & set(item.description.replace(",", "").lower().split()) for item in items)


def test_titles_are_unique_and_categories_are_themes(catalogue: dict[str, Item]) -> None:
    assert len({item.title for item in catalogue.values()}) == len(catalogue)
    assert all(item.categories and set(item.categories) <= {t.name for t in THEMES} for item in catalogue.values())
    assert list(unique_titles(iter(["A", "B", "A", "A"]))) == ["A", "B", "A II", "A III"]


def test_profile_tells_a_little_about_taste(source: Simulator, catalogue: dict[str, Item]) -> None:
    people = [
        person for person in Simulator(World(START, people=2000), until(100)).people() if isinstance(person, Person)
    ]
    big = Simulator(World(START, people=2000), until(100))
    band = np.array([person.profile["age_band"] for person in people])
    items = [f"item-{i:05d}" for i in range(100)]
    users = [person.user_id for person in people]
    tastes = np.stack([big.relevance(users, [item] * len(users), until(50)) for item in items], axis=1)
    explained = sum((band == b).mean() * (tastes[band == b].mean(0) - tastes.mean(0)) ** 2 for b in set(band))
    rate = float((explained / tastes.var(0)).mean())
    assert 0.005 < rate < 0.2


def test_taste_drifts_slowly_and_breaks_on_request_only_from_its_day(source: Simulator, events: list[Event]) -> None:
    broken = World(START, people=300, items=400, days=60, events_per_person=40, drift_at=40, drift_strength=0.9)
    moved = Simulator(broken, until(60))
    assert [e for e in events_of(broken, 60) if e.occurred_at < until(40)] == [
        e for e in events if e.occurred_at < until(40)
    ]
    pairs = [(f"user-{u:05d}", f"item-{i:05d}") for u in range(100) for i in range(0, 240, 3)]

    def alike(one: np.ndarray, two: np.ndarray) -> float:
        # Less the mean over people: what season and quality do to everybody alike is not taste.
        people = [table.reshape(100, -1) - table.reshape(100, -1).mean(0) for table in (one, two)]
        return float(np.corrcoef(people[0].ravel(), people[1].ravel())[0, 1])

    before, later = relevance_of(source, pairs, 37), relevance_of(source, pairs, 51)
    assert alike(before, relevance_of(moved, pairs, 37)) == pytest.approx(1)
    assert 0.9 < alike(before, later) < 0.9999
    assert alike(before, relevance_of(moved, pairs, 51)) < 0.7


def test_seasons_move_relevance_within_a_week(source: Simulator) -> None:
    pairs = [("user-00001", f"item-{i:05d}") for i in range(100)]
    friday, saturday = relevance_of(source, pairs, 32.5), relevance_of(source, pairs, 33.5)
    assert np.abs(friday - saturday).max() > 0.1


def test_refusals() -> None:
    with pytest.raises(SettingsError, match="items is 3; it must be at least 100"):
        World(START, items=3)
    with pytest.raises(SourceError, match="no time zone"):
        Simulator(SMALL, datetime(2026, 2, 1))
    with pytest.raises(SourceError, match="no events"):
        Simulator(SMALL, until(-1)).time_range()
    assert list(Simulator(SMALL, until(-1)).events()) == []
    with pytest.raises(SourceError, match="not there yet"):
        Simulator(SMALL, until(1)).relevance(["user-00001"], ["item-00399"], until(1))
    with pytest.raises(SourceError, match="expected ids like user-00042"):
        Simulator(SMALL, until(1)).relevance(["x"], ["item-00001"], until(1))
