"""The Lambda door under the real runtime client `awslambdaric`."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from door_app import SmallApplication
from lambda_runtime_api import RuntimeApi, running_function

from inference.handlers.aws_lambda import create_handler
from inference.http import handle

DOCUMENT = {"user_id": "u1", "k": 20, "explain": True, "request_id": "r1", "prompt": "Größe"}


@pytest.fixture(scope="module")
def function() -> Iterator[RuntimeApi]:
    with running_function("lambda_target.handler") as api:
        yield api


def gateway_event(
    document: object = None, path: str = "/recommendations", method: str = "POST", **more: Any
) -> dict[str, Any]:
    return {
        "version": "2.0",
        "rawPath": path,
        "rawQueryString": "",
        "headers": {"Content-Type": "application/json", "host": "x"},
        "requestContext": {"http": {"method": method, "path": path}, "stage": "$default"},
        "body": json.dumps(document, ensure_ascii=False),
        "isBase64Encoded": False,
        **more,
    }


def expected(document: object) -> bytes:
    headers = {"content-type": "application/json"}
    body = json.dumps(document).encode()
    return handle(SmallApplication(), "POST", "/recommendations", headers, body, deadline=None).body


def test_the_gateway_gets_the_same_bytes_as_every_other_door(function: RuntimeApi) -> None:
    answer = json.loads(function.invoke(gateway_event(DOCUMENT)))
    assert answer["statusCode"] == 200
    assert answer["headers"] == {"content-type": "application/json"}
    assert answer["isBase64Encoded"] is False
    assert answer["body"].encode() == expected(DOCUMENT)


def test_a_base64_body_is_the_same_body(function: RuntimeApi) -> None:
    coded = base64.b64encode(json.dumps(DOCUMENT).encode()).decode()
    answer = json.loads(function.invoke(gateway_event(body=coded, isBase64Encoded=True)))
    assert answer["body"].encode() == expected(DOCUMENT)
    answer = json.loads(function.invoke(gateway_event(body="not base64!", isBase64Encoded=True)))
    assert answer["statusCode"] == 400


def test_a_direct_invocation_is_the_request_itself(function: RuntimeApi) -> None:
    assert function.invoke(DOCUMENT) == expected(DOCUMENT)


def test_a_fault_of_a_direct_invocation_has_the_one_error_shape(function: RuntimeApi) -> None:
    assert json.loads(function.invoke({"user_id": "u1", "kk": 1}))["error"]["field"] == "kk"
    assert json.loads(function.invoke([1, 2]))["error"]["type"] == "invalid_request"


def test_other_routes_and_a_named_stage(function: RuntimeApi) -> None:
    stage = {"http": {"method": "GET", "path": "/prod/health"}, "stage": "prod"}
    answer = json.loads(function.invoke(gateway_event(path="/prod/health", method="GET", requestContext=stage)))
    assert (answer["statusCode"], json.loads(answer["body"])["status"]) == (200, "ok")
    answer = json.loads(function.invoke(gateway_event({}, path="/nowhere")))
    assert answer["statusCode"] == 404
    answer = json.loads(function.invoke(gateway_event({"user_id": "nobody-home"})))
    assert (answer["statusCode"], answer["headers"]["retry-after"]) == (503, "7")


def test_a_payload_of_format_1_is_refused_with_the_way_out(function: RuntimeApi) -> None:
    answer = json.loads(function.invoke({"requestContext": {}, "path": "/health", "httpMethod": "GET"}))
    assert answer["statusCode"] == 400
    assert "format 2.0" in json.loads(answer["body"])["error"]["message"]


def test_the_platforms_deadline_reaches_the_core(function: RuntimeApi) -> None:
    seconds = float(json.loads(function.invoke({"user_id": "deadline"}, timeout_ms=4_000))["request_id"])
    assert 3.0 < seconds < 4.0


def test_the_platforms_trace_header_reaches_the_core(function: RuntimeApi) -> None:
    header = "Root=1-5759e988-bd862e3fe1be46a994272793;Parent=53995c3f42cd8ad8;Sampled=1"
    answer = function.invoke({"user_id": "carrier"}, headers={"Lambda-Runtime-Trace-Id": header})
    assert json.loads(answer)["request_id"] == header


def test_an_application_that_fails_to_start_is_tried_again() -> None:
    with running_function("lambda_target.flaky_handler") as api:
        first = api.invoke(DOCUMENT)
        assert json.loads(first)["error"]["type"] == "internal"
        assert b"CANARY" not in first
        assert api.invoke(DOCUMENT) == expected(DOCUMENT)


def test_an_application_built_at_the_start_is_there_before_the_first_event() -> None:
    with running_function("lambda_target.early_handler") as api:
        assert api.ready.wait(20)
        started = time.perf_counter()
        assert api.invoke(DOCUMENT) == expected(DOCUMENT)
        assert time.perf_counter() - started < 0.15, "it was built when it was asked"


def test_an_application_that_cannot_be_built_at_the_start_is_built_when_it_is_asked() -> None:
    with running_function("lambda_target.early_flaky_handler") as api:
        assert api.invoke(DOCUMENT) == expected(DOCUMENT)
    assert not api.init_errors


def test_the_application_is_built_once_however_many_ask() -> None:
    class Context:
        aws_request_id = "r"
        client_context = None

        def get_remaining_time_in_millis(self) -> int:
            return 10_000

    built: list[int] = []
    gate = threading.Barrier(4)

    def build() -> SmallApplication:
        time.sleep(0.1)
        built.append(1)
        return SmallApplication()

    handler = create_handler(build)

    def call(_: int) -> object:
        gate.wait(10)
        return handler(DOCUMENT, Context())

    with ThreadPoolExecutor(4) as callers:
        answers = list(callers.map(call, range(4)))
    assert answers == [expected(DOCUMENT)] * 4
    assert built == [1]
