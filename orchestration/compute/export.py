"""From a trained ranker to an artefact: Optimum export, static int8, the gate, files with hashes, manifest last."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
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

from orchestration.compute.evaluate import MakeSlates, Queries, RankerScorer, RunRanker, gain, ranks
from orchestration.compute.model import Ranker
from orchestration.compute.train import TrainedRanker
from schemas.errors import ArtifactError, GateError
from schemas.events import KINDS
from schemas.manifest import (
    ITEM_RESIDUALS,
    MANIFEST_FILE,
    POPULAR_ITEMS,
    RANKER_FP32,
    RANKER_INT8,
    TEXT_PROJECTION,
    ArtifactFile,
    Manifest,
)
from schemas.ranker import INPUTS, MAX_CANDIDATES, MAX_HISTORY, OUTPUTS

FP32_TOLERANCE = 1e-4
INT8_NDCG_LOSS_RATE = 0.01
INT8_TOP_10_OVERLAP_RATE = 0.95
INT8_BATCH_TOLERANCE_RATE = 0.01
"""Of the spread of a request's scores. Static ranges make int8 a function of the request alone, up to the order of a
float sum, which can tip a rounding by one step; dynamic ranges, taken over the whole batch, move scores by 5 %."""
SWEEP = (1, 2, 3, 17)
"""Sizes of every dynamic dimension that the gate tries, besides the maximum."""

Inputs = dict[str, NDArray[Any]]


# ---- export


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
    onnx.checker.check_model(str(path))


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
    product with outliers (measured: top-10 overlap 0.961 with it, 0.987 without). Weights have 7 bits: without VNNI
    the 8-bit product saturates (0.942), and a score would depend on the machine.
    """
    graph = onnx.load(fp32).graph
    weights = {tensor.name for tensor in graph.initializer}
    nodes = [
        node.name
        for node in graph.node
        if node.op_type == "MatMul"
        and "/blocks." in node.name
        and "/down/" not in node.name
        and any(name in weights for name in node.input)
    ]
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
        os.replace(written, int8)


class _quiet:
    """The quantiser's advice to pre-process the graph goes to the root logger, once a call."""

    def __enter__(self) -> None:
        logging.disable(logging.WARNING)

    def __exit__(self, *_: object) -> None:
        logging.disable(logging.NOTSET)


# ---- the gate


def check_parity(
    ranker: nn.Module, run: RunRanker, *, f: int, g: int, d: int, tolerance: float = FP32_TOLERANCE
) -> dict[str, float]:
    """Compare `run` with PyTorch over a sweep of every dynamic dimension, not only at the traced shape.

    Returns the worst absolute difference per output. Raises GateError naming the first shape that fails or differs.
    """
    worst = dict.fromkeys(OUTPUTS, 0.0)
    ranker.eval()
    for b, h, n in product(SWEEP, (*SWEEP, MAX_HISTORY), (*SWEEP, MAX_CANDIDATES)):
        if b > 2 and (h == MAX_HISTORY or n == MAX_CANDIDATES):
            continue  # a graph that takes these lengths for one and two requests takes them for more
        inputs = random_inputs(b, h, n, f=f, g=g, d=d, seed=b * 1_000_003 + h * 1009 + n)
        with torch.no_grad():
            expected = ranker(**{name: torch.from_numpy(value) for name, value in inputs.items()})
        try:
            answers = run(inputs)
        except Exception as error:  # onnxruntime raises its own types, all of them below Exception
            raise GateError(
                f"the graph fails at b={b}, h={h}, n={n}: {str(error).splitlines()[0]}; "
                "a length was baked in when it was traced"
            ) from error
        for name, answer, reference in zip(OUTPUTS, answers, expected, strict=True):
            if answer.shape != tuple(reference.shape):
                raise GateError(
                    f"{name} has shape {answer.shape} at b={b}, h={h}, n={n}, PyTorch {tuple(reference.shape)}"
                )
            difference = float(np.abs(answer - reference.numpy()).max())
            if not difference <= tolerance:  # also true for NaN
                raise GateError(
                    f"{name} differs from PyTorch by {difference:.2e} at b={b}, h={h}, n={n}; at most {tolerance:g} is allowed"
                )
            worst[name] = max(worst[name], difference)
    return worst


@dataclass(frozen=True, slots=True)
class Int8Report:
    """What quantisation cost on real requests."""

    requests: int
    ndcg_at_10_fp32: float
    ndcg_at_10_int8: float
    ndcg_loss_rate: float
    top_10_overlap_rate: float
    batch_shift_rate: float
    """Largest change of a score when its request is answered in a batch instead of alone, over the spread (standard
    deviation) of the request's scores."""


def compare_int8(fp32: RankerScorer, int8: RankerScorer, queries: Queries, *, candidates: int = 200) -> Int8Report:
    """Measure int8 against float on `queries`, each re-ranking the same `candidates` items."""
    labels = {}
    for name, scorer in (("fp32", fp32), ("int8", int8)):
        labels[name] = float(gain(ranks(scorer, queries, batch=128), 10).mean())
    overlaps: list[float] = []
    shifts: list[float] = []
    width = min(candidates, len(fp32.item_vectors))
    for begin in range(0, len(queries), 64):
        part = queries.take(slice(begin, begin + 64))
        user, _ = fp32.run(fp32.inputs(part, np.zeros((len(part), 1), np.int32)))
        offered = np.argsort(-(user @ fp32.item_vectors.T), axis=1, kind="stable")[:, :width].astype(np.int32)
        inputs = fp32.inputs(part, offered)
        exact, quantised = fp32.run(inputs)[1], int8.run(inputs)[1]
        for row in range(len(part)):
            best, ours = (set(np.argsort(-scores[row], kind="stable")[:10]) for scores in (exact, quantised))
            overlaps.append(len(best & ours) / len(best))
            single = int8.run(alone(inputs, row))[1][0]
            shifts.append(float(np.abs(single - quantised[row]).max() / max(float(single.std()), 1e-6)))
    loss = 1 - labels["int8"] / labels["fp32"] if labels["fp32"] else 0.0
    return Int8Report(
        len(queries), labels["fp32"], labels["int8"], loss, float(np.mean(overlaps)), max(shifts, default=0.0)
    )


def check_int8(report: Int8Report) -> Int8Report:
    """Return `report` if int8 is good enough to be served. Raises GateError with every figure that is not."""
    faults = []
    if report.ndcg_loss_rate > INT8_NDCG_LOSS_RATE:
        faults.append(f"NDCG@10 loss {report.ndcg_loss_rate:.2%}, at most {INT8_NDCG_LOSS_RATE:.0%}")
    if report.top_10_overlap_rate < INT8_TOP_10_OVERLAP_RATE:
        faults.append(f"top-10 overlap {report.top_10_overlap_rate:.3f}, at least {INT8_TOP_10_OVERLAP_RATE}")
    if report.batch_shift_rate > INT8_BATCH_TOLERANCE_RATE:
        faults.append(f"batch shift {report.batch_shift_rate:.4f} of the spread, at most {INT8_BATCH_TOLERANCE_RATE}")
    if faults:
        raise GateError(f"int8 does not pass: {'; '.join(faults)}. Calibrate on more requests or serve fp32")
    return report


def latency_ms(run: RunRanker, *, f: int, g: int, d: int, n: int = 500, runs: int = 30) -> dict[str, float]:
    """p50 and p99 of one request with a full history and `n` candidates, after a warm-up."""
    inputs = random_inputs(1, MAX_HISTORY, n, f=f, g=g, d=d, seed=0)
    took = []
    for _ in range(runs + 3):
        began = time.perf_counter()
        run(inputs)
        took.append((time.perf_counter() - began) * 1000)
    return {"p50": float(np.quantile(took[3:], 0.5)), "p99": float(np.quantile(took[3:], 0.99))}


# ---- the artefact


@dataclass(frozen=True, slots=True)
class ArtifactLabels:
    """What a manifest says beside the model itself; see `schemas.manifest.Manifest`."""

    feature_fingerprint: str
    context_features: tuple[str, ...]
    candidate_features: tuple[str, ...]
    encoder_version: str
    item_template: str
    wish_template: str
    trained_until: str
    name: str = "ranker"


def write_artifact(
    trained: TrainedRanker,
    folder: Path,
    labels: ArtifactLabels,
    *,
    item_ids: NDArray[np.str_],
    popular_items: Sequence[Mapping[str, object]],
    requests: Queries,
    quality: Mapping[str, Any] | None = None,
    slates: MakeSlates | None = None,
) -> Manifest:
    """Export, quantise, pass the gate and write every file of the artefact into `folder`, the manifest last.

    `item_ids (items,)` is the catalogue in training order; `requests` are real ones (1,024 or more are wanted): a random
    half calibrates int8 (ranges only, no label is looked at), the other half judges it. Raises GateError if a graph does not pass; `folder` then has no
    manifest, so nothing can load it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shape = trained.ranker.shape
    f, g, d = shape.context_features, shape.candidate_features, trained.ranker.user.out_features
    if (len(labels.context_features), len(labels.candidate_features)) != (f, g) and slates is not None:
        raise ArtifactError(
            f"the labels name {len(labels.context_features)} context and {len(labels.candidate_features)} candidate "
            f"features, the model takes {f} and {g}; give the names that the slates were made from"
        )
    export_fp32(trained.ranker, folder / RANKER_FP32, f=f, g=g, d=d)
    run_fp32 = session_runner(folder / RANKER_FP32)
    parity: dict[str, Any] = {"fp32_max_difference": check_parity(trained.ranker, run_fp32, f=f, g=g, d=d)}
    scorer = trained.scorer(slates, rerank=200)
    fp32 = replace(scorer, run=run_fp32)
    order = np.random.default_rng(trained.config.seed).permutation(len(requests))
    half = (len(requests) + 1) // 2
    calibration = calibration_requests(fp32, requests.take(np.sort(order[:half])), seed=trained.config.seed)
    quantise(folder / RANKER_FP32, folder / RANKER_INT8, calibration)
    run_int8 = session_runner(folder / RANKER_INT8)
    report = check_int8(compare_int8(fp32, replace(scorer, run=run_int8), requests.take(np.sort(order[half:]))))
    parity["int8"] = {**asdict(report), "batch_tolerance_rate": INT8_BATCH_TOLERANCE_RATE}
    weight, bias = trained.text_projection()
    np.savez(folder / TEXT_PROJECTION, weight=weight, bias=bias)
    residuals = trained.item_residuals()
    learned = residuals.any(axis=1)
    np.savez(folder / ITEM_RESIDUALS, item_ids=item_ids[learned], residuals=residuals[learned])
    (folder / POPULAR_ITEMS).write_text(json.dumps(list(popular_items), ensure_ascii=False), encoding="utf-8")
    latency = {
        f"{name}_{quantile}": value
        for name, run in (("cpu-fp32", run_fp32), ("cpu-int8", run_int8))
        for quantile, value in latency_ms(run, f=f, g=g, d=d).items()
    }
    scale, offset = trained.calibration
    manifest = Manifest(
        name=labels.name,
        size=shape.size,
        dim=d,
        feature_fingerprint=labels.feature_fingerprint,
        context_features=labels.context_features,
        candidate_features=labels.candidate_features,
        encoder_version=labels.encoder_version,
        item_template=labels.item_template,
        wish_template=labels.wish_template,
        trained_until=labels.trained_until,
        seed=trained.config.seed,
        files={
            name: describe_file(folder / name)
            for name in (RANKER_FP32, RANKER_INT8, TEXT_PROJECTION, ITEM_RESIDUALS, POPULAR_ITEMS)
        },
        quality={
            **(quality or {}),
            "validation": trained.validation,
            "calibration": {"scale": scale, "offset": offset},
        },
        parity=parity,
        latency_ms=latency,
    )
    part = folder / f"{MANIFEST_FILE}.part"
    part.write_text(manifest.to_json(), encoding="utf-8")
    os.replace(part, folder / MANIFEST_FILE)
    return manifest


def calibration_requests(
    scorer: RankerScorer, queries: Queries, *, candidates: int = 64, seed: int = 0
) -> Iterator[Inputs]:
    """Each of `queries` as one request of its own with random candidates: padding would blur the ranges."""
    generator = np.random.default_rng(seed)
    for begin in range(0, len(queries), 64):
        # Features are asked for in batches, because one question costs about as much as sixty-four.
        part = queries.take(slice(begin, begin + 64))
        offered = generator.integers(0, len(scorer.item_vectors), (len(part), candidates)).astype(np.int32)
        inputs = scorer.inputs(part, offered)
        yield from (alone(inputs, row) for row in range(len(part)))


def alone(inputs: Inputs, row: int) -> Inputs:
    """Request `row` of a batch as a request of its own: without the padding that longer histories beside it brought."""
    length = max(1, int(inputs["history_mask"][row].sum()))
    return {
        name: value[row : row + 1, -length:] if name.startswith("history_") else value[row : row + 1]
        for name, value in inputs.items()
    }


def describe_file(path: Path) -> ArtifactFile:
    """Size and SHA-256 of `path`."""
    content = path.read_bytes()
    return ArtifactFile(len(content), hashlib.sha256(content).hexdigest())
