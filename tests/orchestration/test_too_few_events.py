"""A deployment with too little to learn from: the assets say how much is needed, and the floor answers."""

from __future__ import annotations

from pathlib import Path

import dagster as dg
import pytest
from conftest import ingested
from worlds import serving

from inference.runtime import LarderApplication
from orchestration.definitions import build_definitions
from orchestration.resources import Larder
from schemas.serving import RecommendationRequest


def test_training_on_too_few_events_says_how_many_are_needed_and_the_floor_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = ingested(tmp_path / "home", monkeypatch, 6, events_per_person=8, people=30)
    job = build_definitions(Larder(deployment="small")).resolve_implicit_global_asset_job_def()
    with dg.DagsterInstance.ephemeral() as instance:

        def materialise(*names: str) -> dg.ExecuteInProcessResult:
            keys = [dg.AssetKey(name) for name in names]
            return job.execute_in_process(instance=instance, asset_selection=keys, raise_on_error=False)

        assert materialise("popular_items", "co_visitation").success
        failed = materialise("training_set")
        assert not failed.success
        (event,) = [event for event in failed.all_events if event.is_step_failure]
        assert "are too few to train on: 1000 events of 20 people are needed" in str(event.step_failure_data.error)
        assert materialise("recommend_function").success
    application = LarderApplication.from_settings(serving(made.url, made.record.artifacts_url))
    try:
        answer = application.recommend(RecommendationRequest(user_id="user-00001", k=5))
    finally:
        application.close()
    assert (answer.model_version, answer.degraded) == ("co-visitation", ("ranker",))
    assert len(answer.items) == 5
