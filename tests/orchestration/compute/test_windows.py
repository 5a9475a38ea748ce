"""Windows, point in time, snapshot plus head: SQL against a slow and obvious oracle, on random worlds.

The views are those of schemas/views.py; test_every_aggregation.py runs the same tests on views that hold them all.
"""

from __future__ import annotations

import math
import os
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta, tzinfo
from decimal import Decimal
from pathlib import Path
from zoneinfo import ZoneInfo

import numpy as np
import psycopg
import pyarrow as pa
import pytest
from conftest import TODAY, days_ago
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from worlds import ListSource

from inference.assemble import finish
from inference.candidates import Filters
from inference.features import FeatureBlock, block_of, read_features
from inference.live import Columns
from inference.store import Store
from infra.feature_tables import ensure_view_tables
from orchestration.compute.duck import duck
from orchestration.compute.ingest import ingest
from orchestration.compute.lake import Lake
from orchestration.compute.materialise import materialise
from orchestration.compute.point_in_time import PointInTime
from orchestration.compute.windows import snapshot_sql, tile_sql
from schemas.events import Event, Item
from schemas.features import Feature, FeatureView
from schemas.online_sql import entities, rows_table, tiles_table
from schemas.views import ITEM_ACTIVITY, USER_ACTIVITY, VIEWS

WORLDS = int(os.environ.get("LARDER_TEST_WORLDS", "15"))
"""Random worlds per test; `make prove` asks for a thousand."""
# Keys that glue to the same text: ("1", "12") and ("11", "2").
CATEGORIES = {"1": ("a", "b"), "11": ("b", "2"), "2": (), "12": ("a", "12")}
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
    values = [value_of(feature, window(feature.window_days), at) for feature in view.features]
    return [
        float(np.log1p(value)) if feature.transform == "log1p" else value
        for feature, value in zip(view.features, values, strict=True)
    ]


def value_of(feature: Feature, inside: list[Event], at: datetime) -> float:
    """One feature over the events in its window, by its name; NaN for none. Sums are exact, as decimals."""
    valued = [e for e in inside if e.value is not None]
    ratings, views = ([e for e in inside if e.kind in kinds] for kinds in (("rating",), ("view", "like")))

    def total(events: list[Event]) -> Decimal:
        return sum((Decimal(str(e.value)) for e in events if e.value is not None), Decimal())

    def share(over: Decimal | int, under: Decimal | int) -> float:
        return float(over) / float(under) if under else math.nan

    match feature.name.rsplit("_", 1)[0]:
        case "events":
            return float(len(inside))
        case "shown":
            return float(len(views))
        case "active_days":
            return float(len({e.occurred_at.date() for e in inside}))
        case "value_mean":
            return share(total(valued), len(valued))
        case "value_sum":
            return float(total(valued)) if valued else math.nan
        case "value_min":
            return min((e.value for e in valued if e.value is not None), default=math.nan)
        case "value_max":
            return max((e.value for e in valued if e.value is not None), default=math.nan)
        case "last_value":
            return max(((e.occurred_at, e.value) for e in valued if e.value is not None), default=(at, math.nan))[1]
        case "liked_rate":
            return share(sum(e.value is not None and e.value >= 4 for e in valued), len(valued))
        case "rated_per_shown":
            return share(len(ratings), len(views))
        case "paid_per_value":  # a sum over a sum; a sum of no values is none
            paid = [e for e in ratings if e.value is not None]
            return share(total(paid), total(valued)) if paid and valued else math.nan
        case "last_seen_age":
            return (at - max(e.occurred_at for e in inside)).total_seconds() if inside else math.nan
        case "decayed_events":
            half_life_days = feature.states[0].half_life_days or 0
            return sum(0.5 ** ((at - e.occurred_at).total_seconds() / 86_400 / half_life_days) for e in inside)
    raise AssertionError(f"the oracle does not know {feature.name}")


def clock_changes(zone: str) -> list[int]:
    """How many days ago the clocks of `zone` were changed, within the longest window."""
    offsets = [days_ago(days).astimezone(ZoneInfo(zone)).utcoffset() for days in range(402)]
    return [days for days in range(401) if offsets[days] != offsets[days + 1]]


CLOCK_CHANGES = [days for zone in ("Europe/Berlin", "America/New_York") for days in clock_changes(zone) if days <= 200]


events_of = st.lists(
    st.tuples(
        st.sampled_from(USERS),
        st.sampled_from(list(CATEGORIES)),
        st.sampled_from(["view", "rating", "like"]),
        st.one_of(st.none(), st.integers(1, 5).map(float), st.sampled_from([3.7, 0.1, -0.1, -2.5])),
        # Around midnights, window edges and changes of the clocks (at 1 and 7 UTC), in whole seconds so that instants tie.
        st.tuples(
            st.one_of(st.integers(0, 200), st.sampled_from([0, 1, 2, 3, 7, 30, 180, *CLOCK_CHANGES])),
            st.sampled_from([0, 1, 3_600, 25_200, 43_200, 86_399]),
        ),
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
    return [(user, category) for user in USERS for category in ("a", "b", "12", "2")]


def assert_equal(
    view: FeatureView, expected: list[float] | None, values: np.ndarray, mask: np.ndarray, where: str
) -> None:
    """Equal to the last bit of a float32, but for weights that decay: those to 1e-6."""
    if expected is None:
        assert not mask.any(), where
        return
    for index, (feature, value) in enumerate(zip(view.features, expected, strict=True)):
        told = f"{view.name}.{feature.name} {where}"
        if math.isnan(value):
            assert mask[index] == 0, told
            continue
        assert mask[index] == 1, told
        # Parts that cancel out leave the last bit of a double.
        tolerance = (
            1e-6 if feature.name.startswith("decayed") else max(float(np.spacing(np.float32(abs(value)))), 1e-12)
        )
        assert values[index] == pytest.approx(value, rel=0, abs=tolerance * max(1.0, abs(value))), told


@settings(max_examples=WORLDS, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=events_of, partitions=st.sets(st.integers(0, 200) | st.sampled_from([0, 1, *CLOCK_CHANGES]), max_size=4))
def test_windows_equal_the_oracle(rows: list, partitions: set[int]) -> None:
    events = build(rows)
    days = sorted(days_ago(days).date() for days in partitions | {1})
    table = pa.table(
        {
            "event_id": [e.event_id for e in events],
            "user_id": [e.user_id for e in events],
            "item_id": [e.item_id for e in events],
            "kind": [e.kind for e in events],
            "value": pa.array([e.value for e in events], pa.float64()),
            "occurred_at": pa.array([e.occurred_at for e in events], pa.timestamp("us", tz="UTC")),
            "known_at": pa.array([e.occurred_at for e in events], pa.timestamp("us", tz="UTC")),
        }
    )
    items = pa.table({"item_id": list(CATEGORIES), "categories": pa.array(CATEGORIES.values(), pa.list_(pa.string()))})
    with duck() as db:
        for name, relation in (("events", table), ("items", items), ("days", pa.table({"partition_date": days}))):
            db.register(name, relation)
        for view in VIEWS:
            db.execute(f"CREATE OR REPLACE TEMP TABLE tiles AS {tile_sql(view)}")
            columns = ", ".join(f"epoch({name})" if state.is_instant else name for name, state, _ in view.columns)
            keys = ", ".join(view.entity.keys)
            found = db.execute(
                f"SELECT partition_date, {keys}, {columns} FROM ({snapshot_sql(view, 'days')})"
            ).fetchall()
            width = 1 + len(view.entity.keys)
            held = {row[:width]: np.array(row[width:], np.float64) for row in found}
            assert len(held) == len(found)
            for day in days:
                for keys in keys_of(view):
                    midnight = datetime.combine(day + timedelta(days=1), datetime.min.time(), UTC)
                    expected = oracle(view, events, keys, midnight)
                    states = held.get((day, *keys))
                    assert (states is None) == (expected is None), f"{view.name} {keys} on {day}"
                    if states is not None:
                        instant = np.array([midnight.timestamp()])
                        named = {name: states[place : place + 1] for place, (name, _, _) in enumerate(view.columns)}
                        values, mask = finish(view, named, at=instant, as_of=instant, present=np.ones(1, bool))
                        assert_equal(view, expected, values[0], mask[0], f"{keys} on {day}")


@settings(max_examples=WORLDS, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rows=events_of,
    instants=st.lists(
        st.tuples(st.integers(0, 190) | st.sampled_from(CLOCK_CHANGES or [0]), st.sampled_from([0, 1, 25_201, 43_200])),
        min_size=1,
        max_size=4,
    ),
    late_days=st.lists(st.sampled_from([0, 0, 0.25, 1, 3, 40]), max_size=40),
)
def test_point_in_time_equals_the_oracle(
    database: str, tmp_path_factory: pytest.TempPathFactory, rows: list, instants: list, late_days: list
) -> None:
    """Some events were learned of late, and labels stand there twice."""
    events = build(rows)
    for place, days in enumerate(late_days[: len(events)]):
        events[place] = replace(events[place], known_at=events[place].occurred_at + timedelta(days=days))
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
                    for days, second in (*instants, instants[0])
                ]
                columns = {
                    name: np.array([keys[place] for keys, _ in points]) for place, name in enumerate(view.entity.keys)
                }
                at = np.array([int(instant.timestamp() * 1e6) for _, instant in points])
                found = ask.features(view, columns, at)
                for row, (keys, instant) in enumerate(points):
                    known = [event for event in events if (event.known_at or event.occurred_at) <= instant]
                    expected = oracle(view, known, keys, instant)
                    assert_equal(view, expected, found.values[row], found.mask[row], f"{keys} at {instant}")
        connection.commit()


@settings(max_examples=WORLDS, deadline=None, suppress_health_check=list(HealthCheck))
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
        public = read_at(store, at) if live else {}
        for view in VIEWS:
            columns = seen[view.name]
            if live:  # the public read takes another way through SQL, and gives the same to the last bit
                block = block_of(view, keys_of(view), at, columns, encoded=True)
                for part in ("values", "valid", "status", "age_seconds"):
                    np.testing.assert_array_equal(getattr(public[view.name], part), getattr(block, part))
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
                    assert_equal(view, expected, values[row], mask[row], f"{keys} at {at}, live {live}")
                else:
                    assert expected is None, f"{view.name} {keys} at {at}, live {live}"
    finally:
        store.close()


def read_at(store: Store, at: datetime) -> dict[str, FeatureBlock]:
    """The public read of every view, as if it were `at` now."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:
            return at

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("inference.features.datetime", Clock)
        return read_features(store, {view: keys_of(view) for view in VIEWS}, encoded=True)


def test_a_late_event_of_a_day_that_had_others_makes_no_second_day(lake: Lake, connection: psycopg.Connection) -> None:
    noon = timedelta(hours=12)
    events = [
        Event("on-time", "1", "1", "view", None, days_ago(3) + noon),
        Event("late", "1", "1", "view", None, days_ago(3), days_ago(1)),
        Event("late-alone", "1", "1", "view", None, days_ago(5), days_ago(1)),
        Event("late-too", "1", "1", "view", None, days_ago(5) + noon, days_ago(1)),
    ]
    ingest(ListSource(events, list(ITEMS)), lake, connection, now=TODAY)
    with PointInTime(lake, connection) as ask:
        at = np.array([int(instant.timestamp() * 1e6) for instant in (days_ago(2), days_ago(0))])
        found = ask.features(USER_ACTIVITY, {"user_id": np.array(["1", "1"])}, at)
    names = [feature.name for feature in USER_ACTIVITY.features]
    shown = {name: np.expm1(found.values[:, names.index(name)]).round().tolist() for name in names[:4]}
    assert shown["active_days_30d"] == [1, 2]
    assert shown["events_30d"] == [1, 4]


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
        held.settled_at,
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
    monkeypatch.setattr("infra.feature_tables.VIEWS", (wider,))
    ensure_view_tables(database)
    with psycopg.connect(database) as connection:
        assert connection.execute("SELECT n_14d FROM features.item_activity").fetchall() == []


def test_the_lake_is_a_path_not_a_memory(tmp_path: Path, connection: psycopg.Connection) -> None:
    first = Lake((tmp_path / "lake").as_uri())
    ingest(ListSource(build([("1", "1", "view", None, (2, 1))])), first, connection, now=TODAY)
    assert Lake((tmp_path / "lake").as_uri()).events(connection).count_rows() == 1
