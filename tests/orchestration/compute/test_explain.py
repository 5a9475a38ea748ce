"""An explanation's value is what the oracle gives, and the rows it lists make that value by themselves."""

from __future__ import annotations

import math
from datetime import timedelta
from pathlib import Path

import psycopg
import pytest
from conftest import TODAY, days_ago
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_windows import CATEGORIES, ITEMS, build, events_of, keys_of, oracle
from worlds import ListSource

from orchestration.compute.explain import EXPIRED, MISSING, PRESENT, Explanation, explain
from orchestration.compute.forget import request_erasure
from orchestration.compute.ingest import ingest
from orchestration.compute.lake import Lake
from orchestration.compute.materialise import materialise
from schemas.errors import DefinitionError, LarderError, RequestError
from schemas.events import Event
from schemas.views import ITEM_ACTIVITY, USER_ACTIVITY, USER_AFFINITY, VIEWS

YESTERDAY = (TODAY - timedelta(days=1)).date()


def load(url: str, lake: Lake, events: list[Event]) -> None:
    with psycopg.connect(url, options="-c TimeZone=UTC") as connection:
        for table in (
            "items", "lake_files", "ingests", "recent_events", "event_keys", "user_history", "feature_ledger"
        ):  # fmt: skip
            connection.execute(f"DELETE FROM {table}")
        ingest(ListSource(events, list(ITEMS)), lake, connection, now=TODAY)
    for view in VIEWS:
        materialise(view, YESTERDAY, YESTERDAY, url=url, lake=lake)


def assert_is(found: Explanation, expected: list[float] | None) -> None:
    for feature, value in zip(found.features, expected or [math.nan] * len(found.features), strict=True):
        where = f"{found.view.name}.{feature.name} of {found.key} at {found.at}"
        if math.isnan(value):
            assert (feature.status, feature.value, feature.encoded) == (MISSING, None, None), where
        else:
            assert feature.status == PRESENT, where
            assert feature.encoded == pytest.approx(value, rel=1e-5, abs=1e-5), where


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=events_of, seconds=st.sampled_from([0, 1, 43_201, 86_399]))
def test_the_value_and_the_rows_behind_it_equal_the_oracle(
    database: str, tmp_path_factory: pytest.TempPathFactory, rows: list, seconds: int
) -> None:
    at = TODAY + timedelta(seconds=seconds)
    events = build(rows)
    lake = Lake(tmp_path_factory.mktemp("lake").as_uri())
    load(database, lake, events)
    for view in VIEWS:
        for key in keys_of(view)[:4]:
            found = explain(view, key, at, url=database, lake=lake, limit=None)
            assert_is(found, oracle(view, events, key, at))
            listed = {event.event_id for event in (*found.head, *found.snapshot)}
            assert_is(found, oracle(view, [event for event in events if event.event_id in listed], key, at))
            assert found.snapshot_events == len(found.snapshot)
            assert found.unread == 0


def test_head_events_states_and_late_ones_are_shown(database: str, lake: Lake) -> None:
    noon = days_ago(0) + timedelta(hours=12)
    late = Event("late", "u", "1", "rating", 2.0, days_ago(5), days_ago(2))
    load(
        database,
        lake,
        [late, Event("old", "u", "1", "rating", 4.0, days_ago(9)), Event("new", "u", "2", "view", None, noon)],
    )
    found = explain(USER_ACTIVITY, ("u",), noon + timedelta(seconds=1), url=database, lake=lake)
    assert [event.event_id for event in found.head] == ["new"]
    assert [event.event_id for event in found.snapshot] == ["late", "old"]
    assert [(event.event_id, event.known_at) for event in found.late] == [("late", days_ago(2))]
    assert found.partition is not None
    assert found.partition.partition_date == YESTERDAY
    assert not found.partition.stale
    by_name = {feature.name: feature for feature in found.features}
    assert by_name["events_30d"].value == 3
    assert by_name["events_30d"].states == {"n_30d": (2, 3)}
    assert by_name["value_mean_180d"].states == {"value_sum_180d": (6, 6), "value_n_180d": (2, 2)}
    assert by_name["events_7d"].head_events == 1
    affinity = explain(USER_AFFINITY, ("u", "b"), noon, url=database, lake=lake)
    assert CATEGORIES["1"] == ("a", "b")
    assert affinity.features[0].value == 2
    assert affinity.head == ()


def test_a_snapshot_out_of_its_ttl_is_expired_and_a_day_that_changed_is_stale(
    database: str, lake: Lake, connection: psycopg.Connection
) -> None:
    load(database, lake, [Event("old", "u", "1", "rating", 4.0, days_ago(1))])
    later = TODAY + timedelta(days=10)
    found = explain(ITEM_ACTIVITY, ("1",), later, url=database, lake=lake)
    assert found.partition is None
    assert {feature.status for feature in found.features} == {EXPIRED}
    assert {f.status for f in explain(ITEM_ACTIVITY, ("2",), later, url=database, lake=lake).features} == {MISSING}
    connection.execute("UPDATE lake_files SET rows = rows + 1")
    connection.commit()
    partition = explain(ITEM_ACTIVITY, ("1",), TODAY, url=database, lake=lake).partition
    assert partition is not None
    assert partition.stale


def test_events_that_are_no_longer_kept_online_are_counted(
    database: str, lake: Lake, connection: psycopg.Connection
) -> None:
    noon = days_ago(0) + timedelta(hours=12)
    load(
        database, lake, [Event("old", "u", "1", "view", None, days_ago(3)), Event("new", "u", "1", "view", None, noon)]
    )
    connection.execute("DELETE FROM recent_events")
    connection.commit()
    found = explain(USER_ACTIVITY, ("u",), noon + timedelta(hours=1), url=database, lake=lake)
    assert (found.features[0].value, found.unread) == (1, 1)


def test_a_key_that_does_not_fit_and_a_person_who_asked_to_be_forgotten_are_refused(database: str, lake: Lake) -> None:
    with pytest.raises(DefinitionError, match="'user_affinity' is keyed by user_id, category; the key has 1 parts"):
        explain(USER_AFFINITY, ("u",), TODAY, url=database, lake=lake)
    load(database, lake, [Event("old", "u", "1", "view", None, days_ago(3))])
    request_erasure(database, lake, "u")
    with pytest.raises(LarderError, match="asked to be forgotten"):
        explain(USER_ACTIVITY, ("u",), TODAY, url=database, lake=lake)


def test_the_command_prints_a_table_and_names_what_is_wrong(
    larder_home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, database: str
) -> None:
    from infra.deployment import Deployment
    from orchestration.explain import instant_of, main

    monkeypatch.setattr("orchestration.explain.console.width", 200)
    assert main(["--view", "user_activty", "--key", "u"]) == 1
    assert "there is no view 'user_activty' (did you mean user_activity?)" in capsys.readouterr().out
    assert main(["--view", "user_affinity", "--key", "u"]) == 1
    assert "does not name one user_id and one category" in capsys.readouterr().out
    assert main(["--view", "user_activity", "--key", "u", "--at", "2030-01-31T12:00"]) == 1
    assert "has no time zone" in capsys.readouterr().out
    for text in ("2030-01-31T12:00", "2030-01-31"):  # the advice is one that works
        with pytest.raises(RequestError) as refused:
            instant_of(text)
        assert instant_of(str(refused.value).split("write ")[1].split(" for UTC")[0]).date().isoformat() == "2030-01-31"
    assert instant_of("2030-01-31+02:00").isoformat() == "2030-01-30T22:00:00+00:00"
    with pytest.raises(SystemExit):
        main([])
    missing = capsys.readouterr().err
    assert "VIEW= (--view), KEY= (--key)" in missing
    assert missing.endswith("\n  make explain VIEW=… KEY=… [AT=instant]\n")
    assert main(["--view", "user_activity", "--key", "u"]) == 1
    assert "run `make run` first" in capsys.readouterr().out
    monkeypatch.setenv("DATABASE_URL", database)
    record = Deployment("told", None, days_ago(30).date())
    record.save()
    load(database, Lake(record.lake_url), [Event("e-1", "u", "1", "rating", 4.0, days_ago(1))])
    assert main(["--view", "user_affinity", "--key", '["u","a"]', "--at", TODAY.isoformat()]) == 0
    shown = capsys.readouterr().out
    for words in ("value_mean_180d", "PRESENT", "e-1", "on time", f"snapshot of {YESTERDAY}", "from 1 events"):
        assert words in shown, words
