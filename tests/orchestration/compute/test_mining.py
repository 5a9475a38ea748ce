"""Labels come from the newest events; slates hold what each of serving's sources offers, as it weighs it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestration.compute.co_visitation import DAY_MICROSECONDS, Neighbours, WindowedPopularity
from orchestration.compute.interactions import Interactions
from orchestration.compute.mining import SERVED, SLATE, Sources, mine, newest_labels, recent_rows
from orchestration.compute.splits import Queries, queries_for
from orchestration.compute.train_config import TrainConfig
from schemas.ranker import TEXT_DIM


def events(n: int) -> Interactions:
    """`n` people with one event each, a second apart."""
    return Interactions(
        np.array([f"u{number:03}" for number in range(n)], np.str_),
        np.array([f"i{number:03}" for number in range(n)], np.str_),
        np.arange(n, dtype=np.int32),
        np.arange(n, dtype=np.int32),
        np.arange(n, dtype=np.int64) * 1_000_000,
        np.ones(n, np.int64),
        np.full(n, np.nan, np.float32),
    )


def test_labels_are_the_newest_events() -> None:
    config = TrainConfig(validation_rate=0.1)
    assert newest_labels(events(101), config).label.tolist() == list(range(90, 101))
    assert recent_rows(events(101)).tolist() == list(range(60, 101))


def test_no_events_have_no_labels() -> None:
    assert len(newest_labels(events(0), TrainConfig())) == 0
    assert len(recent_rows(events(0))) == 0


ITEMS = 2_000


def offered(**changes: Any) -> tuple[Queries, Sources]:
    """Three people who had items 0, 1, 2 in that order and then 3, and sources that offer nothing unless told so."""
    n = 12
    table = Interactions(
        np.array(["a", "b", "c"]),
        np.array([f"i{number:04}" for number in range(ITEMS)]),
        np.repeat(np.arange(3), 4).astype(np.int32),
        np.tile(np.arange(4), 3).astype(np.int32),
        10 * DAY_MICROSECONDS + np.arange(n) * 1_000_000,
        np.ones(n, np.int64),
        np.full(n, np.nan, np.float32),
    )
    none = Neighbours(
        np.full((ITEMS, 2), -1, np.int32), np.zeros((ITEMS, 2), np.float32), np.zeros((ITEMS, 2), np.int32)
    )
    given: dict[str, Any] = {
        "similarity": lambda queries: np.zeros((len(queries), ITEMS), np.float32),
        "neighbours": none,
        "trending": WindowedPopularity(table.take(np.arange(0))),
        "counts": np.zeros(ITEMS, np.float32),
        "available_at": None,
        "texts": np.zeros((ITEMS, TEXT_DIM), np.float32),
        "wishes": np.zeros((3, TEXT_DIM), np.float32),
    }
    return queries_for(table, np.array([3, 7, 11]), strictly_earlier=True), Sources(**given | changes)


def weights(labels: Queries, sources: Sources) -> dict[str, NDArray[np.float32]]:
    names = ("user vector", "wish", "co-visitation", "trending", "fresh")
    return dict(zip(names, sources.weights(labels, np.arange(3), labels.seen()), strict=True))


def test_neighbours_weigh_as_in_the_serving_sql() -> None:
    """1/√place: item 2 is the newest of a history 0, 1, 2; both its neighbour and item 0's are item 50."""
    _, sources = offered()
    sources.neighbours.item[[2, 0], 0] = 50
    sources.neighbours.item[1, 0] = 60
    sources.neighbours.score[:3, 0] = 1
    found = weights(offered()[0], sources)["co-visitation"]
    np.testing.assert_allclose(found[0, [50, 60]], [1 + 1 / np.sqrt(3), 1 / np.sqrt(2)], rtol=1e-6)
    assert (found[0] > 0).sum() == 2


def test_a_source_offers_no_more_than_serving_takes_of_it() -> None:
    generator = np.random.default_rng(0)
    texts = generator.standard_normal((ITEMS, TEXT_DIM)).astype(np.float32)
    wish = np.concatenate([texts[:1], np.zeros((2, TEXT_DIM), np.float32)])
    labels, sources = offered(
        similarity=lambda queries: generator.random((len(queries), ITEMS)).astype(np.float32),
        counts=np.arange(ITEMS, dtype=np.float32),
        available_at=np.where(np.arange(ITEMS) < 5, 9, 11) * DAY_MICROSECONDS,
        texts=texts / np.linalg.norm(texts, axis=1, keepdims=True),
        wishes=wish / np.maximum(np.linalg.norm(wish, axis=1, keepdims=True), 1),
    )
    found = {name: (weight > 0).sum(1).tolist() for name, weight in weights(labels, sources).items()}
    assert found["user vector"] == [SERVED // 2] * 3
    assert found["wish"] == [SERVED // 3, 0, 0]  # who wished nothing is offered nothing for it
    assert found["trending"] == [SERVED // 3] * 3
    assert found["fresh"] == [2] * 3  # five were there by then, of which the person had three


def test_slates_draw_from_every_source_in_its_share() -> None:
    labels, sources = offered(
        similarity=lambda queries: np.broadcast_to(
            np.where(np.arange(ITEMS) < 100, 20, 0).astype(np.float32), (len(queries), ITEMS)
        ),
        available_at=np.where((np.arange(ITEMS) >= 1000) & (np.arange(ITEMS) < 1004), 10, -100) * DAY_MICROSECONDS,
        counts=np.where(np.arange(ITEMS) >= 1900, 1, 0).astype(np.float32),
    )
    items, log_q = mine(labels, sources, lambda at: np.zeros((len(at), ITEMS), bool), seed=0)
    assert items.shape == (3, SLATE)
    assert items[:, 0].tolist() == [3, 3, 3]
    assert not np.isin(items[:, 1:], [0, 1, 2, 3]).any()
    near, new, popular = items < 100, (items >= 1000) & (items < 1004), items >= 1900
    for row in range(3):
        assert 15 <= near[row, 1:].sum() <= 27
        assert new[row].sum() >= 1
        # The shares of the two sources that had nothing (wish, co-visitation) are popular ones.
        assert 25 <= popular[row].sum() <= 45
    # What is expected often is corrected by much: 2 of 4 newcomers against 21 of 96 near ones.
    assert log_q[:, 1:][new[:, 1:]].min() > log_q[:, 1:][near[:, 1:]].max() > np.log(0.1)
