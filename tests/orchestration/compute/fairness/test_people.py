"""Segments of people, and how well lists serve each."""

from __future__ import annotations

from datetime import timedelta

import numpy as np
import pytest
from conftest import days_ago

from orchestration.compute.fairness.groups import people_segments, popularity_buckets
from orchestration.compute.fairness.people import segment_quality
from orchestration.compute.interactions import Interactions


def interactions() -> Interactions:
    """Person `a` has six events on the last six days, `b` one 100 days ago; item i0 is the most popular of ten."""
    at = [days_ago(6 - n) for n in range(6)] + [days_ago(100)]
    return Interactions(
        np.array(["a", "b"]),
        np.array([f"i{n}" for n in range(10)]),
        np.array([0] * 6 + [1], np.int32),
        np.array([0, 0, 0, 1, 1, 2, 0], np.int32),
        np.array([int(one.timestamp() * 1e6) for one in at], np.int64),
        np.ones(7, np.int64),
        np.full(7, np.nan, np.float32),
    )


def test_requests_fall_into_segments_by_what_was_known_then() -> None:
    people = ["a", "a", "b", "nobody"]
    at = [days_ago(4), days_ago(0) + timedelta(hours=1), days_ago(0), days_ago(0)]
    profiles = {"a": {"region": "north", "age": 40}, "b": {"region": "south"}}
    found = people_segments(interactions(), people, at, profiles, ["region"])
    assert found["history of 0 events"].tolist() == [False, False, False, True]
    assert found["history of 1–4 events"].tolist() == [True, False, True, False]
    assert found["history of 5–19 events"].tolist() == [False, True, False, False]
    assert found["new (first event within 28 days)"].tolist() == [True, True, False, True]
    assert found["region: north"].tolist() == [True, True, False, False]
    assert found["region: (none)"].tolist() == [False, False, False, True]
    # Only what was declared tells people apart.
    assert not any("age:" in name or "40" in name for name in found)


def test_popularity_counts_what_came_before() -> None:
    buckets = popularity_buckets(interactions(), days_ago(0))
    assert [next(iter(buckets[f"i{n}"])) for n in (0, 1, 2, 9)] == ["head", "head", "middle", "tail"]
    assert sum("tail" in groups for groups in buckets.values()) == 4
    long_ago = popularity_buckets(interactions(), days_ago(50))
    assert next(iter(long_ago["i0"])) == "head"
    assert next(iter(long_ago["i1"])) == "head"  # level with all others then, and the first of them


def test_a_segment_that_picks_half_as_often_is_seen_as_that() -> None:
    generator = np.random.default_rng(2)
    people = [f"p{n}" for n in range(400) for _ in range(5)]
    worse = np.repeat(np.arange(400) < 100, 5)
    picks = generator.random(2_000) < np.where(worse, 0.2, 0.4)
    ranks = np.where(picks, 2.0, np.inf)
    few = np.zeros(2_000, bool)
    few[:50] = True
    [found, rest, small] = segment_quality({"worse": worse, "rest": ~worse, "few": few}, people, ranks)
    assert found.ratio == pytest.approx(0.5, abs=0.1)
    assert found.low is not None
    assert found.high is not None
    assert found.low < 0.5 < found.high < 0.75
    assert found.reciprocal_rank == pytest.approx((found.pick_rate or 0) / 2)
    assert rest.ratio == pytest.approx(1 / found.ratio)
    assert small.pick_rate is None
    assert small.words == "fewer than 20 people"


def test_nobody_who_picks_is_no_ratio() -> None:
    people = [f"p{n}" for n in range(60)]
    [found] = segment_quality({"half": np.arange(60) < 30}, people, np.full(60, np.inf))
    assert found.pick_rate == 0.0
    assert found.ratio is None
