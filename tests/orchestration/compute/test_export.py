"""The gate lets a good graph through, whatever its lengths, and nothing else."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from inference.artifacts import verify
from orchestration.compute.artifact import ArtifactLabels, write_artifact
from orchestration.compute.export import calibration_requests, export_fp32, quantise, random_inputs, session_runner
from orchestration.compute.interactions import Interactions
from orchestration.compute.model import Ranker, RankerShape
from orchestration.compute.parity import Int8Report, check_int8, check_parity
from orchestration.compute.splits import leave_one_out
from orchestration.compute.train import train
from orchestration.compute.train_config import TrainConfig
from orchestration.compute.trained_ranker import TrainedRanker
from schemas.errors import ArtifactError, GateError
from schemas.manifest import ITEM_RESIDUALS, MANIFEST_FILE, RANKER_INT8, TEXT_PROJECTION, Manifest
from schemas.ranker import INPUTS, OUTPUTS, TEXT_DIM

F, G, D = 3, 4, 64
LABELS = ArtifactLabels("fingerprint", ("a",), ("b",), "encoder", "item.v1", "wish.v1", "2026-01-01")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    """Tiny products on a busy machine: waiting for a second thread costs more than it saves."""
    torch.set_num_threads(1)


def world() -> tuple[Interactions, np.ndarray[tuple[int, int], np.dtype[np.float32]]]:
    generator = np.random.default_rng(0)
    people, items, length = 80, 60, 12
    item = np.concatenate([generator.permutation(items)[:length] for _ in range(people)])
    n = people * length
    events = Interactions(
        np.array([f"u{i}" for i in range(people)]),
        np.array([f"i{i}" for i in range(items)]),
        np.repeat(np.arange(people), length).astype(np.int32),
        item.astype(np.int32),
        np.arange(n, dtype=np.int64) * 60_000_000,
        np.ones(n, np.int64),
        np.full(n, np.nan, np.float32),
    )
    return events, generator.standard_normal((items, TEXT_DIM)).astype(np.float32)


@pytest.fixture(scope="module")
def trained() -> TrainedRanker:
    events, texts = world()
    return train(events, texts, TrainConfig(epochs=2, batch_tokens=512))


@pytest.fixture(scope="module")
def artifact(trained: TrainedRanker, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    folder = tmp_path_factory.mktemp("artifact")
    events, _ = world()
    manifest = write_artifact(
        trained,
        folder,
        LABELS,
        item_ids=events.item_ids,
        popular_items=[{"item_id": "i0", "title": "Zero", "score": 1.0}],
        requests=leave_one_out(events).queries,
    )
    return folder, manifest


class BakesLength(nn.Module):
    """A ranker whose history length is fixed when it is traced, as nn.MultiheadAttention's was."""

    def __init__(self, ranker: Ranker) -> None:
        super().__init__()
        self.ranker = ranker

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        given = dict(zip(INPUTS, inputs, strict=True))
        length = int(given["history_mask"].shape[1])
        ramp = torch.from_numpy(np.linspace(1, 2, length, dtype=np.float32))
        given["history_vectors"] = given["history_vectors"] * ramp.reshape(1, length, 1)
        user, scores = self.ranker(**given)
        return user, scores


class Keywords(nn.Module):
    """Calls a module that takes positions with the contract's names."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, **inputs: Tensor) -> tuple[Tensor, Tensor]:
        user, scores = self.module(*(inputs[name] for name in INPUTS))
        return user, scores


def test_parity_holds_over_the_sweep(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ranker = Ranker(RankerShape(context_features=F, candidate_features=G)).eval()
    nn.init.normal_(ranker.correction.weight)
    export_fp32(ranker, tmp_path / "ranker.onnx", f=F, g=G, d=D)
    graph = onnx.load(tmp_path / "ranker.onnx").graph
    assert [entry.name for entry in graph.input] == list(INPUTS)
    assert [entry.name for entry in graph.output] == list(OUTPUTS)
    worst = check_parity(ranker, session_runner(tmp_path / "ranker.onnx", threads=1), f=F, g=G, d=D)
    assert max(worst.values()) <= 1e-4


def test_a_baked_length_is_refused(tmp_path: Path) -> None:
    broken = BakesLength(Ranker(RankerShape(context_features=F, candidate_features=G)).eval())
    export_fp32(broken, tmp_path / "ranker.onnx", f=F, g=G, d=D)
    with pytest.raises(GateError, match="a length was baked in"):
        check_parity(Keywords(broken), session_runner(tmp_path / "ranker.onnx", threads=1), f=F, g=G, d=D)


def test_other_weights_are_refused(tmp_path: Path) -> None:
    shape = RankerShape(context_features=F, candidate_features=G)
    export_fp32(Ranker(shape), tmp_path / "ranker.onnx", f=F, g=G, d=D)
    with pytest.raises(GateError, match="differs from PyTorch"):
        check_parity(Ranker(shape), session_runner(tmp_path / "ranker.onnx", threads=1), f=F, g=G, d=D)


def test_an_artifact_holds_what_its_manifest_says(artifact: tuple[Path, Manifest]) -> None:
    folder, manifest = artifact
    assert verify(folder) == manifest
    assert {path.name for path in folder.iterdir()} == {*manifest.files, MANIFEST_FILE}
    assert manifest.parity["int8"]["top_10_overlap_rate"] >= 0.95


def test_vectors_can_be_rebuilt_from_the_artifact(artifact: tuple[Path, Manifest], trained: TrainedRanker) -> None:
    folder, _ = artifact
    events, texts = world()
    with np.load(folder / TEXT_PROJECTION) as projection, np.load(folder / ITEM_RESIDUALS) as learned:
        vectors = texts @ projection["weight"].T + projection["bias"]
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        index = {item: row for row, item in enumerate(events.item_ids)}
        vectors[[index[item] for item in learned["item_ids"]]] += learned["residuals"]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    np.testing.assert_allclose(vectors, trained.item_vectors(), atol=1e-5)


def test_int8_products_are_the_weights_of_the_blocks_only(artifact: tuple[Path, Manifest]) -> None:
    graph = onnx.load(artifact[0] / RANKER_INT8).graph
    producer = {name: node for node in graph.node for name in node.output}

    def quantised(name: str) -> bool:
        return name in producer and producer[name].op_type == "DequantizeLinear"

    products = [node for node in graph.node if node.op_type == "MatMul"]
    integer = [node for node in products if all(quantised(name) for name in node.input)]
    assert integer
    assert len(integer) < len(products)
    assert all("/blocks." in node.name for node in integer)


def test_an_int8_score_does_not_depend_on_the_batch(artifact: tuple[Path, Manifest], trained: TrainedRanker) -> None:
    events, _ = world()
    queries = leave_one_out(events).queries
    # Different lengths, so that a batch pads.
    queries = replace(queries, stop=np.maximum(queries.start + 1, queries.stop - np.arange(len(queries)) % 9))
    scorer = replace(trained.scorer(), run=session_runner(artifact[0] / RANKER_INT8, threads=1))
    candidates = np.tile(np.arange(40, dtype=np.int32), (len(queries), 1))
    together = scorer.run(scorer.inputs(queries, candidates))[1]
    for row in range(0, len(queries), 7):
        part = slice(row, row + 1)
        alone = scorer.run(scorer.inputs(queries.take(part), candidates[part]))[1][0]
        assert np.abs(alone - together[row]).max() <= 0.01 * alone.std()


def test_a_tampered_or_missing_file_is_refused(artifact: tuple[Path, Manifest], tmp_path: Path) -> None:
    folder, manifest = artifact
    for name in (*manifest.files, MANIFEST_FILE):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    content = bytearray((tmp_path / RANKER_INT8).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / RANKER_INT8).write_bytes(content)
    with pytest.raises(ArtifactError, match="SHA-256 differs"):
        verify(tmp_path)
    (tmp_path / RANKER_INT8).unlink()
    with pytest.raises(ArtifactError, match="is missing"):
        verify(tmp_path)
    (tmp_path / MANIFEST_FILE).unlink()
    with pytest.raises(ArtifactError, match="never finished"):
        verify(tmp_path)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"ndcg_loss_rate": 0.02}, "NDCG@10 loss 2.00%"),
        ({"top_10_overlap_rate": 0.9}, "top-10 overlap 0.900"),
        ({"batch_shift_rate": 0.05}, "batch shift 0.0500"),
    ],
)
def test_a_bad_int8_is_refused_with_its_figure(change: dict[str, float], fault: str) -> None:
    good = Int8Report(512, 0.1, 0.1, 0.0, 1.0, 0.0)
    assert check_int8(good) == good
    with pytest.raises(GateError, match=fault):
        check_int8(replace(good, **change))  # type: ignore[arg-type]  # every changed field is a float


def test_quantising_leaves_logging_as_it_was(tmp_path: Path) -> None:
    export_fp32(Ranker(RankerShape(context_features=F, candidate_features=G)), tmp_path / "a.onnx", f=F, g=G, d=D)
    logging.disable(logging.ERROR)
    try:
        quantise(tmp_path / "a.onnx", tmp_path / "b.onnx", [random_inputs(1, 5, 7, f=F, g=G, d=D, seed=0)])
        assert logging.root.manager.disable == logging.ERROR
    finally:
        logging.disable(logging.NOTSET)


def test_calibration_requests_are_one_request_each(trained: TrainedRanker) -> None:
    events, _ = world()
    requests = list(calibration_requests(trained.scorer(), leave_one_out(events).queries.take(slice(0, 3))))
    assert len(requests) == 3
    assert all(request["history_mask"].all() for request in requests)
