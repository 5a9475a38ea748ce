"""The gate lets a good graph through, whatever its lengths, and nothing else."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from rankers import random_ranker
from torch import Tensor, nn

from inference.artifacts import verify
from inference.ranker import CutEngine
from orchestration.compute.artifact import ArtifactLabels, write_artifact
from orchestration.compute.export import (
    Inputs,
    calibration_requests,
    cut,
    export_fp32,
    quantisable,
    quantise,
    random_inputs,
    session_runner,
)
from orchestration.compute.folded import fold
from orchestration.compute.interactions import Interactions
from orchestration.compute.model import Ranker, RankerShape
from orchestration.compute.parity import (
    FP32_SHIFT_RATE,
    INT8_BATCH_TOLERANCE_RATE,
    Int8Report,
    check_cut,
    check_int8,
    check_invariance,
    check_parity,
    invariance,
)
from orchestration.compute.splits import leave_one_out
from orchestration.compute.train import train
from orchestration.compute.train_config import TrainConfig
from orchestration.compute.trained_ranker import TrainedRanker
from schemas.errors import ArtifactError, GateError
from schemas.manifest import (
    ITEM_RESIDUALS,
    MANIFEST_FILE,
    RANKER_FP16,
    RANKER_FP32,
    RANKER_INT8,
    RANKER_INT8_PARTS,
    TEXT_PROJECTION,
    Manifest,
)
from schemas.ranker import CANDIDATE_INPUTS, INPUTS, OUTPUTS, SIZES, TEXT_DIM

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


@pytest.mark.parametrize("size", ["small", "standard"])
def test_parity_holds_over_the_sweep(tmp_path: Path, size: str) -> None:
    ranker, d = random_ranker(size, F, G), SIZES[size].dim
    export_fp32(fold(ranker), tmp_path / "ranker.onnx", f=F, g=G, d=d)
    graph = onnx.load(tmp_path / "ranker.onnx").graph
    assert [entry.name for entry in graph.input] == list(INPUTS)
    assert [entry.name for entry in graph.output] == list(OUTPUTS)
    worst = check_parity(ranker, session_runner(tmp_path / "ranker.onnx", threads=1), f=F, g=G, d=d)
    assert max(worst.values()) <= 1e-4


def test_folding_leaves_the_model_as_it_was() -> None:
    ranker = random_ranker("small", F, G)
    before = {name: value.clone() for name, value in ranker.state_dict().items()}
    fold(ranker)
    assert all(torch.equal(value, before[name]) for name, value in ranker.state_dict().items())


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


LAYERS = 2


def half_tensors(graph: onnx.GraphProto) -> set[str]:
    inferred = onnx.shape_inference.infer_shapes(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)])
    )
    return {
        entry.name
        for entry in inferred.graph.value_info
        if entry.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
    }


# Of each layer, for the prefix and for the candidates: query, key, value, out, gate, up and down are products with a
# weight; logits and weighted values are products of activations. Two Exp for the candidates: seen, and own.
PER_LAYER = {
    RANKER_FP32: {"product with a weight": 14, "product of activations": 4, "Exp": 3, "LayerNormalization": 4},
    RANKER_INT8: {
        "quantised product with a weight": 12,
        "product with a weight": 2,
        "product of activations": 4,
        "Exp": 3,
        "LayerNormalization": 4,
    },
    # The model's own attention: qkv, out, up, down twice; logits and values twice; the norms stay in float.
    RANKER_FP16: {
        "half product with a weight": 8,
        "half product of activations": 4,
        "Softmax": 2,
        "LayerNormalization": 4,
    },
}
COUNTED = ("Exp", "Softmax", "LayerNormalization", "QLinearMatMul", "DynamicQuantizeLinear")


def operators(graph: onnx.GraphProto, layer: int) -> dict[str, int]:
    """What the layer's products multiply, and how often each operator that matters stands in it."""
    weights = {tensor.name: tensor for tensor in graph.initializer}
    producer = {name: node for node in graph.node for name in node.output}
    in_half = half_tensors(graph)
    found: Counter[str] = Counter()
    for node in graph.node:
        if f"/blocks.{layer}/" not in node.name:
            continue
        if node.op_type in COUNTED:
            found[node.op_type] += 1
        if node.op_type != "MatMul":
            continue
        sources = [producer[name].op_type if name in producer else "weight" for name in node.input]
        words = []
        if set(sources) == {"DequantizeLinear"}:
            assert producer[node.input[1]].input[0] in weights
            words.append("quantised product with a weight")
        else:
            weight = next((weights[name] for name in node.input if name in weights), None)
            words.append("product of activations" if weight is None else "product with a weight")
            if node.output[0] in in_half:
                words.insert(0, "half")
        found[" ".join(words)] += 1
    return dict(found)


@pytest.mark.parametrize("name", [RANKER_FP32, RANKER_INT8, RANKER_FP16])
@pytest.mark.parametrize("layer", range(LAYERS))
def test_each_layer_multiplies_what_it_should_as_it_should(
    artifact: tuple[Path, Manifest], name: str, layer: int
) -> None:
    assert operators(onnx.load(artifact[0] / name).graph, layer) == PER_LAYER[name]


def test_what_lies_outside_the_layers_is_float(artifact: tuple[Path, Manifest]) -> None:
    graph = onnx.load(artifact[0] / RANKER_INT8).graph
    quantised = {name for node in graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    # Rounded is what six weights of each layer multiply, thrice for the prefix and thrice for the candidates; in the last
    # layer once more, for the two states that ask there. Behind a product nothing is rounded.
    found = Counter(node.op_type for node in graph.node)
    assert (found["QuantizeLinear"], found["DequantizeLinear"]) == (6 * LAYERS + 1, 12 * LAYERS + 1)
    outside = [node for node in graph.node if node.op_type in ("MatMul", "Gemm") and "/blocks." not in node.name]
    assert len(outside) == len(
        [
            node
            for node in onnx.load(artifact[0] / RANKER_FP32).graph.node
            if node.op_type in ("MatMul", "Gemm") and "/blocks." not in node.name
        ]
    )
    assert not [node.name for node in outside if quantised.intersection(node.input)]


def test_the_runtime_multiplies_integers(artifact: tuple[Path, Manifest], tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(artifact[0] / RANKER_INT8, options, providers=["CPUExecutionProvider"])
    found = Counter(node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node)
    integer = {name: count for name, count in found.items() if "Integer" in name or name.startswith("QLinearMat")}
    assert integer == {"MatMulIntegerToFloat": 12 * LAYERS}
    assert "DequantizeLinear" not in found


def test_halves_answer_to_the_bit_and_do_nothing_twice(artifact: tuple[Path, Manifest]) -> None:
    folder, manifest = artifact
    assert {RANKER_INT8, *RANKER_INT8_PARTS} <= manifest.files.keys()
    whole, person, candidates = (onnx.load(folder / name).graph for name in (RANKER_INT8, *RANKER_INT8_PARTS))
    # What the candidates' half reads of people: keys and values of each layer, who is padding, and the user vector.
    states = {entry.name for entry in person.output} - {"user_vector"}
    assert len(states) == 2 * LAYERS + 2
    assert {entry.name for entry in candidates.input} == {*states, *CANDIDATE_INPUTS}
    assert not {node.name for node in person.node if node.op_type == "MatMul"} & {
        node.name for node in candidates.node if node.op_type == "MatMul"
    }
    assert sum(node.op_type == "MatMul" for part in (person, candidates) for node in part.node) == sum(
        node.op_type == "MatMul" for node in whole.node
    )
    check_cut(
        session_runner(folder / RANKER_INT8, threads=1),
        CutEngine(*(folder / name for name in RANKER_INT8_PARTS), 1).run,
        f=1,
        g=1,
        d=D,
    )


def test_halves_of_another_graph_are_refused(artifact: tuple[Path, Manifest], tmp_path: Path) -> None:
    folder, _ = artifact
    export_fp32(fold(random_ranker("small", 1, 1)), tmp_path / "other.onnx", f=1, g=1, d=D)
    cut(tmp_path / "other.onnx", tmp_path / "a.onnx", tmp_path / "b.onnx")
    parts = CutEngine(tmp_path / "a.onnx", tmp_path / "b.onnx", 1)
    with pytest.raises(
        GateError, match="in two files the graph gives another user_vector than in one at b=1, h=1, n=1"
    ):
        check_cut(session_runner(folder / RANKER_INT8, threads=1), parts.run, f=1, g=1, d=D)


def test_a_weight_that_is_used_twice_is_quantised_twice(artifact: tuple[Path, Manifest]) -> None:
    nodes = quantisable(onnx.load(artifact[0] / RANKER_FP32).graph)
    assert len(nodes) == len(set(nodes)) == 12 * LAYERS
    assert not any("/down" in name for name in nodes)


def padded_requests(trained: TrainedRanker) -> Inputs:
    """Real requests of different lengths, so that a batch pads."""
    events, _ = world()
    queries = leave_one_out(events).queries
    queries = replace(queries, stop=np.maximum(queries.start + 1, queries.stop - np.arange(len(queries)) % 9))
    return trained.scorer().inputs(queries, np.tile(np.arange(40, dtype=np.int32), (len(queries), 1)))


@pytest.mark.parametrize(
    ("name", "tolerance"), [(RANKER_FP32, FP32_SHIFT_RATE), (RANKER_INT8, INT8_BATCH_TOLERANCE_RATE)]
)
def test_company_order_and_padding_change_no_score(
    artifact: tuple[Path, Manifest], trained: TrainedRanker, name: str, tolerance: float
) -> None:
    assert invariance(session_runner(artifact[0] / name, threads=1), padded_requests(trained)) <= tolerance


def test_padding_changes_no_bit_of_a_folded_graph(tmp_path: Path) -> None:
    export_fp32(fold(random_ranker("small", F, G)), tmp_path / "a.onnx", f=F, g=G, d=D)
    run = session_runner(tmp_path / "a.onnx", threads=1)
    for length in (1, 17, 100):
        inputs = random_inputs(1, length, 30, f=F, g=G, d=D, seed=length)
        user, scores = run(inputs)
        for more in (1, 16, 99):
            wider = {
                key: np.pad(value, [(0, 0), (more, 0), *[(0, 0)] * (value.ndim - 2)]) if "history" in key else value
                for key, value in inputs.items()
            }
            for answer, expected in zip(run(wider), (user, scores), strict=True):
                np.testing.assert_array_equal(answer, expected)


@pytest.mark.parametrize("broken", ["batch", "candidates", "order", "padding"])
def test_a_score_that_depends_on_company_is_found(trained: TrainedRanker, broken: str) -> None:
    inputs = padded_requests(trained)

    def run(given: Inputs) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[type-arg]
        user, scores = trained.run(given)
        b, n = scores.shape
        more = {
            "batch": b > 1,
            "candidates": n < 40,
            "order": not np.array_equal(given["candidate_vectors"][:, :5], inputs["candidate_vectors"][:b, :5]),
            "padding": given["history_mask"].shape[1] > inputs["history_mask"].shape[1],
        }[broken]
        return user, scores + np.float32(0.1 * scores.std() * more)

    assert invariance(run, inputs) >= 0.05
    with pytest.raises(GateError, match="with company, order or padding"):
        check_invariance(run, inputs)


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
    queries = leave_one_out(events).queries.take(slice(0, 3))
    requests = list(calibration_requests(trained.scorer(), queries, offered=20, candidates=8))
    assert len(requests) == 3
    assert all(request["history_mask"].all() for request in requests)
    # What calibrates is what serving would offer: among the nearest that the person has not had.
    offered = trained.scorer().offered(queries, 20)
    vectors = trained.item_vectors()
    for row, request in enumerate(requests):
        near = {vectors[item].tobytes() for item in offered[row]}
        assert {vector.tobytes() for vector in request["candidate_vectors"][0]} <= near
    assert not queries.seen()[np.arange(3)[:, None], offered].any()
