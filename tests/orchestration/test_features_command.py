"""`make features`: what it prints, and what it says when it cannot."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import psycopg
import pytest
from conftest import TODAY, days_ago
from worlds import ListSource

from infra.deployment import Deployment
from orchestration.compute.ingest import ingest
from orchestration.compute.lake import Lake
from orchestration.compute.materialise import materialise
from orchestration.features import main
from schemas.events import Event, Item
from schemas.views import VIEWS


def test_the_command_prints_value_status_and_age(
    larder_home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, database: str
) -> None:
    monkeypatch.setattr("orchestration.features.console.width", 200)
    assert main(["--view", "user_activity", "--key", "u"]) == 1
    assert "run `make run` first" in capsys.readouterr().out
    assert main(["--view", "user_activty", "--key", "u"]) == 1
    assert "did you mean user_activity?" in capsys.readouterr().out
    monkeypatch.setenv("DATABASE_URL", database)
    record = Deployment("told", None, days_ago(30).date())
    record.save()
    lake, yesterday = Lake(record.lake_url), (TODAY - timedelta(days=1)).date()
    with psycopg.connect(database, options="-c TimeZone=UTC") as connection:
        event = Event("e-1", "u", "i", "view", None, days_ago(1))
        ingest(ListSource([event], [Item("i", "I", categories=("a",))]), lake, connection, now=TODAY)
    for view in VIEWS:
        materialise(view, yesterday, yesterday, url=database, lake=lake)
    at = TODAY + timedelta(hours=1)
    assert main(["--view", "user_activity,item_activity", "--key", "u", "--key", "i", "--at", at.isoformat()]) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]
    assert ["u", "events_7d", "PRESENT", "1", "3,600 s"] in shown
    assert ["", "value_mean_180d", "MISSING", "–", "3,600 s"] in shown
    assert main(["--view", "user_affinity", "--key", "u,a"]) == 0
    assert "user_affinity" in capsys.readouterr().out
