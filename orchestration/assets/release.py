"""Assets of release: the champion's alias, and the function that answers with it."""

import json
import time
from typing import Any

import dagster as dg

from inference import artifacts
from infra import registry
from orchestration import metadata
from orchestration.metadata import OWNER
from orchestration.progress import progress
from orchestration.ranges import asset_span
from orchestration.resources import Larder
from schemas.manifest import CHAMPION_POINTER
from schemas.views import VIEWS

GROUP = "release"


@dg.asset(
    group_name=GROUP,
    owners=[OWNER],
    kinds={"postgres"},
    deps=["item_vectors", "ranker_onnx", "skew_audit"],
    description="The champion: the newest version that passed its gate, while no served value differs from training for no "
    "known cause. If there is none, the floor keeps serving.",
    code_version="2",
)
def ranker_release(context: dg.AssetExecutionContext, larder: Larder) -> dg.MaterializeResult[Any]:
    from orchestration.compute.skew import newest_audit, why_not_released

    with asset_span(context), larder.connect() as connection:
        audited = newest_audit(connection)
        if audited is not None and audited.bugs:
            raise dg.Failure(f"not released: {why_not_released(audited)}", allow_retries=False)
        # The gate record is read again here: a check that failed stops only its own run.
        newest = connection.execute(
            "SELECT m.version, m.path, g.passed, g.record->'words' FROM model_versions AS m JOIN gate_records AS g USING (version) "
            "ORDER BY m.created_at DESC LIMIT 1"
        ).fetchone()
        if newest is None:
            raise dg.Failure("no version has a gate record; materialise ranker_onnx first")
        version, path, passed, words = newest
        if passed:
            registry.promote(connection, version)
            connection.commit()
            pointer = json.dumps({"version": version, "path": path}).encode()
            artifacts.put(larder.artifacts_url, CHAMPION_POINTER, pointer)
        serving = registry.read_alias(connection)
    name = serving.version if serving else "the floor (co-visitation and trending)"
    progress(context)(f"{'released' if passed else 'not released'}: {name} serves")
    return dg.MaterializeResult(
        metadata={
            "released": passed,
            "serving": name,
            "revision": serving.revision if serving else 0,
            "gate": dg.MetadataValue.md("\n".join(f"- {line}" for line in words)),
        }
    )


@dg.asset(
    group_name=GROUP,
    owners=[OWNER],
    kinds={"onnx"},
    deps=["ranker_release", "popular_items", "co_visitation", *(view.name for view in VIEWS)],
    description="The function with the released model: a first real request here, and, where LARDER_DEPLOY_TARGET names a "
    "cloud, the same deployment as `make deploy`, its smoke request under this run's trace.",
    code_version="2",
)
def recommend_function(context: dg.AssetExecutionContext, larder: Larder) -> dg.MaterializeResult[Any]:
    from inference.runtime import LarderApplication
    from inference.settings import Settings
    from schemas.serving import RecommendationRequest

    with asset_span(context):
        application = LarderApplication.from_settings(Settings(larder.url, larder.artifacts_url))
        application.warm()
        with larder.connect() as connection:
            row = connection.execute("SELECT user_id FROM user_history ORDER BY occurred_at DESC LIMIT 1").fetchone()
        request = RecommendationRequest(user_id=row[0] if row else "nobody", k=10)
        took: list[float] = []
        for _ in range(5):
            start = time.perf_counter()
            answer = application.recommend(request)
            took.append((time.perf_counter() - start) * 1000)
        application.close()
        if not answer.items:
            raise dg.Failure("the smoke request was answered with an empty list; look at popular_items and items")
        deployed = _deploy(context, larder)
    return dg.MaterializeResult(
        metadata={
            "model_version": str(answer.model_version),
            "items": len(answer.items),
            "degraded": ", ".join(answer.degraded) or "nothing",
            "first_request_ms": took[0],
            "p50_ms": sorted(took[1:])[len(took[1:]) // 2],
            metadata.ROWS: len(answer.items),
            "deployed": deployed,
        }
    )


def _deploy(context: dg.AssetExecutionContext, larder: Larder) -> str:
    """Deploy as `make deploy` does, and where to; or why not, in words that stand on the asset's page."""
    from infra import deploy
    from infra.deploy_settings import TARGET_VARIABLE, read_target

    target = read_target()
    if target is None:
        return f"no: {TARGET_VARIABLE} names no cloud"
    with larder.connect() as connection:
        if registry.read_alias(connection) is None:
            told = "no: no model is released, and a function would answer from the floor"
            progress(context)(f"not deployed: {told.removeprefix('no: ')}")
            return told
    released, urls, changed = deploy.deploy(larder.record, larder.url, target, progress(context))
    where = ", ".join(urls.values()) or target
    return f"{'yes' if changed else 'it was already'}: model {released.version} at {where}"
