"""The tests against the oracle again, on views that hold every aggregation of every entity."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def check_worlds(url: str, folder: Path, worlds: int, which: str, *files: str) -> None:
    """Run the tests of `files` with `which` in their names on so many random worlds each, in a process with edited views.

    That process and its sessions live in a time zone with summer time, which nothing may depend on.
    """
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-p", "edited_views", "-k", which, "--timeout=3000", "-x"),
            *(f"--basetemp={folder / 'worlds'}", "-p", "no:cacheprovider", *(str(HERE / file) for file in files)),
        ],
        cwd=HERE.parents[2],
        env={
            **os.environ,
            "LARDER_TEST_DATABASE_URL": url,
            "LARDER_TEST_WORLDS": str(worlds),
            "PYTHONPATH": str(HERE.parents[1]),
            "TZ": "America/New_York",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout or "[100%]" in done.stdout, done.stdout


@pytest.mark.timeout(900)
def test_every_aggregation_equals_the_oracle_on_every_path(postgres_url: str, tmp_path: Path) -> None:
    check_worlds(postgres_url, tmp_path, 5, "oracle", "test_windows.py", "test_explain.py")


@pytest.mark.prove
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "path", ["windows_equal_the_oracle", "point_in_time_equals_the_oracle", "head_online_equals_the_oracle"]
)
def test_every_aggregation_on_a_thousand_worlds(path: str, postgres_url: str, tmp_path: Path) -> None:
    check_worlds(postgres_url, tmp_path, 1000, path, "test_windows.py")
