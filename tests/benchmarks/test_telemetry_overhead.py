"""The overhead bench at its smallest: both halves run, and what was to be exported was."""

from __future__ import annotations

import json

import pytest

from tests.benchmarks import telemetry_overhead


def test_a_quick_run_compares_both_halves(capsys: pytest.CaptureFixture[str]) -> None:
    telemetry_overhead.main(["--quick"])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["requests"] == 20
    # And those of the log that is written after the answers, in batches.
    assert report["spans"] >= 2 * (10 + telemetry_overhead.WARM) * telemetry_overhead.SPANS
    assert report["p50_off_ms"] > 0
    assert report["p50_on_ms"] > 0
    assert report["quartiles"][0] <= report["telemetry_overhead_rate"] <= report["quartiles"][1]
