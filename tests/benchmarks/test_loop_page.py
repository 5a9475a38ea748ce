"""The page's bench at its smallest: it runs, and its figures are within what is promised."""

from __future__ import annotations

import json

import pytest

from tests.benchmarks import loop_page
from tests.inference.browser import needs_chromium


@needs_chromium
def test_a_quick_run_keeps_the_promises(capsys: pytest.CaptureFixture[str]) -> None:
    loop_page.main(["--quick"])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 20_000 < report["page_bytes"] <= 200_000
    assert report["page_files"] >= 9
    assert 0 < report["page_fcp_ms"] <= 1_000
    assert 0 < report["feedback_visible_ms"] < 1_000
    assert report["feedback_rounds"] == 10
