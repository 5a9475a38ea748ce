"""Checks of the watching assets: one per kind of drift and of unfairness, with why it warns or errs.

Whether data is fresh has checks of its own, on the assets that make it (orchestration/checks.py); the report names how many
days each view lies behind.
"""

import json
from typing import Any

import dagster as dg

from orchestration.assets.monitoring import DRIFT, FAIRNESS, finding_rows
from orchestration.compute.drift.judge import ALARM, WAITING, Finding
from orchestration.compute.report_files import LATEST
from orchestration.metadata import markdown_table
from orchestration.resources import Larder

WARN, ERROR = dg.AssetCheckSeverity.WARN, dg.AssetCheckSeverity.ERROR

DRIFT_CHECKS: dict[str, tuple[str, dg.AssetCheckSeverity, str]] = {
    "features": (
        "features_as_before",
        ERROR,
        "The ranker is fed what it was fed before. An error: scores of what it never saw mean nothing, and the cause is as "
        "often a fault upstream as people who changed.",
    ),
    "scores": (
        "scores_as_before",
        WARN,
        "The champion's scores lie where they lay. A warning: they follow what features and picks show first.",
    ),
    "categories": (
        "categories_as_before",
        WARN,
        "Categories shown, candidate sources and degraded answers have the shares that they had. A warning: a season or a new "
        "part of the catalogue moves them by right; a moved `degraded` is for the runbook.",
    ),
    "vectors": (
        "vectors_as_before",
        WARN,
        "What people take and what they are shown lies in the text space where it lay. A warning: taste that moves is what "
        "training is for.",
    ),
    "labels": (
        "picks_as_before",
        ERROR,
        "People pick as often and as high up as before. An error: this is what the whole is for.",
    ),
    "calibration": (
        "calibrated_as_before",
        WARN,
        "Picks over the champion's own expectation are as before. A warning: the order, which decides what is shown, may be "
        "as good as it was.",
    ),
}


def read_latest(larder: Larder, name: str) -> dict[str, Any] | None:
    """The newest report of that name; None before the first."""
    file = larder.record.folder / "reports" / name / LATEST
    if not file.exists():
        return None
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def drift_check(kind: str) -> dg.AssetChecksDefinition:
    """The check of one kind of drift, on the newest report."""
    name, severity, description = DRIFT_CHECKS[kind]

    @dg.asset_check(asset="drift_report", name=name, description=description)
    def check(larder: Larder) -> dg.AssetCheckResult:
        report = read_latest(larder, DRIFT)
        if report is None:
            return dg.AssetCheckResult(passed=True, severity=severity, description="no report yet")
        found = [Finding(**one) for one in report["findings"] if one["kind"] == kind]
        alarms = [one for one in found if one.state == ALARM]
        compared = sum(one.state != WAITING for one in found)
        numbers: dict[str, Any] = {"day": report["day"], "compared": compared, "alarms": len(alarms)}
        if alarms:
            header = ["kind", "what", "test", "against", "distance", "matters from", "usual", "p", "state"]
            numbers["moved"] = markdown_table(header, finding_rows(alarms))
        words = f"{compared} comparisons"
        if alarms:
            words = "moved: " + ", ".join(sorted({f"{one.name} ({one.test} {one.distance:.2f} against {one.against})" for one in alarms}))  # fmt: skip
        elif not compared:
            words = (
                f"nothing to compare yet: {found[0].words}" if found else "nothing to compare yet: nothing was logged"
            )
        return dg.AssetCheckResult(passed=not alarms, severity=severity, metadata=numbers, description=words)

    return check


@dg.asset_check(
    asset="fairness_report",
    description="No group of items gets twice, or half, the exposure that people's choices earn it, beyond chance. A warning: "
    "what is fair is for people to say; floors, caps and quotas are settings of re-ranking.",
)
def exposure_follows_relevance(larder: Larder) -> dg.AssetCheckResult:
    return _fairness(larder, "uneven")


@dg.asset_check(
    asset="fairness_report",
    description="No segment of people picks half as often as everybody else, beyond chance. A warning: new people are harder "
    "to serve, and how much harder is what the report is for.",
)
def no_segment_left_behind(larder: Larder) -> dg.AssetCheckResult:
    return _fairness(larder, "left_behind")


def _fairness(larder: Larder, what: str) -> dg.AssetCheckResult:
    report = read_latest(larder, FAIRNESS)
    if report is None:
        return dg.AssetCheckResult(passed=True, severity=WARN, description="no report yet")
    found = report[what]
    return dg.AssetCheckResult(
        passed=not found,
        severity=WARN,
        metadata={"day": report["day"], "found": len(found), "requests": report["requests"]},
        description="; ".join(found) or ("nothing was served" if not report["requests"] else "none"),
    )


MONITORING_CHECKS = [*(drift_check(kind) for kind in DRIFT_CHECKS), exposure_follows_relevance, no_segment_left_behind]
