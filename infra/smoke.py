"""The first question to a new version of a function, and whether its answer will do."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass

from schemas.errors import DeployError

REQUEST = {"user_id": "larder-smoke-test", "k": 10}
"""Nobody has this id, so no person's data is read; the ranker, the candidates and the database are asked as for anyone."""
BROKEN = ("database", "ranker")
"""What a version that works does not do without."""
_PAUSE_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Answer:
    """A smoke test that passed: what answered, how fast (ms, the first includes the start), what it did without."""

    model_version: str
    items: int
    degraded: tuple[str, ...]
    first_ms: float
    next_ms: float


def judge(body: bytes, model_version: str) -> str | None:
    """Why `body` is no answer of a function that serves `model_version`, or None if it is one."""
    try:
        answer = json.loads(body)
    except ValueError:
        return f"the answer is not JSON ({body[:80]!r})"
    if not isinstance(answer, dict):
        return f"the answer is {type(answer).__name__}, not an object"
    if "error" in answer or "errorMessage" in answer:
        error = answer.get("error") or {"type": answer.get("errorType"), "message": answer["errorMessage"]}
        return f"it answered with an error ({error.get('type')}): {error.get('message')}"
    if not answer.get("items"):
        return "it answered with an empty list"
    missing = [name for name in BROKEN if name in answer.get("degraded", [])]
    if missing:
        return f"it answers without {' and '.join(missing)}"
    if answer.get("model_version") != model_version:
        return f"it answers with model {answer.get('model_version')}, not with the champion {model_version}"
    return None


def test(ask: Callable[[bytes], bytes], model_version: str, patience_seconds: float, what: str) -> Answer:
    """Ask until the answer will do, then once more. Raises DeployError with the last reason when patience ends.

    A version that has just started may load its model beside its first answers, so one bad answer is not the end.
    `ask` sends a recommendation request and gives the body of the answer; what it raises counts as a bad answer if it is
    a DeployError.
    """
    payload = json.dumps(REQUEST).encode()
    until = time.monotonic() + patience_seconds
    while True:
        start = time.perf_counter()
        try:
            body = ask(payload)
            reason = judge(body, model_version)
        except DeployError as error:
            reason = str(error)
        first_ms = (time.perf_counter() - start) * 1000
        if reason is None:
            break
        if time.monotonic() + _PAUSE_SECONDS > until:
            raise DeployError(f"{what} failed its smoke test: {reason}")
        time.sleep(_PAUSE_SECONDS)
    start = time.perf_counter()
    body = ask(payload)
    next_ms = (time.perf_counter() - start) * 1000
    reason = judge(body, model_version)
    if reason is not None:
        raise DeployError(f"{what} answered once, and then failed its smoke test: {reason}")
    answer = json.loads(body)
    return Answer(model_version, len(answer["items"]), tuple(answer.get("degraded", ())), first_ms, next_ms)
