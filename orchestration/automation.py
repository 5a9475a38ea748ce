"""When assets run by themselves: the day's features every morning, the rest of the road once a week.

Schedules are stopped until somebody starts them in the UI: a fresh deployment does nothing behind your back.
"""

from __future__ import annotations

import dagster as dg

from orchestration.compute.stale import DAILY

daily_job = dg.define_asset_job(
    "daily_features", dg.AssetSelection.assets(*DAILY), description="Yesterday's events and features."
)

catalogue_job = dg.define_asset_job(
    "catalogue",
    dg.AssetSelection.assets(
        "items", "source_events", "text_vectors", "item_vectors", "popular_items", "co_visitation"
    ),
    description="New items and events from the source; their vectors and the floor's lists.",
)

training_job = dg.define_asset_job(
    "training",
    dg.AssetSelection.assets(
        "training_set",
        "ranker",
        "ranker_evaluation",
        "rule_prices",
        "ranker_onnx",
        "item_vectors",
        "skew_audit",
        "ranker_release",
        "recommend_function",
        "user_scores",
    ),
    description="Train, judge, export, gate and release a ranker; score everybody with it.",
)

scores_job = dg.define_asset_job(
    "scores",
    dg.AssetSelection.assets("user_scores"),
    description="Everybody's list, scored ahead by the champion: what requests fall back on.",
)

audit_job = dg.define_asset_job(
    "daily_skew_audit",
    dg.AssetSelection.assets("skew_audit"),
    description="What was served in the last two days against what training would see.",
)

prompts_job = dg.define_asset_job(
    "prompts",
    dg.AssetSelection.assets("prompt_evaluation"),
    description="Judge every prompt template on today's data and record the best of each kind. Select all partitions.",
)

experiments_job = dg.define_asset_job(
    "daily_experiments",
    dg.AssetSelection.assets("experiment_report"),
    description="What every running experiment says. Switches off what breaks a guardrail.",
)

JOBS = [daily_job, catalogue_job, training_job, audit_job, prompts_job, scores_job, experiments_job]


def schedules() -> list[dg.ScheduleDefinition | dg.UnresolvedPartitionedAssetScheduleDefinition]:
    """The schedules of the jobs above, in UTC."""
    return [
        dg.build_schedule_from_partitioned_job(
            daily_job, name="daily_features_at_01_15", hour_of_day=1, minute_of_hour=15
        ),
        dg.ScheduleDefinition(name="catalogue_at_01_00", job=catalogue_job, cron_schedule="0 1 * * *"),
        dg.ScheduleDefinition(name="skew_audit_at_02_15", job=audit_job, cron_schedule="15 2 * * *"),
        dg.ScheduleDefinition(name="experiments_at_02_45", job=experiments_job, cron_schedule="45 2 * * *"),
        dg.ScheduleDefinition(name="scores_at_04_00", job=scores_job, cron_schedule="0 4 * * *"),
        dg.ScheduleDefinition(name="training_on_mondays", job=training_job, cron_schedule="0 3 * * 1"),
    ]
