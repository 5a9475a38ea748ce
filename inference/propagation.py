"""Trace context as it travels: read from headers, X-Ray, CloudEvents and queue messages; written for the next hop."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

CARRIER_HEADERS = ("traceparent", "tracestate", "x-amzn-trace-id", "ce-traceparent", "ce-tracestate")
"""What a request may carry: W3C trace context, X-Ray's header, and a CloudEvent's extension attributes (binary mode)."""

_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_XRAY_ROOT = re.compile(r"1-([0-9a-f]{8})-([0-9a-f]{24})")
_XRAY_PARENT = re.compile(r"[0-9a-f]{16}")
_STATE_KEY = r"[a-z0-9][a-z0-9_*/@-]{0,255}"
_STATE_MEMBER = re.compile(rf"{_STATE_KEY}=[\x20-\x2b\x2d-\x3c\x3e-\x7e]{{0,255}}[\x21-\x2b\x2d-\x3c\x3e-\x7e]")
_STATE_CHARS, _STATE_MEMBERS = 512, 32
_MAX_LINKS = 128
"""What the SDK keeps of a span's links."""


@dataclass(frozen=True, slots=True)
class TraceContext:
    """Where in a trace we are: ids as hex and `tracestate` as in the headers of that name."""

    trace_id: str
    span_id: str
    sampled: bool
    tracestate: str = ""

    @property
    def traceparent(self) -> str:
        return f"00-{self.trace_id}-{self.span_id}-{'01' if self.sampled else '00'}"

    def headers(self) -> dict[str, str]:
        """What to send along so that the other side's spans hang under this one."""
        sent = {"traceparent": self.traceparent}
        return sent | {"tracestate": self.tracestate} if self.tracestate else sent


def extract(carrier: Mapping[str, str]) -> TraceContext | None:
    """The context in `carrier` (names in lower case): `traceparent`, else X-Ray's, else a CloudEvent's, else None.

    An X-Ray header that is not sampled counts as none: Lambda writes one into every invocation
    when X-Ray itself is off, and it would switch off every trace of ours. A CloudEvent's attributes name the trace that
    the event was made in; a header of the hop that brought it is nearer.
    """
    return (
        _w3c(carrier.get("traceparent", ""), carrier.get("tracestate", ""))
        or _xray(carrier.get("x-amzn-trace-id", ""))
        or _w3c(carrier.get("ce-traceparent", ""), carrier.get("ce-tracestate", ""))
    )


def of_messages(records: Iterable[Mapping[str, Any]]) -> list[TraceContext]:
    """The contexts that a batch of SQS records (as Lambda passes them) was sent under, each once, in order.

    Of a record its message attributes `traceparent` and `tracestate`, else the system attribute `AWSTraceHeader`. They
    become links: a batch has many senders, and no parent.
    """
    found: dict[TraceContext, None] = {}
    for record in records:
        sent = record.get("messageAttributes") or {}
        carrier = {
            name: value
            for name in ("traceparent", "tracestate")
            if isinstance(value := (sent.get(name) or {}).get("stringValue"), str)
        }
        system = (record.get("attributes") or {}).get("AWSTraceHeader")
        context = extract(carrier | ({"x-amzn-trace-id": system} if isinstance(system, str) else {}))
        if context is not None:
            found[context] = None
        if len(found) == _MAX_LINKS:
            break
    return list(found)


def _w3c(traceparent: str, tracestate: str) -> TraceContext | None:
    match = _TRACEPARENT.fullmatch(traceparent.strip())
    if match is None:
        return None
    version, trace_id, span_id, flags, rest = match.groups()
    future = version not in ("00", "ff")  # only a later version may append fields
    if not ((version == "00" and not rest) or future) or not int(trace_id, 16) or not int(span_id, 16):
        return None
    return TraceContext(trace_id, span_id, bool(int(flags, 16) & 1), _state(tracestate))


def _state(text: str) -> str:
    """`text` if it is a list that may be handed on, else nothing: the trace goes on without it."""
    members = [member.strip(" \t") for member in text.split(",") if member.strip(" \t")]
    keys = {member.partition("=")[0] for member in members}
    fit = len(text) <= _STATE_CHARS and len(members) <= _STATE_MEMBERS and len(keys) == len(members)
    return ",".join(members) if fit and all(map(_STATE_MEMBER.fullmatch, members)) else ""


def _xray(header: str) -> TraceContext | None:
    fields = dict(part.strip().partition("=")[::2] for part in header.split(";"))
    root = _XRAY_ROOT.fullmatch(fields.get("Root", ""))
    parent = _XRAY_PARENT.fullmatch(fields.get("Parent", ""))
    if root and parent and fields.get("Sampled") == "1":
        return TraceContext(root[1] + root[2], parent[0], True)
    return None
