"""Conditions that are no SQL over events are refused when the definitions load, and by Postgres when tables are made."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

from infra.feature_tables import check_conditions
from orchestration.compute.bind import bind_views
from schemas.errors import DefinitionError
from schemas.features import ITEM, FeatureView, count
from schemas.views import VIEWS

ROOT = Path(__file__).parents[3]


def good(where: str, ttl_days: int = 3) -> FeatureView:
    return FeatureView(
        "v", ITEM, "team:x", "", ttl_days, (count("n", 7), count("good_7d", 7, where=where, state="good"))
    )


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (
            "valeu > 3",
            r"feature 'good_7d' of view 'v' counts by 'valeu > 3'.*no column 'valeu' \(did you mean value\?\)",
        ),
        ("user_id = 'u'", r"feature 'good_7d' of view 'v'.*no column 'user_id' \(did you mean item_id\?\)"),
        ("value >", r"feature 'good_7d' of view 'v' counts by 'value >': .*syntax error.*mend the condition"),
        ("value > COUNT(*)", r"feature 'good_7d' of view 'v' counts by"),
    ],
)
def test_a_condition_that_does_not_fit_the_events_is_named(where: str, message: str) -> None:
    with pytest.raises(DefinitionError, match=message):
        bind_views([*VIEWS, good(where)])


def test_a_ttl_longer_than_single_events_are_kept_is_refused() -> None:
    with pytest.raises(DefinitionError, match=r"view 'v' has a ttl of 15 days.*give it 14 or less"):
        bind_views([good("value > 3", ttl_days=15)])


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("kind == 'view'", r"feature 'good_7d' of view 'v' cannot be counted by Postgres: .*DuckDB and Postgres share"),
        ("valeu > 3", r"feature 'good_7d' of view 'v'.*\(did you mean value\?\)"),
    ],
)
def test_a_condition_that_only_duckdb_takes_is_refused_by_postgres(
    connection: psycopg.Connection, where: str, message: str
) -> None:
    with pytest.raises(DefinitionError, match=message):
        check_conditions(connection, [good(where)])
    check_conditions(connection, VIEWS)


def test_the_definitions_do_not_load_with_a_bad_condition() -> None:
    line = 'count("good_7d", 7, where="valeu > 3", state="good"),'
    program = (
        f"from edited_views import *; install(add_feature('item_activity', {line!r})); import orchestration.definitions"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        # Whatever deployment another test is at, this one has none.
        env={**os.environ, "DEPLOYMENT": "", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "feature 'good_7d' of view 'item_activity' counts by 'valeu > 3'" in done.stderr
    assert "did you mean value?" in done.stderr
