"""The feature views of schemas/views.py as daily assets: what each says of itself, and how its days are built."""

import time
from datetime import date

import dagster as dg

from orchestration import metadata
from orchestration.compute.engines import Engine
from orchestration.compute.materialise import materialise
from orchestration.compute.measures import failed
from orchestration.compute.settle import Built
from orchestration.metadata import column_schema
from orchestration.partitions import daily
from orchestration.ranges import Stage
from orchestration.resources import Larder
from schemas.features import FeatureView
from schemas.tables import view_table
from schemas.views import VIEWS

GROUP = "features"


def view_spec(view: FeatureView) -> dg.AssetSpec:
    """What the asset of `view` says of itself."""
    return dg.AssetSpec(
        view.name,
        group_name=GROUP,
        owners=[view.owner],
        kinds={"duckdb", "postgres"},
        deps=["events", "items"],
        partitions_def=daily(),
        description=_described(view),
        metadata=column_schema(view_table(view)),
        code_version=view.definition_hash,
    )


def view_stage(view: FeatureView, larder: Larder, engine: Engine) -> Stage:
    """How the days of `view` are built from the lake, by `engine`."""

    def build(first: date, last: date) -> dict[date, Built]:
        start = time.monotonic()
        reports = materialise(view, first, last, url=larder.url, lake=larder.lake, engine=engine)
        seconds = (time.monotonic() - start) / max(len(reports), 1)
        return {
            report.partition_date: Built(
                {
                    metadata.ROWS: report.rows,
                    "dagster/partition_row_count": report.rows,
                    metadata.EVENTS: report.events,
                    metadata.NULL_RATE: report.measures.get("null_rate", 0.0),
                    metadata.SECONDS: seconds,
                    "engine": engine.name,
                    **metadata.over_day_before(report.measures),
                },
                report.measures,
                failed(view.checks, report.measures),
            )
            for report in reports
        }

    return Stage(view.name, build, view.checks, reads="events", window_days=view.max_window_days)


def _described(view: FeatureView) -> str:
    rows = "\n".join(f"| `{one.name}` | {one.window_days} | {one.description} |" for one in view.features)
    return f"{view.description}\n\n| feature | window, days | meaning |\n| --- | --- | --- |\n{rows}"


VIEW_SPECS = [view_spec(view) for view in VIEWS]
