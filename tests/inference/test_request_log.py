"""The line of a request: switched by a setting, whole whoever writes beside it, and of no consequence if it cannot be written."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from door_app import SmallApplication

from inference import request_log
from inference.http import Response, handle
from inference.settings import read_settings
from schemas.errors import SettingsError

NEEDED = {"DATABASE_URL": "postgresql://nobody@nowhere/none", "ARTIFACTS_URL": "file:///nothing"}


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    stream = io.StringIO()
    request_log.open_log(stream)
    yield stream
    request_log.open_log("off")


def ask(user_id: str = "u1", **headers: str) -> Response:
    sent = {"content-type": "application/json", **headers}
    body = json.dumps({"user_id": user_id}).encode()
    return handle(SmallApplication(), "POST", "/recommendations", sent, body, deadline=None)


def test_the_setting_names_the_stream_and_a_fault_the_choices() -> None:
    assert read_settings(NEEDED).request_log == "stderr"
    assert read_settings(NEEDED | {"LARDER_REQUEST_LOG": "OFF"}).request_log == "off"
    with pytest.raises(SettingsError, match="LARDER_REQUEST_LOG is 'file'; give stderr, stdout or off"):
        read_settings(NEEDED | {"LARDER_REQUEST_LOG": "file"})


def test_it_is_written_to_the_stream_that_was_opened(capsys: pytest.CaptureFixture[str]) -> None:
    for stream in ("stderr", "stdout", "off"):
        request_log.open_log(stream)
        ask()
        captured = capsys.readouterr()
        assert bool(captured.err) == (stream == "stderr")
        assert bool(captured.out) == (stream == "stdout")


def test_without_a_trace_an_error_and_its_line_share_an_id(log: io.StringIO) -> None:
    response = ask("broken")
    line = json.loads(log.getvalue())
    assert line["trace_id"] in json.loads(response.body)["error"]["message"]
    assert (line["status"], line["error"], line["severity"]) == (500, "ZeroDivisionError", "ERROR")
    assert line["span_id"] is None


def test_with_tracing_off_the_callers_trace_is_named(log: io.StringIO) -> None:
    ask(traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
    line = json.loads(log.getvalue())
    assert (line["trace_id"], line["span_id"]) == ("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331")


def test_lines_of_many_threads_stay_whole(log: io.StringIO) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: ask(), range(200)))
    assert [json.loads(line)["status"] for line in log.getvalue().splitlines()] == [200] * 200


def test_a_stream_that_is_gone_fails_no_request() -> None:
    stream = io.StringIO()
    request_log.open_log(stream)
    stream.close()
    assert ask().status == 200
    request_log.open_log("off")
