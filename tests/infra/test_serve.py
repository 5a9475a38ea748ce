"""`make serve` where nothing was run yet."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_serving_before_the_first_run_says_what_to_do(larder_home: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "infra.serve"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "nothing to serve" in done.stderr
    assert "`make run` first" in done.stderr
    assert not larder_home.exists()
