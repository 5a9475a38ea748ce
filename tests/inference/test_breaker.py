"""The breaker: when it opens, who probes, what proves nothing."""

from __future__ import annotations

import threading

import pytest

from inference.breaker import Breaker, Resting
from inference.deadline import Deadline, Pace
from schemas.errors import Unavailable


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make(clock: Clock, **more: object) -> Breaker:
    return Breaker("it", failures=3, rest_seconds=1.0, clock=clock, **more)  # type: ignore[arg-type]


def fail(breaker: Breaker, error: Exception | None = None, *, conclusive: bool = True) -> None:
    with pytest.raises(type(error or OSError())), breaker.call(conclusive=conclusive):
        raise error or OSError


def test_three_failures_in_a_row_open_it_and_one_success_between_does_not() -> None:
    breaker = make(Clock())
    for _ in range(2):
        fail(breaker)
    with breaker.call():
        pass
    for _ in range(2):
        fail(breaker)
    assert breaker.state == "closed"
    fail(breaker)
    assert breaker.state == "open"
    with pytest.raises(Resting, match="it failed 3 times in a row"), breaker.call():
        pytest.fail("nothing may be asked while it rests")


def test_after_its_rest_one_call_probes_and_the_others_are_refused() -> None:
    clock = Clock()
    breaker = make(clock)
    for _ in range(3):
        fail(breaker)
    clock.now += 1.0
    assert breaker.state == "half-open"
    with breaker.call():
        with pytest.raises(Resting), breaker.call():
            pytest.fail("one probe at a time")
        assert breaker.state == "half-open"
    assert breaker.state == "closed"


def test_a_probe_that_fails_lets_it_rest_again() -> None:
    clock = Clock()
    breaker = make(clock)
    for _ in range(3):
        fail(breaker)
    clock.now += 1.0
    fail(breaker)
    assert breaker.state == "open"
    clock.now += 0.5
    with pytest.raises(Resting), breaker.call():
        pass
    clock.now += 0.5
    with breaker.call():
        pass
    assert breaker.state == "closed"


def test_whoever_gives_too_little_time_opens_nothing_and_frees_the_probe() -> None:
    clock = Clock()
    breaker = make(clock)
    for _ in range(50):
        fail(breaker, conclusive=False)
    assert breaker.state == "closed"
    for _ in range(3):
        fail(breaker)
    clock.now += 1.0
    fail(breaker, conclusive=False)
    assert breaker.state == "half-open", "it showed nothing; the next one may probe at once"


def test_an_error_that_is_an_answer_is_a_sign_of_life() -> None:
    breaker = make(Clock(), judge=lambda error: isinstance(error, KeyError))
    fail(breaker)
    fail(breaker)
    fail(breaker, KeyError("x"))
    fail(breaker)
    fail(breaker)
    assert breaker.state == "closed"


def test_of_many_threads_one_probes() -> None:
    clock = Clock()
    breaker = make(clock)
    for _ in range(3):
        fail(breaker)
    clock.now += 1.0
    gate, probing, asked, refused = threading.Barrier(8), threading.Event(), [], []

    def ask() -> None:
        gate.wait(10)
        try:
            with breaker.call():
                asked.append(1)
                probing.wait(10)
        except Resting:
            refused.append(1)
            if len(refused) == 7:
                probing.set()

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert (len(asked), len(refused)) == (1, 7)


def test_a_reset_forgets_what_another_machine_learned() -> None:
    breaker = make(Clock())
    for _ in range(3):
        fail(breaker)
    breaker.reset()
    with breaker.call():
        pass


def test_a_deadline_gives_shares_and_ends() -> None:
    deadline = Deadline.after(1_000)
    assert 480 < deadline.share_ms(0.5) <= 500
    assert 980 < deadline.left_ms() <= 1_000
    with pytest.raises(Unavailable, match="the deadline passed"):
        Deadline.after(-1).share_ms(0.5)


def test_a_step_that_lately_took_too_long_is_not_begun_and_is_tried_again_some_time() -> None:
    pace = Pace()
    assert pace.fits(0.1), "nothing is known yet"
    pace.took(100)
    assert pace.fits(150)
    refused = 0
    while not pace.fits(50):
        refused += 1
    assert 3 < refused < 20
