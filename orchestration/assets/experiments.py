"""The asset of experiments: what each running one says today, and the checks that its split and its guardrails hold."""

from datetime import UTC, datetime
from typing import Any

import dagster as dg

from orchestration import metadata
from orchestration.metadata import OWNER
from orchestration.progress import progress
from orchestration.ranges import asset_span
from orchestration.resources import Larder

GROUP = "loop"
NAME = "experiment_report"

# One asset over all that run, not a partition for each: experiments come and go with a file that is edited, a report looks
# at all days at once, and nothing is ever backfilled, since what was known on an old day is in today's plot.


@dg.asset(
    name=NAME,
    group_name=GROUP,
    owners=[OWNER],
    kinds={"duckdb", "postgres"},
    deps=[dg.AssetDep("events", partition_mapping=dg.AllPartitionMapping())],
    check_specs=[
        dg.AssetCheckSpec(
            "sample_ratio",
            asset=NAME,
            description="People are split among the arms as declared (safe to look at every day, p < 0.001).",
        ),
        dg.AssetCheckSpec(
            "guardrails",
            asset=NAME,
            description="No arm is known to do harm beyond what its guardrails allow. What breaks one is switched off.",
        ),
    ],
    description="Every running experiment: a verdict in words, each metric with an interval that holds however often one looks, "
    "guardrails, segments, what shadows would be worth. An arm that breaks a guardrail is switched off, a released version "
    "that does is rolled back.",
    code_version="1",
)
# Beside checks Dagster knows the bare type only.
def experiment_report(context: dg.AssetExecutionContext, larder: Larder) -> dg.MaterializeResult:  # type: ignore[type-arg]
    from orchestration.compute.experiments.reports import report_all

    with asset_span(context), larder.connect() as connection:
        found = report_all(
            connection,
            larder.lake,
            larder.record.folder,
            larder.artifacts_url,
            larder.record.experiments,
            datetime.now(UTC),
            progress(context),
        )
    if not found:
        progress(context)("no experiment runs")
    shown: dict[str, Any] = {"experiments": len(found), "verdicts": _verdicts(found)}
    for one in found:
        if one.report is not None:
            shown |= _page(one)
    return dg.MaterializeResult(metadata=shown, check_results=[_sample_ratio(found), _guardrails(found)])


def _verdicts(found: list[Any]) -> dg.MarkdownMetadataValue:
    rows = []
    for one in found:
        words = one.report.decision.words if one.report else one.reason
        verdict = f"**{one.report.decision.verdict}**" if one.report else "faulty" if one.faulty else "no data"
        people = f"{one.report.people:,}" if one.report else "0"
        rows.append([one.name, verdict, people, " ".join([words, *one.done])])
    return metadata.markdown_table(["experiment", "verdict", "people", "why, and what was done"], rows)


def _page(one: Any) -> dict[str, Any]:
    """The numbers and plots of one experiment, each entry under its name."""
    from orchestration.compute.experiments import picture

    report = one.report
    rows = [
        [
            row.metric.name,
            row.arm,
            "–" if row.control is None else f"{row.control:.4f}",
            "–" if row.treated is None else f"{row.treated:.4f}",
            "–" if row.lift is None else f"{row.lift:+.2%} ({row.low:+.2%} to {row.high:+.2%})",
            f"{row.p:.2g}",
            str(row.state),
        ]
        for row in report.findings
    ]
    rows += [
        [
            f"{row.metric.name} (guardrail)",
            row.arm,
            "",
            "",
            "–" if row.harm is None else f"harm {row.harm:+.2%} (≥ {row.at_least:+.2%}, ≤ {row.at_most:+.2%})",
            "",
            str(row.state),
        ]
        for row in report.guards
    ]
    shown: dict[str, Any] = {
        f"{one.name}: numbers": metadata.markdown_table(
            ["metric", "arm", "control", "arm's", "lift", "p", "state"], rows
        ),
        f"{one.name}: split": metadata.plot(
            f"{one.name}: people by arm", lambda axes: picture.draw_split(axes, report)
        ),
        f"{one.name}: files": dg.MetadataValue.path(str(one.file.parent)),
    }
    if report.series:
        shown[f"{one.name}: lift"] = metadata.plot(
            f"{one.name}: {report.series[0].metric.words}", lambda axes: picture.draw_effect(axes, report)
        )
        shown[f"{one.name}: segments"] = metadata.plot(
            f"{one.name}: by segment", lambda axes: picture.draw_segments(axes, report)
        )
    if one.templates is not None:
        shown[f"{one.name}: templates"] = metadata.markdown_table(
            ["arm", "template", "offline", "online"],
            [
                [row.arm, row.template, *(_number(value) for value in (row.offline, row.online))]
                for row in one.templates.rows
            ],
        )
    told = [*report.notes, *one.shadows.values(), *([one.templates.words()] if one.templates else [])]
    if told:
        shown[f"{one.name}: notes"] = dg.MetadataValue.md("\n".join(f"- {line}" for line in told))
    return shown


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _sample_ratio(found: list[Any]) -> dg.AssetCheckResult:
    from orchestration.compute.experiments.decide import Verdict

    reports = [one.report for one in found if one.report is not None]
    broken = [report for report in reports if report.decision.verdict is Verdict.BROKEN_SPLIT]
    return dg.AssetCheckResult(
        check_name="sample_ratio",
        passed=not broken,
        severity=dg.AssetCheckSeverity.ERROR,
        metadata={report.experiment.name: report.split.sequential_p for report in reports},
        description="; ".join(f"{report.experiment.name}: {report.decision.words}" for report in broken)
        or f"{len(reports)} experiments are split as declared",
    )


def _guardrails(found: list[Any]) -> dg.AssetCheckResult:
    reports = [one.report for one in found if one.report is not None]
    faulty = [one.reason for one in found if one.faulty]
    broken = [(one, guard) for one in found if one.report for guard in one.report.decision.breached]
    done = [
        line
        for one in dict.fromkeys(one.name for one, _ in broken)
        for row in found
        if row.name == one
        for line in row.done
    ]
    return dg.AssetCheckResult(
        check_name="guardrails",
        passed=not broken and not faulty,
        severity=dg.AssetCheckSeverity.ERROR,
        metadata={
            "guardrails": sum(len(report.guards) for report in reports),
            "broken": len(broken),
            "unwatched": len(faulty),
        },
        description="; ".join([*(f"{one.name}: {guard.words}" for one, guard in broken), *done, *faulty])
        or f"no guardrail of {len(reports)} experiments is broken",
    )
