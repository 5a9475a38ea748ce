"""Dashboard, rules and objectives query what a running function really sends; and nothing that a person wrote is in it."""

from __future__ import annotations

import io
import json
import logging
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
import pytest
import yaml
from conftest import replace_database
from otlp_receiver import Receiver, points, receiving
from promql import Selector, grouped_by, label_value, prometheus_label, prometheus_name, selectors
from served_world import ServedWorld, build
from test_asgi_door import ask, served
from worlds import key_header

from inference import metrics, request_log, telemetry
from inference.handlers.asgi import create_app
from inference.runtime import LarderApplication, create_application

FILES = Path(__file__).parents[2] / "infra" / "observability"
CANARY = "CANARY"
EXPERIMENTS = """
[experiments.wording]
start = 2026-01-01T00:00:00Z
[experiments.wording.arms.worded]
share = 1
wish_template = "wish.v3"
[experiments.wording.arms.beside]
share = 0
diversity = 0.5
"""
PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="needs promtool (Debian's package prometheus)")


@dataclass
class Seen:
    """What left the process while it was asked: OTLP, its request log, every other log record; and what it answered."""

    receiver: Receiver
    log: io.StringIO = field(default_factory=io.StringIO)
    records: list[str] = field(default_factory=list)
    answers: list[tuple[str, int, bytes]] = field(default_factory=list)
    key: str = ""
    """The secret of the key that was sent."""

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.getvalue().splitlines()]


class Keep(logging.Handler):
    """Keeps what any logger says, with its traceback."""

    def __init__(self, into: list[str]) -> None:
        super().__init__(logging.DEBUG)
        self.into = into
        self.setFormatter(logging.Formatter("%(name)s %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        self.into.append(self.format(record))


@pytest.fixture(scope="module")
def world(postgres_url: str, template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedWorld]:
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE observed TEMPLATE {template}")
    yield build(replace_database(postgres_url, "observed"), tmp_path_factory.mktemp("observed"))
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute("DROP DATABASE observed WITH (FORCE)")


@pytest.fixture(scope="module")
def seen(world: ServedWorld, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    """The real application behind its real door, asked for everything, with canaries wherever a caller may write."""
    experiments = tmp_path_factory.mktemp("declared") / "experiments.toml"
    experiments.write_text(EXPERIMENTS)
    with pytest.MonkeyPatch.context() as patch, receiving() as receiver:
        for name, value in {
            "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url,
            "DATABASE_URL": world.settings().database_url,
            "LARDER_WRITER_URL": world.settings().writer_url,
            "ARTIFACTS_URL": world.artifacts_url,
            "LARDER_TIMEOUT_MS": "30000",
            "LARDER_AUDIT_PER_MILLE": "1000",
            "LARDER_REQUEST_LOG": "off",
            "LARDER_EXPERIMENTS": str(experiments),
        }.items():
            patch.setenv(name, value)
        patch.setattr(metrics, "_cold", True)
        # An application that an earlier test's process-wide door still holds would be read in this one's place.
        patch.setattr(metrics, "_readers", [])
        telemetry.shutdown()
        kept = Seen(receiver)
        keep = Keep(kept.records)
        logging.getLogger().addHandler(keep)
        made: list[LarderApplication] = []

        def make() -> LarderApplication:
            made.append(create_application())
            return made[-1]

        try:
            with served(create_app(make)) as port:
                request_log.open_log(kept.log)
                _ask_for_everything(port, world, kept)
                # What is left for after the answers is counted too.
                assert made[0].flush(20_000)
                assert telemetry.flush(20_000)
        finally:
            request_log.open_log("off")
            logging.getLogger().removeHandler(keep)
            telemetry.shutdown(5_000)
        yield kept


def _ask_for_everything(port: int, world: ServedWorld, kept: Seen) -> None:
    key = key_header(world.url)
    kept.key = key["authorization"].rpartition("_")[2]

    def post(
        path: str, document: object, method: str = "POST", *, headers: dict[str, str] = key
    ) -> tuple[int, dict[str, Any]]:
        body = document if isinstance(document, bytes) else json.dumps(document).encode()
        status, _, answer = ask(port, path, body, method, headers={"content-type": "application/json"} | headers)
        kept.answers.append((body.decode("utf-8", "replace"), status, answer))
        return status, json.loads(answer)

    ours = {"user_id": world.people[0], "k": 5}
    for extra in ({}, {"prompt": f"{CANARY}-wish in space", "explain": True}, {"diversity": 0.3}):
        status, answer = post("/recommendations", ours | extra)
        assert (status, answer["degraded"], answer["model_version"]) == (200, [], world.version)
    everywhere = {
        "user_id": f"{CANARY}-person",
        "prompt": f"{CANARY}-prompt",
        "context": {f"{CANARY}-name": f"{CANARY}-value"},
        "candidates": [f"{CANARY}-candidate", *world.items[:3]],
        "exclude": [f"{CANARY}-excluded"],
        "filters": {"categories": [f"{CANARY}-category"]},
        "request_id": f"{CANARY}-request",
    }
    assert post("/recommendations", everywhere)[0] == 200
    event = {"user_id": f"{CANARY}-person", "item_id": f"{CANARY}-item", "kind": "view", "request_id": f"{CANARY}-r"}
    posted = [event | {"event_id": f"{CANARY}-event-{n % 2}"} for n in range(3)]
    future = event | {"event_id": f"{CANARY}-late", "occurred_at": "2999-01-01T00:00:00Z"}
    assert post("/events", {"events": [*posted, future]})[0] == 200
    assert post("/similar", {"item_id": world.items[0]})[0] == 200
    assert post("/similar", {"text": f"{CANARY}-text"})[0] == 200
    assert post("/similar", {"item_id": f"{CANARY}-unknown"})[0] == 404
    assert post("/recommendations", ours | {"k": f"{CANARY}-k"})[0] == 422
    assert post("/recommendations", ours | {f"{CANARY}-field": 1})[0] == 422
    assert post("/events", {"events": [event | {"event_id": "e", "kind": f"{CANARY}-kind"}]})[0] == 422
    assert post("/recommendations", f"{CANARY} is no JSON".encode())[0] == 400
    assert post("/recommendations", b" " * 300_000)[0] == 413
    assert post(f"/{CANARY}-path", {})[0] == 404
    assert post(f"/people/{CANARY}-unknown/forget", {})[0] == 404
    assert post("/recommendations", ours, headers={"authorization": f"Bearer {CANARY}"})[0] == 401
    assert post("/recommendations", ours, "PUT")[0] == 405
    assert post("/health", {}, "GET")[0] == 200
    # A table that nobody can read for a while: the database does not answer in time.
    with psycopg.connect(world.url) as connection:
        connection.execute("LOCK TABLE user_history IN ACCESS EXCLUSIVE MODE")
        status, answer = post("/recommendations", everywhere | {"timeout_ms": 300})
        assert (status, answer["degraded"]) == (200, ["database", "arm"])


# ---- every series that is queried


def queries() -> list[tuple[str, str]]:
    """Where a query stands, and the query: of dashboard, rules and objectives."""
    dashboard = json.loads((FILES / "dashboard.json").read_text())
    found = [
        (f"dashboard: {panel['title']}", target["expr"].replace("$__rate_interval", "5m"))
        for panel in dashboard["panels"]
        for target in panel.get("targets", ())
    ]
    for group in yaml.safe_load((FILES / "rules.yaml").read_text())["groups"]:
        found += [(f"rule: {rule.get('record') or rule['alert']}", rule["expr"]) for rule in group["rules"]]
    for objective in yaml.safe_load_all((FILES / "slos.yaml").read_text()):
        found += [(f"objective: {objective['metadata']['name']}", query) for query in _queries_in(objective)]
    return found


def _queries_in(document: Any) -> Iterator[str]:
    if isinstance(document, dict):
        for name, value in document.items():
            if name == "query":
                yield value
            else:
                yield from _queries_in(value)
    elif isinstance(document, list):
        for value in document:
            yield from _queries_in(value)


def emitted(receiver: Receiver) -> dict[str, dict[str, set[str]]]:
    """Of each series that Prometheus would hold, its labels and their values."""
    series: dict[str, dict[str, set[str]]] = {}
    for resource in receiver.metric_resources():
        said = {a.key: label_value(a.value) for a in resource.resource.attributes}
        for metric in (metric for scope in resource.scope_metrics for metric in scope.metrics):
            labels = series.setdefault(prometheus_name(metric), {})
            labels.setdefault("job", set()).add(said["service.name"])
            labels.setdefault("instance", set()).add(said["service.instance.id"])
            for point in points(metric):
                for attribute in point.attributes:
                    labels.setdefault(prometheus_label(attribute.key), set()).add(label_value(attribute.value))
    return series


def test_every_series_that_is_queried_is_emitted(seen: Seen) -> None:
    series = emitted(seen.receiver)
    recorded = {
        rule["record"]: grouped_by(rule["expr"])
        for group in yaml.safe_load((FILES / "rules.yaml").read_text())["groups"]
        for rule in group["rules"]
        if "record" in rule
    }
    missing = []
    for place, query in queries():
        found = selectors(query)
        assert found, f"{place} queries nothing"
        labels: set[str] = set()
        for selector in found:
            if selector.metric in recorded:
                labels |= recorded[selector.metric]
            elif selector.metric not in series:
                missing.append(f"{place}: {selector.metric} is not emitted")
            else:
                labels |= set(series[selector.metric])
                missing += [f"{place}: {why}" for why in _unmatched(selector, series[selector.metric])]
        missing += [f"{place}: nothing has a label {name}" for name in grouped_by(query) - labels]
    assert missing == []


def _unmatched(selector: Selector, labels: dict[str, set[str]]) -> Iterator[str]:
    for label, operator, value in selector.matchers:
        if label not in labels:
            yield f"{selector.metric} has no label {label}"
        elif operator == "=" and value not in labels[label]:
            yield f"{selector.metric} never had {label}={value!r}, but {sorted(labels[label])}"
        elif operator == "=~" and not re.fullmatch(r"[\w.|]+", value):
            yield f"{label}=~{value!r} is more than this test understands"


def test_the_dashboard_shows_every_instrument(seen: Seen) -> None:
    asked = {selector.metric for _, query in queries() for selector in selectors(query)}
    assert set(emitted(seen.receiver)) - asked == set()


def test_a_query_is_taken_apart_as_it_is_meant() -> None:
    query = (
        'sum by (a, b) (rate(x_total{c="1, {",d=~"5.."}[5m])) / on (a) group_left () y:z > 0.5 and histogram_count(w)'
    )
    assert selectors(query) == [
        Selector("x_total", (("c", "=", "1, {"), ("d", "=~", "5.."))),
        Selector("y:z", ()),
        Selector("w", ()),
    ]
    assert grouped_by(query) == {"a", "b"}


# ---- what is measured is true


def test_latencies_are_exponential_histograms_and_counts_are_right(seen: Seen) -> None:
    found = seen.receiver.metrics()
    for name in ("http.server.request.duration", "recsys.step.duration", "db.client.operation.duration"):
        assert found[name].WhichOneof("data") == "exponential_histogram"
        assert found[name].unit == "s"
    steps = {label_value(p.attributes[0].value): p for p in points(found["recsys.step.duration"])}
    assert set(steps) >= {"read", "encode wish", "user vector", "candidates", "rank", "re-rank", "explain"}
    assert all(0 < point.sum < 60 for point in steps.values())
    statuses = [status for _, status, _ in seen.answers]
    counted: dict[int, int] = {}
    for point in points(found["http.server.request.duration"]):
        said = {a.key: label_value(a.value) for a in point.attributes}
        status = int(said["http.response.status_code"])
        counted[status] = counted.get(status, 0) + point.count
    assert counted == {status: statuses.count(status) for status in set(statuses)}
    outcomes = {label_value(p.attributes[0].value): p.as_int for p in points(found["recsys.events"])}
    assert outcomes == {"stored": 2, "duplicate": 1, "refused": 1}
    (cold,) = points(found["faas.coldstarts"])
    assert cold.as_int == 1


def test_answers_are_counted_by_arm_and_shadows_by_what_became_of_them(seen: Seen) -> None:
    counted = {
        tuple(label_value(a.value) for a in sorted(point.attributes, key=lambda a: a.key)): point.as_int
        for point in points(seen.receiver.metrics()["recsys.experiment.answers"])
    }
    # One that says its diversity itself is in no arm of an experiment whose arms differ in it.
    assert counted == {("wording", "worded", "false"): 3, ("wording", "worded", "true"): 1}
    shadows = {label_value(p.attributes[0].value): p.as_int for p in points(seen.receiver.metrics()["recsys.shadows"])}
    assert set(shadows) == {"done", "dropped", "failed"}
    assert shadows["done"] >= 1
    logged = seen.receiver.metrics()["recsys.served_log.requests"]
    outcomes = {label_value(p.attributes[0].value): p.as_int for p in points(logged)}
    assert (outcomes["dropped"], outcomes["failed"]) == (0, 0)
    assert outcomes["written"] >= 1


def test_the_age_of_features_is_that_of_the_partition_that_was_read(seen: Seen, world: ServedWorld) -> None:
    ages = points(seen.receiver.metrics()["recsys.features.age"])
    views = {label_value(point.attributes[0].value) for point in ages}
    with psycopg.connect(world.url) as connection:
        (since_midnight,) = connection.execute(
            "SELECT extract(epoch FROM now() - date_trunc('day', now(), 'UTC'))::float8"
        ).fetchone() or (0.0,)
    assert views == {"user_activity", "item_activity", "user_affinity"}
    # Yesterday is the newest partition, so their age is what has passed of today.
    assert all(abs(point.as_double - since_midnight) < 300 for point in ages)


# ---- what is logged


def test_each_request_has_one_line_that_finds_its_trace(seen: Seen, world: ServedWorld) -> None:
    lines = seen.lines()
    assert [line["status"] for line in lines] == [status for _, status, _ in seen.answers]
    spans = {span.span_id.hex(): span for r in seen.receiver.resources() for s in r.scope_spans for span in s.spans}
    for line in lines:
        span = spans[line["span_id"]]
        assert span.trace_id.hex() == line["trace_id"]
        assert line["duration_ms"] > 0
    first, last = lines[0], lines[-1]
    assert (first["route"], first["method"], first["severity"]) == ("/recommendations", "POST", "INFO")
    assert (first["model_version"], first["degraded"], first["error"]) == (world.version, [], None)
    assert (last["degraded"], last["severity"]) == (["database", "arm"], "WARNING")
    assert {line["error"] for line in lines} == {
        None, "not_found", "invalid_request", "method_not_allowed", "unauthorized"
    }  # fmt: skip
    assert lines[1]["prompt_version"] == "wish.v3", "the template of the person's arm, really encoded"


# ---- nothing that a person wrote


def test_no_canary_leaves_in_telemetry_or_logs(seen: Seen, world: ServedWorld) -> None:
    assert len(seen.receiver.bodies) >= 2
    exported = b"".join(seen.receiver.bodies)
    assert b"read_person" in exported  # it is uncompressed: a canary would be seen
    told = exported.decode("latin-1") + seen.log.getvalue() + "\n".join(seen.records)
    for planted in (CANARY, CANARY.lower(), seen.key, *world.people, *world.items[:3]):
        assert not re.search(rf"\b{re.escape(planted)}\b", told), planted


def test_an_error_repeats_nothing_but_what_its_own_request_said(seen: Seen) -> None:
    faults = [(asked, answer.decode()) for asked, status, answer in seen.answers if status >= 400]
    assert len(faults) >= 8
    for asked, answer in faults:
        for word in re.findall(rf"{CANARY}[\w-]*", answer):
            assert word in asked or word.endswith("-path")
        assert "Traceback" not in answer
        assert "psycopg" not in answer


# ---- the files themselves


def test_the_collector_hands_on_both_signals_under_the_names_that_are_queried() -> None:
    collector = yaml.safe_load((FILES / "collector.yaml").read_text())
    pipelines = collector["service"]["pipelines"]
    assert set(pipelines) == {"metrics", "traces"}
    for pipeline in pipelines.values():
        for kind in ("receivers", "processors", "exporters"):
            assert set(pipeline[kind]) <= set(collector[kind])
        assert pipeline["processors"][0] == "memory_limiter"
    assert set(collector["service"]["extensions"]) <= set(collector["extensions"])
    (metrics_exporter,) = pipelines["metrics"]["exporters"]
    assert metrics_exporter == "prometheusremotewrite"  # the scraped one drops exponential histograms
    assert collector["exporters"][metrics_exporter]["add_metric_suffixes"] is True


def test_there_is_an_objective_for_each_promise_and_panels_do_not_overlap() -> None:
    objectives = list(yaml.safe_load_all((FILES / "slos.yaml").read_text()))
    assert {each["metadata"]["name"] for each in objectives} == {"availability", "latency", "freshness", "degraded"}
    for each in objectives:
        (target,) = each["spec"]["objectives"]
        assert each["apiVersion"] == "openslo/v1"
        assert 0.9 < target["target"] < 1
    panels = json.loads((FILES / "dashboard.json").read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells


def test_every_alert_leads_to_an_entry_of_the_readme() -> None:
    operations = (FILES.parents[1] / "README.md").read_text(encoding="utf-8").partition("## Operations")[2]
    entries = set(re.findall(r"^- \*\*(.+?)\.\*\*", operations, re.MULTILINE))
    groups = yaml.safe_load((FILES / "rules.yaml").read_text())["groups"]
    alerts = [rule for group in groups for rule in group["rules"] if "alert" in rule]
    assert len(alerts) >= 8
    for rule in alerts:
        kind, _, entry = rule["annotations"]["runbook"].partition(": ")
        assert (kind, entry[:1].upper() + entry[1:] in entries) == ("Operations", True), rule["alert"]


@needs_promtool
def test_promtool_accepts_rules_and_every_query(tmp_path: Path) -> None:
    assert PROMTOOL is not None
    subprocess.run([PROMTOOL, "check", "rules", "--lint-fatal", str(FILES / "rules.yaml")], check=True)
    rules = [{"record": f"query:number_{n}", "expr": query} for n, (_, query) in enumerate(queries())]
    (tmp_path / "queries.yaml").write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    subprocess.run([PROMTOOL, "check", "rules", str(tmp_path / "queries.yaml")], check=True)


@needs_promtool
def test_alerts_fire_when_they_should_and_not_before(tmp_path: Path) -> None:
    def fires(alert: str, at: str, labels: dict[str, str] | None) -> dict[str, Any]:
        expected = [] if labels is None else [{"exp_labels": labels}]
        return {"eval_time": at, "alertname": alert, "exp_alerts": expected}

    stale = {"severity": "ticket", "recsys_feature_view": "user_activity"}
    tests = [
        {
            "interval": "1m",
            "input_series": [
                # One process read long ago, another the newest partition: the newest counts, until it is old as well.
                {"series": 'recsys_features_age_seconds{recsys_feature_view="user_activity",instance="a"}', "values": "200000+60x60"},
                {"series": 'recsys_features_age_seconds{recsys_feature_view="user_activity",instance="b"}', "values": "99900+60x60"},
            ],
            "alert_rule_test": [fires("LarderFeaturesStale", "14m", None), fires("LarderFeaturesStale", "35m", stale)],
        },
        {
            "interval": "1m",
            "input_series": [
                {"series": 'recsys_answers_total{recsys_degraded="false"}', "values": "0+995x30 0+900x30"},
                {"series": 'recsys_answers_total{recsys_degraded="true"}', "values": "0+5x30 0+100x30"},
                {"series": 'recsys_degraded_total{recsys_rung="database"}', "values": "0x30 0+100x30"},
            ],
            "alert_rule_test": [
                fires("LarderDegraded", "29m", None),
                fires("LarderDegraded", "55m", {"severity": "ticket"}),
                fires("LarderDatabaseNotReached", "29m", None),
                fires("LarderDatabaseNotReached", "45m", {"severity": "page"}),
            ],
        },
    ]  # fmt: skip
    # Without annotations, which promtool would compare word by word.
    groups = yaml.safe_load((FILES / "rules.yaml").read_text())["groups"]
    for group in groups:
        for rule in group["rules"]:
            rule.pop("annotations", None)
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": groups}))
    (tmp_path / "test.yaml").write_text(
        yaml.safe_dump({"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": tests})
    )
    assert PROMTOOL is not None
    ran = subprocess.run([PROMTOOL, "test", "rules", "test.yaml"], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
