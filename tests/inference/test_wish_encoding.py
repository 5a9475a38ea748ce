"""A wish is encoded while the person is read: once, as it will be wanted, and in nobody's way."""

from __future__ import annotations

import threading
import time
from contextlib import nullcontext

import numpy as np
import pytest

from inference.deadline import Deadline
from inference.wish_encoding import Vector, WishEncoding
from inference.wishes import ParsedWish
from schemas import prompts
from schemas.errors import ArtifactError
from schemas.ranker import TEXT_DIM

TEMPLATE = prompts.DEFAULTS["wish"]


class Slow:
    """An encoder that takes its time, and remembers what it was asked."""

    def __init__(self, seconds: float = 0.0, error: Exception | None = None) -> None:
        self.seconds, self.error = seconds, error
        self.asked: list[tuple[str, str | None, bool]] = []

    def encode(self, text: str, left_ms: float, space: str | None = None) -> Vector:
        self.asked.append((text, space, threading.current_thread() is threading.main_thread()))
        time.sleep(self.seconds)
        if self.error is not None:
            raise self.error
        return np.full(TEXT_DIM, len(text), np.float32)


def vector(encoding: WishEncoding, said: str, template: str, space: str | None) -> tuple[Vector | None, list[str]]:
    degraded: list[str] = []
    return encoding.vector(ParsedWish(said), template, space, degraded, lambda _: nullcontext()), degraded


def worded(said: str) -> str:
    return prompts.render_wish(prompts.load(TEMPLATE), said)


def test_it_goes_on_while_something_else_is_waited_for() -> None:
    encoder = Slow(0.2)
    encoding = WishEncoding(encoder, Deadline.after(5_000))
    encoding.begin("quiet films", TEMPLATE, "s")
    time.sleep(0.3)  # the person is read
    began = time.monotonic()
    found, degraded = vector(encoding, "quiet films", TEMPLATE, "s")
    assert time.monotonic() - began < 0.15
    assert (found is not None, degraded) == (True, [])
    assert encoder.asked == [(worded("quiet films"), "s", False)]


@pytest.mark.parametrize(
    ("said", "template", "space"),
    [("quiet", TEMPLATE, "s"), ("quiet films", TEMPLATE, "other")],
    ids=["read by a language model", "of another model"],
)
def test_what_turns_out_to_be_wanted_otherwise_is_encoded_anew(said: str, template: str, space: str) -> None:
    encoder = Slow()
    encoding = WishEncoding(encoder, Deadline.after(5_000))
    encoding.begin("quiet films", TEMPLATE, "s")
    found, _ = vector(encoding, said, template, space)
    assert found is not None
    assert found[0] == len(worded(said))
    assert encoder.asked[-1] == (worded(said), space, True)


@pytest.mark.parametrize("begun", [True, False])
def test_what_fails_is_named_and_the_wish_left_out(begun: bool) -> None:
    encoding = WishEncoding(Slow(error=ArtifactError("changed")), Deadline.after(5_000))
    if begun:
        encoding.begin("quiet films", TEMPLATE, "s")
    assert vector(encoding, "quiet films", TEMPLATE, "s") == (None, ["wish"])


def test_nobody_waits_for_it_beyond_their_time() -> None:
    encoding = WishEncoding(Slow(3.0), Deadline.after(200))
    encoding.begin("quiet films", TEMPLATE, "s")
    began = time.monotonic()
    assert vector(encoding, "quiet films", TEMPLATE, "s") == (None, ["wish"])
    assert time.monotonic() - began < 1.0


def test_a_template_that_is_not_there_is_a_wish_left_out() -> None:
    encoding = WishEncoding(Slow(), Deadline.after(5_000))
    encoding.begin("quiet films", "no-such-template", "s")
    assert vector(encoding, "quiet films", "no-such-template", "s") == (None, ["wish"])


def test_without_a_wish_there_is_nothing() -> None:
    encoding = WishEncoding(Slow(), Deadline.after(5_000))
    degraded: list[str] = []
    assert encoding.vector(None, TEMPLATE, "s", degraded, lambda _: nullcontext()) is None
    assert degraded == []
