"""The line of a request: switched by a setting, whole whoever writes beside it, and of no consequence if it cannot be written."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from door_app import SmallApplication

from inference import request_log
from inference.http import handle
from inference.pseudonyms import Pseudonyms
from inference.routes import Response
from inference.settings import read_settings
from infra import keys
from schemas.errors import SettingsError
from schemas.serving import RecommendationResponse

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


# --- pseudonyms ---------------------------------------------------------------------------------------------------

FIRST, SECOND = "a:" + "1" * 32, "b:" + "2" * 32
CANARY = "canary-person"


def lines_with(keys: str, user_id: str = CANARY) -> list[dict[str, object]]:
    """What a request for `user_id` and one to forget them leave behind under `keys`."""
    stream = io.StringIO()
    request_log.open_log(stream, Pseudonyms.read(keys))
    try:
        ask(user_id)
        handle(SmallApplication(), "POST", f"/people/{user_id}/forget", {}, b"", deadline=None)
    finally:
        request_log.open_log("off")
    assert user_id not in stream.getvalue()
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_without_keys_a_line_says_nothing_of_whom() -> None:
    assert all("user" not in line for line in lines_with(""))


def test_a_person_is_called_by_the_first_key_and_found_under_every_one() -> None:
    before, during = lines_with(FIRST)[0]["user"], lines_with(f"{SECOND},{FIRST}")[0]["user"]
    assert str(before).startswith("a:")
    assert str(during).startswith("b:")
    assert len({line["user"] for line in lines_with(FIRST)}) == 1
    assert lines_with(FIRST, "another")[0]["user"] != before
    known = Pseudonyms.read(f"{SECOND},{FIRST}")
    assert known is not None
    assert known.all_of(CANARY) == (during, before)
    # With the old key gone its lines are nobody's.
    forgetful = Pseudonyms.read(SECOND)
    assert forgetful is not None
    assert before not in forgetful.all_of(CANARY)
    assert "1111" not in repr(known)


def test_of_who_has_not_agreed_not_even_that_is_kept() -> None:
    class Refusing(SmallApplication):
        def recommend(self, *arguments: Any) -> RecommendationResponse:
            return RecommendationResponse(request_id="r", items=(), personalised=False)

    stream = io.StringIO()
    request_log.open_log(stream, Pseudonyms.read(FIRST))
    body = json.dumps({"user_id": CANARY}).encode()
    handle(Refusing(), "POST", "/recommendations", {"content-type": "application/json"}, body, deadline=None)
    request_log.open_log("off")
    assert "user" not in json.loads(stream.getvalue())


def test_the_setting_is_checked_and_its_secrets_are_not_shown() -> None:
    assert FIRST.partition(":")[2] not in repr(read_settings(NEEDED | {"LARDER_LOG_KEYS": FIRST}))
    with pytest.raises(SettingsError, match="LARDER_LOG_KEYS, part 2, is not id:secret") as raised:
        read_settings(NEEDED | {"LARDER_LOG_KEYS": f"{FIRST},b:short-secret"})
    assert "short-secret" not in str(raised.value)


def test_a_command_says_what_a_persons_lines_are_searched_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LARDER_LOG_KEYS", f"{SECOND},{FIRST}")
    assert keys.main(["pseudonyms", "--user", CANARY]) == 0
    said = capsys.readouterr().out.split()
    assert [lines_with(FIRST)[0]["user"]] == said[1:]
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{CANARY}\n"))
    assert keys.main(["pseudonyms", "--user", "-"]) == 0
    assert capsys.readouterr().out.split() == said
    monkeypatch.delenv("LARDER_LOG_KEYS")
    assert keys.main(["pseudonyms", "--user", CANARY]) == 1
    assert "LARDER_LOG_KEYS is not set" in capsys.readouterr().err
