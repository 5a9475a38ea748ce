"""Releases moved back and forth under load, each answer compared with what its version answers by itself."""

from __future__ import annotations

import json
import threading
import time

from conftest import TODAY
from released import PEOPLE, Released

from inference import http
from inference.runtime import LarderApplication
from inference.settings import Settings

JSON = {"content-type": "application/json"}
AT = TODAY.isoformat()
"""One instant for every request: then a version has one answer for each person, to the last digit."""


def make(world: Released) -> LarderApplication:
    app = LarderApplication.from_settings(
        Settings(world.url, world.artifacts_url, timeout_ms=10_000, access="platform")
    )
    app.warm()
    return app


def ask(app: LarderApplication, person: str) -> bytes:
    body = json.dumps({"user_id": person, "at": AT, "request_id": "r", "k": 20}).encode()
    response = http.handle(app, "POST", "/recommendations", JSON, body, deadline=None)
    assert response.status == 200, response.body
    return response.body


def answers_of_each_version(world: Released) -> dict[str, dict[bytes, str]]:
    """By person: the one answer that a function gives which has only ever had the one version, and that version."""
    found: dict[str, dict[bytes, str]] = {person: {} for person in PEOPLE}
    for version in world.versions:
        world.promote(version)
        fresh = make(world)
        for person in PEOPLE:
            answer = ask(fresh, person)
            assert json.loads(answer)["model_version"] == version
            assert json.loads(answer)["degraded"] == []
            found[person][answer] = version
        fresh.close()
    assert all(len(answers) == 2 for answers in found.values())
    return found


def flips_under_load(
    app: LarderApplication, world: Released, flips: int, callers: int = 3
) -> tuple[dict[str, int], list[object]]:
    """How often each version answered while the alias was moved `flips` times, and every answer that was wrong."""
    right = answers_of_each_version(world)
    seen = dict.fromkeys(world.versions, 0)
    faults: list[object] = []
    stopping = threading.Event()

    def call(number: int) -> None:
        while not stopping.is_set():
            person = PEOPLE[number % len(PEOPLE)]
            number += 1
            try:
                answer = ask(app, person)
            except AssertionError as error:
                faults.append(str(error))
                continue
            version = right[person].get(answer)
            if version is None:
                document = json.loads(answer)
                faults.append((person, document["model_version"], document["degraded"], len(document["items"])))
            else:
                seen[version] += 1

    threads = [threading.Thread(target=call, args=(number,)) for number in range(callers)]
    for thread in threads:
        thread.start()
    try:
        for flip in range(flips):
            version = world.versions[flip % 2]
            world.promote(version)
            # Most moves are waited for; every fourth is overtaken by the next one while it is being loaded.
            give_up_at = time.monotonic() + 30
            while flip % 4 and serving(app) != version:
                assert time.monotonic() < give_up_at, f"{version} never served"
                time.sleep(0.005)
    finally:
        stopping.set()
        for thread in threads:
            thread.join(30)
    return seen, faults


def serving(app: LarderApplication) -> str | None:
    ranker = app.models.current()
    return ranker.version if ranker else None
