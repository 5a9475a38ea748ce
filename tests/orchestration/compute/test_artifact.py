"""What an artefact's folder holds when writing it is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from inference import ranker
from inference.artifacts import verify
from orchestration.compute import artifact
from orchestration.compute.artifact import ArtifactLabels, write_artifact
from orchestration.compute.export import random_inputs
from orchestration.compute.interactions import Interactions
from orchestration.compute.model import ItemTower, Ranker, RankerShape
from orchestration.compute.parity import INT8_BATCH_TOLERANCE_RATE, Int8Report
from orchestration.compute.splits import Queries, leave_one_out
from orchestration.compute.train_config import TrainConfig
from orchestration.compute.trained_ranker import TrainedRanker
from schemas.errors import ArtifactError, GateError
from schemas.manifest import MANIFEST_FILE, RANKER_FP16, RANKER_INT8
from schemas.ranker import TEXT_DIM

ITEMS = 30
LABELS = ArtifactLabels("fingerprint", ("a",), ("b",), "encoder", "item.v1", "wish.v1", "2026-01-01")


def requests(people: int) -> Queries:
    n = 3 * people
    events = Interactions(
        np.array([f"u{number:02}" for number in range(people)], np.str_),
        np.array([f"i{number:02}" for number in range(ITEMS)]),
        np.repeat(np.arange(people), 3).astype(np.int32),
        np.arange(n, dtype=np.int32) % ITEMS,
        np.arange(n, dtype=np.int64) * 60_000_000,
        np.ones(n, np.int64),
        np.full(n, np.nan, np.float32),
    )
    return leave_one_out(events).queries


def trained(asked: Queries) -> TrainedRanker:
    """A ranker as it is initialised, with one context and one candidate feature."""
    ranker = Ranker(RankerShape(context_features=1, candidate_features=1)).eval()
    items = len(asked.interactions.item_ids)
    texts = torch.from_numpy(np.random.default_rng(0).standard_normal((items, TEXT_DIM)).astype(np.float32))
    tower = ItemTower(texts, ranker.user.out_features, torch.ones(items, dtype=torch.bool))
    return TrainedRanker(ranker, tower, TrainConfig(), [], {}, (1.0, 0.0), 0.0)


def write(folder: Path, labels: ArtifactLabels, people: int) -> None:
    """Write the artefact of a ranker that was not trained."""
    asked = requests(people)
    write_artifact(
        trained(asked), folder, labels, item_ids=asked.interactions.item_ids, popular_items=[], requests=asked
    )


def test_a_refused_artifact_leaves_no_manifest_of_an_earlier_one(tmp_path: Path) -> None:
    (tmp_path / MANIFEST_FILE).write_text("{}")
    with pytest.raises(GateError, match="0 requests are too few to judge int8 on"):
        write(tmp_path, LABELS, 0)
    assert not (tmp_path / MANIFEST_FILE).exists()


def test_what_judges_int8_does_not_calibrate_it() -> None:
    asked = requests(8)
    calibrating = artifact.calibration_queries(asked, seed=0)
    assert len(calibrating)
    assert not np.isin(calibrating.label, asked.label).any()
    assert len(artifact.calibration_queries(asked, seed=0, count=3)) == 3
    few = artifact.calibration_queries(asked, seed=0, count=2)
    judging = artifact.judging_queries(asked, few, seed=0, count=10)
    assert judging.label[:8].tolist() == asked.label.tolist()
    assert len(set(judging.label.tolist())) == len(judging) == 10
    assert not np.isin(judging.label, few.label).any()
    assert len(artifact.judging_queries(asked, few, seed=0, count=4)) == 8
    everything = replace(
        asked, label=np.arange(24), start=np.repeat(np.arange(8) * 3, 3), stop=np.arange(24, dtype=np.int64)
    )
    assert len(artifact.calibration_queries(everything, seed=0)) == 0


def test_some_of_what_calibrates_has_a_wish() -> None:
    asked = requests(8)
    wishes = artifact._wishes(trained(asked))(asked)
    has = (np.abs(wishes).sum(axis=1) > 0).tolist()
    assert any(has)
    assert not all(has)


@pytest.mark.parametrize("change", [{"context_features": ("a", "c")}, {"candidate_features": ()}])
def test_names_of_other_features_than_the_model_takes_are_refused(
    tmp_path: Path, change: dict[str, tuple[str, ...]]
) -> None:
    with pytest.raises(ArtifactError, match="the model takes 1 and 1"):
        write(tmp_path / "artifact", replace(LABELS, **change), 4)  # type: ignore[arg-type]  # both are names
    assert not (tmp_path / "artifact").exists()


def test_int8_that_fails_its_gate_is_left_out_and_the_float_graph_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shifted = Int8Report(4, 0.1, 0.1, 0.0, 0.99, 2 * INT8_BATCH_TOLERANCE_RATE)
    monkeypatch.setattr(artifact, "compare_int8", lambda *_, **__: shifted)
    monkeypatch.setattr(ranker, "fingerprint", lambda: LABELS.feature_fingerprint)
    monkeypatch.setattr(ranker, "context_features", lambda: LABELS.context_features)
    monkeypatch.setattr(ranker, "candidate_features", lambda: LABELS.candidate_features)
    write(tmp_path, LABELS, 8)
    served = ranker.Ranker(tmp_path, precision="int8")
    manifest = served.manifest
    assert "batch shift" in manifest.parity["int8"]["refused"]
    assert not (tmp_path / RANKER_INT8).exists()
    assert RANKER_INT8 not in manifest.files
    assert not [name for name in manifest.latency_ms if "int8" in name]
    assert served.precision == "fp32"
    _, scores = served.run(random_inputs(1, 9, 5, f=1, g=1, d=served.dim, seed=1))
    assert np.isfinite(scores).all()


def test_half_precision_that_fails_its_gate_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object) -> float:
        raise GateError("half precision moves a score")

    write(tmp_path / "whole", LABELS, 8)
    assert RANKER_FP16 in verify(tmp_path / "whole").files
    monkeypatch.setattr(artifact, "check_half", refuses)
    write(tmp_path / "part", LABELS, 8)
    manifest = verify(tmp_path / "part")
    assert manifest.parity["fp16"]["refused"] == "half precision moves a score"
    assert RANKER_FP16 not in manifest.files
    assert not (tmp_path / "part" / RANKER_FP16).exists()
