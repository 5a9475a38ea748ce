"""Items in memory: the same candidates as the tables give, never older than the tables, and never in a request's way."""

from __future__ import annotations

import copy
import itertools
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import psycopg
import pytest
from conftest import TODAY
from worlds import ListSource

from inference import item_cache
from inference.arms import NO_PLAN
from inference.cached_items import CachedItems
from inference.candidates import Candidates, Filters
from inference.item_cache import ItemCache
from inference.ranker_inputs import candidate_inputs
from inference.store import Store
from inference.trials import Trials
from infra.roles import serving_urls
from orchestration.compute.ingest import ingest
from orchestration.compute.lake import Lake
from schemas import catalogue_sql
from schemas.events import Event, Item
from schemas.ranker import SIZES, TEXT_DIM
from schemas.serving import RecommendationRequest
from schemas.urls import with_role
from schemas.views import VIEWS
from tests.served_world import ServedWorld
from tests.world_copies import built_in, copy_of

DIM = SIZES["small"].dim
SECONDS = 30
_numbers = itertools.count()


@pytest.fixture(scope="module")
def built(
    postgres_url: str, template: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, ServedWorld]]:
    with built_in(postgres_url, template, "larder_items", tmp_path_factory.mktemp("items"), items=300) as made:
        yield made


@pytest.fixture
def world(postgres_url: str, built: tuple[str, ServedWorld]) -> Iterator[ServedWorld]:
    with copy_of(postgres_url, built) as made:
        yield made


@pytest.fixture
def connection(world: ServedWorld) -> Iterator[psycopg.Connection]:
    with psycopg.connect(world.url, autocommit=True, options="-c TimeZone=UTC") as opened:
        yield opened


@pytest.fixture
def store(world: ServedWorld) -> Iterator[Store]:
    made = Store(world.url)
    yield made
    made.close()


@pytest.fixture
def cache(world: ServedWorld) -> Iterator[ItemCache]:
    # As the function reads: by its role.
    made = ItemCache(serving_urls(world.url)[0], 100_000)
    yield made
    made.close()


def state(store: Store) -> str | None:
    return store.read_person("nobody", datetime.now(UTC), 5_000, live=True).catalogue


def loaded(cache: ItemCache, store: Store, world: ServedWorld) -> CachedItems:
    cache._not_before = 0.0
    if cache.get(state(store), world.version, DIM) is None:
        assert cache.wait(SECONDS)
    items = cache.get(state(store), world.version, DIM)
    assert items is not None
    return items


def picked(store: Store, world: ServedWorld, user: str, items: CachedItems | None, **more: object) -> Candidates:
    at = datetime.now(UTC)
    person = store.read_person(user, at, 5_000, live=True)
    vector = np.random.default_rng(len(user)).normal(size=DIM).astype(np.float32)
    arguments: dict[str, object] = {
        "filters": Filters(exclude=person.history.item_ids[:5]),
        "limit": 120,
        "recent": list(dict.fromkeys(reversed(person.history.item_ids)))[:20],
        "live": True,
    }
    return store.pick_candidates(
        at=at, timeout_ms=5_000, champion=world.version, dim=DIM, user_vector=vector, items=items,
        **(arguments | more),  # type: ignore[arg-type]
    )  # fmt: skip


def assert_same(ours: Candidates, theirs: Candidates) -> None:
    assert ours.item_ids == theirs.item_ids
    assert (list(ours.titles), list(ours.categories)) == (list(theirs.titles), list(theirs.categories))
    assert (list(ours.titles[3:9:2]), ours.titles[-1]) == (list(theirs.titles[3:9:2]), theirs.titles[-1])
    numbered = ours.category_numbers
    assert numbered is not None
    names = [*numbered.numbers, None]
    assert [[names[code] for code in row if names[code] is not None] for row in numbered.rows.tolist()] == list(
        theirs.categories
    )
    for name in ("sources", "evidence", "vectors", "has_vector", "groups"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), err_msg=name)
    np.testing.assert_allclose(ours.wish, theirs.wish, rtol=1e-6)
    one, other = ours.features, theirs.features
    assert (one.keys, one.settled, one.settled_at) == (other.keys, other.settled, other.settled_at)
    np.testing.assert_array_equal(one.as_of, other.as_of)
    assert one.states.keys() == other.states.keys()
    for name in one.states:
        np.testing.assert_array_equal(one.states[name], other.states[name], err_msg=name)


def post(store: Store, item_ids: list[str], tag: str) -> None:
    """Events of a moment ago: tiles of today."""
    store.accept_events(
        [
            {
                "event_id": f"{tag}{number}", "user_id": "u", "item_id": item_id, "kind": "rating", "value": 4.0,
                "occurred_at": datetime.now(UTC).isoformat(), "request_id": None,
            }
            for number, item_id in enumerate(item_ids)
        ],
        5_000,
    )  # fmt: skip


def test_candidates_are_those_of_the_tables(
    world: ServedWorld, connection: psycopg.Connection, store: Store, cache: ItemCache
) -> None:
    # Of every kind: without a vector, not there yet, without a row, with an old row, with events of today.
    odd = world.items[:200:5]
    connection.execute("DELETE FROM item_vectors WHERE item_id = ANY(%s)", (odd[::4],))
    connection.execute("UPDATE items SET available_at = now() + interval '1 day' WHERE item_id = ANY(%s)", (odd[1::4],))
    connection.execute("DELETE FROM online.item_rows WHERE item_id = ANY(%s)", (odd[2::4],))
    connection.execute(
        "UPDATE online.item_rows SET item_activity_date = item_activity_date - 1 WHERE item_id = ANY(%s)", (odd[3::4],)
    )
    connection.execute("DELETE FROM items WHERE item_id = %s", (world.items[1],))
    connection.execute(
        """UPDATE items SET title = E'a "b"\\n\\u0001ü', categories = '{"a,b","",x}' WHERE item_id = %s""",
        (world.items[2],),
    )
    items = loaded(cache, store, world)
    assert len(items) == len(world.items) - 1
    post(store, [*odd, *world.items[::7], "nowhere"], "t")
    rng = np.random.default_rng(1)
    at = datetime.now(UTC)
    seen = set()
    for number, user in enumerate([*world.people[:12], "nobody"]):
        more: dict[str, object] = {"limit": 300} if number % 2 else {}
        if number % 3 == 0:
            wish = rng.normal(size=TEXT_DIM).astype(np.float32)
            more["wish_text"] = wish / np.linalg.norm(wish)
        ours, theirs = (picked(store, world, user, one, **more) for one in (items, None))
        assert len(ours) > 50
        assert_same(ours, theirs)
        views = store.read_person(user, at, 5_000, live=True).views
        one, other = (candidate_inputs(of, views, at) for of in (ours, theirs))
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)
        seen |= set(ours.item_ids)
    assert seen & set(odd[::4])
    assert seen & set(odd[2::4])
    assert not seen & set(odd[1::4])
    assert world.items[2] in seen


def test_the_days_that_come_in_after_the_reading_are_counted(
    world: ServedWorld, store: Store, cache: ItemCache
) -> None:
    items = loaded(cache, store, world)
    before = picked(store, world, "nobody", items).features
    (first,) = before.keys[0]
    post(store, [first] * 3, "now")
    after = picked(store, world, "nobody", items).features
    assert after.keys[0] == (first,)
    assert after.states["n_7d"][0] == np.nan_to_num(before.states["n_7d"][0]) + 3
    assert state(store) == items.state, "an event is no change of the catalogue"


def test_what_the_read_saw_is_told_for_the_audit(world: ServedWorld, store: Store, cache: ItemCache) -> None:
    items = loaded(cache, store, world)
    ours, theirs = (picked(store, world, "nobody", one, audited=True).features.seen for one in (items, None))
    assert ours is not None
    assert ours == theirs


CHANGES = {
    "title": "UPDATE items SET title = 'another' WHERE item_id = %(item)s",
    "withdrawn": "DELETE FROM items WHERE item_id = %(item)s",
    "new": "INSERT INTO items (item_id, title) VALUES ('brand-new', 'N')",
    "vector": "DELETE FROM item_vectors WHERE item_id = %(item)s",
    "row": "UPDATE online.item_rows SET item_activity = NULL WHERE item_id = %(item)s",
    "emptied": "TRUNCATE online.item_rows",
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_is_written_is_seen_by_the_next_request(
    world: ServedWorld, connection: psycopg.Connection, store: Store, cache: ItemCache, change: str
) -> None:
    items = loaded(cache, store, world)
    victim = picked(store, world, "nobody", items).item_ids[0]
    connection.execute(CHANGES[change], {"item": victim})
    assert cache.get(state(store), world.version, DIM) is None, "what is in memory no longer holds"
    anew = loaded(cache, store, world)
    assert anew is not items
    assert_same(*(picked(store, world, "nobody", one) for one in (anew, None)))


def test_an_ingest_that_changes_nothing_changes_nothing(
    world: ServedWorld, store: Store, cache: ItemCache, tmp_path: Path
) -> None:
    place = shutil.copytree(Path(world.artifacts_url.removeprefix("file://")).parent / "lake", tmp_path / "lake")
    lake, event = Lake(place.as_uri()), Event("e", "u", "one", "rating", 4.0, TODAY - timedelta(days=3))

    def bring(title: str) -> None:
        source = ListSource([event], [Item("one", title, categories=("a",))], version=str(next(_numbers)))
        with psycopg.connect(world.url, options="-c TimeZone=UTC") as own:
            report = ingest(source, lake, own)
        assert (report.items, report.skipped) == (1, False)

    bring("One")
    before = loaded(cache, store, world)
    bring("One")
    assert state(store) == before.state
    bring("Two")
    after = loaded(cache, store, world)
    assert (before.titles[before.places["one"]], after.titles[after.places["one"]]) == ("One", "Two")


def test_a_transaction_that_commits_late_is_seen_too(
    world: ServedWorld, connection: psycopg.Connection, store: Store, cache: ItemCache
) -> None:
    with psycopg.connect(world.url) as late:
        late.execute("UPDATE items SET title = 'late' WHERE item_id = %s", (world.items[0],))
        connection.execute("UPDATE items SET title = 'early' WHERE item_id = %s", (world.items[1],))
        items = loaded(cache, store, world)
        assert items.titles[items.places[world.items[1]]] == "early"
        assert items.titles[items.places[world.items[0]]] != "late"
        late.commit()
    assert cache.get(state(store), world.version, DIM) is None
    items = loaded(cache, store, world)
    assert items.titles[items.places[world.items[0]]] == "late"


def test_the_log_of_changes_stays_short(world: ServedWorld, connection: psycopg.Connection, store: Store) -> None:
    for _ in range(3):
        connection.execute("UPDATE items SET title = title || '.'")
    before = state(store)
    connection.execute("UPDATE catalogue_changes SET changed_at = now() - interval '25 hours'")
    connection.execute("UPDATE items SET title = title || '.'")
    assert connection.execute("SELECT count(*) FROM catalogue_changes").fetchone() == (1,)
    assert state(store) != before


def test_by_the_role_of_the_pipeline_too(world: ServedWorld, connection: psycopg.Connection, store: Store) -> None:
    before = state(store)
    with psycopg.connect(with_role(world.url, "larder_orchestrator")) as pipeline:
        pipeline.execute("UPDATE items SET title = 'x' WHERE item_id = %s", (world.items[0],))
        pipeline.execute("DELETE FROM item_vectors WHERE item_id = %s", (world.items[0],))
        pipeline.execute("DELETE FROM online.item_rows WHERE item_id = %s", (world.items[0],))
    assert state(store) != before


def test_where_nothing_notes_what_is_written_nothing_is_kept(
    world: ServedWorld, connection: psycopg.Connection, store: Store, cache: ItemCache, caplog: pytest.LogCaptureFixture
) -> None:
    connection.execute("ALTER TABLE online.item_rows DISABLE TRIGGER catalogue_changed_written")
    connection.execute("DROP TRIGGER catalogue_changed_updated ON items")
    assert cache.get(state(store), world.version, DIM) is None
    assert cache.wait(SECONDS)
    assert cache.get(state(store), world.version, DIM) is None
    assert "public.items, online.item_rows" in caplog.text
    assert not cache._thread.is_alive() if cache._thread else True, "not tried again with every request"
    catalogue_sql.watch(connection, catalogue_sql.ITEMS)
    assert {name for (name,) in connection.execute(catalogue_sql.MISSING)} == {catalogue_sql.ROWS}


def test_a_catalogue_that_is_too_large_is_looked_up(
    world: ServedWorld, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    cache = ItemCache(world.url, len(world.items) - 1)
    for _ in range(2):
        assert cache.get(state(store), world.version, DIM) is None
        assert cache.wait(SECONDS)
    assert caplog.text.count("LARDER_ITEM_CACHE") == 1
    off = ItemCache(world.url, 0)
    assert off.get(state(store), world.version, DIM) is None
    assert off._thread is None


def test_a_catalogue_that_is_written_to_all_the_time_is_not_read_all_the_time(
    world: ServedWorld, connection: psycopg.Connection, store: Store, cache: ItemCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(item_cache, "_REST", 1e6)
    loaded(cache, store, world)
    thread = cache._thread
    for number in range(5):
        connection.execute("UPDATE items SET title = %s WHERE item_id = %s", (str(number), world.items[0]))
        assert cache.get(state(store), world.version, DIM) is None
    assert cache._thread is thread


def test_without_the_database_requests_go_on(world: ServedWorld, caplog: pytest.LogCaptureFixture) -> None:
    cache = ItemCache("postgresql://nobody@127.0.0.1:1/none", 1_000)
    assert cache.get("1-1", world.version, DIM) is None
    assert cache.wait(SECONDS)
    assert cache.get("1-1", world.version, DIM) is None
    assert "not kept in memory" in caplog.text
    cache.close()


def test_what_asks_for_what_an_item_is_reads_the_tables(world: ServedWorld, store: Store, cache: ItemCache) -> None:
    items = loaded(cache, store, world)
    wrong = replace(items, titles=["from memory"] * len(items))
    assert set(picked(store, world, "nobody", wrong).titles) == {"from memory"}
    category = items.categories[0][0]
    for more in (
        {"filters": Filters(categories=[category])},
        {"filters": Filters(exclude_categories=[category])},
        {"filters": Filters(years=(1950, None))},
        {"given": world.items[:9]},
        {"features": False},
        {"live": False},
    ):
        assert "from memory" not in picked(store, world, "nobody", wrong, **more).titles


def test_the_application_answers_the_same(world: ServedWorld, connection: psycopg.Connection) -> None:
    app = world.application()
    plain = world.application(item_cache=0)
    try:
        asked = [RecommendationRequest(user_id=user, explain=True) for user in world.people[:8]]
        app.recommend(asked[0])
        assert app.items.wait(SECONDS)
        assert app.items._items is not None
        for request in asked:
            ours, theirs = app.recommend(request), plain.recommend(request)
            assert ours.degraded == theirs.degraded == ()
            assert [(one.item_id, one.title, one.reasons) for one in ours.items] == [
                (one.item_id, one.title, one.reasons) for one in theirs.items
            ]
            assert [one.score for one in ours.items] == pytest.approx([one.score for one in theirs.items], abs=1e-4)
        shown = app.recommend(asked[0]).items[0].item_id
        connection.execute("UPDATE items SET title = 'renamed' WHERE item_id = %s", (shown,))
        assert {one.item_id: one.title for one in app.recommend(asked[0]).items}[shown] == "renamed"
    finally:
        app.close()
        plain.close()


def test_models_beside_the_one_that_serves_leave_its_items_in_memory(world: ServedWorld) -> None:
    app = world.application()
    try:
        app.recommend(RecommendationRequest(user_id=world.people[0]))
        assert app.items.wait(SECONDS)
        items, read = app.items._items, app.items._thread
        assert items is not None
        serving = app.models.current()
        assert serving is not None
        arm = copy.copy(serving)
        arm.version = "of-an-arm"
        app.items._not_before = 0.0
        ours = replace(NO_PLAN, ranker=arm)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trials, "plan", lambda *_: ours)
            answer = app.recommend(RecommendationRequest(user_id=world.people[0]))
        assert answer.model_version == "of-an-arm", answer.degraded
        assert (app.items._items, app.items._thread) == (items, read)
    finally:
        app.close()


def test_a_process_that_woke_from_a_snapshot_reads_when_it_has_to(
    world: ServedWorld, connection: psycopg.Connection, store: Store, cache: ItemCache
) -> None:
    loaded(cache, store, world)
    cache._not_before = time.monotonic() + 1e6  # by the clock of the machine that made it
    connection.execute("UPDATE items SET title = 'x' WHERE item_id = %s", (world.items[0],))
    cache.restored()
    assert cache.get(state(store), world.version, DIM) is None
    assert cache.wait(SECONDS)
    assert cache.get(state(store), world.version, DIM) is not None


def test_closing_ends_a_reading(world: ServedWorld, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(item_cache, "ITEMS_AT_ONCE", 1)
    cache = ItemCache(world.url, 1_000)
    assert cache.get(state(store), world.version, DIM) is None
    time.sleep(0.05)
    cache.close()
    assert cache.wait(5)
    assert cache._items is None


def test_parts_of_any_size_make_the_same_whole(
    world: ServedWorld, store: Store, cache: ItemCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = loaded(cache, store, world)
    monkeypatch.setattr(item_cache, "ITEMS_AT_ONCE", 37)
    monkeypatch.setattr(item_cache, "_PAUSE_SECONDS", 0.0)
    cache._items = None
    parts = loaded(cache, store, world)
    assert (whole.places, whole.titles, whole.categories) == (parts.places, parts.titles, parts.categories)
    for name in ("available_at", "vectors", "has_vector", "days", "states"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(parts, name))
    np.testing.assert_array_equal(whole.category_numbers.rows, parts.category_numbers.rows)
    assert whole.category_numbers.numbers == parts.category_numbers.numbers
    assert whole.days.shape == (len(whole), 1)
    assert len(VIEWS) > 1


def test_a_second_partition_is_no_longer_that_of_memory(
    world: ServedWorld, connection: psycopg.Connection, store: Store, cache: ItemCache
) -> None:
    """A partition withdrawn from the ledger counts from the next request on, as in the tables."""
    items = loaded(cache, store, world)
    connection.execute("UPDATE feature_ledger SET partition_date = partition_date - 1 WHERE view = 'item_activity'")
    ours, theirs = (picked(store, world, world.people[0], one) for one in (items, None))
    assert_same(ours, theirs)
    assert ours.features.settled_at == theirs.features.settled_at
    assert (datetime.now(UTC) - timedelta(days=3)).timestamp() < (ours.features.settled_at or 0)
