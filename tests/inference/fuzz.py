"""Requests that nobody would send, fast: valid ones bent at one or two places, bytes bent, and plain noise; each from its seed.

A door is asked with `Fuzzer(seed)`; what a wrong answer looks like, `fault_of` says. Nothing here waits for Hypothesis:
twenty thousand requests are made in a few seconds, and one that fails is made again from its number.
"""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from inference import page

KNOWN_STATUSES = {200, 202, 400, 401, 403, 404, 405, 408, 413, 415, 422, 429, 503}
"""What the OpenAPI document names."""

STRANGE_TEXT: tuple[str, ...] = (
    "", " ", "\t\n", "\x00", "\x1f", "\x7f", "\ud800", "\udfff x", "é" * 64, "é" * 65, "x" * 128, "x" * 129, "x" * 2_001,
    "😀" * 32, "\u202e", "\ufeff", "'; DROP TABLE items; --", "%(user_id)s", "{0}", "%s%n", "\\", '"', "{}", "NULL", "nan",
    "-0", "../../etc/passwd", "<script>", "a\r\nb: c", "𝕏", "İ", "\u0000\u0001", "0001-01-01T00:00:00Z",
    "9999-12-31T23:59:59.999999+00:00", "2026-02-30T00:00:00Z", "1970-01-01T00:00:00+23:59", "2026-01-01", "１２",
)  # fmt: skip
STRANGE_NUMBERS: tuple[object, ...] = (
    0, -1, 1, 2, 500, 501, 10**9, 2**31, 2**53, 2**53 + 1, 2**63, 2**64, 10**400, -(2**63), 0.0, -0.0, 0.5, 1.0, 1.5,
    1e-320, 1e308, -1e308, 1e9, True, False,
)  # fmt: skip
RAW: tuple[bytes, ...] = (
    b"", b"null", b"[]", b"0", b'""', b"{", b"{}", b"NaN", b'{"user_id":"u","k":NaN}', b'{"user_id":"u","k":1e999}',
    b'{"user_id":"u","user_id":1}', b"\xff\xfe", b"\x00" * 64, b"[" * 5_000, b'{"a":' * 2_000, b'{"user_id":"\\ud800"}',
    b'{"user_id":"u\\u0000"}', b"\xef\xbb\xbf{}", b'{"user_id":"u"} trailing', b" " * 4_000, b'{"k":' + b"9" * 5_000 + b"}",
    b"true", b'{"events":[]}', b'{"events":[{}]}', b'{"item_id":null,"text":null}',
)  # fmt: skip
METHODS = ("GET", "POST", "PUT", "DELETE", "HEAD", "PATCH", "OPTIONS", "BREW", "")


@dataclass(frozen=True, slots=True)
class Sent:
    """One request."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    query: str = ""


@dataclass(slots=True)
class Fuzzer:
    """Requests by number: `sent(7)` is the same whenever it is asked for. `people` and `items` are of those who exist."""

    seed: int
    people: Sequence[str] = ("u0",)
    items: Sequence[str] = ("i00",)
    headers: dict[str, str] = field(default_factory=dict)

    def document(self, number: int) -> object:
        """A JSON document for /recommendations, bent or not: what is invoked directly."""
        rng = self._rng(number)
        return self._bent(rng, self._recommendation(rng))

    def sent(self, number: int) -> Sent:
        """A request to any route, most of them to those that read a body."""
        rng = self._rng(number)
        route = rng.choices(
            ("/recommendations", "/similar", "/events", "people", "read", "nowhere"), (45, 15, 20, 8, 6, 6)
        )[0]
        headers = {"content-type": "application/json", **self.headers}
        if route == "people":
            who = rng.choice((*STRANGE_TEXT, *self.people))
            receipt = rng.choice(("", "/" + "0" * 32, "/" + "f" * 32, "/x"))
            method = "GET" if receipt else "POST"
            return self._head(
                rng, Sent(method, f"/people/{_header(who)}/forget{receipt}", headers, b"", self._token(rng))
            )
        if route == "read":
            return self._head(rng, Sent("GET", rng.choice(("/health", "/openapi.json")), headers, b""))
        if route == "nowhere":
            path = rng.choice(
                ("/", "", "//", "/recommendations/", "/RECOMMENDATIONS", "/people//forget", "/\x00", "/é")
            )
            return self._head(rng, Sent(rng.choice(METHODS), path, headers, b""))
        make = {"/recommendations": self._recommendation, "/similar": self._similar, "/events": self._events}[route]
        return self._head(rng, Sent("POST", route, headers, self._bytes(rng, self._bent(rng, make(rng)))))

    def gateway(self, number: int) -> dict[str, Any]:
        """The same as an event of API Gateway's format 2.0, itself bent now and then."""
        rng, sent = self._rng(-1 - number), self.sent(number)
        coded = rng.random() < 0.3
        event: dict[str, Any] = {
            "version": "2.0",
            "rawPath": sent.path,
            "rawQueryString": sent.query,
            "headers": sent.headers,
            "requestContext": {"http": {"method": sent.method, "path": sent.path}, "stage": "$default"},
            "body": base64.b64encode(sent.body).decode() if coded else sent.body.decode("utf-8", "surrogateescape"),
            "isBase64Encoded": coded,
        }
        if rng.random() < 0.1:
            name = rng.choice(("rawPath", "rawQueryString", "headers", "body", "isBase64Encoded", "version"))
            event[name] = rng.choice((None, "", "é", "not base64 !", 0))
            if name == "headers":
                event[name] = rng.choice((None, {}, {"Content-Type": "é"}, {"x": ""}))
            if name == "isBase64Encoded":
                event[name] = not coded
        return event

    def batch(self, number: int) -> dict[str, Any]:
        """A batch of an SQS queue, whose messages hold events, bent or not."""
        rng = self._rng(number)
        return {"Records": [self._record(rng, number, place) for place in range(rng.choice((0, 1, 1, 2, 3)))]}

    def _record(self, rng: random.Random, number: int, place: int) -> dict[str, Any]:
        document: object = self._events(rng)
        if rng.random() < 0.3 and isinstance(document, dict):
            document = document["events"][0]
        body: object = self._bytes(rng, self._bent(rng, document)).decode("utf-8", "surrogateescape")
        if rng.random() < 0.05:
            body = rng.choice((None, 0, "", "{}", "[]", {"events": []}))
        sent_at = rng.choice(("1700000000000", "", "x", "9" * 30, "-1", None, 5))
        record: dict[str, Any] = {
            "messageId": f"m{number}-{place}",
            "eventSource": "aws:sqs",
            "body": body,
            "attributes": {"SentTimestamp": sent_at, "AWSTraceHeader": rng.choice(STRANGE_TEXT)},
            "messageAttributes": {"traceparent": {"stringValue": rng.choice(STRANGE_TEXT), "dataType": "String"}},
        }
        if rng.random() < 0.1:
            record[rng.choice(("attributes", "messageAttributes"))] = rng.choice((None, {}, {"traceparent": None}))
        return record

    # ---- what is asked

    def _recommendation(self, rng: random.Random) -> dict[str, object]:
        document: dict[str, object] = {"user_id": rng.choice(self.people)}
        choices: dict[str, Callable[[], object]] = {
            "k": lambda: rng.choice((1, 5, 10, 50, 500)),
            "prompt": lambda: rng.choice(("something quiet", "", "Größe", "x" * 2_000, "no horror")),
            "context": lambda: {"device": "phone", "hour": 12, "first": True},
            "candidates": lambda: [rng.choice(self.items) for _ in range(rng.choice((0, 1, 20)))],
            "exclude": lambda: [rng.choice(self.items) for _ in range(rng.choice((0, 1, 20)))],
            "filters": lambda: {"categories": rng.choice(([], ["odd"], ["nothing"])), "exclude_categories": []},
            "diversity": lambda: rng.choice((0.0, 0.3, 1.0)),
            "explain": lambda: rng.random() < 0.5,
            "at": lambda: rng.choice(("2026-01-01T00:00:00Z", "1970-01-01T00:00:00Z", "9999-12-31T00:00:00Z")),
            "timeout_ms": lambda: rng.choice((1, 50, 2_000, 30_000)),
            "request_id": lambda: f"r{rng.random()}",
        }
        for name in rng.sample(sorted(choices), rng.randrange(4)):
            document[name] = choices[name]()
        return document

    def _similar(self, rng: random.Random) -> dict[str, object]:
        anchor = {"item_id": rng.choice(self.items)} if rng.random() < 0.7 else {"text": "old songs"}
        return {**anchor, **({"k": rng.choice((1, 10, 500))} if rng.random() < 0.5 else {})}

    def _events(self, rng: random.Random) -> dict[str, Any]:
        return {"events": [self._event(rng) for _ in range(rng.choice((1, 1, 2, 5)))]}

    def _event(self, rng: random.Random) -> dict[str, object]:
        # Few ids, so that most are repeats: the database must not grow because it is fuzzed.
        return {
            "event_id": f"fuzz{rng.randrange(50)}",
            "user_id": rng.choice(self.people),
            "item_id": rng.choice(self.items),
            "kind": rng.choice(("view", "click", "rating", "like", "hide")),
            **({"value": rng.choice((1.0, 5.0, -3.5))} if rng.random() < 0.5 else {}),
        }

    # ---- how it is bent

    def _bent(self, rng: random.Random, document: object) -> object:
        for _ in range(rng.choices((0, 1, 2, 4), (15, 55, 20, 10))[0]):
            document = _bend(rng, document)
        return document

    def _bytes(self, rng: random.Random, document: object) -> bytes:
        kind = rng.random()
        if kind < 0.05:
            return rng.choice(RAW)
        if kind < 0.08:
            return rng.randbytes(rng.choice((1, 16, 300)))
        text = json.dumps(document, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
        if kind < 0.16 and text:
            broken = bytearray(text)
            for _ in range(rng.choice((1, 1, 3))):
                broken[rng.randrange(len(broken))] = rng.randrange(256)
            return bytes(broken[: rng.choice((len(broken), rng.randrange(len(broken)) + 1))])
        return text

    def _head(self, rng: random.Random, sent: Sent) -> Sent:
        if rng.random() > 0.12:
            return sent
        headers = dict(sent.headers)
        name = rng.choice(
            ("content-type", "authorization", "traceparent", "tracestate", "x-amzn-trace-id", "ce-traceparent")
        )
        headers[name] = _header(rng.choice((*STRANGE_TEXT, "Bearer x", "Bearer", "application/json; charset=latin-1")))
        method = rng.choice(METHODS) if rng.random() < 0.3 else sent.method
        return Sent(method, sent.path, headers, sent.body, self._token(rng))

    def _token(self, rng: random.Random) -> str:
        return rng.choice(("", "token=", "token=x.y.z", "token=%ff", "&&=", "token=a&token=b", "x" * 3_000))

    def _rng(self, number: int) -> random.Random:
        return random.Random(f"{self.seed}/{number}")


def _bend(rng: random.Random, value: object) -> object:
    """`value` with one change somewhere in it."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        name = rng.choice(sorted(value, key=str))
        changed = dict(value)
        kind = rng.random()
        if kind < 0.1:
            del changed[name]
        elif kind < 0.2:
            changed[rng.choice((*STRANGE_TEXT, "user", "Kind", "candidate"))] = changed[name]
        elif kind < 0.25:
            changed |= {f"{name}{number}": 0 for number in range(rng.choice((1, 70)))}
        else:
            changed[name] = _bend(rng, value[name])
        return changed
    if isinstance(value, list) and value and rng.random() < 0.6:
        return rng.choice(
            (
                [*value, *value],
                value[:1] * rng.choice((101, 501, 1_001)),
                [_bend(rng, value[0]), *value[1:]],
                [value],
                [],
            )
        )
    return rng.choice(
        (
            None,
            rng.choice(STRANGE_TEXT),
            rng.choice(STRANGE_NUMBERS),
            [],
            {},
            [rng.choice(STRANGE_TEXT)],
            {rng.choice(STRANGE_TEXT): rng.choice(STRANGE_NUMBERS)},
            [[[[]]]],
            [value],
            {"": value},
        )
    )


def _header(text: str) -> str:
    """`text` as the server of a door hands it over: no line ends, one character a byte."""
    return text.encode("utf-8", "surrogatepass").decode("latin-1").replace("\r", "").replace("\n", "").replace("\0", "")


def fault_of(status: int, body: bytes, method: str = "POST") -> str | None:
    """What is wrong with an answer; None for one that a caller can be given."""
    if status not in KNOWN_STATUSES:
        return f"status {status}: {body[:200]!r}"
    if method == "HEAD" and not body:
        return None
    if status == 200 and body in {found.body for found in page.files().values()}:
        return None  # the page itself
    try:
        document = json.loads(body)
    except ValueError:
        return f"status {status} with a body that is no JSON: {body[:200]!r}"
    if status >= 400 and "status" not in document:  # /health that cannot serve says its status
        error = document.get("error") if isinstance(document, dict) else None
        if not isinstance(error, dict) or not {"type", "message"} <= error.keys():
            return f"status {status} without the one shape of errors: {body[:200]!r}"
    return None


def slope_bytes(samples: Sequence[tuple[int, int]]) -> float:
    """Bytes per request by which memory grew, of (requests so far, bytes): the median of all pairs' slopes.

    H. Theil (1950), P. K. Sen (1968): a step when a pool or a cache fills up does not count as growth.
    """
    slopes = sorted(
        (later[1] - earlier[1]) / (later[0] - earlier[0])
        for place, earlier in enumerate(samples)
        for later in samples[place + 1 :]
        if later[0] > earlier[0]
    )
    return slopes[len(slopes) // 2] if slopes else 0.0
