"""`make serve`: before the first run, and after features were added."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest
from conftest import days_ago

from infra import serve
from infra.deployment import Deployment
from schemas.roles import FUNCTION, WRITER


def test_serving_before_the_first_run_says_what_to_do(larder_home: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "infra.serve"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "nothing to serve" in done.stderr
    assert "`make run` first" in done.stderr
    assert not larder_home.exists()


def test_experiments_that_are_nowhere_are_not_taken_for_none(larder_home: Path, database: str) -> None:
    Deployment("shop", None, days_ago(30).date()).save()
    environment = {**os.environ, "DATABASE_URL": database, "LARDER_EXPERIMENTS": "/nowhere/experiments.toml"}
    command = [sys.executable, "-m", "infra.serve", "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 1
    assert "LARDER_EXPERIMENTS names '/nowhere/experiments.toml', and no file is there" in done.stderr


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
    monkeypatch.setenv("LARDER_WRITER_URL", "")
    monkeypatch.setenv("LARDER_EXPERIMENTS", "")
    monkeypatch.setattr(sys, "argv", ["serve", "--port", "0"])
    monkeypatch.setattr("infra.serve.signal.signal", lambda *_: None)
    monkeypatch.setattr("inference.handlers.asgi.main", lambda _: 0)
    assert serve.main() == 0
    for made in ("features.user_activity", "online.user_rows", "online.item_tiles"):
        assert connection.execute("SELECT to_regclass(%s)", (made,)).fetchone() != (None,), made
    assert connection.execute("SELECT n_7d FROM features.item_activity").fetchall() == []
    assert os.environ["LARDER_EXPERIMENTS"] == str(larder_home / "shop" / "experiments.toml")


def test_serving_uses_the_two_roles_and_shows_a_development_key(
    larder_home: Path, database: str, connection: psycopg.Connection
) -> None:
    """The command itself, asked over HTTP with the key that it shows."""
    record = Deployment("shop", None, days_ago(30).date())
    record.save()
    environment = {**os.environ, "DATABASE_URL": database, "LARDER_HOME": str(larder_home), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "infra.serve", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    try:
        assert process.stdout is not None
        told = ""
        while "larder listens on" not in told:
            line = process.stdout.readline()
            assert line, told
            told += line
        assert "development key, for this machine" in told
        key = told.partition("export LARDER_KEY=")[2].split()[0]
        port = int(told.split("larder listens on http://127.0.0.1:")[1].split()[0])
        event = {"event_id": "e1", "user_id": "u", "item_id": "i", "kind": "view"}

        def post(headers: dict[str, str]) -> int:
            asked = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
            body = json.dumps({"events": [event]})
            asked.request("POST", "/events", body, {"content-type": "application/json", **headers})
            status = asked.getresponse().status
            asked.close()
            return status

        assert post({}) == 401
        assert post({"authorization": f"Bearer {key}"}) == 200
        users = connection.execute(
            "SELECT DISTINCT usename FROM pg_stat_activity WHERE application_name = 'larder' AND datname = current_database()"
        ).fetchall()
        assert {user for (user,) in users} == {FUNCTION, WRITER}
    finally:
        process.terminate()
        process.wait(20)
        if process.stdout is not None:
            process.stdout.close()
    assert connection.execute("SELECT count(*) FROM event_keys").fetchone() == (1,)


@pytest.mark.parametrize(
    ("host", "access", "said"),
    [
        ("0.0.0.0", "keys", "no development key is shown"),
        ("127.0.0.1", "platform", "whoever reaches this port may do anything"),
    ],
)
def test_a_development_key_is_shown_to_this_machine_alone(
    larder_home: Path,
    database: str,
    connection: psycopg.Connection,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    host: str,
    access: str,
    said: str,
) -> None:
    Deployment("shop", None, days_ago(30).date()).save()
    empty = {"LARDER_WRITER_URL": "", "LARDER_EXPERIMENTS": ""}
    for name, value in ({"DATABASE_URL": database, "LARDER_ACCESS": access} | empty).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("ARTIFACTS_URL", "file:///nowhere")
    monkeypatch.setattr(sys, "argv", ["serve", "--port", "0", "--host", host])
    monkeypatch.setattr("infra.serve.signal.signal", lambda *_: None)
    monkeypatch.setattr("inference.handlers.asgi.main", lambda _: 0)
    assert serve.main() == 0
    told = capsys.readouterr().out
    assert said in told
    assert "larder_" not in told
    assert connection.execute("SELECT count(*) FROM api_keys").fetchone() == (0,)


def test_a_link_opens_the_page_with_the_development_key(
    larder_home: Path, database: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LARDER_ACCESS", raising=False)
    record = Deployment("shop", None, days_ago(30).date())
    record.save()
    serve._tell_of_keys(record, database, "::1", 8080)
    told = capsys.readouterr().out
    key = told.partition("export LARDER_KEY=")[2].split()[0]
    # Behind the #: no server ever sees it, and no log.
    assert f"http://[::1]:8080/#key={key}\n" in told
    serve._tell_of_keys(record, database, "0.0.0.0", 8080)
    assert "#key" not in capsys.readouterr().out
