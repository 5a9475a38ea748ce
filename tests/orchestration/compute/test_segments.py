"""Segments hold the labels that they name, and nothing is lost between them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from orchestration.compute.co_visitation import DAY_MICROSECONDS
from orchestration.compute.evaluate import interval, intervals
from orchestration.compute.interactions import Interactions
from orchestration.compute.segments import segment_labels, segment_table, segments
from orchestration.compute.splits import Split, time_split

HISTORY = ("history of 0 events", "history of 1–4 events", "history of 5–19 events", "history of 20+ events")
TRAINING = tuple(f"item with {bounds} training events" for bounds in ("0", "1–9", "10–99", "100+"))
AGE = ("item 0–6 days old", "item 7–29 days old", "item 30+ days old")


@pytest.fixture(scope="module")
def split() -> Split:
    """A few busy and many quiet people over 100 days; item i arrives on day i."""
    generator = np.random.default_rng(0)
    n, items = 6000, 110
    user = np.sort((400 * generator.random(n) ** 4).astype(int))
    day = generator.integers(10, 100, n)
    order = np.lexsort((day, user))
    item = (day * generator.random(n) ** 2).astype(np.int32)  # the oldest most often, never one to come
    return time_split(
        Interactions(
            np.array([f"u{number:03}" for number in range(400)]),
            np.array([f"i{number:03}" for number in range(items)]),
            user.astype(np.int32),
            item[order],
            day[order] * DAY_MICROSECONDS,
            np.ones(n, np.int64),
            np.full(n, np.nan, np.float32),
            np.arange(items) * DAY_MICROSECONDS,
        )
    )


@pytest.mark.parametrize("names", [HISTORY, TRAINING, AGE, ("head", "tail")])
def test_every_label_is_in_one_segment_of_each_kind(split: Split, names: tuple[str, ...]) -> None:
    members = segment_labels(split)
    assert (sum(members[name].astype(int) for name in names) == 1).all()


def test_a_label_is_where_its_name_says(split: Split) -> None:
    members, queries = segment_labels(split), split.queries
    length = queries.stop - queries.start
    assert all(members[name].sum() > 5 for name in (*HISTORY[1:], *TRAINING, *AGE))
    assert length[members["history of 5–19 events"]].min() == 5
    assert length[members["history of 5–19 events"]].max() == 19
    counts = np.bincount(split.train.item, minlength=110)[queries.target]
    assert (counts[members["item with 0 training events"]] == 0).all()
    age = queries.at // DAY_MICROSECONDS - queries.target
    assert set(age[members["item 7–29 days old"]]) <= set(range(7, 30))
    assert counts[members["head"]].min() >= counts[members["tail"]].max()


def test_items_without_a_known_arrival_have_no_age(split: Split) -> None:
    events = replace(split.queries.interactions, available_at=np.full(110, np.iinfo(np.int64).min))
    without = Split(split.name, split.train, replace(split.queries, interactions=events))
    assert not set(AGE) & set(segment_labels(without))
    # What was always there is of the oldest, and no integer runs over.
    mixed = replace(events, available_at=np.where(np.arange(110) < 50, np.iinfo(np.int64).min, 10**15))
    members = segment_labels(Split(split.name, split.train, replace(split.queries, interactions=mixed)))
    assert members["item 30+ days old"][split.queries.target < 50].all()


def test_figures_of_a_segment_are_those_of_its_labels(split: Split) -> None:
    rank = np.random.default_rng(1).integers(1, 30, len(split.queries))
    member = segment_labels(split)["tail"]
    (tail,) = [segment for segment in segments(rank, split) if segment.name == "tail"]
    expected = np.where(rank[member] <= 10, 1 / np.log2(1 + rank[member]), 0)
    assert tail.labels == member.sum()
    assert tail.ndcg == pytest.approx(expected.mean())
    assert tail.hr == pytest.approx((rank[member] <= 10).mean())
    assert tail.low < tail.ndcg < tail.high
    # Drawn among everybody or among the segment's own people: much the same.
    assert (tail.low, tail.high) == pytest.approx(interval(expected, split.queries.user[member]), abs=0.02)


def test_a_column_without_labels_has_no_interval() -> None:
    low, high = intervals(np.full((3, 1), np.nan), np.arange(3, dtype=np.int32))
    assert np.isnan([low[0], high[0]]).all()


def test_segments_without_labels_are_left_out_of_the_table(split: Split) -> None:
    late = Split(split.name, split.train, split.queries.take(split.queries.stop - split.queries.start >= 20))
    rank = np.ones(len(late.queries), np.int64)
    table = segment_table({"floor": rank + 100, "ranker": rank}, late)
    assert "history of 20+ events" in table
    assert "history of 0 events" not in table
    assert table.splitlines()[1].split()[-3:] == ["0.0000", "1.0000", "1.0000–1.0000"]
