"""The ranker as an ONNX graph: Optimum export in float, its static int8 twin, sessions on either."""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.utils
import onnxruntime
import torch
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantizationMode, QuantType
from optimum.exporters.onnx import export
from optimum.exporters.onnx.base import OnnxConfig
from optimum.onnxruntime import ORTQuantizer
from optimum.onnxruntime.configuration import CalibrationConfig, QuantizationConfig
from optimum.utils import DummyInputGenerator, NormalizedConfig
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from orchestration.compute.evaluate import RankerScorer, RunRanker
from orchestration.compute.model import Ranker
from orchestration.compute.splits import Queries
from schemas.errors import GateError
from schemas.events import KINDS
from schemas.ranker import CANDIDATE_INPUTS, INPUTS, OUTPUTS, PERSON_INPUTS

Inputs = dict[str, NDArray[Any]]


# ---- float


class RankerConfig(PretrainedConfig):  # type: ignore[misc]  # transformers is untyped here
    """What Optimum wants to know of a model; the shapes live in `RankerShape`."""

    model_type = "larder-ranker"


class ExportableRanker(PreTrainedModel):  # type: ignore[misc]  # transformers is untyped here
    """The ranker under the class that Optimum exports, with outputs by name."""

    config_class = RankerConfig

    def __init__(self, ranker: nn.Module) -> None:
        super().__init__(RankerConfig())
        self.ranker = ranker

    def forward(
        self,
        context_features: Tensor,
        context_mask: Tensor,
        prompt_vector: Tensor,
        prompt_mask: Tensor,
        history_vectors: Tensor,
        history_kinds: Tensor,
        history_values: Tensor,
        history_gaps: Tensor,
        history_mask: Tensor,
        candidate_vectors: Tensor,
        candidate_features: Tensor,
        candidate_mask: Tensor,
    ) -> dict[str, Tensor]:
        """The contract's inputs by name; Optimum matches them to the graph's."""
        outputs = self.ranker(
            context_features,
            context_mask,
            prompt_vector,
            prompt_mask,
            history_vectors,
            history_kinds,
            history_values,
            history_gaps,
            history_mask,
            candidate_vectors,
            candidate_features,
            candidate_mask,
        )
        return dict(zip(OUTPUTS, outputs, strict=True))


class _DummyInputs(DummyInputGenerator):  # type: ignore[misc]  # optimum is untyped
    SUPPORTED_INPUT_NAMES = INPUTS

    def __init__(self, task: str, config: NormalizedConfig, **_: Any) -> None:
        f, g, d = (getattr(config, name) for name in ("context_features", "candidate_features", "dim"))
        # Odd, unequal sizes: an axis mistaken for another shows at once.
        self.inputs = random_inputs(2, 5, 7, f=f, g=g, d=d, seed=0)

    def generate(
        self, input_name: str, framework: str = "pt", int_dtype: str = "int64", float_dtype: str = "fp32"
    ) -> Any:
        value = self.inputs[input_name]
        return torch.from_numpy(value) if framework == "pt" else value


class RankerOnnxConfig(OnnxConfig):  # type: ignore[misc]  # optimum is untyped
    """Names and dynamic axes of the graph."""

    NORMALIZED_CONFIG_CLASS = NormalizedConfig
    DUMMY_INPUT_GENERATOR_CLASSES = (_DummyInputs,)

    @property
    def inputs(self) -> dict[str, dict[int, str]]:
        second = {"history": "h", "candidate": "n"}
        axes: dict[str, dict[int, str]] = {}
        for name in INPUTS:
            length = second.get(name.split("_")[0])
            axes[name] = {0: "b", 1: length} if length else {0: "b"}
        return axes

    @property
    def outputs(self) -> dict[str, dict[int, str]]:
        return {"user_vector": {0: "b"}, "scores": {0: "b", 1: "n"}}


def export_fp32(ranker: Ranker | nn.Module, path: Path, *, f: int, g: int, d: int) -> None:
    """Write the float graph of `ranker` (f context features, g candidate features, width d) to `path`."""
    model = ExportableRanker(ranker).eval()
    for name, value in (("context_features", f), ("candidate_features", g), ("dim", d)):
        setattr(model.config, name, value)
    with warnings.catch_warnings():
        # The tracing exporter that Optimum 2.1 uses announces its successor; nothing here can act on that.
        warnings.simplefilter("ignore")
        export(model, RankerOnnxConfig(model.config), path, opset=18)
    graph = onnx.load(path)
    _name_weights(graph.graph)
    onnx.checker.check_model(graph)
    onnx.save(graph, path)


def _name_weights(graph: onnx.GraphProto) -> None:
    """Let every product name its weight itself: the exporter stores equal tensors once and puts an Identity before each
    further use, behind which a quantiser, or a runtime that packs weights in advance, sees no weight."""
    weights = {tensor.name for tensor in graph.initializer}
    copies = {
        node.output[0]: node.input[0] for node in graph.node if node.op_type == "Identity" and node.input[0] in weights
    }
    for node in graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = copies.get(name, name)
    kept = [node for node in graph.node if not (node.op_type == "Identity" and node.output[0] in copies)]
    del graph.node[:]
    graph.node.extend(kept)


def random_inputs(b: int, h: int, n: int, *, f: int, g: int, d: int, seed: int) -> Inputs:
    """Inputs of every shape the contract allows: histories of any length, none included, wishes, missing features."""
    generator = np.random.default_rng(seed)

    def unit(*shape: int) -> NDArray[np.float32]:
        vectors = generator.standard_normal(shape).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
        return vectors

    length = generator.integers(0, h + 1, b)
    length[0] = h  # at least one is full
    mask = (np.arange(h) >= h - length[:, None]).astype(np.float32)
    prompt = (generator.random(b) < 0.5).astype(np.float32)
    return {
        "context_features": generator.standard_normal((b, f)).astype(np.float32),
        "context_mask": (generator.random((b, f)) < 0.8).astype(np.float32),
        "prompt_vector": unit(b, d) * prompt[:, None],
        "prompt_mask": prompt,
        "history_vectors": unit(b, h, d) * mask[:, :, None],
        "history_kinds": generator.integers(1, len(KINDS) + 1, (b, h)) * mask.astype(np.int64),
        "history_values": (generator.integers(0, 6, (b, h)) * mask).astype(np.float32),
        "history_gaps": (np.exp(generator.uniform(0, 17, (b, h))) * mask).astype(np.float32),
        "history_mask": mask,
        "candidate_vectors": unit(b, n, d),
        "candidate_features": generator.standard_normal((b, n, g)).astype(np.float32),
        "candidate_mask": (generator.random((b, n, g)) < 0.8).astype(np.float32),
    }


def session_runner(path: Path, *, threads: int = 0) -> RunRanker:
    """`path` on ONNX Runtime's CPU provider, as a function from inputs to outputs."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(inputs: Inputs) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        user, scores = session.run(list(OUTPUTS), {name: inputs[name] for name in INPUTS})
        return user, scores

    return run


# ---- int8


class _Requests(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime is untyped
    def __init__(self, requests: Iterable[Inputs]) -> None:
        self._requests: Iterator[Inputs] = iter(requests)

    def get_next(self) -> Inputs | None:
        return next(self._requests, None)


def quantise(fp32: Path, int8: Path, requests: Iterable[Inputs]) -> None:
    """Write a static int8 twin of the graph at `fp32`, its ranges taken from real `requests`.

    Only products with a weight inside the blocks are quantised; activation × activation products, the projections into
    and out of the body and the correction head stay in float, and so does the way down from SwiGLU, whose input is a
    product with outliers. Weights have 7 bits: without VNNI the 8-bit product saturates, and a score would depend on the
    machine.
    """
    nodes = quantisable(onnx.load(fp32).graph)
    if not nodes:
        raise GateError(f"{fp32.name} has no product with a weight inside its blocks: nothing to quantise")
    calibration = CalibrationConfig(
        "requests", "default", "train", 0, onnxruntime.quantization.CalibrationMethod.MinMax
    )
    configuration = QuantizationConfig(
        is_static=True,
        format=QuantFormat.QDQ,
        mode=QuantizationMode.QLinearOps,
        activations_dtype=QuantType.QUInt8,
        weights_dtype=QuantType.QInt8,
        weights_symmetric=True,
        per_channel=True,
        reduce_range=True,
        nodes_to_quantize=nodes,
        operators_to_quantize=["MatMul"],
    )
    with tempfile.TemporaryDirectory(dir=int8.parent) as folder, _quiet():
        quantizer = ORTQuantizer(fp32, config=RankerConfig())
        calibrator = calibration.create_calibrator(
            onnx_model_path=fp32.as_posix(),
            operators_to_quantize=["MatMul"],
            augmented_model_name=str(Path(folder) / "augmented"),
        )
        calibrator.collect_data(_Requests(requests))
        quantizer.quantize(configuration, folder, calibration_tensors_range=calibrator.compute_data())
        # Optimum takes what follows the first dot of the name for a suffix, so the name is looked up, not built.
        (written,) = Path(folder).glob("*.onnx")
        graph = onnx.load(written)
    _keep_products_in_float(graph.graph)
    onnx.checker.check_model(graph)
    part = int8.with_name(f"{int8.name}.part")
    onnx.save(graph, part)
    os.replace(part, int8)


def quantisable(graph: onnx.GraphProto) -> list[str]:
    """Names of the products that int8 computes; see `quantise`."""
    weights = {tensor.name for tensor in graph.initializer}
    return [
        node.name
        for node in graph.node
        if node.op_type == "MatMul"
        and "/blocks." in node.name
        and "/down" not in node.name
        and any(name in weights for name in node.input)
    ]


def _keep_products_in_float(graph: onnx.GraphProto) -> None:
    """Take away the rounding of what a quantised product gives: all that reads it is float, so the quantiser's pair of
    operators behind each product would cost precision and time for nothing."""
    products = {name for node in graph.node if node.op_type == "MatMul" for name in node.output}
    rounded = {
        node.output[0]: node.input[0]
        for node in graph.node
        if node.op_type == "QuantizeLinear" and node.input[0] in products
    }
    back = {node.output[0]: rounded[node.input[0]] for node in graph.node if node.input and node.input[0] in rounded}
    for node in graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = back.get(name, name)
    gone = {*rounded, *back}
    kept = [node for node in graph.node if node.output[0] not in gone]
    del graph.node[:]
    graph.node.extend(kept)
    used = {name for node in graph.node for name in node.input}
    initializers = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(initializers)


# ---- in two


def cut(whole: Path, person: Path, candidates: Path) -> None:
    """Write the graph at `whole` as two: `person`, whatever hangs on no input of a candidate, and `candidates`, the rest.

    The first gives `user_vector` and each tensor that the second goes on with, which are the second's inputs by the same
    names: keys and values of every layer, and what hides padding. A request then goes through the person's part once,
    before its candidates are known, and not again with them. The nodes stay as they are, and so does every score.
    """
    model = onnx.load(whole)
    before, after = set(PERSON_INPUTS), set(CANDIDATE_INPUTS)
    states: list[str] = []
    for node in model.graph.node:  # in an order in which what a node reads was made before it
        if not after.isdisjoint(node.input):
            after.update(node.output)
            states += [name for name in node.input if name in before and name not in states]
        elif not before.isdisjoint(node.input):
            before.update(node.output)
    extractor = onnx.utils.Extractor(onnx.shape_inference.infer_shapes(model))
    user_vector, scores = OUTPUTS
    for path, inputs, outputs in (
        (person, list(PERSON_INPUTS), [user_vector, *states]),
        (candidates, [*states, *CANDIDATE_INPUTS], [scores]),
    ):
        part = extractor.extract_model(inputs, outputs)
        onnx.checker.check_model(part)
        onnx.save(part, path)


@contextmanager
def _quiet() -> Iterator[None]:
    """The quantiser's advice to pre-process the graph goes to the root logger, once a call."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        yield
    finally:
        logging.disable(before)


def calibration_requests(
    scorer: RankerScorer, queries: Queries, *, offered: int = 500, candidates: int = 64, seed: int = 0
) -> Iterator[Inputs]:
    """Each of `queries` as one request of its own (padding would blur the ranges) with `candidates` at random of those
    `offered` that serving would re-rank: items that nobody would offer would widen the ranges for nothing."""
    generator = np.random.default_rng(seed)
    for begin in range(0, len(queries), 64):
        # Features are asked for in batches, because one question costs about as much as sixty-four.
        part = queries.take(slice(begin, begin + 64))
        near = generator.permuted(scorer.offered(part, offered), axis=1)[:, :candidates]
        inputs = scorer.inputs(part, near)
        yield from (alone(inputs, row) for row in range(len(part)))


def alone(inputs: Inputs, row: int) -> Inputs:
    """Request `row` of a batch as a request of its own: without the padding that longer histories beside it brought."""
    length = max(1, int(inputs["history_mask"][row].sum()))
    return {
        name: value[row : row + 1, -length:] if name.startswith("history_") else value[row : row + 1]
        for name, value in inputs.items()
    }
