"""A wish moves the list as far as its weight says, the same way where it is served and where it is measured."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from inference.rerank import follow_wish
from orchestration.compute.evaluate import SlateFeatures
from orchestration.compute.interactions import Interactions
from orchestration.compute.model import ItemTower, Ranker, RankerShape
from orchestration.compute.prompt_following import LEAST_LIFT, WEIGHTS, PromptFollowing, WishedScorer, measure_following
from orchestration.compute.splits import Queries, leave_one_out
from orchestration.compute.train_config import TrainConfig
from orchestration.compute.trained_ranker import TrainedRanker
from orchestration.compute.wishes import Wishes
from schemas.ranker import TEXT_DIM
from schemas.views import candidate_features, context_features

ITEMS, PEOPLE, GENRES = 120, 40, 4
F, G = len(context_features()), len(candidate_features())


@pytest.fixture(scope="module")
def labels() -> Queries:
    generator = np.random.default_rng(0)
    n = 6 * PEOPLE
    events = Interactions(
        np.array([f"u{number:02}" for number in range(PEOPLE)]),
        np.array([f"i{number:03}" for number in range(ITEMS)]),
        np.repeat(np.arange(PEOPLE), 6).astype(np.int32),
        np.concatenate([generator.permutation(ITEMS)[:6] for _ in range(PEOPLE)]).astype(np.int32),
        np.arange(n, dtype=np.int64) * 60_000_000,
        np.ones(n, np.int64),
        np.full(n, np.nan, np.float32),
    )
    return leave_one_out(events).queries


def unit(table: NDArray[np.float64]) -> NDArray[np.float32]:
    return (table / np.linalg.norm(table, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def wishes() -> Wishes:
    member = np.zeros((ITEMS, GENRES), bool)
    member[np.arange(ITEMS), np.arange(ITEMS) % GENRES] = True
    return Wishes(unit(np.random.default_rng(1).standard_normal((GENRES, TEXT_DIM))), member)


@pytest.fixture(scope="module")
def texts(wishes: Wishes) -> NDArray[np.float32]:
    """Texts that say their genre, among other things."""
    noise = unit(np.random.default_rng(2).standard_normal((ITEMS, TEXT_DIM)))
    return unit(wishes.item_categories @ wishes.category_vectors + noise)


@pytest.fixture(scope="module")
def trained(texts: NDArray[np.float32]) -> TrainedRanker:
    """A ranker as it is initialised: it follows nothing by itself."""
    torch.manual_seed(0)
    ranker = Ranker(RankerShape("small", F, G)).eval()
    tower = ItemTower(torch.from_numpy(texts), ranker.user.out_features, torch.ones(ITEMS, dtype=torch.bool))
    return TrainedRanker(ranker, tower, TrainConfig(), [], {}, (1.0, 0.0), 0.0)


def no_features(rows: NDArray[np.int64], candidates: NDArray[np.int32]) -> SlateFeatures:
    context, slate = np.zeros((len(rows), F), np.float32), np.zeros((*candidates.shape, G), np.float32)
    return SlateFeatures(context, context, slate, slate)


def popular(queries: Queries) -> NDArray[np.float32]:
    return np.zeros((len(queries), ITEMS), np.float32)


@pytest.fixture(scope="module")
def following(trained: TrainedRanker, labels: Queries, wishes: Wishes, texts: NDArray[np.float32]) -> PromptFollowing:
    found = measure_following(trained, labels, no_features, wishes, texts, (popular, popular), rerank=ITEMS)
    assert found is not None
    return found


def test_without_a_wish_no_score_changes() -> None:
    scores = np.arange(3, dtype=np.float32)
    assert follow_wish(scores, None, 40.0) is scores
    assert follow_wish(scores, np.array([0.5, 0, 0], np.float32), 40.0).tolist() == [20.0, 1.0, 2.0]
    assert follow_wish(scores, np.ones(3, np.float32), 0.0).tolist() == scores.tolist()


def test_every_weight_is_measured_and_the_chosen_one_is_the_best_that_follows(following: PromptFollowing) -> None:
    assert tuple(row.weight for row in following.rows) == WEIGHTS
    able = [row for row in following.rows if row.genre_lift >= LEAST_LIFT]
    assert able
    chosen = next(row for row in following.rows if row.weight == following.wish_weight)
    assert chosen in able
    assert chosen.ndcg_at_10 == max(row.ndcg_at_10 for row in able)
    assert (chosen.genre_lift, chosen.ndcg_at_10) == (following.genre_lift, following.ndcg_at_10_with_wish)
    assert following.rows[0].genre_lift < LEAST_LIFT
    assert following.gain_low > 0
    assert following.ndcg_at_10_with_wish > following.ndcg_at_10_without_wish
    assert f"at weight {chosen.weight:g}" in following.words()


def test_where_no_weight_follows_far_enough_the_one_that_follows_farthest_is_chosen(
    trained: TrainedRanker, labels: Queries, wishes: Wishes, texts: NDArray[np.float32]
) -> None:
    found = measure_following(
        trained, labels, no_features, wishes, texts, (popular, popular), rerank=ITEMS, weights=(0.0, 0.5)
    )
    assert found is not None
    assert all(row.genre_lift < LEAST_LIFT for row in found.rows)
    assert found.genre_lift == max(row.genre_lift for row in found.rows)


def test_a_catalogue_without_categories_has_nothing_to_measure(
    trained: TrainedRanker, labels: Queries, texts: NDArray[np.float32]
) -> None:
    none = Wishes(np.zeros((0, TEXT_DIM), np.float32), np.zeros((ITEMS, 0), bool))
    assert measure_following(trained, labels, no_features, none, texts, (popular, popular), rerank=ITEMS) is None


def test_a_wish_of_zeros_is_no_wish(trained: TrainedRanker, labels: Queries, texts: NDArray[np.float32]) -> None:
    plain = trained.scorer(no_features, rerank=ITEMS)
    none = np.zeros((len(labels), TEXT_DIM), np.float32)
    wished = WishedScorer(plain, trained.text_projection(), texts, labels.label, none, 40.0)
    offered = ~labels.seen()  # what was seen may or may not be re-ranked
    assert wished(labels)[offered] == pytest.approx(plain(labels)[offered], abs=1e-5)
