"""The verdict: a ranker serves only if it beats every floor on both splits, and the words say which it did not."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
import torch
from conftest import TODAY, days_ago
from worlds import ListSource

from orchestration.compute.evaluate import evaluate, history_inputs, score_popularity
from orchestration.compute.evaluation_report import report
from orchestration.compute.ingest import ingest
from orchestration.compute.interactions import Interactions
from orchestration.compute.lake import Lake
from orchestration.compute.learn import FLOOR, load_learned, verdict
from orchestration.compute.splits import Split, leave_one_out, queries_for
from orchestration.compute.train import train
from orchestration.compute.train_config import TrainConfig
from orchestration.compute.training_set import build_training_set
from schemas.errors import DefinitionError
from schemas.events import Event
from schemas.ranker import TEXT_DIM


def evaluation(spread: float = 0.05, **late: float) -> dict[str, Any]:
    """An evaluation in which paired gains are known to ± `spread`; `late` are scores on the time split."""

    def split(scores: dict[str, float]) -> dict[str, Any]:
        gains = {name: scores["ranker"] - value for name, value in scores.items() if name != "ranker"}
        return {
            "rows": [{"name": name, "ndcg": {10: value}} for name, value in scores.items()],
            "gains": {
                name: {"mean": gain, "low": gain - spread, "high": gain + spread} for name, gain in gains.items()
            },
        }

    good = {name: 0.1 + 0.2 * place / len(FLOOR) for place, name in enumerate(FLOOR)} | {"ranker": 0.4}
    return {"leave_one_out": split(good), "time_split": split(good | late)}


def test_a_ranker_that_beats_every_floor_on_both_splits_may_serve() -> None:
    passed, words = verdict(evaluation())
    assert passed
    assert words[-1] == "the ranker may serve"


@pytest.mark.parametrize("floor", FLOOR)
def test_one_floor_on_one_split_is_enough_to_refuse(floor: str) -> None:
    passed, words = verdict(evaluation(**{floor: 0.4}))  # as good is not better
    assert not passed
    assert words[1].startswith(f"time split: ranker 0.4000 NDCG@10 does not beat {floor} 0.4000")
    assert "floor keeps serving" in words[2]


@pytest.mark.parametrize("floor", FLOOR)
def test_a_floor_that_was_not_evaluated_is_an_error_and_no_pass(floor: str) -> None:
    made = evaluation()
    made["time_split"]["rows"] = [row for row in made["time_split"]["rows"] if row["name"] != floor]
    with pytest.raises(KeyError, match=floor):
        verdict(made)


def test_the_verdict_says_whether_a_gain_is_beyond_chance() -> None:
    passed, words = verdict(evaluation(spread=0.05))
    assert passed
    assert "not beyond chance" not in words[1]
    passed, words = verdict(evaluation(spread=0.5))
    assert passed  # the figure decides, as it always did
    assert words[1].endswith(": not beyond chance)")


def test_chance_saves_no_ranker_that_is_below_a_floor() -> None:
    passed, words = verdict(evaluation(spread=0.5, popularity=0.4001))
    assert not passed
    assert "does not beat popularity" in words[1]
    passed, words = verdict(evaluation(spread=0.01, popularity=0.9))
    assert not passed
    assert words[1].endswith("worse beyond chance)")


def small_split() -> Split:
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
    return leave_one_out(events)


def test_the_verdict_reads_what_an_evaluation_writes() -> None:
    split = small_split()
    made = evaluate({name: score_popularity(np.ones(30, np.float32)) for name in (*FLOOR, "ranker")}, split)
    record = json.loads(json.dumps(report(made, split, "ranker").to_dict()))
    assert verdict({"leave_one_out": record, "time_split": record})[0] is False


def test_a_person_with_one_event_is_learned_from_and_never_judged() -> None:
    events = Interactions(
        np.array(["once", "often"]),
        np.array(["a", "b", "c", "d"]),
        np.array([0, 1, 1, 1, 1], np.int32),
        np.array([0, 0, 1, 2, 3], np.int32),
        np.arange(5, dtype=np.int64) * 10**9,
        np.ones(5, np.int64),
        np.full(5, np.nan, np.float32),
    )
    split = leave_one_out(events)
    assert split.queries.user.tolist() == [1]
    assert 0 in split.train.user
    # Nothing came before the only event, so a history of length 0 is asked for, not an error.
    alone = queries_for(events, np.array([0]), strictly_earlier=True)
    assert history_inputs(alone).mask.sum() == 0
    trained = train(
        split.train,
        np.random.default_rng(0).standard_normal((4, TEXT_DIM)).astype(np.float32),
        TrainConfig(epochs=1, validation_labels=1, slate_rows=4),
    )
    assert np.isfinite(trained.scorer()(alone)).all()


def test_too_few_events_to_train_says_how_many_are_needed(lake: Lake, connection: psycopg.Connection) -> None:
    ingest(ListSource([Event("e", "u", "i", "view", None, days_ago(2))]), lake, connection, now=TODAY)
    with pytest.raises(DefinitionError, match="1000 events of 20 people are needed"):
        build_training_set(lake, connection, "file:///nowhere")


def test_a_training_left_by_other_code_is_refused(tmp_path: Path) -> None:
    (tmp_path / "training").mkdir()
    buffer = io.BytesIO()
    torch.save({"ranker": 1}, buffer)
    (tmp_path / "training" / "ranker.pt").write_bytes(buffer.getvalue())
    with pytest.raises(DefinitionError, match="another version of this code; train again"):
        load_learned(tmp_path.as_uri())
