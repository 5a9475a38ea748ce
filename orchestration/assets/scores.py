"""The asset of lists scored ahead: what requests fall back on while no model can rank."""

from typing import Any

import dagster as dg

from orchestration import metadata
from orchestration.metadata import OWNER, column_schema
from orchestration.progress import progress
from orchestration.ranges import asset_span
from orchestration.resources import Larder
from schemas import tables
from schemas.views import VIEWS


class Scoring(dg.Config):
    """How everybody is scored."""

    candidates: int = 200
    """Items that each person's list is chosen from."""
    per_user: int = 50
    """Items that are kept."""
    restart: bool = False
    """Begin with the first person, also where a run was stopped."""


@dg.asset(
    group_name="release",
    owners=[OWNER],
    kinds={"onnx", "postgres"},
    deps=["ranker_release", "popular_items", "co_visitation", *(view.name for view in VIEWS)],
    description="Everybody's list, scored by the champion with the core that answers requests, in batches, on a GPU where "
    "there is one. A run that was stopped goes on where it was. Without a champion there is nothing to score with, and "
    "nothing is written.",
    metadata=column_schema(tables.user_scores),
    code_version="1",
)
def user_scores(context: dg.AssetExecutionContext, config: Scoring, larder: Larder) -> dg.MaterializeResult[Any]:
    from infra import registry
    from orchestration.compute.score_all import score_everybody, told

    with larder.connect() as connection:
        serving = registry.read_alias(connection)
    if serving is None:
        progress(context)("nobody is scored: no model is released")
        return dg.MaterializeResult(metadata={metadata.ROWS: 0, "model_version": "none is released"})
    say = progress(context)
    with asset_span(context):
        report = score_everybody(
            larder.url,
            larder.artifacts_url,
            candidates=config.candidates,
            kept=config.per_user,
            restart=config.restart,
            say=lambda so_far: say(f"{so_far.scored:,} of {so_far.people:,} people, {so_far.per_second:,.0f} a second"),
        )
    say(told(report))
    spent = sorted(report.spent.seconds.items(), key=lambda step: -step[1])
    return dg.MaterializeResult(
        metadata={
            metadata.ROWS: report.before + report.scored,
            "users_per_s": report.per_second,
            metadata.SECONDS: report.seconds,
            "model_version": report.version,
            "provider": report.provider,
            "resumed_after": report.before,
            "refused": report.refused,
            "lists_dropped": report.gone,
            "without_features": report.featureless,
            "seconds_by_step": metadata.markdown_table(
                ["step", "seconds, all threads"], [[step, f"{seconds:,.2f}"] for step, seconds in spent]
            ),
        }
    )
