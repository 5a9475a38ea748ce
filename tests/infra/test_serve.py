"""`make serve`: before the first run, and after features were added."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psycopg
import pytest
from conftest import days_ago

from infra import serve
from infra.deployment import Deployment


def test_serving_before_the_first_run_says_what_to_do(larder_home: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "infra.serve"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "nothing to serve" in done.stderr
    assert "`make run` first" in done.stderr
    assert not larder_home.exists()


def test_serving_makes_the_tables_of_features_that_were_added_since_the_last_run(
    larder_home: Path, monkeypatch: pytest.MonkeyPatch, connection: psycopg.Connection, database: str
) -> None:
    connection.execute("DROP TABLE features.user_activity")
    connection.execute("ALTER TABLE features.item_activity DROP COLUMN n_7d")
    connection.execute("DROP TABLE online.user_rows, online.item_tiles")
    connection.commit()
    Deployment("shop", None, days_ago(30).date()).save()
    monkeypatch.setenv("DATABASE_URL", database)
    monkeypatch.setenv("ARTIFACTS_URL", "file:///nowhere")
    monkeypatch.setattr(sys, "argv", ["serve", "--port", "0"])
    monkeypatch.setattr("infra.serve.signal.signal", lambda *_: None)
    monkeypatch.setattr("inference.handlers.asgi.main", lambda _: 0)
    assert serve.main() == 0
    for made in ("features.user_activity", "online.user_rows", "online.item_tiles"):
        assert connection.execute("SELECT to_regclass(%s)", (made,)).fetchone() != (None,), made
    assert connection.execute("SELECT n_7d FROM features.item_activity").fetchall() == []
