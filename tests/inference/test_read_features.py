"""Reading features of any views and keys: values equal the oracle, and each says whether it is there and how old."""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import numpy as np
import psycopg
import pytest
from conftest import TODAY, days_ago
from test_store import counting_proxy
from worlds import ListSource

from inference.features import FeatureBlock, Status, read_features
from inference.store import Store
from orchestration.compute.forget import request_erasure
from orchestration.compute.ingest import ingest
from orchestration.compute.lake import Lake
from orchestration.compute.materialise import materialise
from schemas.errors import DefinitionError, Unavailable
from schemas.events import Event, Item
from schemas.features import USER, FeatureView, count
from schemas.views import ITEM_ACTIVITY, USER_ACTIVITY, USER_AFFINITY, VIEWS

YESTERDAY = (TODAY - timedelta(days=1)).date()
LOOKED_UP = {
    USER_ACTIVITY: [("u",), ("1",), ("nobody",), ("u",)],
    ITEM_ACTIVITY: [("i",), ("j",)],
    USER_AFFINITY: [("u", "a"), ("u", "b"), ("1", "1a"), ("11", "a")],
}


@pytest.fixture
def store(database: str) -> Iterator[Store]:
    opened = Store(database)
    yield opened
    opened.close()


def load(database: str, lake: Lake, *days: int) -> None:
    """Two people, two items, events two to six days ago and, for `u`, one early today; partitions of so many days ago."""
    events = [
        Event(f"u{n}", "u", "i", "rating", float(n % 5 + 1), days_ago(n) + timedelta(hours=3)) for n in range(2, 7)
    ]
    events += [Event("o", "11", "j", "view", None, days_ago(3)), Event("today", "u", "j", "view", None, days_ago(0))]
    items = [Item("i", "I", categories=("a", "b")), Item("j", "J", categories=("a",))]
    with psycopg.connect(database, options="-c TimeZone=UTC") as connection:
        ingest(ListSource(events, list(items)), lake, connection, now=TODAY)
    for back in days:
        day = (TODAY - timedelta(days=back)).date()
        for view in VIEWS:
            materialise(view, day, day, url=database, lake=lake)


def value(block: FeatureBlock, row: int, name: str) -> float:
    return float(block.values[row, block.names.index(name)])


def statuses(block: FeatureBlock) -> list[set[str]]:
    return [{Status(code).name for code in row} for row in block.status]


@pytest.mark.parametrize("at", [None, datetime.now(UTC)])
def test_any_views_and_keys_come_in_the_order_asked_for(
    database: str, lake: Lake, store: Store, at: datetime | None
) -> None:
    load(database, lake, 1)
    found = read_features(store, LOOKED_UP, at=at)
    assert list(found) == [view.name for view in LOOKED_UP]
    people, items, affinity = found.values()
    for view, block in zip(LOOKED_UP, found.values(), strict=True):
        assert block.values.shape == block.valid.shape == block.status.shape == (len(block.keys), len(view.features))
        assert (block.values.dtype, block.valid.dtype) == (np.float32, np.bool_)
        assert not block.values[~block.valid].any()
    assert value(people, 0, "events_180d") == 6
    assert value(people, 0, "value_mean_180d") == pytest.approx(np.mean([3, 4, 5, 1, 2]))
    assert (people.values[3] == people.values[0]).all(), "a key that is asked for twice is answered twice"
    assert statuses(people)[1:3] == [{"MISSING"}, {"MISSING"}]
    assert np.isnan(people.age_seconds[1:3]).all()
    # Keys are columns, not one text: neither ("1", "1a") nor any other cut of it is ("11", "a").
    assert statuses(affinity)[2] == {"MISSING"}
    assert value(affinity, 3, "events_180d") == 1
    assert (value(affinity, 0, "events_180d"), value(affinity, 1, "events_180d")) == (6, 5)
    assert (value(items, 0, "events_7d"), value(items, 1, "events_7d")) == (5, 2)
    # A row without any rating has no mean, and everything else.
    assert statuses(items)[1] == {"PRESENT", "MISSING"}
    assert items.status[1, items.names.index("value_mean_180d")] == Status.MISSING
    midnight = datetime(TODAY.year, TODAY.month, TODAY.day, tzinfo=UTC)
    assert people.age_seconds[0] == pytest.approx((people.at - midnight).total_seconds())


def test_encoded_values_are_the_rankers(database: str, lake: Lake, store: Store) -> None:
    load(database, lake, 1)
    plain, encoded = (
        read_features(store, {USER_ACTIVITY: [("u",)]}, encoded=flag)["user_activity"] for flag in (False, True)
    )
    assert value(encoded, 0, "events_180d") == pytest.approx(math.log1p(value(plain, 0, "events_180d")))
    assert value(encoded, 0, "value_mean_180d") == value(plain, 0, "value_mean_180d")


@pytest.mark.parametrize("live", [True, False])
def test_a_partition_out_of_its_ttl_reads_as_expired(database: str, lake: Lake, store: Store, live: bool) -> None:
    load(database, lake, 5)  # every view's ttl is three days
    for key, expected in (("i", {"EXPIRED"}), ("j", {"MISSING"}), ("nothing", {"MISSING"})):
        block = read_features(store, {ITEM_ACTIVITY: [(key,)]}, at=None if live else datetime.now(UTC))["item_activity"]
        # j has nothing in the old partition and an event today: those of one day alone are no value either.
        assert statuses(block) == [expected], key
        assert not block.valid.any()
        if expected == {"EXPIRED"}:
            assert block.age_seconds[0] > 4 * 86_400
    before = read_features(store, {ITEM_ACTIVITY: [("i",)]}, at=days_ago(3))["item_activity"]
    assert statuses(before) == [{"PRESENT"}], "at that instant the partition was a day old"
    assert before.age_seconds[0] == 86_400


@pytest.mark.parametrize("live", [True, False])
def test_a_partition_of_another_definition_counts_as_missing(
    database: str, lake: Lake, store: Store, connection: psycopg.Connection, live: bool
) -> None:
    load(database, lake, 1)
    at = None if live else datetime.now(UTC)
    if live:
        connection.execute("UPDATE online.item_rows SET item_activity = overlay(item_activity PLACING '\\x00' FROM 1)")
    else:
        connection.execute("UPDATE feature_ledger SET definition_hash = 'another' WHERE view = 'item_activity'")
    connection.commit()
    assert statuses(read_features(store, {ITEM_ACTIVITY: [("i",)]}, at=at)["item_activity"]) == [{"MISSING"}]
    assert "PRESENT" in statuses(read_features(store, {USER_ACTIVITY: [("u",)]}, at=at)["user_activity"])[0]


def test_who_asked_to_be_forgotten_reads_as_unknown(database: str, lake: Lake, store: Store) -> None:
    load(database, lake, 1)
    request_erasure(database, lake, "u")
    for at in (None, datetime.now(UTC)):
        found = read_features(store, {USER_ACTIVITY: [("u",), ("11",)], USER_AFFINITY: [("u", "a")]}, at=at)
        assert [rows == {"MISSING"} for rows in statuses(found["user_activity"])] == [True, False]
        assert statuses(found["user_affinity"]) == [{"MISSING"}]


@pytest.mark.parametrize("live", [True, False])
def test_a_thousand_keys_of_every_view_take_one_round_trip(database: str, lake: Lake, live: bool) -> None:
    load(database, lake, 1)
    many = {
        USER_ACTIVITY: [(f"u{n}",) for n in range(999)] + [("u",)],
        ITEM_ACTIVITY: [("i",)] + [(f"i,{n}",) for n in range(999)],
        USER_AFFINITY: [("u", f"c{n}") for n in range(999)] + [("u", "a")],
    }
    with counting_proxy(database) as (url, waits):
        opened = Store(url)
        opened.ping(1000)
        before = len(waits)
        found = read_features(opened, many, at=None if live else datetime.now(UTC))
        assert len(waits) - before == 1
        opened.close()
    assert [int(block.valid.any(axis=1).sum()) for block in found.values()] == [1, 1, 1]
    assert value(found["user_affinity"], 999, "events_180d") == 6


def test_keys_are_texts_whatever_they_hold(database: str, lake: Lake, store: Store) -> None:
    odd = ['a"b', "a\\", "{x,y}", "NULL", "", 'é", "', '\\"']
    events = [Event(f"odd{n}", user, "i", "rating", float(n), days_ago(2)) for n, user in enumerate(odd) if user]
    with psycopg.connect(database, options="-c TimeZone=UTC") as connection:
        ingest(ListSource(events, [Item("i", "I")]), lake, connection, now=TODAY)
    materialise(USER_ACTIVITY, YESTERDAY, YESTERDAY, url=database, lake=lake)
    for at in (None, datetime.now(UTC)):
        block = read_features(store, {USER_ACTIVITY: [(user,) for user in odd]}, at=at)["user_activity"]
        assert [value(block, row, "value_mean_180d") for row in range(len(odd))] == [0, 1, 2, 3, 0, 5, 6]
        assert [rows != {"MISSING"} for rows in statuses(block)] == [bool(user) for user in odd]


def test_views_of_one_entity_may_be_asked_for_different_keys(database: str, lake: Lake, store: Store) -> None:
    load(database, lake, 1)
    alone = read_features(store, {USER_ACTIVITY: [("u",), ("11",)]})["user_activity"]
    turned = read_features(store, {USER_ACTIVITY: [("nobody",), ("11",), ("u",), ("11",)], ITEM_ACTIVITY: [("i",)]})
    block = turned["user_activity"]
    assert (block.valid[[2, 1, 3]] == alone.valid[[0, 1, 1]]).all()
    steady = [column for column, name in enumerate(block.names) if "age" not in name]
    assert (block.values[[2, 1, 3]][:, steady] == alone.values[[0, 1, 1]][:, steady]).all()
    assert statuses(block)[0] == {"MISSING"}


def test_a_read_is_prepared_once_but_nothing_is_behind_a_pooler(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def left(opened: Store) -> list[tuple[object, ...]]:
        for timeout_ms in (2_000, 2_000, 3_000):
            read_features(opened, {USER_ACTIVITY: [("u",)]}, timeout_ms=timeout_ms)
        with opened.connection() as connection:
            return connection.execute(
                "SELECT (SELECT count(*) FROM pg_prepared_statements WHERE statement LIKE 'PREPARE row%'), "
                "current_setting('statement_timeout'), current_setting('plan_cache_mode')"
            ).fetchall()

    with counting_proxy(database) as (url, waits):
        opened = Store(url)
        opened.ping(1000)
        before = len(waits)
        assert left(opened) == [(1, "3s", "force_generic_plan")]
        assert len(waits) - before == 4, "one round trip each, whatever had to be set"
        opened.close()
    monkeypatch.setattr(psycopg.ConnectionInfo, "backend_pid", property(lambda _: 1))
    opened = Store(database)
    assert left(opened) == [(0, "0", "auto")]
    opened.close()


def test_a_read_that_takes_too_long_is_unavailable_and_leaves_the_session_fit(database: str, store: Store) -> None:
    asked = {USER_ACTIVITY: [("u",)]}
    read_features(store, asked, timeout_ms=300)
    with psycopg.connect(database) as blocking:
        blocking.execute("LOCK TABLE feature_ledger")
        for timeout_ms in (300, 200):  # as it was asked before, and with settings that are rolled back
            with pytest.raises(Unavailable, match="did not answer in time"):
                read_features(store, asked, timeout_ms=timeout_ms)
    assert statuses(read_features(store, asked, timeout_ms=5_000)["user_activity"]) == [{"MISSING"}]
    with store.connection() as connection:
        assert connection.execute("SHOW statement_timeout").fetchone() == ("5s",)


def test_a_first_read_that_fails_leaves_no_statement_behind(database: str, store: Store) -> None:
    with psycopg.connect(database) as blocking:
        blocking.execute("LOCK TABLE feature_ledger")
        for _ in range(3):
            with pytest.raises(Unavailable, match="did not answer in time"):
                read_features(store, {USER_ACTIVITY: [("u",)]}, timeout_ms=200)
    with store.connection() as connection:
        row = connection.execute("SELECT count(*) FROM pg_prepared_statements").fetchone()
    assert row == (0,)


def test_a_connection_that_was_lost_is_replaced_by_the_read_that_finds_it(store: Store) -> None:
    read_features(store, {USER_ACTIVITY: [("u",)]})
    with store.connection() as connection:
        lost = socket.socket(fileno=os.dup(connection.fileno()))
    with lost:
        lost.shutdown(socket.SHUT_RDWR)
    assert statuses(read_features(store, {USER_ACTIVITY: [("u",)]})["user_activity"]) == [{"MISSING"}]


def test_what_cannot_be_read_is_named(store: Store) -> None:
    with pytest.raises(DefinitionError, match=r"'u' is no key of view 'user_activity'; give a tuple \(user_id,\)"):
        read_features(store, {USER_ACTIVITY: ["u"]})  # type: ignore[list-item]
    with pytest.raises(DefinitionError, match="is no key of view 'user_affinity'"):
        read_features(store, {USER_AFFINITY: [("u",)]})
    with pytest.raises(DefinitionError, match=r"\(1,\) is no key of 'user'; give a tuple of texts"):
        read_features(store, {USER_ACTIVITY: [("u",), (1,)]})  # type: ignore[list-item]
    unknown = FeatureView("unknown", USER, "team:x", "", 3, (count("n_1d", 1),))
    with pytest.raises(DefinitionError, match=r"'unknown' is not one of schemas/views\.py"):
        read_features(store, {unknown: [("u",)]})
    assert read_features(store, {}) == {}
    assert read_features(store, {USER_ACTIVITY: []})["user_activity"].values.shape == (0, len(USER_ACTIVITY.features))
