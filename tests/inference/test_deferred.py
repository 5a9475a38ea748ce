"""Work that waits for the answer to be out: in order, bounded, and nobody's fault if it fails."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from inference import deferred
from inference.deferred import Deferred


def test_it_is_done_soon_in_order_by_another_thread() -> None:
    later = Deferred()
    done: list[tuple[int, str]] = []
    ready = threading.Event()

    def note(number: int) -> None:
        done.append((number, threading.current_thread().name))

    for number in range(100):
        later.add(note, number)
    later.add(ready.set)
    assert ready.wait(10)
    assert done == [(number, "larder-telemetry") for number in range(100)]


def test_a_crowd_is_not_kept_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deferred, "PAUSE_SECONDS", 60.0)
    monkeypatch.setattr(deferred, "CROWD", 50)
    later, ready = Deferred(), threading.Event()
    later.add(ready.set)
    assert not ready.wait(0.3)
    for _ in range(49):
        later.add(int)
    assert ready.wait(10)


def test_a_drain_does_what_waits_at_once() -> None:
    later = Deferred()
    done: list[int] = []
    later.add(done.append, 1)
    later.drain()
    assert done == [1]


def test_one_that_fails_takes_no_other_with_it(caplog: pytest.LogCaptureFixture) -> None:
    later = Deferred()
    done: list[int] = []

    def fail() -> None:
        raise KeyError("CANARY")

    later.add(fail)
    later.add(done.append, 1)
    later.drain()
    assert done == [1]
    assert "a piece of telemetry was lost: KeyError" in caplog.text
    assert "CANARY" not in caplog.text


def test_more_than_can_wait_is_dropped_and_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(deferred, "CAPACITY", 10)
    later = Deferred()
    done: list[int] = []
    with later._draining:  # nothing is taken out meanwhile
        for number in range(15):
            later.add(done.append, number)
    later.drain()
    assert done == list(range(10))
    assert "5 pieces of telemetry were lost" in caplog.text


def test_a_forked_process_works_its_own_off() -> None:
    script = """
import os, threading
from inference.deferred import Deferred
later, ready = Deferred(), threading.Event()
later.add(ready.set)
assert ready.wait(10)
ours, theirs = os.pipe()
child = os.fork()
if child == 0:
    done = threading.Event()
    later.add(os.write, theirs, b"done")
    later.add(done.set)
    os._exit(0 if done.wait(10) else 1)
assert os.waitpid(child, 0)[1] == 0
print(os.read(ours, 4).decode())
"""
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": "."},
        timeout=60,
    )
    assert ran.stdout == "done\n", ran.stderr
