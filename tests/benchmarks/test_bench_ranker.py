"""The ranker bench works and its answers hold, in small and on a simulated world; what it measures here means nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.bench_ranker import KEYS, SECTIONS

ROOT = Path(__file__).parents[2]


def bench(folder: Path, *arguments: str) -> tuple[dict[str, Any], dict[str, Any], str]:
    """A quick run's last line, its dated file and all it printed."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.bench_ranker", "--quick"]
    places = ["--work", str(folder / "work"), "--out", str(folder / "out")]
    ended = subprocess.run([*command, *places, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    (file,) = (folder / "out").glob("ranker-quick-*.json")
    return json.loads(ended.stdout.splitlines()[-1]), json.loads(file.read_text()), ended.stdout


def test_sequences_and_the_same_checkpoint_in_int8(tmp_path: Path) -> None:
    found, report, printed = bench(tmp_path, "--only", "ml1m")
    rows = {row["name"]: row for row in report["sections"]["ml1m"]["details"]["evaluation"]["rows"]}
    assert found["ml1m_ndcg_at_10"] == pytest.approx(rows["ranker"]["ndcg"]["10"], abs=1e-6)
    assert found["ml1m_co_visitation_ndcg_at_10"] == pytest.approx(rows["co-visitation"]["ndcg"]["10"], abs=1e-6)
    for name in ("popularity", "7-day popularity", "co-visitation", "item-kNN", "ALS", "ranker", "ranker, int8"):
        assert f"\n{name} " in printed, name
    # No row of MovieLens was read, and both the table and the result say so.
    assert found["data"] == report["data"] == "simulated"
    assert printed.startswith("data: a simulated world, not MovieLens")


@pytest.mark.prove
def test_every_figure_and_a_repeat(tmp_path: Path) -> None:
    found, _, _ = bench(tmp_path)
    assert list(found) == ["data", *KEYS]
    again, _, _ = bench(tmp_path)  # from what is kept, in seconds
    assert again == found


def test_a_section_that_is_not_there() -> None:
    command = [sys.executable, "-m", "tests.benchmarks.bench_ranker", "--only", "ml1"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert f"there is no section 'ml1'; known: {', '.join(SECTIONS)}" in ended.stderr
