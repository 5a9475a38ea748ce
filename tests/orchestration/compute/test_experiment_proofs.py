"""What the statistics promise, on simulated runs of known truth: all thousand of them on request, a sample of them always.

The seeds judged are those of tests/benchmarks/loop_stats.py; nothing was tuned on them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.stats import binom

from tests.benchmarks import loop_stats
from tests.experiment_worlds import click_world, draw_clicks, expected_clicks


def likely(rate: float, wanted: float, runs: int, *, most: bool = False) -> bool:
    """Whether `rate` of so many runs may be had where `wanted` is the least (or the most) there should be."""
    hits = round(rate * runs)
    chance = binom.sf(hits - 1, runs, wanted) if most else binom.cdf(hits, runs, wanted)
    return bool(chance > 1e-4)


def test_a_sample_of_runs_keeps_every_promise() -> None:
    runs = loop_stats.QUICK_RUNS
    found: dict[str, Any] = loop_stats.measure(quick=True)
    assert likely(found["aa_reject_rate_each_person"], 0.05, runs, most=True)
    assert likely(found["aa_reject_rate_each_day"], 0.05, runs, most=True)
    assert likely(found["lift_power"], found["stated_power"], runs)
    assert found["srm_caught_exact"]
    assert likely(found["srm_caught"], 0.995, runs)
    assert likely(found["srm_false_alarms"], 0.002, runs, most=True)
    assert likely(found["snips_coverage"], 0.95, runs - found["off_policy_refused"])
    assert likely(found["dr_coverage"], 0.95, runs - found["off_policy_refused"])
    assert found["off_policy_refused"] <= runs / 8
    # And the promise is worth something: the usual interval, looked at as often, breaks it.
    assert found["aa_reject_rate_of_usual_intervals"] > 0.15


@pytest.mark.prove
@pytest.mark.timeout(1800)
def test_every_promise_holds_over_a_thousand_runs() -> None:
    found = loop_stats.measure(quick=False)
    assert found["aa_reject_rate"] <= 0.05
    assert found["lift_power"] >= found["stated_power"]
    assert found["srm_caught_exact"]
    assert found["srm_caught"] >= 0.995
    # Two tests of one in a thousand each: at most two, and what chance adds to a thousand runs.
    assert likely(found["srm_false_alarms"], 0.002, loop_stats.RUNS, most=True)
    assert found["srm_false_alarms_while_running"] <= 0.001
    assert found["snips_coverage"] >= 0.93
    assert found["dr_coverage"] >= 0.93


def test_the_worlds_truth_is_what_its_people_do() -> None:
    click = click_world().click[:200, :6]
    rng = np.random.default_rng(900)
    drawn = np.mean([draw_clicks(rng, click) for _ in range(400)], axis=0)
    assert drawn.mean(0) == pytest.approx(expected_clicks(click).mean(0), abs=0.004)
