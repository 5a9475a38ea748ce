"""A process that was stopped, or woke from a snapshot, uses nothing that was open before."""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
import snapshot_restore_py
from door_app import SmallApplication
from fault_proxy import faulty
from released import Released, released

from inference import otel, telemetry
from inference.handlers import aws_lambda
from inference.runtime import LarderApplication
from inference.settings import Settings
from schemas.serving import RecommendationRequest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


@pytest.fixture(scope="module")
def world(postgres_url: str, template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Released]:
    with released(postgres_url, template, tmp_path_factory.mktemp("released")) as made:
        yield made


@contextmanager
def serving(url: str, artifacts_url: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The real HTTP door in a process of its own."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("OTEL_", "LARDER_"))},
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "DATABASE_URL": url,
        "ARTIFACTS_URL": artifacts_url,
        "LARDER_ACCESS": "platform",
    }
    command = [sys.executable, "-m", "inference.handlers.asgi", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
    try:
        assert process.stdout is not None
        yield process, int(process.stdout.readline().rsplit(":", 1)[1])
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def ask(port: int) -> dict[str, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        body = json.dumps({"user_id": "u0", "k": 5})
        connection.request("POST", "/recommendations", body=body, headers={"content-type": "application/json"})
        answer: dict[str, Any] = json.loads(connection.getresponse().read())
        return answer
    finally:
        connection.close()


@pytest.mark.parametrize("what", ["closed by the server", "forgotten on the way"])
def test_a_process_that_was_stopped_answers_in_full_at_once(world: Released, what: str) -> None:
    with faulty(world.url) as (url, proxy), serving(url, world.artifacts_url) as (process, port):
        for _ in range(2):
            assert ask(port)["degraded"] == []
            process.send_signal(signal.SIGSTOP)
            if what == "closed by the server":
                with psycopg.connect(world.url, autocommit=True) as connection:
                    connection.execute(
                        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                        "WHERE application_name = 'larder' AND datname = current_database()"
                    )
            else:
                proxy.forget()
                time.sleep(5.5)  # longer than an idle connection is trusted
            process.send_signal(signal.SIGCONT)
            started = time.perf_counter()
            assert ask(port)["degraded"] == []
            assert time.perf_counter() - started < 2.1


def test_a_snapshot_holds_no_connection_no_span_and_no_random_state(
    world: Released, monkeypatch: pytest.MonkeyPatch
) -> None:
    with faulty(world.url) as (url, proxy):
        app = LarderApplication.from_settings(
            Settings(url, world.artifacts_url, audit_per_mille=1_000, access="platform")
        )
        app.warm()
        request = RecommendationRequest(user_id="u0")
        assert app.recommend(request).degraded == ()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
        telemetry.shutdown()
        with telemetry.span("before"):
            assert otel._state.ready
        app.before_snapshot()
        try:
            assert not otel._state.ready, "spans of before are gone with their exporter"
            assert (app.served.reads.waiting, app.served.requests.waiting) == (0, 0)
            with psycopg.connect(world.url, autocommit=True) as connection:
                query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'larder' AND datname = current_database()"
                give_up_at = time.monotonic() + 5
                while connection.execute(query).fetchone() != (0,):
                    assert time.monotonic() < give_up_at, "a connection is in the snapshot"
                    time.sleep(0.02)
            # Another machine, another network; and every copy of the snapshot wakes with the same state.
            proxy.forget()
            drawn = []
            for _ in range(2):
                random.seed(1)
                app.after_restore()
                drawn.append(random.random())
            assert drawn[0] != drawn[1]
            started = time.perf_counter()
            first = app.recommend(request)
            assert first.degraded == ()
            assert time.perf_counter() - started < 1
            assert first.request_id != app.recommend(request).request_id
        finally:
            monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT")
            telemetry.shutdown()
            app.close()


def test_a_breaker_that_was_open_in_the_snapshot_is_closed_after_it(world: Released) -> None:
    app = LarderApplication.from_settings(Settings(world.url, world.artifacts_url, access="platform"))
    for _ in range(3):
        with pytest.raises(OSError, match="x"), app.store.breaker.call():
            raise OSError("x")
    assert app.store.breaker.state in ("open", "closed")
    app.after_restore()
    assert app.recommend(RecommendationRequest(user_id="u0")).degraded == ()
    app.close()


def test_the_platform_is_told_what_to_do_around_a_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    class Snapshotted(SmallApplication):
        def before_snapshot(self) -> None:
            told.append("before")

        def after_restore(self) -> None:
            told.append("after")

    built: list[Snapshotted] = []

    def build() -> Snapshotted:
        built.append(Snapshotted())
        return built[-1]

    monkeypatch.setattr(snapshot_restore_py, "_before_snapshot_registry", [])
    monkeypatch.setattr(snapshot_restore_py, "_after_restore_registry", [])
    aws_lambda.create_handler(build, snapshots=True)
    for registry in (snapshot_restore_py.get_before_snapshot(), snapshot_restore_py.get_after_restore()):
        for function, arguments, options in registry:
            function(*arguments, **options)
    assert (told, len(built)) == (["before", "after"], 1), "what is built goes into the snapshot"
