"""`schemas/views.py` with an edit, for one process: what somebody who adds a feature would run.

A process calls `install` before anything imports the views. As a pytest plugin (`-p edited_views`) it gives every view
every aggregation, so that tests which walk the views walk them all.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path

from hypothesis import Phase, settings

EVERY_AGGREGATION = """
        active_days("active_days_7d", 7),
        count("shown_7d", 7, where="kind = 'view' OR kind = 'like'", state="shown"),
        sum_value("value_sum_30d", 30),
        min_value("value_min_7d", 7),
        max_value("value_max_30d", 30),
        last_value("last_value_1d", 1),
        last_value("last_value_30d", 30),
        last_seen("last_seen_age_30d", 30),
        decayed_count("decayed_events_30d", 30, half_life_days=2.5),
        ratio("rated_per_shown_30d", 30, counted("rated", "kind = 'rating'"), counted("shown", "kind = 'view' OR kind = 'like'")),
        ratio("paid_per_value_180d", 180, summed("paid", "kind = 'rating'"), summed("held", "value IS NOT NULL")),
"""
"""Features of every kind, some of them over a window shorter than a snapshot may be old."""


def install(edit: Callable[[str], str]) -> None:
    """Make `schemas.views` what `edit` makes of its source, in this process."""
    assert "schemas.views" not in sys.modules, "the views are imported already: install the edit first"
    spec = importlib.util.find_spec("schemas.views")
    assert spec is not None
    assert spec.origin is not None
    before = Path(spec.origin).read_text(encoding="utf-8")
    after = edit(before)
    assert after != before, "the edit changed nothing"
    module = importlib.util.module_from_spec(spec)
    sys.modules["schemas.views"] = module
    exec(compile(after, spec.origin, "exec"), module.__dict__)
    import schemas

    schemas.views = module  # type: ignore[attr-defined]


def add_feature(view: str, line: str) -> Callable[[str], str]:
    """The edit that adds `line` as the last feature of the view named `view`."""

    def edit(source: str) -> str:
        head, found, tail = source.partition(f'name="{view}",')
        assert found, f"there is no view {view} in schemas/views.py"
        features, end, rest = tail.partition("    ),\n)\n")
        assert end
        return f"{head}{found}{features}        {line.strip()}\n{end}{rest}"

    return edit


def every_aggregation(source: str) -> str:
    """The edit that gives every view every aggregation."""
    names = "active_days, counted, last_value, max_value, min_value, ratio, sum_value, summed"
    source = source.replace("\n_LIKED", f"\nfrom schemas.features import {names}\n\n_LIKED", 1)
    for view in ("user_activity", "item_activity", "user_affinity"):
        source = add_feature(view, EVERY_AGGREGATION)(source)
    return source


if "LARDER_TEST_WORLDS" in os.environ:
    install(every_aggregation)
    # A world that fails is told as it is: making it smaller takes many minutes with a database behind it.
    settings.register_profile("as found", phases=[Phase.explicit, Phase.reuse, Phase.generate])
    settings.load_profile("as found")
