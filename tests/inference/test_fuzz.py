"""Every door takes whatever comes: no 500, no hang, no growth of memory, and never an answer of another shape."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fuzz import Fuzzer, fault_of, slope_bytes
from fuzz_doors import DOORS, WARM_UP, Report
from fuzz_doors import fuzz as fuzzed
from fuzz_process import fuzz_apart
from released import ITEMS, PEOPLE, Released, released
from worlds import key_header, serving

from inference.http import handle
from inference.runtime import LarderApplication

GROWTH_BYTES = 200
"""Per request: what an allocator does by itself in twenty thousand requests comes to less."""


@pytest.fixture(scope="module")
def world(postgres_url: str, template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Released]:
    with released(postgres_url, template, tmp_path_factory.mktemp("released")) as made:
        yield made


@pytest.fixture(scope="module")
def app(world: Released) -> Iterator[LarderApplication]:
    made = LarderApplication.from_settings(serving(world.url, world.artifacts_url, request_log="off"))
    made.warm()
    yield made
    made.close()


@pytest.fixture(scope="module")
def key(world: Released) -> dict[str, str]:
    return key_header(world.url, per_minute=1_000_000)


def run(door: str, app: LarderApplication, key: dict[str, str], seed: int, requests: int) -> Report:
    return fuzzed(door, app, Fuzzer(seed, PEOPLE, ITEMS, key), requests)


@pytest.mark.parametrize("door", DOORS)
def test_some_hundred_requests(door: str, app: LarderApplication, key: dict[str, str]) -> None:
    report = run(door, app, key, 1, 500)
    assert report.errors == 0, report.faults
    assert report.slowest_seconds < 10
    # It is no test if everything is refused, or nothing.
    assert report.statuses[200] > 50, report.statuses
    assert sum(report.statuses.values()) - report.statuses[200] > 100, report.statuses


def test_a_process_of_its_own_finds_the_same(world: Released, key: dict[str, str]) -> None:
    report = fuzz_apart("gateway", world.url, world.artifacts_url, key, seed=1, requests=60, warm_up=20)
    assert (report.requests, report.errors) == (80, 0), report.faults
    assert sum(report.statuses.values()) == 80
    assert len(report.statuses) > 2
    with pytest.raises(RuntimeError, match=r"(?s)that fuzzed nowhere ended with 1: .*KeyError: 'nowhere'"):
        fuzz_apart("nowhere", world.url, world.artifacts_url, key, seed=1, requests=1)


@pytest.mark.prove
@pytest.mark.timeout(3_600)
@pytest.mark.parametrize("door", DOORS)
def test_twenty_thousand_requests(door: str, world: Released, key: dict[str, str]) -> None:
    report = fuzz_apart(door, world.url, world.artifacts_url, key, seed=2, requests=20_000)
    assert report.requests == 20_000 + WARM_UP
    assert report.errors == 0, report.faults
    assert report.slowest_seconds < 10
    assert report.slope_bytes_per_request < GROWTH_BYTES


def test_a_number_gives_the_same_request_again() -> None:
    one, other = Fuzzer(3, PEOPLE, ITEMS), Fuzzer(3, PEOPLE, ITEMS)
    assert [one.sent(number) for number in range(50)] == [other.sent(number) for number in reversed(range(50))][::-1]
    assert len({one.sent(number).body for number in range(200)}) > 100


def test_what_is_wrong_with_an_answer() -> None:
    assert fault_of(200, b"{}") is None
    assert fault_of(422, b'{"error":{"type":"invalid","message":"no"}}') is None
    assert "status 500" in (fault_of(500, b"{}") or "")
    assert "no JSON" in (fault_of(200, b"oops") or "")
    assert "one shape" in (fault_of(400, b'{"error":"no"}') or "")


def test_growth_is_seen_and_a_step_is_not() -> None:
    assert slope_bytes([(number, 10**8 + number * 500) for number in range(40)]) == 500
    assert slope_bytes([(number, 10**8 + (10**6 if number > 5 else 0)) for number in range(40)]) == 0


def test_a_door_that_breaks_is_found(
    app: LarderApplication, key: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(LarderApplication, "recommend", broken)
    report = run("asgi", app, key, 1, 100)
    assert report.errors > 3
    assert "status 500" in report.faults[0]
    response = handle(
        app, "POST", "/recommendations", {"content-type": "application/json", **key}, b'{"user_id":"u"}', deadline=None
    )
    assert response.status == 500
