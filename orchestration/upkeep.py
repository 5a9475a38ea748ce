"""What keeps a deployment in order by itself: rebuilding what late events made stale, removing what killed runs left."""

import hashlib
from datetime import UTC, datetime, timedelta

import dagster as dg

from orchestration.automation import daily_job
from orchestration.compute.stale import rebuild_parts, to_rebuild
from orchestration.instance_api import RANGE_END_TAG, RANGE_START_TAG
from orchestration.resources import Larder

REBUILD_TAG = "larder/rebuild"
_UNFINISHED = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]


@dg.sensor(
    name="rebuild_stale_partitions",
    job=daily_job,
    description="Drains what was posted late, and builds the partitions again that had been built before it came.",
    # An hour's late events make one rebuild. Off until switched on, as the schedules are.
    minimum_interval_seconds=3600,
)
def rebuild_stale_partitions(context: dg.SensorEvaluationContext, larder: Larder) -> dg.SensorResult | dg.SkipReason:
    """One run for each stretch of stale days. What failed is tried again when more is stale, or the next day."""
    running = context.instance.get_runs(dg.RunsFilter(tags={REBUILD_TAG: "1"}, statuses=_UNFINISHED), limit=1)
    if running:
        return dg.SkipReason(f"run {running[0].run_id[:8]} is rebuilding")
    today = datetime.now(UTC).date()
    with larder.connect() as connection:
        wanted = to_rebuild(connection, larder.record.start_date, today - timedelta(days=1))
        waiting = connection.execute("SELECT count(*), max(known_at) FROM recent_events WHERE NOT drained").fetchone()
    if not wanted:
        return dg.SkipReason("no partition is stale")
    told = hashlib.sha256(
        repr((today, sorted((name, sorted(days)) for name, days in wanted.items()), waiting)).encode()
    )
    return dg.SensorResult(
        run_requests=[
            dg.RunRequest(
                run_key=f"{told.hexdigest()[:16]}/{first}",
                asset_selection=[dg.AssetKey(name) for name in assets],
                tags={RANGE_START_TAG: first.isoformat(), RANGE_END_TAG: last.isoformat(), REBUILD_TAG: "1"},
            )
            for assets, first, last in rebuild_parts(wanted)
        ]
    )


class Vacuum(dg.Config):
    """What to remove."""

    hours: float = 24
    """How long a file must not have been read by anybody. A reader that began earlier would lose its file."""
    dry_run: bool = False
    """Only list what would be removed."""


@dg.op(description="Delete the lake's files that killed runs left, and those that were replaced long ago.")
def remove_orphans(context: dg.OpExecutionContext, config: Vacuum, larder: Larder) -> None:
    from orchestration.compute.vacuum import vacuum

    with larder.connect() as connection:
        gone = vacuum(larder.lake, connection, hours=config.hours, dry_run=config.dry_run)
    for orphan in gone[:100]:
        context.log.info(f"{orphan.path}, {orphan.size_bytes:,} bytes, written {orphan.written_at:%Y-%m-%d %H:%M} UTC")
    context.add_output_metadata(
        {"files": len(gone), "bytes": sum(orphan.size_bytes for orphan in gone), "dry_run": config.dry_run}
    )


@dg.job(description="Remove what killed runs left in the lake. `make vacuum` does the same.")
def vacuum_lake() -> None:
    remove_orphans()


VACUUM_SCHEDULE = dg.ScheduleDefinition(name="vacuum_on_sundays", job=vacuum_lake, cron_schedule="30 4 * * 0")
