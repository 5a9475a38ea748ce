"""An alarm needs three things at once; what waits says for what; many comparisons share one rate of false alarms."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta

import numpy as np
import pytest

from orchestration.compute.drift.judge import (
    ALARM,
    FALSE_ALARM_RATE,
    KS,
    LOOKS,
    QUIET,
    WAITING,
    Finding,
    comparison,
    days_of_training,
    judge,
    level,
)
from orchestration.compute.drift.sketches import DAY, WEEK, Kept, Name, days_before, sketch

RNG = np.random.default_rng(5)
NAME = Name("features", "v.f", "1")


def window(mean: float = 0.0, n: int = 600) -> dict[Name, Kept]:
    return {NAME: sketch(RNG.normal(mean, 1, n), n)}


def judged(current: dict[Name, Kept], references: list[dict[Name, Kept]], others: int = 100) -> Finding:
    return next(one for one in judge([comparison(DAY, current, references)], others) if one.test == KS)


def test_half_a_sigma_alarms_and_nothing_does_not() -> None:
    before = [window() for _ in range(4)]
    assert judged(window(0.5), before).state == ALARM
    assert judged(window(), before).state == QUIET


def test_what_is_surely_there_and_too_small_to_matter_is_quiet() -> None:
    found = judged(window(0.15, 50_000), [window(n=50_000) for _ in range(4)])
    assert found.p < 1e-20
    assert found.state == QUIET


def test_what_is_large_and_may_be_chance_is_quiet() -> None:
    found = judged(window(0.5, 110), [window(n=110) for _ in range(2)], others=10_000_000)
    assert found.distance >= found.least
    assert found.state == QUIET


def test_a_trend_that_has_always_been_there_is_no_news() -> None:
    growing = [window(0.5 * step, 3_000) for step in range(5)]
    assert judged(growing[4], growing[:4]).state == QUIET
    assert judged(window(4.5, 3_000), growing[:4]).state == ALARM


@pytest.mark.parametrize("before", [2, 3])
def test_a_steady_trend_is_no_news_with_few_windows_either(before: int) -> None:
    """Each window is the one before it with a step more: on average, which one draw of windows cannot promise."""
    steps, jumps = 0, 0
    for _ in range(20):
        growing = [window(0.4 * step, 3_000) for step in range(before + 1)]
        steps += judged(growing[before], growing[:before]).state == ALARM
        jumps += judged(window(0.4 * before + 1.0, 3_000), growing[:before]).state == ALARM
    assert steps <= 1
    assert jumps == 20


def test_what_waits_says_for_what() -> None:
    few = judged(window(n=99), [window() for _ in range(4)])
    assert few.state == WAITING
    assert few.words == "99 people or items; from 100 on it is compared"
    alone = judged(window(), [window(), {}, window(n=50), {}])
    assert alone.state == WAITING
    assert alone.words == "1 windows before with 100 people or items; 2 are needed"


def test_another_version_is_not_compared() -> None:
    other = {Name("features", "v.f", "2"): window()[NAME]}
    assert judged(window(), [other, other]).state == WAITING


def test_all_comparisons_of_a_week_share_one_rate() -> None:
    assert level(50) * 50 * LOOKS == FALSE_ALARM_RATE
    assert level(0) == FALSE_ALARM_RATE / LOOKS


def test_twice_what_is_needed_is_severe() -> None:
    before = [window(n=3_000) for _ in range(4)]
    assert judged(window(1.0, 3_000), before).severe
    assert not judged(window(0.4, 3_000), before).severe
    assert not judged(window(0.0, 3_000), before).severe


def test_windows_hold_the_same_days_of_the_week() -> None:
    day = date(2026, 3, 4)
    assert {one.weekday() for one in days_before(day)} == {day.weekday()}
    for days_ago in (3, 40, 200):
        trained = datetime(2026, 3, 4, 12, tzinfo=UTC) - timedelta(days=days_ago)
        found = days_of_training(day, trained)
        assert {one.weekday() for one in found} == {day.weekday()}
        assert found == sorted(found)
        assert max(found) < min(days_before(day))
        assert max(found) < trained.date() or days_ago == 3
    assert WEEK == 7
