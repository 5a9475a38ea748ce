"""After a run that died without a word (killed, out of memory): what it had written is reported written.

A view's data and its ledger row are one transaction, so the ledger knows what Dagster was not told.
"""

from __future__ import annotations

from datetime import UTC, date, datetime

import dagster as dg

from orchestration import metadata
from orchestration.instance_api import RANGE_END_TAG, RANGE_START_TAG
from orchestration.resources import Larder
from schemas.views import VIEWS


def report_what_was_written(instance: dg.DagsterInstance, run: dg.DagsterRun, larder: Larder) -> int:
    """Report every partition of the run's views that the ledger says was written since it began; how many.

    A partition that any run has reported since it was written is left alone, so calling this again changes nothing.
    """
    record = instance.get_run_record_by_id(run.run_id)
    if record is None or record.start_time is None:
        return 0
    first = run.tags.get(RANGE_START_TAG) or run.tags.get("dagster/partition")
    last = run.tags.get(RANGE_END_TAG) or first
    # A job's own run names no selection: then every view's ledger is asked.
    names = {key.to_user_string() for key in run.asset_selection or ()} or {view.name for view in VIEWS}
    if first is None or last is None:
        return 0
    count = 0
    for view in (view for view in VIEWS if view.name in names):
        with larder.connect() as connection:
            written = connection.execute(
                "SELECT partition_date, rows, events, built_at FROM feature_ledger WHERE view = %s "
                "AND partition_date BETWEEN %s AND %s AND built_at >= %s AND definition_hash = %s ORDER BY 1",
                (
                    view.name,
                    date.fromisoformat(first),
                    date.fromisoformat(last),
                    datetime.fromtimestamp(record.start_time, UTC),
                    view.definition_hash,
                ),
            ).fetchall()
        for day, rows, events, built_at in written:
            told = instance.fetch_materializations(
                dg.AssetRecordsFilter(
                    dg.AssetKey(view.name), asset_partitions=[day.isoformat()], after_timestamp=built_at.timestamp()
                ),
                limit=1,
            ).records
            if told:
                continue
            instance.report_runless_asset_event(
                dg.AssetMaterialization(
                    view.name,
                    partition=day.isoformat(),
                    description=f"Written by run {run.run_id[:8]}, which ended before it could say so.",
                    metadata={metadata.ROWS: rows, "dagster/partition_row_count": rows, metadata.EVENTS: events},
                )
            )
            count += 1
    return count


@dg.run_failure_sensor(
    name="report_what_was_written",
    description="A run that was killed keeps its finished chunks; this reports them, so that nobody builds them again.",
    # On from the start: it repairs what Dagster says and starts nothing.
    default_status=dg.DefaultSensorStatus.RUNNING,
    minimum_interval_seconds=10,
)
def settle_dead_runs(context: dg.RunFailureSensorContext, larder: Larder) -> dg.SkipReason:
    count = report_what_was_written(context.instance, context.dagster_run, larder)
    return dg.SkipReason(f"{count} partitions that the run had written without saying so are reported")
