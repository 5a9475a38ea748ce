"""The skew audit on requests through the real core: a clean world has no mismatch, and every injected one has its cause."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar

import psycopg
import pytest
from conftest import TODAY, days_ago
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_windows import CATEGORIES, ITEMS, build, events_of
from worlds import ListSource

from inference.models import LoadedModels
from inference.recommend import Recommender
from inference.served import ServedLog, ServedRead
from inference.store import Store
from orchestration.compute.forget import forget
from orchestration.compute.ingest import drain, ingest
from orchestration.compute.lake import Lake
from orchestration.compute.materialise import materialise
from orchestration.compute.skew import (
    BUG,
    CHANGED_DEFINITION,
    LATE_DATA,
    STALE_SNAPSHOT,
    SkewReport,
    audit,
    newest_audit,
    table,
)
from orchestration.compute.skew_causes import Snapshot
from schemas.events import Event, Item
from schemas.online_sql import entities, rows_table, tiles_table
from schemas.serving import RecommendationRequest
from schemas.views import VIEWS

LONG_AGO = days_ago(400)


class Held(ServedLog):
    """A log that keeps reads to itself."""

    held: ClassVar[list[ServedRead]] = []

    def offer(self, read: ServedRead) -> None:
        self.held.append(read)


@dataclass
class World:
    """A database that is served from by the real core, everybody's reads logged."""

    url: str
    lake: Lake
    store: Store
    served: ServedLog
    recommender: Recommender

    def load(self, events: list[Event], version: str = "1", items: list[Item] | None = None) -> None:
        with psycopg.connect(self.url, options="-c TimeZone=UTC") as connection:
            ingest(ListSource(events, list(items or ITEMS), version=version), self.lake, connection, now=TODAY)

    def build(self, *days_back: int) -> None:
        for back in days_back:
            day = (TODAY - timedelta(days=back)).date()
            for view in VIEWS:
                materialise(view, day, day, url=self.url, lake=self.lake)

    def post(self, *events: Event) -> None:
        for event in events:
            stored = self.store.accept_events([{**asdict(event), "occurred_at": event.occurred_at.isoformat()}], 5000)
            assert stored == {event.event_id}

    def ask(self, user: str = "1") -> None:
        """A request for the present, ranking every item."""
        answer = self.recommender.recommend(RecommendationRequest(user_id=user, candidates=tuple(CATEGORIES)))
        assert len(answer.items) == len(CATEGORIES)
        assert self.served.flush(10_000)
        assert not self.served.failed

    def drain(self) -> None:
        with psycopg.connect(self.url, options="-c TimeZone=UTC") as connection:
            drain(connection, self.lake, LONG_AGO.date(), datetime.now(UTC).date())

    def audit(self) -> SkewReport:
        return audit(self.url, self.lake, LONG_AGO)

    def execute(self, sql: str, *parameters: Any) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.url, options="-c TimeZone=UTC") as connection:
            cursor = connection.execute(sql, parameters)
            return cursor.fetchall() if cursor.description else []

    def close(self) -> None:
        self.served.close()
        self.store.close()


def opened(url: str, lake: Lake) -> World:
    store = Store(url)
    served = ServedLog(Store(url, size=1), 1_000)
    models = LoadedModels("file:///nothing")
    return World(url, lake, store, served, Recommender(store, models, timeout_ms=20_000, served=served))


@pytest.fixture
def world(database: str, lake: Lake) -> Iterator[World]:
    made = opened(database, lake)
    yield made
    made.close()


def history() -> list[Event]:
    """Events of two people on two items over forty days, until yesterday."""
    return [
        Event(f"h{n}", "1" if n % 3 else "2", "1" if n % 2 else "11", "rating", float(n % 5 + 1), days_ago(n % 40 + 1))
        for n in range(80)
    ]


def now_event(event_id: str, *, ago_seconds: float = 0.0, item: str = "1", user: str = "1") -> Event:
    return Event(event_id, user, item, "rating", 4.0, datetime.now(UTC) - timedelta(seconds=ago_seconds))


def causes(report: SkewReport) -> set[str]:
    return {cause for _, _, cause in report.counts}


# --- nothing to find ----------------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=events_of, posted=st.integers(0, 40), drained=st.booleans())
def test_offline_and_online_agree_on_random_worlds(
    database: str, tmp_path_factory: pytest.TempPathFactory, rows: list, posted: int, drained: bool
) -> None:
    """Some events are there when yesterday is built, the others are posted since; people ask in between."""
    now = datetime.now(UTC)
    events = [event for event in build(rows) if event.occurred_at < now]
    afterwards = [event for event in events if event.occurred_at >= TODAY][:posted]
    emptied = ["items", "lake_files", "ingests", "recent_events", "event_keys", "user_history", "feature_ledger"]
    emptied += ["served_features"]
    for entity in entities():
        emptied += [rows_table(entity), tiles_table(entity)]
    made = opened(database, Lake(tmp_path_factory.mktemp("lake").as_uri()))
    try:
        for name in emptied:
            made.execute(f"DELETE FROM {name}")
        made.load([event for event in events if event not in afterwards])
        made.build(1)
        for event in afterwards:
            made.ask(event.user_id)
            made.post(event)
        for user in ("1", "11", "12", "nobody"):
            made.ask(user)
        if drained:
            made.drain()
        report = made.audit()
        assert not report.counts, table(report)
        assert report.reads == len(afterwards) + 4
        # A person's view, four items' and at least the categories of those.
        assert report.compared >= report.reads * (7 + 4 * 8 + 2 * 4)
    finally:
        made.close()


def test_no_sample_is_nothing_to_audit(world: World) -> None:
    report = world.audit()
    assert (report.reads, report.compared, report.bugs) == (0, 0, 0)
    with psycopg.connect(world.url) as connection:
        found = newest_audit(connection)
    assert found is not None
    assert (found.compared, found.bugs) == (0, 0)


def test_an_event_that_came_after_the_read_is_no_mismatch(world: World) -> None:
    """Training asks what was known at the read: what is dated before it and came later is in neither."""
    world.load(history())
    world.build(1)
    world.ask()
    world.post(now_event("late", ago_seconds=3_600), Event("older", "1", "1", "view", None, days_ago(3)))
    world.drain()
    assert not world.audit().counts


# --- late data ----------------------------------------------------------------------------------------------------


def test_a_load_that_says_nothing_of_when_it_came_is_late_data(world: World) -> None:
    """Historical loads set known_at to when the event happened: what was not there at the read seems to have been."""
    world.load(history())
    world.build(1)
    world.ask()
    # Two seconds before the read, by its own word.
    (at,) = world.execute("SELECT min(read_at) FROM served_features")[0]
    world.load([Event("loaded", "1", "1", "rating", 2.0, at - timedelta(seconds=2))], version="2")
    report = world.audit()
    assert causes(report) == {LATE_DATA}
    assert report.counts["user_activity", "events_7d", LATE_DATA] == 1
    assert report.counts["item_activity", "decayed_events_180d", LATE_DATA] == 1


def test_an_event_that_was_being_committed_during_the_read_is_late_data(world: World) -> None:
    world.load(history())
    world.build(1)
    with psycopg.connect(world.url, options="-c TimeZone=UTC") as writer:
        writer.execute(
            "INSERT INTO recent_events (event_id, occurred_at, user_id, item_id, kind, value) "
            "VALUES ('flying', now(), '1', '1', 'rating', 4)"
        )
        world.ask()
        writer.commit()
    (known_at, read_at) = world.execute(
        "SELECT known_at, (SELECT min(read_at) FROM served_features) FROM recent_events WHERE event_id = 'flying'"
    )[0]
    assert known_at < read_at
    assert causes(world.audit()) == {LATE_DATA}


def test_an_event_of_a_clock_that_runs_ahead_is_late_data(world: World) -> None:
    """It was seen, and is dated after the read: training, which looks strictly before, does not have it."""
    world.load(history())
    world.build(1)
    ahead = now_event("ahead", ago_seconds=-120)
    if ahead.occurred_at.date() != datetime.now(UTC).date():
        pytest.skip("two minutes before midnight tomorrow begins")
    world.post(ahead)
    world.ask()
    assert causes(world.audit()) == {LATE_DATA}


# --- stale snapshot -----------------------------------------------------------------------------------------------


def test_an_event_of_a_day_that_was_built_already_makes_its_snapshot_stale(world: World) -> None:
    """Posted before the read, dated before the end of the partition it used: known, and not in what was read."""
    world.load(history())
    world.build(1)
    world.post(Event("past", "1", "1", "rating", 1.0, days_ago(2)), now_event("new", ago_seconds=1))
    world.ask()
    report = world.audit()
    assert causes(report) == {STALE_SNAPSHOT}
    assert report.counts["user_activity", "events_180d", STALE_SNAPSHOT] == 1
    # Still so when the day was drained and built again, which is what the next run does.
    world.drain()
    world.build(1)
    again = world.audit()
    assert again.counts == report.counts
    world.ask()
    assert world.audit().counts == report.counts, "what is read from the new build is right"


def test_an_older_partition_is_a_stale_snapshot(world: World) -> None:
    world.load(history())
    world.build(3)
    world.ask()
    report = world.audit()
    assert causes(report) == {STALE_SNAPSHOT}
    assert "events_1d" not in {feature for _, feature, _ in report.counts}, "a short window lies in the head"


def test_a_partition_out_of_its_ttl_is_a_stale_snapshot(world: World) -> None:
    world.load(history())
    world.build(6)
    world.ask()
    report = world.audit()
    assert causes(report) == {STALE_SNAPSHOT}
    assert {example.served for example in report.examples.values()} == {None}


def test_a_partition_that_was_built_again_before_the_read_was_logged_is_stale(world: World) -> None:
    """The row that was served is gone, and the log names the new build: nothing is left to recompute."""
    world.load(history())
    world.build(1)
    world.execute("UPDATE online.user_rows SET user_activity = overlay(user_activity PLACING '\\x41' FROM 9)")
    held = Held(world.served.store, 1_000)
    replace(world.recommender, served=held).recommend(RecommendationRequest(user_id="1", candidates=tuple(CATEGORIES)))
    world.build(1)
    [read] = held.held
    world.served.offer(read)
    assert world.served.flush(10_000)
    assert causes(world.audit()) == {STALE_SNAPSHOT}


def test_what_was_counted_of_somebody_who_is_forgotten_since_is_stale(world: World, tmp_path: Path) -> None:
    world.load(history())
    world.build(1)
    world.ask("1")
    world.ask("2")
    forget("2", url=world.url, lake=world.lake, artifacts_url=(tmp_path / "artifacts").as_uri())
    assert {user for (user,) in world.execute("SELECT DISTINCT user_id FROM served_features")} == {"1"}
    report = world.audit()
    assert causes(report) == {STALE_SNAPSHOT}
    assert {view for view, _, _ in report.counts} == {"item_activity"}


# --- changed definition -------------------------------------------------------------------------------------------


def test_another_definition_is_told_from_a_bug(world: World) -> None:
    world.load(history())
    world.build(1)
    world.ask()
    world.execute(
        "UPDATE served_features SET definition_hash = 'before', numbers[1] = numbers[1] + 1, features[2] = 'gone' "
        "WHERE view = 'user_activity'"
    )
    world.execute("UPDATE served_features SET view = 'a_view_that_is_gone' WHERE view = 'user_affinity'")
    report = world.audit()
    assert causes(report) == {CHANGED_DEFINITION}
    assert report.counts["user_activity", "events_7d", CHANGED_DEFINITION] == 1
    assert report.counts["user_activity", "gone", CHANGED_DEFINITION] == 1
    assert {feature for view, feature, _ in report.counts if view == "user_activity"} == {"events_7d", "gone"}
    assert report.cause(CHANGED_DEFINITION) > 2


def test_a_changed_catalogue_is_late_data_to_crossed_features(world: World) -> None:
    world.load(history())
    world.build(1)
    world.ask()
    moved = [Item(item.item_id, item.title, categories=("b",) if item.item_id == "1" else item.categories) for item in ITEMS]  # fmt: skip
    world.load([], version="2", items=moved)
    report = world.audit()
    assert causes(report) == {LATE_DATA}
    assert {view for view, _, _ in report.counts} == {"user_affinity"}


# --- bugs ---------------------------------------------------------------------------------------------------------

BROKEN = {
    "a count that was made twice": "UPDATE online.user_tiles SET n = n + 1 WHERE user_id = '1'",
    "a sum that lost a value": "UPDATE online.user_tiles SET value_sum = value_sum - 1 WHERE user_id = '1'",
    "a packed row with another key's states": "UPDATE online.user_rows SET user_activity = "
    "(SELECT user_activity FROM online.user_rows WHERE user_id = '2') WHERE user_id = '1'",
    "a row that was lost": "DELETE FROM online.user_rows WHERE user_id = '1'",
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN.keys())
def test_what_nothing_explains_is_a_bug(world: World, broken: str) -> None:
    world.load(history())
    world.build(1)
    world.post(now_event("new", ago_seconds=1))
    world.execute(broken)
    world.ask()
    report = world.audit()
    assert causes(report) == {BUG}
    assert {view for view, _, _ in report.counts} == {"user_activity"}, table(report)
    with psycopg.connect(world.url) as connection:
        found = newest_audit(connection)
    assert found is not None
    assert found.bugs == report.bugs == sum(found.where.values()) > 0


def test_late_and_stale_events_do_not_hide_a_bug(world: World) -> None:
    world.load(history())
    world.build(1)
    world.post(Event("past", "1", "1", "rating", 1.0, days_ago(2)), now_event("new", ago_seconds=1))
    world.execute("UPDATE online.user_tiles SET n = n + 5 WHERE user_id = '1' AND day = %s", TODAY.date())
    world.ask()
    world.drain()
    world.build(1)
    report = world.audit()
    by_feature = {feature: cause for view, feature, cause in report.counts if view == "user_activity"}
    assert by_feature["events_180d"] == BUG
    assert by_feature["value_mean_180d"] == STALE_SNAPSHOT
    assert BUG not in {cause for view, _, cause in report.counts if view != "user_activity"}, table(report)


def test_the_report_names_nobody(world: World) -> None:
    person = "somebody-with-a-name"
    world.load([*history(), Event("theirs", person, "1", "rating", 3.0, days_ago(2))])
    world.build(1)
    world.post(now_event("new", ago_seconds=1, user=person))
    world.execute("UPDATE online.user_tiles SET n = n + 1")
    world.ask(person)
    report = world.audit()
    assert report.bugs
    assert person not in repr(report.examples) + repr(table(report))
    assert not world.execute("SELECT FROM skew_audits WHERE strpos(mismatches::text, %s) > 0", person)


def test_a_snapshot_is_read_as_postgres_writes_it() -> None:
    found = Snapshot.parse("100:110:103,107")
    assert [found.sees(number) for number in (99, 102, 103, 107, 109, 110, 200)] == [
        True, True, False, False, True, False, False
    ]  # fmt: skip
    assert Snapshot.parse("5:5:").sees(4)
    second_round = Snapshot.parse(f"{2**32 + 10}:{2**32 + 20}:")
    assert [second_round.sees_row(xmin) for xmin in (15, 25, 2**32 - 5)] == [True, False, True]
