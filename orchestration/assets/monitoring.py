"""Assets that watch what is served: drift, and fairness with diversity. Each leaves a report below the deployment's folder."""

import os
from datetime import UTC, date, datetime, timedelta
from typing import Any

import dagster as dg

from orchestration import metadata
from orchestration.metadata import OWNER, column_schema
from orchestration.progress import progress
from orchestration.ranges import asset_span
from orchestration.resources import Larder
from schemas import tables

GROUP = "monitoring"
DRIFT, FAIRNESS = "drift", "fairness"
"""Folders of the reports below `reports/`."""
SEVERE = "severe"
"""Metadata of drift_report: how many findings ask for a new model. The sensor `retrain_on_drift` reads it."""
PROFILE_VARIABLE = "LARDER_FAIRNESS_PROFILE"
"""Columns of people's profiles, comma separated, by which quality may be told apart; none unless it is set."""
PROVIDER_VARIABLE = "LARDER_FAIRNESS_PROVIDER"
"""The items' attribute that says whose one is; `provider` unless it is set."""


class Day(dg.Config):
    """Which day's report."""

    day: str = ""
    """Such as 2030-01-31; empty: yesterday (UTC)."""

    def chosen(self) -> date:
        """The day. Raises dg.Failure for one that is none or is not over: half a day is not like a whole one."""
        yesterday = datetime.now(UTC).date() - timedelta(days=1)
        if not self.day:
            return yesterday
        try:
            day = date.fromisoformat(self.day)
        except ValueError:
            raise dg.Failure(f"day is {self.day!r}, which is no day; write for example 2030-01-31") from None
        if day > yesterday:
            raise dg.Failure(f"day is {day}, which is not over yet (UTC); the newest is {yesterday}")
        return day


@dg.asset(
    group_name=GROUP,
    owners=[OWNER],
    kinds={"postgres"},
    deps=[dg.AssetDep("events", partition_mapping=dg.AllPartitionMapping()), "items"],
    description="What was served yesterday and in the last seven days against the same days of the weeks before, and against "
    "the weeks that the champion learned from: features, scores, categories, vectors, picks, calibration. Its checks say "
    "what moved.",
    metadata=column_schema(tables.drift_sketches),
    code_version="1",
)
def drift_report(context: dg.AssetExecutionContext, config: Day, larder: Larder) -> dg.MaterializeResult[Any]:
    from orchestration.compute.drift.report import KINDS, drift_report
    from orchestration.compute.report_files import write_report

    with asset_span(context):
        report = drift_report(larder.url, larder.lake, larder.artifacts_url, config.chosen(), progress(context))
        plots = report.plots()
        place = write_report(larder.record.folder, DRIFT, report.day, report.to_dict(), plots)
    progress(context)(
        f"{len(report.alarms)} alarms, {len(report.severe)} severe, of {len(report.findings)} comparisons"
    )
    header = ["kind", "what", "test", "against", "distance", "matters from", "usual", "p", "state"]
    return dg.MaterializeResult(
        metadata={
            "day": report.day.isoformat(),
            metadata.ROWS: report.requests,
            "alarms": len(report.alarms),
            SEVERE: len(report.severe),
            **{f"alarms_{kind}": sum(one.state == "alarm" for one in report.of(kind)) for kind in KINDS},
            "champion": report.champion.version if report.champion else "none: the floor serves",
            **{f"{name}_days_behind": behind for name, behind in report.freshness.items() if behind is not None},
            **({} if report.curve is None else {"calibration_error": report.curve.curve.ece}),
            "findings": metadata.markdown_table(header, finding_rows(report.findings)),
            "psi_from_training_set": metadata.markdown_table(
                ["feature", "PSI"], [[name, f"{value:.3f}"] for name, value in report.trained.items()]
            ),
            **{f"plot_{title}": metadata.plot(title, draw) for title, draw in plots.items()},
            "report": dg.MetadataValue.path(str(place)),
        }
    )


def finding_rows(findings: list[Any]) -> list[list[str]]:
    """Rows for an asset's page: alarms first, then by how far they are on the way to one; what waits comes last."""

    def way(one: Any) -> tuple[int, float]:
        return {"alarm": 0, "quiet": 1}.get(one.state, 2), -abs(one.distance) / max(one.least, one.usual, 1e-12)

    rows = []
    for one in sorted(findings, key=way):
        figures = [f"{one.distance:.3f}", f"{one.least:.2f}", f"{one.usual:.3f}", f"{one.p:.1e}", one.state]
        told = ["", "", "", "", f"waiting: {one.words}"] if one.words else figures
        rows.append([one.kind, one.name, one.test, one.against, *told])
    return rows


@dg.asset(
    group_name=GROUP,
    owners=[OWNER],
    kinds={"postgres"},
    deps=[dg.AssetDep("events", partition_mapping=dg.AllPartitionMapping()), "items"],
    description="Who is shown against what people choose (by provider, category and popularity), whom the lists serve well "
    "(by history, age and declared profile columns), and how mixed, new and even they are, over the last two weeks.",
    code_version="1",
)
def fairness_report(context: dg.AssetExecutionContext, config: Day, larder: Larder) -> dg.MaterializeResult[Any]:
    from orchestration.compute.fairness.report import PROVIDER_ATTRIBUTE, fairness_report
    from orchestration.compute.report_files import write_report

    columns = [name.strip() for name in os.environ.get(PROFILE_VARIABLE, "").split(",") if name.strip()]
    with asset_span(context):
        report = fairness_report(
            larder.url,
            larder.lake,
            config.chosen(),
            provider=os.environ.get(PROVIDER_VARIABLE) or PROVIDER_ATTRIBUTE,
            profile_columns=columns,
            progress=progress(context),
        )
        plots = report.plots()
        place = write_report(larder.record.folder, FAIRNESS, report.day, report.to_dict(), plots)
    whole = report.whole
    return dg.MaterializeResult(
        metadata={
            "day": report.day.isoformat(),
            metadata.ROWS: report.requests,
            "people": report.people,
            "uneven_groups": len(report.uneven),
            "segments_left_behind": len(report.left_behind),
            "uneven": dg.MetadataValue.json(report.uneven),
            "left_behind": dg.MetadataValue.json(report.left_behind),
            **({} if whole is None else {"coverage_rate": whole.coverage_rate, "exposure_gini": whole.exposure_gini}),
            **({} if whole is None else {"novelty_bits": whole.novelty_bits}),
            **({} if whole is None or whole.diversity is None else {"diversity": whole.diversity}),
            **{kind: exposure_table(rows) for kind, rows in report.exposure.items()},
            "segments": segment_rows(report.segments),
            **{f"plot_{title}": metadata.plot(title, draw) for title, draw in plots.items()},
            "report": dg.MetadataValue.path(str(place)),
        }
    )


def exposure_table(rows: list[Any]) -> dg.MarkdownMetadataValue:
    """A row per group: its shares and their ratio."""
    return metadata.markdown_table(
        ["group", "items", "exposure", "relevance", "picks from lists", "exposure over relevance"],
        [
            [
                one.group,
                f"{one.items:,}",
                f"{one.exposure:.3f}",
                f"{one.relevance:.3f}",
                f"{one.picked:.3f}",
                _ratio(one) or one.words,
            ]
            for one in rows
        ],
    )


def segment_rows(rows: list[Any]) -> dg.MarkdownMetadataValue:
    """A row per segment: its picks against everybody else's."""
    return metadata.markdown_table(
        ["segment", "requests", "people", "pick rate", "reciprocal rank", "over everybody else"],
        [
            [
                one.segment,
                f"{one.requests:,}",
                f"{one.people:,}",
                "" if one.pick_rate is None else f"{one.pick_rate:.3f}",
                "" if one.reciprocal_rank is None else f"{one.reciprocal_rank:.3f}",
                _ratio(one) or one.words or "nobody picked",
            ]
            for one in rows
        ],
    )


def _ratio(one: Any) -> str:
    return "" if one.ratio is None else f"{one.ratio:.2f} ({one.low:.2f}–{one.high:.2f})"
