"""One line of JSON per request: what was asked of which route, how it went, which versions answered, under which trace.

Nothing that a caller wrote is in it: no id, prompt, event, header or path. It is written by the doors' own set-up
(`open_log`, called by `runtime.create_application`), to the stream that LARDER_REQUEST_LOG names.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, TextIO

from inference import otel
from inference.propagation import TraceContext
from inference.pseudonyms import Pseudonyms

Stream = Literal["stderr", "stdout", "off"]
STREAMS: tuple[Stream, ...] = ("stderr", "stdout", "off")


@dataclass(slots=True)
class Notes:
    """What becomes known of a request while it is answered."""

    trace_id: str = ""
    """The trace's id; one of its own where there is no trace, so that an error and its line find each other."""
    model_version: str | None = None
    prompt_version: str | None = None
    degraded: Sequence[str] = ()
    error: str = ""
    """The `type` of the error that was answered, or that of an unforeseen exception."""
    user_id: str = ""
    """Whom it was about. It is never written: a line has their pseudonym, where LARDER_LOG_KEYS are set."""


class _Log:
    def __init__(self) -> None:
        self.stream: TextIO | None = None
        self.version = ""
        self.pseudonyms: Pseudonyms | None = None
        self.lock = threading.Lock()


_log = _Log()
_encode = json.JSONEncoder(separators=(",", ":")).encode


def open_log(stream: Stream | TextIO, pseudonyms: Pseudonyms | None = None) -> None:
    """Write to `stream` from now on, with what `pseudonyms` call people; "off" ends it."""
    with _log.lock:
        _log.pseudonyms = pseudonyms
        _log.version = otel.version()
        if stream == "off":
            _log.stream = None
        elif isinstance(stream, str):
            _log.stream = sys.stderr if stream == "stderr" else sys.stdout
        else:
            _log.stream = stream


def write(
    notes: Notes,
    context: TraceContext | None,
    method: str,
    route: str | None,
    status: int,
    seconds: float,
    *,
    trigger: str = "http",
) -> None:
    """The line of one request; nothing while the log is closed.

    `method` and `route` are of those we know, `context` is the request's span, or the caller's with tracing off.
    """
    stream = _log.stream
    if stream is None:
        return
    line: dict[str, object] = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "severity": "ERROR" if status >= 500 else "WARNING" if notes.degraded else "INFO",
        "message": f"{method} {route or 'unknown route'} {status}",
        "trace_id": notes.trace_id,
        "span_id": context.span_id if context else None,
        "method": method,
        "route": route,
        "status": status,
        "duration_ms": round(seconds * 1000, 3),
        "degraded": list(notes.degraded),
        "model_version": notes.model_version,
        "prompt_version": notes.prompt_version,
        "error": notes.error or None,
        "trigger": trigger,
        "version": _log.version,
    }
    pseudonyms = _log.pseudonyms
    if pseudonyms is not None and notes.user_id:
        line["user"] = pseudonyms.of(notes.user_id)
    text = _encode(line) + "\n"
    try:
        with _log.lock:
            stream.write(text)
            stream.flush()
    except (OSError, ValueError):  # the stream is closed or its reader gone: no reason to fail a request
        _log.stream = None
