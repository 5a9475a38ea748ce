"""The files of a ranker's artefact: graphs that passed the gate, vectors, lists, hashes, the manifest last."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from inference.ranker import CutEngine
from orchestration.compute.co_visitation import WindowedPopularity, co_visitation, popularity
from orchestration.compute.evaluate import (
    MakeSlates,
    RunRanker,
    Scorer,
    score_co_visitation,
    score_windowed_popularity,
)
from orchestration.compute.export import (
    Inputs,
    calibration_requests,
    cut,
    export_fp32,
    quantise,
    random_inputs,
    session_runner,
)
from orchestration.compute.folded import fold
from orchestration.compute.half import half
from orchestration.compute.mining import recent_rows
from orchestration.compute.parity import (
    FP32_SHIFT_RATE,
    HALF_TOLERANCE_RATE,
    INT8_BATCH_TOLERANCE_RATE,
    check_cut,
    check_half,
    check_int8,
    check_invariance,
    check_parity,
    compare_int8,
)
from orchestration.compute.splits import Queries, queries_for
from orchestration.compute.telling import Say, silent
from orchestration.compute.trained_ranker import TrainedRanker
from schemas.errors import ArtifactError, GateError
from schemas.manifest import (
    ITEM_RESIDUALS,
    MANIFEST_FILE,
    POPULAR_ITEMS,
    RANKER_FP16,
    RANKER_FP32,
    RANKER_INT8,
    RANKER_INT8_PARTS,
    TEXT_PROJECTION,
    ArtifactFile,
    Manifest,
)
from schemas.prompts import DEFAULTS
from schemas.ranker import MAX_CANDIDATES, MAX_HISTORY

CALIBRATION_REQUESTS = 512
JUDGED_REQUESTS = 2048
"""So many judge int8 at least, where the table has them: of 943, a loss of 1 % lies within chance (interval −0.5 to 2.5 %)."""
WISH_EVERY = 4
"""One in so many calibrating requests carries a wish."""


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
    progress: Say = silent,
) -> Manifest:
    """Export, quantise, pass the gate and write every file of the artefact into `folder`, the manifest last.

    `item_ids (items,)` is the catalogue in training order. `requests` are real ones whose labels were held out (500 or
    more are wanted): they judge int8, with other recent events of the same table up to `JUDGED_REQUESTS`. Further events
    calibrate it, of which no label is looked at.
    Raises ArtifactError, before `folder` is touched, if the labels name other features than the model takes; GateError if
    a graph does not pass: `folder` then has no manifest, so nothing can load it.
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
    if len(requests) == 0:
        raise GateError("0 requests are too few to judge int8 on: give one or more, 500 judge well")
    calibrating = calibration_queries(requests, trained.config.seed)
    if len(calibrating) == 0:
        raise GateError(
            f"every event of the table is among the {len(requests)} requests that judge int8, none is left to calibrate it: "
            "give a table with more events"
        )
    progress("exporting; each graph is compared with the model over a sweep of shapes")
    export_fp32(fold(trained.ranker), folder / RANKER_FP32, f=f, g=g, d=d)
    run_fp32 = session_runner(folder / RANKER_FP32)
    parity: dict[str, Any] = {"fp32_max_difference": check_parity(trained.ranker, run_fp32, f=f, g=g, d=d)}
    scorer = trained.scorer(slates, rerank=200, sources=_sources(requests))
    fp32 = replace(scorer, run=run_fp32)
    some = requests.take(slice(0, 32))
    real = fp32.inputs(some, fp32.offered(some, 100))
    parity["fp32_shift_rate"] = check_invariance(run_fp32, real)
    parity["fp32_shift_tolerance_rate"] = FP32_SHIFT_RATE
    longest = random_inputs(1, MAX_HISTORY, MAX_CANDIDATES, f=f, g=g, d=d, seed=0)
    parity["fp16"] = _write_half(trained, folder / RANKER_FP16, (real, longest), f=f, g=g, d=d)
    wishing = replace(fp32, wish_vectors=_wishes(trained))
    progress(f"quantising to int8, calibrated by {len(calibrating):,} requests")
    quantise(
        folder / RANKER_FP32,
        folder / RANKER_INT8,
        calibration_requests(wishing, calibrating, seed=trained.config.seed),
    )
    run_int8 = session_runner(folder / RANKER_INT8)
    judging = judging_queries(requests, calibrating, trained.config.seed)
    progress(f"int8 against float on {len(judging):,} requests")
    report = compare_int8(fp32, replace(scorer, run=run_int8), judging)
    runs = {"cpu-fp32": (RANKER_FP32, run_fp32), "cpu-int8": (RANKER_INT8, run_int8)}
    cuts: tuple[str, ...] = ()
    refused = None
    try:
        check_int8(report)
    except GateError as error:
        # The float graph passed a gate of its own and serves; the int8 one never leaves this folder.
        refused = str(error)
        del runs["cpu-int8"]
        (folder / RANKER_INT8).unlink()
    else:
        cuts = RANKER_INT8_PARTS
        person, candidates = (folder / name for name in cuts)
        cut(folder / RANKER_INT8, person, candidates)
        check_cut(run_int8, CutEngine(person, candidates, 0).run, f=f, g=g, d=d)
    figures = {name: value if np.isfinite(value) else None for name, value in asdict(report).items()}  # JSON has no NaN
    parity["int8"] = {
        **figures,
        "calibration_requests": len(calibrating),
        "batch_tolerance_rate": INT8_BATCH_TOLERANCE_RATE,
        "refused": refused,
    }
    weight, bias = trained.text_projection()
    np.savez(folder / TEXT_PROJECTION, weight=weight, bias=bias)
    residuals = trained.item_residuals()
    learned = residuals.any(axis=1)
    np.savez(folder / ITEM_RESIDUALS, item_ids=item_ids[learned], residuals=residuals[learned])
    (folder / POPULAR_ITEMS).write_text(json.dumps(list(popular_items), ensure_ascii=False), encoding="utf-8")
    progress("timing the graphs")
    latency = {
        f"{name}_{quantile}": value
        for name, (_, run) in runs.items()
        for quantile, value in latency_ms(run, f=f, g=g, d=d).items()
    }
    graphs = [*(file for file, _ in runs.values()), *cuts]
    if parity["fp16"]["refused"] is None:
        graphs.append(RANKER_FP16)
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
            name: describe_file(folder / name) for name in (*graphs, TEXT_PROJECTION, ITEM_RESIDUALS, POPULAR_ITEMS)
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


def _write_half(
    trained: TrainedRanker, path: Path, requests: Sequence[Inputs], *, f: int, g: int, d: int
) -> dict[str, float | str | None]:
    """Write the graph for a GPU to `path` and give its figures; one that fails its gate is left out.

    It is judged on ONNX Runtime's CPU provider, which has the roundings of the graph but not those of a card's products;
    `make bench-gpu` judges those.
    """
    export_fp32(half(trained.ranker), path, f=f, g=g, d=d)
    figures: dict[str, float | str | None] = {"shift_tolerance_rate": HALF_TOLERANCE_RATE, "refused": None}
    try:
        figures["shift_rate"] = check_half(trained.ranker, session_runner(path), requests)
    except GateError as error:
        figures["refused"] = str(error)
        path.unlink()
    return figures


def calibration_queries(requests: Queries, seed: int, count: int = CALIBRATION_REQUESTS) -> Queries:
    """At most `count` requests of the same table as `requests`, recent where there are enough, none of them judged."""
    events = requests.interactions
    for rows in (recent_rows(events), np.arange(len(events), dtype=np.int64)):
        other = queries_for(events, rows[~np.isin(rows, requests.label)], strictly_earlier=True)
        if len(other) >= count:
            break
    chosen = np.random.default_rng((seed, 8)).permutation(len(other))[:count]
    return other.take(np.sort(chosen))


def judging_queries(requests: Queries, calibrating: Queries, seed: int, count: int = JUDGED_REQUESTS) -> Queries:
    """`requests`, and recent ones of the same table up to `count` that did not calibrate.

    The model learned from some of the added labels, so their NDCG is no measure of it; that int8 finds as many as float
    is measured by them as well as by others.
    """
    events = requests.interactions
    rows = recent_rows(events)
    rows = rows[~np.isin(rows, np.concatenate([requests.label, calibrating.label]))]
    added = queries_for(events, rows, strictly_earlier=True)
    chosen = np.random.default_rng((seed, 9)).permutation(len(added))[: max(count - len(requests), 0)]
    added = added.take(np.sort(chosen))
    return Queries(
        events,
        np.concatenate([requests.label, added.label]),
        np.concatenate([requests.start, added.start]),
        np.concatenate([requests.stop, added.stop]),
    )


def _sources(requests: Queries) -> tuple[Scorer, Scorer]:
    """Where serving's candidates come from besides the user vector: what is trending and what follows, labels left out."""
    kept = np.ones(len(requests.interactions), bool)
    kept[requests.label] = False
    events = requests.interactions.take(kept)
    return (
        score_windowed_popularity(WindowedPopularity(events)),
        score_co_visitation(co_visitation(events), popularity(events)),
    )


def _wishes(trained: TrainedRanker) -> Callable[[Queries], NDArray[np.float32]]:
    """Every fourth label's item, known by its text alone, as what its person asked for: `(q, d)`, zeros without a wish."""
    with torch.no_grad():
        texts: NDArray[np.float32] = trained.tower.text_only().numpy()  # (items, d)
    return lambda queries: texts[queries.target] * (queries.label % WISH_EVERY == 0)[:, None].astype(np.float32)


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
