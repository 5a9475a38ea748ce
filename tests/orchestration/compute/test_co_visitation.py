"""Counts against what a hand would count."""

from __future__ import annotations

import numpy as np
import pytest

from orchestration.compute.co_visitation import (
    DAY_MICROSECONDS,
    WindowedPopularity,
    _by_pair,
    co_visitation,
    popularity,
)
from orchestration.compute.interactions import Interactions
from schemas.events import KINDS


def world(rows: list[tuple[int, int, int]], items: int = 4, kind: str = "view") -> Interactions:
    """Interactions from (user, item, day)."""
    user, item, day = np.array(sorted(rows, key=lambda row: (row[0], row[2])), np.int64).T
    return Interactions(
        np.array([f"u{i}" for i in range(user.max() + 1)]),
        np.array([f"i{i}" for i in range(items)]),
        user.astype(np.int32),
        item.astype(np.int32),
        day * DAY_MICROSECONDS,
        np.full(len(user), KINDS.index(kind) + 1),
        np.full(len(user), np.nan, np.float32),
    )


def test_pairs_are_counted_by_distance_and_direction() -> None:
    events = world([(0, 0, 0), (0, 1, 1), (0, 2, 2), (1, 0, 0), (1, 1, 5)])
    table = co_visitation(events, window=2, decay=0.5, backward=0.25, popularity_power=0.0)
    assert table.item[0].tolist()[:3] == [1, 2, -1]
    assert table.score[0, :2].tolist() == [2.0, 0.5]
    assert table.people[0, :2].tolist() == [2, 1]
    assert table.item[1].tolist()[:2] == [2, 0]
    assert table.score[1, :2].tolist() == [1.0, 0.5]


def test_a_person_counts_once_however_often_they_had_both() -> None:
    again = [(0, 0, 0), (0, 1, 1), (0, 0, 2), (0, 1, 3), (1, 1, 0), (1, 0, 1)]
    table = co_visitation(world(again, items=2), popularity_power=0.0)
    assert table.people[:, 0].tolist() == [2, 2]
    assert table.score[0, 0] > 2


def test_pairs_of_a_catalogue_too_large_for_one_number_are_counted_all_the_same() -> None:
    pair, user = np.array([5, 2, 5, 5, 2]), np.array([0, 1, 0, 1, 1])
    weight = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    usual = _by_pair(pair, user, weight, 2)
    large = _by_pair(pair + 2**62, user, weight, 2)
    assert [part.tolist() for part in usual] == [[2, 5], [7.0, 8.0], [1, 2]]
    assert [part.tolist() for part in large] == [[2 + 2**62, 5 + 2**62], [7.0, 8.0], [1, 2]]


def test_no_pair_crosses_two_people() -> None:
    assert (co_visitation(world([(0, 0, 0), (1, 1, 0)])).item == -1).all()


def test_newer_history_weighs_more() -> None:
    table = co_visitation(world([(0, 0, 0), (0, 2, 1), (1, 1, 0), (1, 3, 1)]), popularity_power=0.0)
    scores = table.score_histories([np.array([0, 1], np.int32), np.array([], np.int32)], decay=0.5)
    assert scores[0].tolist() == pytest.approx([0, 0, 0.5, 1.0])
    assert not scores[1].any()


def test_hides_count_for_nothing() -> None:
    events = world([(0, 0, 0), (0, 1, 1)], kind="hide")
    assert not popularity(events).any()
    assert (co_visitation(events).item == -1).all()


def test_the_popularity_window_ends_before_its_instant() -> None:
    windowed = WindowedPopularity(world([(0, 0, 0), (0, 1, 3), (0, 2, 10)]), days=7)
    assert windowed.at(10 * DAY_MICROSECONDS).tolist() == [0, 1, 0, 0]
    assert windowed.at(10 * DAY_MICROSECONDS + 1).tolist() == [0, 0, 1, 0]
    assert windowed.at(7 * DAY_MICROSECONDS).tolist() == [1, 1, 0, 0]


def test_popularity_at_many_instants_is_that_at_each() -> None:
    generator = np.random.default_rng(0)
    rows = [(int(u), int(i), int(d)) for u, i, d in generator.integers(0, (5, 4, 90), (300, 3))]
    windowed = WindowedPopularity(world(rows), days=7)
    instants = generator.permutation(np.append(np.arange(-1, 100), 40)) * DAY_MICROSECONDS
    expected = [
        np.bincount([item for _, item, day in rows if at - 7 <= day < at], minlength=4).tolist()
        for at in (instants // DAY_MICROSECONDS).tolist()
    ]
    assert windowed.at_each(instants).tolist() == expected
    assert windowed.at_each(np.empty(0, np.int64)).shape == (0, 4)
