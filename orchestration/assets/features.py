"""One daily partitioned asset per feature view, made from the declarations in schemas/views.py."""

import time
from datetime import date
from typing import Any

import dagster as dg

from orchestration import metadata
from orchestration.compute.materialise import materialise
from orchestration.metadata import column_schema
from orchestration.partitions import daily
from orchestration.ranges import asset_span, walk
from orchestration.resources import Larder
from schemas.features import FeatureView
from schemas.tables import view_table
from schemas.views import VIEWS

GROUP = "features"


def view_asset(view: FeatureView) -> dg.AssetsDefinition:
    """The asset that materialises `view`."""

    @dg.asset(
        name=view.name,
        group_name=GROUP,
        owners=[view.owner],
        kinds={"duckdb", "postgres"},
        partitions_def=daily(),
        backfill_policy=dg.BackfillPolicy.single_run(),
        deps=["events", "items"],
        description=_described(view),
        metadata=column_schema(view_table(view)),
        code_version=view.definition_hash,
    )
    def build_view(context: dg.AssetExecutionContext, larder: Larder) -> dg.MaterializeResult[Any]:
        def build(first: date, last: date) -> dict[date, dict[str, Any]]:
            start = time.monotonic()
            reports = materialise(view, first, last, url=larder.url, lake=larder.lake)
            seconds = (time.monotonic() - start) / max(len(reports), 1)
            return {
                report.partition_date: {
                    metadata.ROWS: report.rows,
                    "dagster/partition_row_count": report.rows,
                    metadata.EVENTS: report.events,
                    metadata.NULL_RATE: max(report.null_rates.values(), default=0.0),
                    metadata.SECONDS: seconds,
                }
                for report in reports
            }

        with asset_span(context):
            return walk(context, build)

    return build_view


def _described(view: FeatureView) -> str:
    rows = "\n".join(
        f"| `{feature.name}` | {feature.window_days} days | {feature.description} |" for feature in view.features
    )
    return f"{view.description}\n\n| feature | window | meaning |\n| --- | --- | --- |\n{rows}"


VIEW_ASSETS = [view_asset(view) for view in VIEWS]
