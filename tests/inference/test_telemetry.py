"""Traces as a real OTLP/HTTP receiver on loopback gets them, and the cost of having them off."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
from door_app import SmallApplication
from otlp_receiver import METRICS, Receiver, points, receiving

from inference import metrics, telemetry
from inference.handlers.aws_lambda import create_handler
from inference.http import handle
from inference.propagation import of_messages

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
SPAN_ID = "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE_ID}-{SPAN_ID}-01"
XRAY = "Root=1-5759e988-bd862e3fe1be46a994272793;Parent=53995c3f42cd8ad8;Sampled=1;Lineage=a:0"
JSON = {"content-type": "application/json"}


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    with receiving() as server:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", server.url)
        telemetry.shutdown()
        yield server
        telemetry.shutdown()


@pytest.fixture
def off(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in telemetry.ENDPOINT_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    telemetry.shutdown()
    yield
    telemetry.shutdown()


def attributes(entry: Any) -> dict[str, Any]:
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in entry.attributes}


def test_spans_arrive_nested_with_attributes_and_resource(receiver: Receiver) -> None:
    with telemetry.server_span("POST /recommendations", {"traceparent": TRACEPARENT}, {"http.route": "/r"}):
        assert telemetry.current_trace_id() == TRACE_ID
        with telemetry.span("recsys.rank", attributes={"recsys.rows": 500}) as inner:
            inner.set("recsys.provider", "cpu")
    assert telemetry.flush(5_000)
    assert [path for path in receiver.paths if path != METRICS] == ["/v1/traces"]
    spans = receiver.spans()
    outer, inner_span = spans["POST /recommendations"], spans["recsys.rank"]
    assert outer.trace_id.hex() == inner_span.trace_id.hex() == TRACE_ID
    assert outer.parent_span_id.hex() == SPAN_ID
    assert inner_span.parent_span_id == outer.span_id
    assert (outer.kind, inner_span.kind) == (2, 1)  # SERVER, INTERNAL
    assert attributes(outer)["http.route"] == "/r"
    assert attributes(inner_span) == {"recsys.rows": 500, "recsys.provider": "cpu"}
    assert attributes(receiver.resources()[0].resource)["service.name"] == "larder"


def test_the_environment_may_rename_the_service(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "pantry")
    monkeypatch.setenv("AWS_LAMBDA_FUNCTION_NAME", "larder-eu")
    with telemetry.span("x"):
        pass
    assert telemetry.flush(5_000)
    resource = attributes(receiver.resources()[0].resource)
    assert (resource["service.name"], resource["faas.name"]) == ("pantry", "larder-eu")


def test_an_exception_is_recorded_by_type_only(receiver: Receiver) -> None:
    with pytest.raises(KeyError), telemetry.span("recsys.broken"):
        raise KeyError("CANARY-exception")
    assert telemetry.flush(5_000)
    failed = receiver.spans()["recsys.broken"]
    assert failed.status.code == 2
    assert attributes(failed) == {"error.type": "KeyError"}
    assert b"CANARY" not in b"".join(receiver.bodies)


@pytest.mark.parametrize("user_id", ["CANARY-person", "broken", "nobody-home", "CANARY" + "x" * 200])
def test_nothing_a_person_sent_is_exported(receiver: Receiver, user_id: str) -> None:
    document = {
        "user_id": user_id,
        "prompt": "CANARY-prompt",
        "context": {"CANARY-key": "CANARY-value"},
        "candidates": ["CANARY-item"],
        "request_id": "CANARY-request",
    }
    headers = {**JSON, "authorization": "CANARY-key", "traceparent": TRACEPARENT}
    for path in ("/recommendations", "/CANARY-path"):
        handle(SmallApplication(), "POST", path, headers, json.dumps(document).encode(), deadline=None)
    assert telemetry.flush(5_000)
    assert set(receiver.spans()) == {"POST /recommendations", "unknown route"}
    assert b"CANARY" not in b"".join(receiver.bodies)


def test_the_status_is_on_the_span(receiver: Receiver) -> None:
    handle(SmallApplication(), "POST", "/recommendations", JSON, b'{"user_id": "nobody-home"}', deadline=None)
    assert telemetry.flush(5_000)
    request = receiver.spans()["POST /recommendations"]
    assert attributes(request)["http.response.status_code"] == 503
    assert request.status.code == 2


def test_the_lambda_door_flushes_before_the_process_freezes(receiver: Receiver) -> None:
    class Context:
        aws_request_id = "invocation-1"
        client_context = type("Client", (), {"custom": {"traceparent": TRACEPARENT}})()

        def get_remaining_time_in_millis(self) -> int:
            return 5_000

    create_handler(SmallApplication)({"user_id": "u1"}, Context())
    request = receiver.spans()["POST /recommendations"]
    assert request.parent_span_id.hex() == SPAN_ID
    assert attributes(request)["faas.invocation_id"] == "invocation-1"
    (answered,) = points(receiver.metrics()["http.server.request.duration"])
    assert answered.count == 1
    assert attributes(answered)["http.route"] == "/recommendations"


def test_each_signal_has_its_own_endpoint_and_switch(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    def sent() -> set[str]:
        telemetry.shutdown()
        receiver.exports.clear()
        handle(SmallApplication(), "GET", "/health", {}, b"", deadline=None)
        assert telemetry.flush(5_000)
        return set(receiver.paths)

    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    assert sent() == {"/v1/metrics"}
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "otlp")
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
    assert sent() == {"/v1/traces"}
    monkeypatch.delenv("OTEL_METRICS_EXPORTER")
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", f"{receiver.url}/v1/metrics")
    assert sent() == {"/v1/metrics"}


def test_a_process_tells_a_bounded_number_of_versions_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_versions", set())
    names = [f"{number:016x}" for number in range(100)]
    assert {metrics.version_label(name) for name in names} == {*names[: metrics.MAX_VERSIONS], "other"}
    assert metrics.version_label(names[0]) == names[0]
    assert metrics.version_label(None) == "none"


def test_what_wakes_from_a_snapshot_is_a_process_of_its_own(receiver: Receiver) -> None:
    seen = []
    for _ in range(2):
        telemetry.before_snapshot()
        receiver.exports.clear()
        handle(SmallApplication(), "GET", "/health", {}, b"", deadline=None)
        assert telemetry.flush(5_000)
        (resource, *_) = receiver.metric_resources()
        (cold,) = points(receiver.metrics()["faas.coldstarts"])
        (requests,) = points(receiver.metrics()["http.server.request.duration"])
        seen.append((attributes(resource.resource)["service.instance.id"], cold.as_int, requests.count))
    (first, *counts), (second, *again) = seen
    assert first != second
    assert counts == again == [1, 1]


def test_what_was_read_long_ago_is_no_age(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_features", {})
    metrics.features_read({"fresh": time.time() - 60, "never": None})
    metrics._features["old"] = (time.time() - 60, time.time() - metrics.READING_SECONDS - 1)
    handle(SmallApplication(), "GET", "/health", {}, b"", deadline=None)
    assert telemetry.flush(5_000)
    (age,) = points(receiver.metrics()["recsys.features.age"])
    assert attributes(age) == {"recsys.feature.view": "fresh"}
    assert 60 <= age.as_double < 120


def test_a_dead_collector_holds_nobody_up(receiver: Receiver) -> None:
    receiver.delay_seconds = 2.0
    with telemetry.span("x"):
        pass
    started_at = time.monotonic()
    assert not telemetry.flush(100)
    assert time.monotonic() - started_at < 1.0


def test_inject_names_the_current_span(receiver: Receiver) -> None:
    assert telemetry.inject() == {}
    with telemetry.span("release"):
        sent = telemetry.inject()
    with telemetry.server_span("smoke", sent):
        pass
    assert telemetry.flush(5_000)
    spans = receiver.spans()
    assert spans["smoke"].parent_span_id == spans["release"].span_id
    assert spans["smoke"].trace_id == spans["release"].trace_id


def test_an_unsampled_parent_is_respected(receiver: Receiver) -> None:
    with telemetry.server_span("quiet", {"traceparent": TRACEPARENT[:-2] + "00"}):
        assert telemetry.inject()["traceparent"].endswith("-00")
    with telemetry.server_span("heard", {}):
        pass
    assert telemetry.flush(5_000)
    assert set(receiver.spans()) == {"heard"}


def test_what_a_sampler_takes_is_sent_and_what_it_leaves_is_not(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0.5")
    telemetry.shutdown()
    taken = set()
    for number in range(64):
        with telemetry.server_span(f"{number}", {}), telemetry.span(f"{number} inner"):
            if telemetry.inject()["traceparent"].endswith("-01"):
                taken |= {f"{number}", f"{number} inner"}
    assert telemetry.flush(5_000)
    assert set(receiver.spans()) == taken
    assert 2 * 10 < len(taken) < 2 * 54


def test_sdk_disabled_wins(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    with telemetry.span("x"):
        pass
    telemetry.flush(1_000)
    assert receiver.bodies == []


@pytest.mark.parametrize(
    ("carrier", "expected"),
    [
        ({"traceparent": TRACEPARENT}, (TRACE_ID, SPAN_ID, True)),
        ({"traceparent": TRACEPARENT[:-2] + "00"}, (TRACE_ID, SPAN_ID, False)),
        ({"traceparent": "01" + TRACEPARENT[2:] + "-later"}, (TRACE_ID, SPAN_ID, True)),
        ({"traceparent": TRACEPARENT + "-later"}, None),
        ({"traceparent": "ff" + TRACEPARENT[2:]}, None),
        ({"traceparent": f"00-{'0' * 32}-{SPAN_ID}-01"}, None),
        ({"traceparent": f"00-{TRACE_ID}-{'0' * 16}-01"}, None),
        ({"traceparent": TRACEPARENT.upper()}, None),
        ({"x-amzn-trace-id": XRAY}, ("5759e988bd862e3fe1be46a994272793", "53995c3f42cd8ad8", True)),
        ({"x-amzn-trace-id": XRAY.replace("Sampled=1", "Sampled=0")}, None),
        ({"x-amzn-trace-id": "Root=1-5759e988-bd862e3fe1be46a994272793"}, None),
        ({"x-amzn-trace-id": ";;=;Root"}, None),
        ({"traceparent": TRACEPARENT, "x-amzn-trace-id": XRAY}, (TRACE_ID, SPAN_ID, True)),
        ({"ce-traceparent": TRACEPARENT}, (TRACE_ID, SPAN_ID, True)),
        (
            {"ce-traceparent": TRACEPARENT.replace("0af7", "ffff"), "traceparent": TRACEPARENT},
            (TRACE_ID, SPAN_ID, True),
        ),
        ({}, None),
    ],
)
def test_extract(carrier: dict[str, str], expected: tuple[str, str, bool] | None) -> None:
    context = telemetry.extract(carrier)
    assert (None if context is None else (context.trace_id, context.span_id, context.sampled)) == expected


STATE = "congo=t61rcWkgMzE,vendor@larder=00f067aa0ba902b7"


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        (STATE, STATE),
        (" congo=t61rcWkgMzE ,, vendor@larder=00f067aa0ba902b7", STATE),
        ("a=1,a=2", ""),
        ("Upper=1", ""),
        ("a", ""),
        ("a=\u00fc", ""),
        (",".join(f"k{n}=v" for n in range(32)), ",".join(f"k{n}=v" for n in range(32))),
        (",".join(f"k{n}=v" for n in range(33)), ""),
        ("a=" + "x" * 511, ""),
    ],
)
def test_tracestate_goes_along_if_it_is_one(sent: str, kept: str) -> None:
    context = telemetry.extract({"traceparent": TRACEPARENT, "tracestate": sent})
    assert context is not None
    assert context.tracestate == kept
    assert context.headers() == {"traceparent": TRACEPARENT} | ({"tracestate": kept} if kept else {})
    assert telemetry.extract({"tracestate": sent}) is None


def test_tracestate_passes_through_a_span(receiver: Receiver) -> None:
    with telemetry.server_span("in", {"traceparent": TRACEPARENT, "tracestate": STATE}), telemetry.span("inner"):
        assert telemetry.inject()["tracestate"] == STATE
    assert telemetry.flush(5_000)
    assert receiver.spans()["inner"].trace_state == STATE


def test_a_batch_of_messages_links_to_each_of_its_senders(receiver: Receiver) -> None:
    def text(value: str) -> dict[str, str]:
        return {"stringValue": value, "dataType": "String"}

    records = [
        {"messageAttributes": {"traceparent": text(TRACEPARENT), "tracestate": text("a=1")}, "attributes": {}},
        {"messageAttributes": {"traceparent": text(TRACEPARENT), "tracestate": text("a=1")}, "attributes": {}},
        {"messageAttributes": {}, "attributes": {"AWSTraceHeader": XRAY}},
        {"messageAttributes": {"traceparent": text("nonsense")}, "attributes": {"AWSTraceHeader": XRAY + "x"}},
        {},
    ]
    senders = of_messages(records)
    assert [sender.span_id for sender in senders] == [SPAN_ID, "53995c3f42cd8ad8"]
    with telemetry.batch_span("POST /events", senders):
        pass
    assert telemetry.flush(5_000)
    batch = receiver.spans()["POST /events"]
    assert [link.span_id.hex() for link in batch.links] == [SPAN_ID, "53995c3f42cd8ad8"]
    assert (batch.parent_span_id, batch.kind) == (b"", 5)  # CONSUMER
    assert attributes(batch)["faas.trigger"] == "pubsub"
    (processed,) = points(receiver.metrics()["messaging.process.duration"])
    assert (processed.count, attributes(processed)["messaging.system"]) == (1, "aws_sqs")


def test_off_the_incoming_context_is_handed_on(off: None) -> None:
    with telemetry.server_span("x", {"traceparent": TRACEPARENT}), telemetry.span("y"):
        assert telemetry.current_trace_id() == TRACE_ID
        assert telemetry.inject() == {"traceparent": TRACEPARENT}
    assert telemetry.current_trace_id() == ""
    assert telemetry.flush(0)


def test_off_nothing_of_opentelemetry_is_imported_and_a_span_costs_microseconds() -> None:
    script = """
import sys, time
from inference import telemetry
def run(count):
    started_at = time.perf_counter()
    for _ in range(count):
        with telemetry.span("recsys.rank", attributes={"recsys.rows": 500}) as span:
            span.set("a", 1)
    return (time.perf_counter() - started_at) / count * 1e6
run(1000)
print(min(run(2000) for _ in range(5)), any(name.startswith("opentelemetry") for name in sys.modules))
"""
    output = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env={"PYTHONPATH": "."}
    ).stdout.split()
    assert output[1] == "False"
    assert float(output[0]) < 100  # measured 5; a bound for busy machines


def test_the_first_request_of_a_process_is_flagged_as_a_cold_start(receiver: Receiver) -> None:
    script = """
from inference import telemetry
for name in ("first", "second"):
    with telemetry.server_span(name, {}):
        pass
assert telemetry.flush(5000)
"""
    environment = {"PYTHONPATH": ".", "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment, timeout=60)
    spans = receiver.spans()
    assert attributes(spans["first"])["faas.coldstart"] is True
    assert attributes(spans["second"])["faas.coldstart"] is False
