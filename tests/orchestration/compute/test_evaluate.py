"""Metrics against hand-computed values; splits that must not leak."""

from __future__ import annotations

import math

import ir_measures
import numpy as np
import pytest
from ir_measures import RR, Qrel, ScoredDoc, Success, nDCG
from numpy.typing import NDArray

from orchestration.compute.evaluate import CUTOFFS, LISTED, evaluate, history_inputs, interval, judge, ranks, summarise
from orchestration.compute.interactions import Interactions
from orchestration.compute.splits import Queries, Split, leave_one_out, queries_for, time_split
from schemas.events import KINDS

SECOND = 1_000_000


def world(rows: list[tuple[int, int, int]], items: int = 6, kinds: list[str] | None = None) -> Interactions:
    """Interactions from (user, item, second), in the order given within a second."""
    user, item, second = np.array(rows, np.int64).T
    return Interactions(
        np.array([f"u{i}" for i in range(user.max() + 1)]),
        np.array([f"i{i}" for i in range(items)]),
        user.astype(np.int32),
        item.astype(np.int32),
        second * SECOND,
        np.array([KINDS.index(kind) + 1 for kind in kinds or ["view"] * len(user)]),
        np.arange(len(user), dtype=np.float32),
    )


def test_metrics_of_known_ranks() -> None:
    row = summarise("x", np.array([1, 3, 7, 60]), np.arange(4, dtype=np.int32))
    assert row.hr == {5: 0.5, 10: 0.75, 50: 0.75}
    assert row.ndcg[5] == pytest.approx((1 + 1 / math.log2(4)) / 4)
    assert row.ndcg[10] == pytest.approx((1 + 1 / math.log2(4) + 1 / math.log2(8)) / 4)
    assert row.mrr[10] == pytest.approx((1 + 1 / 3 + 1 / 7) / 4)


def test_seen_items_leave_the_ranking_and_ties_go_by_position() -> None:
    queries = leave_one_out(world([(0, 0, 0), (0, 5, 1), (0, 3, 2)])).queries
    # Item 0 and 5 are seen; 1 is better, 2 ties and comes earlier, 4 ties and comes later.
    scores = np.array([[9, 2, 1, 1, 1, 9]], np.float32)
    assert ranks(lambda _: scores, queries).tolist() == [3]


def test_a_score_that_is_no_number_is_refused() -> None:
    queries = leave_one_out(world([(0, 0, 0), (0, 1, 1), (0, 2, 2)])).queries
    with pytest.raises(ValueError, match="not finite"):
        ranks(lambda _: np.full((1, 6), np.nan, np.float32), queries)


def test_leave_one_out_takes_the_last_and_the_second_to_last() -> None:
    events = world([(0, 0, 0), (0, 1, 1), (0, 2, 2), (0, 3, 3), (1, 4, 0), (1, 5, 1)])
    test, validation = leave_one_out(events), leave_one_out(events, holdout="validation")
    assert test.queries.target.tolist() == [3]  # two events are too few to be asked
    assert [history.tolist() for history in test.queries.histories()] == [[0, 1, 2]]
    assert test.train.item.tolist() == [0, 1, 2, 4, 5]
    assert validation.queries.target.tolist() == [2]
    assert validation.train.item.tolist() == [0, 1, 4, 5]


def test_the_time_split_leaks_nothing() -> None:
    generator = np.random.default_rng(0)
    user = np.sort(generator.integers(0, 20, 600))
    second = generator.integers(0, 120, 600)  # coarse: many events share a second
    order = np.lexsort((second, user))
    rows = list(
        zip(user[order].tolist(), generator.integers(0, 200, 600).tolist(), second[order].tolist(), strict=True)
    )
    split = time_split(world(rows, items=200))
    queries = split.queries
    assert len(queries) > 20
    assert split.train.occurred_at.max() < queries.at.min()
    for label, start, stop in zip(queries.label, queries.start, queries.stop, strict=True):
        own = queries.interactions
        assert (own.user[start:stop] == own.user[label]).all()
        assert (own.occurred_at[start:stop] // SECOND < own.occurred_at[label] // SECOND).all()
        earlier = (own.user == own.user[label]) & (own.occurred_at // SECOND < own.occurred_at[label] // SECOND)
        assert stop - start == earlier.sum()


def test_people_without_history_are_asked_about() -> None:
    queries = queries_for(world([(0, 0, 5), (0, 1, 5)]), np.array([0, 1]), strictly_earlier=True)
    assert (queries.stop == queries.start).all()
    assert history_inputs(queries).mask.tolist() == [[0.0], [0.0]]


def test_hides_and_repeats_are_no_labels() -> None:
    events = world([(0, 0, 0), (0, 1, 1), (0, 0, 2)], kinds=["view", "hide", "view"])
    assert queries_for(events, np.arange(3), strictly_earlier=False).label.tolist() == [0]


def test_history_is_right_aligned_with_gaps_to_the_next_event_and_the_request() -> None:
    events = world([(0, 0, 0), (0, 1, 10), (0, 2, 30), (1, 3, 5), (1, 4, 6)])
    queries = Queries(events, np.array([2, 4]), np.array([0, 3]), np.array([2, 4]))
    history = history_inputs(queries)
    assert history.items.tolist() == [[0, 1], [0, 3]]
    assert history.gaps.tolist() == [[10, 20], [0, 1]]
    assert history.mask.tolist() == [[1, 1], [0, 1]]


def late_queries(people: int = 20, items: int = 200, events: int = 600) -> Queries:
    """A time split whose clock is coarse: many labels share their second with another of the same person."""
    generator = np.random.default_rng(0)
    user, second = np.sort(generator.integers(0, people, events)), generator.integers(0, 120, events)
    order = np.lexsort((second, user))
    item = generator.integers(0, items, events)
    rows = list(zip(user[order].tolist(), item.tolist(), second[order].tolist(), strict=True))
    return time_split(world(rows, items=items), cut_rate=0.5).queries


def random_scores(queries: Queries) -> NDArray[np.float32]:
    """Different for every person and instant, never twice the same number in a row."""
    items = len(queries.interactions.item_ids)
    return np.stack(
        [
            np.random.default_rng((int(user), int(at))).permutation(items) / items
            for user, at in zip(queries.user, queries.at, strict=True)
        ]
    ).astype(np.float32)


def test_labels_of_one_request_are_scored_once_and_ranked_each() -> None:
    queries = late_queries()
    first, request = queries.requests()
    assert len(first) < len(queries)
    for field in ("user", "at", "start", "stop"):
        assert np.array_equal(getattr(queries, field)[first][request], getattr(queries, field)), field
    asked = 0

    def count(part: Queries) -> NDArray[np.float32]:
        nonlocal asked
        asked += len(part)
        return random_scores(part)

    together = ranks(count, queries, batch=7)
    assert asked == len(first)
    alone = [int(ranks(random_scores, queries.take(slice(row, row + 1)))[0]) for row in range(len(queries))]
    assert together.tolist() == alone


@pytest.mark.parametrize("levels", [1, 3, 1000])
def test_a_label_stands_in_its_list_where_its_rank_says(levels: int) -> None:
    """Also among ties, negative scores and −0."""
    queries = late_queries()
    judged = judge(lambda part: np.round((random_scores(part) - 0.5) * levels).astype(np.float32), queries)
    _, request = queries.requests()
    high = judged.ranks <= LISTED
    assert high.any()
    found = judged.lists[request[high], judged.ranks[high] - 1]
    assert found.tolist() == queries.target[high].tolist()
    assert all(len(set(row)) == LISTED for row in judged.lists.tolist())
    assert (np.diff(judged.scores, axis=1) <= 0).all()


def test_a_list_holds_only_what_was_not_seen() -> None:
    queries = leave_one_out(world([(0, 0, 0), (0, 5, 1), (0, 3, 2)])).queries
    judged = judge(lambda _: np.array([[9, -2, 1, 0, -np.float32(0), 9]], np.float32), queries)
    assert judged.lists[0].tolist() == [2, 3, 4, 1] + [-1] * (LISTED - 4)


def test_a_sample_keeps_whole_requests_and_says_so() -> None:
    queries = late_queries()
    split = Split("late", queries.interactions, queries)
    requests = len(queries.requests()[0])
    assert split.sampled(requests) is split
    some = split.sampled(requests // 2)
    assert some.name == f"late, {requests // 2} of {requests} requests"
    assert len(some.queries.requests()[0]) == requests // 2
    chosen = {(user, at) for user, at in zip(some.queries.user.tolist(), some.queries.at.tolist(), strict=True)}
    every = zip(queries.user.tolist(), queries.at.tolist(), strict=True)
    assert len(some.queries) == sum(pair in chosen for pair in every)


def test_metrics_are_those_of_ir_measures() -> None:
    queries = late_queries()
    scores, seen = random_scores(queries), queries.seen()
    row = summarise("random", ranks(random_scores, queries), queries.user)
    names = [str(number) for number in range(len(queries))]
    qrels = [Qrel(name, str(target), 1) for name, target in zip(names, queries.target.tolist(), strict=True)]
    run = [
        ScoredDoc(name, str(item), float(scores[number, item]))
        for number, name in enumerate(names)
        for item in np.flatnonzero(~seen[number])
    ]
    theirs = ir_measures.calc_aggregate([measure @ k for measure in (nDCG, Success, RR) for k in CUTOFFS], qrels, run)
    for k in CUTOFFS:
        assert row.ndcg[k] == pytest.approx(theirs[nDCG @ k], abs=1e-9)
        assert row.hr[k] == pytest.approx(theirs[Success @ k], abs=1e-9)
        assert row.mrr[k] == pytest.approx(theirs[RR @ k], abs=1e-9)
    assert 0 < row.hr[5] < row.hr[50] < 1


def test_a_gain_is_paired_over_people() -> None:
    """Noise that two scorers share is no doubt about which of them is better."""
    queries = late_queries()
    split = Split("late", queries.interactions, queries)

    def knowing(part: Queries) -> NDArray[np.float32]:
        scores = random_scores(part)
        scores[:, ::2] *= 0.5  # half of the catalogue moves down: whoever looks for it loses, the others gain
        return scores

    found = evaluate({"random": random_scores, "other": random_scores, "half": knowing}, split)
    same = found.gain("other", "random")
    assert (same.mean, same.low, same.high) == (0, 0, 0)
    half = found.gain("half", "random", k=50)
    assert half.mean == pytest.approx(found.row("half").ndcg[50] - found.row("random").ndcg[50])
    assert half.low < half.mean < half.high
    again = found.gain("random", "half", k=50)
    assert (again.low, again.high) == pytest.approx((-half.high, -half.low), abs=1e-3)
    written = found.to_dict(judged="half")
    assert set(written["gains"]) == {"random", "other"}
    assert written["gains"]["random"]["mean"] == pytest.approx(found.gain("half", "random").mean)


def test_the_interval_draws_people_not_labels() -> None:
    values = np.repeat([0.0, 1.0], 500)
    low, high = interval(values, np.repeat([0, 1], 500).astype(np.int32))
    assert (low, high) == (0.0, 1.0)


def test_the_table_names_every_scorer() -> None:
    split = leave_one_out(world([(0, 0, 0), (0, 1, 1), (0, 2, 2)]))
    result = evaluate({"a": lambda q: np.zeros((len(q), 6), np.float32)}, split)
    assert result.table().splitlines()[1].startswith("a ")
    assert "ranks" not in result.to_dict()["rows"][0]
    with pytest.raises(KeyError, match="known: a"):
        result.row("b")
