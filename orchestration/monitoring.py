"""When the watching assets run, and what happens when drift is severe: a new model is asked for, once a day at most.

Schedule and sensor are off until somebody switches them on, as all of them are. A new model serves only through the gate and
the skew audit, so a drift that a fault upstream caused trains a model and does not release it.
"""

from datetime import UTC, date, datetime, timedelta

import dagster as dg

from orchestration.assets.monitoring import SEVERE
from orchestration.automation import training_job

RETRAIN_TAG = "larder/retrain"
_NOT_AGAIN = timedelta(hours=24)
_FRESH = timedelta(days=2)

monitoring_job = dg.define_asset_job(
    "watch",
    dg.AssetSelection.assets("drift_report", "fairness_report"),
    description="Yesterday's drift report, and the fairness report of the last two weeks.",
)

# After the day's features (01:15) and the skew audit (02:15): what they find explains some of what is seen here.
MONITORING_SCHEDULE = dg.ScheduleDefinition(name="watch_at_02_45", job=monitoring_job, cron_schedule="45 2 * * *")


@dg.asset_sensor(
    asset_key=dg.AssetKey("drift_report"),
    job=training_job,
    name="retrain_on_drift",
    description="Asks for a training when the newest drift report has severe findings, once a day at most.",
    minimum_interval_seconds=300,
    # Off until switched on: a training costs, and its model may be released.
    default_status=dg.DefaultSensorStatus.STOPPED,
)
def retrain_on_drift(
    context: dg.SensorEvaluationContext, asset_event: dg.EventLogEntry
) -> dg.RunRequest | dg.SkipReason:
    """One run of the job `training` for a severe report, unless one was begun within a day, by whomever."""
    made = asset_event.asset_materialization
    found = made.metadata.get(SEVERE) if made else None
    severe = int(found.value) if isinstance(found, dg.IntMetadataValue) and found.value is not None else 0
    if not severe:
        return dg.SkipReason("the newest drift report has no severe finding")
    now = datetime.now(UTC)
    day = made.metadata.get("day") if made else None
    if day is None or date.fromisoformat(str(day.value)) < now.date() - _FRESH:
        return dg.SkipReason("severe, but of an old day that was looked at again")
    recent = context.instance.get_runs(
        dg.RunsFilter(job_name=training_job.name, created_after=now - _NOT_AGAIN), limit=1
    )
    if recent:
        return dg.SkipReason(f"drift is severe, and run {recent[0].run_id[:8]} has trained within a day")
    return dg.RunRequest(run_key=f"drift/{now.date()}", tags={RETRAIN_TAG: f"{severe} severe findings"})
