"""The floors: deterministic, frozen, folded in, and never without an answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from orchestration.compute.baselines import FLOORS, als, floors, history_matrix, item_knn
from orchestration.compute.co_visitation import popularity
from orchestration.compute.evaluate import Scorer, evaluate, score_popularity
from orchestration.compute.interactions import Interactions
from orchestration.compute.splits import Queries, leave_one_out
from schemas.events import KINDS

GROUPS, ITEMS, PEOPLE = 5, 60, 200
FITS: list[Callable[[Interactions], Scorer]] = [
    partial(als, regularization=1.0),
    item_knn,
]  # few events bear little more
by_each = pytest.mark.parametrize("fit", FITS, ids=["als", "item_knn"])


def world(kind: str = "view") -> Interactions:
    """Two hundred people who like the items of one of five groups: their own history tells, popularity does not."""
    generator = np.random.default_rng(0)
    rows = [
        (person, GROUPS * int(step) + person % GROUPS)
        for person in range(PEOPLE)
        for step in generator.permutation(ITEMS // GROUPS)[:7]
    ]
    user, item = np.array(rows, np.int32).T
    return Interactions(
        np.array([f"u{number:03}" for number in range(PEOPLE)]),
        np.array([f"i{number:02}" for number in range(ITEMS)]),
        user,
        item,
        np.arange(len(rows), dtype=np.int64) * 10**6,
        np.full(len(rows), KINDS.index(kind) + 1),
        np.full(len(rows), np.nan, np.float32),
    )


@by_each
def test_what_similar_people_had_is_found(fit: Callable[[Interactions], Scorer]) -> None:
    split = leave_one_out(world())
    found = evaluate({"popularity": score_popularity(popularity(split.train)), "fitted": fit(split.train)}, split)
    assert found.row("fitted").hr[10] > 0.95  # six items of the group are left, and any of them may be next
    assert found.gain("fitted", "popularity").low > 0.3


@by_each
def test_a_seed_repeats_a_fit(fit: Callable[[Interactions], Scorer]) -> None:
    split = leave_one_out(world())
    assert np.array_equal(fit(split.train)(split.queries), fit(split.train)(split.queries))


@by_each
def test_somebody_unknown_is_folded_in(fit: Callable[[Interactions], Scorer]) -> None:
    """Trained without the first twenty people, it answers them by their history alone."""
    split = leave_one_out(world())
    stranger = split.queries.take(split.queries.user < 20)
    scores = fit(split.train.take(split.train.user >= 20))(stranger)
    scores[stranger.seen()] = -1
    best = np.argsort(-scores, axis=1)[:, :3]
    assert (best % GROUPS == stranger.user[:, None] % GROUPS).mean() > 0.9


@by_each
def test_without_history_the_answer_is_popularity(fit: Callable[[Interactions], Scorer]) -> None:
    split = leave_one_out(world())
    nobody = replace(split.queries, start=split.queries.stop)
    counts = popularity(split.train)
    assert np.array_equal(np.argsort(-fit(split.train)(nobody)[0], kind="stable"), np.argsort(-counts, kind="stable"))


@by_each
def test_hides_are_nothing_to_learn_from(fit: Callable[[Interactions], Scorer]) -> None:
    events = world()
    rows = np.arange(len(events))
    hides = replace(events, kind=np.where(rows % 7 == 6, KINDS.index("hide") + 1, events.kind))
    without = events.take(rows % 7 != 6)
    split = leave_one_out(without)
    asked = Queries(hides, np.array([6]), np.array([0]), np.array([7]))
    same = Queries(without, np.array([5]), np.array([0]), np.array([6]))
    assert np.array_equal(fit(hides)(asked), fit(without)(same))
    assert len(split.queries)


def test_a_history_counts_an_item_once() -> None:
    events = world()
    twice = replace(events, item=np.where(np.arange(len(events)) == 1, events.item[0], events.item))
    row = history_matrix(Queries(twice, np.array([3]), np.array([0]), np.array([3]))).toarray()[0]
    assert row.max() == 1
    assert row.sum() == 2


def test_similarity_is_the_cosine_of_who_had_what() -> None:
    """Items 0 and 1 were had by two and three people, by two of them together: 2 / √(2 · 3)."""
    had = [(0, 0), (0, 1), (1, 0), (1, 1), (2, 1), (3, 2)]
    user, item = np.array(had, np.int32).T
    events = Interactions(
        np.array(list("abcd")),
        np.array(list("xyz")),
        user,
        item,
        np.arange(6, dtype=np.int64),
        np.ones(6, np.int64),
        np.full(6, np.nan, np.float32),
    )
    asked = Queries(events, np.array([0]), np.array([0]), np.array([1]))
    assert item_knn(events)(asked)[0].tolist() == pytest.approx([0, 2 / np.sqrt(6), 0], abs=2e-6)


def test_every_floor_is_there_and_scores_every_item() -> None:
    split = leave_one_out(world())
    rows = floors(split)
    assert tuple(rows) == FLOORS
    for name, scorer in rows.items():
        scores = scorer(split.queries.take(slice(0, 5)))
        assert scores.shape == (5, ITEMS), name
        assert np.isfinite(scores).all(), name
