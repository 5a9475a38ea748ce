"""The asset of the skew audit: what was served to a sample of people against what training would see."""

from datetime import UTC, datetime, timedelta
from typing import Any

import dagster as dg

from orchestration import metadata
from orchestration.metadata import OWNER, column_schema
from orchestration.progress import progress
from orchestration.ranges import asset_span
from orchestration.resources import Larder
from schemas import tables

GROUP = "release"


class Audit(dg.Config):
    """Which reads to audit."""

    days: float = 2.0
    """So many days back from now."""
    since: str = ""
    """Or those since this instant, such as 2030-01-31T12:00:00+00:00: when what caused a bug was mended."""

    def first(self) -> datetime:
        """The first instant of reads to audit. Raises dg.Failure for a `since` that is none."""
        if not self.since:
            return datetime.now(UTC) - timedelta(days=self.days)
        try:
            since = datetime.fromisoformat(self.since)
        except ValueError:
            raise dg.Failure(
                f"since is {self.since!r}, which is no instant; write for example 2030-01-31T12:00:00+00:00"
            ) from None
        return since if since.tzinfo else since.replace(tzinfo=UTC)


@dg.asset(
    group_name=GROUP,
    owners=[OWNER],
    kinds={"duckdb", "postgres"},
    deps=[dg.AssetDep("events", partition_mapping=dg.AllPartitionMapping()), "items"],
    description="Feature vectors as they were served to a sample of people, recomputed from the lake by the code that makes "
    "training sets, as of each read. What differs has a cause: changed definition, late data, stale snapshot, or bug.",
    metadata=column_schema(tables.skew_audits),
    code_version="1",
)
def skew_audit(context: dg.AssetExecutionContext, config: Audit, larder: Larder) -> dg.MaterializeResult[Any]:
    from orchestration.compute.skew import CAUSES, audit, table, why_not_released

    with asset_span(context):
        report = audit(larder.url, larder.lake, config.first())
    if report.reads:
        found = ", ".join(f"{cause.replace('_', ' ')} {report.cause(cause):,}" for cause in CAUSES)
        progress(context)(f"{report.compared:,} values of {report.reads:,} reads recomputed; differing: {found}")
    else:
        progress(context)(
            "nothing to audit yet: nobody asked of the sample whose reads are logged (LARDER_AUDIT_PER_MILLE)"
        )
    if report.bugs:
        progress(context)(why_not_released(report.outcome()))
    header = ["view", "feature", "cause", "values", "example"]
    return dg.MaterializeResult(
        metadata={
            "reads": report.reads,
            metadata.ROWS: report.compared,
            **{f"mismatches_{cause}": report.cause(cause) for cause in CAUSES},
            "rows_left_out": report.left_out,
            "since": report.since.isoformat(timespec="seconds"),
            "mismatches": metadata.markdown_table(header, table(report)),
        }
    )
