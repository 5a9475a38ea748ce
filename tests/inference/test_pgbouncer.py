"""Behind PgBouncer in transaction mode: every transaction may meet another server, and answers stay the same."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import psycopg
import pytest
from conftest import TODAY
from released import PEOPLE, Released, released

from inference import http
from inference.features import read_features
from inference.runtime import LarderApplication
from inference.settings import Settings
from schemas.serving import EventsRequest, PostedEvent
from schemas.views import USER_ACTIVITY

PROGRAM = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="needs pgbouncer (Debian: apt-get install pgbouncer)")
SERVERS = 2


@pytest.fixture(scope="module")
def world(postgres_url: str, template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Released]:
    with released(postgres_url, template, tmp_path_factory.mktemp("released")) as made:
        yield made


@contextmanager
def pooler(url: str, folder: Path) -> Iterator[str]:
    """The URL of a PgBouncer in transaction mode with two connections to the database at `url`."""
    parts = urlsplit(url)
    name = parts.path.lstrip("/")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (folder / "users").write_text('"postgres" ""\n')
    (folder / "pgbouncer.ini").write_text(
        f"""[databases]
{name} = host={parse_qs(parts.query)["host"][0]} user=postgres dbname={name}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
auth_file = {folder / "users"}
pool_mode = transaction
default_pool_size = {SERVERS}
max_client_conn = 100
logfile = {folder / "log"}
"""
    )
    command = [str(PROGRAM), str(folder / "pgbouncer.ini")]
    if os.getuid() == 0:  # it refuses to run as root, and the server's socket is its owner's alone
        owner = Path(parse_qs(parts.query)["host"][0]).owner()
        for place in (folder, *folder.iterdir()):
            shutil.chown(place, owner)
        command = [command[0], "-u", owner, command[1]]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        give_up_at = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                log = folder / "log"
                assert process.poll() is None, log.read_text() if log.exists() else "pgbouncer ended"
                assert time.monotonic() < give_up_at
                time.sleep(0.05)
        yield f"postgresql://postgres@127.0.0.1:{port}/{name}?sslmode=disable&gssencmode=disable"
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="module")
def url(world: Released, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with pooler(world.url, tmp_path_factory.mktemp("pooler")) as made:
        yield made


def make(url: str, world: Released) -> LarderApplication:
    app = LarderApplication.from_settings(
        Settings(url, world.artifacts_url, timeout_ms=10_000, audit_per_mille=1_000, access="platform")
    )
    app.warm()
    return app


def ask(app: LarderApplication, person: str, **more: Any) -> dict[str, Any]:
    body = json.dumps({"user_id": person, "k": 10, "request_id": "r", **more}).encode()
    response = http.handle(app, "POST", "/recommendations", {"content-type": "application/json"}, body, deadline=None)
    assert response.status == 200
    answer: dict[str, Any] = json.loads(response.body)
    return answer


def test_it_really_pools_by_transaction(url: str) -> None:
    clients = [psycopg.connect(url, autocommit=True, prepare_threshold=None) for _ in range(4)]
    servers = {client.execute("SELECT pg_backend_pid()").fetchone() for client in clients for _ in range(3)}
    greeted = {client.info.backend_pid for client in clients}
    for client in clients:
        client.close()
    assert len(servers) <= SERVERS
    assert len(greeted) == 4


def test_answers_through_it_are_those_without_it(url: str, world: Released) -> None:
    direct, pooled = make(world.url, world), make(url, world)
    for person in (*PEOPLE, "nobody"):
        for more in ({"at": TODAY.isoformat()}, {"at": TODAY.isoformat(), "filters": {"categories": ["odd"]}}):
            expected = ask(direct, person, **more)
            assert expected["degraded"] == []
            assert ask(pooled, person, **more) == expected
    live = ask(pooled, "u0")
    assert (live["degraded"], len(live["items"])) == ([], 10)
    found = read_features(pooled.store, {USER_ACTIVITY: [("u0",)]})["user_activity"]
    assert found.valid.any()
    direct.close()
    pooled.close()


def test_many_clients_share_two_servers_without_a_fault(url: str, world: Released) -> None:
    app = make(url, world)
    expected = {person: ask(app, person, at=TODAY.isoformat()) for person in PEOPLE}
    faults: list[object] = []

    def call(person: str) -> None:
        for number in range(25):
            answer = ask(app, person, at=TODAY.isoformat())
            if answer != expected[person]:
                faults.append(answer)
            event_id = f"pooled-{person}-{number}"
            post = EventsRequest(
                events=(PostedEvent(event_id=event_id, user_id=f"new-{person}", item_id="i01", kind="view"),)
            )
            outcome = app.accept_events(post).outcomes[0].outcome
            if outcome != "stored":
                faults.append(outcome)

    threads = [threading.Thread(target=call, args=(person,)) for person in PEOPLE]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not faults, faults[:3]
    assert app.flush(10_000)
    assert app.served.failed == 0
    app.close()


def test_no_setting_or_statement_of_ours_stays_in_a_server_of_the_pool(url: str, world: Released) -> None:
    app = make(url, world)
    for person in PEOPLE:
        ask(app, person)
        read_features(app.store, {USER_ACTIVITY: [(person,)]}, at=datetime.now(UTC))
        read_features(app.store, {USER_ACTIVITY: [(person,)]})
    app.close()
    with psycopg.connect(url, autocommit=True, prepare_threshold=None) as client:
        for _ in range(8):
            row = client.execute(
                "SELECT current_setting('statement_timeout'), current_setting('plan_cache_mode'), "
                "(SELECT count(*) FROM pg_prepared_statements WHERE statement NOT LIKE '%pg_prepared_statements%')"
            ).fetchone()
            assert row == ("0", "auto", 0)
