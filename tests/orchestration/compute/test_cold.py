"""The new, measured: nothing of a hidden item is left to learn from, and nothing but the history differs."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from orchestration.compute.cold import (
    cold_items,
    genre_lift,
    hide_items,
    nearest_to_last,
    nearest_to_mean,
    recall_at,
    shorten_histories,
    stranger,
)
from orchestration.compute.evaluate import Scorer, SlateFeatures, ranks
from orchestration.compute.interactions import Interactions
from orchestration.compute.splits import Queries, leave_one_out
from schemas.events import KINDS
from schemas.views import CROSS_VIEWS

GROUPS, ITEMS, PEOPLE, LENGTH = 6, 120, 100, 15


@pytest.fixture(scope="module")
def events() -> Interactions:
    """A hundred people, each with fifteen items of one of six groups, in random order."""
    generator = np.random.default_rng(0)
    item = np.stack(
        [person % GROUPS + GROUPS * generator.permutation(ITEMS // GROUPS)[:LENGTH] for person in range(PEOPLE)]
    )
    n = item.size
    return Interactions(
        np.array([f"u{number:02}" for number in range(PEOPLE)]),
        np.array([f"i{number:03}" for number in range(ITEMS)]),
        np.repeat(np.arange(PEOPLE), LENGTH).astype(np.int32),
        item.ravel().astype(np.int32),
        np.arange(n, dtype=np.int64) * 10**6,
        np.where(np.random.default_rng(1).random(n) < 0.1, KINDS.index("hide"), KINDS.index("view")) + 1,
        np.full(n, np.nan, np.float32),
    )


@pytest.fixture(scope="module")
def texts() -> NDArray[np.float32]:
    """Items of a group are alike, with noise."""
    generator = np.random.default_rng(2)
    groups = generator.standard_normal((GROUPS, 16))
    return (groups[np.arange(ITEMS) % GROUPS] + 0.7 * generator.standard_normal((ITEMS, 16))).astype(np.float32)


def test_nothing_of_a_hidden_item_is_left_and_nothing_after_the_label(events: Interactions) -> None:
    split = hide_items(events, share=0.2, seed=0)
    queries, train = split.queries, split.train
    hidden = set(queries.target.tolist())
    assert not hidden & set(train.item.tolist())
    assert len(set(events.item.tolist()) - set(train.item.tolist())) == round(0.2 * len(set(events.item.tolist())))
    assert len(queries) > PEOPLE * 0.9
    assert len(np.unique(queries.user)) == len(queries)
    for number, history in enumerate(queries.histories()):
        assert len(history)
        assert not hidden & set(history.tolist())
        own = train.user == queries.user[number]
        assert train.occurred_at[own].max() < queries.at[number]
        assert train.item[own].tolist() == history.tolist()
        row = np.flatnonzero((events.user == queries.user[number]) & (events.item == queries.target[number]))
        assert events.occurred_at[row].tolist() == [queries.at[number]]
        assert events.kind[row] != KINDS.index("hide") + 1


def test_the_seed_chooses_the_hidden_items(events: Interactions) -> None:
    first, again, other = (set(hide_items(events, seed=seed).queries.target.tolist()) for seed in (0, 0, 1))
    assert first == again != other


def test_recall_counts_the_first_k_of_all_items(events: Interactions) -> None:
    queries = hide_items(events).queries

    def told(part: Queries) -> NDArray[np.float32]:
        scores = np.tile(np.arange(ITEMS, 0, -1, dtype=np.float32), (len(part), 1))
        scores[np.arange(len(part)), part.target] = 0.5  # last of all
        return scores

    assert not recall_at(told, queries, 50).any()
    assert recall_at(told, queries, ITEMS).all()


def test_the_bar_is_the_better_of_the_text_neighbours(events: Interactions, texts: NDArray[np.float32]) -> None:
    queries = hide_items(events, share=0.2).queries
    found = cold_items(nearest_to_mean(texts), queries, texts, k=15)
    assert found.text_recall["mean of the last"] > found.text_recall["nearest to the last"] > 0
    assert found.ratio == found.low == found.high == 1.0
    chance: Scorer = lambda part: np.random.default_rng(0).random((len(part), ITEMS)).astype(np.float32)  # noqa: E731
    worse = cold_items(chance, queries, texts, k=15)
    assert worse.high < 1
    assert worse.ratio == pytest.approx(worse.recall / found.recall)


def test_the_nearest_to_the_last_looks_at_the_last_alone(events: Interactions, texts: NDArray[np.float32]) -> None:
    queries = hide_items(events).queries.take(slice(0, 5))
    unit = texts / np.linalg.norm(texts, axis=1, keepdims=True)
    last = [int(history[-1]) for history in queries.histories()]
    assert nearest_to_last(texts)(queries) == pytest.approx(unit[last] @ unit.T, abs=1e-6)


@pytest.mark.parametrize("length", [0, 1, 3, 5])
def test_a_shorter_history_keeps_its_end_and_what_was_seen(events: Interactions, length: int) -> None:
    queries = leave_one_out(events).queries
    short = shorten_histories(queries, length)
    for part, whole in zip(short.histories(), queries.histories(), strict=True):
        assert part.tolist() == whole.tolist()[len(whole) - length :]
    assert np.array_equal(short.seen(), queries.seen())
    assert np.array_equal(short.take(slice(3, 9)).seen(), queries.seen()[3:9])
    assert np.array_equal(shorten_histories(short, 0).seen(), queries.seen())
    # Popularity looks at no history: it ranks the same at every length.
    popular: Scorer = lambda part: np.tile(np.arange(ITEMS, dtype=np.float32), (len(part), 1))  # noqa: E731
    assert np.array_equal(ranks(popular, short), ranks(popular, queries))


def test_a_stranger_has_no_features_but_items_keep_theirs() -> None:
    crossed = sum(len(view.features) for view in CROSS_VIEWS)
    features = 3 + crossed

    def known(rows: NDArray[np.int64], candidates: NDArray[np.int32]) -> SlateFeatures:
        ones = np.ones((len(rows), 2), np.float32)
        slate = np.ones((*candidates.shape, features), np.float32)
        return SlateFeatures(ones, ones, slate, slate)

    found = stranger(known)(np.arange(4), np.zeros((4, 5), np.int32))
    assert not found.context_mask.any()
    assert not found.context_features.any()
    for array in (found.candidate_features, found.candidate_mask):
        assert array[:, :, :3].all()
        assert not array[:, :, 3:].any()


def test_lift_is_how_much_more_of_a_genre_there_is_with_the_wish(events: Interactions) -> None:
    queries = shorten_histories(leave_one_out(events).queries.take(slice(0, 10)), 0)
    genres = np.arange(ITEMS)[:, None] % GROUPS == np.arange(GROUPS)
    wishes = np.eye(GROUPS, dtype=np.float32)

    def scorer(wish: NDArray[np.float32] | None) -> Scorer:
        noise = np.random.default_rng(0).random((len(queries), ITEMS)).astype(np.float32)
        return lambda part: noise[: len(part)] + (0 if wish is None else genres @ wish)

    found = genre_lift(scorer, queries, wishes, genres, list("abcdef"), k=5, least_items=20)
    # Five unseen items of every genre are there for everybody: all that is shown is of the wished one.
    assert found.lift == pytest.approx(GROUPS)
    assert all(row.wished == 1 and row.catalogue == pytest.approx(1 / GROUPS) for row in found.genres)
    assert np.mean([row.unwished for row in found.genres]) == pytest.approx(1 / GROUPS)
    deaf = genre_lift(lambda _: scorer(None), queries, wishes, genres, list("abcdef"), k=5)
    assert deaf.lift < 1.5
    assert "lift" in found.table()
    assert genre_lift(scorer, queries, wishes, genres, list("abcdef"), least_items=21).genres == ()
