"""The code location: its graph, and what a newcomer sees of each asset."""

from __future__ import annotations

import dagster as dg
import pytest

from orchestration.assets.features import VIEW_SPECS
from orchestration.definitions import ASSETS, build_definitions
from schemas import prompts
from schemas.views import VIEWS

DAILY = {"events", *(view.name for view in VIEWS)}


@pytest.fixture(scope="module")
def specs() -> dict[str, dg.AssetSpec]:
    return {spec.key.to_user_string(): spec for asset in ASSETS for spec in asset.specs}


def test_the_road_has_these_assets_and_no_others(specs: dict[str, dg.AssetSpec]) -> None:
    assert set(specs) == DAILY | {
        "items", "source_events", "prompt_evaluation", "item_enrichment", "text_vectors", "popular_items", "co_visitation", "training_set", "ranker",
        "ranker_evaluation", "rule_prices", "ranker_onnx", "item_vectors", "skew_audit", "ranker_release", "recommend_function",
        "experiment_report",
        "drift_report", "fairness_report",
        "user_scores",
    }  # fmt: skip


def test_every_asset_says_what_it_is_and_who_answers_for_it(specs: dict[str, dg.AssetSpec]) -> None:
    for name, spec in specs.items():
        assert spec.description, name
        assert spec.owners, name
        assert spec.kinds, name
        assert spec.group_name, name
        assert spec.code_version, name


def test_daily_assets_share_one_partitions_definition(specs: dict[str, dg.AssetSpec]) -> None:
    daily = {name for name, spec in specs.items() if isinstance(spec.partitions_def, dg.DailyPartitionsDefinition)}
    assert daily == DAILY
    assert len({specs[name].partitions_def for name in DAILY}) == 1


def test_every_prompt_template_is_a_partition_and_nothing_else_is_partitioned(specs: dict[str, dg.AssetSpec]) -> None:
    templates = specs["prompt_evaluation"].partitions_def
    assert templates is not None
    assert tuple(templates.get_partition_keys()) == prompts.versions()
    assert {name for name, spec in specs.items() if spec.partitions_def} == DAILY | {"prompt_evaluation"}


def test_what_is_encoded_follows_the_template_that_won(specs: dict[str, dg.AssetSpec]) -> None:
    assert "prompt_evaluation" in {dep.asset_key.to_user_string() for dep in specs["text_vectors"].deps}


def test_every_view_has_an_asset_with_its_columns() -> None:
    for view, spec in zip(VIEWS, VIEW_SPECS, strict=True):
        schema = spec.metadata["dagster/column_schema"].schema  # type: ignore[union-attr]
        columns = [column.name for column in schema.columns]
        assert columns == ["partition_date", *view.entity.keys, *(name for name, _, _ in view.columns)]


def test_a_release_lies_behind_gate_and_vectors(specs: dict[str, dg.AssetSpec]) -> None:
    upstream = {dep.asset_key.to_user_string() for dep in specs["ranker_release"].deps}
    assert {"item_vectors", "ranker_onnx", "skew_audit"} <= upstream


def test_the_location_resolves_with_its_jobs_and_schedules() -> None:
    defs = build_definitions()
    dg.Definitions.validate_loadable(defs)
    assert {job.name for job in defs.resolve_all_job_defs()} >= {
        "daily_features",
        "catalogue",
        "training",
        "prompts",
        "scores",
        "forget_person",
        "watch",
    }


def test_an_unknown_asset_is_named() -> None:
    job = build_definitions().resolve_implicit_global_asset_job_def()
    with pytest.raises(dg.DagsterInvalidSubsetError, match="no_such_asset"):
        job.execute_in_process(asset_selection=[dg.AssetKey("no_such_asset")])
