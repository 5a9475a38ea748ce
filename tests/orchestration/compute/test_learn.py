"""The verdict: a ranker serves only if it beats every floor on both splits, and the words say which it did not."""

from __future__ import annotations

from typing import Any

import numpy as np
import psycopg
import pytest
from conftest import TODAY, days_ago
from worlds import ListSource

from orchestration.compute.evaluate import evaluate, score_popularity
from orchestration.compute.ingest import ingest
from orchestration.compute.interactions import Interactions
from orchestration.compute.lake import Lake
from orchestration.compute.learn import verdict
from orchestration.compute.splits import leave_one_out
from orchestration.compute.training_set import build_training_set
from schemas.errors import DefinitionError
from schemas.events import Event


def evaluation(**late: float) -> dict[str, Any]:
    def split(scores: dict[str, float]) -> dict[str, Any]:
        return {"rows": [{"name": name, "ndcg": {10: value}} for name, value in scores.items()]}

    good = {"popularity": 0.1, "7-day popularity": 0.2, "co-visitation": 0.3, "ranker": 0.4}
    return {"leave_one_out": split(good), "time_split": split(good | late)}


def test_a_ranker_that_beats_every_floor_on_both_splits_may_serve() -> None:
    passed, words = verdict(evaluation())
    assert passed
    assert words[-1] == "the ranker may serve"


@pytest.mark.parametrize("floor", ["popularity", "7-day popularity", "co-visitation"])
def test_one_floor_on_one_split_is_enough_to_refuse(floor: str) -> None:
    passed, words = verdict(evaluation(**{floor: 0.4}))  # as good is not better
    assert not passed
    assert words[1] == f"time split: ranker 0.4000 NDCG@10 does not beat {floor} 0.4000"
    assert "floor keeps serving" in words[2]


def test_the_verdict_reads_what_an_evaluation_writes() -> None:
    generator = np.random.default_rng(0)
    n, people = 400, 20
    events = Interactions(
        np.array([f"u{number:02}" for number in range(people)]),
        np.array([f"i{number:02}" for number in range(30)]),
        np.sort(generator.integers(0, people, n)).astype(np.int32),
        generator.integers(0, 30, n).astype(np.int32),
        np.arange(n, dtype=np.int64) * 10**9,
        np.ones(n, np.int64),
        np.full(n, np.nan, np.float32),
    )
    rows = {
        name: score_popularity(np.ones(30, np.float32))
        for name in ("popularity", "7-day popularity", "co-visitation", "ranker")
    }
    made = evaluate(rows, leave_one_out(events)).to_dict()
    assert verdict({"leave_one_out": made, "time_split": made})[0] is False


def test_too_few_events_to_train_says_how_many_are_needed(lake: Lake, connection: psycopg.Connection) -> None:
    ingest(ListSource([Event("e", "u", "i", "view", None, days_ago(2))]), lake, connection, now=TODAY)
    with pytest.raises(DefinitionError, match="1000 events of 20 people are needed"):
        build_training_set(lake, connection, "file:///nowhere")
