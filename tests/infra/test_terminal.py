"""A declaration that is wrong ends every command with one line, although it is found before any `main` runs."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from edited_views import add_feature

ROOT = Path(__file__).parents[2]


def command(tmp_path: Path, module: str, line: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m module` of a copy of the project that has `line` among its features."""
    for package in ("schemas", "inference", "infra", "orchestration"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    views = tmp_path / "schemas" / "views.py"
    views.write_text(add_feature("item_activity", line)(views.read_text()))
    return subprocess.run(
        [sys.executable, "-m", module, "--help"], cwd=tmp_path, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    "module", ["orchestration.run", "orchestration.backfill", "orchestration.features", "infra.serve", "infra.ui"]
)
def test_a_wrong_declaration_is_one_line(tmp_path: Path, module: str) -> None:
    done = command(tmp_path, module, 'count("never", 0),')
    assert done.stderr == (
        "error (definition): feature 'never' of view 'item_activity' has a window of 0 days; "
        "a window is a whole number of days, 1 to 3650\n"
    )
    assert (done.returncode, done.stdout) == (1, "")


def test_other_errors_keep_their_traceback(tmp_path: Path) -> None:
    done = command(tmp_path, "orchestration.features", 'cuont("never", 1),')
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "NameError" in done.stderr
