"""What is measured of the function, a section each. Answers are checked before they are timed; each runs in a process of its own."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from inference.http import handle
from inference.runtime import LarderApplication
from tests.benchmarks.serving_process import Client, cpu_seconds, postgres_processes, served
from tests.benchmarks.serving_replay import Recorder, alone, milliseconds
from tests.benchmarks.serving_world import Sizes, World, body, wish

Say = Callable[[str], None]
Found = dict[str, Any]
PATH = "/recommendations"
JSON = {"content-type": "application/json"}
WHOLE = b'"degraded":[]'


def found(numbers: dict[str, float | None], **details: Any) -> Found:
    return {"numbers": numbers, "details": details}


def headers(world: World) -> dict[str, str]:
    return {**JSON, "authorization": f"Bearer {world.key()}"}


def check(answer: bytes, world: World, k: int = 10) -> None:
    """An answer in full: k items of the catalogue, once each, the best first, by the model, nothing degraded."""
    document = json.loads(answer)
    assert document["degraded"] == [], document["degraded"]
    assert document["model_version"] == world.version
    scores = [item["score"] for item in document["items"]]
    assert len({item["item_id"] for item in document["items"]}) == k
    assert scores == sorted(scores, reverse=True)


# ---- one client


def latency(world: World, work: Path, sizes: Sizes, say: Say) -> Found:
    """One client over HTTP, with a wish and without; where the time goes, by asking Postgres and the ranker alone."""
    plain = [body(world, number) for number in range(sizes.requests)]
    wishing = [body(world, number, prompt=wish(number)) for number in range(sizes.requests)]
    with served(world.environment()) as (port, pid):
        client = Client(port, headers(world))
        for number in range(10):
            for more in ({}, {"prompt": wish(1_000_000 + number)}):
                status, answer = client.post(PATH, body(world, -1 - number, **more))
                assert status == 200, answer
                check(answer, world)
        warm(client, world, sizes)
        say("answers hold; timing them")
        backends = postgres_processes(world.url)
        began, ours, theirs = time.process_time(), cpu_seconds(pid), cpu_seconds(*backends)
        took = timed(client, plain)
        parts = {
            "client": time.process_time() - began,
            "function": cpu_seconds(pid) - ours,
            "postgres": cpu_seconds(*backends) - theirs,
        }
        took_wishing = timed(client, wishing)
        say("taking down what they ask, and asking it alone beside them")
        client.close()
        apart = replayed(world, plain[: sizes.replayed], port)
    cpu_ms = {f"one_client_cpu_{name}_ms": used / len(plain) * 1e3 for name, used in parts.items()}
    return found(
        {
            "p50_ms": float(np.median(took)),
            "prompt_p50_ms": float(np.median(took_wishing)),
            "p99_ms": float(np.quantile([*took, *took_wishing], 0.99)),
            "p99_without_prompt_ms": float(np.quantile(took, 0.99)),
            **apart,
            **cpu_ms,
            "one_client_cpu_ms": sum(cpu_ms.values()),
        },
        requests=len(plain),
    )


def warm(client: Client, world: World, sizes: Sizes) -> None:
    """Ask until the process has its items in memory; until then it answers from the tables."""
    until, number = time.monotonic() + sizes.warming_seconds, 10_000
    while time.monotonic() < until:
        number += 1
        timed(client, [body(world, number)])


def timed(client: Client, bodies: Sequence[bytes]) -> list[float]:
    """Milliseconds of each request, on one connection, one after the other."""
    took = []
    for one in bodies:
        began = time.perf_counter()
        status, answer = client.post(PATH, one)
        took.append((time.perf_counter() - began) * 1e3)
        assert status == 200, answer
        assert WHOLE in answer, answer
    return took


def replayed(world: World, bodies: Sequence[bytes], port: int, rounds: int = 3) -> dict[str, float]:
    """Of requests over HTTP: what of their time was Postgres and the ranker, each asked alone, and the rest, which is ours.

    Each request is asked over HTTP, in process and part by part one after the other, again and again: a machine that is
    slower for a while is so for all of them.
    """
    app = world.application(concurrency=1)
    try:
        ask_all(app, bodies)  # statements are prepared, plans made
        assert app.items.wait(60.0)
        ask_all(app, bodies)  # those of a process that has its items in memory, too
        trips = round_trips(app, world, bodies[0])
        recorder = Recorder()
        with recorder.recording():
            for one in bodies:
                recorder.begin()
                ask_all(app, [one])
        taken = recorder.taken
        assert {len(one.pipelines) for one in taken} == {trips}, "a request asked more than was taken down"
        client = Client(port, headers(world))

        def ask(one: bytes) -> tuple[float, float]:
            """Milliseconds over HTTP and in process."""
            return timed(client, [one])[0], milliseconds(lambda: ask_all(app, [one]))

        with alone(app.settings.database_url, taken) as ask_alone:
            times = np.array(
                [[(*ask(one), *ask_alone(number)) for number, one in enumerate(bodies)] for _ in range(rounds)]
            )
        client.close()
    finally:
        app.close()
    http, inside, person, candidates, first, rest = np.median(times, axis=0).T
    theirs = person + candidates + first + rest
    return {
        "own_overhead_ms": float(np.median(http - theirs)),
        "own_overhead_in_process_ms": float(np.median(inside - theirs)),
        "round_trips": trips,
        "postgres_ms": float(np.median(person + candidates)),
        "postgres_read_person_ms": float(np.median(person)),
        "postgres_pick_candidates_ms": float(np.median(candidates)),
        "ranker_ms": float(np.median(first + rest)),
        "ranker_500_ms": float(np.median(rest)),
    }


def ask_all(app: LarderApplication, bodies: Sequence[bytes]) -> None:
    for one in bodies:
        response = handle(app, "POST", PATH, JSON, one, deadline=None)
        assert response.status == 200, response.body
        assert WHOLE in response.body, response.body


def round_trips(app: LarderApplication, world: World, one: bytes) -> int:
    """How often a request waits for Postgres, seen on the wire: once for each Sync or Query that is sent."""
    path = Path(app.settings.artifacts_url.removeprefix("file://")) / "trace"
    with path.open("w") as file:
        with app.store.connection() as connection:
            connection.pgconn.trace(file.fileno())
        ask_all(app, [one])  # on the connection that was just given back: there is only one
        connection.pgconn.untrace()
    sent = [line.split("\t") for line in path.read_text().splitlines()]
    path.unlink()
    return sum(part.strip() in ("Sync", "Query") for line in sent if "F" in line[:2] for part in line)


# ---- many clients


def load(world: World, work: Path, sizes: Sizes, say: Say) -> Found:
    """So many clients at once, for a minute: errors, throughput, and what a request costs the processor by part."""
    said = headers(world)
    took: list[float] = []
    errors: list[str] = []
    with served(world.environment()) as (port, pid):
        one = Client(port, said)
        timed(one, [body(world, number) for number in range(20)])
        warm(one, world, sizes)
        say("one client, for the sum of the parts")
        alone = parts_ms(world, pid, lambda: timed(one, [body(world, n) for n in range(max(sizes.requests // 2, 5))]))
        one.close()
        many(port, said, world, 2.0 if sizes.load_seconds > 10 else 0.3, sizes.clients, [], errors)
        say(f"{sizes.clients} clients for {sizes.load_seconds:g} s")
        errors.clear()
        began = time.perf_counter()

        def ask() -> list[float]:
            many(port, said, world, sizes.load_seconds, sizes.clients, took, errors)
            return took

        each = parts_ms(world, pid, ask)
        seconds = time.perf_counter() - began
    used_ms, alone_ms = sum(each.values()), sum(alone.values())
    cores = os.cpu_count() or 1
    per_second = len(took) / seconds
    return found(
        {
            "concurrent_rps": per_second,
            "concurrent_errors": len(errors),
            "cpu_ms_per_request": each["function"] + each["postgres"],
            "concurrent_p50_ms": float(np.median(took)),
            "concurrent_p99_ms": float(np.quantile(took, 0.99)),
            "concurrent_cores_busy_rate": used_ms * per_second / 1e3 / cores,
            "concurrent_of_possible_rate": per_second * alone_ms / 1e3 / cores,
            **{f"concurrent_cpu_{name}_ms": value for name, value in each.items()},
            **{f"alone_cpu_{name}_ms": value for name, value in alone.items()},
        },
        errors=errors[:20],
        requests=len(took),
        cores=cores,
    )


def parts_ms(world: World, pid: int, ask: Callable[[], Sequence[float]]) -> dict[str, float]:
    """Milliseconds of processor time that each of the requests of `ask` costs: function, Postgres, and the clients here."""
    backends = set(postgres_processes(world.url))
    before = time.process_time(), cpu_seconds(pid), {one: cpu_seconds(one) for one in backends}
    requests = len(ask())
    there = set(postgres_processes(world.url))
    theirs = sum(cpu_seconds(one) - before[2].get(one, 0.0) for one in there)
    used = {
        "function": cpu_seconds(pid) - before[1],
        "postgres": theirs,
        "clients": time.process_time() - before[0],
    }
    return {name: value / max(requests, 1) * 1e3 for name, value in used.items()}


def many(
    port: int, said: dict[str, str], world: World, seconds: float, clients: int, took: list[float], errors: list[str]
) -> None:
    """`clients` connections that ask one after the other for `seconds`; milliseconds of each, and what went wrong."""
    until = time.perf_counter() + seconds

    def ask(number: int) -> None:
        client = Client(port, said)
        mine: list[float] = []
        while time.perf_counter() < until:
            number += clients
            began = time.perf_counter()
            try:
                status, answer = client.post(PATH, body(world, number))
            except OSError as error:
                errors.append(type(error).__name__)
                client = Client(port, said)
                continue
            mine.append((time.perf_counter() - began) * 1e3)
            if status != 200 or WHOLE not in answer:
                errors.append(f"{status} {answer[:200]!r}")
        client.close()
        took.extend(mine)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
