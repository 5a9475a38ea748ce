"""The drift bench at its smallest; in full it is the proof of the numbers that are claimed."""

from __future__ import annotations

import pytest

from tests.benchmarks import loop_drift


def test_a_quick_run_finds_shifts_and_leaves_quiet_weeks_alone() -> None:
    found = loop_drift.measure(quick=True)
    assert found["quiet_weeks"] == 2
    assert found["shifts"] == 3
    assert found["drift_detected_after"] is not None
    assert found["drift_detected_after"] <= loop_drift.WITHIN_REQUESTS
    assert found["drift_false_alarms"] == 0.0, found["weeks_with_alarm"]


def test_figures_are_of_all_weeks_and_the_slowest_feature() -> None:
    found = loop_drift.summary({"1/2": ["x"]}, 10, {"a": [100, 200], "b": [300, None]})
    assert found["drift_false_alarms"] == 0.1
    assert (found["slowest_feature"], found["drift_detected_after"]) == ("b", None)
    assert found["found_within_5000_rate"] == 0.75
    assert found["median_by_feature"] == {"a": 150, "b": 300}
    assert found["worst_by_feature"] == {"a": 200, "b": None}


@pytest.mark.prove
@pytest.mark.timeout(7_200)
def test_half_a_sigma_is_found_within_5000_requests_and_a_quiet_week_alarms_one_time_in_twenty_at_most() -> None:
    found = loop_drift.measure(quick=False)
    assert found["quiet_weeks"] >= 200
    assert found["drift_false_alarms"] <= 0.05, found["weeks_with_alarm"]
    assert found["drift_detected_after"] is not None
    assert found["drift_detected_after"] <= loop_drift.WITHIN_REQUESTS
    assert found["found_within_5000_rate"] >= 0.99, found["worst_by_feature"]
