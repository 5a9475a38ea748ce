"""Windows, point in time, snapshot plus head: SQL against a slow and obvious oracle, on random worlds."""

from __future__ import annotations

import math
from dataclasses import asdict
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import psycopg
import pytest
from conftest import TODAY, days_ago
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from worlds import ListSource

from inference.assemble import finish
from inference.candidates import Filters
from inference.live import Columns
from inference.store import Store
from orchestration.compute.ingest import ingest
from orchestration.compute.lake import Lake
from orchestration.compute.materialise import ensure_view_tables, materialise
from orchestration.compute.point_in_time import PointInTime
from schemas.events import Event, Item
from schemas.features import FeatureView
from schemas.online_sql import entities, rows_table, tiles_table
from schemas.views import ITEM_ACTIVITY, USER_ACTIVITY, VIEWS

CATEGORIES = {"1": ("a", "b"), "11": ("b",), "2": (), "12": ("a",)}
USERS = ("1", "11", "12", "2")
ITEMS = [Item(item_id, f"Item {item_id}", categories=names) for item_id, names in CATEGORIES.items()]


def oracle(
    view: FeatureView, events: list[Event], keys: tuple[str, ...], at: datetime, late_days: int = 0
) -> list[float] | None:
    """Encoded features of one entity at `at`, straight from the meaning of a window; None if it has no event.

    `late_days`: where the newest snapshot is so many days late, windows that reach into it are so much longer, as
    nothing leaves it.
    """
    midnight = at.replace(hour=0, minute=0, second=0, microsecond=0)
    named = dict(zip(view.entity.keys, keys, strict=True))

    def belongs(event: Event) -> bool:
        return (
            named.get("user_id", event.user_id) == event.user_id
            and named.get("item_id", event.item_id) == event.item_id
            and ("category" not in named or named["category"] in CATEGORIES[event.item_id])
        )

    def window(days: int) -> list[Event]:
        reach = timedelta(days=days + late_days if days > late_days else days)
        return [e for e in events if belongs(e) and midnight - reach <= e.occurred_at < at]

    if not window(view.max_window_days):
        return None
    values: list[float] = []
    for feature in view.features:
        inside = window(feature.window_days)
        rated = [e.value for e in inside if e.value is not None]
        name = feature.name
        if name.startswith("events"):
            value = float(len(inside))
        elif name.startswith("active_days"):
            value = float(len({e.occurred_at.date() for e in inside}))
        elif name.startswith("value_mean"):
            value = sum(rated) / len(rated) if rated else math.nan
        elif name.startswith("liked_rate"):
            value = sum(v >= 4 for v in rated) / len(rated) if rated else math.nan
        elif name.startswith("last_seen"):
            value = (at - max(e.occurred_at for e in inside)).total_seconds() if inside else math.nan
        elif name.startswith("decayed"):
            value = sum(0.5 ** ((at - e.occurred_at).total_seconds() / 86_400 / 7) for e in inside)
        else:
            raise AssertionError(f"the oracle does not know {name}")
        values.append(math.log1p(value) if feature.transform == "log1p" else value)
    return values


events_of = st.lists(
    st.tuples(
        st.sampled_from(USERS),
        st.sampled_from(list(CATEGORIES)),
        st.sampled_from(["view", "rating", "like"]),
        st.one_of(st.none(), st.integers(1, 5).map(float)),
        # Around midnights and window edges, in whole seconds so that instants tie.
        st.tuples(st.integers(0, 200), st.sampled_from([0, 1, 43_200, 86_399])),
    ),
    min_size=1,
    max_size=40,
)


def build(rows: list[tuple[str, str, str, float | None, tuple[int, int]]]) -> list[Event]:
    return [
        Event(f"e{n}", user, item, kind, value, days_ago(days) + timedelta(seconds=second))
        for n, (user, item, kind, value, (days, second)) in enumerate(rows)
    ]


def keys_of(view: FeatureView) -> list[tuple[str, ...]]:
    if view is USER_ACTIVITY:
        return [(user,) for user in USERS]
    if view is ITEM_ACTIVITY:
        return [(item,) for item in CATEGORIES]
    return [(user, category) for user in USERS for category in ("a", "b")]


def assert_equal(expected: list[float] | None, values: np.ndarray, mask: np.ndarray, where: str) -> None:
    if expected is None:
        assert not mask.any(), where
        return
    for index, value in enumerate(expected):
        if math.isnan(value):
            assert mask[index] == 0, f"{where}, feature {index}"
        else:
            assert mask[index] == 1, f"{where}, feature {index}"
            assert values[index] == pytest.approx(value, rel=1e-5, abs=1e-5), f"{where}, feature {index}"


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rows=events_of,
    instants=st.lists(st.tuples(st.integers(0, 190), st.sampled_from([0, 1, 43_200])), min_size=1, max_size=4),
)
def test_point_in_time_equals_the_oracle(
    database: str, tmp_path_factory: pytest.TempPathFactory, rows: list, instants: list
) -> None:
    events = build(rows)
    lake = Lake(tmp_path_factory.mktemp("lake").as_uri())
    with psycopg.connect(database, options="-c TimeZone=UTC") as connection:
        for table in ("items", "lake_files", "ingests", "recent_events", "event_keys", "user_history"):
            connection.execute(f"DELETE FROM {table}")
        ingest(ListSource(events, list(ITEMS)), lake, connection, now=TODAY)
        with PointInTime(lake, connection) as ask:
            for view in VIEWS:
                points = [
                    (keys, days_ago(days) + timedelta(seconds=second))
                    for keys in keys_of(view)
                    for days, second in instants
                ]
                columns = {
                    name: np.array([keys[place] for keys, _ in points]) for place, name in enumerate(view.entity.keys)
                }
                at = np.array([int(instant.timestamp() * 1e6) for _, instant in points])
                found = ask.features(view, columns, at)
                for row, (keys, instant) in enumerate(points):
                    expected = oracle(view, events, keys, instant)
                    assert_equal(expected, found.values[row], found.mask[row], f"{view.name} {keys} at {instant}")
        connection.commit()


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rows=events_of,
    seconds=st.sampled_from([0, 1, 43_201, 86_399]),
    behind=st.integers(1, 3),
    posted=st.integers(0, 40),
    live=st.booleans(),
)
def test_snapshot_plus_head_online_equals_the_oracle(
    database: str,
    tmp_path_factory: pytest.TempPathFactory,
    rows: list,
    seconds: int,
    behind: int,
    posted: int,
    live: bool,
) -> None:
    """Read at an instant of today with the newest partition `behind` days old, some events posted after it was built."""
    at = TODAY + timedelta(seconds=seconds)
    newest = (TODAY - timedelta(days=behind)).date()
    # A live read knows no later event; the other must not see it.
    events = [event for event in build(rows) if event.occurred_at < at or not live]
    afterwards = [event for event in events if event.occurred_at.date() > newest][:posted]
    before = [event for event in events if event not in afterwards]
    lake = Lake(tmp_path_factory.mktemp("lake").as_uri())
    with psycopg.connect(database, options="-c TimeZone=UTC") as connection:
        emptied = ["items", "lake_files", "ingests", "recent_events", "event_keys", "user_history", "feature_ledger"]
        for entity in entities():
            emptied += [rows_table(entity), tiles_table(entity)]
        for table in emptied:
            connection.execute(f"DELETE FROM {table}")
        ingest(ListSource(before, list(ITEMS)), lake, connection, now=TODAY)
    for view in VIEWS:
        materialise(view, newest - timedelta(days=1), newest, url=database, lake=lake)
    store = Store(database)
    try:
        for event in afterwards:  # one by one: tiles must merge
            store.accept_events([{**asdict(event), "occurred_at": event.occurred_at.isoformat()}], 5000)
        late_days = behind - 1
        seen: dict[str, Columns] = {}
        for user in USERS:
            for name, columns in store.read_person(user, at, 5000, live=live).views.items():
                merge_columns(seen, name, columns)
        candidates = store.pick_candidates(
            at=at, filters=Filters(), limit=10, timeout_ms=5000, given=list(CATEGORIES), live=live
        )
        merge_columns(seen, ITEM_ACTIVITY.name, candidates.features)
        for view in VIEWS:
            columns = seen[view.name]
            assert columns.settled or not np.isfinite(columns.as_of).any()
            n = len(columns.keys)
            values, mask = finish(
                view,
                columns.states,
                at=np.full(n, at.timestamp()),
                as_of=columns.as_of,
                present=np.isfinite(columns.as_of),
            )
            for keys in keys_of(view):
                expected = oracle(view, events, keys, at, late_days)
                if keys in columns.keys:
                    row = columns.keys.index(keys)
                    assert_equal(expected, values[row], mask[row], f"{view.name} {keys} at {at}, live {live}")
                else:
                    assert expected is None, f"{view.name} {keys} at {at}, live {live}"
    finally:
        store.close()


def merge_columns(seen: dict[str, Columns], name: str, columns: Columns) -> None:
    """Add the keys of `columns` to those seen of view `name`."""
    if name not in seen:
        seen[name] = columns
        return
    held = seen[name]
    seen[name] = Columns(
        held.keys + columns.keys,
        {state: np.concatenate([values, columns.states[state]]) for state, values in held.states.items()},
        np.concatenate([held.as_of, columns.as_of]),
        held.settled and columns.settled,
    )


def test_a_repeated_load_gives_the_same_rows_and_an_older_one_leaves_newer_days_alone(
    database: str, lake: Lake, connection: psycopg.Connection
) -> None:
    events = build([("1", "1", "rating", 5.0, (day, 43_200)) for day in range(1, 30)])
    ingest(ListSource(events, list(ITEMS)), lake, connection, now=TODAY)
    connection.commit()
    yesterday = (TODAY - timedelta(days=1)).date()

    def rows() -> list[tuple[object, ...]]:
        found = connection.execute("SELECT * FROM features.item_activity ORDER BY 1, 2").fetchall()
        connection.commit()
        return found

    materialise(ITEM_ACTIVITY, yesterday - timedelta(days=3), yesterday, url=database, lake=lake)
    before = rows()
    assert len(before) == 4
    materialise(ITEM_ACTIVITY, yesterday - timedelta(days=3), yesterday, url=database, lake=lake)
    assert rows() == before
    materialise(ITEM_ACTIVITY, yesterday - timedelta(days=10), yesterday - timedelta(days=9), url=database, lake=lake)
    assert rows()[2:] == before
    ledger = connection.execute("SELECT count(*), sum(rows), sum(events) FROM feature_ledger").fetchone()
    assert ledger == (6, 6, 6)


def test_a_materialisation_that_dies_leaves_the_old_partitions(
    database: str, lake: Lake, connection: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    ingest(ListSource(build([("1", "1", "view", None, (2, 1))]), list(ITEMS)), lake, connection, now=TODAY)
    connection.commit()
    day = (TODAY - timedelta(days=2)).date()
    materialise(ITEM_ACTIVITY, day, day, url=database, lake=lake)
    monkeypatch.setattr(
        "orchestration.compute.engines.DuckDB.name", None
    )  # the ledger refuses it, after the rows went in
    with pytest.raises(Exception, match="engine"):
        materialise(ITEM_ACTIVITY, day, day, url=database, lake=lake)
    assert connection.execute("SELECT count(*) FROM features.item_activity").fetchone() == (1,)


def test_a_view_table_grows_with_its_declaration(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from schemas.features import count

    wider = replace(ITEM_ACTIVITY, features=(*ITEM_ACTIVITY.features, count("events_14d", 14)))
    monkeypatch.setattr("orchestration.compute.materialise.VIEWS", (wider,))
    ensure_view_tables(database)
    with psycopg.connect(database) as connection:
        assert connection.execute("SELECT n_14d FROM features.item_activity").fetchall() == []


def test_the_lake_is_a_path_not_a_memory(tmp_path: Path, connection: psycopg.Connection) -> None:
    first = Lake((tmp_path / "lake").as_uri())
    ingest(ListSource(build([("1", "1", "view", None, (2, 1))])), first, connection, now=TODAY)
    assert Lake((tmp_path / "lake").as_uri()).events(connection).count_rows() == 1
