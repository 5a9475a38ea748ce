"""The database: refused with a way out when unfit, shared by processes, stopped by the last."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from infra import postgres
from schemas.errors import DatabaseError


def test_an_unreachable_database_is_named_without_its_password() -> None:
    with pytest.raises(
        DatabaseError, match=r"cannot reach the database postgresql://me:\*\*\*@127\.0\.0\.1:1/x"
    ) as error:
        postgres.check("postgresql://me:secret@127.0.0.1:1/x")
    assert "secret" not in str(error.value)


def test_a_server_without_pgvector_is_refused(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres, "EXTENSION", "no_such_extension")
    with pytest.raises(DatabaseError, match=r"has no pgvector; install the extension"):
        postgres.check(database)


def test_a_pgvector_that_is_too_old_is_refused(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres, "MINIMUM_PGVECTOR", (99, 0, 0))
    with pytest.raises(DatabaseError, match=r"has pgvector 0\.\d+\.\d+; 99\.0\.0 or newer is needed"):
        postgres.check(database)


def test_a_postgres_that_is_too_old_is_refused(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres, "MINIMUM_POSTGRES", 99)
    with pytest.raises(DatabaseError, match="99 or newer is needed"):
        postgres.check(database)


def test_a_database_serves_one_deployment(database: str) -> None:
    postgres.claim(database, "one")
    postgres.claim(database, "one")
    with pytest.raises(DatabaseError, match="belongs to deployment 'one', not to 'two'"):
        postgres.claim(database, "two")


def test_processes_share_one_embedded_server_and_the_last_one_stops_it(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib, psycopg; from infra.postgres import start_embedded; "
        f"url = start_embedded(pathlib.Path({str(tmp_path / 'data')!r})); "
        "print(psycopg.connect(url).execute('SELECT pg_postmaster_start_time()::text').fetchone()[0], flush=True); "
        "sys.stdin.read()"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    started = [process.stdout.readline() for process in processes if process.stdout]
    assert started[0] == started[1] != ""
    pid_file = tmp_path / "data" / "postmaster.pid"
    processes[0].communicate("")
    assert pid_file.exists()
    processes[1].communicate("")
    assert not pid_file.exists()
