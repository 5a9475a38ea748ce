"""Reports on disk: the newest day's in one place, old ones beside it, nothing half written."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path

import pytest
from matplotlib.axes import Axes

from orchestration.compute.report_files import write_report


def draw(axes: Axes) -> None:
    axes.plot([1, 2], [3, 4])


def test_the_newest_day_is_the_latest_whatever_order_they_come_in(tmp_path: Path) -> None:
    place = write_report(tmp_path, "drift", date(2026, 5, 2), {"day": "2"}, {"a": draw, "b": draw})
    write_report(tmp_path, "drift", date(2026, 5, 1), {"day": "1"}, {"a": draw, "c": draw})
    home = tmp_path / "reports" / "drift"
    assert json.loads((home / "latest.json").read_text()) == {"day": "2", "plots": ["a.png", "b.png"]}
    assert sorted(file.name for file in home.glob("*.png")) == ["a.png", "b.png"]
    assert (home / "a.png").read_bytes() == (place / "a.png").read_bytes()
    assert json.loads((home / "2026-05-01" / "report.json").read_text())["day"] == "1"
    write_report(tmp_path, "drift", date(2026, 5, 3), {"day": "3"}, {"c": draw})
    assert json.loads((home / "latest.json").read_text())["day"] == "3"
    assert [file.name for file in home.glob("*.png")] == ["c.png"]


def test_a_plot_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    write_report(tmp_path, "drift", date(2026, 5, 2), {"day": "2"}, {"a": draw})

    def broken(axes: Axes) -> None:
        raise RuntimeError("no ink")

    with pytest.raises(RuntimeError, match="no ink"):
        write_report(tmp_path, "drift", date(2026, 5, 3), {"day": "3"}, {"a": broken})
    home = tmp_path / "reports" / "drift"
    assert json.loads((home / "latest.json").read_text())["day"] == "2"
    assert not list(tmp_path.rglob("*.part"))


def test_what_is_no_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        write_report(tmp_path, "drift", date(2026, 5, 2), {"value": float("nan")}, {})
