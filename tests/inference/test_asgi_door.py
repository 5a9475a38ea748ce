"""The HTTP door behind a real uvicorn on loopback."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import uvicorn
from door_app import SmallApplication

from inference.handlers.asgi import AsgiApp, create_app, main
from inference.http import handle
from schemas.json_body import MAX_BODY_BYTES

JSON = {"content-type": "application/json"}
HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{HERE}:{HERE.parent.parent}", "PYTHONUNBUFFERED": "1"}


@contextmanager
def served(app: AsgiApp) -> Iterator[int]:
    """The port that `app` listens on."""
    config = uvicorn.Config(
        app, host="127.0.0.1", port=0, lifespan="on", log_level="error", timeout_graceful_shutdown=5
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        give_up_at = time.monotonic() + 20
        while not server.started:
            assert thread.is_alive(), "the server stopped before it listened"
            assert time.monotonic() < give_up_at
            time.sleep(0.01)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def ask(
    port: int, path: str, document: object = None, method: str = "POST", *, headers: dict[str, str] = JSON
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        body = document if isinstance(document, bytes) else json.dumps(document).encode()
        connection.request(method, path, body=None if method == "GET" else body, headers=headers)
        response = connection.getresponse()
        return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
    finally:
        connection.close()


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with served(create_app(SmallApplication)) as number:
        yield number


def test_an_answer_is_the_same_bytes_as_without_a_transport(port: int) -> None:
    document = {"user_id": "u1", "k": 20, "explain": True, "request_id": "r1", "prompt": "Größe"}
    direct = handle(SmallApplication(), "POST", "/recommendations", JSON, json.dumps(document).encode(), deadline=None)
    status, headers, body = ask(port, "/recommendations", document)
    assert (status, body) == (200, direct.body)
    assert headers["content-type"] == "application/json"


def test_a_query_is_no_part_of_the_path_and_health_answers(port: int) -> None:
    status, _, body = ask(port, "/health?verbose=1", method="GET")
    assert (status, json.loads(body)["status"]) == (200, "ok")


def test_status_and_headers_of_a_fault_arrive(port: int) -> None:
    status, headers, body = ask(port, "/recommendations", {"user_id": "nobody-home"})
    assert (status, headers["retry-after"], json.loads(body)["error"]["type"]) == (503, "7", "unavailable")
    assert ask(port, "/recommendations", {"user_id": "broken"})[0] == 500


def test_the_body_limit_is_exact(port: int) -> None:
    start = b'{"user_id":"u1"'
    fitting = start + b" " * (MAX_BODY_BYTES - len(start) - 1) + b"}"
    assert ask(port, "/recommendations", fitting)[0] == 200
    status, headers, _ = ask(port, "/recommendations", fitting + b" ")
    assert (status, headers["connection"]) == (413, "close")


def test_a_body_without_a_length_is_cut_off_while_it_streams(port: int) -> None:
    """The answer comes after a little more than the limit, although the body never ends."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        head = "POST /recommendations HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        connection.sendall(f"{head}transfer-encoding: chunked\r\n\r\n".encode())
        chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
        for _ in range(5):
            connection.sendall(chunk)
        assert connection.recv(64).startswith(b"HTTP/1.1 413 ")


def test_a_body_that_trickles_in_is_answered_408_and_does_not_hold_its_connection() -> None:
    with served(create_app(SmallApplication, body_seconds=0.3)) as port:
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            head = "POST /recommendations HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n"
            connection.sendall(head.encode())
            started_at = time.monotonic()
            answer = b""
            connection.settimeout(0.05)
            while b"}}" not in answer:
                assert time.monotonic() - started_at < 5
                with suppress(OSError):
                    connection.sendall(b" ")
                with suppress(TimeoutError):
                    answer += connection.recv(4096)
            assert answer.startswith(b"HTTP/1.1 408 ")
            assert b"did not arrive within 0.3 s; send it at once" in answer
            connection.settimeout(5)
            with suppress(ConnectionResetError):
                assert connection.recv(4096) == b"", "the connection is closed"
        assert ask(port, "/recommendations", {"user_id": "u1"})[0] == 200


def test_a_deadline_counts_from_the_arrival_and_not_from_the_turn() -> None:
    """The second request waits a second for the only thread; it has two in all."""
    app = SmallApplication()
    with served(create_app(lambda: app, threads=1, timeout_ms=2_000)) as port, ThreadPoolExecutor(2) as callers:
        list(callers.map(lambda _: ask(port, "/recommendations", {"user_id": "slow"}), range(2)))
    first, second = app.remaining_seconds
    assert first is not None
    assert second is not None
    assert 1.8 < first <= 2.0
    assert 0.5 < second < 1.2


def test_an_announced_length_over_the_limit_is_refused_before_the_body(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(
            b"POST /recommendations HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            + f"content-length: {MAX_BODY_BYTES + 1}\r\n\r\n".encode()
        )
        assert connection.recv(64).startswith(b"HTTP/1.1 413 ")


def test_requests_run_side_by_side_in_the_pool() -> None:
    with served(create_app(SmallApplication, threads=3)) as port, ThreadPoolExecutor(3) as callers:
        started_at = time.monotonic()
        answers = list(callers.map(lambda _: ask(port, "/recommendations", {"user_id": "slow"})[0], range(3)))
        assert answers == [200, 200, 200]
        assert time.monotonic() - started_at < 2.5  # one after the other would take 3 s


def test_a_full_queue_answers_503_at_once() -> None:
    with served(create_app(SmallApplication, threads=1, max_waiting=1)) as port, ThreadPoolExecutor(4) as callers:
        answers = list(callers.map(lambda _: ask(port, "/recommendations", {"user_id": "slow"})[0], range(4)))
        assert sorted(answers) == [200, 200, 503, 503]


def test_requests_in_flight_finish_and_the_application_is_closed() -> None:
    app = SmallApplication()
    with ThreadPoolExecutor(1) as caller:
        with served(create_app(lambda: app)) as port:
            answer = caller.submit(ask, port, "/recommendations", {"user_id": "slow"})
            give_up_at = time.monotonic() + 10
            while not app.carriers:
                assert time.monotonic() < give_up_at
                time.sleep(0.01)
        assert answer.result()[0] == 200
    assert app.closed


def test_an_application_that_cannot_be_built_keeps_the_server_from_starting() -> None:
    program = (
        "import sys\n"
        "from inference.handlers.asgi import create_app, serve\n"
        "from schemas.errors import SettingsError\n"
        "def failing():\n"
        "    raise SettingsError('LARDER_X is missing; set it')\n"
        "sys.exit(0 if serve(create_app(failing), '127.0.0.1', 0) else 1)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=ENVIRONMENT, timeout=60)
    assert ended.returncode != 0
    assert "LARDER_X is missing; set it" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert "listens" not in ended.stdout


def test_serve_says_where_it_listens_and_stops_on_sigterm() -> None:
    program = (
        "from door_app import SmallApplication as A\n"
        "from inference.handlers.asgi import create_app, serve\n"
        "serve(create_app(A), '127.0.0.1', 0)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    try:
        assert process.stdout is not None
        listens, _, curl, key, document = (process.stdout.readline() for _ in range(5))
        port = int(listens.rsplit(":", 1)[1])
        assert f"curl -s http://127.0.0.1:{port}/recommendations" in curl
        assert '"authorization: Bearer $LARDER_KEY"' in key
        example = json.loads(document[document.index("{") : document.rindex("}") + 1])
        assert ask(port, "/recommendations", example)[0] == 200
        process.send_signal(signal.SIGTERM)
        process.wait(20)
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def test_as_many_requests_run_at_once_as_the_setting_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://127.0.0.1:1/none")
    monkeypatch.setenv("ARTIFACTS_URL", "file:///nowhere")
    monkeypatch.setenv("LARDER_CONCURRENCY", "3")
    monkeypatch.setattr("inference.runtime.create_application", lambda settings: SmallApplication())

    def measured(app: AsgiApp, host: str, port: int) -> bool:
        with served(app) as number, ThreadPoolExecutor(6) as callers:
            started_at = time.monotonic()
            answers = list(callers.map(lambda _: ask(number, "/recommendations", {"user_id": "slow"})[0], range(6)))
            assert answers == [200] * 6
            assert 1.9 < time.monotonic() - started_at < 2.9, "two rounds of three, a second each"
        return True

    monkeypatch.setattr("inference.handlers.asgi.serve", measured)
    assert main([]) == 0


def test_settings_that_cannot_be_used_are_said_before_anything_listens(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("DATABASE_URL", raising=False)
    assert main([]) == 1
    assert "error (settings): settings cannot be used: DATABASE_URL is not set" in capsys.readouterr().err


def test_help_names_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["--help"])
    assert leaving.value.code == 0
    assert {"--host", "--port"} <= set(capsys.readouterr().out.split())
