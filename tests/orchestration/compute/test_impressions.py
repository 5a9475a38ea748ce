"""What was shown and passed over: read from the served log and its outcomes, and a sure negative of a training slate."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import psycopg
import pytest
from conftest import days_ago
from numpy.typing import NDArray
from test_mining import ITEMS, offered

from orchestration.compute.impressions import KEPT_DAYS, MOST, PassedOver, load_passed_over
from orchestration.compute.interactions import Interactions
from orchestration.compute.lake import Lake
from orchestration.compute.mining import mine
from orchestration.compute.recent import roll_partitions
from schemas.events import KINDS

DAY = 86_400_000_000


def micros(at: datetime) -> int:
    return int(at.timestamp() * 1_000_000)


def table(rows: list[tuple[str, str, str, datetime]]) -> Interactions:
    """Interactions of `(user, item, kind, at)`, over people a, b and items i0 … i9."""
    users, items = np.array(["a", "b"]), np.array([f"i{n}" for n in range(10)])
    rows = sorted(rows, key=lambda row: (row[0], row[3]))
    return Interactions(
        users,
        items,
        np.array([["a", "b"].index(row[0]) for row in rows], np.int32),
        np.array([int(row[1][1:]) for row in rows], np.int32),
        np.array([micros(row[3]) for row in rows], np.int64),
        np.array([KINDS.index(row[2]) + 1 for row in rows], np.int64),
        np.full(len(rows), np.nan, np.float32),
    )


def serve(connection: psycopg.Connection[Any], request_id: str, user: str, at: datetime, items: str) -> None:
    """A row of the served log; what is not read here is of no account."""
    connection.execute(
        "INSERT INTO served_requests (request_id, user_id, served_at, item_ids, scores, model_version, candidates, sources, "
        "degraded) VALUES (%s, %s, %s, %s, '{}', 'm', 0, '{}', '{}')",
        (request_id, user, at, items.split()),
    )


def act(connection: psycopg.Connection[Any], request_id: str, user: str, item: str, kind: str, at: datetime) -> None:
    connection.execute(
        "INSERT INTO recent_events (event_id, occurred_at, user_id, item_id, kind, request_id) VALUES (%s, %s, %s, %s, %s, %s)",
        (f"{request_id}{item}{kind}", at, user, item, kind, request_id),
    )


@pytest.fixture
def recent(connection: psycopg.Connection[Any], lake: Lake) -> psycopg.Connection[Any]:
    roll_partitions(connection, lake, datetime.now(UTC))
    return connection


def found(passed: PassedOver, known: Interactions) -> list[tuple[str, str]]:
    return [
        (str(known.user_ids[user]), str(known.item_ids[item]))
        for user, item in zip(passed.user, passed.item, strict=True)
    ]


def test_what_stands_above_the_lowest_that_was_acted_upon_was_passed_over(recent: psycopg.Connection[Any]) -> None:
    at = days_ago(2)
    known = table([("a", "i2", "click", at + timedelta(minutes=1)), ("b", "i9", "view", days_ago(0.1))])
    serve(recent, "r1", "a", at, "i0 i1 i2 i3")
    act(recent, "r1", "a", "i2", "click", at + timedelta(minutes=1))
    act(recent, "r1", "a", "i0", "hide", at + timedelta(minutes=1))
    serve(recent, "r2", "a", at, "i4 i5 i6")  # nobody knows whether they looked
    serve(recent, "r3", "b", at, "i7 i8")  # acted upon by somebody else: another's request_id proves nothing
    act(recent, "r3", "a", "i8", "click", at + timedelta(minutes=1))
    passed = load_passed_over(recent, known)
    assert found(passed, known) == [("a", "i1")], "i0 was acted upon, i3 stands below"
    assert passed.shown_at.tolist() == [micros(at)]


def test_what_somebody_chose_at_another_time_is_no_negative_of_theirs(recent: psycopg.Connection[Any]) -> None:
    at = days_ago(2)
    known = table(
        [("a", "i0", "rating", days_ago(9)), ("a", "i1", "hide", days_ago(8)), ("b", "i2", "view", days_ago(0.1))]
    )
    serve(recent, "r1", "a", at, "i0 i1 ghost i2")
    act(recent, "r1", "a", "i2", "click", at + timedelta(minutes=1))
    assert found(load_passed_over(recent, known), known) == [("a", "i1")]


def test_nothing_later_than_the_training_data_is_read(recent: psycopg.Connection[Any]) -> None:
    known = table([("a", "i5", "view", days_ago(3)), ("b", "i5", "view", days_ago(3))])
    serve(recent, "r1", "a", days_ago(2), "i0 i1")
    act(recent, "r1", "a", "i1", "click", days_ago(2))
    assert len(load_passed_over(recent, known)) == 0


def test_where_no_list_was_logged_there_is_nothing(recent: psycopg.Connection[Any]) -> None:
    assert len(load_passed_over(recent, table([("a", "i0", "view", days_ago(1))]))) == 0
    assert len(load_passed_over(recent, table([]))) == 0


def passed_over(*rows: tuple[int, int, int]) -> PassedOver:
    """Of `(user, item, shown_at)`, in order."""
    user, item, at = (np.array(column) for column in zip(*rows, strict=True))
    return PassedOver(user.astype(np.int32), item.astype(np.int32), at.astype(np.int64))


def slate(shown: PassedOver | None) -> tuple[NDArray[np.int32], NDArray[np.float32], Any]:
    labels, sources = offered(counts=np.ones(ITEMS, np.float32))
    items, log_q = mine(labels, sources, lambda at: np.zeros((len(at), ITEMS), bool), 0, shown)
    return items, log_q, labels


def test_a_passed_over_item_is_in_the_persons_next_slate_for_certain() -> None:
    _, _, labels = slate(None)
    at = int(labels.at[1])
    shown = passed_over(
        (1, 100, at - KEPT_DAYS * DAY - 1),  # too long ago
        (1, 1, at - 5),  # the person had it before the label: not to be offered
        (1, 777, at - 4),
        (1, 3, at - 3),  # the label's own item
        (1, 888, at),
        (1, 999, at + 1),  # later than the label: no request could know
    )
    items, log_q, _ = slate(shown)
    without, _, _ = slate(None)
    assert {777, 888} <= set(items[1].tolist())
    assert not {777, 888} & set(without[1].tolist()), "by chance they would not be there"
    assert not {1, 100, 999} & set(items[1].tolist())
    assert items[1].tolist().count(3) == 1
    place = {item: log_q[1, column] for column, item in enumerate(items[1].tolist())}
    assert place[777] == place[888] == 0.0, "certain, and so not corrected"
    np.testing.assert_array_equal(items[[0, 2]], without[[0, 2]])


def test_a_slate_takes_the_newest_few() -> None:
    _, _, labels = slate(None)
    at = int(labels.at[0])
    many = passed_over(*((0, 1_000 + n, at - 100 + n) for n in range(MOST + 5)))
    taken = set(slate(many)[0][0].tolist()) & set(range(1_000, 1_000 + MOST + 5))
    assert set(range(1_005, 1_000 + MOST + 5)) <= taken
