"""The Dagster code location: everything that `dg dev`, `dagster dev` and the daemon load."""

from __future__ import annotations

import dagster as dg

from orchestration.assets import (
    daily,
    embeddings,
    events,
    experiments,
    monitoring,
    prompts,
    ranker,
    release,
    rules,
    scores,
    skew,
)
from orchestration.automation import JOBS, schedules
from orchestration.checks import CHECKS, FRESHNESS_SENSOR
from orchestration.compute.bind import bind_views
from orchestration.erasure import erase_who_asked, forget_person
from orchestration.monitoring import MONITORING_SCHEDULE, monitoring_job, retrain_on_drift
from orchestration.monitoring_checks import MONITORING_CHECKS
from orchestration.people import RETENTION_SCHEDULE, export_person, export_who_asked, retention
from orchestration.reconcile import settle_dead_runs
from orchestration.resources import Larder
from orchestration.upkeep import VACUUM_SCHEDULE, rebuild_stale_partitions, vacuum_lake
from schemas.views import VIEWS

# A condition that does not fit the events is an error when the definitions load, not in the middle of a backfill.
bind_views(VIEWS)

ASSETS: list[dg.AssetsDefinition] = [
    events.load_source,
    daily.daily_assets,
    prompts.prompt_evaluation,
    embeddings.item_enrichment,
    embeddings.text_vectors,
    ranker.popular_items,
    ranker.co_visitation,
    ranker.training_set,
    ranker.ranker,
    ranker.ranker_evaluation,
    rules.rule_prices,
    ranker.ranker_onnx,
    embeddings.item_vectors,
    skew.skew_audit,
    release.ranker_release,
    release.recommend_function,
    experiments.experiment_report,
    monitoring.drift_report,
    monitoring.fairness_report,
    scores.user_scores,
]


def build_definitions(larder: Larder | None = None) -> dg.Definitions:
    """The whole location; tests hand in a resource of their own."""
    return dg.Definitions(
        assets=ASSETS,
        asset_checks=[*CHECKS, *MONITORING_CHECKS],
        jobs=[*JOBS, monitoring_job, forget_person, vacuum_lake, export_person, retention],
        schedules=[*schedules(), MONITORING_SCHEDULE, VACUUM_SCHEDULE, RETENTION_SCHEDULE],
        sensors=[
            FRESHNESS_SENSOR,
            settle_dead_runs,
            rebuild_stale_partitions,
            erase_who_asked,
            export_who_asked,
            retrain_on_drift,
        ],
        resources={"larder": larder or Larder()},
        # One process per run: the multiprocess executor would import everything again for every step.
        executor=dg.in_process_executor,
    )


defs = build_definitions()
