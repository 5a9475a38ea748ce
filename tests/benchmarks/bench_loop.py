"""`make bench-loop`: what the loop claims, proven on worlds whose truth is known: experiments, drift, explanations, the page.

A section is a process of its own; each says where its figures come from (loop_stats, loop_drift, loop_explain, loop_page). With
`--work` what is finished is kept, and the next start goes on from there. The last line is one JSON object.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from tests.benchmarks import frame

SECTIONS = ("stats", "drift", "explain", "page")
KEYS = (
    "aa_reject_rate",
    "lift_power",
    "srm_caught",
    "snips_coverage",
    "dr_coverage",
    "drift_detected_after",
    "drift_false_alarms",
    "explanation_fidelity",
    "explain_added_p50_ms",
    "rules_broken",
    "diversity_monotone",
    "feedback_visible_ms",
    "page_bytes",
    "page_fcp_ms",
)
"""What the last line holds, of the sections that ran."""


def main(arguments: Sequence[str] | None = None) -> int:
    options, chosen = frame.options(__doc__, SECTIONS, "nobody", arguments)
    with tempfile.TemporaryDirectory(prefix="larder-bench-", ignore_cleanup_errors=True) as scratch:
        work = (options.work or Path(scratch)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        report: dict[str, Any] = {
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "quick": options.quick,
            "machine": frame.machine(),
            "sections": {},
        }
        for name in chosen:
            report["sections"][name] = frame.kept(work, name, partial(frame.apart, name, measure, name, options.quick))
    found = {key: value for section in report["sections"].values() for key, value in section.items() if key in KEYS}
    frame.write(options.out, "loop", report)
    width = max(len(key) for key in KEYS)
    for key in KEYS:
        if key in found:
            print(f"{key:<{width}} {found[key]}")
    print(json.dumps({key: found[key] for key in KEYS if key in found}))
    return 0


def measure(name: str, quick: bool) -> dict[str, Any]:
    """A section's figures, in this process."""
    found: dict[str, Any] = importlib.import_module(f"tests.benchmarks.loop_{name}").measure(quick)
    return found


if __name__ == "__main__":
    sys.exit(main())
