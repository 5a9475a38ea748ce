"""Request keys as commands make, list and revoke them, and the one that `make serve` shows."""

from __future__ import annotations

import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from conftest import days_ago

from inference.links import Links
from infra import keys
from infra.deployment import Deployment
from schemas.errors import SettingsError
from schemas.keys import secret_hash, take_apart
from schemas.roles import ORCHESTRATOR
from schemas.urls import with_user


@pytest.fixture
def deployment(larder_home: Path, database: str, monkeypatch: pytest.MonkeyPatch) -> Deployment:
    monkeypatch.setenv("DATABASE_URL", database)
    made = Deployment("shop", None, days_ago(3).date())
    made.save()
    return made


def test_only_a_hash_of_a_key_is_kept(connection: psycopg.Connection[Any]) -> None:
    key = keys.create(connection, " app ", ["write", "recommend", "write"], per_minute=7)
    key_id, secret = take_apart(key) or ("", "")
    row = connection.execute("SELECT * FROM api_keys").fetchone()
    assert row is not None
    assert row[:5] == (key_id, "app", secret_hash(secret), ["recommend", "write"], 7)
    assert secret not in str(row)
    assert len(bytes.fromhex(secret)) == 32
    assert keys.create(connection, "app", ["admin"]) != key


@pytest.mark.parametrize(
    ("name", "scopes", "per_minute", "said"),
    [
        ("app", ["recommend", "all"], 1, "scopes all; give some of recommend, write, admin"),
        ("app", [], 1, "scopes are missing"),
        ("app", ["write"], 0, "per minute is 0; give a whole number from 1 to 1000000"),
        (" ", ["write"], 1, "without a name"),
    ],
)
def test_a_key_that_cannot_be_is_refused(
    connection: psycopg.Connection[Any], name: str, scopes: list[str], per_minute: int, said: str
) -> None:
    with pytest.raises(SettingsError, match=said):
        keys.create(connection, name, scopes, per_minute=per_minute)
    assert connection.execute("SELECT count(*) FROM api_keys").fetchone() == (0,)


def test_the_commands_make_list_and_revoke(deployment: Deployment, capsys: pytest.CaptureFixture[str]) -> None:
    assert keys.main(["list"]) == 0
    assert "no keys yet" in capsys.readouterr().out
    assert keys.main(["create", "--name", "app", "--scopes", "recommend, write", "--days", "3"]) == 0
    shown = capsys.readouterr()
    key_id, secret = take_apart(shown.out.strip()) or ("", "")
    assert key_id
    assert "only time it is shown" in shown.err
    keys.main(["list"])
    (line,) = capsys.readouterr().out.splitlines()
    until = datetime.now(UTC) + timedelta(days=3)
    assert line.startswith(f"{key_id}  until {until:%Y-%m-%d}")
    assert "recommend,write" in line
    assert secret not in line
    assert keys.main(["revoke", key_id]) == 0
    keys.main(["list"])
    assert f"{key_id}  revoked {datetime.now(UTC):%Y-%m-%d}" in capsys.readouterr().out
    assert keys.main(["revoke", "nobody"]) == 1
    assert "there is no key of that id; `make keys` lists them" in capsys.readouterr().err
    assert keys.main(["create", "--name", "app", "--scopes", "all"]) == 1


def test_keys_before_the_first_run_say_what_to_do(larder_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert keys.main(["list"]) == 1
    assert "`make run` first" in capsys.readouterr().err


def test_an_orchestrator_may_not_make_keys_and_is_told_who_may(
    deployment: Deployment, database: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DATABASE_URL", with_user(database, ORCHESTRATOR))
    for arguments in (["list"], ["create", "--name", "app"]):
        assert keys.main(arguments) == 1
        assert "may not see or make keys; take one that is a member of larder_owner" in capsys.readouterr().err


def test_the_development_key_is_the_same_each_time_while_it_is_good(
    connection: psycopg.Connection[Any], tmp_path: Path
) -> None:
    folder = tmp_path / "new"
    first = keys.development_key(connection, folder)
    assert keys.development_key(connection, folder) == first
    assert stat.S_IMODE((folder / keys.DEVELOPMENT_FILE).stat().st_mode) == 0o600
    keys.revoke(connection, first)
    second = keys.development_key(connection, folder)
    assert second != first
    connection.execute("UPDATE api_keys SET expires_at = now()")
    assert keys.development_key(connection, folder) not in (first, second)
    row = connection.execute("SELECT DISTINCT name FROM api_keys").fetchall()
    assert row == [(keys.DEVELOPMENT,)]


def test_a_link_is_made_for_one_person(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert keys.main(["link", "--user", "u 1/x"]) == 1
    assert "LARDER_LINK_KEYS is not set" in capsys.readouterr().err
    monkeypatch.setenv("LARDER_LINK_KEYS", "a:" + "s" * 40)
    assert keys.main(["link", "--user", "u 1/x", "--days", "2"]) == 0
    path, _, token = capsys.readouterr().out.strip().partition("?token=")
    assert path == "/people/u%201%2Fx/forget"
    Links.read("a:" + "s" * 40).verify(token, "u 1/x", "forget")
    assert keys.main(["link", "--user", "u", "--days", "91"]) == 1
