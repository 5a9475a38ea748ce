"""Candidates in two parts, ranked while the database searches: the same answer as all at once, and no fault more."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import psycopg
import pytest

from inference import cached_items, candidate_parts, overlap
from inference.cached_items import CachedItems, Picked
from inference.candidates import Most, most_of
from inference.connections import StatementFailed
from inference.models import ModelFailed
from inference.overlap import Overlap, Ranked
from inference.ranker import Ranker
from inference.runtime import LarderApplication
from inference.store import Store
from inference.timing import Steps
from schemas.serving import RecommendationRequest, RecommendationResponse
from tests.served_world import ServedWorld
from tests.world_copies import built_in, copy_of

SECONDS = 30


@pytest.fixture(scope="module")
def built(
    postgres_url: str, template: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, ServedWorld]]:
    with built_in(postgres_url, template, "larder_overlap", tmp_path_factory.mktemp("overlap"), items=300) as made:
        yield made


@pytest.fixture
def world(postgres_url: str, built: tuple[str, ServedWorld]) -> Iterator[ServedWorld]:
    with copy_of(postgres_url, built) as made:
        yield made


@pytest.fixture
def app(world: ServedWorld) -> Iterator[LarderApplication]:
    made = world.application(candidates=150)
    made.recommend(RecommendationRequest(user_id=world.people[0]))
    assert made.items.wait(SECONDS)
    yield made
    made.close()


@pytest.fixture
def ranked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Ranked | None]]:
    """Of each request in two parts, how many candidates were ranked early, and what came of it."""
    found: list[tuple[int, Ranked | None]] = []
    run = Overlap.run

    def watched(self: Overlap, store: Store, timeout_ms: float) -> Ranked | None:
        found.append((0, None))
        made = run(self, store, timeout_ms)
        found[-1] = (len(self._chosen), made)
        return made

    monkeypatch.setattr(Overlap, "run", watched)
    return found


def asked(world: ServedWorld) -> list[RecommendationRequest]:
    wishes = itertools.cycle([None, "something quiet", "old songs of the sea"])
    people = [*world.people[:11], "nobody"]
    return [RecommendationRequest(user_id=one, k=20, prompt=wish) for one, wish in zip(people, wishes, strict=False)]


def same(one: RecommendationResponse, other: RecommendationResponse) -> None:
    assert (one.degraded, one.model_version) == (other.degraded, other.model_version)
    assert [(item.item_id, item.title, item.reasons) for item in one.items] == [
        (item.item_id, item.title, item.reasons) for item in other.items
    ]
    assert [item.score for item in one.items] == pytest.approx([item.score for item in other.items], abs=1e-4)


def test_the_answer_is_that_of_one_statement_and_one_run(
    world: ServedWorld, app: LarderApplication, ranked: list[tuple[int, Ranked | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = asked(world)
    requests += [request.model_copy(update={"explain": True, "k": 5}) for request in requests[:4]]
    ours = [app.recommend(request) for request in requests]
    assert len(ranked) == len(requests)
    assert all(made is not None and 40 <= early < len(made.candidates) for early, made in ranked)
    monkeypatch.setattr(Overlap, "run", lambda *_: None)
    for request, answer in zip(requests, ours, strict=True):
        assert answer.degraded == ()
        same(answer, app.recommend(request))


def test_candidates_are_those_of_one_statement(
    world: ServedWorld, app: LarderApplication, ranked: list[tuple[int, Ranked | None]]
) -> None:
    """Withdrawn, not there yet, without a vector, with events of today; features of each as one statement gives them."""
    odd = world.items[:200:5]
    with psycopg.connect(world.url, autocommit=True) as connection:
        connection.execute("DELETE FROM item_vectors WHERE item_id = ANY(%s)", (odd[::4],))
        connection.execute(
            "UPDATE items SET available_at = now() + interval '1 day' WHERE item_id = ANY(%s)", (odd[1::4],)
        )
        connection.execute("DELETE FROM online.item_rows WHERE item_id = ANY(%s)", (odd[2::4],))
    writer = Store(world.url)
    writer.accept_events(
        [
            {
                "event_id": f"e{number}", "user_id": "u", "item_id": item, "kind": "rating", "value": 4.0,
                "occurred_at": datetime.now(UTC).isoformat(), "request_id": None,
            }
            for number, item in enumerate([*odd, *world.items[::7]])
        ],
        5_000,
    )  # fmt: skip
    writer.close()
    app.items._not_before = 0.0
    app.recommend(RecommendationRequest(user_id=world.people[0]))
    assert app.items.wait(SECONDS)
    whole: list[Any] = []
    pick = Store.pick_candidates

    def picking(self: Store, **arguments: Any) -> Any:
        whole.append(pick(self, **arguments))
        return whole[-1]

    ranked.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "pick_candidates", picking)
        for request in asked(world):
            app.recommend(request)
        assert not whole
        patch.setattr(Overlap, "run", lambda *_: None)
        for request in asked(world):
            app.recommend(request)
    assert len(ranked) == len(whole) == len(asked(world))
    for (_, made), theirs in zip(ranked, whole, strict=True):
        assert made is not None
        ours = made.candidates
        assert ours.item_ids == theirs.item_ids
        assert (list(ours.titles), list(ours.categories)) == (list(theirs.titles), list(theirs.categories))
        for name in ("sources", "evidence", "vectors", "has_vector"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), err_msg=name)
        np.testing.assert_allclose(ours.wish, theirs.wish, rtol=1e-6)
        assert ours.features.keys == theirs.features.keys
        np.testing.assert_array_equal(ours.features.as_of, theirs.features.as_of)
        for name, states in theirs.features.states.items():
            np.testing.assert_array_equal(ours.features.states[name], states, err_msg=name)


# ---- which are certain


def picked(names: Sequence[int], places: Sequence[int], rng: np.random.Generator) -> Picked:
    n = len(names)
    return Picked(
        [f"{name:03}" for name in names], np.array(names, np.intp), rng.integers(1, 32, n), np.array(places, np.int64),
        rng.random(n), rng.random(n).astype(np.float32), (b"", np.zeros(0, np.int64), np.zeros(0, np.intp)), (-1,),
    )  # fmt: skip


def sources(rng: np.random.Generator, most: Sequence[int], items: int) -> Picked:
    """What one part picks from sources of these lengths: each item at its best place, the best placed first."""
    best: dict[int, int] = {}
    for length in most:
        chosen = rng.choice(items, min(int(rng.integers(0, length + 1)), items), replace=False)
        for place, item in enumerate(chosen.tolist(), 1):
            best[item] = min(place, best.get(item, place))
    order = sorted(best, key=lambda item: (best[item], item))
    return picked(order, [best[item] for item in order], rng)


class AllThere(CachedItems):
    """A catalogue of which only the size, and that all is there, is asked."""

    def __init__(self, size: int) -> None:
        object.__setattr__(self, "available_at", np.full(size, -np.inf))
        object.__setattr__(self, "places", dict.fromkeys(map(str, range(size)), 0))


@pytest.mark.parametrize("seed", range(40))
def test_what_is_called_certain_is_always_among_the_candidates(seed: int) -> None:
    rng = np.random.default_rng(seed)
    limit, items = int(rng.integers(10, 200)), int(rng.integers(30, 400))
    most, wish = most_of(limit), bool(seed % 2)
    first = sources(rng, (most.co_visitation, most.trending, most.fresh), items)
    second = sources(rng, (most.user_vector, most.wish) if wish else (most.user_vector,), items)
    sure = cached_items.certain(first, most, limit, wish=wish)
    merged = cached_items.merged([first, second], AllThere(items), datetime.now(UTC), limit)
    assert set(range(sure)) <= set(merged.at.tolist())
    # And what it is made of is the union of both, best placed first.
    best = {name: (int(place), row) for name, place, row in zip(second.named, second.places, second.rows, strict=True)}
    for name, place, row in zip(first.named, first.places, first.rows, strict=True):
        best[name] = min(best.get(name, (int(place), row)), (int(place), row))
    expected = sorted(best, key=lambda name: best[name])[:limit]
    both = [*first.named, *second.named]
    assert [both[at] for at in merged.at.tolist()] == expected


def test_a_full_request_is_mostly_certain() -> None:
    rng = np.random.default_rng(0)
    most = most_of(500)
    assert most == Most(250, 166, 166, 166, 50)
    order = rng.permutation(100_000)[:382].tolist()
    places = sorted([*range(1, 167), *range(1, 167), *range(1, 51)])
    first = picked(order, places, rng)
    assert 340 <= cached_items.certain(first, most, 500, wish=False) < 382
    assert 250 <= cached_items.certain(first, most, 500, wish=True) < 340


# ---- when something fails


def backends(app: LarderApplication) -> set[int]:
    with app.store.connection() as connection:
        return {connection.info.backend_pid}


@pytest.mark.parametrize("half", ["begin", "finish"])
def test_a_model_that_fails_costs_a_rung_and_no_connection(
    world: ServedWorld, app: LarderApplication, monkeypatch: pytest.MonkeyPatch, half: str
) -> None:
    request = RecommendationRequest(user_id=world.people[1])
    app.recommend(request)
    before = backends(app)

    def failing(*_: object) -> None:
        raise RuntimeError("the graph has a hole")

    with monkeypatch.context() as patch:
        patch.setattr(Ranker, half, failing)
        answer = app.recommend(request)
    assert answer.degraded == ("ranker",)
    assert len(answer.items) == 10
    assert backends(app) == before
    app.models.ranker_breaker.reset()
    assert app.recommend(request).degraded == ()


def test_a_deadline_that_passes_in_the_ranker_is_no_fault_of_the_database(
    world: ServedWorld, app: LarderApplication, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(*_: object) -> None:
        raise ModelFailed("the ranker lately took longer than the 3 ms that are left")

    monkeypatch.setattr(type(app.models), "finish_ranking", late)
    assert app.recommend(RecommendationRequest(user_id=world.people[1])).degraded == ("ranker",)
    assert app.store.breaker.state == "closed"


def test_features_that_cannot_be_read_are_left_out(world: ServedWorld, app: LarderApplication) -> None:
    with psycopg.connect(world.url, autocommit=True) as connection:
        connection.execute("ALTER TABLE online.item_tiles RENAME TO item_tiles_gone")
        try:
            answer = app.recommend(RecommendationRequest(user_id=world.people[1]))
        finally:
            connection.execute("ALTER TABLE online.item_tiles_gone RENAME TO item_tiles")
    assert answer.degraded == ("features",)
    assert answer.model_version == world.version
    assert app.recommend(RecommendationRequest(user_id=world.people[1])).degraded == ()


def test_a_partition_that_ends_in_between_is_read_again_in_one(
    world: ServedWorld, app: LarderApplication, monkeypatch: pytest.MonkeyPatch
) -> None:
    pick = candidate_parts.pick_in_parts

    def moved(store: Store, **arguments: Any) -> Any:
        first, second = pick(store, **arguments) or pytest.fail("nothing was picked")
        return [first, replace(second, newest=(None,))]

    request = RecommendationRequest(user_id=world.people[1], k=20)
    expected = app.recommend(request)
    monkeypatch.setattr(overlap, "pick_in_parts", moved)
    same(app.recommend(request), expected)


def test_a_graph_in_one_piece_ranks_all_at_once(
    world: ServedWorld, app: LarderApplication, ranked: list[tuple[int, Ranked | None]]
) -> None:
    request = RecommendationRequest(user_id=world.people[1], k=20)
    expected = app.recommend(request)
    serving = app.models.current()
    assert serving is not None
    serving._cut = None
    same(app.recommend(request), expected)
    assert [early for early, _ in ranked][1] == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param("WORTH_RANKING", 1_000, id="few are certain"),
        pytest.param("PROCESSORS", 0, id="a busy machine"),  # fewer than the one request that is there
    ],
)
def test_all_are_ranked_at_once_where_two_runs_are_dearer(
    name: str,
    value: int,
    world: ServedWorld,
    app: LarderApplication,
    ranked: list[tuple[int, Ranked | None]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    request = RecommendationRequest(user_id=world.people[1], k=20)
    expected = app.recommend(request)
    assert app.store.in_use == 0
    monkeypatch.setattr(overlap, name, value)
    same(app.recommend(request), expected)
    assert ranked[0][0] > 0 == ranked[1][0]


@pytest.mark.parametrize("prompt", [None, "something quiet"])
def test_where_no_list_and_no_neighbour_has_anything_the_search_answers(
    prompt: str | None, world: ServedWorld, app: LarderApplication, ranked: list[tuple[int, Ranked | None]]
) -> None:
    with psycopg.connect(world.url) as connection:
        connection.execute("DELETE FROM popular_items")
        connection.execute("DELETE FROM co_visitation")
    answer = app.recommend(RecommendationRequest(user_id=world.people[1], k=20, prompt=prompt))
    assert len(answer.items) == 20
    assert answer.degraded == ()
    assert [early for early, _ in ranked] == [0]


def test_a_store_that_refuses_is_asked_for_the_whole(
    world: ServedWorld, app: LarderApplication, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise StatementFailed("no")

    request = RecommendationRequest(user_id=world.people[1], k=20)
    expected = app.recommend(request)
    monkeypatch.setattr(overlap, "pick_in_parts", refused)
    same(app.recommend(request), expected)


def test_the_time_of_a_step_is_its_own() -> None:
    steps = Steps()
    with steps.step("outer"):
        with steps.step("inner"), steps.step("innermost"):
            sum(range(200_000))
        with steps.step("inner"):
            sum(range(200_000))
    assert steps.ms["inner"] > steps.ms["outer"]
    assert steps.ms["innermost"] > 0.3 * steps.ms["inner"]
    assert list(steps.ms) == ["innermost", "inner", "outer"]
