"""What the small worlds of the oracle do not reach: long recurrences, and sums that leave 64 bits."""

from __future__ import annotations

import numpy as np
import pytest

from orchestration.compute.exact import MICRO
from orchestration.compute.timeline import DAY, Timeline, recur
from schemas.features import USER, FeatureView, last_seen, mean_value


@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 255, 256, 257, 5_000])
def test_a_recurrence_is_what_it_is_one_by_one(n: int) -> None:
    rng = np.random.default_rng(n)
    added, kept = rng.random(n), np.where(rng.random(n) < 0.02, 0.0, rng.random(n))
    expected, so_far = [], 0.0
    for plus, rate in zip(added, kept, strict=True):
        so_far = so_far * rate + plus
        expected.append(so_far)
    np.testing.assert_allclose(recur(added, kept), expected, rtol=1e-13)


def test_sums_stay_exact_where_a_running_total_leaves_64_bits() -> None:
    view = FeatureView("sums", USER, "team:x", "", 3, (mean_value("value_mean_1d", 1), last_seen("age_seconds", 1)))
    many, value = 40_000, 10**9 * MICRO + 1
    # One event a day: a window holds two, the running total all of them.
    occurred = np.arange(many) * DAY + 5
    parts = {
        state.name: np.ma.masked_array([value], [False])
        for state in view.states
        if not state.is_count and not state.is_instant
    }
    timeline = Timeline(view, np.zeros(many, np.int64), occurred, occurred, np.zeros(many, np.int64), parts)
    columns, present = timeline.read(np.zeros(2, np.int64), occurred[[7, -1]] + DAY - 10)
    assert present.all()
    sums = next(columns[name] for name, state, _ in view.columns if state.name in parts)
    assert sums.tolist() == [2 * value / MICRO] * 2
