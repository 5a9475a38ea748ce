"""One edit in `schemas/views.py`, the README's, followed to its end: table, backfill, asset page, training set, ranker, answer."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
from conftest import ingested

from infra import registry
from schemas import views
from schemas.manifest import MANIFEST_FILE, Manifest

ROOT = Path(__file__).parents[1]
# One line, as it stands in the README.
LINE = 'count("events_14d", 14),'


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process with the edit says of a deployment that was ingested, and given a champion, without it."""
    with pytest.MonkeyPatch.context() as patch:
        made = ingested(tmp_path_factory.mktemp("added"), patch, 30, events_per_person=40)
        champion = Manifest(
            "ranker", "small", 64, views.fingerprint(), views.context_features(), views.candidate_features(), "e",
            "item.v1", "wish.v1", "2026-01-01T00:00:00+00:00", 0, {},
        )  # fmt: skip
        path = f"models/ranker/{champion.version}"
        folder = Path(urlsplit(made.record.artifacts_url).path) / path
        folder.mkdir(parents=True)
        (folder / MANIFEST_FILE).write_text(champion.to_json())
        with psycopg.connect(made.url) as connection:
            registry.register(connection, champion, path)
            registry.record_gate(connection, champion.version, True, {})
            registry.promote(connection, champion.version)
        done = subprocess.run(
            [sys.executable, str(ROOT / "tests" / "added_feature.py"), made.record.name, LINE],
            cwd=ROOT, env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        return {**json.loads(done.stdout.splitlines()[-1]), "champion": champion.version}


def test_the_readme_shows_this_edit() -> None:
    assert f"+        {LINE}" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_its_column_is_made_and_backfilled_without_a_migration(told: dict[str, Any]) -> None:
    assert told["backfilled"][0] > 10


def test_the_asset_page_lists_its_column_and_its_meaning(told: dict[str, Any]) -> None:
    assert "n_14d" in told["columns"]["user_activity"]
    assert "| `events_14d` | 14 | events in the window |" in told["description"]
    assert told["columns"]["user_taste"] == ["partition_date", "user_id", "value_last_30d", "value_at_30d"]


def test_training_set_and_ranker_take_it_in_order(told: dict[str, Any]) -> None:
    names = [*views.context_features(), "user_activity.events_14d", "user_taste.last_value_30d"]
    assert told["context_features"] == told["training_features"] == names
    assert told["training_width"] == len(names)
    assert told["candidate_features"] == list(views.candidate_features())


def test_a_model_that_learned_without_it_is_refused(told: dict[str, Any]) -> None:
    assert told["fingerprint"] != views.fingerprint()
    assert f"learned features {views.fingerprint()}, this code assembles {told['fingerprint']}" in told["old_model"]
    for answer in (told["after_tables"], told["after_backfill"]):
        assert (answer["status"], answer["model_version"]) == (200, "co-visitation")
        assert answer["degraded"] == ["ranker"]
    assert len(told["after_backfill"]["items"]) == 3


def test_item_vectors_skip_that_model_and_do_not_fail(told: dict[str, Any]) -> None:
    assert told["item_vectors"]["skipped"] == told["champion"]
    assert told["item_vectors"]["model_versions"] == "none"


def test_a_function_that_is_newer_than_its_database_goes_without_features_and_says_why(told: dict[str, Any]) -> None:
    before = told["before_tables"]
    assert (before["status"], before["degraded"]) == (200, ["features", "ranker"])
    assert "does not have the tables of this version's features yet" in told["read_before_tables"]
    assert "make serve" in told["read_before_tables"]


def test_events_are_taken_meanwhile_and_count_once_there_are_tables(told: dict[str, Any]) -> None:
    """The database's own function stores them by the declarations that its tables have."""
    posted = told["posted_before_tables"]
    assert (posted["status"], [one["outcome"] for one in posted["outcomes"]]) == (200, ["stored"])
    assert told["newest"] == "posted-1"


def test_the_online_read_returns_it(told: dict[str, Any]) -> None:
    events, last = told["expected"]
    assert told["user_activity"] == {"value": pytest.approx(math.log1p(events)), "mask": 1}
    assert told["user_taste"] == {"value": pytest.approx(last), "mask": 1}
