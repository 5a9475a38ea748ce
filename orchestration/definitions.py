"""The Dagster code location: everything that `dg dev`, `dagster dev` and the daemon load."""

from __future__ import annotations

import dagster as dg

from orchestration.assets import daily, embeddings, events, prompts, ranker, release, rules, skew
from orchestration.automation import JOBS, schedules
from orchestration.checks import CHECKS, FRESHNESS_SENSOR
from orchestration.compute.bind import bind_views
from orchestration.erasure import erase_who_asked, forget_person
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
]


def build_definitions(larder: Larder | None = None) -> dg.Definitions:
    """The whole location; tests hand in a resource of their own."""
    return dg.Definitions(
        assets=ASSETS,
        asset_checks=CHECKS,
        jobs=[*JOBS, forget_person, vacuum_lake],
        schedules=[*schedules(), VACUUM_SCHEDULE],
        sensors=[FRESHNESS_SENSOR, settle_dead_runs, rebuild_stale_partitions, erase_who_asked],
        resources={"larder": larder or Larder()},
        # One process per run: the multiprocess executor would import everything again for every step.
        executor=dg.in_process_executor,
    )


defs = build_definitions()
