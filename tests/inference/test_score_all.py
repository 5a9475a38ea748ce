"""Everybody scored ahead: the same lists as requests give, complete or not at all, resumed where they stopped."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import psycopg
import pytest

from inference.candidates import Filters
from inference.ranker import Begun, Inputs, Ranker
from inference.ranker_inputs import person_inputs
from inference.recommend import Recommender
from inference.score_all import Progress, Report, open_ranker, score_all
from inference.scores.batch import Scored, Sizes, Spent, batches, score
from inference.scores.catalogue import Catalogue, _places, read_catalogue, shelf_of
from inference.scores.choose import nearest
from inference.scores.people import read_people
from inference.store import Champion, Store
from infra import registry
from orchestration.compute.forget import forget, request_erasure
from orchestration.compute.lake import Lake
from schemas.errors import ScoresError
from schemas.serving import RecommendationRequest
from tests.served_world import ServedWorld
from tests.world_copies import built_in, copy_of

SIZES = Sizes(candidates=60, kept=20)


@pytest.fixture(scope="module")
def built(
    postgres_url: str, template: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, ServedWorld]]:
    with built_in(postgres_url, template, "larder_scores", tmp_path_factory.mktemp("scores"), items=300) as made:
        yield made


@pytest.fixture
def world(postgres_url: str, built: tuple[str, ServedWorld]) -> Iterator[ServedWorld]:
    with copy_of(postgres_url, built) as made:
        yield made


@pytest.fixture
def connection(world: ServedWorld) -> Iterator[psycopg.Connection]:
    with psycopg.connect(world.url, autocommit=True, options="-c TimeZone=UTC") as opened:
        yield opened


def run(world: ServedWorld, **more: object) -> Report:
    return score_all(world.url, world.artifacts_url, **({"sizes": SIZES, "workers": 2} | more))  # type: ignore[arg-type]


def kept(connection: psycopg.Connection) -> dict[str, tuple[object, ...]]:
    rows = connection.execute("SELECT user_id, run_id, model_version, scored_at, item_ids, scores FROM user_scores")
    return {row[0]: row[1:] for row in rows}


def folder(world: ServedWorld) -> Path:
    return Path(world.artifacts_url.removeprefix("file://")) / "models" / "ranker" / world.version


def lake_of(world: ServedWorld, place: Path) -> Lake:
    """A copy of the world's lake: an erasure rewrites files, which the next test's database still names."""
    shutil.copytree(Path(world.artifacts_url.removeprefix("file://")).parent / "lake", place / "lake")
    return Lake((place / "lake").as_uri())


class One:
    """Models with one ranker in memory."""

    def __init__(self, ranker: Ranker) -> None:
        self.ranker = ranker

    def current(self) -> Ranker:
        return self.ranker

    def follow(self, champion: Champion) -> bool:
        return True

    def begin_ranking(self, ranker: Ranker, person: Inputs, left_ms: float) -> Begun:
        return ranker.begin(person)

    def finish_ranking(self, ranker: Ranker, begun: Begun, candidates: Inputs, left_ms: float) -> np.ndarray:
        return ranker.finish(begun, candidates)


def catalogue_of(connection: psycopg.Connection, version: str, dim: int, at: datetime) -> Catalogue:
    with psycopg.connect(connection.info.dsn, autocommit=True) as beside:
        return read_catalogue(connection, beside, version, dim, at)


def test_hashes_are_found_where_they_stand() -> None:
    generator = np.random.default_rng(5)
    for many in (0, 1, 2, 3, 64, 5_000):
        known = np.sort(generator.integers(0, 2**64, many, np.uint64))
        asked = np.concatenate(
            [
                known,
                known + np.uint64(1),
                generator.integers(0, 2**64, 200, np.uint64),
                np.array([0, 2**64 - 1], np.uint64),
            ]
        )
        assert (_places(known, asked) == np.searchsorted(known, asked)).all()


def scored(
    world: ServedWorld, connection: psycopg.Connection, ranker: Ranker, at: datetime
) -> Iterator[tuple[str, Scored, int, Catalogue]]:
    """Everybody's list with what it was chosen from: the person, the batch and their row in it."""
    catalogue = catalogue_of(connection, world.version, ranker.dim, at)
    people, settled = read_people(connection, world.people, catalogue, at)
    assert settled
    for rows in batches(people, 32):
        found = score(people, rows, shelf_of(catalogue, at), ranker, SIZES, Spent())
        for place, row in enumerate(rows.tolist()):
            yield world.people[row], found, place, catalogue


def test_a_list_is_what_a_request_of_the_same_instant_answers(
    world: ServedWorld, connection: psycopg.Connection, record_property: pytest.RecordProperty
) -> None:
    connection.execute("INSERT INTO people (user_id) VALUES ('aaa-nothing-known')")
    world = replace(world, people=["aaa-nothing-known", *world.people])
    ranker, at = open_ranker(folder(world), None, SIZES.candidates), datetime.now(UTC)
    store = Store(world.url)
    recommender = Recommender(store, One(ranker), SIZES.candidates, 30_000, now=lambda: at)  # type: ignore[arg-type]
    overlaps, lists = [], 0
    for user, found, place, catalogue in scored(world, connection, ranker, at):
        chosen = [catalogue.item_ids[item] for item in found.candidates[place] if item >= 0]
        mine = [catalogue.item_ids[item] for item in found.items[place] if item >= 0]
        given = recommender.recommend(RecommendationRequest(user_id=user, k=10, candidates=tuple(chosen)))
        assert given.degraded == ()
        assert [item.score for item in given.items] == pytest.approx(
            found.scores[place, : len(given.items)].tolist(), abs=1e-5
        )
        assert [item.item_id for item in given.items] == mine[:10] != []
        # And of its own choice, with the database's search in place of ours.
        person = store.read_person(user, at, 30_000, live=True)
        vector = ranker.begin(person_inputs(person, at, None, ranker.dim)).user_vector
        recent = [
            item for item, kind in zip(person.history.item_ids, person.history.kinds, strict=True) if kind != "hide"
        ]
        theirs = store.pick_candidates(
            at=at, filters=Filters(exclude=list(dict.fromkeys(person.history.item_ids))), limit=SIZES.candidates,
            timeout_ms=30_000, champion=world.version, dim=ranker.dim, user_vector=vector[0],
            recent=list(dict.fromkeys(reversed(recent)))[:20], live=True,
        )  # fmt: skip
        overlaps.append(len(set(theirs.item_ids) & set(chosen)) / max(len(theirs), 1))
        own = recommender.recommend(RecommendationRequest(user_id=user, k=10))
        lists += [item.item_id for item in own.items] == mine[:10]
    store.close()
    record_property("candidate_overlap", min(overlaps))
    assert len(overlaps) == len(world.people)
    # Two items as near as each other in half precision may change places, at the end of a source's share too.
    assert min(overlaps) >= 0.95, overlaps
    assert lists >= 0.95 * len(world.people)


def test_what_is_nothing_but_a_neighbour_takes_its_place_and_is_given_to_nobody(
    world: ServedWorld, connection: psycopg.Connection
) -> None:
    ranker, at = open_ranker(folder(world), None, SIZES.candidates), datetime.now(UTC)
    plain = catalogue_of(connection, world.version, ranker.dim, at)
    # One that was an item once, one with neighbours of its own, and one that is named twice.
    connection.execute("UPDATE co_visitation SET neighbour_id = 'ghost' WHERE rank = 1")
    connection.execute(
        "UPDATE co_visitation SET neighbour_id = 'gone' WHERE rank = 2 AND item_id < %s", (world.items[40],)
    )
    connection.execute("INSERT INTO co_visitation VALUES ('owner', 1, %s, 2.5, 3)", (world.items[0],))
    haunted = catalogue_of(connection, world.version, ranker.dim, at)
    assert len(haunted.item_ids) == len(haunted.vectors) == len(haunted.available_at) == len(plain.item_ids) + 3
    names = [*haunted.numbers, "ghost or gone", "ghost or gone"]

    def of(item: str) -> list[tuple[str, float]]:
        number = haunted.numbers[item]
        span = slice(*haunted.neighbours.begins[number : number + 2])
        items, scores = haunted.neighbours.items[span].tolist(), haunted.neighbours.scores[span].tolist()
        return [(names[other], score) for other, score in zip(items, scores, strict=True)]

    for item in [*world.items[:60], "owner"]:
        rows = connection.execute(
            "SELECT neighbour_id, score FROM co_visitation WHERE item_id = %s ORDER BY rank", (item,)
        ).fetchall()
        assert of(item) == [("ghost or gone" if name in ("ghost", "gone") else name, score) for name, score in rows]
    run(world)
    assert {item for row in kept(connection).values() for item in row[3]} <= set(world.items)  # type: ignore[attr-defined]


def test_everybody_gets_a_list_of_what_they_have_not_had(world: ServedWorld, connection: psycopg.Connection) -> None:
    heard: list[Progress] = []
    report = run(world, chunk=16, say=heard.append)
    assert (report.scored, report.resumed, report.version) == (len(world.people), False, world.version)
    assert [progress.scored for progress in heard] == [16, 32, 40]
    assert {progress.people for progress in heard} == {len(world.people)}
    rows = kept(connection)
    assert sorted(rows) == world.people
    for user, (_, version, _, items, scores) in rows.items():
        had = {row[0] for row in connection.execute("SELECT item_id FROM user_history WHERE user_id = %s", (user,))}
        assert version == world.version
        assert len(items) == SIZES.kept  # type: ignore[arg-type]
        assert not had & set(items)  # type: ignore[call-overload]
        assert list(scores) == sorted(scores, reverse=True)  # type: ignore[call-overload]
    (finished,) = connection.execute("SELECT finished_at FROM score_runs").fetchone() or (None,)
    assert finished is not None


class Stop(Exception):
    pass


def stopped_after(chunks: int, world: ServedWorld, **more: object) -> None:
    """A run that ends as Ctrl-C ends it, after so many chunks."""
    count = itertools.count(1)

    def say(_: Progress) -> None:
        if next(count) == chunks:
            raise Stop

    with pytest.raises(Stop):
        run(world, chunk=8, say=say, **more)


def test_a_run_that_was_stopped_goes_on_where_it_stopped(world: ServedWorld, connection: psycopg.Connection) -> None:
    stopped_after(2, world)
    before = kept(connection)
    assert len(before) == 16
    report = run(world, chunk=8)
    assert (report.resumed, report.before, report.scored) == (True, 16, len(world.people) - 16)
    rows = kept(connection)
    assert {user: rows[user] for user in before} == before, "what was written is not scored again"
    assert len({row[0] for row in rows.values()}) == 1
    # Once it is done, the next call is another run.
    again = run(world)
    assert (again.resumed, again.scored) == (False, len(world.people))


def test_restart_and_other_sizes_begin_anew(world: ServedWorld, connection: psycopg.Connection) -> None:
    stopped_after(1, world)
    assert run(world, restart=True).resumed is False
    stopped_after(1, world)
    assert run(world, sizes=replace(SIZES, kept=5)).resumed is False
    assert {len(row[3]) for row in kept(connection).values()} == {5}  # type: ignore[arg-type]


def test_lists_of_people_who_are_no_longer_there_go(world: ServedWorld, connection: psycopg.Connection) -> None:
    run(world)
    connection.execute("DELETE FROM user_history WHERE user_id = %s", (world.people[3],))
    connection.execute("DELETE FROM people WHERE user_id = %s", (world.people[3],))
    assert run(world).gone == 1
    assert world.people[3] not in kept(connection)


def test_another_champion_ends_the_run_and_the_next_begins_anew(
    world: ServedWorld, connection: psycopg.Connection
) -> None:
    manifest = Ranker(folder(world)).manifest
    other = replace(manifest, seed=99)
    registry.register(connection, other, f"models/ranker/{world.version}")
    registry.record_gate(connection, other.version, True, {})
    connection.execute(
        f"CREATE TABLE item_vectors_{other.version} PARTITION OF item_vectors FOR VALUES IN ('{other.version}')"
    )
    connection.execute(
        "INSERT INTO item_vectors SELECT %s, item_id, vector, text_hash FROM item_vectors WHERE model_version = %s",
        (other.version, world.version),
    )

    def promote(_: Progress) -> None:
        registry.promote(connection, other.version)

    with pytest.raises(ScoresError, match=f"model {world.version} no longer serves, {other.version} does"):
        run(world, chunk=8, say=promote)
    assert len(kept(connection)) == 8
    # By its version it may be asked for whatever serves, and the run that ended goes on.
    assert run(world, version=world.version).resumed is True


def test_what_cannot_be_scored_says_why(world: ServedWorld, connection: psycopg.Connection) -> None:
    with pytest.raises(ScoresError, match="there is no model 'none'"):
        run(world, version="none")
    with pytest.raises(ScoresError, match="PER_USER is 61 of 60 candidates"):
        run(world, sizes=replace(SIZES, kept=61))
    with psycopg.connect(world.url) as other, other.transaction():
        other.execute("SELECT pg_advisory_lock(7205396)")
        with pytest.raises(ScoresError, match="scored already"):
            run(world)
    connection.execute("DELETE FROM model_aliases")
    with pytest.raises(ScoresError, match="no model is released yet"):
        run(world)


def test_whoever_asked_to_be_forgotten_gets_no_list_and_forgetting_removes_it(
    world: ServedWorld, connection: psycopg.Connection, tmp_path: Path
) -> None:
    run(world)
    asked, later, gone = world.people[0], world.people[10], world.people[20]
    lake = lake_of(world, tmp_path)
    receipt = forget(gone, url=world.url, lake=lake, artifacts_url=tmp_path.as_uri())
    assert receipt.removed["public.user_scores"] == 1
    assert gone not in kept(connection)
    request_erasure(world.url, lake, asked)
    connection.execute("DELETE FROM user_scores")

    def ask(progress: Progress) -> None:
        # The next chunk is read by now.
        if progress.scored == 7:
            request_erasure(world.url, lake, later)

    report = run(world, chunk=8, say=ask)
    assert report.refused == 1
    assert sorted(kept(connection)) == [user for user in world.people if user not in (asked, later, gone)]


def test_whoever_was_forgotten_while_being_scored_is_refused(
    world: ServedWorld, connection: psycopg.Connection, tmp_path: Path
) -> None:
    gone = world.people[12]
    lake = lake_of(world, tmp_path)

    def erase(progress: Progress) -> None:
        if progress.scored == 8:
            forget(gone, url=world.url, lake=lake, artifacts_url=tmp_path.as_uri())

    assert run(world, chunk=8, say=erase).refused == 1
    assert gone not in kept(connection)


def test_events_of_a_moment_ago_count(world: ServedWorld, connection: psycopg.Connection) -> None:
    run(world)
    (items,) = connection.execute("SELECT item_ids FROM user_scores WHERE user_id = %s", (world.people[0],)).fetchone()  # type: ignore[misc]
    connection.execute(
        "INSERT INTO user_history (user_id, occurred_at, event_id, item_id, kind) VALUES (%s, %s, 'now', %s, 'click')",
        (world.people[0], datetime.now(UTC) - timedelta(seconds=1), items[0]),
    )
    run(world)
    assert items[0] not in kept(connection)[world.people[0]][3]  # type: ignore[operator]


def test_items_are_read_again_when_they_are_old(world: ServedWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[datetime] = []

    def counted(
        connection: psycopg.Connection, beside: psycopg.Connection, version: str, dim: int, at: datetime
    ) -> Catalogue:
        read.append(at)
        return read_catalogue(connection, beside, version, dim, at)

    monkeypatch.setattr("inference.score_all.read_catalogue", counted)
    still = datetime.now(UTC)
    run(world, chunk=10, now=lambda: still)
    assert read == [still]
    later = itertools.count()
    run(world, chunk=10, now=lambda: still + timedelta(minutes=6 * next(later)))
    # The run itself begins at the first instant; of its four chunks every second one finds the items too old.
    assert read[1:] == [still + timedelta(minutes=minutes) for minutes in (6, 18)]


def test_the_nearest_are_exact_whatever_the_size() -> None:
    generator = np.random.default_rng(0)
    for b, m, k in ((3, 7, 10), (5, 9_000, 100), (2, 140_000, 50), (1, 1, 1)):
        users, matrix = (generator.standard_normal((n, 16)).astype(np.float32) for n in (b, m))
        hidden = (generator.integers(0, b, 20), generator.integers(0, m, 20))
        rows, columns, places = nearest(users, matrix, hidden, k)
        scores = users @ matrix.T
        scores[hidden] = -np.inf
        for row in range(b):
            best = np.argsort(-scores[row], kind="stable")[:k]
            best = best[np.isfinite(scores[row, best])]
            mine = rows == row
            assert columns[mine][np.argsort(places[mine])].tolist() == best.tolist()
