"""The database: refused with a way out when unfit, shared by processes, stopped by the last."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import threading
import traceback
from datetime import date
from pathlib import Path

import pytest

from inference.http import handle
from inference.runtime import LarderApplication
from inference.settings import Settings
from infra import postgres
from infra.deployment import Deployment
from schemas.errors import DatabaseError, Unavailable


def test_an_unreachable_database_is_named_without_its_password() -> None:
    with pytest.raises(
        DatabaseError, match=r"cannot reach the database postgresql://me:\*\*\*@127\.0\.0\.1:1/x"
    ) as error:
        postgres.check("postgresql://me:secret@127.0.0.1:1/x")
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:Pl4nted@127.0.0.1:1/x",
        "postgresql://me:Pl4nted%zz@127.0.0.1:1/x",
        "postgresql://me:ab/Pl4nted@127.0.0.1:1/x",
        "postgresql://me:ab?Pl4nted@127.0.0.1:1/x",
        "postgresql://me:ab@Pl4nted@127.0.0.1:1/x",
        "postgresql://127.0.0.1:1/x?password=Pl4nted&nonsense=1",
        "postgresql://me@127.0.0.1:1/x?password=Pl4nted",
        "mysql://me:Pl4nted@127.0.0.1:1/x",
        "host=127.0.0.1 port=1 password=Pl4nted",
    ],
)
def test_no_error_about_a_database_holds_its_password(
    url: str, larder_home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither its words, nor a traceback of it, nor what a function says and logs."""
    with pytest.raises(DatabaseError) as error:
        postgres.check(url)
    told = ["".join(traceback.format_exception(error.value))]
    settings = Settings(url, "file:///nowhere", writer_url=url)
    told.append(repr(settings))
    application = LarderApplication.from_settings(settings)
    told.append(repr(application))
    with caplog.at_level(logging.DEBUG):
        application.warm()
        answer = handle(application, "GET", "/health", {"authorization": "Bearer x"}, b"", deadline=None)
        told.append(answer.body.decode())
        body = b'{"events":[{"event_id":"e","user_id":"u","item_id":"i","kind":"view"}]}'
        key = {"authorization": f"Bearer larder_{'0' * 12}_{'0' * 64}", "content-type": "application/json"}
        told.append(handle(application, "POST", "/events", key, body, deadline=None).body.decode())
        with pytest.raises(Unavailable) as unavailable:
            application.writer.accept_events([], 100)
        told.append(str(unavailable.value))
    application.close()
    done = subprocess.run(
        [sys.executable, "-m", "infra.postgres", "migrate"], capture_output=True, text=True, check=False,
        env={**os.environ, "DATABASE_URL": url},
    )  # fmt: skip
    assert done.returncode == 1
    for text in (*told, caplog.text, done.stdout, done.stderr):
        assert "Pl4nted" not in text


def test_a_server_elsewhere_that_does_not_prove_who_it_is_gets_no_password(
    larder_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A listener that says it has no TLS: what reaches it is the question, and nothing after."""
    heard: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            client, _ = listener.accept()
            with client:
                heard.append(client.recv(1024))
                client.sendall(b"N")
                heard.append(client.recv(1024))

        thread = threading.Thread(target=answer)
        thread.start()
        port = listener.getsockname()[1]
        monkeypatch.setenv("PGGSSENCMODE", "disable")
        monkeypatch.setenv("DATABASE_URL", f"postgresql://me:Pl4nted@db.example:{port}/x?hostaddr=127.0.0.1")
        with pytest.raises(DatabaseError, match="name the authority's file with sslrootcert in the URL"):
            postgres.check(postgres.database_url(Deployment("shop", None, date(2026, 1, 1))))
        thread.join(10)
    assert heard == [bytes.fromhex("0000000804d2162f"), b""]  # SSLRequest, then the client hung up


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


def test_an_embedded_server_keeps_its_tables_in_memory(tmp_path: Path) -> None:
    code = (
        "import pathlib, psycopg; from infra.postgres import start_embedded; "
        f"url = start_embedded(pathlib.Path({str(tmp_path / 'data')!r})); "
        "print(psycopg.connect(url).execute('SELECT setting::int / 128 FROM pg_settings WHERE name = %s', "
        "('shared_buffers',)).fetchone()[0])"
    )

    def start() -> int:
        return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)

    assert 128 <= start() <= 1_024
    settings = tmp_path / "data" / "postgresql.auto.conf"
    settings.write_text("shared_buffers = '64MB'\n")
    assert (start(), start()) == (64, 64), "what a user sets stays"


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
