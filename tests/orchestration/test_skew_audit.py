"""The audit through Dagster: what its page says, and how a bug keeps a release from happening."""

from __future__ import annotations

import json
from pathlib import Path

import dagster as dg
import psycopg
import pytest
from conftest import Ingested, ingested
from worlds import serving

from inference.runtime import LarderApplication
from infra import registry
from orchestration.compute.materialise import materialise
from orchestration.definitions import build_definitions
from orchestration.resources import Larder
from schemas.serving import RecommendationRequest
from schemas.views import VIEWS


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ingested:
    return ingested(tmp_path / "home", monkeypatch, 10)


def run(instance: dg.DagsterInstance, *names: str, since: str = "") -> dg.ExecuteInProcessResult:
    job = build_definitions(Larder(deployment="small")).resolve_implicit_global_asset_job_def()
    config = {"ops": {"skew_audit": {"config": {"since": since}}}} if since else {}
    return job.execute_in_process(
        instance=instance,
        asset_selection=[dg.AssetKey(name) for name in names],
        run_config=config,
        raise_on_error=False,
    )


def failure(result: dg.ExecuteInProcessResult) -> str:
    [event] = [event for event in result.all_events if event.is_step_failure]
    assert event.step_failure_data.error is not None
    error = event.step_failure_data.error
    return str(error.cause.message if error.cause else error.message)


def test_a_bug_blocks_the_release_until_it_is_mended(small: Ingested) -> None:
    with psycopg.connect(small.url) as connection:
        connection.execute(
            "INSERT INTO model_versions (version, name, path, manifest) VALUES ('m1', 'ranker', 'models/m1', '{}')"
        )
        registry.record_gate(connection, "m1", True, {"words": ["the ranker may serve"]})
    for view in VIEWS:
        materialise(view, small.last, small.last, url=small.url, lake=small.lake)
    with dg.DagsterInstance.ephemeral() as instance:
        first = run(instance, "skew_audit")
        assert first.success
        [check] = first.get_asset_check_evaluations()
        assert (check.passed, check.description) == (True, "nothing to audit yet")

        application = LarderApplication.from_settings(
            serving(small.url, small.record.artifacts_url, audit_per_mille=1000)
        )
        with psycopg.connect(small.url) as connection:
            people = [row[0] for row in connection.execute("SELECT DISTINCT user_id FROM user_history LIMIT 5")]
            for person in people:
                application.recommend(RecommendationRequest(user_id=person))
            assert application.flush(10_000)
            clean = run(instance, "skew_audit")
            assert clean.success
            page = clean.asset_materializations_for_node("skew_audit")[0].metadata
            assert (page["reads"].value, page["mismatches_bug"].value) == (len(people), 0)
            assert page["rows"].value > 100

            connection.execute(
                "UPDATE online.user_rows SET user_activity = overlay(user_activity PLACING '\\x41' FROM 9)"
            )
            connection.commit()
            application.recommend(RecommendationRequest(user_id=people[0]))
            application.close()
            blocked = run(instance, "skew_audit", "ranker_release")
            assert not blocked.success
            [check] = blocked.get_asset_check_evaluations()
            assert not check.passed
            assert check.blocking
            assert "user_activity.events_7d (1)" in str(check.description)
            assert "none is released" in str(check.description)
            shown = json.dumps({name: str(value.value) for name, value in blocked.asset_materializations_for_node("skew_audit")[0].metadata.items()})  # fmt: skip
            assert not any(person in shown for person in people)
            # Nor in a run of its own: the audit's outcome is kept.
            alone = run(instance, "ranker_release")
            assert not alone.success
            assert "not released: the skew audit of" in failure(alone)
            assert registry.read_alias(connection) is None
            (mended,) = connection.execute("SELECT max(read_at) + interval '1 second' FROM served_features").fetchone() or (None,)  # fmt: skip
            connection.commit()
            assert run(instance, "skew_audit", "ranker_release", since=mended.isoformat()).success
            released = registry.read_alias(connection)
            assert released is not None
            assert released.version == "m1"


def test_a_since_that_is_no_instant_is_named(small: Ingested) -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        assert "since is 'yesterday', which is no instant" in failure(run(instance, "skew_audit", since="yesterday"))
