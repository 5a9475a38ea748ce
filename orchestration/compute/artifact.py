"""The files of a ranker's artefact: graphs that passed the gate, vectors, lists, hashes, the manifest last."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestration.compute.evaluate import MakeSlates, RunRanker
from orchestration.compute.export import calibration_requests, export_fp32, quantise, random_inputs, session_runner
from orchestration.compute.parity import INT8_BATCH_TOLERANCE_RATE, check_int8, check_parity, compare_int8
from orchestration.compute.splits import Queries
from orchestration.compute.trained_ranker import TrainedRanker
from schemas.errors import ArtifactError, GateError
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
from schemas.prompts import DEFAULTS
from schemas.ranker import MAX_HISTORY

LEAST_REQUESTS = 2
"""One calibrates int8, one judges it."""


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
    profile_template: str = DEFAULTS["profile"]
    wish_weight: float = 0.0


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
    half calibrates int8 (ranges only, no label is looked at), the other half judges it. Raises ArtifactError, before
    `folder` is touched, if the labels name other features than the model takes; GateError if a graph does not pass:
    `folder` then has no manifest, so nothing can load it.
    """
    shape = trained.ranker.shape
    f, g, d = shape.context_features, shape.candidate_features, trained.ranker.user.out_features
    if (len(labels.context_features), len(labels.candidate_features)) != (f, g):
        raise ArtifactError(
            f"the labels name {len(labels.context_features)} context and {len(labels.candidate_features)} candidate "
            f"features, the model takes {f} and {g}; give the names of the features it was trained with"
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST_FILE).unlink(missing_ok=True)
    if len(requests) < LEAST_REQUESTS:
        raise GateError(
            f"int8 is calibrated on one half of the requests and judged on the other; {len(requests)} are too few: "
            f"give {LEAST_REQUESTS} or more, 1,024 judge well"
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
    report = compare_int8(fp32, replace(scorer, run=run_int8), requests.take(np.sort(order[half:])))
    runs = {"cpu-fp32": (RANKER_FP32, run_fp32), "cpu-int8": (RANKER_INT8, run_int8)}
    refused = None
    try:
        check_int8(report)
    except GateError as error:
        # The float graph passed a gate of its own and serves; the int8 one never leaves this folder.
        refused = str(error)
        del runs["cpu-int8"]
        (folder / RANKER_INT8).unlink()
    figures = {name: value if np.isfinite(value) else None for name, value in asdict(report).items()}  # JSON has no NaN
    parity["int8"] = {**figures, "batch_tolerance_rate": INT8_BATCH_TOLERANCE_RATE, "refused": refused}
    weight, bias = trained.text_projection()
    np.savez(folder / TEXT_PROJECTION, weight=weight, bias=bias)
    residuals = trained.item_residuals()
    learned = residuals.any(axis=1)
    np.savez(folder / ITEM_RESIDUALS, item_ids=item_ids[learned], residuals=residuals[learned])
    (folder / POPULAR_ITEMS).write_text(json.dumps(list(popular_items), ensure_ascii=False), encoding="utf-8")
    latency = {
        f"{name}_{quantile}": value
        for name, (_, run) in runs.items()
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
        profile_template=labels.profile_template,
        wish_weight=labels.wish_weight,
        trained_until=labels.trained_until,
        seed=trained.config.seed,
        files={
            name: describe_file(folder / name)
            for name in (*(file for file, _ in runs.values()), TEXT_PROJECTION, ITEM_RESIDUALS, POPULAR_ITEMS)
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


def latency_ms(run: RunRanker, *, f: int, g: int, d: int, n: int = 500, runs: int = 30) -> dict[str, float]:
    """p50 and p99 of one request with a full history and `n` candidates, after a warm-up."""
    inputs = random_inputs(1, MAX_HISTORY, n, f=f, g=g, d=d, seed=0)
    took = []
    for _ in range(runs + 3):
        began = time.perf_counter()
        run(inputs)
        took.append((time.perf_counter() - began) * 1000)
    return {"p50": float(np.quantile(took[3:], 0.5)), "p99": float(np.quantile(took[3:], 0.99))}


def describe_file(path: Path) -> ArtifactFile:
    """Size and SHA-256 of `path`."""
    content = path.read_bytes()
    return ArtifactFile(len(content), hashlib.sha256(content).hexdigest())
