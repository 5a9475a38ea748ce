"""What is counted and measured: every instrument and its attributes. Off (no endpoint) a call costs a comparison.

Names follow OpenTelemetry's semantic conventions where there are any, and are ours under `recsys.*`. Attributes hold
names of steps, rungs, views, versions and declared arms, never an id, a text or a value that a caller chose: routes are
those we have, methods those that HTTP has, and of model versions and arms a process tells the first few apart.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from inference import otel

if TYPE_CHECKING:
    from opentelemetry.metrics import CallbackOptions, Observation

Value = otel.Value

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"})
OTHER_METHOD = "_OTHER"
MAX_VERSIONS = 16
"""So many model versions are told apart by one process; what comes after them is `other`."""
MAX_ARMS = 64
"""So many arms of experiments are told apart by one process; what comes after them is `other`."""
READING_SECONDS = 3_600
"""What a request read longer ago says nothing of how fresh features are now: an idle process reports no age."""
SECONDS_BOUNDARIES = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 10)
"""For those who ask for explicit buckets."""

Reading = tuple[str, float, Mapping[str, Value]]
"""Name of an observed instrument, value, attributes."""

_OBSERVED = {
    "recsys.features.age": ("s", "Since the end of the newest partition of a view that a request read"),
    "recsys.model.age": ("s", "Since the newest event that the model in memory has learned from"),
    "recsys.model.loaded": ("{model}", "Models in memory, by version, precision and the provider that answers"),
    "recsys.requests.in_flight": ("{request}", "Requests in this process, those that wait included"),
    "recsys.served_log.queue.size": ("{read}", "Reads that wait to be written for the skew audit"),
    "recsys.served_log.requests.waiting": ("{answer}", "Answers that wait to be logged"),
}
_OBSERVED_COUNTS = {
    "recsys.served_log.reads": ("{read}", "Reads for the skew audit, by what became of them"),
    "recsys.served_log.requests": ("{answer}", "Answers to be logged, by what became of them"),
    "recsys.shadows": ("{shadow}", "Shadows of experiments, by what became of them"),
}


class _Instruments:
    """Every instrument, made once for a meter."""

    def __init__(self, metering: otel.Metering) -> None:
        meter = metering.meter

        def seconds(name: str, about: str) -> Any:
            return meter.create_histogram(
                name, "s", about, explicit_bucket_boundaries_advisory=list(SECONDS_BOUNDARIES)
            )

        self.of = metering
        self.requests = seconds("http.server.request.duration", "Requests, by route and status")
        self.database = seconds("db.client.operation.duration", "Questions to Postgres, a pipeline each")
        self.messages = seconds("messaging.process.duration", "Batches of messages from a queue")
        self.steps = seconds("recsys.step.duration", "Steps of a recommendation")
        self.initialised = seconds("faas.init_duration", "From the start of the process until it can answer")
        self.cold_starts = meter.create_counter("faas.coldstarts", "{coldstart}", "First requests of a process")
        self.answers = meter.create_counter("recsys.answers", "{answer}", "Recommendations, by model version")
        self.rungs = meter.create_counter("recsys.degraded", "{answer}", "Degraded recommendations, by rung")
        self.experiments = meter.create_counter(
            "recsys.experiment.answers", "{answer}", "Recommendations to people in an experiment, by arm"
        )
        self.rows = meter.create_histogram(
            "recsys.rank.batch.size", "{item}", "Candidates that the ranker scored at once"
        )
        self.batches = meter.create_histogram("recsys.events.batch.size", "{event}", "Events per post")
        self.events = meter.create_counter("recsys.events", "{event}", "Posted events, by outcome")
        for name, (unit, about) in _OBSERVED.items():
            meter.create_observable_gauge(name, [_observer(name)], unit, about)
        for name, (unit, about) in _OBSERVED_COUNTS.items():
            meter.create_observable_counter(name, [_observer(name)], unit, about)


_lock = threading.Lock()
_made: _Instruments | None = None
_cold = True
_versions: set[str] = set()
_arms: set[tuple[str, str]] = set()
_features: dict[str, tuple[float, float]] = {}
"""Of each view when its partition ended and when a request last read it."""
_readers: list[Callable[[], Iterable[Reading]]] = []


def _instruments() -> _Instruments | None:
    global _made
    metering = otel.metering()
    if metering is None:
        return None
    made = _made
    if made is None or made.of is not metering:
        with _lock:
            made = _made
            if made is None or made.of is not metering:
                made = _made = _Instruments(metering)
    return made


def version_label(version: str | None) -> str:
    """`version` as an attribute: itself while there are few, then `other`."""
    if version is None:
        return "none"
    if version not in _versions:
        if len(_versions) >= MAX_VERSIONS:
            return "other"
        _versions.add(version)
    return version


def _arm_label(experiment: tuple[str, str]) -> tuple[str, str]:
    """Experiment and arm as attributes: themselves while there are few, then `other`; files may be changed for ever."""
    if experiment not in _arms:
        if len(_arms) >= MAX_ARMS:
            return "other", "other"
        _arms.add(experiment)
    return experiment


def request_ended(
    method: str, route: str | None, status: int, seconds: float, *, scheme: str = "http", error: str = ""
) -> None:
    """A request was answered; `route` None where there is none of that path."""
    made = _instruments()
    if made is None:
        return
    attributes: dict[str, Value] = {
        "http.request.method": method if method in METHODS else OTHER_METHOD,
        "http.response.status_code": status,
        "url.scheme": scheme,
    }
    if route is not None:
        attributes["http.route"] = route
    if status >= 500:
        attributes["error.type"] = error or str(status)
    otel.measure(made.requests.record, seconds, attributes)


def database_took(operation: str, seconds: float, error: str = "") -> None:
    """One round trip to Postgres; `error` is the type of what went wrong."""
    made = _instruments()
    if made is None:
        return
    attributes = {"db.system.name": "postgresql", "db.operation.name": operation}
    otel.measure(made.database.record, seconds, attributes | {"error.type": error} if error else attributes)


def batch_processed(seconds: float, error: str = "") -> None:
    """A batch of messages of a queue was worked off; `error` is the type of what went wrong."""
    made = _instruments()
    if made is None:
        return
    attributes = {"messaging.system": "aws_sqs", "messaging.operation.name": "process"}
    otel.measure(made.messages.record, seconds, attributes | {"error.type": error} if error else attributes)


def answered(
    model_version: str | None,
    degraded: Iterable[str],
    steps_ms: Mapping[str, float],
    experiment: tuple[str, str] | None = None,
) -> None:
    """A recommendation was made: by which model, on which rungs of the ladder, where its time went, in which experiment
    and arm."""
    made = _instruments()
    if made is None:
        return
    rungs = tuple(degraded)
    otel.measure(
        made.answers.add, 1, {"recsys.model.version": version_label(model_version), "recsys.degraded": bool(rungs)}
    )
    for rung in rungs:
        otel.measure(made.rungs.add, 1, {"recsys.rung": rung})
    if experiment is not None:
        name, arm = _arm_label(experiment)
        attributes: dict[str, Value] = {
            "recsys.experiment": name,
            "recsys.experiment.arm": arm,
            "recsys.experiment.missed": "arm" in rungs,
        }
        otel.measure(made.experiments.add, 1, attributes)
    for step, took_ms in steps_ms.items():
        otel.measure(made.steps.record, took_ms / 1000, {"recsys.step": step})


def ranked(rows: int) -> None:
    """The ranker scored `rows` candidates in one run."""
    made = _instruments()
    if made is not None:
        otel.measure(made.rows.record, rows, {})


def events_posted(outcomes: Iterable[str]) -> None:
    """A post of events was answered with one outcome each."""
    made = _instruments()
    if made is None:
        return
    counts: dict[str, int] = {}
    for outcome in outcomes:
        counts[outcome] = counts.get(outcome, 0) + 1
    otel.measure(made.batches.record, sum(counts.values()), {})
    for outcome, count in counts.items():
        otel.measure(made.events.add, count, {"recsys.outcome": outcome})


def first_request(trigger: str) -> bool:
    """Whether this is the first request of the process, which is counted as a cold start."""
    global _cold
    cold, _cold = _cold, False
    if cold:
        made = _instruments()
        if made is not None:
            otel.measure(made.cold_starts.add, 1, {"faas.trigger": trigger})
    return cold


def cold_again() -> None:
    """The next request is the first of its process: what wakes from a snapshot is a process of its own."""
    global _cold
    _cold = True
    _features.clear()


def initialised() -> None:
    """The process can answer now."""
    made = _instruments()
    if made is not None:
        otel.measure(made.initialised.record, process_age_seconds(), {})


def features_read(settled_at: Mapping[str, float | None]) -> None:
    """What a request for the present read: of each view when its newest settled partition ended, seconds since 1970."""
    now = time.time()
    for view, at in settled_at.items():
        if at is not None:
            _features[view] = at, now


def watch(read: Callable[[], Iterable[Reading]]) -> Callable[[], None]:
    """Ask `read` for its readings whenever metrics are collected, until what this returns is called."""
    _readers.append(read)

    def stop() -> None:
        if read in _readers:
            _readers.remove(read)

    return stop


def _read(name: str) -> Iterable[tuple[float, Mapping[str, Value]]]:
    if name == "recsys.features.age":
        now = time.time()
        for view, (at, read_at) in list(_features.items()):
            if now - read_at < READING_SECONDS:
                yield now - at, {"recsys.feature.view": view}
    for read in list(_readers):
        for of, value, attributes in read():
            if of == name:
                yield value, attributes


def _observer(name: str) -> Callable[[CallbackOptions], Iterable[Observation]]:
    from opentelemetry.metrics import Observation

    def observe(_: CallbackOptions) -> Iterable[Observation]:
        return [Observation(value, dict(attributes)) for value, attributes in _read(name)]

    return observe


_IMPORTED_AT = time.monotonic()


def process_age_seconds() -> float:
    """Since this process was started; where the system does not say, since this module was imported."""
    try:
        with open("/proc/self/stat", encoding="ascii", errors="replace") as stat:
            ticks = int(stat.read().rpartition(")")[2].split()[19])
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError, AttributeError):
        return time.monotonic() - _IMPORTED_AT
