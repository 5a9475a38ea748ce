"""The bench of explanations and rules runs whole on a small world, and its figures are figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.loop_explain import SETTINGS, measure


@pytest.mark.prove
def test_every_figure_is_there_and_no_rule_is_broken(tmp_path: Path) -> None:
    found = measure(quick=True, folder=tmp_path)
    assert found["rules_broken"] == 0
    assert found["rules_requests"] == 200
    assert 0 <= found["explanation_fidelity"] <= 1
    assert found["explanation_cases"] > 0
    assert found["explain_added_p50_ms"] > 0
    assert isinstance(found["diversity_monotone"], bool)
    assert len(found["diversity_by_setting"]) == len(SETTINGS)
