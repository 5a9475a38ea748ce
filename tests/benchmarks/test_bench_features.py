"""The feature bench works and its answers hold, in small; what it measures here means nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks.bench_features import KEYS, SECTIONS

ROOT = Path(__file__).parents[2]


def bench(out: Path, *arguments: str) -> dict[str, float]:
    """The last line of a quick run, as JSON."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.bench_features", "--quick", "--out", str(out)]
    ended = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    found: dict[str, float] = json.loads(ended.stdout.splitlines()[-1])
    (file,) = out.glob("features-quick-*.json")
    assert json.loads(file.read_text())["numbers"].items() >= found.items()
    return found


def test_reads_and_training_sets(tmp_path: Path) -> None:
    found = bench(tmp_path, "--only", "online,pit_many")
    assert found["round_trips"] == 1
    assert set(found) < set(KEYS)


@pytest.mark.prove
def test_every_figure_is_there(tmp_path: Path) -> None:
    assert list(bench(tmp_path)) == list(KEYS)


def test_a_section_that_is_not_there() -> None:
    command = [sys.executable, "-m", "tests.benchmarks.bench_features", "--only", "onlin"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert f"there is no section 'onlin'; known: {', '.join(SECTIONS)}" in ended.stderr
