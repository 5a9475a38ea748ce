"""Figures beyond accuracy against hand-computed values."""

from __future__ import annotations

import numpy as np
import pytest

from orchestration.compute.beyond_accuracy import beyond_accuracy, beyond_accuracy_table, pick_reliability, reliability
from orchestration.compute.interactions import Interactions
from orchestration.compute.splits import Queries

FOUR = np.eye(4, dtype=np.float32)


def world(counts: list[int]) -> Interactions:
    """One person had each item as often as `counts` says."""
    item = np.repeat(np.arange(len(counts)), counts).astype(np.int32)
    n = len(item)
    return Interactions(
        np.array(["u"]),
        np.array([f"i{number}" for number in range(len(counts))]),
        np.zeros(n, np.int32),
        item,
        np.arange(n, dtype=np.int64),
        np.ones(n, np.int64),
        np.full(n, np.nan, np.float32),
    )


def asked(train: Interactions, stop: int, requests: int = 1) -> Queries:
    """Requests that know the first `stop` events."""
    return Queries(train, np.zeros(requests, np.int64), np.zeros(requests, np.int64), np.full(requests, stop))


TRAIN = world([4, 2, 1, 1])


def test_coverage_counts_what_is_shown_within_k() -> None:
    lists = np.array([[0, 1, 2], [0, 1, 3]], np.int32)
    assert beyond_accuracy(lists, asked(TRAIN, 0, 2), TRAIN, k=2).coverage_rate == 0.5
    assert beyond_accuracy(lists, asked(TRAIN, 0, 2), TRAIN, k=3).coverage_rate == 1.0


def test_novelty_is_the_information_in_an_item() -> None:
    found = beyond_accuracy(np.array([[0, 3, -1]], np.int32), asked(TRAIN, 0), TRAIN)
    assert found.novelty_bits == pytest.approx(-(np.log2(5 / 12) + np.log2(2 / 12)) / 2)


def test_an_item_nobody_had_is_new_and_not_infinitely_so() -> None:
    train = world([8, 0])
    known, new = (beyond_accuracy(np.array([[item]], np.int32), asked(train, 0), train) for item in (0, 1))
    assert np.isfinite(new.novelty_bits)
    assert new.novelty_bits > known.novelty_bits


def test_diversity_is_one_minus_the_cosine_of_pairs() -> None:
    vectors = np.array([[1, 0], [2, 0], [0, 3], [1, 1]], np.float32)
    for items, expected in (
        ([0, 1], 0.0),
        ([0, 2], 1.0),
        ([0, 1, 2], 2 / 3),
        ([0, 3], 1 - 0.5**0.5),
        ([0, 2, -1], 1.0),
    ):
        found = beyond_accuracy(np.array([items], np.int32), asked(TRAIN, 0), TRAIN, text_vectors=vectors)
        assert found.diversity == pytest.approx(expected, abs=1e-6), items


def test_popularity_is_a_percentile_with_ties_in_the_middle() -> None:
    for item, expected in ((0, 1.0), (1, 2 / 3), (2, 1 / 6), (3, 1 / 6)):
        found = beyond_accuracy(np.array([[item]], np.int32), asked(TRAIN, 0), TRAIN)
        assert found.popularity_percentile == pytest.approx(expected), item


@pytest.mark.parametrize(("lists", "expected"), [([[0], [1], [2], [3]], 0.0), ([[2], [2]], 1.0), ([[0], [1]], 2 / 3)])
def test_gini_is_zero_for_all_alike_and_one_for_one_alone(lists: list[list[int]], expected: float) -> None:
    shown = np.array(lists, np.int32)
    assert beyond_accuracy(shown, asked(TRAIN, 0, len(lists)), TRAIN).exposure_gini == pytest.approx(expected)


def test_a_list_like_the_history_diverges_by_nothing() -> None:
    genres = np.array([[1, 0], [0, 1], [1, 1], [1, 0]], bool)
    query = asked(world([1, 1, 0, 0]), 2)  # had one item of each genre

    def divergence(items: list[int]) -> float:
        found = beyond_accuracy(np.array([items], np.int32), query, TRAIN, item_genres=genres).genre_divergence
        assert found is not None
        return found

    assert divergence([2, -1]) == pytest.approx(0)
    assert divergence([0, 1]) == pytest.approx(0)
    one_sided = 0.5 * np.log(0.5 / 0.995) + 0.5 * np.log(0.5 / 0.005)
    assert divergence([3, -1]) == pytest.approx(one_sided)


def test_without_history_there_is_no_taste_to_be_true_to() -> None:
    found = beyond_accuracy(np.array([[0]], np.int32), asked(TRAIN, 0), TRAIN, item_genres=np.ones((4, 1), bool))
    assert found.genre_divergence is None
    assert found.diversity is None
    assert beyond_accuracy_table({"a": found}).splitlines()[1].split()[-1] == "–"


def test_an_honest_probability_has_no_calibration_error_and_an_overconfident_one_its_excess() -> None:
    generator = np.random.default_rng(0)
    probability = generator.random(200_000)
    hit = generator.random(200_000) < probability
    assert reliability(probability, hit).ece < 0.01
    excess = reliability(np.full(1000, 0.95), np.arange(1000) < 700)
    assert excess.ece == pytest.approx(0.25)
    assert excess.bins == ((1000, pytest.approx(0.95), pytest.approx(0.7)),)


def test_rare_hits_are_told_apart() -> None:
    """Probabilities far below a tenth fill every bin, not only the first."""
    generator = np.random.default_rng(0)
    probability = generator.random(100_000) * 0.02
    found = reliability(probability, generator.random(100_000) < probability)
    assert len(found.bins) == 10
    assert found.ece < 0.002
    assert found.bins[-1][2] > 5 * found.bins[0][2]


def test_a_pick_is_judged_for_every_label_of_a_request() -> None:
    """Two labels of one request, one item listed each time: picked once of twice, as an even chance says."""
    train = world([1, 1, 1])
    same = Interactions(
        train.user_ids,
        train.item_ids,
        train.user,
        train.item,
        np.array([0, 5, 5], np.int64),
        train.kind,
        train.value,
    )
    queries = Queries(same, np.array([1, 2]), np.zeros(2, np.int64), np.ones(2, np.int64))
    listed = np.array([[2, -1]], np.int32)
    assert pick_reliability(listed, np.zeros((1, 2), np.float32), queries, (1.0, 0.0)).ece == 0
    sure = pick_reliability(listed, np.full((1, 2), 2, np.float32), queries, (2.0, -1.0))
    assert sure.mean_probability == pytest.approx(1 / (1 + np.exp(-3)))
    assert sure.hit_rate == 0.5
    assert sum(trials for trials, _, _ in sure.bins) == 2
