"""The serving bench works and its answers hold, in small; what it measures here means nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.bench_serving import KEYS, SECTIONS

ROOT = Path(__file__).parents[2]


def bench(folder: Path, *arguments: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A quick run's last line and its dated file."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.bench_serving", "--quick"]
    places = ["--work", str(folder / "work"), "--out", str(folder / "out")]
    ended = subprocess.run([*command, *places, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    (file,) = (folder / "out").glob("serving-quick-*.json")
    return json.loads(ended.stdout.splitlines()[-1]), json.loads(file.read_text())


def test_one_client_and_many(tmp_path: Path) -> None:
    found, report = bench(tmp_path, "--only", "latency,load")
    assert found["round_trips"] == 2
    assert found["concurrent_errors"] == 0
    assert found["concurrent_rps"] > 0
    numbers = report["sections"]["latency"]["numbers"]
    # The parts are of the whole.
    assert 0 < numbers["postgres_ms"] < numbers["p99_ms"]
    assert 0 < numbers["ranker_500_ms"] <= numbers["ranker_ms"] < numbers["p99_ms"]
    assert numbers["one_client_cpu_ms"] > 0
    again, _ = bench(tmp_path, "--only", "latency,load")  # from what is kept
    assert again == found


@pytest.mark.prove
@pytest.mark.timeout(1_800)
def test_every_figure(tmp_path: Path) -> None:
    found, _ = bench(tmp_path)
    assert list(found) == list(KEYS)
    assert (found["promotions_under_load_errors"], found["fuzz_errors"], found["concurrent_errors"]) == (0, 0, 0)


def test_a_section_that_is_not_there() -> None:
    command = [sys.executable, "-m", "tests.benchmarks.bench_serving", "--only", "latencies"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert f"there is no section 'latencies'; known: {', '.join(SECTIONS)}" in ended.stderr
